"""A plain training loop, shared by the comparisons: AdamW, warm-up and cosine, clipped gradients, in single precision.

The loss is an argument, and accuracy is counted over whatever axes the labels have, so that the loop serves images with
one label and images with a label a pixel alike. ``train.py`` is the one to start from for anything longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W) and labels (B, ...)


def shuffled(images: Tensor, labels: Tensor, *, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches without end, in a new order every time round; an incomplete batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(labels), generator=generator).split(batch_size):
            if len(rows) == min(batch_size, len(labels)):
                yield images[rows], labels[rows]


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    clip: float = 1.0,
) -> float:
    """Train for ``steps`` batches, a fraction ``warmup`` of them with a rising rate; returns images per second."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=weight_decay)
    rising = round(warmup * steps)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=steps - rising,
        lr_min=lr / 100,
        warmup_t=rising,
        warmup_lr_init=lr / 100,
        warmup_prefix=True,  # the cosine begins where the warm-up ends
        t_in_epochs=False,
    )
    model.train()
    images_seen, started = 0, time.perf_counter()
    for step, (images, labels) in zip(range(steps), batches, strict=False):
        schedule.step_update(step)
        value = loss(model(images), labels)
        if not torch.isfinite(value):
            raise FloatingPointError(f"the loss is {value.item()} at step {step}; lower the learning rate")
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        images_seen += len(images)
    return images_seen / (time.perf_counter() - started)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """The fraction of labels that the largest logit names."""
    model.eval()
    right, total = 0, 0
    for images, labels in batches:
        right += (model(images).argmax(1) == labels).sum().item()
        total += labels.numel()
    return right / total
