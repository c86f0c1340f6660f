"""The task of two far-apart marks, and who is trained on it within a budget."""

from __future__ import annotations

import json
import subprocess
import sys

import long_images
import pytest
import torch


def scenes(count, size, seed=0):
    return long_images.scenes(count, size, torch.Generator().manual_seed(seed))


def test_the_label_is_the_pair_of_directions(monkeypatch):
    # Without noise the marks can be looked for.
    monkeypatch.setattr(torch, "randn", lambda shape, generator: torch.zeros(shape))
    images, labels = scenes(300, 96)
    marks = long_images.marks()
    response = torch.nn.functional.conv2d(images / long_images.CONTRAST, marks)  # (300, directions, 81, 81)
    # A mark answers itself with all its pixels; what another has of them is less.
    found = response > marks.sum((1, 2, 3))[:, None, None] - 0.5
    pairs = [(low, high) for high in range(4) for low in range(high + 1)]
    for at, label in zip(found, labels.tolist(), strict=True):
        turns, rows, columns = at.nonzero().T
        assert tuple(sorted(turns.tolist())) == pairs[label]
        assert torch.dist(*torch.stack([rows, columns], 1).float()) > 0.5 * (96 - 16) - 1.5
    shares = torch.bincount(labels, minlength=10) / len(labels)
    assert shares.min() > 0.02
    assert shares.max() < 0.2


def test_scenes_are_seeded_and_noisy():
    images, labels = scenes(4, 64)
    again, same = scenes(4, 64)
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    assert not torch.equal(images, scenes(4, 64, seed=1)[0])
    noise = torch.cat([image.flatten().sort().values[:3000] for image in images[:, 0]])
    assert -0.5 < noise.mean() < 0  # two bars at most raise 100 of 4,096 pixels, and not these


def test_marks_are_bars_of_equal_weight_in_four_directions():
    marks = long_images.marks()
    assert marks.shape == (4, 1, 16, 16)
    flat = marks.flatten(1)
    shared = flat @ flat.T / flat.sum(1)
    assert shared.diagonal().tolist() == [1.0] * 4
    assert (shared - torch.eye(4)).max() < 0.5
    assert torch.equal(marks[0].mT, marks[2])
    assert torch.equal(marks[1].flip(-1), marks[3])


def test_only_what_fits_the_budget_is_trained(monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(long_images, "seconds_a_step", lambda attn, size, batch: 2.0 if size == 64 else 0.5)
    monkeypatch.setattr(long_images, "fit", lambda *_, steps, **__: trained.append(steps) or 1.0)
    curriculum = [(32, 4, 10), (64, 2, 5)]
    row = long_images.learn("softmax", curriculum, 14.9, 4)
    assert trained == []
    assert row["accuracy"] is None
    assert long_images.outcome(row) == "over budget: 2 s a step expected, 15 s in all"
    row = long_images.learn("softmax", curriculum, 15.0, 4)
    assert trained == [10, 5]
    assert 0 <= row["accuracy"] <= 1
    assert "softmax: 5 steps at 64 pixels" in capsys.readouterr().err


def test_the_command_measures_and_tells_what_is_over_budget(tmp_path):
    command = [sys.executable, long_images.__file__, "--quick", "--budget", "1e-3", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads((tmp_path / "long_images.json").read_text())
    assert {"command", "date", "machine", "rows", "costs", "budget"} <= results.keys()
    assert str(tmp_path) not in (tmp_path / "long_images.json").read_text()
    assert [row["attn"] for row in results["rows"]] == ["soft", "softmax", "gaussian"]
    assert {(row["attn"], row["size"]) for row in results["costs"]} == {
        (attn, size) for attn in long_images.COMPARED for size in (64, 128)
    }
    table = done.stdout.splitlines()
    assert len(table) == 5
    assert all("over budget:" in line for line in table[2:])
    assert (tmp_path / "long_images.md").read_text() == done.stdout
    assert (tmp_path / "long_images.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0"], "--budget must be positive, not 0.0"),
        (["--output", long_images.__file__], "File exists"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        long_images.parse_arguments(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
