"""Seven attentions in one architecture: accuracy over several seeds, and what they cost.

    python examples/soft/compare_attention.py --output runs/compare

The central comparison of the SOFT papers, at a size that two cores can train: softmax-free attention, its normalised
variant and the Gaussian attention that it approximates, softmax, Nyströmformer, Linformer and Performer as the mixer
of stages 1 to 3, and all else equal: split, seed of the weights, order of images, steps, optimiser and rates. Tasks are
(a) the handwritten digits, by soft_digits, and (b) cluttered digits (cluttered.py), by soft_cluttered, which has 1,024
tokens in stage 1. Runs go two at a time, of one thread each; --output FOLDER holds what is finished at any moment, and
the same command goes on from there.

Costs are soft_cluttered's, built for each image size, measured when the training is over: images per second, of medians
of interleaved calls in one process that has all threads; peak memory of a call, weights and gradients being there, of a
fresh process; GMACs by torch's count of the forward pass of one image. Training is forward and backward in training
mode, inference forward in evaluation mode without gradients. A Markdown table goes to stdout, all else to stderr.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import product
from pathlib import Path

import cluttered
import data
import matplotlib
import model as soft
import numpy as np
import timm
import torch
import torch.nn.functional as F
from attentions import ATTENTIONS
from fit import accuracy, fit, shuffled
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import attention as benchmark

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SPLITS = {"digits": data.digits, "cluttered": cluttered.cluttered}
# One recipe for all attentions; how the rates were chosen is told where the results are.
RECIPES = {
    "digits": {"model": "soft_digits", "images": 8 * 1437, "batch_size": 64, "lr": 1e-3, "tests": 360},
    "cluttered": {"model": "soft_cluttered", "images": 2 * 8000, "batch_size": 16, "lr": 5e-4, "tests": 2000},
}
QUICK = {name: recipe | {"images": 128, "tests": 100} for name, recipe in RECIPES.items()}
PIXELS, QUICK_PIXELS = (64, 128, 224), (32, 64)
PASSES = ("training", "inference")


# Accuracy.


def run(task: str, attn: str, seed: int, recipe: dict) -> dict:
    """Train and test one model; a row of results."""
    train, test, _ = SPLITS[task](seed)
    torch.manual_seed(seed)
    model = timm.create_model(recipe["model"], attn=attn)
    batches = shuffled(train.images, train.labels, batch_size=recipe["batch_size"], seed=seed)
    if task == "digits":
        batches = ((data.jittered(images), labels) for images, labels in batches)
    steps = recipe["images"] // recipe["batch_size"]
    speed = fit(model, batches, steps=steps, lr=recipe["lr"])
    tests = (part[: recipe["tests"]].split(100) for part in (test.images, test.labels))
    tested = accuracy(model, zip(*tests, strict=True))
    return {"data": task, "attn": attn, "seed": seed, "accuracy": tested, "images/s, one thread": speed}


def train_all(tasks: list[tuple], recipes: dict, results: dict, path: Path | None) -> None:
    """Two runs at a time; every result is on disk before the next is waited for."""
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(2, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        tqdm(total=len(tasks), unit="run") as bar,
    ):
        try:
            for done in as_completed([pool.submit(run, *task, recipes[task[0]]) for task in tasks]):
                results["rows"].append(row := done.result())
                save(path, results)
                bar.update()
                bar.write(f"{row['data']}, {row['attn']}, seed {row['seed']}: {row['accuracy']:.4f}", file=sys.stderr)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# Costs.


def build(attn: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("soft_cluttered", attn=attn, img_size=size)


def step(model: nn.Module, images: Tensor, training: bool) -> None:
    model.train(training)
    with torch.set_grad_enabled(training):
        logits = model(images)
    if training:
        model.zero_grad()
        F.cross_entropy(logits, torch.zeros(len(images), dtype=torch.long)).backward()


def memory(attn: str, size: int, batch: int, training: bool) -> int:
    model = build(attn, size)
    step(model, torch.zeros(1, 1, 32, 32), training)
    return benchmark.peak(partial(step, model, torch.zeros(batch, 1, size, size), training), "cpu")


def gmacs(attn: str, size: int) -> float:
    with FlopCounterMode(display=False, custom_mapping=benchmark.ALSO_COUNTED) as counter:
        step(build(attn, size), torch.zeros(1, 1, size, size), False)
    return counter.get_total_flops() / 2e9


def costs(attentions: list[str], size: int, quick: bool) -> list[dict]:
    """Rows for all attentions at one size, timed in turns, of batches that hold the pixels of 16 images of 64²."""
    batch = max(1, 16 * 64**2 // size**2)
    images = torch.randn(batch, 1, size, size, generator=torch.Generator().manual_seed(0))
    models = {attn: build(attn, size) for attn in attentions}
    rows = []
    for way in PASSES:
        training = way == "training"
        calls = {attn: partial(step, model, images, training) for attn, model in models.items()}
        used = {attn: partial(memory, attn, size, batch, training) for attn in attentions}
        figures = benchmark.timed(calls, used, "cpu", *((1, 0.1) if quick else (9, 15.0)))
        for attn, found in figures.items():
            about = {"attn": attn, "size": size, "batch": batch, "pass": way, "gmacs": gmacs(attn, size)}
            rows.append(about | found | {"images/s": batch / found["median"]})
    return rows


# What is made of it.


def save(path: Path | None, results: dict) -> None:
    """The file is the old one or the whole new one at any moment."""
    if path is not None:
        part = path.with_name(f".{path.name}.part")
        benchmark.write(part, results)
        os.replace(part, path)


def opened(path: Path | None, recipes: dict, about: dict) -> dict:
    """Results that are there already, or none. Raises ValueError if they are not of these recipes."""
    results = about | {"recipes": recipes, "rows": [], "costs": []}
    if path is None or not path.exists():
        return results
    try:
        earlier = json.loads(path.read_text())
        if earlier["recipes"] != recipes or earlier["machine"] != about["machine"]:
            raise ValueError("is of another recipe or machine")
        return results | {key: earlier[key] for key in ("rows", "costs")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be gone on from ({error}); name another folder") from None


def summary(results: dict) -> list[dict]:
    """A dictionary for each attention: accuracies by task, and costs by pass and size."""
    found = []
    for attn in ATTENTIONS:
        reached = {
            task: [row["accuracy"] for row in results["rows"] if (row["attn"], row["data"]) == (attn, task)]
            for task in SPLITS
        }
        spent = {(row["pass"], row["size"]): row for row in results["costs"] if row["attn"] == attn}
        if any(reached.values()) or spent:
            parameters = sum(p.numel() for p in build(attn, soft.CONFIGS["soft_cluttered"]["img_size"]).parameters())
            found.append({"attn": attn, "parameters": parameters, "accuracy": reached, "costs": spent})
    return found


def findings(entries: list[dict]) -> list[str]:
    """Softmax-free against softmax: points of accuracy, and time at each size."""
    by_name = {entry["attn"]: entry for entry in entries}
    if not {"soft", "softmax"} <= by_name.keys():
        return []
    ours, theirs, told = by_name["soft"], by_name["softmax"], []
    for task, reached in ours["accuracy"].items():
        if reached and theirs["accuracy"][task]:
            points = 100 * (np.mean(reached) - np.mean(theirs["accuracy"][task]))
            told.append(f"{task}: soft is {points:+.2f} points off softmax")
    for way, size in ours["costs"]:
        if row := theirs["costs"].get((way, size)):
            ratio = ours["costs"][way, size]["median"] / row["median"]
            told.append(f"{way} at {size} pixels: soft takes {ratio:.2f} of softmax's time")
    return told


def percent(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def table(entries: list[dict], sizes: tuple[int, ...]) -> str:
    listed = " / ".join(map(str, sizes))
    titles = ["attention", "parameters", *(f"{task}, %" for task in SPLITS), f"GMACs at {listed} px"]
    titles += ["training images/s", "inference images/s", "peak MB, training", "peak MB, inference"]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for entry in entries:

        def across(way: str, key: str, unit: float, form: str, entry: dict = entry) -> str:
            rows = (entry["costs"].get((way, size)) for size in sizes)
            return " / ".join("–" if row is None else format(row[key] * unit, form) for row in rows)

        lines.append([entry["attn"], f"{entry['parameters']:,}", *map(percent, entry["accuracy"].values())])
        lines[-1] += [across("training", "gmacs", 1, ".3f"), *(across(way, "images/s", 1, ".3g") for way in PASSES)]
        lines[-1] += [across(way, "memory", 1e-6, ".0f") for way in PASSES]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plot(entries: list[dict], sizes: tuple[int, ...], path: Path, title: str) -> None:
    """Accuracy against time, and time and memory against size."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), layout="constrained")
    cost = ("training", sizes[-2])
    for i, entry in enumerate(entries):
        style = {"color": f"C{i}", "marker": "o"}
        for axis, reached in zip(axes, entry["accuracy"].values(), strict=False):
            if reached and cost in entry["costs"]:
                spread = 100 * np.std(reached, ddof=1) if len(reached) > 1 else 0
                x = 1e3 / entry["costs"][cost]["images/s"]
                axis.errorbar(x, 100 * np.mean(reached), spread, capsize=3, **style)
        for axis, key, unit in zip(axes[2:], ("median", "memory"), (1e3, 1e-6), strict=True):
            rows = [row for (way, _), row in entry["costs"].items() if way == "training"]
            axis.plot([row["size"] for row in rows], [unit * row[key] / row["batch"] for row in rows], **style)
    for axis, task in zip(axes, SPLITS, strict=False):
        axis.set(xscale="log", xlabel=f"training at {cost[1]} px, ms an image", ylabel="test accuracy, %", title=task)
    for axis, what in zip(axes[2:], ("ms an image", "peak MB an image"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="pixels a side", ylabel=what, title="training")
        axis.set_xticks(sizes, list(map(str, sizes)))
        axis.set_xticks([], minor=True)
    handles = [plt.Line2D([], [], color=f"C{i}", marker="o") for i in range(len(entries))]
    figure.legend(handles, [entry["attn"] for entry in entries], loc="outside right upper", frameon=False)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small: 128 images of training, 32 and 64 pixels")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for compare_attention.json, .md and .png")
    parser.add_argument("--attn", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS), help="all unless given")
    parser.add_argument("--data", nargs="*", choices=SPLITS, default=list(SPLITS), help="both unless given")
    parser.add_argument("--seeds", nargs="+", type=int, help="of split, weights and order; 0 1 2 unless given")
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    if min(options.seeds) < 0:
        parser.error(f"--seeds must not be negative, as {min(options.seeds)} is")
    options.recipes = QUICK if options.quick else RECIPES
    about = benchmark.setting("compare_attention", "cpu", arguments)
    about["command"] = about["command"].replace("benchmarks", "soft", 1)
    options.path = options.output and options.output / "compare_attention.json"
    try:
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
        options.results = opened(options.path, options.recipes, about)
        save(options.path, options.results)
    except (OSError, ValueError) as error:
        parser.error(f"--output: {error}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    results, started = options.results, time.perf_counter()
    done = {(row["data"], row["attn"], row["seed"]) for row in results["rows"]}
    # Seeds first, so that what there is at any moment compares all.
    wanted = dict.fromkeys(
        (task, attn, seed) for seed, task, attn in product(options.seeds, options.data, options.attn)
    )
    sizes = QUICK_PIXELS if options.quick else PIXELS
    try:
        train_all([task for task in wanted if task not in done], options.recipes, results, options.path)
        for size in tqdm(sizes, unit="size"):
            there = {row["attn"] for row in results["costs"] if row["size"] == size}
            if not there >= set(options.attn):
                kept = [r for r in results["costs"] if r["size"] != size or r["attn"] not in options.attn]
                results["costs"] = kept + costs(options.attn, size, options.quick)
                save(options.path, results)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; with --output, the same command goes on from what is finished") from None
    entries = summary(results)
    results["findings"] = findings(entries)
    print("\n".join(results["findings"]), file=sys.stderr)
    print(f"{time.perf_counter() - started:.0f} seconds", file=sys.stderr)
    print(text := table(entries, sizes))
    if options.output is not None:
        save(options.path, results)
        (options.output / "compare_attention.md").write_text(f"{text}\n")
        plot(entries, sizes, options.output / "compare_attention.png", f"soft_cluttered, {results['machine']}")


if __name__ == "__main__":
    main()
