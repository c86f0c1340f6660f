"""How many matrix products does each inverse iteration spend, as its eigenvalues have it?

All iterations X ← q(E)X, E = XA, act on the eigenvalues e of E alone, so a scalar recursion over a fine grid of the
spectrum [low, 1] shows the whole of them: the worst |1 − e| after each product. A positive definite matrix of condition
κ starts from X₀ = cI, so low = 1/κ and the first step has E and q(E)X for nothing: two products less, in every method.
Any other starts from X₀ = cAᴴ, so low = 1/κ². All start at c = 2/(low + 1), which makes the worst |1 − e| least; it
suits the basins |1 − e| < 1 of Newton and hyperpower and 0 < e < 3 of Nyströmformer's polynomial alike.

lowrank        the steps of orders 2, 3, 5 and 9 of lowrank.newton_schedule, of 2, 3, 4 and 5 products
scaled Newton  X ← 2/(2 − ε²)·(2I − E)X, ε ← ε²/(2 − ε²), 2 products (Pan & Schreiber, 1991)
Newton         X ← (2I − E)X, 2 products, as in SOFT
hyperpower     X ← (I + R + R²)X with R = I − E, 3 products
Nyströmformer  X ← (13I − E(15I − E(7I − E)))X/4, 4 products (Xiong et al., AAAI 2021, eq. 11)

Prints the products to a worst error of 1e-6 and, with --output, writes them and the errors after each step as JSON
and as a plot.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
from numpy.polynomial.polynomial import polyval

from lowrank import newton_schedule
from lowrank._schedule import plan

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TOLERANCE = 1e-6
KAPPAS = (10.0, 1e2, 1e4, 1e6)
KINDS = {"definite": "positive definite", "general": "general"}
SHOWN = (("definite", 1e4), ("general", 1e4))


def lowest(kind: str, kappa: float) -> float:
    """The lower end of the spectrum of E/c for X₀ = cI or cAᴴ and singular values in [1/κ, 1]."""
    return 1 / kappa if kind == "definite" else 1 / kappa**2


def ours(kind: str, kappa: float, e: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Products spent and eigenvalues of E after each step of the schedule."""
    low = lowest(kind, kappa)
    spent = newton_schedule(kappa, tolerance=TOLERANCE, definite=kind == "definite").products
    e = e * (1 + low) / 2  # The first step brings its own scale.
    for products, step in zip(spent[1:], plan(low, 1.0, TOLERANCE).steps, strict=True):
        e = step.scale * e * polyval(1 - step.scale * e, step.coefficients)
        yield products, e


def scaled(kind: str, kappa: float, e: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Newton's step times ρ = 2/(2 − ε²), for eigenvalues in [1 − ε, 1 + ε]."""
    low = lowest(kind, kappa)
    # 1 − ε², without cancellation.
    gap, products = 4 * low / (1 + low) ** 2, -2 if kind == "definite" else 0
    while True:
        rho = 2 / (1 + gap)
        e, gap, products = rho * e * (2 - e), rho**2 * gap, products + 2
        yield products, e


def unscaled(step: Callable[[np.ndarray], np.ndarray], cost: int) -> Callable:
    """The iteration of a fixed polynomial, from what it makes of an eigenvalue and its products."""

    def follow(kind: str, kappa: float, e: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        products = -2 if kind == "definite" else 0
        while True:
            e, products = step(e), products + cost
            yield products, e

    return follow


METHODS = {
    "lowrank.newton_schedule": ours,
    "scaled Newton": scaled,
    "Newton (SOFT)": unscaled(lambda e: e * (2 - e), 2),
    "hyperpower, order 3": unscaled(lambda e: e * (3 - e * (3 - e)), 3),
    "Nyströmformer": unscaled(lambda e: e * (13 - e * (15 - e * (7 - e))) / 4, 4),
}


def worst(e: np.ndarray) -> float:
    return float(np.max(np.abs(1 - e)))


def measure(kind: str, kappa: float, points: int) -> dict:
    """The products that each method takes to TOLERANCE, and its errors on the way."""
    low = lowest(kind, kappa)
    grid = np.concatenate([[low], np.geomspace(low, 1, points), np.linspace(low, 1, points), [1.0]])
    row = {"kind": kind, "kappa": kappa, "low": low, "products": {}, "curves": {}}
    start = 2 * grid / (1 + low)
    for name, follow in METHODS.items():
        curve = [(0, worst(start))]
        for products, e in follow(kind, kappa, start):
            curve.append((products, worst(e)))
            if curve[-1][1] <= TOLERANCE:
                break
        row["products"][name] = curve[-1][0]
        row["curves"][name] = {"products": [p for p, _ in curve], "errors": [e for _, e in curve]}
    return row


def plot(rows: list[dict], path: Path) -> None:
    figure, panels = plt.subplots(1, len(SHOWN), figsize=(9, 4.4), sharey=True, layout="constrained")
    shown = [next(row for row in rows if (row["kind"], row["kappa"]) == case) for case in SHOWN]
    for panel, row in zip(panels, shown, strict=True):
        for name, marker in zip(METHODS, "osx^v", strict=True):
            width = 1.8 if METHODS[name] is ours else 0.9
            label = f"{name} ({', '.join(str(row['products'][name]) for row in shown)})"
            panel.semilogy(*row["curves"][name].values(), marker=marker, ms=4, linewidth=width, label=label)
        panel.axhline(TOLERANCE, color="black", linewidth=0.6, linestyle=":")
        panel.set(title=f"{KINDS[row['kind']]}, κ = {row['kappa']:g}", xlabel="matrix products", ylim=(1e-9, 2))
        panel.grid(linewidth=0.3)
    panels[0].set_ylabel("worst |1 − e|")
    title = f"products to {TOLERANCE:.0e} (left, right)"
    figure.legend(
        *panels[0].get_legend_handles_labels(), title=title, loc="outside lower center", ncols=3, frameon=False
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1000 points of the spectrum instead of 100 000")
    parser.add_argument("--output", type=Path, help="folder for newton_schedule.json and newton_schedule.png")
    options = parser.parse_args(arguments)
    points = 500 if options.quick else 50_000
    rows = [measure(kind, kappa, points) for kind in KINDS for kappa in KAPPAS]
    print(f"{'matrix':>18} {'kappa':>7}" + "".join(f"{name:>25}" for name in METHODS))
    for row in rows:
        figures = "".join(f"{row['products'][name]:25d}" for name in METHODS)
        print(f"{KINDS[row['kind']]:>18} {row['kappa']:7.0e}{figures}")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        words = ["python examples/benchmarks/newton_schedule.py"] + ["--quick"] * options.quick
        about = {"command": " ".join(words), "date": time.strftime("%Y-%m-%d"), "machine": f"{platform.machine()} CPU"}
        about |= {"numpy": np.__version__, "tolerance": TOLERANCE, "points": 2 * points}
        (options.output / "newton_schedule.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
        plot(rows, options.output / "newton_schedule.png")


if __name__ == "__main__":
    main()
