"""How far from the inverse is each way to invert a Gaussian core, in float32?

Batches of 49 × 49 Gaussian Gram matrices plus 0.01·I, from well to badly conditioned, are inverted by
``pinv_newton``, which eliminates on a CPU, by the 20 textbook Newton steps of the SOFT paper and by Cholesky, all in
float32; the error is against float64. Prints a table and, with --output, writes it as JSON and as a plot.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch

from lowrank import gaussian_kernel, pinv_newton

matplotlib.use("Agg")
import matplotlib.pyplot as plt

POINTS, FEATURES, RIDGE = 49, 32, 0.01


def published(gram: torch.Tensor) -> torch.Tensor:
    """The iteration of the released SOFT models: 20 steps from 1.8/(max row sum of A)²·P."""
    alpha = 1.8 / gram.sum(-1).amax(-1) ** 2
    return pinv_newton(gram, hermitian=True, ridge=RIDGE, alpha=alpha, steps=20)


def cholesky(gram: torch.Tensor) -> torch.Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(gram + RIDGE * torch.eye(POINTS)))


def newton(gram: torch.Tensor) -> torch.Tensor:
    return pinv_newton(gram, hermitian=True, ridge=RIDGE)


METHODS = {"pinv_newton": newton, "20 textbook steps": published, "Cholesky": cholesky}


def measure(batch: int, spreads: np.ndarray) -> list[dict]:
    """One row per spread of the points: condition, and the median relative error of each method."""
    rows = []
    for spread in spreads:
        points = spread * np.random.default_rng(0).standard_normal((batch, POINTS, FEATURES))
        gram = torch.from_numpy(gaussian_kernel(points, points)).float()
        core = gram.double() + RIDGE * torch.eye(POINTS, dtype=torch.float64)
        exact = torch.linalg.inv(core)
        row = {"condition": float(torch.linalg.cond(core).median())}
        for name, invert in METHODS.items():
            error = torch.linalg.matrix_norm(invert(gram).double() - exact) / torch.linalg.matrix_norm(exact)
            row[name] = float(error.median())
            row[f"{name}, worst ratio to Cholesky"] = float(
                (
                    error
                    / (torch.linalg.matrix_norm(cholesky(gram).double() - exact) / torch.linalg.matrix_norm(exact))
                ).max()
            )
        rows.append(row)
    return rows


def plot(rows: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for (name, _), marker in zip(METHODS.items(), "osx", strict=True):
        axes.loglog([row["condition"] for row in rows], [row[name] for row in rows], marker=marker, label=name)
    axes.set(xlabel="condition of A + 0.01 I", ylabel="relative error of the inverse, float32")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 matrices per row instead of 256")
    parser.add_argument("--output", type=Path, help="folder for pinv_accuracy.json and pinv_accuracy.png")
    options = parser.parse_args(arguments)
    batch = 8 if options.quick else 256
    rows = measure(batch, np.geomspace(1.5, 0.003, 13))
    print(f"{'condition':>10}" + "".join(f"{name:>20}" for name in METHODS) + f"{'worst / Cholesky':>20}")
    for row in rows:
        errors = "".join(f"{row[name]:20.2e}" for name in METHODS)
        worst = row["pinv_newton, worst ratio to Cholesky"]
        print(f"{row['condition']:10.1f}{errors}{worst:20.2f}")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        about = {"command": "python examples/benchmarks/pinv_accuracy.py", "date": time.strftime("%Y-%m-%d")}
        about |= {"machine": f"{platform.machine()} CPU", "torch": torch.__version__, "batch": batch}
        (options.output / "pinv_accuracy.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
        plot(rows, options.output / "pinv_accuracy.png")


if __name__ == "__main__":
    main()
