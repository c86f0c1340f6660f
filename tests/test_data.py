"""The data: splits and augmentation are what the seed says, whoever loads them; what cannot be used is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import data
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

CLASSES = ["china", "flower"]

# JAX warns of it, where another file's tests have left it in this process.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")


def make_photographs(folder: Path, *, size: int = 64, train: int = 12, test: int = 4) -> Path:
    """An ImageFolder of crops of scikit-learn's two sample photographs, a class for each."""
    rng = np.random.default_rng(0)
    for name, photograph in zip(CLASSES, load_sample_images().images, strict=True):
        for split, count in (("train", train), ("val", test)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                top, left = (int(rng.integers(n - size)) for n in photograph.shape[:2])
                crop = Image.fromarray(photograph[top : top + size, left : left + size])
                crop.save(folder / split / name / f"{i:02d}.jpg")
    return folder


@pytest.fixture
def photographs(tmp_path):
    return make_photographs(tmp_path / "photographs")


def opened(folder: Path, **options) -> data.Data:
    return data.open_data(["imagefolder", str(folder)], **{"img_size": 32, "seed": 0} | options)


def test_split_is_stratified_seeded_and_complete():
    first, second, other = (data.digits(seed) for seed in (0, 0, 1))
    assert torch.equal(first[1].images, second[1].images)
    assert not torch.equal(first[1].labels, other[1].labels)
    assert len(first[0]) + len(first[1]) == 1797
    counts = torch.bincount(first[1].labels)
    assert counts.max() - counts.min() <= 2
    assert first[0].images.shape[1:] == (1, 32, 32)
    assert abs(first[0].images.mean()) < 1e-4
    assert abs(first[0].images.std() - 1) < 1e-4


def test_jitter_is_bounded_and_per_image():
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 32, 32)
    image[..., 14:18, 14:18] = 1.0
    moved = data.jittered(image.expand(64, -1, -1, -1))
    assert moved.shape == (64, 1, 32, 32)
    assert not torch.equal(moved[0], moved[1])
    # 12 degrees, 10 % of the scale and 10 % of the size move the square by at most five pixels.
    assert moved[..., :8, :].abs().max() == 0
    still = data.jittered(image, degrees=0.0, scale=0.0, shift=0.0)
    torch.testing.assert_close(still, image, rtol=0, atol=1e-5)


def test_digits_opened_are_the_digits():
    digits = data.open_data(["digits"], seed=3)
    train, test, statistics = data.digits(3)
    assert (digits.in_chans, digits.img_size, digits.classes) == (1, 32, list("0123456789"))
    assert digits.statistics == {key: [value] for key, value in statistics.items()}
    images, labels = map(torch.cat, zip(*digits.evaluation(100), strict=True))
    assert torch.equal(images, test.images)
    assert torch.equal(labels, test.labels)
    keys = digits.order(3, 1)[:64]
    ((images, labels),) = digits.training(keys[None])
    assert torch.equal(labels, train.labels[keys % len(train)])
    assert not torch.equal(images, train.images[keys % len(train)])
    larger = data.open_data(["digits"], seed=3, img_size=64, statistics={"mean": [0.0], "std": [1.0]})
    images, _ = next(larger.evaluation(4))
    assert images.shape == (4, 1, 64, 64)
    assert images.mean() > 0.1  # not normalised to a mean of 0, as was asked


def test_order_is_a_permutation_of_seed_and_epoch():
    digits = data.open_data(["digits"], seed=0)
    orders = [digits.order(*numbers) for numbers in ((0, 0), (0, 0), (0, 1), (1, 0))]
    for order, epoch in zip(orders, (0, 0, 1, 0), strict=True):
        assert sorted(order.tolist()) == list(range(epoch * 1437, (epoch + 1) * 1437))
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2] - 1437)
    assert not torch.equal(orders[0], orders[3])


def test_folder_of_photographs(photographs):
    folder = opened(photographs)
    assert (folder.classes, folder.in_chans, folder.img_size) == (CLASSES, 3, 32)
    images, labels = next(folder.evaluation(8))
    assert images.shape == (8, 3, 32, 32)
    assert labels.tolist() == [0] * 4 + [1] * 4
    other = opened(photographs, statistics={"mean": [0.0] * 3, "std": [1.0] * 3})
    mean, std = (torch.tensor(folder.statistics[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close(next(other.evaluation(8))[0], images * std + mean, rtol=0, atol=1e-6)


def test_augmentation_follows_from_seed_epoch_and_image_alone(photographs):
    folder = opened(photographs)
    keys = folder.order(0, 2).view(4, 6)
    whole = list(folder.training(keys))
    np.random.seed(1)  # noqa: NPY002 (what was drawn before must not matter)
    later = list(folder.training(keys[2:], workers=2))
    for (images, labels), (same_images, same_labels) in zip(whole[2:], later, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    ((alone, _),) = folder.training(keys[3:, 5:])
    assert torch.equal(alone[0], whole[3][0][5])
    for other in (folder.training(keys - 24), opened(photographs, seed=1).training(keys)):
        images, labels = next(other)
        assert torch.equal(labels, whole[0][1])
        assert not torch.equal(images, whole[0][0])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_evaluation(photographs, world):
    folder = opened(photographs)
    whole = torch.cat([images for images, _ in folder.evaluation(3)])
    shares = [list(folder.evaluation(3, rank=rank, world=world)) for rank in range(world)]
    assert torch.equal(whole, torch.cat([shares[i % world][i // world][0] for i in range(3)]))


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "text": b"no image", "empty": b""}[how])


@pytest.mark.parametrize("how", ["cut", "text", "empty"])
@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_image_is_fatal_and_named(photographs, how, workers):
    corrupt = photographs / "train" / "flower" / "03.jpg"
    damage(corrupt, how)
    folder = opened(photographs)
    with pytest.raises(data.CorruptImage, match=r"03\.jpg cannot be read as an image") as caught:
        list(folder.training(folder.order(0, 0).view(6, 4), workers))
    assert str(corrupt) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sum(len(labels) for _, labels in folder.evaluation(8)) == 8  # the others are whole


def test_corrupt_image_is_skipped_and_named(photographs, capsys):
    for name in ("train/china/11.jpg", "val/china/02.jpg"):
        damage(photographs / name, "cut")
    folder = opened(photographs, corrupt="skip")
    ((images, labels),) = folder.training(torch.tensor([[10, 11, 12]]))
    assert images.shape == (3, 3, 32, 32)
    assert labels.tolist() == [0, 1, 1]  # the next image, of the other class, in its place
    assert "train/china/11.jpg" in capsys.readouterr().err
    assert torch.cat([labels for _, labels in folder.evaluation(1)]).tolist() == [0] * 3 + [1] * 4
    assert "val/china/02.jpg" in capsys.readouterr().err


def test_nothing_but_corrupt_images(photographs):
    for path in (photographs / "train").glob("*/*"):
        damage(path, "empty")
    folder = opened(photographs, corrupt="skip")
    with pytest.raises(data.CorruptImage, match="no image of the training set"):
        list(folder.training(torch.tensor([[0, 1]])))


def test_test_images_may_lack_a_class(photographs):
    shutil.rmtree(photographs / "val" / "china")
    _, labels = next(opened(photographs).evaluation(8))
    assert labels.tolist() == [1] * 4


def test_data_set_by_name(photographs):
    folder = data.open_data(["torch/image_folder", str(photographs)], img_size=32, seed=0)
    assert folder.classes == CLASSES
    images, labels = next(folder.evaluation(8))
    assert torch.equal(images, next(opened(photographs).evaluation(8))[0])
    assert labels.tolist() == [0] * 4 + [1] * 4
    ((images, _),) = folder.training(torch.tensor([[0, 1]]))
    assert images.shape == (2, 3, 32, 32)


def _without_classes(folder: Path) -> None:
    shutil.move(folder / "train" / "china" / "00.jpg", folder / "train" / "00.jpg")


def _one_class(folder: Path) -> None:
    shutil.rmtree(folder / "train" / "china")
    shutil.rmtree(folder / "val" / "china")


def _no_images(folder: Path) -> None:
    for path in (folder / "train").glob("*/*"):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "there is no folder .*photographs"),
        (lambda folder: shutil.rmtree(folder / "val"), "must hold the folders train and val"),
        (_no_images, "train holds no images"),
        (_without_classes, "train holds images outside of class folders"),
        (_one_class, "has one class, flower"),
        (lambda folder: shutil.rmtree(folder / "train" / "china"), "val has classes that .*train has not: china"),
    ],
)
def test_bad_folders(photographs, change, message):
    change(photographs)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        opened(photographs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["digits", "more"], "digits take no further value, not more"),
        (["imagefolder"], "imagefolder takes one value"),
        (["cifar10"], "there is no data set 'cifar10'"),
        (["hfids/cifar10"], "there is no data set 'hfids/cifar10'"),
        (["torch/cifar10"], "must be followed by the folder that holds it, not by nothing"),
        (["torch/cifar10", "/nowhere"], "must be followed by the folder that holds it, not by /nowhere"),
        (["torch/cifar10", "."], "torch/cifar10 could not be opened"),
        (["torch/unheard_of", "."], "torch/unheard_of could not be opened"),
        (["torch/cifar10", ".", "x"], "takes at most"),
    ],
)
def test_bad_names(spec, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        data.open_data(spec, img_size=32, seed=0)
    assert "\n" not in str(caught.value)


def test_named_data_set_without_its_package(monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="hfds/cifar10 needs the package datasets"):
        data.open_data(["hfds/cifar10"], seed=0)
