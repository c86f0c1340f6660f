"""Train SOFT: on handwritten digits in under a minute on two cores, or by the paper's recipe on a folder of images.

    python examples/soft/train.py
    torchrun --nproc-per-node 8 examples/soft/train.py --data imagefolder PATH --model soft_tiny

Either leaves the averaged weights (model.safetensors), a log and plots in a new folder under runs/, or the one named by
--output, and the last states of the run, from which --resume FOLDER goes on as if nothing had happened: bit by bit on
one process on the CPU. The defaults (recipe.py) are those of the data; optimiser, schedule, averaging and mixup are
timm's, the attention of the first stages is lowrank's. SIGTERM and Ctrl-C end the step, save the state and stop.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import checkpoint
import matplotlib
import model as soft
import state
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from data import STEP, Batch, CorruptImage, Data, open_data, seed_everything
from recipe import CLIP, FIXED, KEPT, WEIGHT_DECAY, parse_arguments, plan
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn, init_distributed_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from visualize import plot_attention

from lowrank.nn import SoftmaxFreeAttention

matplotlib.use("Agg")  # no window: plots go to files
import matplotlib.pyplot as plt


def build(options: argparse.Namespace, data: Data) -> tuple[soft.Soft, dict]:
    """The model, and the arguments of timm.create_model that make it again."""
    arguments = {"num_classes": len(data.classes), "in_chans": data.in_chans, "img_size": data.img_size}
    arguments |= {"attn": options.attn} if options.attn else {}
    seed_everything(options.seed)
    model = timm.create_model(options.model, drop_path_rate=options.recipe["drop_path"], **arguments)
    if options.initial:
        weights, metadata = checkpoint.load(options.initial)
        if (name := metadata.get("model", options.model)) != options.model:
            raise ValueError(f"{options.initial} holds the weights of {name}, not of {options.model}")
        ours = model.state_dict()
        if weights.keys() == ours.keys() and len(weights["head.bias"]) != len(data.classes):
            print(f"{options.initial} has {len(weights['head.bias'])} classes; the head is a new one", file=sys.stderr)
            weights |= {key: ours[key] for key in ("head.weight", "head.bias")}
        if other := [key for key, w in ours.items() if key not in weights or w.shape != weights[key].shape]:
            raise ValueError(f"{options.initial} does not fit {options.model} {arguments}: {other[0]} is not the same")
        model.load_state_dict(weights)
    return model, arguments


class Training:
    """A model with all that changes while it learns.

    A step is made of micro-batches, ``accumulate`` in each of ``world`` processes; the i-th of a step belongs to
    process i mod world. Its random numbers follow from seed, epoch and place: it does not matter who computes it.
    """

    def __init__(self, options: argparse.Namespace, data: Data, device: torch.device):
        self.options, self.data, self.device = options, data, device
        self.rank, self.world = options.rank, options.world_size
        self.steps_per_epoch = len(data.train) // (options.batch_size * options.micro_batches)
        self.model, self.arguments = build(options, data)
        self.model.to(device, memory_format=torch.channels_last if options.channels_last else torch.preserve_format)
        if options.grad_checkpointing:
            self.model.set_grad_checkpointing()
        # Running statistics are averaged when they are needed, not overwritten by those of the first process.
        spread = DistributedDataParallel(self.model, broadcast_buffers=False) if self.world > 1 else self.model
        self.learner = torch.compile(spread) if options.compile else spread
        self.unsynchronised = spread.no_sync if self.world > 1 else contextlib.nullcontext
        self.running = [x for name, x in self.model.named_buffers() if name.endswith(("running_mean", "running_var"))]
        self.optimizer = create_optimizer_v2(self.model, opt="adamw", lr=options.lr, weight_decay=WEIGHT_DECAY)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine",
            num_epochs=options.epochs,
            warmup_epochs=min(options.recipe["warmup_epochs"], options.epochs // 2),
            # Of a small --lr or batch, neither is to exceed the peak.
            warmup_lr=min(options.recipe["warmup_lr"], options.lr),
            min_lr=min(options.recipe["min_lr"], options.lr),
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
        )
        self.average = ModelEmaV3(self.model, **options.recipe["average"])
        self.mixup = Mixup(num_classes=len(data.classes), **options.recipe["mixup"])
        self.criterion = SoftTargetCrossEntropy()
        self.step, self.seconds, self.signal = 0, 0.0, 0
        self.sums: list[float] = [0.0, 0.0, 0.0]  # of the epoch: loss, right answers and images
        self.history: list[dict[str, float]] = []
        self.log: state.Log | None = None
        if options.state:
            self._restore(options.state)

    def content(self) -> dict:
        """What ``state.save`` writes: tensors and plain values. It is the same in all processes afterwards."""
        if self.world > 1:
            for model in (self.model, self.average.module):
                distribute_bn(model, self.world, reduce=True)
        options = {name: getattr(self.options, name) for name in FIXED + KEPT}
        run = {"options": options, "micro_batches": self.options.micro_batches}
        run |= {"classes": self.data.classes, "images": len(self.data.train)}
        changing = {"step": self.step, "seconds": self.seconds, "sums": self.sums, "history": self.history}
        parts = {"model": self.model, "average": self.average.module, "optimizer": self.optimizer}
        return {"run": run} | changing | {name: part.state_dict() for name, part in parts.items()}

    def stop(self, number: int) -> None:
        self.signal = number

    def means(self) -> tuple[float, float]:
        """Loss and accuracy on the augmented images of the epoch so far."""
        loss, right, images = self.sums
        return loss / max(images, 1), right / max(images, 1)

    def _restore(self, content: dict) -> None:
        for name, part in (("model", self.model), ("average", self.average.module), ("optimizer", self.optimizer)):
            part.load_state_dict(content[name])
        self.step, self.seconds, self.sums = content["step"], content["seconds"], list(content["sums"])
        self.history = list(content["history"])
        self.scheduler.step_update(self.step)

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """This process's micro-batches of an epoch, from step ``first`` of it on."""
        size = self.steps_per_epoch, self.options.accumulate, self.world, self.options.batch_size
        keys = self.data.order(self.options.seed, epoch)[: math.prod(size)].view(size)[first:, :, self.rank]
        return self.data.training(keys.flatten(0, 1), self.options.workers)

    def update(self, batches: Iterator[Batch], epoch: int) -> None:
        """One step. Raises FloatingPointError before any weight has changed, if the loss is not finite."""
        options, count = self.options, self.options.accumulate
        group = [next(batches) for _ in range(count)]  # all before any: a corrupt image is met between two steps
        self.optimizer.zero_grad()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, right answers, signals
        # Running statistics end as the mean over the micro-batches, each from the same start: as if in processes apart.
        before, after = [x.clone() for x in self.running], [torch.zeros_like(x) for x in self.running]
        for i, (images, labels) in enumerate(group):
            for statistics, start in zip(self.running, before, strict=True):
                statistics.copy_(start)
            place = (self.step % self.steps_per_epoch * count + i) * self.world + self.rank
            seed_everything(options.seed, STEP, epoch, place)
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            if options.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            mixed, targets = self.mixup(images, labels)
            with contextlib.nullcontext() if i == count - 1 else self.unsynchronised():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=options.amp):
                    logits = self.learner(mixed)  # (B, classes)
                loss = self.criterion(logits.to(targets.dtype), targets)
                (loss / count).backward()
            for statistics, total in zip(self.running, after, strict=True):
                total += statistics / count
            sums[0] += loss.detach()
            sums[1] += (logits.argmax(1) == targets.argmax(1)).sum()
        sums[2] = float(self.signal > 0)
        if self.world > 1:
            dist.all_reduce(sums)
        loss, right, signals = sums.tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.step + 1}")
        for statistics, total in zip(self.running, after, strict=True):
            statistics.copy_(total)
        self.signal = self.signal or (signal.SIGTERM if signals else 0)
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.step += 1
        self.scheduler.step_update(self.step)
        self.average.update(self.model, step=self.step)
        images = options.batch_size * options.micro_batches
        self.sums = [a + b for a, b in zip(self.sums, (loss * options.batch_size, right, images), strict=True)]

    @torch.no_grad()
    def evaluate(self) -> tuple[float, Tensor]:
        """Cross-entropy of the averaged weights on the test images, and the table (true class, predicted class)."""
        n = len(self.data.classes)
        table = torch.zeros(n, n, dtype=torch.int64, device=self.device)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in self.data.evaluation(
            self.options.batch_size, self.options.workers, rank=self.rank, world=self.world
        ):
            images, labels = (x.to(self.device, non_blocking=True) for x in batch)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp):
                logits = self.average.module(images).float()  # (B, classes)
            total += F.cross_entropy(logits, labels, reduction="sum")
            table += torch.bincount(labels * n + logits.argmax(1), minlength=n * n).view(n, n)
        if self.world > 1:
            dist.all_reduce(total)
            dist.all_reduce(table)
        if not table.any():
            raise CorruptImage("no test image can be read")
        return (total / table.sum()).item(), table.cpu()


def run(training: Training) -> Tensor | None:
    """Train to the end, or to a signal: then None. Returns the last table of ``evaluate``."""
    options, per_epoch, table = training.options, training.steps_per_epoch, None
    images = options.batch_size * options.micro_batches
    started = time.perf_counter() - training.seconds
    bar = tqdm(
        total=options.epochs * per_epoch * images,
        initial=training.step * images,
        unit="img",
        disable=training.rank > 0,
    )
    with bar:
        # The state at the end of an epoch is saved before it is evaluated: with that a resumed run begins.
        for epoch in range(max(training.step - 1, 0) // per_epoch, options.epochs):
            bar.set_description(f"epoch {epoch + 1}/{options.epochs}")
            first = training.step - epoch * per_epoch
            if first == 0:
                training.sums = [0.0, 0.0, 0.0]
            batches = training.batches(epoch, first)
            for done in range(first + 1, per_epoch + 1):
                training.update(batches, epoch)
                training.seconds = time.perf_counter() - started
                loss, accuracy = training.means()
                shown = {"loss": f"{loss:.3f}", "accuracy": f"{accuracy:.3f}", "GB": f"{peak_memory(training):.2f}"}
                bar.set_postfix(shown, refresh=False)
                bar.update(images)
                if done == per_epoch or training.signal or training.step % (options.save_every or per_epoch) == 0:
                    content = training.content()
                    if training.rank == 0:
                        state.save(options.output, content, keep=options.keep)
                if training.signal:
                    return None
            loss, table = training.evaluate()
            training.seconds = time.perf_counter() - started
            if training.rank == 0:
                record(training, epoch + 1, loss, table)
    return table


def record(training: Training, epoch: int, test_loss: float, table: Tensor) -> None:
    """Add the epoch to the log, and write the averaged weights."""
    options, data = training.options, training.data
    train_loss, train_accuracy = training.means()
    accuracy = (table.trace() / table.sum()).item()
    row = {"epoch": epoch, "step": training.step, "learning_rate": training.optimizer.param_groups[0]["lr"]}
    row |= {"train_loss": train_loss, "train_accuracy": train_accuracy}
    training.history.append(row | {"test_loss": test_loss, "test_accuracy": accuracy, "seconds": training.seconds})
    training.log.write(training.history)
    metadata = {
        "model": options.model,
        "arguments": json.dumps(training.arguments),
        "data": json.dumps({"spec": options.data, "seed": options.seed} | data.statistics),
        "classes": json.dumps(data.classes),
        "epoch": str(epoch),
        "test_accuracy": f"{accuracy:.4f}",
    }
    checkpoint.save(options.output / "model.safetensors", training.average.module.state_dict(), metadata=metadata)


def report(training: Training, table: Tensor) -> None:
    folder, data = training.options.output, training.data
    plot_learning(training.history, folder / "learning.png")
    if data.name == "digits":
        if isinstance(training.model.stages[0].blocks[0].attn, SoftmaxFreeAttention):
            images, _ = next(data.evaluation(6))
            plot_attention(training.average.module, images.to(training.device), folder / "attention.png")
        print("confusion table, rows are true digits, columns are predictions:")
        print(table.numpy())
    print(f"checkpoint, log and plots are in {folder}")
    print(f"test_accuracy={training.history[-1]['test_accuracy']:.4f}")


def peak_memory(training: Training) -> float:
    """Gigabytes, of this process."""
    if training.device.type == "cuda":
        return torch.cuda.max_memory_allocated(training.device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def plot_learning(history: list[dict[str, float]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for name, label in (("train", "training (augmented, mixed)"), ("test", "test (averaged weights)")):
        left.plot(epochs, [row[f"{name}_loss"] for row in history], label=label)
        right.plot(epochs, [100 * (1 - row[f"{name}_accuracy"]) for row in history], label=label)
    left.set(xlabel="epoch", ylabel="cross entropy")
    right.set(xlabel="epoch", ylabel="errors, %", yscale="symlog", ylim=(0, 100))
    left.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def check_unused(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output {folder} exists and is not an empty folder; name another, nothing is overwritten")


def prepare(arguments: list[str] | None) -> Training:
    """All that can fail for what was asked, before anything is written. Raises ValueError or OSError."""
    options = parse_arguments(__doc__.splitlines()[0], arguments)
    if options.data[0] == "digits":
        # Layers this small gain nothing from a second thread (901 and 903 images/s on an idle machine), and on a busy
        # one threads that wait for each other cost a multiple.
        torch.set_num_threads(1)
    data = open_data(options.data, img_size=options.img_size, seed=options.seed, corrupt=options.corrupt)
    if options.state:
        was = options.state["run"]
        if data.classes != was["classes"] or len(data.train) != was["images"]:
            raise ValueError(
                f"--data {' '.join(options.data)} has {len(data.train)} training images of {len(data.classes)} "
                f"classes; the run in {options.resume} has {was['images']} of {len(was['classes'])}, or of others"
            )
    if len(data.train) < (step := options.batch_size * options.micro_batches):
        raise ValueError(f"a step takes {step} images, and there are {len(data.train)}; lower --batch-size")
    device = init_distributed_device(options)  # which sets rank and world_size
    if options.rank == 0 and not options.resume:
        check_unused(options.output)
    training = Training(options, data, device)
    if options.rank == 0 and not options.dry_run:
        options.output.mkdir(parents=True, exist_ok=True)
        training.log = state.Log(options.output, training.history)
    return training


def main(arguments: list[str] | None = None) -> None:
    try:
        training = prepare(arguments)
    except (OSError, ValueError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    options = training.options
    if options.dry_run:
        print(plan(training))
        return
    try:
        with state.signals(training.stop):
            table = run(training)
    except (CorruptImage, FloatingPointError) as error:
        corrupt = isinstance(error, CorruptImage)
        if corrupt or training.rank == 0:  # one process alone meets the image, all the loss
            saved = state.states(options.output)
            last = f"the last good state is {saved[-1]}" if saved else "no state was saved yet"
            print(f"train.py: error: {error}; {last}", file=sys.stderr)
        raise SystemExit(2 if corrupt else 1) from None
    if training.world > 1:
        dist.destroy_process_group()
    if table is None and training.rank == 0:
        print(f"stopped at step {training.step}; resume with --resume {options.output}", file=sys.stderr)
    if table is None:
        raise SystemExit(128 + training.signal)
    if training.rank == 0:
        report(training, table)


if __name__ == "__main__":
    main()
