"""Images to learn from: scikit-learn's digits, a folder of images, or a data set that timm knows by name.

    open_data(["digits"], img_size=None, seed=0)
    open_data(["imagefolder", PATH], img_size=224, seed=0)      PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg
    open_data(["hfds/NAME"], …), open_data(["torch/NAME", FOLDER], …)      as timm.data.create_dataset takes them

The digits are 1,797 scans of 8 × 8 pixels (E. Alpaydin and C. Kaynak, UCI repository, 1998), enlarged to 32 × 32. They
are real, small and at hand without a download; no result on them says anything about larger images.

What is random follows from numbers, not from what was drawn before: augmentation from the seed, the epoch and the
image. So it depends neither on the workers that load, nor on where a run was interrupted.
"""

from __future__ import annotations

import math
import random
import signal
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageDataset, create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

SIZE = 32
CLASSES = 10
# Streams of random numbers: seed_everything(seed, STREAM, …).
ORDER, STEP, SAMPLE = range(3)
# Arguments of timm.data.create_transform for training: those of Lu et al., "SOFT" (NeurIPS 2021). Where RandAugment
# acts timm leaves the colour jitter out, and did so for the paper.
AUGMENTATION = {
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.4,
    "re_prob": 0.25,
    "re_mode": "pixel",
}
# What Pillow raises on files that are no images, cut short or damaged.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W) and labels (B,)


class CorruptImage(ValueError):
    """An image that cannot be decoded; the message names it."""


def seed_everything(*numbers: int) -> None:
    """Seed Python's, NumPy's and torch's global generators, which timm and torchvision draw from, with all numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (timm's mixup and RandAugment draw from it)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class Split:
    """Images (n, 1, H, W), normalised to the training images' mean and deviation, and labels (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def digits(
    seed: int, *, test_fraction: float = 0.2, size: int = SIZE, statistics: Mapping[str, float] | None = None
) -> tuple[Split, Split, dict[str, float]]:
    """Train and test digits, stratified by class, and the mean and deviation they were normalised with.

    These are the training images', unless given as ``statistics``.
    """
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False)
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=test_fraction, random_state=seed, stratify=labels
    )
    if statistics is None:
        statistics = {"mean": images[train].mean().item(), "std": images[train].std().item()}
    images, targets = (images - statistics["mean"]) / statistics["std"], torch.from_numpy(labels)
    return Split(images[train], targets[train]), Split(images[test], targets[test]), dict(statistics)


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


class Tensors(Dataset):
    """A split in memory; with a seed its batches are jittered, from the seed and the first key. See ``Data``."""

    def __init__(self, split: Split, seed: int | None = None):
        self.split, self.seed = split, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, keys: list[int]) -> Batch:
        rows = torch.tensor(keys) % len(self)
        images = self.split.images[rows]
        if self.seed is not None:
            seed_everything(self.seed, SAMPLE, keys[0])
            images = jittered(images)
        return images, self.split.labels[rows]


class Files(Dataset):
    """Images that are decoded and transformed when asked for; with a seed each at random, from the seed and its key.

    One that cannot be read is an error. With ``skip`` it is named on stderr: in training (with a seed) the next one of
    the set takes its place, whatever the order is; in evaluation it is left out.
    """

    def __init__(self, dataset: Dataset, transform: Any, seed: int | None = None, *, skip: bool = False):
        self.dataset, self.transform, self.seed, self.skip = dataset, transform, seed, skip

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[int]) -> Batch | CorruptImage | None:
        try:
            samples = [sample for key in keys if (sample := self._sample(key)) is not None]
        except CorruptImage as error:  # not raised here, for a worker would wrap it in its traceback
            return error
        return default_collate(samples) if samples else None

    def _sample(self, key: int) -> tuple[Tensor, int] | None:
        index = key % len(self)
        for i in range(len(self)):
            try:
                image, label = self._decoded((index + i) % len(self))
            except CorruptImage as error:
                if not self.skip:
                    raise
                print(f"skipped: {error}", file=sys.stderr)
                if self.seed is None:
                    return None
                continue
            if self.seed is not None:
                seed_everything(self.seed, SAMPLE, key)
            return self.transform(image), label
        raise CorruptImage("no image of the training set can be read")

    def _decoded(self, index: int) -> tuple[Image.Image, int]:
        name = f"image {index}"
        try:
            # timm's own __getitem__ takes another image for a damaged one, unasked.
            if isinstance(self.dataset, ImageDataset):
                name = self.dataset.filename(index, absolute=True)
                file, label = self.dataset.reader[index]
                with file:
                    return Image.open(file).convert("RGB"), label
            image, label = self.dataset[index]
            return image.convert("RGB"), label
        except UNREADABLE as error:
            reason = str(error).partition("\n")[0]
            raise CorruptImage(f"{name} cannot be read as an image ({reason})") from error


def _as_it_is(batch: Batch | CorruptImage | None) -> Batch | CorruptImage | None:
    return batch


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C is for the training process, which ends its step and needs its workers for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class Data:
    """Training and test images of one kind, normalised to ``statistics`` = {"mean": [...], "std": [...]}.

    An image is asked for by its key, epoch · len(train) + index, for that is what its augmentation follows from.
    """

    name: str
    classes: list[str]
    in_chans: int
    img_size: int
    statistics: dict[str, list[float]]
    train: Tensors | Files
    test: Tensors | Files

    def order(self, seed: int, epoch: int) -> Tensor:
        """The keys of all training images in the epoch's order."""
        n = len(self.train)
        return epoch * n + torch.from_numpy(np.random.default_rng((seed, ORDER, epoch)).permutation(n))

    def training(self, keys: Tensor, workers: int = 0) -> Iterator[Batch]:
        """Augmented training images for keys (batches, B), a batch for each row. CorruptImage names one that is."""
        return self._batches(self.train, keys.tolist(), workers)

    def evaluation(self, batch_size: int, workers: int = 0, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The test images in order, or of their batches every ``world``-th from ``rank`` on."""
        batches = torch.arange(len(self.test)).split(batch_size)[rank::world]
        return self._batches(self.test, [batch.tolist() for batch in batches], workers)

    @staticmethod
    def _batches(dataset: Dataset, keys: list[list[int]], workers: int) -> Iterator[Batch]:
        pin = torch.cuda.is_available()
        loader = DataLoader(
            dataset,
            batch_sampler=keys,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_ignore_interrupts,
            pin_memory=pin,
        )
        for batch in loader:
            if isinstance(batch, CorruptImage):
                raise batch
            if batch is not None:
                yield batch


def open_data(
    spec: Sequence[str],
    *,
    img_size: int | None = None,
    seed: int,
    statistics: Mapping[str, Sequence[float]] | None = None,
    corrupt: str = "fatal",
) -> Data:
    """The data that ``spec`` names (see the top), at ``img_size`` pixels a side, 32 for digits and 224 by default.

    ``seed`` is of the digits' split and of all augmentation, ``statistics`` what to normalise with if not the training
    digits' or ImageNet's, ``corrupt="skip"`` leaves out images that cannot be read. Raises FileNotFoundError or
    ValueError with one line that says what is wrong.
    """
    kind, *rest = spec
    if len(rest) > 1:
        raise ValueError(f"{kind} takes at most one value, not {' '.join(rest)}")
    if kind == "digits":
        if rest:
            raise ValueError(f"digits take no further value, not {' '.join(rest)}")
        given = statistics and {key: values[0] for key, values in statistics.items()}
        train, test, found = digits(seed, size=img_size or SIZE, statistics=given)
        names, used = [str(i) for i in range(CLASSES)], {key: [value] for key, value in found.items()}
        return Data("digits", names, 1, img_size or SIZE, used, Tensors(train, seed), Tensors(test))
    if kind == "imagefolder":
        if len(rest) != 1:
            raise ValueError("imagefolder takes one value, the folder that holds train and val")
        train, test, names = _open_folder(Path(rest[0]))
    else:
        train, test, names = _open_named(kind, *rest)
    used = {key: list(values) for key, values in (statistics or {}).items()}
    used = used or {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
    common = {"input_size": img_size or 224, "interpolation": "bicubic", **used}
    augmented = create_transform(is_training=True, **AUGMENTATION, **common)
    plain = create_transform(crop_pct=0.9, **common)
    files = (
        Files(train, augmented, seed, skip=corrupt == "skip"),
        Files(test, plain, skip=corrupt == "skip"),
    )
    return Data(kind, names, 3, img_size or 224, used, *files)


def _open_folder(path: Path) -> tuple[Dataset, Dataset, list[str]]:
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    found = [path / name for name in ("val", "validation", "test") if (path / name).is_dir()]
    if not (path / "train").is_dir() or not found:
        raise ValueError(f"{path} must hold the folders train and val, each with a folder of images for every class")
    train, test = _folder(path / "train"), _folder(found[0])
    if unknown := sorted(set(test.reader.class_to_idx) - set(train.reader.class_to_idx)):
        raise ValueError(f"{found[0]} has classes that {path / 'train'} has not: {', '.join(unknown)}")
    if len(train.reader.class_to_idx) < 2:
        raise ValueError(f"{path / 'train'} has one class, {next(iter(train.reader.class_to_idx))}; two are needed")
    # Counted by the training classes, should the test images lack one.
    return train, _folder(found[0], class_map=train.reader.class_to_idx), list(train.reader.class_to_idx)


def _folder(path: Path, **options) -> ImageDataset:
    try:
        dataset = create_dataset("", root=str(path), search_split=False, **options)
    except RuntimeError as error:  # how timm says that there is no image
        raise ValueError(f"{path} holds no images; it must hold a folder of images for every class") from error
    if "" in dataset.reader.class_to_idx:
        raise ValueError(f"{path} holds images outside of class folders; put each into the folder of its class")
    return dataset


def _open_named(name: str, root: str | None = None) -> tuple[Dataset, Dataset, list[str]]:
    if name.partition("/")[0] not in ("hfds", "torch"):
        raise ValueError(
            f"there is no data set {name!r}; the names are digits, imagefolder PATH, hfds/NAME and torch/NAME FOLDER "
            "(those of timm that stream have no order to resume in)"
        )
    if name.startswith("torch/") and (root is None or not Path(root).is_dir()):
        raise FileNotFoundError(f"{name} must be followed by the folder that holds it, not by {root or 'nothing'}")
    opened, reason = {}, None
    for split in ("train", "validation", "test"):
        try:
            opened[split] = create_dataset(name, root=root, split=split)
        except ImportError as error:
            raise ValueError(f"{name} needs the package {error.name}; install it") from error
        except (RuntimeError, ValueError, OSError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
    test = opened.get("validation", opened.get("test"))
    if "train" not in opened or test is None:
        raise ValueError(f"{name} could not be opened in splits train and validation or test: {reason}")
    train = opened["train"]
    names = getattr(train, "classes", None) or list(train.reader.class_to_idx)
    return train, test, [str(name) for name in names]
