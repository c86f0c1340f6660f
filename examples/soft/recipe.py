"""The options of train.py, what they are unless given, and what they come to (--dry-run).

There is a small recipe for digits, and the paper's for everything else: Lu et al., "SOFT" (NeurIPS 2021), on
ImageNet-1K, with AdamW, a learning rate by size, 300 epochs, mixup, cutmix, label smoothing, drop path and an average
of the weights. Its RandAugment and random erasing stand in data.py.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import model as soft
import state
import torch
from attentions import ATTENTIONS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    import train

DIGITS = {
    "model": "soft_digits",
    "epochs": 16,
    "batch_size": 64,
    "lr": 2e-3,
    "warmup_epochs": 2,
    "warmup_lr": 2e-5,
    "min_lr": 2e-5,
    "drop_path": 0.05,
    "average": {"decay": 0.99, "use_warmup": True},
    "mixup": {"mixup_alpha": 0.2, "prob": 0.5, "label_smoothing": 0.1},
}
PAPER = {
    "model": "soft_tiny",
    "epochs": 300,
    "warmup_epochs": 10,
    "warmup_lr": 1e-6,
    "min_lr": 5e-5,
    "drop_path": 0.1,
    # The decay rises to 0.99996 within 77,000 steps, the first fifth of ImageNet's. With all of it from the start the
    # average would still be the initial weights after a run of a few thousand steps.
    "average": {"decay": 0.99996, "use_warmup": True, "warmup_power": 0.9},
    "mixup": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1},
}
WEIGHT_DECAY, CLIP = 0.05, 1.0
# The paper's, for 1,024 images a step. A model that is not here has that of the small sizes.
RATES = {"medium": 3.5e-4, "norm_medium": 4e-4, "large": 3.3e-4, "huge": 2.7e-4}

# What makes a run this run; and what it need not be told again when it is resumed, but may be.
FIXED = ("model", "attn", "epochs", "batch_size", "img_size", "seed")
KEPT = (
    "data",
    "lr",
    "amp",
    "channels_last",
    "compile",
    "grad_checkpointing",
    "workers",
    "save_every",
    "keep",
    "corrupt",
)


def recipe(data: str, model: str | None, *, batch_size: int | None, micro_batches: int) -> dict[str, Any]:
    """The recipe for steps of so many micro-batches, of ``batch_size`` images if given."""
    if data == "digits":
        return DIGITS
    variant = (model or PAPER["model"]).removeprefix("soft_")
    size = variant.removeprefix("norm_")
    batch_size = batch_size or (32 if size in RATES else 128)
    rate = RATES.get(variant, RATES.get(size, 1e-3))
    return PAPER | {"batch_size": batch_size, "lr": rate * batch_size * micro_batches / 1024}


def argument_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--data", nargs="+", default=["digits"], help="digits, imagefolder PATH, hfds/NAME or torch/NAME FOLDER")
    add("--model", help="soft_tiny, …; see model.py (soft_digits for digits, else soft_tiny)")
    add("--attn", choices=ATTENTIONS, help="attention of the first three stages (the model's own)")
    add("--epochs", type=int, help="passes over the training images (16 for digits, else 300)")
    add(
        "--batch-size",
        type=int,
        help="images a process takes at a time, even (64 for digits, 128, 32 from medium)",
    )
    add("--lr", type=float, help="peak learning rate (2e-3 for digits, else the paper's, grown with the step's images)")
    add("--img-size", type=int, help="pixels a side (32 for digits, else 224)")
    add("--seed", type=int, default=0, help="of weights, order, augmentation and the digits' split (%(default)s)")
    add("--accumulate", type=int, help="batches in each process whose gradients make a step (1)")
    add("--amp", action="store_true", help="bfloat16 where autocast sees fit")
    add("--channels-last", action="store_true", help="memory format of weights and images")
    add("--compile", action="store_true", help="torch.compile")
    add("--grad-checkpointing", action="store_true", help="less memory, more time")
    add("--workers", type=int, default=0, help="processes that load images (%(default)s)")
    add("--save-every", type=int, help="steps from one saved state to the next; there is one after every epoch anyway")
    add("--keep", type=int, default=3, help="saved states to keep (%(default)s)")
    add("--corrupt", choices=("fatal", "skip"), default="fatal", help="what an unreadable image is (%(default)s)")
    add("--initial", type=Path, help="weights to start from, a safetensors file; a head of other classes is new")
    add("--resume", type=Path, metavar="FOLDER", help="go on with the run in this folder")
    add("--output", type=Path, help="folder to write, new or empty (a new one under runs/)")
    add("--device", choices=("cpu", "cuda"), help="(cuda where there is one)")
    add("--dry-run", action="store_true", help="say what would be done and what it costs, and write nothing")
    return parser


def parse_arguments(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """Options, with what was not given from the run to resume or from the recipe. Raises ValueError or OSError.

    Added are ``recipe``, ``micro_batches`` (of all processes, that make a step) and ``state``, the one to resume.
    """
    parser = argument_parser(description)
    options = parser.parse_args(arguments)
    world, content = int(os.environ.get("WORLD_SIZE", 1)), None
    if options.resume:
        if options.output or options.initial:
            raise ValueError("--resume goes on in its folder with its weights; leave out --output and --initial")
        content = state.newest(options.resume)
        parser.set_defaults(**content["run"]["options"])
        options = parser.parse_args(arguments)
        options.output = options.resume
        options.accumulate = options.accumulate or max(1, content["run"]["micro_batches"] // world)
    options.state = content
    options.accumulate = 1 if options.accumulate is None else options.accumulate
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check(options)
    options.micro_batches = options.accumulate * world
    options.recipe = recipe(
        options.data[0], options.model, batch_size=options.batch_size, micro_batches=options.micro_batches
    )
    for name in ("model", "epochs", "batch_size", "lr"):
        if getattr(options, name) is None:
            setattr(options, name, options.recipe[name])
    if content:
        _check_same(options, content["run"])
    if options.output is None:
        options.output = Path("runs") / f"{options.model}-seed{options.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    return options


def _check(options: argparse.Namespace) -> None:
    least = {"epochs": 1, "batch_size": 1, "img_size": 32, "seed": 0, "accumulate": 1}
    for name, bound in (least | {"workers": 0, "save_every": 1, "keep": 1}).items():
        if (value := getattr(options, name)) is not None and value < bound:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {bound}, not {value}")
    if options.seed >= 2**32:
        raise ValueError(f"--seed must be less than 2**32, not {options.seed}")
    if options.batch_size is not None and options.batch_size % 2:
        raise ValueError(f"--batch-size must be even, for mixup pairs images, not {options.batch_size}")
    if options.lr is not None and not 0 < options.lr < math.inf:
        raise ValueError(f"--lr must be positive and finite, not {options.lr}")
    if options.model is not None and options.model not in soft.CONFIGS:
        raise ValueError(f"there is no model {options.model!r}; the names are {', '.join(soft.CONFIGS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device here")


def _check_same(options: argparse.Namespace, run: dict[str, Any]) -> None:
    """That the run goes on as what it was."""
    for name in FIXED:
        if (value := getattr(options, name)) != (was := run["options"][name]):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"the run in {options.resume} has {flag} {was}, which cannot become {value} on the way")
    if options.micro_batches != run["micro_batches"]:
        raise ValueError(
            f"a step of the run in {options.resume} is made of {run['micro_batches']} batches; processes times "
            f"--accumulate must be so many, not {options.micro_batches}"
        )


def activations(training: train.Training) -> float:
    """Bytes that an image leaves for the backward pass: of all storages that autograd, or a block, holds on to."""
    held: dict[int, Tensor] = {}

    def hold(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x
        return x

    def hold_input(_: nn.Module, inputs: tuple) -> None:
        hold(inputs[0])

    for block in (block for stage in training.model.stages for block in stage.blocks):
        block.register_forward_pre_hook(hold_input)
    images = torch.zeros(2, training.data.in_chans, *2 * (training.data.img_size,), device=training.device)
    hooks = torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x)
    with hooks, torch.autocast(training.device.type, torch.bfloat16, enabled=training.options.amp):
        training.model(images)
    for weight in training.model.parameters():
        held.pop(weight.untyped_storage().data_ptr(), None)
    return sum(x.untyped_storage().nbytes() for x in held.values()) / len(images)


def plan(training: train.Training) -> str:
    """What would be done, and what it costs."""
    options, data = training.options, training.data
    image = torch.zeros(1, data.in_chans, data.img_size, data.img_size, device=training.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        training.average.module(image)
    weights = sum(p.numel() for p in training.model.parameters())
    memory, schedule = activations(training) * options.batch_size, training.scheduler
    return (
        f"model       {options.model} {training.arguments}: {weights / 1e6:.2f} M parameters\n"
        f"cost        {counter.get_total_flops() / 2e9:.3g} GMACs forward, an image\n"
        f"memory      {memory / 1e9:.2f} GB of activations for {options.batch_size} images (estimated), and "
        f"{20 * weights / 1e9:.2f} GB of weights, gradients, two moments and the average, in each process\n"
        f"data        {' '.join(options.data)}: {len(data.train)} training and {len(data.test)} test images of "
        f"{len(data.classes)} classes\n"
        f"steps       {options.epochs} epochs of {training.steps_per_epoch} steps of {options.batch_size} × "
        f"{options.micro_batches} images\n"
        f"schedule    learning rate {options.lr:.3g} after {schedule.warmup_t} steps from "
        f"{schedule.warmup_lr_init:.3g}, then along a cosine to {schedule.lr_min:.3g}\n"
        f"recipe      {options.recipe}"
    )
