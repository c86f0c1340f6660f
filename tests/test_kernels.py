"""Kernel blocks: the right numbers on every library, wherever the points lie, with derivatives of every order asked."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads
from scipy.spatial.distance import cdist

from lowrank import kernels
from lowrank.kernels import (
    gaussian_kernel,
    gaussian_matmul,
    laplacian_kernel,
    matern32_kernel,
    matern52_kernel,
    median_lengthscale,
    squared_distances,
)

# Each kernel as a function of the distance in units of the lengthscale.
PROFILES = {
    gaussian_kernel: lambda r: np.exp(-(r**2) / 2),
    laplacian_kernel: lambda r: np.exp(-r),
    matern32_kernel: lambda r: (1 + np.sqrt(3) * r) * np.exp(-np.sqrt(3) * r),
    matern52_kernel: lambda r: (1 + np.sqrt(5) * r + 5 / 3 * r**2) * np.exp(-np.sqrt(5) * r),
}
KERNELS = list(PROFILES)
SMOOTH = [gaussian_kernel, matern32_kernel, matern52_kernel]
# Points of spread 0.3 are within the bound of the expansion, points of spread 30 are summed.
NEAR, FAR = 0.3, 30.0

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6))
seeds = st.integers(0, 2**32 - 1)


def points(*shape, seed=0, scale=1.0, dtype=np.float64):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def exact_distances(x, y):
    """Squared distances in float64 by sums, of the points as they are in their own precision."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return np.sum((x[..., :, None, :] - y[..., None, :, :]) ** 2, axis=-1)


# Values


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [NEAR, FAR])
def test_squared_distances_on_every_library(xp, scale, dtype):
    x, y = points(2, 1, 7, 3, scale=scale, dtype=dtype), points(3, 5, 3, seed=1, scale=scale, dtype=dtype)
    x_ = xp.asarray(x)
    d2 = xp.check(squared_distances(x_, xp.asarray(y)), like=x_, shape=(2, 3, 7, 5))
    # Expansion: at most (d + 8)·ε·S with S ≤ 8. Sums: (d + 6)(ε/2) of the distance.
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(d2, exact_distances(x, y), rtol=5 * eps, atol=88 * eps if scale == NEAR else 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_on_every_library(xp, kernel, dtype):
    for scale in (NEAR, FAR):
        x, y = points(2, 6, 3, scale=scale, dtype=dtype), points(4, 3, seed=1, scale=scale, dtype=dtype)
        ell = np.asarray([0.7, 1.3, 2.0], dtype=dtype) * scale
        x_ = xp.asarray(x)
        expected = PROFILES[kernel](np.sqrt(exact_distances(x / ell.astype(np.float64), y / ell.astype(np.float64))))
        got = xp.check(kernel(x_, xp.asarray(y), lengthscale=xp.asarray(ell)), like=x_, shape=(2, 6, 4))
        np.testing.assert_allclose(got, expected, rtol=0, atol=50 * np.finfo(dtype).eps)


@pytest.mark.parametrize("kernel", KERNELS)
def test_lengthscale_is_in_the_units_of_x(xp, kernel):
    x, y = xp.asarray(points(6, 3)), xp.asarray(points(4, 3, seed=1))
    by_number = xp.check(kernel(x, y, lengthscale=2.5), like=x, shape=(6, 4))
    for same in (xp.asarray(np.asarray(2.5)), xp.asarray(np.full(3, 2.5)), xp.asarray(np.full(3, 2.5, np.float32))):
        np.testing.assert_array_equal(xp.check(kernel(x, y, lengthscale=same), like=x, shape=(6, 4)), by_number)
    half = xp.check(kernel(x / 2, y / 2, lengthscale=1.25), like=x, shape=(6, 4))
    np.testing.assert_array_equal(half, by_number)  # a power of two changes no digit


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(lambda x: x.astype(np.float16), id="numpy-float16"),
        pytest.param(lambda x: torch.asarray(x).to(torch.float16), id="torch-float16"),
        pytest.param(lambda x: torch.asarray(x).to(torch.bfloat16), id="torch-bfloat16"),
        pytest.param(lambda x: jnp.asarray(x, dtype=jnp.bfloat16), id="jax-bfloat16"),
    ],
)
@pytest.mark.parametrize(
    "kernel", [*KERNELS, lambda x, y, lengthscale: gaussian_matmul(x, y, y, lengthscale=lengthscale)]
)
def test_half_precision_is_computed_in_single(array, kernel):
    x, y = array(points(6, 3) + 2), array(points(4, 3, seed=1) + 2)

    def single(a):
        return a.float() if isinstance(a, torch.Tensor) else a.astype("float32")

    got = kernel(x, y, lengthscale=1.5)
    assert got.dtype == x.dtype
    in_single = kernel(single(x), single(y), lengthscale=1.5)
    in_single = in_single.to(x.dtype) if isinstance(x, torch.Tensor) else in_single.astype(x.dtype)
    np.testing.assert_array_equal(np.asarray(single(got)), np.asarray(single(in_single)))


@given(shape=shapes, seed=seeds, offset=st.floats(-100, 100), scale=st.sampled_from([0.01, 0.3, 1.0, 10.0]))
def test_single_precision_far_from_the_origin_is_as_good_as_near(shape, seed, offset, scale):
    n, m, d = shape
    eps = np.finfo(np.float32).eps
    for shift in (0.0, offset):
        x = points(n, d, seed=seed, scale=scale, dtype=np.float32) + np.float32(shift)
        y = points(m, d, seed=seed + 1, scale=scale, dtype=np.float32) + np.float32(shift)
        exact = exact_distances(x, y)
        np.testing.assert_allclose(squared_distances(x, y), exact, rtol=(d + 6) * eps / 2, atol=8 * (d + 8) * eps)
        # The larger of the two bounds derived beside the rule, and the exponential's own rounding.
        np.testing.assert_allclose(gaussian_kernel(x, y), np.exp(-exact / 2), rtol=0, atol=4 * (d + 9) * eps)


@given(shape=shapes, seed=seeds, offset=st.floats(-1e3, 1e3), scale=st.sampled_from([0.01, 1.0, 100.0]))
def test_agrees_with_scipy(shape, seed, offset, scale):
    n, m, d = shape
    x, y = points(n, d, seed=seed, scale=scale) + offset, points(m, d, seed=seed + 1, scale=scale) + offset
    eps = np.finfo(np.float64).eps
    atol = 8 * (d + 8) * eps if scale < 100 else 0  # nothing is expanded at that spread, unless there is one point
    expected = cdist(x, y, "sqeuclidean")
    np.testing.assert_allclose(squared_distances(x, y), expected, rtol=(2 * d + 8) * eps, atol=atol + 8 * (d + 8) * eps)


@given(seed=seeds, shift=st.integers(-(2**10), 2**10), scale=st.sampled_from([2.0**-8, 1.0]))
def test_translation_invariance(seed, shift, scale):
    # On a grid that both places resolve, so that moving the points rounds nothing.
    rng = np.random.default_rng(seed)
    x, y = (rng.integers(-512, 512, size=(k, 3)).astype(np.float32) * np.float32(scale) for k in (9, 7))
    moved = gaussian_kernel(x + np.float32(shift), y + np.float32(shift), lengthscale=40.0)
    if scale == 1.0:  # sums: differences are exact, so every bit is the same
        np.testing.assert_array_equal(moved, gaussian_kernel(x, y, lengthscale=40.0))
    np.testing.assert_allclose(moved, gaussian_kernel(x, y, lengthscale=40.0), rtol=0, atol=44 * 2.0**-23)


@given(n=st.integers(1, 20), d=st.integers(1, 5), seed=seeds, dtype=st.sampled_from([np.float32, np.float64]))
def test_sums_are_symmetric_with_zero_diagonal(n, d, seed, dtype):
    x = np.concatenate([points(n, d, seed=seed, scale=FAR, dtype=dtype), np.full((1, d), 1e3, dtype)])
    d2 = squared_distances(x, x)
    np.testing.assert_array_equal(d2, d2.T)
    np.testing.assert_array_equal(np.diagonal(d2), 0)
    assert np.all(d2 >= 0)


@given(seed=seeds, scale=st.sampled_from([1e-3, NEAR, 1.0, FAR]))
@pytest.mark.parametrize("kernel", KERNELS)
def test_positive_semidefinite(kernel, seed, scale):
    x = points(30, 2, seed=seed, scale=scale)
    x[10:20] = x[:10]
    k = kernel(x, x)
    np.testing.assert_array_less(k, 1 + 1e-15)
    assert np.min(k) >= 0
    # An entry is good to 4(d + 9) eps, and the norm of 30 × 30 such errors is at most 30 times that.
    assert np.linalg.eigvalsh((k + k.T) / 2)[0] >= -30 * 44 * np.finfo(np.float64).eps


@given(seed=seeds, scale=st.sampled_from([NEAR, FAR]))
def test_permutation_equivariance(seed, scale):
    rng = np.random.default_rng(seed)
    x, y = points(9, 3, seed=seed, scale=scale), points(8, 3, seed=seed + 1, scale=scale)
    p, q = rng.permutation(9), rng.permutation(8)
    permuted, k = gaussian_kernel(x[p], y[q]), gaussian_kernel(x, y)[np.ix_(p, q)]
    np.testing.assert_allclose(permuted, k, rtol=0, atol=0 if scale == FAR else 44 * np.finfo(np.float64).eps)


@pytest.mark.parametrize("kernel", [matern32_kernel, matern52_kernel, laplacian_kernel, gaussian_kernel])
def test_points_whose_distance_overflows_are_infinitely_far(xp, kernel):
    x = xp.asarray(np.asarray([[-1e30], [1e30]], dtype=np.float32))
    np.testing.assert_array_equal(xp.check(kernel(x, x), like=x, shape=(2, 2)), np.eye(2))


def test_tiny_and_huge_lengthscales_lose_nothing(xp):
    # Coordinates of 1e-25 have squares below the smallest float32.
    x = points(6, 3)
    reference = gaussian_kernel(x, x)
    for unit in (1e-25, 1e25):
        x_ = xp.asarray((x * unit).astype(np.float32))
        k = xp.check(gaussian_kernel(x_, x_, lengthscale=unit), like=x_, shape=(6, 6))
        np.testing.assert_allclose(k, reference, rtol=0, atol=20 * 2.0**-23)


# The rule


@pytest.fixture
def counted(monkeypatch):
    """How often each way was taken."""
    calls = {"_sums": 0, "_expansion": 0}

    def counting(name):
        function = getattr(kernels, name)

        def counted(*args):
            calls[name] += 1
            return function(*args)

        return counted

    for name in calls:
        monkeypatch.setattr(kernels, name, counting(name))
    return calls


def test_every_batch_element_goes_its_own_way(xp, counted):
    near, far = points(5, 3, scale=NEAR), points(5, 3, scale=FAR)
    for batch, ways in (([near, near], (0, 1)), ([far, far], (1, 0)), ([near, far], (1, 1))):
        counted.update(_sums=0, _expansion=0)
        x = xp.asarray(np.stack(batch))
        squared_distances(x, x)
        assert (counted["_sums"], counted["_expansion"]) == ways, batch


def test_a_point_that_is_not_finite_spoils_its_own_row_and_column(xp):
    # The expansion, centred on the mean, would spoil them all.
    x = points(5, 3, scale=NEAR)
    x[3, 1] = np.nan
    x_ = xp.asarray(x)
    k = xp.check(gaussian_kernel(x_, x_), like=x_, shape=(5, 5))
    expected = np.zeros((5, 5), dtype=bool)
    expected[3, :] = expected[:, 3] = True
    np.testing.assert_array_equal(np.isnan(k), expected)


def test_the_laplacian_is_never_expanded(counted):
    # Its root would turn an error eps of a squared distance into √eps.
    x = points(5, 3, scale=NEAR, dtype=np.float32)
    k = laplacian_kernel(x, x)
    assert counted == {"_sums": 1, "_expansion": 0}
    np.testing.assert_array_equal(np.diagonal(k), 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize(
    "function", [squared_distances, *KERNELS, lambda x, y: gaussian_matmul(x, y, y)], ids=lambda f: f.__name__
)
def test_batch_elements_are_independent_bit_for_bit(xp, function, bad):
    x, y = points(3, 6, 3, scale=NEAR, dtype=np.float32), points(3, 4, 3, scale=NEAR, seed=1, dtype=np.float32)
    x[1] *= 100
    y[1] *= 100
    like = xp.asarray(x)
    columns = tuple(function(like, xp.asarray(y)).shape)[-1]
    before = xp.check(function(like, xp.asarray(y)), like=like, shape=(3, 6, columns))
    y[2, 0, 0] = bad
    after = xp.check(function(like, xp.asarray(y)), like=like, shape=(3, 6, columns))
    np.testing.assert_array_equal(after[:2], before[:2])
    assert not np.array_equal(after[2], before[2], equal_nan=True)


@pytest.mark.parametrize("function", [squared_distances, gaussian_kernel, lambda x, y: gaussian_matmul(x, y, y)])
def test_batch_is_loop(xp, function):
    x, y = points(3, 6, 3), points(3, 4, 3, seed=1)
    x[1] *= FAR
    x_ = xp.asarray(x)
    batch = function(x_, xp.asarray(y))
    batch = xp.check(batch, like=x_, shape=tuple(batch.shape))
    for i in range(3):
        one = function(xp.asarray(x[i]), xp.asarray(y[i]))
        # Products of another shape round otherwise: (d + 8)·eps·8 for an expansion, e times for a product.
        np.testing.assert_allclose(batch[i], xp.check(one, like=x_, shape=batch[i].shape), rtol=1e-14, atol=1e-13)


def test_chunks_of_rows_change_nothing(monkeypatch):
    x, y = points(2, 37, 3, scale=FAR), points(2, 11, 3, scale=FAR, seed=1)
    whole = squared_distances(x, y)
    monkeypatch.setattr(kernels, "_CACHE_ENTRIES", 100)
    np.testing.assert_array_equal(squared_distances(x, y), whole)
    np.testing.assert_array_equal(squared_distances(torch.asarray(x), torch.asarray(y)).numpy(), whole)


@pytest.mark.parametrize(("n", "m", "d"), [(0, 4, 3), (4, 0, 3), (0, 0, 3), (4, 3, 0)])
def test_empty_blocks(xp, n, m, d):
    x = xp.asarray(np.zeros((2, n, d)))
    k = xp.check(gaussian_kernel(x, xp.asarray(np.zeros((m, d)))), like=x, shape=(2, n, m))
    np.testing.assert_array_equal(k, 1)
    v = xp.asarray(np.ones((m, 2)))
    product = xp.check(gaussian_matmul(x, xp.asarray(np.zeros((m, d))), v), like=x, shape=(2, n, 2))
    np.testing.assert_array_equal(product, m)


# The product


@pytest.mark.parametrize("entries", [7, 2**20])
@pytest.mark.parametrize("scale", [NEAR, [NEAR, FAR]])
def test_product_is_the_dense_product(xp, monkeypatch, entries, scale):
    monkeypatch.setattr(kernels, "_BLOCK_ENTRIES", entries)
    scale = np.reshape(scale, (-1, 1, 1))
    x, y, v = points(2, 9, 3) * scale, points(2, 8, 3, seed=1) * scale, points(4, 1, 8, 5, seed=2)
    x_ = xp.asarray(x)
    product = gaussian_matmul(x_, xp.asarray(y), xp.asarray(v), lengthscale=1.5)
    got = xp.check(product, like=x_, shape=(4, 2, 9, 5))
    # Sums of 8 terms of size 3, each kernel value good to 4(d + 9) eps.
    np.testing.assert_allclose(got, np.exp(-exact_distances(x, y) / 4.5) @ v, rtol=0, atol=8 * 3 * 48 * 2.0**-52)


def test_product_takes_one_rule_for_all_blocks(monkeypatch, counted):
    monkeypatch.setattr(kernels, "_BLOCK_ENTRIES", 16)
    # Each block is within the bound of the expansion by itself, and all of them together are not.
    x = np.repeat(np.asarray([0.0, 50.0, 100.0, 150.0]), 4)[:, None]
    gaussian_matmul(x, x, np.ones((16, 1)))
    assert counted["_expansion"] == 0
    assert counted["_sums"] == 16


def test_memory_of_the_product_is_bounded():
    n = 8000
    x, v = points(n, 2, scale=FAR), np.ones((n, 1))
    tracemalloc.start()
    gaussian_matmul(x, x, v)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Six blocks of float64 at the most, 50 MB; the matrix would be 512 MB.
    assert peak < 6 * 2**20 * 8 < n * n * 8 / 10


# Derivatives


def torch_points(*shape, seed=0, scale=1.0):
    return torch.asarray(points(*shape, seed=seed, scale=scale)).requires_grad_()


# gradcheck's own vmap is deprecated within torch.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("scale", [NEAR, 2.0])  # expansion, sums
@pytest.mark.parametrize("kernel", KERNELS)
def test_torch_derivatives(kernel, scale):
    arguments = (
        torch_points(2, 1, 2, 2, scale=scale),
        torch_points(2, 3, 2, seed=1, scale=scale),
        torch.asarray([0.8, 1.5], dtype=torch.float64).requires_grad_(),
    )

    def function(x, y, ell):
        return kernel(x, y, lengthscale=ell)

    assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, arguments, check_fwd_over_rev=True)


def test_torch_derivatives_of_the_distances_themselves():
    for scale in (NEAR, FAR):
        x, y = torch_points(3, 2, scale=scale), torch_points(2, 4, 2, seed=1, scale=scale)
        # Quadratic, so that differences are exact up to rounding: eps·d²/step.
        assert torch.autograd.gradcheck(squared_distances, (x, y), check_forward_ad=True, atol=1e-4)
        assert torch.autograd.gradgradcheck(squared_distances, (x, y), check_fwd_over_rev=True)


def test_torch_derivatives_of_the_product(monkeypatch):
    monkeypatch.setattr(kernels, "_BLOCK_ENTRIES", 6)
    ell = torch.asarray(1.3, dtype=torch.float64).requires_grad_()
    for scale in (NEAR, 2.0):
        arguments = (torch_points(4, 2, scale=scale), torch_points(5, 2, seed=1, scale=scale), torch_points(5, 2), ell)

        def function(x, y, v, ell):
            return gaussian_matmul(x, y, v, lengthscale=ell)

        assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True)


# Second derivatives compile for seconds: the rule they test is one for all kernels, and torch tests each of them.
@pytest.mark.parametrize(("kernel", "order"), [(kernel, 2 if kernel is gaussian_kernel else 1) for kernel in KERNELS])
def test_jax_derivatives(kernel, order):
    arguments = tuple(jnp.asarray(a) for a in (points(2, 1, 3, 2), points(3, 4, 2, seed=1), np.asarray([0.8, 1.5])))

    @jax.jit
    def function(x, y, ell):
        return kernel(x, y, lengthscale=ell)

    check_grads(function, arguments, order=order, modes=("fwd", "rev"), atol=1e-4, rtol=1e-4)


def test_jax_derivatives_of_the_expansion():
    # Not compiled, for a traced program takes sums.
    arguments = tuple(jnp.asarray(points(k, 2, seed=k, scale=NEAR)) for k in (3, 4))
    check_grads(squared_distances, arguments, order=1, modes=("fwd", "rev"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_derivatives_agree_between_libraries_and_with_the_formula(kernel):
    x, y, g = points(5, 3), points(4, 3, seed=1), points(5, 4, seed=2)
    tx, ty = (torch.asarray(a).requires_grad_() for a in (x, y))
    by_torch = torch.autograd.grad(kernel(tx, ty), (tx, ty), torch.asarray(g))
    by_jax = jax.vjp(kernel, jnp.asarray(x), jnp.asarray(y))[1](jnp.asarray(g))
    for ours, theirs in zip(by_torch, by_jax, strict=True):
        np.testing.assert_allclose(ours.numpy(), np.asarray(theirs), rtol=1e-12, atol=1e-14)
    if kernel is gaussian_kernel:
        weights = g * np.exp(-exact_distances(x, y) / 2)
        expected = -np.sum(weights[:, :, None] * (x[:, None, :] - y[None, :, :]), axis=1)
        np.testing.assert_allclose(by_torch[0].numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kernel", KERNELS)
def test_derivatives_at_coincident_points_are_zero(kernel):
    x = points(4, 3, scale=FAR)
    tx, ty = torch.asarray(x).requires_grad_(), torch.asarray(x[:1].repeat(4, 0)).requires_grad_()
    first = kernel(tx, ty)[:1].sum()
    for gradient in torch.autograd.grad(first, (tx, ty)):
        np.testing.assert_array_equal(gradient.numpy(), 0)
    gradient = jax.grad(lambda a: kernel(a, jnp.asarray(x[:1]))[0, 0])(jnp.asarray(x))
    np.testing.assert_array_equal(np.asarray(gradient), 0)


@pytest.mark.parametrize(
    ("kernel", "curvature"), [(gaussian_kernel, 1.0), (matern32_kernel, 3.0), (matern52_kernel, 5 / 3)]
)
def test_curvature_at_coincident_points(kernel, curvature):
    # k = 1 − (curvature/2) ‖(x − y)/ℓ‖² + …, the first terms of the three series.
    y, expected = np.asarray([[0.3, -0.2]]), -curvature / 4 * np.eye(2)
    hessian = torch.func.hessian(lambda a: kernel(a[None], torch.asarray(y), lengthscale=2.0)[0, 0])(
        torch.asarray(y[0])
    )
    np.testing.assert_allclose(hessian.numpy(), expected, rtol=1e-14, atol=1e-15)
    hessian = jax.jit(jax.hessian(lambda a: kernel(a[None], jnp.asarray(y), lengthscale=2.0)[0, 0]))(jnp.asarray(y[0]))
    np.testing.assert_allclose(np.asarray(hessian), expected, rtol=1e-14, atol=1e-15)


def test_distances_keep_no_block_for_the_way_back():
    x, y = torch_points(50, 8, scale=FAR), torch_points(40, 8, seed=1, scale=FAR)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        squared_distances(x, y)
    assert kept
    assert max(kept) <= 50 * 8


@pytest.mark.parametrize("in_dims", [(0, None), (None, 1), (0, 2), (1, 0)])
@pytest.mark.parametrize("scale", [NEAR, FAR])
def test_torch_vmap(in_dims, scale):
    x, y = torch.asarray(points(4, 2, scale=scale)), torch.asarray(points(3, 5, 2, seed=1, scale=scale))
    copies = torch.arange(1.0, 4.0, dtype=torch.float64)

    def batched(a, dim):
        return a if dim is None else torch.stack([a * k for k in copies], dim=dim)

    x_, y_ = batched(x, in_dims[0]), batched(y, in_dims[1])
    got = torch.func.vmap(gaussian_kernel, in_dims=in_dims)(x_, y_)
    for i in range(3):
        pair = (a if dim is None else a.select(dim, i) for a, dim in zip((x_, y_), in_dims, strict=True))
        torch.testing.assert_close(got[i], gaussian_kernel(*pair), rtol=0, atol=1e-14)


def test_torch_vmap_over_lengthscales_and_products():
    x, y = torch.asarray(points(4, 2)), torch.asarray(points(3, 5, 2, seed=1))
    ells = torch.asarray([[0.5, 1.0], [2.0, 3.0]], dtype=torch.float64)
    got = torch.func.vmap(lambda ell: gaussian_kernel(x, y, lengthscale=ell))(ells)
    by_row = torch.func.vmap(lambda a: gaussian_matmul(a, y, y, lengthscale=2.0))(torch.stack([x, 2 * x]))
    for i in range(2):
        torch.testing.assert_close(got[i], gaussian_kernel(x, y, lengthscale=ells[i]), rtol=0, atol=1e-14)
        expected = gaussian_matmul((i + 1) * x, y, y, lengthscale=2.0)
        torch.testing.assert_close(by_row[i], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [NEAR, FAR])
def test_jit_and_vmap_of_jax(scale):
    x, y = jnp.asarray(points(3, 4, 2, scale=scale)), jnp.asarray(points(3, 5, 2, seed=1, scale=scale))
    expected = np.asarray(gaussian_kernel(x, y))
    # Traced programs take sums where the values here might call for the expansion: 4(d + 9) eps apart at most.
    np.testing.assert_allclose(np.asarray(jax.jit(gaussian_kernel)(x, y)), expected, rtol=0, atol=44 * 2.0**-52)
    np.testing.assert_allclose(np.asarray(jax.vmap(gaussian_kernel)(x, y)), expected, rtol=0, atol=44 * 2.0**-52)
    product = jax.jit(gaussian_matmul)(x, y, y)
    np.testing.assert_allclose(np.asarray(product), np.asarray(gaussian_matmul(x, y, y)), rtol=0, atol=1e-12 * scale)


def test_a_traced_lengthscale_is_not_looked_at():
    x = jnp.asarray(points(3, 2))
    k = jax.jit(lambda ell: gaussian_kernel(x, x, lengthscale=ell))(jnp.asarray(-1.0))
    np.testing.assert_allclose(np.asarray(k), np.asarray(gaussian_kernel(x, x)), rtol=0, atol=44 * 2.0**-52)


@pytest.mark.filterwarnings("ignore:.*lru_cache.*:UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_compile_is_one_graph():
    x, y = torch_points(2, 4, 3, scale=FAR), torch_points(5, 3, seed=1, scale=FAR)

    def function(x, y):
        return gaussian_kernel(x, y, lengthscale=20.0)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    weights = torch.asarray(points(2, 4, 5, seed=2))
    torch.testing.assert_close(compiled(x, y), function(x, y), rtol=0, atol=1e-14)
    ours = torch.autograd.grad(function(x, y), (x, y), weights)
    for a, b in zip(torch.autograd.grad(compiled(x, y), (x, y), weights), ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_autocast_does_not_reach_inside():
    x, y = (torch.asarray(points(6, 3, seed=s, dtype=np.float32)).requires_grad_() for s in (0, 1))
    outside = gaussian_matmul(x, y, y)
    gradient = torch.autograd.grad(outside.sum(), x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gaussian_matmul(x, y, y)
        assert inside.dtype == torch.float32
        torch.testing.assert_close(inside, outside, rtol=0, atol=0)
        torch.testing.assert_close(squared_distances(x, y), squared_distances(x.detach(), y.detach()), rtol=0, atol=0)
        d2 = squared_distances(x, y)
        inside_gradient = torch.autograd.grad(d2.sum(), x)[0]
    torch.testing.assert_close(
        inside_gradient, torch.autograd.grad(squared_distances(x, y).sum(), x)[0], rtol=0, atol=0
    )
    assert gradient.dtype == torch.float32


# Errors


@pytest.mark.parametrize("function", [squared_distances, *KERNELS])
def test_refused_points(xp, function):
    x, y = xp.asarray(points(4, 3)), xp.asarray(points(5, 3))
    with pytest.raises(ValueError, match=r"x must have at least two axes.*\(3,\)"):
        function(xp.asarray(points(3)), y)
    with pytest.raises(ValueError, match=r"\(4, 3\) and y \(5, 2\).*features"):
        function(x, xp.asarray(points(5, 2)))
    with pytest.raises(ValueError, match=r"leading axes must broadcast.*\(2, 4, 3\).*\(3, 5, 3\)"):
        function(xp.asarray(points(2, 4, 3)), xp.asarray(points(3, 5, 3)))
    with pytest.raises(TypeError, match="float64 and y has dtype"):
        function(x, xp.asarray(points(5, 3, dtype=np.float32)))
    with pytest.raises(TypeError, match="floating dtype"):
        function(xp.asarray(np.ones((4, 3), dtype=np.int32)), xp.asarray(np.ones((5, 3), dtype=np.int32)))
    with pytest.raises(TypeError, match="floating dtype"):
        function(xp.asarray(np.ones((4, 3), dtype=bool)), xp.asarray(np.ones((5, 3), dtype=bool)))
    with pytest.raises(TypeError, match=r"complex128.*real floating"):
        function(xp.asarray(np.ones((4, 3), dtype=complex)), xp.asarray(np.ones((5, 3), dtype=complex)))
    with pytest.raises(TypeError, match="must be an array, not list"):
        function(x, [[0.0, 0.0, 0.0]])


def test_refused_mixtures():
    x = points(4, 3)
    for function in (squared_distances, *KERNELS):
        with pytest.raises(TypeError, match="bring both to one library"):
            function(x, torch.asarray(x))
        with pytest.raises(ValueError, match="on meta"):
            function(torch.asarray(x), torch.empty(4, 3, dtype=torch.float64, device="meta"))
    with pytest.raises(TypeError, match="bring both to one library"):
        gaussian_kernel(x, x, lengthscale=torch.ones(3))


@pytest.mark.parametrize(
    "kernel", [*KERNELS, lambda x, y, lengthscale: gaussian_matmul(x, y, y, lengthscale=lengthscale)]
)
def test_refused_lengthscales(xp, kernel):
    x = xp.asarray(points(4, 3))
    for bad in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match=f"positive and finite, not {bad}"):
            kernel(x, x, lengthscale=bad)
        with pytest.raises(ValueError, match="positive and finite"):
            kernel(x, x, lengthscale=xp.asarray(np.asarray([1.0, bad, 1.0])))
    with pytest.raises(ValueError, match=r"lengthscale has shape \(2,\) and x \(4, 3\)"):
        kernel(x, x, lengthscale=xp.asarray(np.ones(2)))
    with pytest.raises(ValueError, match=r"lengthscale has shape \(1, 3\)"):
        kernel(x, x, lengthscale=xp.asarray(np.ones((1, 3))))
    with pytest.raises(TypeError, match="lengthscale has dtype"):
        kernel(x, x, lengthscale=xp.asarray(np.ones(3, dtype=np.int32)))
    with pytest.raises(TypeError, match="lengthscale has dtype"):
        kernel(x, x, lengthscale=xp.asarray(np.ones(3, dtype=complex)))
    with pytest.raises(TypeError, match="lengthscale must be an array, not list"):
        kernel(x, x, lengthscale=[1.0, 1.0, 1.0])


def test_refused_values_of_the_product(xp):
    x, y = xp.asarray(points(2, 4, 3)), xp.asarray(points(5, 3))
    with pytest.raises(ValueError, match=r"v has shape \(4, 2\) and y \(5, 3\); v needs one row"):
        gaussian_matmul(x, y, xp.asarray(points(4, 2)))
    with pytest.raises(ValueError, match=r"v must have at least two axes"):
        gaussian_matmul(x, y, xp.asarray(points(5)))
    with pytest.raises(ValueError, match=r"leading axes must broadcast"):
        gaussian_matmul(x, y, xp.asarray(points(3, 5, 2)))
    with pytest.raises(TypeError, match="v has dtype"):
        gaussian_matmul(x, y, xp.asarray(points(5, 2, dtype=np.float32)))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_gradients_of_single_elements_under_vmap():
    x = torch.asarray(points(3, 6, 2))

    def total(x):
        return gaussian_matmul(x, x, x, lengthscale=torch.ones(2, dtype=x.dtype)).sum()

    together = torch.func.vmap(torch.func.grad(total))(x)
    torch.testing.assert_close(together, torch.stack([torch.func.grad(total)(element) for element in x]))


# The median distance


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_median_lengthscale_is_the_median_distance(xp, dtype):
    x = points(30, 3, scale=FAR, dtype=dtype)
    found = median_lengthscale(xp.asarray(x))
    assert isinstance(found, float)
    expected = np.median(np.sqrt(exact_distances(x, x))[np.triu_indices(30, 1)])
    # The sum over 3 features, the quotients and the root: some 6 roundings.
    assert found == pytest.approx(expected, rel=6 * float(np.finfo(dtype).eps))


def test_the_median_lengthscale_of_many_points_is_near_that_of_all(xp):
    x = points(700, 2, seed=3)
    distances = np.sort(np.sqrt(exact_distances(x, x))[np.triu_indices(700, 1)])
    found = median_lengthscale(xp.asarray(x), rng=5)
    # The share of distances below the median of 2¹⁶ pairs has the standard deviation ½/2⁸; five of them.
    assert np.searchsorted(distances, found) / distances.size == pytest.approx(0.5, abs=2.5 / 2**8)
    assert median_lengthscale(x, rng=5) == pytest.approx(found, rel=1e-14)  # every library draws the same pairs
    assert median_lengthscale(x, rng=6) != found


def test_pairs_are_of_distinct_points_and_all_alike():
    first, second = kernels._pairs(400, np.random.default_rng(0))
    assert first.size == 2**16
    assert np.all(first != second)
    for drawn in (first, second):
        counts = np.bincount(drawn, minlength=400)
        # χ² with 399 degrees of freedom is 399 ± 28; six of them.
        assert np.sum((counts - 2**16 / 400) ** 2) / (2**16 / 400) < 399 + 6 * 28


def test_the_median_lengthscale_takes_little_memory():
    x = points(200_000, 40, dtype=np.float32)
    tracemalloc.start()
    median_lengthscale(x, rng=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A few arrays of 2¹⁸ coordinates and of 2¹⁶ pairs; all points would be 32 MB, all pairs 160 GB.
    assert peak < 10e6


def test_the_median_lengthscale_does_not_overflow():
    x = np.asarray([[0.0], [3e30], [4e30]], dtype=np.float32)
    assert median_lengthscale(x) == pytest.approx(3e30, rel=1e-6)
    assert median_lengthscale(torch.asarray([[0.0], [3.0], [4.0]], dtype=torch.bfloat16)) == 3.0


def test_refused_median_lengthscales(xp):
    with pytest.raises(ValueError, match=r"at least two points.*\(1, 2\)"):
        median_lengthscale(xp.asarray(points(1, 2)))
    with pytest.raises(ValueError, match=r"at least two points.*\(2, 3, 4\)"):
        median_lengthscale(xp.asarray(points(2, 3, 4)))
    with pytest.raises(ValueError, match=r"is 0\.0, for most points coincide"):
        median_lengthscale(xp.asarray(np.full((6, 2), 7.3)))
    with pytest.raises(ValueError, match="is nan, for it holds NaN"):
        median_lengthscale(xp.asarray(np.full((6, 2), np.nan)))
    with pytest.raises(TypeError, match="rng must be None"):
        median_lengthscale(xp.asarray(points(6, 2)), rng="seed")


def test_the_median_lengthscale_is_not_for_traced_programs():
    with pytest.raises(TypeError, match="traced program"):
        jax.jit(median_lengthscale)(jnp.ones((4, 2)))
