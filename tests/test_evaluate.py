"""Evaluation: the accuracy of the data that a checkpoint remembers, and one line for what cannot be tested."""

import json
import subprocess
import sys

import checkpoint
import evaluate
import pytest
import timm
import torch
from conftest import refused_by
from data import digits, open_data
from PIL import Image

SEED = 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that has seen digits for some steps, and its file."""
    torch.manual_seed(0)
    train, _, _ = digits(SEED)
    model = timm.create_model("soft_digits")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for images, labels in zip(train.images.split(32)[:12], train.labels.split(32), strict=False):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    save(path, model)
    return path, model.eval()


def save(path, model, name="soft_digits", arguments=(), **changes):
    statistics = open_data(["digits"], img_size=None, seed=SEED).statistics
    metadata = {
        "model": name,
        "arguments": json.dumps(dict(arguments)),
        "data": json.dumps({"spec": ["digits"], "seed": SEED} | statistics | changes),
    }
    checkpoint.save(path, model.state_dict(), metadata=metadata)


@pytest.fixture(scope="module")
def logits_and_labels(trained):
    _, test, _ = digits(SEED)
    with torch.no_grad():
        return trained[1](test.images), test.labels


def run(capsys, *arguments):
    evaluate.main([str(argument) for argument in arguments])
    return capsys.readouterr().out.splitlines()


def refused(capsys, *arguments):
    return refused_by(evaluate.main, capsys, *arguments)


def test_accuracies_are_those_of_the_split_it_was_trained_with(trained, logits_and_labels, capsys):
    logits, labels = logits_and_labels
    top1 = (logits.argmax(1) == labels).double().mean().item()
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    assert 0.2 < top1 < top5 < 1
    lines = run(capsys, trained[0], "--batch-size", "100", "--device", "cpu")
    assert lines[-1] == f"top1={top1:.4f}"
    table = dict(line.rsplit(maxsplit=1) for line in lines[1:-1])
    assert table["top1"] == f"{top1:.4f}"
    assert table["top5"] == f"{top5:.4f}"
    assert table["images"] == "360"
    assert float(table["images/s"]) > 0
    assert 50 < float(table["peak memory, MiB"]) < 100_000


def test_another_split_gives_another_result(trained, logits_and_labels, tmp_path, capsys):
    logits, labels = logits_and_labels
    save(tmp_path / "other.safetensors", trained[1], seed=SEED + 1)
    top1 = (logits.argmax(1) == labels).double().mean().item()
    assert run(capsys, tmp_path / "other.safetensors", "--device", "cpu")[-1] != f"top1={top1:.4f}"


def test_statistics_are_the_checkpoints(trained, tmp_path, capsys):
    """Images as dark as night are told apart worse than by chance would be by this model: its bias speaks."""
    _, test, found = digits(SEED)
    images = test.images * found["std"] + found["mean"]
    with torch.no_grad():
        expected = (trained[1]((images - 9.0) / 0.5).argmax(1) == test.labels).double().mean().item()
    save(tmp_path / "dark.safetensors", trained[1], mean=[9.0], std=[0.5])
    assert run(capsys, tmp_path / "dark.safetensors", "--device", "cpu")[-1] == f"top1={expected:.4f}"


def test_amp_changes_little(trained, logits_and_labels, capsys):
    logits, labels = logits_and_labels
    top1 = (logits.argmax(1) == labels).double().mean().item()
    lines = run(capsys, trained[0], "--amp", "--device", "cpu")
    assert "bfloat16" in lines[0]
    assert float(lines[-1].removeprefix("top1=")) == pytest.approx(top1, abs=0.03)


def test_the_model_runs_once_more_than_there_are_batches(trained):
    """The first call, which is not counted, is of the first batch; all others are once each."""
    model, seen = trained[1], []
    hook = model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    results = evaluate.evaluate(model, open_data(["digits"], img_size=None, seed=SEED), batch_size=128)
    hook.remove()
    assert seen == [128, 128, 128, 104]
    assert results["images"] == 360


def test_fewer_than_five_classes_have_no_top5():
    data = open_data(["digits"], img_size=None, seed=SEED)
    torch.manual_seed(0)
    model = timm.create_model("soft_digits", num_classes=4)
    results = evaluate.evaluate(model, data, batch_size=360)
    assert "top5" not in results
    assert 0 <= results["top1"] <= 0.5


@pytest.fixture
def folder(tmp_path):
    """Three classes of two images in ImageFolder layout, tellable by their colour."""
    for split in ("train", "val"):
        for colour in ("red", "green", "blue"):
            (tmp_path / "images" / split / colour).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 30 + i), colour).save(tmp_path / "images" / split / colour / f"{i}.jpg")
    return tmp_path / "images"


def official(tmp_path, num_classes):
    torch.manual_seed(0)
    model = timm.create_model("soft_tiny", num_classes=num_classes, trained="official")
    torch.save({"state_dict": checkpoint.to_official(model.state_dict())}, tmp_path / "official.pth")
    return tmp_path / "official.pth", model.eval()


@pytest.mark.parametrize("name", ["soft_tiny", "soft_norm_tiny"])
def test_official_files_and_folders_of_images(tmp_path, folder, capsys, name):
    path, model = official(tmp_path, num_classes=3)
    images, labels = next(open_data(["imagefolder", str(folder)], img_size=224, seed=0).evaluation(6))
    model = checkpoint.load_official(path, name=name)
    with torch.no_grad():
        expected = (model(images).argmax(1) == labels).double().mean().item()
    lines = run(capsys, path, "--data", "imagefolder", folder, "--name", name, "--batch-size", "6", "--device", "cpu")
    assert lines[-1] == f"top1={expected:.4f}"
    assert not any(line.startswith("top5") for line in lines)


def test_what_does_not_fit_is_told_in_one_line(tmp_path, trained, folder, capsys):
    path, _ = trained
    other = timm.create_model("soft_digits", num_classes=7)
    save(tmp_path / "seven.safetensors", other, arguments={"num_classes": 7})
    line = refused(capsys, tmp_path / "seven.safetensors", "--device", "cpu")
    assert "tells 7 classes apart and digits has 10" in line
    three = timm.create_model("soft_digits", num_classes=3)
    save(tmp_path / "three.safetensors", three, arguments={"num_classes": 3})
    line = refused(capsys, tmp_path / "three.safetensors", "--data", "imagefolder", folder, "--device", "cpu")
    assert "takes images of 1 channels" in line
    wide = timm.create_model("soft_digits", img_size=(32, 64))
    save(tmp_path / "wide.safetensors", wide, arguments={"img_size": [32, 64]})
    assert "takes images of [32, 64] pixels" in refused(capsys, tmp_path / "wide.safetensors", "--device", "cpu")
    checkpoint.save(
        tmp_path / "no_data.safetensors", trained[1].state_dict(), metadata={"model": "soft_digits", "arguments": "{}"}
    )
    assert "name some by --data" in refused(capsys, tmp_path / "no_data.safetensors", "--device", "cpu")
    assert "there is no file" in refused(capsys, tmp_path / "nowhere.safetensors")
    assert "nowhere" in refused(capsys, path, "--data", "imagefolder", tmp_path / "nowhere", "--device", "cpu")
    assert "--batch-size must be at least 1, not 0" in refused(capsys, path, "--batch-size", "0")
    assert "--workers must be at least 0, not -1" in refused(capsys, path, "--workers", "-1")
    assert "--device abacus cannot be used" in refused(capsys, path, "--device", "abacus")
    assert "no model 'soft_titanic'" in refused(capsys, official(tmp_path, 3)[0], "--name", "soft_titanic")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    assert "bad.safetensors is not a safetensors file" in refused(capsys, tmp_path / "bad.safetensors")


def test_a_corrupt_image_is_named(tmp_path, folder, capsys):
    (folder / "val" / "green" / "1.jpg").write_bytes(b"no jpeg")
    path, _ = official(tmp_path, num_classes=3)
    assert "1.jpg" in refused(capsys, path, "--data", "imagefolder", folder, "--device", "cpu")


def test_the_script_runs(trained):
    command = [sys.executable, evaluate.__file__, str(trained[0]), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].startswith("top1=0.")
