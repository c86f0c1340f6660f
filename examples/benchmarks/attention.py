"""Time, memory and error of attention against the number of tokens, from 256 to 2²⁰, for nine kinds of attention.

lowrank        ``softmax_free_attention`` with 49 landmarks, the means of 49 segments, which are part of the call, as of
               those of the next four.
blocks         The same without its compiled kernels, as where there was no C compiler: by torch's operations.
null key       The same by two calls of torch's scaled_dot_product_attention with one key more, which computes Gaussian
               products; the core is solved with by LU factors.
textbook       The same formula as it is usually written (Lu et al., NeurIPS 2021, as released): three products for
               each block of distances, 20 Newton steps with −XᵀGXᵀ for the gradient, then (C·A⁺)·(Cᵀv).
direct         ``lowrank`` with ``method="direct"``: a Cholesky factor solves with the core.
Gaussian       All of k(q, q) v, by ``gaussian_matmul``.
softmax        torch's scaled_dot_product_attention.
Nyströmformer  transformers' NystromformerSelfAttention with its default 64 landmarks, without its convolution. Its
               three projections are left out, as nobody else is charged for any.
linear         φ(q)(φ(q)ᵀv)/(φ(q)φ(q)ᵀ1), φ = elu + 1 (Katharopoulos et al., ICML 2020).

Queries serve as keys. They are 32 channels a head, laid out as a projection of tokens leaves them, from a fixed seed,
and drift: a token is one of 64 places, in order, plus noise. The condition of A + 0.01·I is told; 4,901 is the most it
can be. Times are of interleaved calls in one process, each right after another of its method, which is not counted,
unless it takes two seconds or there was time for one only. Memory is what one call adds to the resident set of a fresh
process that has run the method at 256 tokens before (getrusage; it includes what libraries take for themselves, and
below 1 MB means nothing), or on CUDA to the bytes torch has allocated; inputs are not in it, gradients are. Errors are
relative, in the Frobenius norm, of the output or of the gradients in q and v, of one head, against the plain formula in
float64, where the inverse is a solve: the textbook's error is that of its 20 steps. Methods of quadratic cost have
theirs up to 4,096 tokens. A method stops where its next call is expected to exceed --budget or --memory. The table goes
to stdout; slopes, fitted for one head from 4,096 tokens on, and ratios to stderr.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import math
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank import _native, gaussian_kernel, gaussian_matmul, softmax_free_attention
from lowrank._torch_attention import gaussian_product
from lowrank.landmarks import segment_means

matplotlib.use("Agg")
import matplotlib.pyplot as plt

D, LANDMARKS, RIDGE = 32, 49, 0.01
SCALE = D**0.25  # the lengthscale: q/SCALE is what is compared
SETTINGS = [(16, n) for n in (256, 512, 1024, 3136, 4096, 16384)] + [(1, 4**k) for k in range(6, 11)]
QUICK = [(2, 512), (1, 256), (1, 512)]
# Who is compared with lowrank, and at how many tokens; all heads there are.
COMPARED = {"softmax": (512, 16384), "textbook": (3136,)}
DIRECT = "donot_use_mm_for_euclid_dist"
PASSES = ("forward", "+ backward")
SEEN = 1e6  # bytes; less is not told from what the system does anyway
BRIEF = 2.0  # seconds; a shorter call is made once before it is timed
QUADRATIC = ("Gaussian", "softmax")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


# The methods.


class PublishedInverse(torch.autograd.Function):
    """(A + δI)⁻¹ by 20 steps X ← 2X − XPX, P = A + δI, from 1.8/(max row sum of A)²·P; backward −XᵀGXᵀ."""

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:
        p = a + RIDGE * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        x = 1.8 / a.sum(-1).amax(-1)[..., None, None] ** 2 * p
        for _ in range(20):
            x = 2 * x - x @ p @ x
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return -x.mT @ g @ x.mT


def published_block(x: Tensor, z: Tensor) -> Tensor:
    """exp(−‖x − z‖²/2), each of the three terms a product of inner dimension d."""
    x_squares = x**2 @ torch.ones_like(z).mT
    z_squares = torch.ones_like(x) @ (z**2).mT
    return torch.exp(-0.5 * (x_squares + z_squares - 2 * (x @ z.mT)))


def means(q: Tensor) -> Tensor:
    return segment_means(q, rank=LANDMARKS, kernel=gaussian_kernel)


def textbook(q: Tensor, v: Tensor) -> Tensor:
    q, z = q / SCALE, means(q) / SCALE
    c, a = published_block(q, z), published_block(z, z)
    return (c @ PublishedInverse.apply(a)) @ (c.mT @ v)


def null_key(q: Tensor, v: Tensor) -> Tensor:
    """Both products with C by torch's softmax attention with one key more."""
    z = means(q)
    centre = z.detach().mean(-2, keepdim=True)
    x, y = ((points - centre) / SCALE for points in (q, z))
    system = gaussian_kernel(y, y) + RIDGE * torch.eye(y.shape[-2], dtype=y.dtype, device=y.device)
    return gaussian_product(x, y, torch.linalg.solve(system, gaussian_product(y, x, v)))


def ours(q: Tensor, v: Tensor, **options: str) -> Tensor:
    return softmax_free_attention(q, v, LANDMARKS, ridge=RIDGE, **options)


def blocks(q: Tensor, v: Tensor) -> Tensor:
    with mock.patch.object(_native, "is_built", return_value=False):
        return ours(q, v)


# Softmax-free attention, by name.
ROUTES = {"lowrank": ours, "null key": null_key, "textbook": textbook, "blocks": blocks}
ROUTES["direct"] = partial(ours, method="direct")


def linear(q: Tensor, v: Tensor) -> Tensor:
    phi = F.elu(q) + 1
    return phi @ (phi.mT @ v) / (phi @ phi.sum(-2)[..., None])


class Given(torch.nn.Module):
    """Stands where a projection is, and gives what has been projected already."""

    def forward(self, _: Tensor) -> Tensor:
        return self.projected


@cache
def nystromformer_module(heads: int, n: int) -> torch.nn.Module:
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    config = NystromformerConfig(hidden_size=heads * D, num_attention_heads=heads, segment_means_seq_len=n)
    module = NystromformerSelfAttention(config).eval()
    module.conv_kernel_size, module.query, module.value = None, Given(), Given()
    module.key = module.query
    return module


def nystromformer(q: Tensor, v: Tensor) -> Tensor:
    heads, n = q.shape[1:3]
    module = nystromformer_module(heads, n)
    module.query.projected, module.value.projected = (x.transpose(1, 2).flatten(2) for x in (q, v))  # (1, n, heads·d)
    return module(q.new_empty(1, n, 0))[0].unflatten(-1, (heads, D)).transpose(1, 2)


def methods(dtype: torch.dtype) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    found = dict(ROUTES)
    found["Gaussian"] = lambda q, v: gaussian_matmul(q, q, v, lengthscale=SCALE)
    found["softmax"] = lambda q, v: F.scaled_dot_product_attention(q, q, v)
    found["linear"] = linear
    if importlib.util.find_spec("transformers") and dtype in (torch.float32, torch.float64):
        found["Nyströmformer"] = nystromformer
    return found


def plain(name: str, q: Tensor, v: Tensor) -> Tensor:
    """The formula that ``name`` computes, with nothing done for speed or memory."""
    if name in ROUTES:
        z = means(q)
        c, a = (torch.exp(-0.5 * (torch.cdist(x, z, compute_mode=DIRECT) / SCALE) ** 2) for x in (q, z))
        return c @ torch.linalg.solve(a + RIDGE * torch.eye(LANDMARKS, dtype=q.dtype, device=q.device), c.mT @ v)
    if name == "Gaussian":
        return torch.exp(-0.5 * (torch.cdist(q, q, compute_mode=DIRECT) / SCALE) ** 2) @ v
    if name == "softmax":
        return torch.softmax(q @ q.mT / D**0.5, -1) @ v
    return {"linear": linear, "Nyströmformer": nystromformer}[name](q, v)


# The measurement.


def tokens(heads: int, n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, v and the output's gradient, (1, heads, n, 32)."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randn(64, 1, heads * D, generator=generator, dtype=dtype)
    q, v, g = (torch.randn(64, n // 64, heads * D, generator=generator, dtype=dtype) for _ in range(3))
    q.mul_(0.5).add_(0.3 * places)
    return tuple(x.to(device).flatten(0, 1).unflatten(-1, (heads, D)).transpose(0, 1)[None] for x in (q, v, g))


def call(method: Callable, inputs: tuple[Tensor, Tensor, Tensor], backward: bool) -> tuple[Tensor, ...]:
    q, v, g = inputs
    if not backward:
        with torch.no_grad():
            return (method(q, v),)
    q, v = q.detach().requires_grad_(), v.detach().requires_grad_()
    return torch.autograd.grad(method(q, v), (q, v), g)


def apart(x: Tensor, y: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double() - y) / torch.linalg.vector_norm(y))


def error(name: str, method: Callable, inputs: tuple[Tensor, ...], backward: bool) -> float | None:
    inputs = tuple(x[:, :1] for x in inputs)
    if name in QUADRATIC and inputs[0].shape[-2] > 4096:
        return None
    exact = call(partial(plain, name), tuple(x.double() for x in inputs), backward)
    return max(map(apart, call(method, inputs, backward), exact))


def attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: object, **__: object) -> int:
    """Of scaled_dot_product_attention, from the shapes."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


# For torch's counter, of whose releases not all count it on a CPU.
ALSO_COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


def peak(run: Callable[[], object], device: str) -> int:
    """Bytes that ``run`` takes at its worst beyond what is there before; on the CPU of a process that did no more."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform == "linux":
        # Free memory goes back to the system, and the high-water mark falls to what is resident now.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return grown * (1 if sys.platform == "darwin" else 1024)


def timed(calls: dict[str, Callable], used: dict[str, Callable], device: str, rounds: int, seconds: float) -> dict:
    """Rounds, median, spread, minimum and memory by name.

    Calls are interleaved; after the first there are ``rounds`` of each, or as many as ``seconds`` for each hold. What
    lay idle for seconds while others ran is slow at first, as caches and a virtual machine's memory went to those:
    where a call takes no longer than that, its turn is the second of two.
    ``used`` gives the memory, on a CPU in a process of its own, forked from one that has imported torch and no more.
    """
    names, times = list(calls), {name: [] for name in calls}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for turn in range(1 + rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if turn == 0 or sum(times[name]) + min(times[name]) <= seconds:
                if turn and min(times[name]) < BRIEF:
                    calls[name]()
                wait()
                before = time.perf_counter()
                calls[name]()
                wait()
                times[name].append(time.perf_counter() - before)
    context = multiprocessing.get_context("forkserver")
    peer = "transformers.models.nystromformer.modeling_nystromformer"
    context.set_forkserver_preload(["torch", "timm", "matplotlib.pyplot", peer])
    found = {}
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for name, taken in times.items():
            taken = taken[1:] or taken
            found[name] = {"rounds": len(taken), "median": float(np.median(taken)), "spread": float(np.ptp(taken))}
            found[name] |= {"min": min(taken), "memory": None}
            if name in used:
                found[name]["memory"] = used[name]() if device == "cuda" else pool.submit(used[name]).result()
    return found


def memory(name: str, heads: int, n: int, dtype: torch.dtype, backward: bool, device: str) -> int:
    method = methods(dtype)[name]
    call(method, tokens(heads, 256, dtype, device), backward)
    inputs = tokens(heads, n, dtype, device)
    return peak(lambda: call(method, inputs, backward), device)


def measure(options: argparse.Namespace, heads: int, n: int, backward: bool, before: list[dict]) -> list[dict]:
    """A row per method; ``before`` are those of smaller settings."""
    dtype, rows, calls, used = DTYPES[options.dtype], [], {}, {}
    inputs = tokens(heads, n, dtype, options.device)
    for name, method in methods(dtype).items():
        rows.append({"heads": heads, "n": n, "pass": PASSES[backward], "method": name, "median": None})
        earlier = [r for r in before if (r["method"], r["pass"]) == (name, PASSES[backward]) and r["median"]]
        if earlier:
            last, power = earlier[-1], 2 if name in QUADRATIC else 1
            growth = heads * n**power / (last["heads"] * last["n"] ** power)
            if growth * last["median"] > options.budget or growth * last["memory"] > options.memory * 1e9:
                continue
        calls[name] = partial(call, method, inputs, backward)
        used[name] = partial(memory, name, heads, n, dtype, backward, options.device)
    figures = timed(calls, used, options.device, *((2, 0.2) if options.quick else (15, 2.0)))
    for row in rows:
        if (name := row["method"]) in calls:
            row |= figures[name] | {"error": error(name, methods(dtype)[name], inputs, backward)}
    return rows


# What is made of it.


def findings(rows: list[dict]) -> list[dict]:
    """Slopes for one head, and what others take for every second and byte of a route's."""
    done = [row for row in rows if row["median"] is not None]
    first, most = min(4096, *(row["n"] for row in rows if row["heads"] == 1)), max(row["heads"] for row in rows)
    found = []
    for name, way in dict.fromkeys((row["method"], row["pass"]) for row in done):
        mine = [r for r in done if (r["heads"], r["method"], r["pass"]) == (1, name, way) and r["n"] >= first]
        if len(mine) > 1:
            about = {"slope of": name, "pass": way, "from": mine[0]["n"], "to": mine[-1]["n"]}
            for key, least in (("median", 0), ("memory", SEEN)):
                seen = np.log([(row["n"], row[key]) for row in mine if row[key] > least])
                about[key] = float(np.polyfit(*seen.T, 1)[0]) if len(seen) > 1 else None
            found.append(about)
    by = {(row["n"], row["pass"], row["method"]): row for row in done if row["heads"] == most}
    for (n, way, name), mine in by.items():
        for other, at in COMPARED.items():
            if name in ROUTES and name not in COMPARED and n in at and (theirs := by.get((n, way, other))):
                keys = [key for key in ("median", "min", "memory") if key != "memory" or mine[key] > SEEN]
                about = {"ratio": f"{other} / {name}", "pass": way, "heads": most, "n": n}
                found.append(about | {key: theirs[key] / mine[key] for key in keys})
    return found


def line(row: dict) -> str:
    start = f"{row['heads']:>5}{row['n']:>9}  {row['pass']:<10}  {row['method']:<14}"
    if row["median"] is None:
        return f"{start}  over budget"
    milliseconds = "".join(f"{1e3 * row[key]:>11.3f}" for key in ("median", "spread", "min"))
    wrong = "–" if row["error"] is None else f"{row['error']:.1e}"
    return f"{start}{row['rounds']:>6}{milliseconds}{row['memory'] / 1e6:>11.1f}{wrong:>10}"


def plot(rows: list[dict], found: list[dict], path: Path, title: str) -> None:
    panels = [(max(row["heads"] for row in rows), "median", "s"), (1, "median", "s"), (1, "memory", "bytes")]
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 4), layout="constrained")
    slopes = {entry["slope of"]: entry for entry in found if "slope of" in entry and entry["pass"] == PASSES[1]}
    for axis, (heads, what, unit) in zip(axes, panels, strict=True):
        for name in dict.fromkeys(row["method"] for row in rows):
            mine = [r for r in rows if (r["heads"], r["pass"], r["method"]) == (heads, PASSES[1], name) and r.get(what)]
            fitted = slopes.get(name, {}).get(what) if heads == 1 else None
            label = name if fitted is None else f"{name} ({fitted:.2f})"
            axis.loglog([row["n"] for row in mine], [row[what] for row in mine], "o-", ms=4, label=label)
        axis.set(xlabel="tokens", ylabel=unit, title=f"{'memory' if what == 'memory' else 'time'}, heads: {heads}")
        axis.legend(frameon=False, fontsize=7)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)


def setting(script: str, device: str, arguments: list[str] | None) -> dict:
    given = sys.argv[1:] if arguments is None else arguments
    where = given.index("--output") if "--output" in given else len(given)  # which is nobody's business
    words = [f"python examples/benchmarks/{script}.py", *given[:where], *given[where + 2 :]]
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    about = {"command": " ".join(words), "date": time.strftime("%Y-%m-%d"), "machine": machine}
    return about | {"threads": torch.get_num_threads(), "torch": torch.__version__}


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="at most 512 tokens and 2 heads, two rounds")
    parser.add_argument("--output", type=Path, help="folder for attention.json and attention.png")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds that one call may be expected to take")
    parser.add_argument("--memory", type=float, default=8.0, help="gigabytes, likewise")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no CUDA device here")
    about = setting("attention", options.device, arguments) | {"dtype": options.dtype}
    if "Nyströmformer" not in methods(DTYPES[options.dtype]):
        about["left out"] = "Nyströmformer: it needs transformers, and its code does not run in half precision"
    z = means(tokens(1, 3136, torch.float64, "cpu")[0])
    core = gaussian_kernel(z, z, lengthscale=SCALE) + RIDGE * torch.eye(LANDMARKS, dtype=z.dtype)
    about["condition"] = round(float(torch.linalg.cond(core)))
    print(", ".join(f"{key} {value}" for key, value in about.items()), file=sys.stderr)
    # Libraries load and start their threads at the first call of a function, which is not to be timed.
    for method in methods(DTYPES[options.dtype]).values():
        call(method, tokens(1, 256, DTYPES[options.dtype], options.device), True)
    titles = "".join(f"{title:>11}" for title in ("median ms", "spread", "min", "peak MB"))
    print(f"{'heads':>5}{'n':>9}  {'pass':<10}  {'method':<14}{'rounds':>6}{titles}{'error':>10}", flush=True)
    rows: list[dict] = []
    for heads, n in QUICK if options.quick else SETTINGS:
        for backward in (False, True):
            measured = measure(options, heads, n, backward, rows)
            print("\n".join(map(line, measured)), flush=True)
            rows += measured
    found = findings(rows)
    for entry in found:
        told = (f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in entry.items())
        print(", ".join(told), file=sys.stderr)
    if options.output is not None:
        write(options.output / "attention.json", about | {"findings": found, "rows": rows})
        plot(
            rows, found, options.output / "attention.png", f"forward and backward, {options.dtype}, {about['machine']}"
        )


if __name__ == "__main__":
    main()
