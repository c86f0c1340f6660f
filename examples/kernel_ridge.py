"""Kernel ridge regression of scattered measurements: noisy values become a surface, with no matrix of all pairs.

Prints, for several ranks of the preconditioner, the steps taken and their bound, and how far the exact solution and the
one of that rank are from the surface that was measured. With --output, draws surface, measurements, fit and steps.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import matplotlib
import numpy as np

from lowrank import gaussian_kernel, kernel_ridge

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOISE, LENGTHSCALE = 0.2, 0.3
# The ridge is the variance of the noise over that of the surface: the posterior mean of a Gaussian process.
RIDGE = NOISE**2 / 0.5**2
RANKS = (40, 80, 160)


def surface(x: np.ndarray) -> np.ndarray:
    return np.sin(4 * x[..., 0]) * np.cos(3 * x[..., 1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="500 measurements in place of 2,000")
    parser.add_argument("--progress", action="store_true", help="show progress bars")
    parser.add_argument("--output", type=Path, help="folder for kernel_ridge.png")
    options = parser.parse_args(arguments)

    rng, points = np.random.default_rng(0), 500 if options.quick else 2000
    x = rng.uniform(-1, 1, (points, 2))
    y = surface(x) + NOISE * rng.standard_normal(points)

    kernel = functools.partial(gaussian_kernel, lengthscale=LENGTHSCALE)
    print(f"{'rank':>6} {'steps':>6} {'bound':>6} {'residual':>10} {'error, exact':>14} {'error, low rank':>16}")
    fits = []
    for rank in RANKS:
        fit = kernel_ridge(x, y, kernel=kernel, ridge=RIDGE, rank=min(rank, points), rng=0, progress=options.progress)
        low_rank = fit.low_rank @ fit.low_rank.solve(y, ridge=RIDGE)
        errors = [np.sqrt(np.mean((values - surface(x)) ** 2)) for values in (fit.predict(x), low_rank)]
        print(
            f"{fit.low_rank.rank:6d} {int(fit.iterations):6d} {fit.bound:6d} {float(fit.residual):10.1e} "
            f"{errors[0]:14.4f} {errors[1]:16.4f}"
        )
        fits.append(fit)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 60)] * 2), axis=-1)
        fitted = fits[-1].predict(grid.reshape(-1, 2)).reshape(grid.shape[:-1])
        plot(x, y, surface(grid), fitted, fits, options.output / "kernel_ridge.png")


def plot(x: np.ndarray, y: np.ndarray, truth: np.ndarray, fitted: np.ndarray, fits: list, path: Path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(12, 3), layout="constrained")
    look = {"vmin": -1.3, "vmax": 1.3, "cmap": "RdBu_r"}
    square = {"extent": (-1, 1, -1, 1), "origin": "lower"}
    axes[0].imshow(truth, **look, **square)
    axes[1].scatter(*x.T, c=y, s=1, **look)
    axes[1].set(aspect="equal", xlim=(-1, 1), ylim=(-1, 1))
    axes[2].imshow(fitted, **look, **square)
    for ax, title in zip(axes, ("the surface", f"{len(y)} measurements", "kernel ridge"), strict=False):
        ax.set_title(title)
    ranks = [fit.low_rank.rank for fit in fits]
    axes[3].semilogy(ranks, [fit.bound for fit in fits], "k--", label="bound, known before")
    axes[3].semilogy(ranks, [int(fit.iterations) for fit in fits], "o-", label="steps taken")
    axes[3].set(xlabel="rank of the preconditioner")
    axes[3].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
