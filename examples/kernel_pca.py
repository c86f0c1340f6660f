"""Kernel PCA of handwritten digits as a scikit-learn pipeline, beside the exact one.

The principal components of features φ with φ(x)·φ(y) ≈ k(x, y) are kernel principal components: the pipeline is
Nystroem, which picks as many landmarks as the error asked for needs, and PCA. The exact one takes the eigenvectors of
the whole kernel matrix. Prints the variance along each component for both, and with --output writes a plot of the
digits in the first two.

    python examples/kernel_pca.py --output figures
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA, KernelPCA
from sklearn.pipeline import make_pipeline

from lowrank.sklearn import Nystroem

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COMPONENTS = 6
GAMMA = 0.03  # A lengthscale of 4, where two digits are 3 apart in the median and 5 at most.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="400 of the 1797 digits")
    parser.add_argument("--rtol", type=float, default=0.01, help="tr(K − FFᵀ)/tr K (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder for the plot (default: none)")
    arguments = parser.parse_args()

    x, labels = load_digits(return_X_y=True)
    x = x / 16
    if arguments.quick:
        x, labels = x[:400], labels[:400]

    features = Nystroem(gamma=GAMMA, landmarks="rpcholesky", rtol=arguments.rtol, n_components=len(x), random_state=0)
    started = time.perf_counter()
    ours = make_pipeline(features, PCA(COMPONENTS)).fit_transform(x)
    after_ours = time.perf_counter()
    exact = KernelPCA(COMPONENTS, kernel="rbf", gamma=GAMMA, eigen_solver="dense").fit_transform(x)
    after_exact = time.perf_counter()
    ours = ours * np.sign(np.sum(ours * exact, axis=0))  # A component's sign is arbitrary.

    print(f"{len(features.components_)} landmarks of {len(x)} digits: {after_ours - started:.2f} s")
    print(f"exact: {after_exact - after_ours:.2f} s")
    print("component  variance  exact     correlation")
    for j in range(COMPONENTS):
        correlation = np.corrcoef(ours[:, j], exact[:, j])[0, 1]
        print(f"{j + 1:9d}  {ours[:, j].var():.6f}  {exact[:, j].var():.6f}  {correlation:.6f}")
    if arguments.output:
        plot(ours, exact, labels, arguments.output)


def plot(ours: np.ndarray, exact: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 5), sharex=True, sharey=True, layout="constrained")
    for axis, points, title in ((axes[0], ours, "Nystroem and PCA"), (axes[1], exact, "KernelPCA, exact")):
        shown = axis.scatter(*points[:, :2].T, c=labels, cmap="tab10", vmin=-0.5, vmax=9.5, s=6)
        axis.set(title=title, xlabel="first component", aspect="equal")
    axes[0].set_ylabel("second component")
    figure.colorbar(shown, ax=axes, ticks=range(10), label="digit")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "kernel_pca.png", dpi=150)


if __name__ == "__main__":
    main()
