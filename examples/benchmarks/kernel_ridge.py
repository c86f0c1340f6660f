"""How long does kernel ridge regression take to a given test error?

The same Gaussian kernel and the same ridge, fitted by scikit-learn's KernelRidge (dense Cholesky) and its Nystroem
with Ridge, by lowrank's factor alone ("restricted", the solution of rank k) and by ``kernel_ridge`` ("exact"). Data: as
many points and features as California housing, generated (a smooth function and noise), and the digits of
scikit-learn. A setting reaches the target if its test error is at most 2 % above that of the dense solution. Times are
of fit and prediction, of one run each. Prints a table and, with --output, writes it as JSON and as a plot.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import scipy.linalg
import sklearn
from sklearn.datasets import load_digits
from sklearn.kernel_approximation import Nystroem
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from threadpoolctl import threadpool_limits

from lowrank import gaussian_kernel, kernel_ridge, nystrom

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ABOVE_DENSE = 1.02
# OpenBLAS 0.3.31's Cholesky factorisation crashes the interpreter for 16,000 points when it has two threads.
_MOST_FOR_THREADS = 10_000
Fit = Callable[[np.ndarray, np.ndarray, np.ndarray, float, float], tuple[np.ndarray, int | None]]


def housing(n: int) -> tuple:
    """n points of 8 features, a smooth function of them with noise of a tenth of its size; lengthscale and ridge."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 8))
    y = (
        np.sin(x[:, 0])
        + 0.5 * x[:, 1] * x[:, 2]
        + np.cos(x[:, 3] + x[:, 4])
        + np.tanh(x[:, 5] * x[:, 6])
        + 0.5 * x[:, 7]
    )
    y = (y - y.mean()) / y.std() + 0.1 * rng.standard_normal(n)
    return *split(x, y, rng), 4.0, 0.02


def digits(n: int) -> tuple:
    """Up to n digits, one column for each class; lengthscale and ridge."""
    rng = np.random.default_rng(0)
    x, label = load_digits(return_X_y=True)
    x, y = x[:n] / 16, np.eye(10)[label[:n]]
    return *split(x, y, rng), 2.0, 0.01


def split(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    order = rng.permutation(len(x))
    cut = len(x) * 4 // 5
    return [x[order[:cut]], y[order[:cut]], x[order[cut:]], y[order[cut:]]]


def dense(x, y, x_new, lengthscale, ridge):
    model = KernelRidge(alpha=ridge, kernel="rbf", gamma=0.5 / lengthscale**2)
    with threadpool_limits(None if len(x) < _MOST_FOR_THREADS else 1, user_api="blas"):
        return model.fit(x, y).predict(x_new), None


def nystroem_and_ridge(x, y, x_new, lengthscale, ridge, *, rank):
    features = Nystroem(gamma=0.5 / lengthscale**2, n_components=rank, random_state=0).fit(x)
    # Without an intercept: the same model as all the others.
    model = Ridge(alpha=ridge, fit_intercept=False).fit(features.transform(x), y)
    return model.predict(features.transform(x_new)), None


def restricted(x, y, x_new, lengthscale, ridge, *, rank):
    kernel = functools.partial(gaussian_kernel, lengthscale=lengthscale)
    low_rank = nystrom(x, kernel=kernel, landmarks="rpcholesky", rank=rank, rng=0)
    weights = low_rank.factor.T @ low_rank.solve(y, ridge=ridge)
    # The features of new points are k(x′, z) L⁻ᵀ; L⁻ᵀ is applied to the weights instead.
    weights = scipy.linalg.solve_triangular(low_rank.cholesky, weights, lower=True, trans=1)
    return kernel(x_new, low_rank.landmarks) @ weights, None


def exact(x, y, x_new, lengthscale, ridge, *, rank, tol, dtype=np.float64):
    kernel = functools.partial(gaussian_kernel, lengthscale=lengthscale)
    x, y, x_new = (a.astype(dtype) for a in (x, y, x_new))
    fit = kernel_ridge(x, y, kernel=kernel, ridge=ridge, rank=rank, tol=tol, rng=0)
    return fit.predict(x_new), int(np.max(fit.iterations))


def methods(ranks: tuple[int, ...]) -> dict[tuple[str, str], Fit]:
    """Name and setting of everything that is compared, the dense solution first."""
    middle, top = ranks[-2:]
    result: dict[tuple[str, str], Fit] = {("KernelRidge, scikit-learn", ""): dense}
    for name, fit in (("Nystroem + Ridge, scikit-learn", nystroem_and_ridge), ("restricted, lowrank", restricted)):
        result |= {(name, f"rank {rank}"): functools.partial(fit, rank=rank) for rank in ranks}
    single = functools.partial(exact, dtype=np.float32)
    for name, fit in (("exact, lowrank, float64", exact), ("exact, lowrank, float32", single)):
        for rank in (middle, top):
            result[name, f"rank {rank}, tol 1e-3"] = functools.partial(fit, rank=rank, tol=1e-3)
    result["exact, lowrank, float64", f"rank {middle}, tol 1e-8"] = functools.partial(exact, rank=middle, tol=1e-8)
    return result


def measure(name: str, data: tuple, ranks: tuple[int, ...]) -> list[dict]:
    """One row per method and setting: seconds, the root mean square error on the test set, steps."""
    x, y, x_new, y_new, lengthscale, ridge = data
    rows: list[dict] = []
    for (method, setting), fit in methods(ranks).items():
        start = time.perf_counter()
        predicted, steps = fit(x, y, x_new, lengthscale, ridge)
        seconds = time.perf_counter() - start
        error = float(np.sqrt(np.mean((predicted - y_new) ** 2)))
        target = ABOVE_DENSE * (rows[0]["test error"] if rows else error)
        row = {"data": name, "points": len(x), "method": method, "setting": setting, "seconds": seconds}
        rows.append(row | {"test error": error, "steps": steps, "reaches the target": error <= target})
        print(
            f"{name:>8} {len(x):6d} {method:>31} {setting:>18} {seconds:8.2f} {error:10.4f} {steps or '':>6} "
            f"{'yes' if error <= target else 'no':>8}",
            flush=True,
        )
    return rows


def plot(rows: list[dict], path: Path) -> None:
    names = list(dict.fromkeys(row["data"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(5.2 * len(names), 3.6), layout="constrained")
    for ax, name in zip(axes, names, strict=True):
        mine = [row for row in rows if row["data"] == name]
        for method, marker in zip(dict.fromkeys(row["method"] for row in mine), "*osv^", strict=True):
            some = [row for row in mine if row["method"] == method]
            ax.loglog([row["seconds"] for row in some], [row["test error"] for row in some], marker, label=method)
        ax.axhline(ABOVE_DENSE * mine[0]["test error"], color="grey", linewidth=0.8)
        ax.set(xlabel="seconds, fit and prediction", title=f"{name}, {mine[0]['points']} points")
    axes[0].set(ylabel="test error")
    axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="600 points each")
    parser.add_argument("--output", type=Path, help="folder for kernel_ridge.json and kernel_ridge.png")
    options = parser.parse_args(arguments)
    sizes, ranks = ((600, 600), (20, 40, 80)) if options.quick else ((20640, 1797), (100, 200, 400, 800))
    print(
        f"{'data':>8} {'points':>6} {'method':>31} {'setting':>18} {'seconds':>8} {'error':>10} {'steps':>6} "
        f"{'reaches':>8}"
    )
    rows = measure("housing", housing(sizes[0]), ranks) + measure("digits", digits(sizes[1]), ranks)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        about = {"command": "python examples/benchmarks/kernel_ridge.py", "date": time.strftime("%Y-%m-%d")}
        about |= {"machine": f"{platform.machine()} CPU, {os.environ.get('OMP_NUM_THREADS', 'all')} threads"}
        about |= {"scikit-learn": sklearn.__version__, "numpy": np.__version__, "target": ABOVE_DENSE}
        (options.output / "kernel_ridge.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
        plot(rows, options.output / "kernel_ridge.png")


if __name__ == "__main__":
    main()
