"""SOFT-tiny as its paper has it, as this library has it and with softmax: time, memory, cost, 224 to 2048 pixels.

literal         The published model, written here as it stands: three products for each block of distances, 20 Newton
                steps with −XᵀGXᵀ for the gradient, (C·A⁺)·(CᵀV), tanh-GELU in elementary operations, landmarks that
                grow with the image, and one filter per head for the values, for which the channels of a head must pass
                the grouped convolution as so many images.
literal, wide   The same but for that convolution: the filters repeated, all channels in one image.
ours, 20 steps  examples/soft's model with ``trained="official"``, but at most 7 × 7 landmarks, which at 224 pixels
                changes nothing: its outputs are the literal's.
ours            The default: the inverse converged. "ours, bf16" is under autocast, "ours, compiled" by torch.compile.
softmax         Ours with ``attn="softmax"``: scaled_dot_product_attention, separate q, k and v, in all stages.

First it is checked, of five pairs of images in float32 and float64, that the outputs agree, and told how far each
model's gradient in float32 is off its own in float64, the median, and the literal's off the derivative: −XᵀGXᵀ is none
where 20 steps have not converged. For gradients ReLUs are softplus: with ReLUs the error is that of the few that flip,
ten times as large, and which do is luck.
All but the last hold the same weights. Forward is in evaluation mode and without gradients; backward in training mode,
of the cross-entropy. Times are of interleaved calls, each right after another of its model, which is not counted,
unless it takes two seconds or there was time for one only; on a CPU every model is in a process of its own, as it will
be for whoever uses it: in one process, memory that the largest model frees stays there and spares all others, and
itself, what the system takes for new memory. Batches hold as many pixels as the first size's, at least one image.
Memory is what one call, weights and gradients being there, adds to the resident set of a fresh process that has run the
model on a small image before, or on CUDA to the bytes torch has allocated. GMACs are torch's count of the forward pass,
of one image.
Ratios, of medians and of least times, are the literal's time over that of the row. A method stops where its next call
is expected, from its GMACs, to exceed --budget or --memory. The table goes to stdout, all else to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from statistics import median

import matplotlib
import timm
import torch
import torch.nn.functional as F
from attention import ALSO_COUNTED, PASSES, PublishedInverse, apart, peak, published_block, setting, timed, write
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).parents[1] / "soft"))
import checkpoint
import model as soft

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LITERAL = "literal"
METHODS = (LITERAL, "literal, wide", "ours, 20 steps", "ours", "ours, bf16", "softmax")
# Newton unconverged doubles rounding in each of its 20 steps, and some thirty layers follow one another.
BOUNDS = {torch.float32: 1e-4, torch.float64: 1e-9}
PAIRS = 5  # of images, which what is told of gradients is the median of
LARGER = (LITERAL, "ours", "softmax")  # beyond the first size


# The published model, under the published names.


class LiteralHeads(nn.Module):
    def __init__(self, dim: int, stride: int, kernel: int, wide: bool):
        super().__init__()
        heads = dim // 32
        self.W_q, self.W_v, self.ff = (nn.Linear(dim, dim) for _ in range(3))
        landmarks = nn.Conv2d(32, 32, stride, stride=stride, bias=False)
        conv = nn.Conv2d(heads, heads, kernel, padding=kernel // 2, groups=heads, bias=False)
        act = nn.Sequential(nn.LayerNorm(32), nn.GELU())
        self.attn = nn.ModuleDict({"Qlandmark_op": landmarks, "Qnorm_act": act, "conv": conv})
        self.wide = wide

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        q, v = (y.reshape(*x.shape[:2], -1, 32).transpose(1, 2) for y in (self.W_q(x), self.W_v(x)))
        batch, heads, _, d = q.shape
        q = q / d**0.25
        z = q.reshape(batch * heads, *size, d).permute(0, 3, 1, 2)  # (B·heads, d, H, W)
        z = self.attn["Qlandmark_op"](z).flatten(2).transpose(1, 2)  # (B·heads, m, d)
        z = self.attn["Qnorm_act"](z).reshape(batch, heads, -1, d)
        c, a = published_block(q, z), published_block(z, z)  # (B, heads, n, m), (B, heads, m, m)
        out = (c @ PublishedInverse.apply(a)) @ (c.transpose(-2, -1) @ v)  # (B, heads, n, d)
        out = (out + self.convolved(v, size)).transpose(1, 2).reshape(x.shape)
        return self.ff(out)

    def convolved(self, v: Tensor, size: tuple[int, int]) -> Tensor:
        batch, heads, n, d = v.shape
        conv = self.attn["conv"]
        if self.wide:
            image = v.transpose(2, 3).reshape(batch, heads * d, *size)
            image = F.conv2d(image, conv.weight.repeat_interleave(d, dim=0), padding=conv.padding, groups=heads * d)
            return image.reshape(batch, heads, d, n).transpose(2, 3)
        image = conv(v.permute(0, 3, 1, 2).reshape(batch * d, heads, *size))
        return image.reshape(batch, d, heads, n).permute(0, 2, 3, 1)


class LiteralBlock(nn.Module):
    def __init__(self, dim: int, *core):
        super().__init__()
        self.mha = LiteralHeads(dim, *core)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ff1, self.ff2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.norm1(x + self.mha(x, size))
        y = self.ff1(x)
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * torch.pow(y, 3))))
        return self.norm2(x + self.ff2(y))


class LiteralSoftmaxBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict(
            {"q": nn.Linear(dim, dim), "kv": nn.Linear(dim, 2 * dim), "proj": nn.Linear(dim, dim)}
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        y = self.norm1(x)
        parts = self.attn["q"](y), *self.attn["kv"](y).chunk(2, dim=-1)
        q, k, v = (part.reshape(*x.shape[:2], -1, 32).transpose(1, 2) for part in parts)  # (B, heads, N, d)
        y = torch.softmax(q @ k.transpose(-2, -1) * 32**-0.5, dim=-1) @ v
        x = x + self.attn["proj"](y.transpose(1, 2).reshape(x.shape))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Literal(nn.Module):
    """soft_tiny of 224 pixels; its state dict has the authors' names."""

    def __init__(self, *, wide: bool = False):
        super().__init__()
        self.depths, widths = soft.CONFIGS["soft_tiny"].values()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, widths[3]))
        for i, (depth, dim) in enumerate(zip(self.depths, widths, strict=True), start=1):
            convolutions = [(3, 32, 2), (32, 32, 1), (32, dim, 2)] if i == 1 else [(widths[i - 2], dim, 2)]
            layers = [layer for shape in convolutions for layer in soft.conv_norm_relu(*shape)]
            setattr(self, f"patch_embed{i}", nn.ModuleDict({"proj": nn.Sequential(*layers)}))
            setattr(self, f"pos_embed{i}", nn.Parameter(torch.zeros(1, (56, 28, 14, 7)[i - 1] ** 2 + (i == 4), dim)))
            blocks = [LiteralSoftmaxBlock(dim) for _ in range(depth)]
            if i < 4:
                shape = dim, (8, 4, 2)[i - 1], (9, 5, 3)[i - 1], wide
                blocks = [nn.ModuleDict({"att": LiteralBlock(*shape)}) for _ in range(depth)]
            setattr(self, f"block{i}", nn.ModuleList(blocks))
        self.norm, self.head = nn.LayerNorm(widths[3], eps=1e-6), nn.Linear(widths[3], 1000)

    def forward(self, x: Tensor) -> Tensor:
        for i in (1, 2, 3, 4):
            x = getattr(self, f"patch_embed{i}")["proj"](x)  # (B, C, H, W)
            size, positions = tuple(x.shape[2:]), getattr(self, f"pos_embed{i}")
            x = x.flatten(2).transpose(1, 2)  # (B, N, C)
            slots = int(i == 4)
            if size[0] * size[1] + slots != positions.shape[1]:
                side = math.isqrt(positions.shape[1])
                image = positions[:, slots:].transpose(1, 2).unflatten(2, (side, side))
                image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
                positions = torch.cat([positions[:, :slots], image.flatten(2).transpose(1, 2)], dim=1)
            if i == 4:
                x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, C)
            x = x + positions
            for block in getattr(self, f"block{i}"):
                x = (block if i == 4 else block["att"])(x, size)
            if i < 4:
                x = x.transpose(1, 2).reshape(len(x), -1, *size)
        return self.head(self.norm(x)[:, 0])


# The models compared.


def weigh(model: soft.Soft) -> None:
    """Weights from a fixed seed that make every part count: at 224 pixels 19 Newton steps move the logits by 6 %."""
    generator = torch.Generator().manual_seed(0)
    for key, x in checkpoint.to_official(dict(model.named_parameters())).items():
        z = torch.randn(x.shape, generator=generator)
        if x.ndim > 1 and "pos_embed" not in key and key != "cls_token":
            x.data.copy_(z / math.prod(x.shape[1:]) ** 0.5)
        elif key.endswith("weight"):
            x.data.copy_((0.5 if "Qnorm_act" in key else 1) * (1 + 0.1 * z))
        else:
            x.data.copy_(0.02 * z)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    options = {"ours, 20 steps": {"trained": "official", "landmark_grid": 7}, "softmax": {"attn": "softmax"}}
    ours = timm.create_model("soft_tiny", **options.get(name, {}))
    if name != "softmax":
        weigh(ours)
    if name.startswith(LITERAL):
        literal = Literal(wide=name == "literal, wide")
        literal.load_state_dict(checkpoint.to_official(ours.state_dict()))
        return literal
    return torch.compile(ours, fullgraph=True) if name == "ours, compiled" else ours


def images(batch: int, size: int, device: str = "cpu", seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(device)


def step(name: str, model: nn.Module, x: Tensor, backward: bool) -> Tensor:
    """Logits, and with ``backward`` fresh gradients of the cross-entropy in all parameters."""
    model.train(backward)
    half = torch.autocast(x.device.type, torch.bfloat16) if name == "ours, bf16" else contextlib.nullcontext()
    with half, torch.set_grad_enabled(backward):
        logits = model(x)
        loss = F.cross_entropy(logits, torch.arange(len(x), device=x.device))
    if backward:
        model.zero_grad(set_to_none=True)
        loss.backward()
    return logits.detach()


def gradients(name: str, model: nn.Module, x: Tensor) -> Tensor:
    step(name, model, x, True)
    found = {key: parameter.grad for key, parameter in model.named_parameters()}
    found = found if name.startswith(LITERAL) else checkpoint.to_official(found)
    return torch.cat([found[key].flatten().double() for key in sorted(found)])


def without_kinks(model: nn.Module) -> nn.Module:
    for layers in list(model.modules()):
        for name, layer in layers.named_children():
            if isinstance(layer, nn.ReLU):
                setattr(layers, name, nn.Softplus())
    return model


def agreement(size: int, pairs: int) -> dict[str, float]:
    """Whether the models compute the same, and how well, on the CPU, of so many pairs of images; SystemExit if not."""
    found: dict[str, list[float]] = {}
    for seed in range(1, pairs + 1):
        for what, value in _agreement(images(2, size, seed=seed)).items():
            found.setdefault(what, []).append(value)
    return {what: max(values) if what.startswith("outputs") else median(values) for what, values in found.items()}


def _agreement(x: Tensor) -> dict[str, float]:
    names = (LITERAL, "literal, wide", "ours, 20 steps", "ours")
    logits, slopes, found = {}, {}, {}
    for name, dtype in itertools.product(names, BOUNDS):
        model = build(name).to(dtype)
        logits[name, dtype] = step(name, model, x.to(dtype), False).double()
        slopes[name, dtype] = gradients(name, without_kinks(model), x.to(dtype))
    for name, dtype in itertools.product(names[1:3], BOUNDS):
        off = float((logits[name, dtype] - logits[LITERAL, dtype]).abs().max() / logits[LITERAL, dtype].abs().max())
        if not off <= BOUNDS[dtype]:
            raise SystemExit(f"soft.py: in {dtype} the outputs of {name!r} are {off:.1e} off the literal's")
        found[f"outputs of {name!r} off the literal's, {dtype}"] = off
    for name in names:
        found[f"outputs of {name!r}, float32 off float64"] = apart(*(logits[name, dtype] for dtype in BOUNDS))
        found[f"gradient of {name!r}, float32 off float64"] = apart(*(slopes[name, dtype] for dtype in BOUNDS))
    literal, ours = (slopes[name, torch.float64] for name in (LITERAL, "ours, 20 steps"))
    return found | {"gradient of 'literal' off the derivative of what it computes": apart(literal, ours)}


# The measurement.


def gmacs(name: str, size: int) -> float:
    """Of one image; of what may be too costly, on tensors that have a shape and nothing else."""
    costly = name.startswith(LITERAL) or name == "softmax"
    counter = FlopCounterMode(display=False, custom_mapping=ALSO_COUNTED)
    with FakeTensorMode() if costly else contextlib.nullcontext(), counter:
        step(name, build(name), images(1, size), False)
    return counter.get_total_flops() / 2e9


def memory(name: str, batch: int, size: int, backward: bool, device: str) -> int:
    model = build(name).to(device)
    step(name, model, images(batch, 64, device), backward)
    x = images(batch, size, device)
    return peak(lambda: step(name, model, x, backward), device)


@cache
def prepared(name: str, device: str) -> nn.Module:
    return build(name).to(device)


@cache
def prepared_images(batch: int, size: int, device: str) -> Tensor:
    return images(batch, size, device)


def one_step(name: str, batch: int, size: int, backward: bool, device: str) -> None:
    step(name, prepared(name, device), prepared_images(batch, size, device), backward)


def runner(name: str, device: str) -> Callable[..., None]:
    """``one_step`` of a model, on a CPU in a process that is the model's own and stays."""
    if device != "cpu":
        return partial(one_step, name)
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    pool.submit(prepared, name, device).result()
    return lambda *given: pool.submit(one_step, name, *given).result()


def measure(options: argparse.Namespace, models: dict, size: int, backward: bool, before: list[dict]) -> list[dict]:
    """A row per method, of ``models``' runners; ``before`` are those of smaller images."""
    first = options.sizes[0]
    batch = max(1, options.batch * first**2 // size**2)
    rows, calls, used = [], {}, {}
    for name in models if size == first else LARGER:
        row = {"size": size, "batch": batch, "pass": PASSES[backward], "method": name, "median": None}
        # Neither the compiler nor autocast changes what is counted.
        rows.append(row | {"gmacs": gmacs("ours" if name in ("ours, bf16", "ours, compiled") else name, size)})
        if earlier := [r for r in before if (r["method"], r["pass"]) == (name, row["pass"]) and r["median"]]:
            last, pixels = earlier[-1], (size / earlier[-1]["size"]) ** 2
            seconds = last["median"] * batch / last["batch"] * rows[-1]["gmacs"] / last["gmacs"]
            # The literal's blocks have as many columns as a stage has landmarks, which grow with the image.
            held = last["memory"] * batch / last["batch"] * (pixels**2 if name == LITERAL else pixels)
            if seconds > options.budget or held > options.memory * 1e9:
                continue
        calls[name] = partial(models[name], batch, size, backward, options.device)
        if name != "ours, compiled" or options.device == "cuda":  # the compiler's own memory would be counted
            used[name] = partial(memory, name, batch, size, backward, options.device)
    figures = timed(calls, used, options.device, *((1, 0.1) if options.quick else (20, 30.0)))
    for row in rows:
        if mine := figures.get(row["method"]):
            row |= mine | {"images/s": batch / mine["median"], "ratio": None, "least": None}
            if base := figures.get(LITERAL):
                row |= {"ratio": base["median"] / mine["median"], "least": base["min"] / mine["min"]}
    return rows


# Title, factor and format of what is in a row.
COLUMNS = {"median": ("median ms", 1e3, ".1f"), "spread": ("spread", 1e3, ".1f"), "min": ("min", 1e3, ".1f")}
COLUMNS |= {"images/s": ("images/s", 1, ".2f"), "memory": ("peak MB", 1e-6, ".0f"), "gmacs": ("GMACs", 1, ".2f")}
COLUMNS |= {"ratio": ("ratio", 1, ".2f"), "least": ("least", 1, ".2f")}


def line(row: dict) -> str:
    start = f"{row['size']:>5}{row['batch']:>6}  {row['pass']:<10}  {row['method']:<15}"
    if row["median"] is None:
        return f"{start}  over budget, at {row['gmacs']:.1f} GMACs"
    shown = ("–" if row[key] is None else format(row[key] * unit, form) for key, (_, unit, form) in COLUMNS.items())
    return f"{start}{row['rounds']:>6}" + "".join(f"{text:>10}" for text in shown)


def plot(rows: list[dict], path: Path, title: str) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    panels = (("images/s", PASSES[0]), ("images/s", PASSES[1]), ("memory", PASSES[1]))
    for axis, (what, way) in zip(axes, panels, strict=True):
        for name in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if (row["method"], row["pass"]) == (name, way) and row.get(what)]
            values = [row[what] / (row["batch"] if what == "memory" else 1) for row in mine]
            axis.loglog([row["size"] for row in mine], values, "o-", ms=4, label=name)
        axis.set(xlabel="pixels a side", ylabel="bytes an image" if what == "memory" else what, title=way)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)


def sizes_from(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers of pixels, comma-separated, not {text!r}") from None
    if min(sizes) < 64:
        raise argparse.ArgumentTypeError(f"must be at least 64 pixels, so that every stage has a landmark, not {text}")
    return sizes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="64 and 96 pixels, batch 2, one round")
    parser.add_argument("--output", type=Path, help="folder for soft.json and soft.png")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=sizes_from, help="pixels, growing, comma-separated; 224,384,512,1024,2048")
    parser.add_argument("--batch", type=int, help="images of the first size; 8 unless given")
    parser.add_argument("--compile", action="store_true", help="torch.compile as one more method")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds that one call may be expected to take")
    parser.add_argument("--memory", type=float, default=8.0, help="gigabytes, likewise")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no CUDA device here")
    options.sizes = options.sizes or ((64, 96) if options.quick else (224, 384, 512, 1024, 2048))
    options.batch = options.batch or (2 if options.quick else 8)
    about = setting("soft", options.device, arguments) | {"timm": timm.__version__}
    print(", ".join(f"{key} {value}" for key, value in about.items()), file=sys.stderr)
    about["agreement"] = agreement(min(224, options.sizes[0]), 1 if options.quick else PAIRS)
    print("\n".join(f"{value:.1e}  {what}" for what, value in about["agreement"].items()), file=sys.stderr)

    names = METHODS + (("ours, compiled",) if options.compile else ())
    models = {name: runner(name, options.device) for name in names}
    titles = "".join(f"{title:>10}" for title, _, _ in COLUMNS.values())
    print(f"{'size':>5}{'batch':>6}  {'pass':<10}  {'method':<15}{'rounds':>6}{titles}", flush=True)
    rows: list[dict] = []
    for size in options.sizes:
        for backward in (False, True):
            measured = measure(options, models, size, backward, rows)
            print("\n".join(map(line, measured)), flush=True)
            rows += measured
    if options.output is not None:
        write(options.output / "soft.json", about | {"rows": rows})
        plot(rows, options.output / "soft.png", f"soft_tiny, {about['machine']}")


if __name__ == "__main__":
    main()
