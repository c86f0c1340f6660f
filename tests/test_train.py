"""The training script: it learns, it says so, it writes whole files, and its attention is the library's.

And a run may be interrupted at any moment, killed included, or be spread over processes, without a trace.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import checkpoint
import data
import evaluate
import export
import pytest
import recipe
import state
import timm
import torch
import train
import visualize
from test_data import damage, make_photographs

import lowrank.pinv

SOFT = Path(__file__).parents[1] / "examples" / "soft"
# torch deprecates what timm's layers are scripted with.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning",
    "ignore:`torch.jit:DeprecationWarning",
    "ignore:os.fork:RuntimeWarning",  # of JAX, which another file's tests have left in this process
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One short run, shared: its output folder and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "out"
    command = [sys.executable, train.__file__, "--epochs", "2", "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return folder, done


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_photographs(tmp_path_factory.mktemp("data") / "photographs", size=32)


def on(photographs: Path, *arguments: object) -> list[str]:
    """Two epochs of six steps."""
    small = ["--model", "soft_digits", "--img-size", 32, "--batch-size", 4, "--epochs", 2, "--lr", 1e-3]
    return [str(value) for value in ("--data", "imagefolder", photographs, *small, *arguments)]


@pytest.fixture(scope="module")
def whole(photographs, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train.main(on(photographs, "--save-every", 5, "--output", folder))
    return folder


def refused(capsys, arguments: list[str], code: int = 2) -> str:
    """What main says of what it does not do; one line."""
    with pytest.raises(SystemExit) as caught:
        train.main(arguments)
    assert caught.value.code == code
    *bar, line = capsys.readouterr().err.splitlines()
    assert not any("error" in earlier for earlier in bar)
    return line


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a.keys() - {"seconds"})
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_end(one: Path, other: Path) -> None:
    """Bit for bit: weights, average, optimiser, log and published weights."""
    first, second = (state.read(state.states(folder)[-1]) for folder in (one, other))
    assert first["step"] == second["step"]
    for key in ("model", "average", "optimizer", "sums", "history"):
        assert same(first[key], second[key]), key
    logs = [(folder / "log.csv").read_text().splitlines() for folder in (one, other)]
    assert [row.rpartition(",")[0] for row in logs[0]] == [row.rpartition(",")[0] for row in logs[1]]
    assert same(*(checkpoint.load(folder / "model.safetensors") for folder in (one, other)))


def signal_at(monkeypatch, step: int, number: int) -> None:
    """Send this process the signal while it computes the step."""
    original = train.Training.update

    def update(self, *arguments):
        if self.step + 1 == step:
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    monkeypatch.setattr(train.Training, "update", update)


def test_run_ends_with_the_accuracy(run):
    folder, done = run
    last = done.stdout.splitlines()[-1]
    assert last.startswith("test_accuracy=")
    # After two of sixteen epochs most digits are told apart; chance is 0.1.
    assert float(last.removeprefix("test_accuracy=")) > 0.5
    assert str(folder) in done.stdout
    table = [line.strip(" []").split() for line in done.stdout.splitlines() if line.strip().startswith("[")]
    assert [len(row) for row in table] == [10] * 10
    assert sum(int(count) for row in table for count in row) == 360
    for shown in ("img/s", "loss=", "accuracy=", "GB=", "<00:"):
        assert shown in done.stderr


def test_run_leaves_checkpoint_log_and_plots(run):
    folder, done = run
    names = ["attention.png", "learning.png", "log.csv", "model.safetensors"]
    assert sorted(p.name for p in folder.iterdir()) == [*names, "state-00000022.pt", "state-00000044.pt"]
    with open(folder / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [row["step"] for row in rows] == ["22", "44"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    for name in ("attention.png", "learning.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    weights, metadata = checkpoint.load(folder / "model.safetensors")
    model = timm.create_model(metadata["model"], **json.loads(metadata["arguments"])).eval()
    model.load_state_dict(weights)
    about = json.loads(metadata["data"])
    digits = data.open_data(about.pop("spec"), seed=about.pop("seed"), statistics=about)
    assert digits.classes == json.loads(metadata["classes"])
    with torch.no_grad():
        right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in digits.evaluation(64))
    assert done.stdout.splitlines()[-1] == f"test_accuracy={right / 360:.4f}"
    assert metadata["test_accuracy"] == f"{right / 360:.4f}"


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


def test_same_seed_same_weights(photographs, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train.main(on(photographs, "--epochs", 1, "--seed", seed, "--output", tmp_path / name))
    weights = [checkpoint.load(tmp_path / name / "model.safetensors")[0] for name in "abc"]
    assert same(weights[0], weights[1])
    assert not same(weights[0], weights[2])


# Resuming.


@pytest.mark.parametrize(
    ("step", "number", "options"),
    [
        (4, signal.SIGTERM, ()),
        (6, signal.SIGTERM, ()),  # the last of the first epoch
        (12, signal.SIGINT, ()),  # the last of all
        (2, signal.SIGINT, ("--accumulate", 2)),
        (5, signal.SIGTERM, ("--accumulate", 2, "--save-every", 2, "--workers", 1, "--channels-last")),
    ],
)
def test_interrupted_run_ends_as_if_it_had_not_been(
    photographs, whole, monkeypatch, tmp_path, capsys, step, number, options
):
    if options:
        whole = tmp_path / "whole"
        train.main(on(photographs, *options, "--output", whole))
    with monkeypatch.context() as patch:
        signal_at(patch, step, number)
        line = refused(capsys, on(photographs, *options, "--output", tmp_path / "out"), 128 + number)
    assert line == f"stopped at step {step}; resume with --resume {tmp_path / 'out'}"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert state.states(tmp_path / "out")[-1].name == f"state-{step:08d}.pt"
    train.main(["--resume", str(tmp_path / "out")])
    assert_same_end(whole, tmp_path / "out")
    assert "test_accuracy=" in capsys.readouterr().out


def test_interrupted_digits_end_as_if_they_had_not_been(monkeypatch, tmp_path, capsys):
    arguments = ["--epochs", "1", "--batch-size", "128", "--accumulate", "2", "--output"]
    train.main([*arguments, str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        signal_at(patch, 3, signal.SIGTERM)
        refused(capsys, [*arguments, str(tmp_path / "out")], 128 + signal.SIGTERM)
    train.main(["--resume", str(tmp_path / "out")])
    assert_same_end(tmp_path / "whole", tmp_path / "out")


def test_second_signal_is_not_held_back(photographs, monkeypatch, tmp_path):
    original = train.Training.update

    def update(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(train.Training, "update", update)
    # What Python does, whatever it is that runs the tests has changed.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train.main(on(photographs, "--output", tmp_path / "out"))
    finally:
        signal.signal(signal.SIGINT, before)


def test_last_states_are_kept(photographs, tmp_path):
    train.main(on(photographs, "--save-every", 1, "--keep", 2, "--output", tmp_path / "out"))
    assert [state.step_of(path) for path in state.states(tmp_path / "out")] == [11, 12]


@pytest.mark.parametrize("how", ["flipped", "cut", "text", "empty"])
def test_damaged_state_is_named_and_the_one_before_taken(whole, tmp_path, capsys, how):
    shutil.copytree(whole, tmp_path / "out")
    *_, before, newest = state.states(tmp_path / "out")
    if how == "flipped":
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1  # which torch.load takes as it comes
        newest.write_bytes(content)
    else:
        damage(newest, how)
    (tmp_path / "out" / ".state-00000011.pt.part").write_bytes(b"left by a killed run")
    assert state.newest(tmp_path / "out")["step"] == state.step_of(before) == 10
    assert f"{newest} is damaged" in capsys.readouterr().err
    train.main(["--resume", str(tmp_path / "out"), "--keep", "1"])
    assert [path.name for path in state.states(tmp_path / "out")] == [newest.name]
    assert not list((tmp_path / "out").glob(".*"))
    assert_same_end(whole, tmp_path / "out")


KILLED = """
import mmap, os, random, shutil, signal, sys, time
import checkpoint, state, train

train.tqdm.monitor_interval = 0  # no thread, for this process forks
folder, whole, kills, *arguments = sys.argv[1:]
progress = mmap.mmap(-1, 8)
update = train.Training.update

def counting(self, *rest):
    update(self, *rest)
    progress[:] = self.step.to_bytes(8, "little")

train.Training.update = counting

def start(arguments):
    if pid := os.fork():
        return pid
    train.main(arguments)
    os._exit(0)

began = time.monotonic()
assert os.waitpid(start([*arguments, "--output", whole]), 0)[1] == 0
took = time.monotonic() - began
random.seed(0)
done = 0
while done < int(kills):
    if not state.states(folder := state.Path(folder)):
        shutil.rmtree(folder, ignore_errors=True)
        command = [*arguments, "--output", str(folder)]
    else:
        command = ["--resume", str(folder)]
    progress[:] = bytes(8)
    pid = start(command)
    time.sleep(random.uniform(0, took / 2))
    os.kill(pid, signal.SIGKILL)
    if os.waitpid(pid, 0)[1] != signal.SIGKILL:
        shutil.rmtree(folder)  # it had come to its end: from the beginning
        continue
    done += 1
    reached = int.from_bytes(progress[:], "little")
    steps = [state.read(path)["step"] for path in state.states(folder)]
    assert max(steps, default=0) >= reached - 3, (steps, reached)
    if (folder / "model.safetensors").exists():
        checkpoint.load(folder / "model.safetensors")
    print("killed after step", reached, "with states of", steps)
command = ["--resume", str(folder)] if state.states(folder) else [*arguments, "--output", str(folder)]
if not state.states(folder):
    shutil.rmtree(folder, ignore_errors=True)
assert os.waitpid(start(command), 0)[1] == 0
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_run_loses_one_interval_at_most(photographs, tmp_path, kills):
    folders = tmp_path / "out", tmp_path / "whole"
    arguments = on(photographs, "--epochs", 4, "--save-every", 3)
    command = [sys.executable, "-c", KILLED, *map(str, folders), str(kills), *arguments]
    done = subprocess.run(command, cwd=SOFT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("killed after step") == kills
    assert_same_end(*folders)


# Several processes.

FIRST_GRADIENT = """
import sys; sys.path.insert(0, sys.argv[1])
import torch, train

clip = torch.nn.utils.clip_grad_norm_

def keeping(parameters, bound):
    parameters = list(parameters)
    torch.save([p.grad.clone() for p in parameters], sys.argv[2] + ".pt")
    train.nn.utils.clip_grad_norm_ = clip
    return clip(parameters, bound)

train.nn.utils.clip_grad_norm_ = keeping
train.main(["--epochs", "1", "--device", "cpu", "--output", *sys.argv[2:]])
"""


def test_two_processes_are_one(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = tmp_path / "first_gradient.py"
    script.write_text(FIRST_GRADIENT)
    one, two = tmp_path / "one", tmp_path / "two"
    said = []
    for folder, launch, options in ((one, [], ["--accumulate", "2"]), (two, torchrun, [])):
        command = [sys.executable, *launch, str(script), str(SOFT), str(folder), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append([line for line in done.stdout.splitlines() if "test_accuracy=" in line])
    assert len(said[1]) == 1  # the first process alone speaks
    assert said[0] == said[1]
    gradients = [torch.load(f"{folder}.pt") for folder in (one, two)]
    for single, spread in zip(*gradients, strict=True):
        assert single.abs().max() > 0
        torch.testing.assert_close(spread, single, rtol=0, atol=1e-6)
    # Running statistics and all: what differs is how sums are rounded.
    ends = [state.newest(folder) for folder in (one, two)]
    for key in ("model", "average"):
        for name, single in ends[0][key].items():
            if not name.endswith("num_batches_tracked"):
                torch.testing.assert_close(ends[1][key][name], single, rtol=1e-3, atol=1e-4)
    # What two processes began, one goes on with.
    assert recipe.parse_arguments("", ["--resume", str(two)]).accumulate == 2


# What is asked for.


def test_paper_recipe_on_eight_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")

    def chosen(*arguments: str) -> list:
        options = recipe.parse_arguments("", ["--data", "imagefolder", "x", *arguments])
        return [options.model, options.epochs, options.batch_size, options.lr]

    assert chosen() == chosen("--model", "soft_tiny") == ["soft_tiny", 300, 128, 1e-3]
    assert chosen("--model", "soft_norm_small")[2:] == [128, 1e-3]
    for size, rate in (("medium", 3.5e-4), ("norm_medium", 4e-4), ("large", 3.3e-4), ("norm_huge", 2.7e-4)):
        assert chosen("--model", f"soft_{size}", "--accumulate", "4") == [f"soft_{size}", 300, 32, pytest.approx(rate)]
    assert chosen("--lr", "2e-4", "--batch-size", "64", "--epochs", "5") == ["soft_tiny", 5, 64, 2e-4]
    options = recipe.parse_arguments("", ["--data", "imagefolder", "x"])
    assert options.recipe == recipe.PAPER | {"batch_size": 128, "lr": 1e-3}


def test_decay_and_schedule(photographs):
    training = train.prepare(on(photographs, "--epochs", 30, "--dry-run"))
    decayed, spared = training.optimizer.param_groups[1], training.optimizer.param_groups[0]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in training.model.named_parameters()}
    kept = {names[id(p)] for p in spared["params"]}
    assert training.model.no_weight_decay() <= kept
    assert {name for name in names.values() if name.endswith("bias") or "norm" in name} <= kept
    assert not any(name.endswith("proj.weight") for name in kept)
    rates = [training.scheduler._get_lr(step)[0] for step in range(181)]
    assert rates[0] == 1e-6
    assert max(rates) == pytest.approx(1e-3, rel=0.25)
    assert rates.index(max(rates)) == 59  # from the next on along the cosine, as timm counts from the start
    assert rates[179] == pytest.approx(5e-5, rel=0.01)


@pytest.mark.parametrize(
    "options",
    [
        ("--amp", "--grad-checkpointing", "--channels-last"),
        ("--attn", "softmax"),
        ("--model", "soft_tiny", "--img-size", 64),
        pytest.param(("--compile", "--accumulate", 2), marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_options_train(photographs, tmp_path, options):
    train.main(on(photographs, "--epochs", 1, *options, "--output", tmp_path))
    (row,) = csv.DictReader((tmp_path / "log.csv").read_text().splitlines())
    assert 0 < float(row["train_loss"]) < 5
    _, metadata = checkpoint.load(tmp_path / "model.safetensors")
    model = timm.create_model(metadata["model"], **json.loads(metadata["arguments"]))
    model.load_state_dict(checkpoint.load(tmp_path / "model.safetensors")[0])


def test_recomputing_changes_nothing(photographs, tmp_path):
    for name, options in (("plain", ()), ("recomputed", ("--grad-checkpointing",))):
        train.main(on(photographs, "--epochs", 1, *options, "--output", tmp_path / name))
    ends = [state.newest(tmp_path / name) for name in ("plain", "recomputed")]
    assert same(ends[0]["model"], ends[1]["model"])


def test_dry_run_tells_the_plan_and_writes_nothing(photographs, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--dry-run"])
    assert "0.56 M parameters" in capsys.readouterr().out
    train.main(["--data", "imagefolder", str(photographs), "--batch-size", "8", "--accumulate", "2", "--dry-run"])
    out = capsys.readouterr().out
    for said in (
        "soft_tiny",
        "12.56 M parameters",
        "GMACs",
        "of activations for 8 images",
        "300 epochs of 1 steps of 8 × 2",
    ):
        assert said in out
    assert not list(tmp_path.iterdir())


def test_start_from_other_weights(run, photographs, tmp_path, capsys):
    weights = run[0] / "model.safetensors"
    ours, _ = checkpoint.load(weights)
    options = ["--initial", str(weights), "--dry-run"]
    assert same(train.prepare(options).model.state_dict(), ours)
    assert "there is no file" in refused(capsys, ["--initial", "nowhere.safetensors"])
    wrong = refused(capsys, ["--model", "soft_cluttered", *options])
    assert wrong.endswith("holds the weights of soft_digits, not of soft_cluttered")
    assert "does not fit soft_digits" in refused(capsys, on(photographs, *options))
    few = {key: value[:2] if key.startswith("head") else value for key, value in ours.items()}
    checkpoint.save(tmp_path / "few.safetensors", few, metadata={"model": "soft_digits"})
    started = train.prepare(["--initial", str(tmp_path / "few.safetensors"), "--dry-run"]).model
    assert torch.equal(started.norm.weight, ours["norm.weight"])
    assert started.head.weight.shape == (10, 128)
    assert "has 2 classes; the head is a new one" in capsys.readouterr().err


def test_tensorboard_where_it_is_installed(photographs, monkeypatch, tmp_path):
    written = []

    class Writer:
        def __init__(self, folder, *, purge_step):
            written.append(purge_step)

        def add_scalar(self, key, value, epoch):
            written.append((key, epoch))

        def flush(self):
            pass

    find = state.importlib.util.find_spec
    monkeypatch.setattr(state.importlib.util, "find_spec", lambda name: name == "tensorboard" or find(name))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    train.main(on(photographs, "--output", tmp_path))
    assert written[0] == 1
    assert ("test_accuracy", 2) in written
    assert len(written) == 17


# What is refused.


def test_existing_results_are_not_overwritten(run, capsys):
    folder, _ = run
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for output in (folder, folder / "log.csv"):
        assert "nothing is overwritten" in refused(capsys, ["--output", str(output)])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--batch-size", "-4"], "--batch-size must be at least 1, not -4"),
        (["--batch-size", "7"], "--batch-size must be even, for mixup pairs images, not 7"),
        (["--batch-size", "1438"], "a step takes 1438 images, and there are 1437; lower --batch-size"),
        (["--lr", "0"], "--lr must be positive and finite, not 0.0"),
        (["--lr", "inf"], "--lr must be positive and finite, not inf"),
        (["--lr", "nan"], "--lr must be positive and finite, not nan"),
        (["--keep", "0"], "--keep must be at least 1, not 0"),
        (["--save-every", "0"], "--save-every must be at least 1, not 0"),
        (["--accumulate", "0"], "--accumulate must be at least 1, not 0"),
        (["--workers", "-1"], "--workers must be at least 0, not -1"),
        (["--img-size", "16"], "--img-size must be at least 32, not 16"),
        (["--seed", "-1"], "--seed must be at least 0, not -1"),
        (["--seed", "4294967296"], "--seed must be less than 2**32"),
        (["--model", "soft_gigantic"], "there is no model 'soft_gigantic'; the names are soft_tiny"),
        (["--data", "imagefolder", "nowhere"], "there is no folder nowhere"),
        (["--data", "imagefolder", "."], ". must hold the folders train and val"),
        (["--data", "cifar10"], "there is no data set 'cifar10'"),
        (["--resume", "nowhere"], "nowhere holds no state to resume from"),
        (["--resume", "a", "--output", "b"], "leave out --output and --initial"),
        (["--output", "file/out"], "Not a directory: 'file/out'"),
    ],
)
def test_bad_arguments(monkeypatch, tmp_path, arguments, message, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert message in refused(capsys, arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["--attn", "--corrupt", "--device"])
def test_unknown_choice(name, capsys):
    assert "invalid choice: 'x'" in refused(capsys, [name, "x"])


def test_only_the_same_run_is_resumed(photographs, tmp_path, capsys):
    train.main(on(photographs, "--epochs", 1, "--output", tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for change, message in (
        (["--model", "soft_tiny"], "has --model soft_digits, which cannot become soft_tiny"),
        (["--epochs", "2"], "has --epochs 1, which cannot become 2"),
        (["--accumulate", "2"], "is made of 1 batches"),
        (["--data", "digits"], "has 1437 training images of 10 classes; the run in"),
    ):
        assert message in refused(capsys, ["--resume", str(tmp_path / "out"), *change])
    more = shutil.copytree(photographs, tmp_path / "more")
    shutil.copytree(more / "train" / "china", more / "train" / "japan")
    line = refused(capsys, ["--resume", str(tmp_path / "out"), "--data", "imagefolder", str(more)])
    assert "has 36 training images of 3 classes; the run in" in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_corrupt_image_stops_the_run_or_is_skipped(photographs, tmp_path, capsys):
    folder = shutil.copytree(photographs, tmp_path / "photographs")
    damage(folder / "train" / "flower" / "07.jpg", "cut")
    output = tmp_path / "out"
    line = refused(capsys, on(folder, "--save-every", 1, "--output", output))
    assert "train/flower/07.jpg cannot be read as an image" in line
    saved = state.states(output)
    assert line.endswith(f"the last good state is {saved[-1]}" if saved else "no state was saved yet")
    train.main(on(folder, "--corrupt", "skip", "--output", tmp_path / "other"))
    assert "skipped: " in capsys.readouterr().err


def test_loss_that_is_no_number_stops_the_run(photographs, monkeypatch, tmp_path, capsys):
    output, original, calls = tmp_path / "out", train.SoftTargetCrossEntropy.forward, []

    def forward(self, *arguments):
        calls.append(1)
        return original(self, *arguments) * (float("nan") if len(calls) == 5 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(train.SoftTargetCrossEntropy, "forward", forward)
        line = refused(capsys, on(photographs, "--save-every", 2, "--output", output), 1)
    assert "the loss is nan at step 5; the last good state is" in line
    assert line.endswith("state-00000004.pt")
    assert [state.step_of(path) for path in state.states(output)] == [2, 4]
    assert all(value.isfinite().all() for value in state.newest(output)["average"].values())
    train.main(["--resume", str(output), "--lr", "1e-4"])
    assert state.newest(output)["step"] == 12


def test_scripts_import_without_running():
    scripts = sorted(path.stem for path in SOFT.glob("*.py"))
    assert "train" in scripts
    done = subprocess.run(
        [sys.executable, "-c", f"import {', '.join(scripts)}"], cwd=SOFT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_folder_of_photographs_trains_evaluates_exports_and_is_drawn(whole, tmp_path, capsys):
    weights = str(whole / "model.safetensors")
    _, metadata = checkpoint.load(whole / "model.safetensors")
    evaluate.main([weights, "--batch-size", "3"])
    assert capsys.readouterr().out.splitlines()[-1] == f"top1={metadata['test_accuracy']}"
    export.main([weights, str(tmp_path / "soft.onnx"), "--size", "32", "32"])
    assert (tmp_path / "soft.onnx").stat().st_size > 1e6
    photograph = next((Path(json.loads(metadata["data"])["spec"][1]) / "val").glob("*/*.jpg"))
    visualize.main([weights, str(photograph), "--output", str(tmp_path / "maps")])
    assert len(list((tmp_path / "maps").glob("*.png"))) == 2
