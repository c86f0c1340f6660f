"""The evidence of a Gaussian process, trained: lengthscale and noise by gradients through a Nyström factor.

With y ~ N(0, s²K + σ²I) and K ≈ F Fᵀ the log evidence needs one ``solve`` and one ``logdet``, in time linear in the
number of points (Rasmussen & Williams, "Gaussian Processes for Machine Learning", 2006, eq. 5.8). The landmarks are
drawn once; then ``nystrom`` is differentiable in the lengthscale, and ``torch.optim.LBFGS`` does the rest. Prints the
parameters before and after, and with --output plots the fit.

    python examples/gaussian_process.py --output figures
"""

from __future__ import annotations

import argparse
import functools
import math
from pathlib import Path

import matplotlib
import numpy as np
import torch

from lowrank import gaussian_kernel, median_lengthscale, nystrom, rpcholesky

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOISE = 0.2


def log_evidence(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """log p(y), with logs = log lengthscale, log s, log σ; z are the landmarks."""
    lengthscale, scale, noise = torch.exp(logs)
    low_rank = nystrom(x, kernel=functools.partial(gaussian_kernel, lengthscale=lengthscale), landmarks=z)
    # s²K + σ²I = s²(K + (σ/s)²I).
    ridge = (noise / scale) ** 2
    fit = y @ low_rank.solve(y, ridge=ridge) / scale**2
    logdet = low_rank.logdet(ridge=ridge) + 2 * len(y) * logs[1]
    return -0.5 * (fit + logdet + len(y) * math.log(2 * math.pi))


def train(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, start: float) -> torch.Tensor:
    """The logarithms of the parameters of largest evidence."""
    logs = torch.log(torch.tensor([start, 1.0, 0.5], dtype=x.dtype)).requires_grad_()
    optimiser = torch.optim.LBFGS([logs], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = -log_evidence(x, y, z, logs)
        value.backward()
        return value

    optimiser.step(loss)
    return logs.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="300 points in place of 3,000")
    parser.add_argument("--output", type=Path, help="folder for gaussian_process.png")
    options = parser.parse_args()
    n = 300 if options.quick else 3000
    rng = np.random.default_rng(0)
    x = torch.from_numpy(np.sort(rng.uniform(-3, 3, (n, 1)), axis=0))
    truth = torch.sin(4 * x[:, 0]) + 0.5 * torch.cos(9 * x[:, 0])
    y = truth + NOISE * torch.from_numpy(rng.standard_normal(n))

    start = median_lengthscale(x, rng=0)
    narrow = functools.partial(gaussian_kernel, lengthscale=start / 20)
    z = x[rpcholesky(x, rank=60, kernel=narrow, rng=0)]
    before = torch.log(torch.tensor([start, 1.0, 0.5], dtype=x.dtype))
    after = train(x, y, z, start)
    print(f"{'':>8}{'lengthscale':>13}{'scale':>8}{'noise':>8}{'log evidence':>14}")
    for name, logs in (("start", before), ("trained", after)):
        shown = "".join(f"{value:{width}.3f}" for value, width in zip(torch.exp(logs), (13, 8, 8), strict=True))
        print(f"{name:>8}{shown}{float(log_evidence(x, y, z, logs)):14.1f}")
    print(f"the noise is {NOISE}")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        plot(x, y, truth, z, after, options.output / "gaussian_process.png")


def plot(
    x: torch.Tensor, y: torch.Tensor, truth: torch.Tensor, z: torch.Tensor, logs: torch.Tensor, path: Path
) -> None:
    lengthscale, scale, noise = torch.exp(logs).tolist()
    low_rank = nystrom(x, kernel=functools.partial(gaussian_kernel, lengthscale=lengthscale), landmarks=z)
    mean = low_rank @ low_rank.solve(y, ridge=(noise / scale) ** 2)
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    axis.plot(x[:, 0], y, ".", ms=2, color="0.7", label="data")
    axis.plot(x[:, 0], truth, "k--", lw=1, label="truth")
    axis.plot(x[:, 0], mean, lw=1.5, label=f"mean, lengthscale {lengthscale:.2f}, noise {noise:.2f}")
    axis.plot(z[:, 0], torch.full_like(z[:, 0], -2.2), "|", ms=6, label="landmarks")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
