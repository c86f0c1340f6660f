"""Kernels on NumPy alone, against their formulas, and every refusal."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lowrank import kernels
from lowrank._array import namespace
from lowrank.kernels import (
    gaussian_kernel,
    gaussian_matmul,
    laplacian_kernel,
    matern32_kernel,
    matern52_kernel,
    median_lengthscale,
    squared_distances,
)

PROFILES = {
    gaussian_kernel: lambda r: np.exp(-(r**2) / 2),
    laplacian_kernel: lambda r: np.exp(-r),
    matern32_kernel: lambda r: (1 + 3**0.5 * r) * np.exp(-(3**0.5) * r),
    matern52_kernel: lambda r: (1 + 5**0.5 * r + 5 * r**2 / 3) * np.exp(-(5**0.5) * r),
}


def points(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def distances(x, y):
    return np.sqrt(((x[..., :, None, :] - y[..., None, :, :]) ** 2).sum(-1))


@pytest.mark.parametrize("spread", [0.3, 30.0], ids=["expansion", "sums"])
@pytest.mark.parametrize("kernel", PROFILES, ids=lambda kernel: kernel.__name__)
def test_kernels(kernel, spread):
    x, y = spread * points(2, 7, 3), spread * points(2, 5, 3, seed=1)
    y[:, 0] = x[:, 0]
    for options in ({}, *({"lengthscale": given} for given in (2, np.array(0.7), np.array([0.3, 1.1, 2.3])))):
        block, lengthscale = kernel(x, y, **options), options.get("lengthscale", 1.0)
        expected = PROFILES[kernel](distances(x / lengthscale, y / lengthscale))
        # 30 eps of an entry; of r near 0, where the Laplacian has a kink, √eps of the expansion's.
        np.testing.assert_allclose(block, expected, rtol=0, atol=1e-7 if kernel is laplacian_kernel else 1e-14)
        assert block.shape == (2, 7, 5)
    np.testing.assert_allclose(block[:, 0, 0], 1.0, rtol=0, atol=1e-7)
    assert (kernel(x, y[0]) == kernel(x, np.stack([y[0], y[0]]))).all()


@pytest.mark.parametrize("kernel", PROFILES, ids=lambda kernel: kernel.__name__)
def test_kernels_at_whole_distances(kernel):
    x = np.array([[0.0], [1.0], [2.0]])
    np.testing.assert_allclose(kernel(x, x), PROFILES[kernel](distances(x, x)), rtol=0, atol=1e-14)


def test_squared_distances_are_right_far_away():
    x, y = points(20, 3), points(10, 3, seed=1)
    for offset, atol in ((0.0, 1e-14), (1e6, 1e-8)):
        found = squared_distances(x + offset, y + offset)
        np.testing.assert_allclose(found, distances(x, y) ** 2, rtol=1e-8, atol=atol)
        assert found.min() >= 0
    near = 1e-3 * x
    found = squared_distances(near, near)
    assert np.abs(np.diagonal(found)).max() < 1e-19
    far = squared_distances(np.float32(x + 1000), np.float32(y + 1000))
    np.testing.assert_allclose(far, distances(np.float32(x + 1000), np.float32(y + 1000)) ** 2, rtol=1e-5, atol=1e-6)


def test_way_is_chosen_for_each_batch_element(monkeypatch):
    calls = []
    for name in ("_sums", "_expansion"):
        way = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, way=way, name=name: calls.append(name) or way(*a))
    one, other = 0.1 * points(6, 2), 10 * points(6, 2, seed=1)
    expected = {"_expansion": one[None], "_sums": other[None]}
    for name, x in expected.items():
        calls.clear()
        gaussian_kernel(x, x)
        assert calls == [name]
    both = np.stack([one, other])
    calls.clear()
    block = gaussian_kernel(both, both)
    assert sorted(set(calls)) == ["_expansion", "_sums"]
    np.testing.assert_allclose(block, np.exp(-(distances(both, both) ** 2) / 2), rtol=0, atol=1e-14)
    # S = max‖u‖² + max‖v‖² of points about the mean of y, in units of ℓ: up to 8 it is the expansion.
    ring = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    for (radius, way), lengthscale in itertools.product(((2.0, "_expansion"), (2.01, "_sums")), (0.5, 1.0, 2.0)):
        x, y = lengthscale * radius * ring + 64, lengthscale * 2 * ring + 64
        for pair in ((x, y), (y, x)):
            calls.clear()
            gaussian_kernel(*pair, lengthscale=lengthscale)
            assert calls == [way]


def test_expansion_alone():
    x, y = points(6, 2), points(5, 2, seed=1) + 10
    found = kernels._expanded_squared_distances(x, y, namespace(x=x))
    # To (d + 8)·eps of S, however large that is.
    spread = sum((distances(given, y.mean(0)[None]) ** 2).max() for given in (x, y))
    np.testing.assert_allclose(found, distances(x, y) ** 2, rtol=0, atol=10 * np.finfo(float).eps * spread)


def test_sums_in_chunks_are_the_same(monkeypatch):
    x, y = 10 * points(50, 3), 10 * points(20, 3, seed=1)
    whole = squared_distances(x, y)
    monkeypatch.setattr(kernels, "_CACHE_ENTRIES", 7 * 20)
    np.testing.assert_array_equal(squared_distances(x, y), whole)


@pytest.mark.parametrize("entries", [1, 17, 40, 400, 10**6])
@pytest.mark.parametrize("spread", [0.3, 10.0])
def test_matmul_by_blocks(monkeypatch, entries, spread):
    monkeypatch.setattr(kernels, "_BLOCK_ENTRIES", entries)
    x, y, v = spread * points(2, 13, 3), spread * points(9, 3, seed=1), points(2, 9, 4, seed=2)
    expected = np.exp(-(distances(x, y) ** 2) / (2 * 0.7**2)) @ v
    np.testing.assert_allclose(gaussian_matmul(x, y, v, lengthscale=0.7), expected, rtol=0, atol=1e-13)
    mixed = np.stack([x[0] / spread * 0.1, 100 * x[1]])
    expected = np.exp(-(distances(mixed, y) ** 2) / 2) @ v
    np.testing.assert_allclose(gaussian_matmul(mixed, y, v), expected, rtol=0, atol=1e-13)


def test_matmul_forms_no_large_block(monkeypatch):
    sizes = []
    original = kernels._gaussian
    monkeypatch.setattr(kernels, "_gaussian", lambda d2, xp: sizes.append(d2.size) or original(d2, xp))
    monkeypatch.setattr(kernels, "_BLOCK_ENTRIES", 100)
    for x, y in itertools.product((points(2, 31, 2), points(31, 2)), (points(2, 29, 2), points(29, 2))):
        sizes.clear()
        gaussian_matmul(x, y, points(2, 29, 1))
        assert max(sizes) <= 100
        assert len(sizes) < sum(sizes) / 100 * 2.5
    monkeypatch.setattr(kernels, "_BLOCK_ENTRIES", 1)
    sizes.clear()
    gaussian_matmul(points(2, 3, 2), points(4, 2), points(4, 1))
    assert sizes == [2] * 12  # one entry for each batch element
    monkeypatch.undo()


def test_blocks_are_as_large_as_promised(monkeypatch):
    """2²⁰ entries at the most, in two blocks where it is a few more."""
    sizes = []
    original = kernels._gaussian
    monkeypatch.setattr(kernels, "_gaussian", lambda d2, xp: sizes.append(d2.size) or original(d2, xp))
    x, y, v = points(1100, 1), points(1000, 1, seed=1), points(1000, 1, seed=2)
    product = gaussian_matmul(x, y, v)
    assert max(sizes) <= 2**20
    assert len(sizes) == 2
    np.testing.assert_allclose(product, gaussian_kernel(x, y) @ v, rtol=0, atol=1e-12)


def test_empty_blocks():
    assert gaussian_kernel(np.zeros((0, 2)), np.zeros((3, 2))).shape == (0, 3)
    assert squared_distances(np.zeros((4, 0)), np.zeros((3, 0))).tolist() == [[0.0] * 3] * 4
    assert laplacian_kernel(np.zeros((2, 4, 0)), np.zeros((3, 0))).tolist() == [[[1.0] * 3] * 4] * 2
    assert laplacian_kernel(np.zeros((4, 0)), np.zeros((2, 3, 0))).tolist() == [[[1.0] * 3] * 4] * 2
    assert (
        gaussian_matmul(np.zeros((4, 2)), np.zeros((0, 2)), np.zeros((5, 0, 3))).tolist()
        == np.zeros((5, 4, 3)).tolist()
    )
    assert gaussian_matmul(np.zeros((0, 2)), np.zeros((3, 2)), np.zeros((3, 1))).shape == (0, 1)


def test_precisions():
    x = points(5, 2)
    for dtype in (np.float16, np.float32, np.float64):
        block = gaussian_kernel(x.astype(dtype), x.astype(dtype))
        assert block.dtype == dtype
        np.testing.assert_allclose(block, np.exp(-(distances(x, x) ** 2) / 2), rtol=0, atol=20 * np.finfo(dtype).eps)
    assert matern52_kernel(np.zeros((1, 1)), np.full((1, 1), 1e200)).tolist() == [[0.0]]
    assert matern32_kernel(np.zeros((1, 1)), np.full((1, 1), np.inf)).tolist() == [[0.0]]


def test_median_lengthscale():
    x = points(30, 3)
    pairs = [np.linalg.norm(a - b) for a, b in itertools.combinations(x, 2)]
    assert math.isclose(median_lengthscale(x), np.median(pairs), rel_tol=1e-14)
    assert median_lengthscale(np.array([[0.0, 0.0], [3.0, 4.0]])) == 5.0
    assert math.isclose(median_lengthscale(1e200 * x), 1e200 * np.median(pairs), rel_tol=1e-14)
    assert math.isclose(median_lengthscale(1e-200 * x), 1e-200 * np.median(pairs), rel_tol=1e-14)
    many = points(2000, 3, seed=4)
    drawn = median_lengthscale(many, rng=0)
    assert drawn == median_lengthscale(many, rng=0) != median_lengthscale(many, rng=1)
    # 2¹⁶ pairs find the median to about a part in 200.
    assert abs(drawn / 2.18 - 1) < 0.03
    first, second = kernels._pairs(400, np.random.default_rng(0))
    assert len(first) == 2**16
    assert (first != second).all()
    assert first.min() == second.min() == 0
    assert first.max() == second.max() == 399
    assert len(kernels._pairs(362, np.random.default_rng(0))[0]) == 362 * 361 // 2
    assert len(kernels._pairs(363, np.random.default_rng(0))[0]) == 2**16


def test_median_in_parts(monkeypatch):
    sizes = []
    original = kernels._widened
    monkeypatch.setattr(kernels, "_widened", lambda xp, gap: sizes.append(gap.size) or original(xp, gap))
    median_lengthscale(points(400, 8), rng=0)
    assert sizes == [2**18, 2**18]
    x = points(40, 3)
    whole = median_lengthscale(x)
    for entries, most in ((50, 48), (1, 3)):
        monkeypatch.setattr(kernels, "_CACHE_ENTRIES", entries)
        sizes.clear()
        assert median_lengthscale(x) == whole
        assert max(sizes) == most


X = np.zeros((4, 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gaussian_kernel(X, np.zeros((4, 3))), ValueError, "the features, must be equal"),
        (lambda: gaussian_kernel(np.zeros(4), X), ValueError, "x must have at least two axes"),
        (lambda: gaussian_kernel(X, np.zeros(2)), ValueError, "y must have at least two axes"),
        (lambda: gaussian_kernel(X + 0j, X + 0j), TypeError, "distances need a real floating dtype"),
        (lambda: gaussian_kernel(X, X.astype(np.float32)), TypeError, "float32"),
        (lambda: gaussian_kernel(X.astype(int), X.astype(int)), TypeError, "int"),
        (lambda: gaussian_kernel(np.zeros((2, 4, 2)), np.zeros((3, 4, 2))), ValueError, "leading axes must broadcast"),
        (lambda: gaussian_kernel(X, X, lengthscale=0.0), ValueError, "positive and finite, not 0.0"),
        (lambda: gaussian_kernel(X, X, lengthscale=-1), ValueError, "positive and finite, not -1"),
        (lambda: gaussian_kernel(X, X, lengthscale=math.inf), ValueError, "positive and finite, not inf"),
        (lambda: gaussian_kernel(X, X, lengthscale=math.nan), ValueError, "positive and finite, not nan"),
        (lambda: gaussian_kernel(X, X, lengthscale=np.ones(3)), ValueError, r"lengthscale has shape \(3,\)"),
        (lambda: gaussian_kernel(X, X, lengthscale=np.array([1.0, 0.0])), ValueError, "positive and finite"),
        (lambda: gaussian_kernel(X, X, lengthscale=np.array([1.0, np.inf])), ValueError, "positive and finite"),
        (lambda: gaussian_kernel(X, X, lengthscale=np.ones(2) + 0j), TypeError, "lengthscale has dtype complex"),
        (lambda: gaussian_matmul(X, X, np.zeros((3, 1))), ValueError, "v needs one row for each point of y"),
        (lambda: gaussian_matmul(X, X, np.zeros(4)), ValueError, "v must have at least two axes"),
        (lambda: median_lengthscale(X), ValueError, "most points coincide"),
        (lambda: median_lengthscale(X + np.nan), ValueError, "it holds NaN"),
        (lambda: median_lengthscale(np.zeros((1, 2))), ValueError, "at least two points"),
        (lambda: median_lengthscale(np.zeros((2, 2, 2))), ValueError, "at least two points"),
        (lambda: median_lengthscale(np.zeros((3, 0))), ValueError, "most points coincide"),
        (lambda: median_lengthscale(X + 0j), TypeError, "distances need a real floating dtype"),
        (lambda: median_lengthscale(X, rng="no"), TypeError, "rng"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
