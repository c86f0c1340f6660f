"""Two small marks far apart in a large image, whose answer needs both: linear against quadratic attention.

    python examples/soft/long_images.py --output runs/long

An image of 512 or 1,024 pixels a side has 16,384 or 65,536 tokens in the first stage of soft_digits. On noise lie two
bars of 16 pixels, at any places at least half a side apart, each in one of four directions. The label is the pair of
directions, in no order: ten classes. Who sees one bar alone is right one time in four; who sees none, one in eight.

First it is measured what one step costs, forward and backward on one image: time, by medians of interleaved calls, and
peak memory, of fresh processes. Then every attention follows one curriculum from 64 pixels up to 512, the position
embeddings interpolated, if its steps, by the time that one of each size takes, fit into --budget seconds; it is tested
at 512. Of those that do not fit the expected time is told. A Markdown table goes to stdout, all else to stderr.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import matplotlib
import timm
import torch
from cluttered import paste
from compare_attention import benchmark, save, step
from fit import Batch, accuracy, fit
from torch import Tensor, nn
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARK, DIRECTIONS, CONTRAST = 16, 4, 3.0  # pixels; deviations of the noise
COMPARED = ("soft", "softmax", "gaussian")
# Pixels, images a step, steps. Almost all is learned where images are small; what is new later is only where to look.
CURRICULUM = [(64, 16, 1500), (128, 16, 300), (256, 8, 150), (512, 4, 100)]
QUICK = [(64, 16, 12), (128, 4, 4)]
LR = 5e-4


# The task.


def marks(device: str = "cpu") -> Tensor:
    """Bars in all directions, (DIRECTIONS, 1, MARK, MARK)."""
    x = torch.arange(MARK, device=device) - (MARK - 1) / 2
    angle = torch.arange(DIRECTIONS, device=device)[:, None, None] * math.pi / DIRECTIONS
    across = x[:, None] * torch.cos(angle) - x * torch.sin(angle)  # (DIRECTIONS, MARK, MARK)
    inside = x[:, None] ** 2 + x**2 < (MARK / 2) ** 2
    return ((across.abs() < 2) & inside).float().unsqueeze(1)


def scenes(count: int, size: int, generator: torch.Generator) -> Batch:
    """Images (count, 1, size, size), and which pair of directions is in each."""
    turns = torch.randint(DIRECTIONS, (2, count), generator=generator)
    # Of 64 pairs of places the first that are far enough apart, as every other is.
    places = torch.rand(count, 64, 2, 2, generator=generator)
    apart = (places[:, :, 0] - places[:, :, 1]).norm(dim=-1) > 0.5  # (count, 64)
    places = places[torch.arange(count), apart.long().argmax(1)]  # (count, 2, 2)
    images = torch.zeros(count, 1, size, size)
    for turn, (top, left) in zip(turns, places.permute(1, 2, 0), strict=True):
        paste(images, marks()[turn], torch.arange(count), top, left)
    low, high = turns.amin(0), turns.amax(0)
    return CONTRAST * images + torch.randn(images.shape, generator=generator), high * (high + 1) // 2 + low


def stream(count: int, size: int, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield scenes(count, size, generator)


# The measurement.


def build(attn: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("soft_digits", attn=attn, img_size=128)


def memory(attn: str, size: int) -> int:
    model = build(attn)
    step(model, torch.zeros(1, 1, 64, 64), True)
    return benchmark.peak(partial(step, model, torch.zeros(1, 1, size, size), True), "cpu")


def costs(size: int, quick: bool) -> list[dict]:
    """What forward and backward take on one image."""
    images, _ = next(stream(1, size, seed=0))
    calls = {attn: partial(step, build(attn), images, True) for attn in COMPARED}
    used = {attn: partial(memory, attn, size) for attn in COMPARED}
    figures = benchmark.timed(calls, used, "cpu", *((1, 0.1) if quick else (9, 30.0)))
    return [{"attn": attn, "size": size, "tokens": (size // 4) ** 2} | found for attn, found in figures.items()]


def seconds_a_step(attn: str, size: int, batch: int) -> float:
    """The shorter of two, as the first also takes what is only needed once."""
    model, (images, _) = build(attn), next(stream(batch, size, seed=0))
    taken = []
    for _ in range(2):
        started = time.perf_counter()
        step(model, images, True)
        taken.append(time.perf_counter() - started)
    return min(taken)


def learn(attn: str, curriculum: list[tuple[int, int, int]], budget: float, tests: int) -> dict:
    """Train and test within the budget, or tell what it would take."""
    each = [seconds_a_step(attn, size, batch) for size, batch, _ in curriculum]
    expected = sum(seconds * steps for seconds, (_, _, steps) in zip(each, curriculum, strict=True))
    size, batch, _ = curriculum[-1]
    row = {"attn": attn, "trained at": size, "seconds a step": each[-1], "expected seconds": expected}
    if expected > budget:
        return row | {"seconds": None, "accuracy": None}
    model, started = build(attn), time.perf_counter()
    for side, count, steps in curriculum:
        speed = fit(model, stream(count, side, seed=side), steps=steps, lr=LR)
        print(f"{attn}: {steps} steps at {side} pixels, {speed:.3g} images/s", file=sys.stderr)
    row["seconds"] = time.perf_counter() - started
    test = stream(batch, size, seed=0)
    return row | {"accuracy": accuracy(model, (next(test) for _ in range(tests // batch)))}


# What is made of it.


def outcome(row: dict) -> str:
    if row["accuracy"] is None:
        return f"over budget: {row['seconds a step']:.2g} s a step expected, {row['expected seconds']:.0f} s in all"
    return f"{100 * row['accuracy']:.1f} % after {row['seconds']:.0f} s"


def table(spent: list[dict], learnt: list[dict]) -> str:
    sizes = list(dict.fromkeys(row["size"] for row in spent))
    titles = ["attention"] + [f"{size} px: {what}" for size in sizes for what in ("s a step", "peak MB")]
    lines = [[*titles, f"accuracy at {learnt[0]['trained at']} px"], ["---", *["---:"] * len(titles)]]
    for row in learnt:
        mine = {cost["size"]: cost for cost in spent if cost["attn"] == row["attn"]}
        cells = [cell for s in sizes for cell in (f"{mine[s]['median']:.3g}", f"{mine[s]['memory'] / 1e6:.0f}")]
        lines.append([row["attn"], *cells, outcome(row)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plot(spent: list[dict], size: int, path: Path, title: str) -> None:
    figure, (left, *axes) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    left.imshow(next(stream(1, size, seed=0))[0][0, 0].numpy(), cmap="gray")
    left.set(title="which two directions?")
    for axis, key, unit in zip(axes, ("median", "memory"), (1, 1e-6), strict=True):
        for attn in COMPARED:
            mine = [row for row in spent if row["attn"] == attn]
            axis.loglog([row["tokens"] for row in mine], [row[key] * unit for row in mine], "o-", label=attn)
        axis.set(xlabel="tokens in stage 1", title="one image, forward and backward")
        axis.set_ylabel("seconds" if key == "median" else "peak MB")
    axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small: 64 and 128 pixels, sixteen steps")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for long_images.json, .md and .png")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds of training each (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not options.budget > 0:
        parser.error(f"--budget must be positive, not {options.budget}")
    if options.output is not None:
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--output: {error}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    about = benchmark.setting("long_images", "cpu", arguments)
    about["command"] = about["command"].replace("benchmarks", "soft", 1)
    print(", ".join(f"{key} {value}" for key, value in about.items()), file=sys.stderr)
    curriculum, sizes, tests = (QUICK, (64, 128), 16) if options.quick else (CURRICULUM, (512, 1024), 400)
    spent = [row for size in tqdm(sizes, desc="costs", unit="size") for row in costs(size, options.quick)]
    learnt = [learn(attn, curriculum, options.budget, tests) for attn in COMPARED]
    print(text := table(spent, learnt))
    if options.output is not None:
        results = about | {"budget": options.budget, "curriculum": curriculum, "rows": learnt, "costs": spent}
        save(options.output / "long_images.json", results)
        (options.output / "long_images.md").write_text(f"{text}\n")
        plot(spent, sizes[0], options.output / "long_images.png", f"soft_digits, {about['machine']}")


if __name__ == "__main__":
    main()
