"""Segmentation with SOFT's features: a small head on the maps of all four stages, trained end to end from nothing.

    python examples/soft/segmentation.py --output runs/segmentation

The images are generated: discs, squares and triangles of random size, place, tilt and brightness on noise, 64 × 96
pixels, each pixel labelled with what lies on top. The model is tested on that size and on others, upright and twice as
large, which it has never seen: position embeddings are interpolated and landmarks pooled. It prints the mean
intersection over union of each and leaves a picture. Backbone and head are what one would take for real images too.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import fit
import matplotlib
import model as soft
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLASSES = ("background", "disc", "square", "triangle")
SIZE = (64, 96)
OTHER_SIZES = ((96, 64), (80, 80), (128, 192))


class SegmentationHead(nn.Module):
    """Maps of several resolutions -> logits (B, classes, H, W): each to one width, enlarged to the finest, summed."""

    def __init__(self, channels: list[int], classes: int, *, width: int = 64):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.mix = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        finest = maps[0].shape[-2:]
        total = sum(
            F.interpolate(lateral(y), size=finest, mode="bilinear", align_corners=False)
            for lateral, y in zip(self.lateral, maps, strict=True)
        )  # (B, width, H/2, W/2)
        return F.interpolate(self.classify(self.mix(total)), size=size, mode="bilinear", align_corners=False)


class Segmenter(nn.Module):
    """A timm backbone with ``features_only`` and a head: images (B, C, H, W) -> logits (B, classes, H, W)."""

    def __init__(self, backbone: str, classes: int, **options):
        super().__init__()
        self.backbone = timm.create_model(backbone, features_only=True, **options)
        self.head = SegmentationHead(self.backbone.feature_info.channels(), classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.backbone(image), tuple(image.shape[-2:]))


def shapes(count: int, size: tuple[int, int], *, seed: int, most: int = 4) -> tuple[Tensor, Tensor]:
    """Images (count, 1, H, W) of up to ``most`` shapes each, and labels (count, H, W), indices of ``CLASSES``."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    height, width = size
    scale = math.sqrt(height * width)
    rows, columns = (torch.arange(n).float() + 0.5 for n in size)
    images, labels = torch.zeros(count, height, width), torch.zeros(count, height, width, dtype=torch.long)
    for i in range(most):
        kind = torch.randint(1, len(CLASSES), (count, 1, 1), generator=generator)
        radius = uniform(0.14, 0.26) * scale
        x = (columns - uniform(0, width)) / radius  # (count, 1, W)
        y = (rows[:, None] - uniform(0, height)) / radius  # (count, H, 1)
        tilt = uniform(0, 2 * math.pi)
        u, v = x * tilt.cos() + y * tilt.sin(), y * tilt.cos() - x * tilt.sin()  # (count, H, W)
        # A triangle is where all three outward normals point at most half a circumradius away.
        triangle = torch.stack([v * math.cos(a) + u * math.sin(a) for a in (0, 2.0944, 4.1888)]).amax(0) <= 0.5
        disc, square = u.square() + v.square() <= 0.64, torch.maximum(u.abs(), v.abs()) <= 0.7
        there = torch.where(kind == 1, disc, torch.where(kind == 2, square, triangle))
        there &= (uniform(0, 1) < 0.8) | (i == 0)
        brightness = uniform(0.5, 1.5) * uniform(-1, 1).sign()
        images, labels = torch.where(there, brightness, images), torch.where(there, kind, labels)
    noise = torch.randn(count, height, width, generator=generator)
    return (images + 0.3 * noise).unsqueeze(1), labels


@torch.no_grad()
def intersection_over_union(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Of each class, over all pixels of all images."""
    model.eval()
    predicted = torch.cat([model(chunk).argmax(1) for chunk in images.split(32)])
    pairs = torch.bincount((labels * len(CLASSES) + predicted).flatten(), minlength=len(CLASSES) ** 2)
    table = pairs.reshape(len(CLASSES), len(CLASSES)).double()
    return table.diagonal() / (table.sum(0) + table.sum(1) - table.diagonal())


@torch.no_grad()
def plot(model: nn.Module, path: Path, *, columns: int = 4) -> None:
    figure, axes = plt.subplots(3, columns, figsize=(2.2 * columns, 5), layout="constrained")
    images, labels = shapes(columns, SIZE, seed=99)
    rows = {"image": images[:, 0], "labels": labels, "predicted": model.eval()(images).argmax(1)}
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name)
        for panel, picture in zip(line, pictures, strict=True):
            colours = {"cmap": "gray"} if name == "image" else {"cmap": "viridis", "vmin": 0, "vmax": len(CLASSES) - 1}
            panel.imshow(picture, interpolation="nearest", **colours)
            panel.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images, few steps")
    parser.add_argument("--model", default="soft_cluttered", help="a SOFT model of model.py (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="batches of 32 images (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and order (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder for segmentation.png")
    options = parser.parse_args(arguments)
    if options.model not in soft.CONFIGS:
        parser.error(f"--model: there is no {options.model!r}; the names are {', '.join(soft.CONFIGS)}")
    steps, images = (3, 40) if options.quick else (600, 3000)
    steps = steps if options.steps is None else options.steps
    if steps < 1:
        parser.error(f"--steps must be at least 1, not {steps}")

    torch.manual_seed(options.seed)
    net = Segmenter(options.model, len(CLASSES), in_chans=1, img_size=SIZE)
    train_images, train_labels = shapes(images, SIZE, seed=2 * options.seed)
    batches = fit.shuffled(train_images, train_labels, batch_size=32, seed=options.seed)
    rate = fit.fit(net, batches, steps=steps, lr=1e-3)
    print(f"{steps} steps at {rate:.0f} images/s", file=sys.stderr)
    print(f"{'size':>9}  {'mean IoU':>8}  " + "  ".join(f"{name:>10}" for name in CLASSES))
    for size in (SIZE, *OTHER_SIZES):
        scores = intersection_over_union(net, *shapes(max(40, images // 10), size, seed=2 * options.seed + 1))
        cells = "  ".join(f"{score:10.3f}" for score in scores)
        print(f"{size[0]:>4}×{size[1]:<4}  {scores.mean():8.3f}  {cells}")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        plot(net, options.output / "segmentation.png")


if __name__ == "__main__":
    main()
