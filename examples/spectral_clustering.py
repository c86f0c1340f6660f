"""Spectral clustering of concentric rings, without the matrix of affinities.

The affinities K ≈ FFᵀ are never formed: their row sums are D = F(Fᵀ1), and the leading eigenvectors of
D^{-1/2} K D^{-1/2} (Ng, Jordan & Weiss, "On spectral clustering", NeurIPS 2001) are the left singular vectors of
D^{-1/2} F. k-means on their normalised rows finds the rings, which k-means on the points does not. Prints how well
both agree with the truth (adjusted Rand index, 1 for the same clusters) and with --output writes a plot.

    python examples/spectral_clustering.py --output figures
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from lowrank.sklearn import Nystroem

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RADII = (1.0, 2.0, 3.0)
WIDTH = 0.1  # The standard deviation of a point's distance from its ring.
LENGTHSCALE = 0.2  # Wider than the gaps between neighbours on a ring, narrower than those between rings.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1,500 points in place of 5,000")
    parser.add_argument("--rtol", type=float, default=1e-2, help="tr(K − FFᵀ)/tr K (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder for the plot (default: none)")
    arguments = parser.parse_args()

    x, truth = rings(1500 if arguments.quick else 5000, np.random.default_rng(0))
    started = time.perf_counter()
    nystroem = Nystroem(
        gamma=0.5 / LENGTHSCALE**2,
        landmarks="rpcholesky",
        rtol=arguments.rtol,
        n_components=min(1000, len(x)),
        random_state=0,
    )
    embedding = spectral_embedding(nystroem.fit_transform(x), clusters=len(RADII))
    found = KMeans(len(RADII), n_init=10, random_state=0).fit_predict(embedding)
    seconds = time.perf_counter() - started
    plain = KMeans(len(RADII), n_init=10, random_state=0).fit_predict(x)

    landmarks = x[nystroem.component_indices_]
    print(f"{len(landmarks)} landmarks of {len(x)} points: {seconds:.2f} s")
    print(f"spectral clustering: adjusted Rand index {adjusted_rand_score(truth, found):.4f}")
    print(f"k-means on points:   adjusted Rand index {adjusted_rand_score(truth, plain):.4f}")
    if arguments.output:
        plot(x, found, plain, landmarks, arguments.output)


def rings(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points near the rings, as many on each as its length asks for, and which ring each is on."""
    ring = rng.choice(len(RADII), size=n, p=np.asarray(RADII) / sum(RADII))
    radius, angle = np.asarray(RADII)[ring] + WIDTH * rng.standard_normal(n), rng.uniform(0, 2 * np.pi, size=n)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1), ring


def spectral_embedding(factor: np.ndarray, *, clusters: int) -> np.ndarray:
    """Normalised rows of the leading eigenvectors of D^{-1/2} FFᵀ D^{-1/2}."""
    degree = factor @ np.sum(factor, axis=0)
    vectors = np.linalg.svd(factor / np.sqrt(degree)[:, None], full_matrices=False)[0][:, :clusters]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def plot(x: np.ndarray, found: np.ndarray, plain: np.ndarray, landmarks: np.ndarray, folder: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 5), sharex=True, sharey=True, layout="constrained")
    for axis, clusters, title in ((axes[0], found, "spectral clustering"), (axes[1], plain, "k-means on the points")):
        axis.scatter(*x.T, c=clusters, cmap="tab10", vmax=9, s=2)
        axis.set(title=title, aspect="equal", xlabel="x₁")
    axes[0].plot(*landmarks.T, "k.", markersize=3, label=f"{len(landmarks)} landmarks")
    axes[0].legend(loc="upper right")
    axes[0].set_ylabel("x₂")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "spectral_clustering.png", dpi=150)


if __name__ == "__main__":
    main()
