"""The training script: it learns, it says so, it writes whole files, and its attention is the library's."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import checkpoint
import data
import numpy as np
import pytest
import timm
import torch
import train

import lowrank.pinv

SCRIPTS = sorted((Path(__file__).parents[1] / "examples" / "soft").glob("*.py"))
# torch deprecates what timm's layers are scripted with.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One short run, shared: its output folder and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "out"
    command = [sys.executable, train.__file__, "--epochs", "2", "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return folder, done


def test_run_ends_with_the_accuracy(run):
    folder, done = run
    last = done.stdout.splitlines()[-1]
    assert last.startswith("test_accuracy=")
    # After two of sixteen epochs most digits are told apart; chance is 0.1.
    assert float(last.removeprefix("test_accuracy=")) > 0.5
    assert str(folder) in done.stdout
    table = np.array([line.strip(" []").split() for line in done.stdout.splitlines() if line.strip().startswith("[")])
    assert table.shape == (10, 10)
    assert table.astype(int).sum() == 360
    assert "img" in done.stderr
    assert "loss" in done.stderr


def test_run_leaves_checkpoint_log_and_plots(run):
    folder, done = run
    assert sorted(p.name for p in folder.iterdir()) == ["attention.png", "learning.png", "log.csv", "model.safetensors"]
    with open(folder / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    for name in ("attention.png", "learning.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    state, metadata = checkpoint.load(folder / "model.safetensors")
    model = timm.create_model(metadata["model"])
    model.load_state_dict(state)
    _, test, _ = data.digits(int(metadata["seed"]))
    accuracy = (train.predict(model, test.images).argmax(1) == test.labels).double().mean().item()
    assert done.stdout.splitlines()[-1] == f"test_accuracy={accuracy:.4f}"
    assert metadata["test_accuracy"] == f"{accuracy:.4f}"


@pytest.mark.parametrize("iteration", ["pinv_newton", "scaled_newton"])
def test_training_runs_through_the_iteration(monkeypatch, tmp_path, iteration):
    class Unavailable(Exception):
        pass

    def fail(*_, **__):
        raise Unavailable

    monkeypatch.setattr(lowrank.pinv, iteration, fail)
    with pytest.raises(Unavailable):
        train.main(["--epochs", "1", "--output", str(tmp_path / "out")])


def test_training_runs_through_the_attention(monkeypatch, tmp_path):
    calls = []
    original = lowrank.nn.softmax_free_attention

    def counting(*arrays, **options):
        calls.append(arrays[0].shape)
        return original(*arrays, **options)

    monkeypatch.setattr(lowrank.nn, "softmax_free_attention", counting)
    train.main(["--epochs", "1", "--batch-size", "256", "--output", str(tmp_path / "out")])
    # Three softmax-free stages of 8², 4² and 2² tokens, once a step and once a prediction.
    assert len(calls) % 3 == 0
    assert {shape[2] for shape in calls} == {64, 16, 4}


def test_same_seed_same_weights(tmp_path):
    states = []
    for name in ("a", "b"):
        train.main(["--epochs", "1", "--batch-size", "256", "--seed", "3", "--output", str(tmp_path / name)])
        states.append(checkpoint.load(tmp_path / name / "model.safetensors")[0])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_interruption_leaves_the_last_complete_checkpoint(monkeypatch, tmp_path):
    original, epochs = train.Training.epoch, []

    def interrupted(self, *arguments):
        if epochs:
            raise KeyboardInterrupt
        epochs.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(train.Training, "epoch", interrupted)
    with pytest.raises(SystemExit, match="the last complete epoch is in"):
        train.main(["--epochs", "3", "--batch-size", "256", "--output", str(tmp_path / "out")])
    _, metadata = checkpoint.load(tmp_path / "out" / "model.safetensors")
    assert metadata["epoch"] == "1"
    assert not list((tmp_path / "out").glob("*.part"))


def test_existing_results_are_not_overwritten(run, capsys):
    folder, _ = run
    before = (folder / "log.csv").read_bytes()
    with pytest.raises(SystemExit):
        train.main(["--output", str(folder)])
    assert "nothing is overwritten" in capsys.readouterr().err
    assert (folder / "log.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--batch-size", "-4"], "--batch-size must be at least 1, not -4"),
        (["--lr", "0"], "--lr must be positive, not 0.0"),
        (["--model", "soft_tiny"], "does not take single-channel images"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(arguments)
    assert message in capsys.readouterr().err


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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_imports_without_running(script):
    done = subprocess.run(
        [sys.executable, "-c", f"import {script.stem}"], cwd=script.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
