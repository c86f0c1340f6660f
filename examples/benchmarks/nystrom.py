"""Error of a Nyström factor against its rank and its time, for every way to choose landmarks and for scikit-learn.

Side by side in one run: medians over interleaved rounds; the trace error tr(K − FFᵀ)/tr K, the same for all; and the
floor, one product (n × k)(k × k) and the n·k kernel values that no method can do without. Two spectra: points in the
plane, most of them in one cluster, where the choice matters, and points in ten dimensions with a flat spectrum, where
it hardly does. "one by one" is randomly pivoted Cholesky a column at a time, F by contiguous columns. The rows
"lowest" give λ_min(K − FFᵀ)/‖K‖ in float32, which is negative where a factor overshoots.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import sklearn
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.kernel_approximation import Nystroem

from lowrank import gaussian_kernel, nystrom, rpcholesky

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Dimension, lengthscale.
SPECTRA = {"plane": (2, 1.0), "flat": (10, 3.0)}


def points(name: str, n: int) -> np.ndarray:
    """float32 points: nine tenths of those in the plane lie in one cluster."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, SPECTRA[name][0]))
    if name == "plane":
        x *= np.where(np.arange(n) % 10 > 0, 0.3, 3.0)[:, None]
    return x.astype(np.float32)


def one_by_one(x: torch.Tensor, rank: int, kernel: Callable) -> torch.Tensor:
    """Fᵀ by randomly pivoted Cholesky, one pivot at a time."""
    rng = np.random.default_rng(0)
    rows = torch.empty((rank, x.shape[0]))
    left = torch.ones(x.shape[0], dtype=torch.float64)
    for k in range(rank):
        total = torch.cumsum(left, 0)
        pivot = min(int(torch.searchsorted(total, rng.random() * float(total[-1]))), x.shape[0] - 1)
        row = kernel(x[pivot : pivot + 1], x)[0] - rows[:k, pivot] @ rows[:k]
        rows[k] = row / row[pivot].clamp(min=1e-6).sqrt()
        left = (left - rows[k].double() ** 2).clamp(min=0)
    return rows


def methods(x: torch.Tensor, rank: int, lengthscale: float) -> dict[str, Callable[[], tuple[float, float]]]:
    """Each gives the seconds it took and the trace error of its factor."""
    kernel = partial(gaussian_kernel, lengthscale=lengthscale)
    host = x.numpy()

    def timed(make: Callable[[], object], squares: Callable[[object], float]) -> tuple[float, float]:
        start = time.perf_counter()
        made = make()
        seconds = time.perf_counter() - start
        return seconds, 1 - squares(made) / x.shape[0]

    def of_factor(made: object) -> float:
        return float(torch.sum(torch.as_tensor(made.factor).double() ** 2))

    def by(landmarks: object) -> tuple[float, float]:
        return timed(lambda: nystrom(x, kernel=kernel, landmarks=landmarks, rank=rank, rng=0), of_factor)

    def centres() -> tuple[float, float]:
        def make() -> object:
            found = MiniBatchKMeans(rank, random_state=0, n_init=1, batch_size=4096).fit(host).cluster_centers_
            return nystrom(x, kernel=kernel, landmarks=torch.from_numpy(found.astype(np.float32)))

        return timed(make, of_factor)

    def pivots_alone() -> tuple[float, float]:
        start = time.perf_counter()
        pivots = rpcholesky(x, rank=rank, kernel=kernel, rng=0)
        seconds = time.perf_counter() - start
        return seconds, 1 - of_factor(nystrom(x, kernel=kernel, landmarks=pivots)) / x.shape[0]

    peer = Nystroem(gamma=0.5 / lengthscale**2, n_components=rank, random_state=0)
    ones = torch.randn((x.shape[0], rank)), torch.randn((rank, rank))
    return {
        "floor: product": lambda: (timed(lambda: ones[0] @ ones[1], lambda _: 0.0)[0], float("nan")),
        "floor: kernel": lambda: (timed(lambda: kernel(x, x[:rank]), lambda _: 0.0)[0], float("nan")),
        "uniform": lambda: by("uniform"),
        "rpcholesky": lambda: by("rpcholesky"),
        "rpcholesky, pivots": pivots_alone,
        "one by one": lambda: timed(
            lambda: one_by_one(x, rank, kernel), lambda rows: float((rows.double() ** 2).sum())
        ),
        "k-means centres": centres,
        "scikit-learn": lambda: timed(lambda: peer.fit_transform(host), lambda f: float((f.astype(float) ** 2).sum())),
    }


def measure(name: str, n: int, rank: int, rounds: int) -> list[dict]:
    calls = methods(torch.from_numpy(points(name, n)), rank, SPECTRA[name][1])
    seconds: dict[str, list[float]] = {method: [] for method in calls}
    errors = {}
    for turn in range(rounds + 1):
        for method, call in calls.items():
            took, errors[method] = call()
            if turn:
                seconds[method].append(took)
    floor = sum(float(np.median(seconds[method])) for method in calls if method.startswith("floor"))
    about = {"points": name, "n": n, "rank": rank}
    return [
        about
        | {"method": method, "seconds": float(np.median(took)), "spread": float(np.ptp(took))}
        | {"to floor": float(np.median(took)) / floor, "error": None if np.isnan(errors[method]) else errors[method]}
        for method, took in seconds.items()
    ]


def lowest(n: int, rank: int) -> list[dict]:
    """λ_min(K − FFᵀ)/‖K‖ of points in the plane, all of them from one cluster."""
    x = np.random.default_rng(0).standard_normal((n, 2)).astype(np.float32)
    k = gaussian_kernel(x.astype(np.float64), x.astype(np.float64))
    factors = {
        "rpcholesky": lambda: nystrom(x, landmarks="rpcholesky", rank=rank, rng=0).factor,
        "uniform": lambda: nystrom(x, rank=rank, rng=0).factor,
        "scikit-learn": lambda: Nystroem(gamma=0.5, n_components=rank, random_state=0).fit_transform(x),
    }
    rows = []
    for method, make in factors.items():
        factor = make().astype(np.float64)
        values = np.linalg.eigvalsh(k - factor @ factor.T)
        rows.append({"points": "lowest", "n": n, "rank": rank, "method": method})
        rows[-1] |= {
            "seconds": None,
            "spread": None,
            "to floor": None,
            "error": float(values[0] / np.linalg.norm(k, 2)),
        }
    return rows


def line(row: dict) -> str:
    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return (
        f"{row['points']:>7}{row['n']:>8}{row['rank']:>6}  {row['method']:<20}{shown(row['seconds'], '.3f'):>9}"
        f"{shown(row['spread'], '.3f'):>9}{shown(row['to floor'], '.2f'):>10}{shown(row['error'], '.2e'):>11}"
    )


def plot(rows: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(1, len(SPECTRA), figsize=(9, 3.6), layout="constrained", sharex=True)
    for axis, name in zip(axes, SPECTRA, strict=True):
        chosen = [row for row in rows if row["points"] == name and row["error"] is not None]
        for method in dict.fromkeys(row["method"] for row in chosen):
            mine = [row for row in chosen if row["method"] == method]
            axis.loglog([row["seconds"] for row in mine], [row["error"] for row in mine], "o-", ms=4, label=method)
        axis.set(xlabel="seconds", title=f"{name}: {SPECTRA[name][0]} dimensions")
    axes[0].set(ylabel="tr(K − FFᵀ)/tr K")
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2,000 points, ranks to 80, one round")
    parser.add_argument("--output", type=Path, help="folder for nystrom.json and nystrom.png")
    options = parser.parse_args(arguments)
    n, ranks, rounds, small = (2000, (20, 80), 1, 400) if options.quick else (100_000, (50, 100, 200, 400), 3, 1500)
    print(f"{'points':>7}{'n':>8}{'rank':>6}  {'method':<20}{'seconds':>9}{'spread':>9}{'to floor':>10}{'error':>11}")
    rows = []
    for name in SPECTRA:
        for rank in ranks:
            measured = measure(name, n, rank, rounds)
            print("\n".join(map(line, measured)), flush=True)
            rows += measured
    compared = lowest(small, small // 5)
    print("\n".join(map(line, compared)))
    rows += compared
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        about = {"command": "python examples/benchmarks/nystrom.py", "date": time.strftime("%Y-%m-%d")}
        about |= {"machine": f"{platform.machine()} CPU", "threads": torch.get_num_threads()}
        about |= {"torch": torch.__version__, "scikit-learn": sklearn.__version__}
        (options.output / "nystrom.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
        plot(rows, options.output / "nystrom.png")


if __name__ == "__main__":
    main()
