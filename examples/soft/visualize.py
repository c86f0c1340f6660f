"""Draw the attention of a SOFT model over images: what chosen tokens attend to, and the landmarks in between.

    python examples/soft/visualize.py CHECKPOINT --output FOLDER
    python examples/soft/visualize.py soft_tiny photo.jpg --output FOLDER      a model's name: untrained

CHECKPOINT is a safetensors file of ours; images are scikit-learn's two photographs unless named. For every image two
files are written, with a column or row for the last block of each softmax-free stage, means over its heads:

attention   rows of K̂ = C A⁺ Cᵀ, the approximate attention of all tokens to all, of the tokens marked by a cross;
landmarks   the cells that landmarks are made of, and columns of C: what every token pays a few of them.

K̂ is symmetric and not normalised: its row i is what token i pays and what it is paid.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import checkpoint
import matplotlib
import model as soft
import numpy as np
import timm
import torch
from data import UNREADABLE
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform
from torch import Tensor, nn

from lowrank.nn import SoftmaxFreeAttention

matplotlib.use("Agg")  # no window: plots go to files
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

TOKENS = ("0.5,0.5", "0.25,0.3", "0.8,0.7")
COLUMNS = 5
# Of a layer: itself, its input (B, N, C) and the size (H, W) of the image that the tokens are.
Layer = tuple[SoftmaxFreeAttention, Tensor, tuple[int, int]]


class Marks(nn.Module):
    """Values that are 1 in channel j of every head at token j of the chosen, and 0 elsewhere."""

    def __init__(self, tokens: list[int], heads: int):
        super().__init__()
        self.tokens, self.heads = tokens, heads

    def forward(self, x: Tensor) -> Tensor:
        values = torch.zeros_like(x).unflatten(-1, (self.heads, -1))  # (B, N, heads, d)
        for j, token in enumerate(self.tokens):
            values[:, token, :, j] = 1
        return values.flatten(2)  # (B, N, C)


@torch.no_grad()
def attention_rows(attention: SoftmaxFreeAttention, x: Tensor, size: tuple[int, int], tokens: list[int]) -> Tensor:
    """Rows of K̂ = C A⁺ Cᵀ of the tokens, at most as many as a head has channels: (B, heads, len(tokens), N)."""
    probe = copy.deepcopy(attention)
    # K̂ times a unit vector is a column, and K̂ is symmetric.
    probe.value, probe.value_conv, probe.proj = Marks(tokens, probe.num_heads), None, nn.Identity()
    columns = probe(x, size).unflatten(-1, (probe.num_heads, -1))  # (B, N, heads, d)
    return columns[..., : len(tokens)].permute(0, 2, 3, 1)


@torch.no_grad()
def layers(model: soft.Soft, images: Tensor, *, block: int) -> list[Layer]:
    """One block's attention in each softmax-free stage, with its inputs on the images; ValueError if there is none."""
    chosen = [stage.blocks[block].attn for stage in model.stages]
    chosen = [attention for attention in chosen if isinstance(attention, SoftmaxFreeAttention)]
    if not chosen:
        raise ValueError('there is no softmax-free attention to draw; attn must be "soft" or "soft_norm"')
    inputs = []
    hooks = [attention.register_forward_pre_hook(lambda _, given: inputs.append(given)) for attention in chosen]
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    return [(attention, x, size) for attention, (x, size) in zip(chosen, inputs, strict=True)]


def spread(count: int, columns: int) -> list[int]:
    """At most ``columns`` of count landmarks, from the first to the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, columns)})


def shown(image: Tensor) -> np.ndarray:
    """A normalised image (C, H, W) within [0, 1], for imshow: (H, W) or (H, W, 3)."""
    image = image.float().cpu()
    image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-12)
    return (image[0] if len(image) == 1 else image.movedim(0, -1)).numpy()


def draw(panel: Axes, image: Tensor, weights: Tensor | None = None, size: tuple[int, int] | None = None) -> None:
    """The image (C, H, W) and, over it, weights of its tokens, (N,)."""
    extent = (0, image.shape[-1], image.shape[-2], 0)
    panel.imshow(shown(image), cmap="gray", extent=extent)
    if weights is not None:
        panel.imshow(weights.float().cpu().reshape(size).numpy(), cmap="magma", alpha=0.65, extent=extent)
    panel.set_axis_off()


def panels(rows: int, columns: int, *, title: str | None = None, width: float = 2.4, ratio: float = 1.0):
    options = {"squeeze": False, "layout": "constrained", "figsize": (width * columns, width * ratio * rows)}
    figure, axes = plt.subplots(rows, columns, **options)
    if title is not None:
        figure.suptitle(title)
    return figure, axes


def finish(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)


@torch.no_grad()
def plot_attention(model: soft.Soft, images: Tensor, path: Path, *, columns: int = COLUMNS) -> None:
    """Some images, and over each the kernel between all its tokens and a few landmarks of the first stage."""
    attention, x, size = layers(model, images, block=0)[0]
    weights = attention.landmark_attention(x, size).mean(1)  # (B, N, m), mean over the heads
    chosen = spread(weights.shape[-1], columns)
    figure, axes = panels(len(images), len(chosen) + 1, width=1.3)
    for row, image, weight in zip(axes, images, weights, strict=True):
        draw(row[0], image)
        for panel, landmark in zip(row[1:], chosen, strict=True):
            draw(panel, image, weight[:, landmark], size)
    for landmark, panel in zip(chosen, axes[0, 1:], strict=True):
        panel.set_title(f"landmark {landmark}", fontsize=8)
    finish(figure, path)


def plot_rows(found: list[Layer], image: Tensor, places: list[tuple[float, float]], path: Path, title: str) -> None:
    """Rows of K̂ for the tokens at the places, fractions of height and width, in all layers, over the image."""
    height, width = image.shape[-2:]
    figure, axes = panels(len(places), 1 + len(found), title=title, ratio=height / width)
    for row, (y, x) in zip(axes, places, strict=True):
        draw(row[0], image)
        row[0].plot(x * width, y * height, "+", color="cyan", markersize=12, markeredgewidth=2)
    for i, (attention, tokens, size) in enumerate(found):
        chosen = [token_at(place, size) for place in places]
        rows = attention_rows(attention, tokens, size, chosen)[0].mean(0)  # (places, N)
        for panel, token, weights in zip(axes[:, 1 + i], chosen, rows, strict=True):
            draw(panel, image, weights, size)
            y, x = divmod(token, size[1])
            cell = width / size[1], height / size[0]
            panel.plot((x + 0.5) * cell[0], (y + 0.5) * cell[1], "+", color="cyan", markersize=8)
        axes[0, 1 + i].set_title(f"stage {i + 1}, {size[0]} × {size[1]} tokens", fontsize=8)
    finish(figure, path)


def token_at(place: tuple[float, float], size: tuple[int, int]) -> int:
    """The token, rows first, at fractions of height and width."""
    y, x = (min(int(fraction * n), n - 1) for fraction, n in zip(place, size, strict=True))
    return y * size[1] + x


def landmark_cells(attention: SoftmaxFreeAttention, size: tuple[int, int]) -> list[list[tuple[int, int]]]:
    """First token and the one after the last of each landmark, along the rows' and the columns' axis."""
    stride, grid = attention.stride or 1, attention.grid or size
    axes = []
    for n, most in zip(size, grid, strict=True):
        cells = n // stride
        count = min(most, cells)  # adaptive pooling of the cells of the convolution
        axes.append([(i * cells // count * stride, -(-(i + 1) * cells // count) * stride) for i in range(count)])
    return axes


def plot_landmarks(found: list[Layer], image: Tensor, path: Path, title: str) -> None:
    """Landmark cells over the image, those drawn beside it in colour, and their columns of C, for all layers."""
    height, width = image.shape[-2:]
    figure, axes = panels(len(found), 1 + COLUMNS, title=title, ratio=height / width)
    for panel in axes.flat:
        panel.set_axis_off()  # a stage can have fewer landmarks than there are columns
    for i, (row, (attention, tokens, size)) in enumerate(zip(axes, found, strict=True)):
        weights = attention.landmark_attention(tokens, size)[0].mean(0)  # (N, m)
        rows, columns = landmark_cells(attention, size)
        chosen = spread(weights.shape[-1], COLUMNS)
        draw(row[0], image)
        row[0].set_title(f"stage {i + 1}, {len(rows)} × {len(columns)} landmarks", fontsize=8)
        cell = width / size[1], height / size[0]
        for landmark in range(weights.shape[-1]):
            (top, bottom), (left, right) = rows[landmark // len(columns)], columns[landmark % len(columns)]
            box = ((left * cell[0], top * cell[1]), (right - left) * cell[0], (bottom - top) * cell[1])
            marked = {"edgecolor": "cyan", "linewidth": 1.5, "zorder": 3}
            plain = {"edgecolor": "white", "linewidth": 0.5}
            row[0].add_patch(Rectangle(*box, fill=False, **(marked if landmark in chosen else plain)))
            if landmark in chosen:
                panel = row[1 + chosen.index(landmark)]
                draw(panel, image, weights[:, landmark], size)
                panel.add_patch(Rectangle(*box, fill=False, edgecolor="cyan"))
                panel.set_title(f"landmark {landmark}", fontsize=8)
    finish(figure, path)


def read_images(paths: list[Path]) -> dict[str, Image.Image]:
    """Images by a name of their own. Raises ValueError for what cannot be read."""
    if not paths:
        photographs = load_sample_images()
        names = [Path(name).stem for name in photographs.filenames]
        return {name: Image.fromarray(pixels) for name, pixels in zip(names, photographs.images, strict=True)}
    images = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                name = path.stem if path.stem not in images else f"{path.stem}-{len(images)}"
                images[name] = image.convert("RGB")
        except UNREADABLE as error:
            raise ValueError(f"{path} cannot be read as an image ({checkpoint.first_line(error)})") from error
    return images


def read_model(name: str) -> tuple[soft.Soft, dict[str, str], str]:
    """A checkpoint's model, its metadata and a title; or an untrained model by its name."""
    if name in soft.CONFIGS:
        torch.manual_seed(0)
        return timm.create_model(name).eval(), {}, f"{name}, untrained"
    if not Path(name).suffix:
        raise ValueError(f"there is no model {name!r}; there are {', '.join(soft.CONFIGS)}, or give a checkpoint")
    model, metadata = checkpoint.load_model(name)
    return model, metadata, metadata["model"]


def as_input(image: Image.Image, model: soft.Soft, metadata: dict[str, str]) -> Tensor:
    """The image (1, C, H, W) as the model has seen others: its shorter side, its channels, its statistics."""
    known = json.loads(metadata["data"]) if "data" in metadata else model.pretrained_cfg
    channels = model.stages[0].patch_embed[0].in_channels
    side = max(model.stages[0].grid) * model.feature_info[0]["reduction"]
    scale = side / min(image.size)
    width, height = (round(n * scale) for n in image.size)
    statistics = {key: tuple(known[key]) for key in ("mean", "std")}
    transform = create_transform((channels, height, width), interpolation="bicubic", crop_pct=1.0, **statistics)
    return transform(image.convert("L" if channels == 1 else "RGB"))[None].to(model.norm.weight.dtype)


def fractions(text: str) -> tuple[float, float]:
    """ "0.25,0.3" as (0.25, 0.3)."""
    place = tuple(float(part) for part in text.split(","))
    if len(place) != 2 or not all(0 <= part <= 1 for part in place):
        raise ValueError
    return place


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="CHECKPOINT|MODEL", help="safetensors file of ours, or a model of model.py")
    parser.add_argument("images", metavar="IMAGE", nargs="*", type=Path, help="(default: scikit-learn's photographs)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, new or empty")
    help_ = "tokens to draw, in fractions of height and width (default: %(default)s)"
    parser.add_argument("--tokens", nargs="+", default=TOKENS, metavar="ROW,COLUMN", help=help_)
    options = parser.parse_args(arguments)
    try:
        options.tokens = [fractions(text) for text in options.tokens]
    except ValueError:
        parser.error(
            f"--tokens are pairs of fractions between 0 and 1 such as 0.25,0.3, not {' '.join(options.tokens)}"
        )
    if len(options.tokens) > 32:
        parser.error(f"--tokens takes 32 tokens at most, the channels of a head, not {len(options.tokens)}")
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        parser.error(f"--output {options.output} is not an empty folder; name another, nothing is overwritten")
    return parser, options


def main(arguments: list[str] | None = None) -> None:
    parser, options = parse_arguments(arguments)
    try:
        images = read_images(options.images)
        model, metadata, title = read_model(options.model)
        for name, image in images.items():
            pixels = as_input(image, model, metadata)
            found = layers(model, pixels, block=-1)
            options.output.mkdir(parents=True, exist_ok=True)
            rows, landmarks = (options.output / f"{name}-{kind}.png" for kind in ("attention", "landmarks"))
            plot_rows(found, pixels[0], options.tokens, rows, f"{title}: {name}")
            plot_landmarks(found, pixels[0], landmarks, f"{title}: {name}")
            print(rows, landmarks, sep="\n")
    except (OSError, ValueError) as error:
        parser.error(checkpoint.first_line(error))


if __name__ == "__main__":
    main()
