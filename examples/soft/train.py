"""Train a softmax-free vision transformer on handwritten digits, from nothing, in under a minute on two cores.

    python examples/soft/train.py

ends with the test accuracy, and leaves a checkpoint, a log and two plots in a new folder under runs/. The
attention of the first three stages is lowrank.softmax_free_attention; optimiser, schedule, averaging of the
weights and mixup are timm's.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import checkpoint
import matplotlib
import model as soft
import numpy as np
import timm
import torch
import torch.nn.functional as F
from data import CLASSES, Split, digits, jittered
from sklearn.metrics import confusion_matrix
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

matplotlib.use("Agg")  # no window: plots go to files
import matplotlib.pyplot as plt


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="soft_digits", help="a model registered by model.py (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=16, help="passes over the training set (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and augmentation (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder to write, new or empty (default: a new one under runs/)")
    options = parser.parse_args(arguments)
    for name in ("epochs", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}")
    if not options.lr > 0:
        parser.error(f"--lr must be positive, not {options.lr}")
    if options.model not in soft.CONFIGS or soft.CONFIGS[options.model].get("in_chans") != 1:
        parser.error(f"--model {options.model} does not take single-channel images; use soft_digits")
    if options.output is None:
        options.output = Path("runs") / f"{options.model}-seed{options.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        parser.error(
            f"--output {options.output} exists and is not an empty folder; name another, nothing is overwritten"
        )
    return options


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (timm's mixup draws from NumPy's global generator)
    torch.manual_seed(seed)


def batches(split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The split once in random order, augmented; the last batch is dropped if it is odd, which mixup cannot pair."""
    for rows in torch.randperm(len(split)).split(size):
        if len(rows) % 2 == 0:
            yield jittered(split.images[rows]), split.labels[rows]


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (n, classes), in batches that fit any machine."""
    model.eval()
    return torch.cat([model(chunk) for chunk in images.split(256)])


class Training:
    """A model with all that changes while it learns."""

    def __init__(self, options: argparse.Namespace, steps_per_epoch: int):
        self.model = timm.create_model(options.model, drop_path_rate=0.05)
        self.optimizer = create_optimizer_v2(self.model, opt="adamw", lr=options.lr, weight_decay=0.05)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine",
            num_epochs=options.epochs,
            warmup_epochs=min(2, options.epochs - 1),
            warmup_lr=options.lr / 100,
            min_lr=options.lr / 100,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
        self.average = ModelEmaV3(self.model, decay=0.99, use_warmup=True)
        self.mixup = Mixup(mixup_alpha=0.2, prob=0.5, label_smoothing=0.1, num_classes=CLASSES)
        self.criterion = SoftTargetCrossEntropy()
        self.steps = 0

    def epoch(self, split: Split, batch_size: int, bar: tqdm) -> tuple[float, float]:
        """One pass; returns the mean loss and the accuracy on the augmented images."""
        self.model.train()
        losses, accuracies = AverageMeter(), AverageMeter()
        for images, labels in batches(split, batch_size):
            mixed, targets = self.mixup(images, labels)
            logits = self.model(mixed)
            loss = self.criterion(logits, targets)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} at step {self.steps}; lower --lr")
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.steps += 1
            self.scheduler.step_update(self.steps)
            self.average.update(self.model, step=self.steps)
            losses.update(loss.item(), len(labels))
            accuracies.update((logits.argmax(1) == targets.argmax(1)).float().mean().item(), len(labels))
            bar.update(len(labels))
            bar.set_postfix(loss=f"{losses.avg:.3f}", accuracy=f"{accuracies.avg:.3f}")
        return losses.avg, accuracies.avg


def train(options: argparse.Namespace) -> float:
    """Train, report, write everything; returns the test accuracy of the averaged weights."""
    seed_everything(options.seed)
    train_split, test_split, statistics = digits(options.seed)
    sizes = [len(rows) for rows in torch.arange(len(train_split)).split(options.batch_size)]
    steps_per_epoch = sum(size % 2 == 0 for size in sizes)
    if steps_per_epoch == 0:
        raise SystemExit(f"--batch-size {options.batch_size} leaves no batch of even size, which mixup needs")
    training = Training(options, steps_per_epoch)
    averaged = training.average.module
    options.output.mkdir(parents=True, exist_ok=True)
    metadata = {"model": options.model, "seed": str(options.seed), "data": json.dumps({"name": "digits"} | statistics)}

    history = []
    started = time.perf_counter()
    total = options.epochs * sum(size for size in sizes if size % 2 == 0)
    with open(options.output / "log.csv", "w", newline="") as file, tqdm(total=total, unit="img") as bar:
        fields = ["epoch", "learning_rate", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds"]
        log = csv.DictWriter(file, fields)
        log.writeheader()
        for epoch in range(1, options.epochs + 1):
            bar.set_description(f"epoch {epoch}/{options.epochs}")
            learning_rate = training.optimizer.param_groups[0]["lr"]
            train_loss, train_accuracy = training.epoch(train_split, options.batch_size, bar)
            logits = predict(averaged, test_split.images)
            test_loss = F.cross_entropy(logits, test_split.labels).item()
            test_accuracy = (logits.argmax(1) == test_split.labels).double().mean().item()
            seconds = time.perf_counter() - started
            values = (epoch, learning_rate, train_loss, train_accuracy, test_loss, test_accuracy, seconds)
            history.append(dict(zip(fields, values, strict=True)))
            log.writerow({key: f"{value:.6g}" for key, value in history[-1].items()})
            file.flush()
            metadata |= {"epoch": str(epoch), "test_accuracy": f"{test_accuracy:.4f}"}
            checkpoint.save(options.output / "model.safetensors", averaged.state_dict(), metadata=metadata)

    plot_learning(history, options.output / "learning.png")
    plot_attention(averaged, test_split.images[:6], options.output / "attention.png")
    print("confusion table, rows are true digits, columns are predictions:")
    print(confusion_matrix(test_split.labels, logits.argmax(1), labels=range(CLASSES)))
    return test_accuracy


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


@torch.no_grad()
def plot_attention(model: soft.Soft, images: Tensor, path: Path, *, columns: int = 5) -> None:
    """Some digits, and over each the kernel between all its tokens and a few landmarks of the first stage."""
    inputs = []
    attention = model.stages[0].blocks[0].attn
    hook = attention.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments))
    predict(model, images)
    hook.remove()
    (x, size), *_ = inputs
    weights = attention.landmark_attention(x, size).mean(1)  # (B, N, m), mean over the heads
    chosen = [round(i * (weights.shape[-1] - 1) / (columns - 1)) for i in range(columns)]
    figure, axes = plt.subplots(
        len(images), columns + 1, figsize=(1.3 * (columns + 1), 1.3 * len(images)), layout="constrained"
    )
    extent = (0, images.shape[-1], images.shape[-2], 0)
    for row, image, weight in zip(axes, images[:, 0].numpy(), weights.numpy(), strict=True):
        row[0].imshow(image, cmap="gray", extent=extent)
        for panel, landmark in zip(row[1:], chosen, strict=True):
            panel.imshow(image, cmap="gray", extent=extent)
            panel.imshow(weight[:, landmark].reshape(size), cmap="magma", alpha=0.65, extent=extent)
    for landmark, panel in zip(chosen, axes[0, 1:], strict=True):
        panel.set_title(f"landmark {landmark}", fontsize=8)
    for panel in axes.flat:
        panel.set_axis_off()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    try:
        accuracy = train(options)
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; the last complete epoch is in {options.output}") from None
    print(f"checkpoint, log and plots are in {options.output}")
    print(f"test_accuracy={accuracy:.4f}")


if __name__ == "__main__":
    # Layers this small gain nothing from a second thread (901 and 903 images/s on an idle machine), and on a busy
    # one threads that wait for each other cost a multiple.
    torch.set_num_threads(1)
    main()
