"""Cluttered digits: a real handwritten digit somewhere on a canvas, among fragments of other digits.

What is to be read is 24 to 32 of 64 pixels high, at any place; four fragments of 8 to 10 pixels, cut from other digits
of the same split, have its strokes and its brightness, so that no patch alone tells the digit from its surroundings.
The scans are scikit-learn's, split as in data.py: no digit of which there is a trace in a training image appears in a
test image. Image i of a split depends on the seed and on i alone, not on how many there are, and is the same scene at
every canvas size.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from data import Split
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SIZE = 64
DIGIT = (24, 32)  # pixels of 64, smallest and largest
FRAGMENT = (8, 10)
FRAGMENTS = 4


def cluttered(
    seed: int, *, size: int = SIZE, train: int = 8000, test: int = 2000, test_fraction: float = 0.2
) -> tuple[Split, Split, dict[str, float]]:
    """Train and test images, and the mean and deviation of the former, with which both are normalised."""
    pixels, labels = load_digits(return_X_y=True)
    scans = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    rows = train_test_split(np.arange(len(labels)), test_size=test_fraction, random_state=seed, stratify=labels)
    targets = torch.from_numpy(labels)
    splits = []
    for part, (chosen, count) in enumerate(zip(rows, (train, test), strict=True)):
        # An image takes its own row of random numbers, as many whatever comes of them.
        chance = np.random.default_rng((seed, part)).random((count, 4 + 6 * FRAGMENTS), dtype=np.float32)
        images, which = scenes(scans[chosen], chance, size)
        splits.append(Split(images, targets[chosen][which]))
    mean, std = splits[0].images.mean().item(), splits[0].images.std().item()
    for split in splits:
        split.images.sub_(mean).div_(std)
    return *splits, {"mean": mean, "std": std}


def scenes(scans: Tensor, chance: np.ndarray, size: int) -> tuple[Tensor, Tensor]:
    """Canvases (n, 1, size, size) of scans (N, 1, 8, 8) by n rows of numbers in [0, 1), and the scans to be read."""
    chance = torch.from_numpy(chance)
    canvas = torch.zeros(len(chance), 1, size, size)
    which, side, top, left = chance[:, :4].T
    which = (which * len(scans)).long()
    side = between(side, DIGIT, size)
    for s in side.unique().tolist():
        mine = (side == s).nonzero()[:, 0]
        paste(canvas, enlarged(scans, s)[which[mine]], mine, top[mine], left[mine])

    owner = torch.arange(len(chance)).repeat_interleave(FRAGMENTS)
    other, side, *cut, top, left = chance[:, 4:].reshape(-1, 6).T
    # Any scan but the one to be read.
    other = (which[owner] + 1 + (other * (len(scans) - 1)).long()) % len(scans)
    side = between(side, FRAGMENT, size)
    whole = enlarged(scans, round(sum(DIGIT) / 2 * size / SIZE))
    for s in side.unique().tolist():
        mine = (side == s).nonzero()[:, 0]
        rows, columns = (starts(c[mine], whole.shape[-1], s) for c in cut)
        patches = whole[other[mine][:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (k, s, s, 1)
        paste(canvas, patches.movedim(-1, 1), owner[mine], top[mine], left[mine])
    return canvas, which


def between(chance: Tensor, bounds: tuple[int, int], size: int) -> Tensor:
    """A whole number of pixels within the bounds, which are meant for 64."""
    low, high = bounds
    return ((low + (chance * (high - low + 1)).floor()) * size / SIZE).round().long()


def enlarged(scans: Tensor, side: int) -> Tensor:
    return F.interpolate(scans, size=(side, side), mode="bicubic", align_corners=False).clamp(0, 1)


def starts(chance: Tensor, length: int, side: int) -> Tensor:
    """Where a window of ``side`` among ``length`` lies: (k,) -> (k, side)."""
    return (chance * (length - side + 1)).long()[:, None] + torch.arange(side)


def paste(canvas: Tensor, patches: Tensor, onto: Tensor, top: Tensor, left: Tensor) -> None:
    """Patches (k, 1, s, s) onto canvases ``onto``, at places from 0 to 1 along the axes; the brighter pixel stays."""
    size, side = canvas.shape[-1], patches.shape[-1]
    rows, columns = (starts(c, size, side) for c in (top, left))
    where = (onto[:, None, None] * size + rows[:, :, None]) * size + columns[:, None, :]  # (k, s, s)
    canvas.view(-1).scatter_reduce_(0, where.flatten(), patches.flatten(), "amax")
