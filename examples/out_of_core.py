"""Kernel ridge regression on more rows than memory should hold, from a file and in one pass per fit.

Writes rows of 20 features to a memory map, draws landmarks from the first of them, fits a ridge regression for a few
ranks, predicts held-out rows, prints the errors, times and peak memory, and plots the error against the rank:

    python examples/out_of_core.py --rows 5000000 --output /somewhere/with/space

On a cluster, make a ``distributed.Client`` first; nothing else changes if all workers see the file.
"""

from __future__ import annotations

import argparse
import functools
import resource
import sys
import tempfile
import time
from pathlib import Path

import dask
import dask.array as da
import matplotlib
import numpy as np

from lowrank import gaussian_kernel
from lowrank.dask import ridge, rpcholesky

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FEATURES, NOISE, RIDGE = 20, 0.1, 1e-3
SCALES = (1 / np.arange(1, FEATURES + 1)).astype(np.float32)  # features matter less and less, as after a PCA
KERNEL = functools.partial(gaussian_kernel, lengthscale=1.5)
RANKS = (25, 50, 100, 200)
SAMPLE, HELD_OUT = 20_000, 10_000


def points(rows: int, rng: np.random.Generator) -> np.ndarray:
    return SCALES * rng.standard_normal((rows, FEATURES), dtype=np.float32)


def targets(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A smooth function of a few directions, and noise."""
    clean = np.sin(2 * x[:, 0]) + np.cos(2 * x[:, 1] + x[:, 2]) + x[:, 3]
    return (clean + NOISE * rng.standard_normal(len(x))).astype(np.float32)


def write(folder: Path, rows: int, chunk: int) -> None:
    """x.npy and y.npy in float32, a chunk at a time."""
    rng = np.random.default_rng(0)
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (rows, FEATURES))
    y = np.lib.format.open_memmap(folder / "y.npy", "w+", np.float32, (rows,))
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        x[part] = points(part.stop - start, rng)
        y[part] = targets(x[part], rng)


def read(path: Path, start: int, stop: int) -> np.ndarray:
    return np.array(np.load(path, mmap_mode="r")[start:stop])


def lazy(path: Path, chunk: int) -> da.Array:
    """A Dask array whose tasks open the file themselves, so that a worker elsewhere needs only its name."""
    whole = np.load(path, mmap_mode="r")
    parts = []
    for start in range(0, len(whole), chunk):
        stop = min(start + chunk, len(whole))
        shape = (stop - start, *whole.shape[1:])
        parts.append(da.from_delayed(dask.delayed(read)(path, start, stop), shape=shape, dtype=whole.dtype))
    return da.concatenate(parts)


def measure(folder: Path, rows: int, chunk: int) -> list[dict]:
    """One row per rank: time of the fit, relative error on held-out rows, relative trace error, peak memory."""
    x, y = lazy(folder / "x.npy", chunk), lazy(folder / "y.npy", chunk)
    rng = np.random.default_rng(1)
    x_new = points(HELD_OUT, rng)
    y_new = targets(x_new, rng)
    # The first pivots of a draw are a draw of fewer: one draw serves all ranks.
    pivots = rpcholesky(x[: min(SAMPLE, rows)], rank=min(max(RANKS), rows), kernel=KERNEL, rng=0)
    found = []
    for rank in RANKS:
        start = time.perf_counter()
        fit = ridge(x, y, kernel=KERNEL, landmarks=pivots[:rank], ridge=RIDGE)
        seconds = time.perf_counter() - start
        error = float(np.linalg.norm(fit.predict(x_new) - y_new) / np.linalg.norm(y_new - y_new.mean()))
        trace = fit.trace_error / rows  # tr K = rows, for k(x, x) = 1
        # Linux counts it in KiB, macOS in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
        found.append({"rank": len(fit.landmarks), "seconds": seconds, "error": error, "trace": trace, "peak": peak})
        print(f"{found[-1]['rank']:6d} {seconds:10.2f} {error:12.4f} {trace:12.4f} {peak:12.2f}", flush=True)
    return found


def plot(found: list[dict], rows: int, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    ranks = [row["rank"] for row in found]
    axes.loglog(ranks, [row["error"] for row in found], marker="o", label="held-out error")
    axes.loglog(ranks, [row["trace"] for row in found], marker="s", label="tr(K − F Fᵀ)/tr K")
    axes.set(xlabel="rank", ylabel="relative error", title=f"{rows:,} rows from a memory map, one pass per fit")
    axes.set_xticks(ranks, labels=[str(rank) for rank in ranks])
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="500 rows in chunks of 100")
    parser.add_argument("--rows", type=int, default=20_000, help="how many rows to write and fit")
    parser.add_argument("--chunk", type=int, default=50_000, help="rows per chunk")
    parser.add_argument(
        "--output", type=Path, help="folder for the memory map (deleted at the end) and out_of_core.png"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.chunk = 500, 100
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.output) as folder:
        write(Path(folder), options.rows, options.chunk)
        print(f"{'rank':>6} {'seconds':>10} {'error':>12} {'trace error':>12} {'peak GiB':>12}")
        found = measure(Path(folder), options.rows, options.chunk)
    if options.output is not None:
        plot(found, options.rows, options.output / "out_of_core.png")


if __name__ == "__main__":
    main()
