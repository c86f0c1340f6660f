"""Handwritten digits that come with scikit-learn, ready for a vision model.

1,797 scans of 8 × 8 pixels (E. Alpaydin and C. Kaynak, UCI repository, 1998), enlarged to 32 × 32. They are
real, small and at hand without a download; no result on them says anything about larger images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SIZE = 32
CLASSES = 10


@dataclass(frozen=True)
class Split:
    """Images (n, 1, 32, 32), normalised to the training images' mean and deviation, and labels (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def digits(seed: int, *, test_fraction: float = 0.2) -> tuple[Split, Split, dict[str, float]]:
    """Train and test digits, stratified by class, and the mean and deviation they were normalised with."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=test_fraction, random_state=seed, stratify=labels
    )
    mean, std = images[train].mean(), images[train].std()
    images, targets = (images - mean) / std, torch.from_numpy(labels)
    statistics = {"mean": mean.item(), "std": std.item()}
    return Split(images[train], targets[train]), Split(images[test], targets[test]), statistics


def jittered(images: Tensor, *, degrees: float = 12.0, scale: float = 0.1, shift: float = 0.1) -> Tensor:
    """Every image (B, C, H, W) rotated, scaled and shifted by its own random amount, within the given bounds.

    ``shift`` is in fractions of the image's size; pixels from outside repeat the border.
    """
    angle, zoom, dx, dy = (2 * torch.rand(4, len(images), device=images.device) - 1).unbind()
    angle, zoom = angle * math.radians(degrees), 1 + zoom * scale
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    matrices = torch.stack([cos, -sin, 2 * shift * dx, sin, cos, 2 * shift * dy], dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
