"""Cluttered digits and the comparison of attentions on them: what is generated, what is kept, what is refused."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import cluttered
import compare_attention
import fit
import numpy as np
import pytest
import torch


def raw(split, statistics):
    return split.images * statistics["std"] + statistics["mean"]


def test_an_image_depends_on_seed_and_index_alone():
    few, tests, few_statistics = cluttered.cluttered(3, train=6, test=4)
    many, more_tests, statistics = cluttered.cluttered(3, train=40, test=9)
    assert few.images.shape == (6, 1, 64, 64)
    torch.testing.assert_close(raw(many, statistics)[:6], raw(few, few_statistics), rtol=0, atol=1e-5)
    torch.testing.assert_close(raw(more_tests, statistics)[:4], raw(tests, few_statistics), rtol=0, atol=1e-5)
    assert torch.equal(many.labels[:6], few.labels)
    other, _, _ = cluttered.cluttered(4, train=6, test=4)
    assert not torch.allclose(other.images, few.images)
    assert not torch.equal(more_tests.labels, many.labels[:9])
    assert abs(float(many.images.mean())) < 1e-4
    assert abs(float(many.images.std()) - 1) < 1e-4


def test_no_scan_is_in_both_splits(monkeypatch):
    given = []

    def recording(scans, chance, size):
        given.append({scan.numpy().tobytes() for scan in scans})
        return original(scans, chance, size)

    original = cluttered.scenes
    monkeypatch.setattr(cluttered, "scenes", recording)
    _, test, _ = cluttered.cluttered(0, train=4, test=2000)
    train_scans, test_scans = given
    assert len(train_scans) == 1437
    assert len(test_scans) == 360
    assert not train_scans & test_scans
    assert torch.bincount(test.labels, minlength=10).min() > 100


def test_without_clutter_there_is_one_digit_of_the_size_told(monkeypatch):
    monkeypatch.setattr(cluttered, "FRAGMENTS", 0)
    # Scans without a dark pixel show where they have been put.
    images, which = cluttered.scenes(torch.ones(5, 1, 8, 8), np.random.default_rng(0).random((300, 4)), 64)
    tops, lefts = [], []
    for image in images[:, 0]:
        (top, bottom), (left, right) = ((int(x.min()), int(x.max())) for x in image.nonzero().T)
        assert bottom - top == right - left
        assert 24 <= bottom - top + 1 <= 32
        assert bool((image[top : bottom + 1, left : right + 1] > 0.999).all())
        tops.append(top)
        lefts.append(left)
    assert min(*tops, *lefts) < 3
    assert max(*tops, *lefts) > 30
    assert which.unique().tolist() == [0, 1, 2, 3, 4]


def test_fragments_are_small_and_never_of_the_digit_itself():
    scans = torch.stack([torch.full((1, 8, 8), 0.5), torch.ones(1, 8, 8)])
    chance = np.random.default_rng(0).random((50, 4 + 6 * cluttered.FRAGMENTS))
    images, which = cluttered.scenes(scans, chance, 64)
    bright = (images > 0.999).sum((1, 2, 3))
    dim = ((images > 0.499) & (images < 0.501)).sum((1, 2, 3))
    for digit, fragments in ((dim[which == 0], bright[which == 0]), (bright[which == 1], dim[which == 1])):
        assert len(digit) > 10
        assert 24**2 - 4 * 10**2 <= digit.min() <= digit.max() <= 32**2
        assert fragments.max() <= 4 * 10**2
    # The brighter pixel stays, and so dim fragments may vanish behind the digit, but not bright ones.
    assert bright[which == 0].min() >= 8**2


def test_a_scene_is_the_same_at_every_canvas_size():
    (small, _, a), (large, _, b) = (cluttered.cluttered(0, size=size, train=50, test=1) for size in (64, 128))
    assert large.images.shape == (50, 1, 128, 128)
    assert torch.equal(small.labels, large.labels)
    shrunk = torch.nn.functional.avg_pool2d(raw(large, b), 2)
    together = torch.corrcoef(torch.stack([raw(small, a).flatten(), shrunk.flatten()]))[0, 1]
    assert together > 0.93


def test_the_rate_rises_then_falls_and_the_loss_may_be_any():
    net = torch.nn.Conv2d(1, 2, 1)
    rates, batch = [], (torch.randn(4, 1, 3, 5), torch.ones(4, 3, 5, dtype=torch.long))
    original = torch.optim.AdamW.step

    class Watched(torch.optim.AdamW):
        def step(self, *arguments, **options):
            rates.append(self.param_groups[0]["lr"])
            return original(self, *arguments, **options)

    patch = pytest.MonkeyPatch()
    with patch.context() as p:
        p.setattr(fit, "create_optimizer_v2", lambda model, opt, lr, weight_decay: Watched(model.parameters(), lr=lr))
        speed = fit.fit(net, iter([batch] * 20), steps=20, lr=0.1, loss=lambda x, y: ((x[:, 1] - y) ** 2).mean())
    assert speed > 0
    assert len(rates) == 20
    assert rates[:3] == pytest.approx([0.001, 0.0505, 0.1])
    assert all(before > after for before, after in itertools.pairwise(rates[2:]))
    assert rates[-1] < 0.005


def test_accuracy_counts_labels_on_all_axes():
    logits = torch.tensor([[[0.0, 1.0, 0.0]], [[1.0, 0.0, 1.0]]]).movedim(0, 1)[None]  # (1, 1, 2, 3)
    maps, labels = logits[:, 0], torch.tensor([[1, 0, 0]])
    assert fit.accuracy(torch.nn.Identity(), [(maps, labels)]) == pytest.approx(2 / 3)
    several = [(maps, labels), (maps.repeat(3, 1, 1), torch.tensor([[1, 0, 1]]).repeat(3, 1))]
    assert fit.accuracy(torch.nn.Identity(), several) == pytest.approx(11 / 12)


def test_a_loss_that_is_no_number_stops_with_its_step():
    batches = [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))] * 2
    batches.append((torch.full((2, 3), torch.nan), torch.zeros(2, dtype=torch.long)))
    with pytest.raises(FloatingPointError, match="nan at step 2; lower the learning rate"):
        fit.fit(torch.nn.Linear(3, 2), batches, steps=3, lr=1e-3)


def test_batches_are_shuffled_anew_each_time_round():
    images = torch.arange(10.0).reshape(10, 1)
    batches = fit.shuffled(images, images[:, 0].long(), batch_size=4, seed=0)
    rounds = [torch.cat([next(batches)[0] for _ in range(2)])[:, 0].tolist() for _ in range(3)]
    assert all(len(set(each)) == 8 for each in rounds)
    assert rounds[0] != rounds[1]
    again = fit.shuffled(images, images[:, 0].long(), batch_size=4, seed=0)
    assert torch.cat([next(again)[0] for _ in range(2)])[:, 0].tolist() == rounds[0]


def test_the_command_trains_measures_and_writes(tmp_path):
    command = [sys.executable, compare_attention.__file__, "--quick", "--output", str(tmp_path)]
    command += ["--attn", "soft", "softmax", "--data", "digits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads((tmp_path / "compare_attention.json").read_text())
    assert {"command", "date", "machine", "rows", "costs", "recipes"} <= results.keys()
    assert str(tmp_path) not in (tmp_path / "compare_attention.json").read_text()
    assert {(row["data"], row["attn"], row["seed"]) for row in results["rows"]} == {
        ("digits", "soft", 0),
        ("digits", "softmax", 0),
    }
    kinds = {(row["attn"], row["size"], row["pass"]) for row in results["costs"]}
    assert len(kinds) == len(results["costs"]) == 2 * 2 * 2
    by = {(row["attn"], row["size"]): row["gmacs"] for row in results["costs"]}
    # Sixteen times the pairs of tokens for four times the tokens, and softmax pays for them.
    assert 2 < by["soft", 64] / by["soft", 32] < 5.5 < by["softmax", 64] / by["softmax", 32]
    table = done.stdout.splitlines()
    assert [line.split(" | ")[0] for line in table] == ["| attention", "| ---", "| soft", "| softmax"]
    assert (tmp_path / "compare_attention.md").read_text() == done.stdout
    assert (tmp_path / "compare_attention.png").read_bytes().startswith(b"\x89PNG")
    assert "training at 64 pixels: soft takes" in done.stderr
    assert not list(tmp_path.glob(".*"))


class Inline:
    """A pool whose jobs run when they are asked for."""

    def __init__(self, *_, **__): ...

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def submit(self, function, *arguments):
        return lambda: function(*arguments)

    def shutdown(self, **_): ...


class Done:
    def __init__(self, job):
        self.result = job


@pytest.fixture
def toy(monkeypatch):
    """Runs and costs without any training or timing; the list of the runs made."""
    made = []

    def run(task, attn, seed, recipe):
        made.append((task, attn, seed))
        return {"data": task, "attn": attn, "seed": seed, "accuracy": 0.9 + 0.01 * seed}

    def costs(attentions, size, quick):
        figures = {"batch": 1, "gmacs": 0.1, "median": 0.5, "images/s": 2.0, "memory": 1e6}
        return [{"attn": a, "size": size, "pass": p} | figures for a in attentions for p in compare_attention.PASSES]

    monkeypatch.setattr(compare_attention, "run", run)
    monkeypatch.setattr(compare_attention, "costs", costs)
    monkeypatch.setattr(compare_attention, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(compare_attention, "as_completed", lambda jobs: map(Done, jobs))
    return made


def test_what_is_finished_is_kept_and_gone_on_from(toy, monkeypatch, tmp_path, capsys):
    complete = compare_attention.run

    def interrupted(*arguments):
        if len(toy) == 3:
            raise KeyboardInterrupt
        return complete(*arguments)

    arguments = ["--output", str(tmp_path), "--attn", "soft", "softmax", "--seeds", "0", "1"]
    monkeypatch.setattr(compare_attention, "run", interrupted)
    with pytest.raises(SystemExit, match="the same command goes on"):
        compare_attention.main(arguments)
    path = tmp_path / "compare_attention.json"
    assert len(json.loads(path.read_text())["rows"]) == 3
    monkeypatch.setattr(compare_attention, "run", complete)
    compare_attention.main(arguments)
    assert len(toy) == len(set(toy)) == 8
    capsys.readouterr()
    # Another part later joins what is there; the table has all.
    compare_attention.main([*arguments[:2], "--attn", "performer", "--data", "digits", "--seeds", "0"])
    assert toy[8:] == [("digits", "performer", 0)]
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:4] for line in table[2:]] == [
        ["| soft", "631,616", "90.5 ± 0.7", "90.5 ± 0.7"],
        ["| softmax", "624,448", "90.5 ± 0.7", "90.5 ± 0.7"],
        ["| performer", "624,448", "90.0", "–"],
    ]
    assert "soft is +0.00 points off softmax" in "".join(json.loads(path.read_text())["findings"])


def test_results_that_do_not_fit_are_refused_and_left(toy, tmp_path, capsys):
    compare_attention.main(["--quick", "--output", str(tmp_path), "--attn", "soft"])
    path = tmp_path / "compare_attention.json"
    for spoil, message in (
        (lambda text: text, "another recipe or machine"),
        (lambda text: text[:-40], "cannot be gone on from"),
        (lambda text: "[]", "cannot be gone on from"),
    ):
        path.write_text(before := spoil(path.read_text()))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            compare_attention.main(["--output", str(tmp_path)])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert path.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attn", "flash"], "invalid choice: 'flash'"),
        (["--data", "mnist"], "invalid choice: 'mnist'"),
        (["--seeds", "-1"], "--seeds must not be negative, as -1 is"),
        (["--output", compare_attention.__file__], "File exists"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare_attention.parse_arguments(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
