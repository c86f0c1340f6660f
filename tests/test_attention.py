"""softmax_free_attention against its dense formula in fp64, on every array library."""

from functools import partial

import array_api_strict
import jax
import numpy as np
import pytest
import torch

from lowrank import pinv
from lowrank.attention import softmax_free_attention
from lowrank.pinv import pinv_newton

RIDGE = 0.01


def points(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def dense(q, v, z, *, lengthscale=None, ridge=RIDGE, normalize=False):
    """C A⁺ Cᵀ v in fp64, by direct sums, NumPy's inverse and the n × n matrix."""
    ell = q.shape[-1] ** 0.25 if lengthscale is None else np.asarray(lengthscale, dtype=np.float64)
    q, v, z = (np.asarray(x, dtype=np.float64) for x in (q, v, z))

    def kernel(x, y):
        return np.exp(-0.5 * np.sum(((x[..., :, None, :] - y[..., None, :, :]) / ell) ** 2, axis=-1))

    c, a = kernel(q, z), kernel(z, z)
    core = np.linalg.inv(a + ridge * np.eye(a.shape[-1]))
    if normalize:
        scale = 1 / np.sqrt(a.sum(-1))
        core = scale[..., :, None] * core * scale[..., None, :]
    return c @ core @ np.swapaxes(c, -1, -2) @ v


def tolerance(q, z, v, eps):
    """c·κ·eps·size: the inverse's share is κ·eps with κ ≤ 1 + m/δ, and |X| ≤ ‖C‖‖A⁺‖‖C‖|v| ≤ n m/δ·max|v| is
    reached in no entry here, so √(n m)·max|v| stands for what is multiplied."""
    n, m = q.shape[-2], z.shape[-2]
    return 4 * (1 + m / RIDGE) * eps * np.sqrt(n * m) * np.max(np.abs(v))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("lengthscale", [None, 0.7, [0.5, 1.0, 2.0, 4.0]])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_agrees_with_the_dense_formula(xp, dtype, lengthscale, normalize):
    q, v, z = (x.astype(dtype) for x in (points(1, 2, 3, 40, 4), points(2, 2, 3, 40, 5), points(3, 2, 3, 8, 4)))
    options = {"normalize": normalize}
    expected = dense(q, v, z, lengthscale=lengthscale, **options)
    if isinstance(lengthscale, list):
        lengthscale = xp.asarray(np.asarray(lengthscale, dtype=dtype))
    like = xp.asarray(q)
    result = softmax_free_attention(like, xp.asarray(v), xp.asarray(z), lengthscale=lengthscale, **options)
    values = xp.check(result, like, (2, 3, 40, 5))
    np.testing.assert_allclose(values, expected, rtol=0, atol=tolerance(q, z, v, np.finfo(dtype).eps))


def test_batch_axes_broadcast(xp):
    q, v, z = points(1, 40, 4), points(2, 3, 1, 40, 5), points(3, 2, 8, 4)
    like = xp.asarray(q)
    values = xp.check(softmax_free_attention(like, xp.asarray(v), xp.asarray(z)), like, (3, 2, 40, 5))
    for i in range(3):
        for j in range(2):
            # The loop multiplies the same matrices in another order at most.
            expected = dense(q, v[i, 0], z[j])
            np.testing.assert_allclose(values[i, j], expected, rtol=0, atol=tolerance(q, z, v, 2.3e-16))


def test_all_tokens_as_landmarks_give_the_full_gram_matrix(xp):
    # On a lattice three lengthscales wide κ(K) < 2, and K K⁻¹ K = K without any ridge.
    q = 3.0 * np.stack(np.meshgrid(np.arange(4.0), np.arange(5.0)), -1).reshape(20, 2)
    v = points(4, 20, 3)
    gram = np.exp(-0.5 * np.sum((q[:, None] - q) ** 2, axis=-1))
    like = xp.asarray(q)
    result = softmax_free_attention(like, xp.asarray(v), xp.asarray(q), lengthscale=1.0, ridge=0.0)
    # κ·eps, and the expansion's eps·‖q − z̄‖²/ℓ², here 61 at most, in every entry of C.
    np.testing.assert_allclose(xp.check(result, like, (20, 3)), gram @ v, rtol=0, atol=20 * 61 * 2.3e-16 * 3)


def test_the_ridge_is_a_bias_of_its_own_size():
    q = 3.0 * np.stack(np.meshgrid(np.arange(4.0), np.arange(5.0)), -1).reshape(20, 2)
    gram = np.exp(-0.5 * np.sum((q[:, None] - q) ** 2, axis=-1))
    errors = []
    for ridge in (1e-2, 1e-4, 1e-6):
        x = softmax_free_attention(q, np.eye(20), q, lengthscale=1.0, ridge=ridge)
        errors.append(np.linalg.norm(x - gram, 2) / ridge)
    # K − K(K + δ)⁻¹K = δK(K + δ)⁻¹, of norm between 1/2 and 1 in units of δ.
    assert np.all((np.array(errors) > 0.5) & (np.array(errors) < 1.0)), errors


@pytest.mark.parametrize("normalize", [False, True])
def test_linear_in_the_values(normalize):
    q, z, v, w = points(1, 30, 4), points(2, 6, 4), points(3, 30, 2), points(4, 30, 2)
    f = partial(softmax_free_attention, normalize=normalize)
    np.testing.assert_allclose(
        f(q, 2.0 * v - 3.0 * w, z), 2.0 * f(q, v, z) - 3.0 * f(q, w, z), rtol=0, atol=5 * tolerance(q, z, v, 2.3e-16)
    )


@pytest.mark.parametrize("asarray", [np.asarray, torch.asarray], ids=["numpy", "torch"])
def test_batch_elements_are_independent(asarray):
    q, v, z = points(1, 5, 40, 4), points(2, 5, 40, 3), points(3, 5, 8, 4)
    together = np.asarray(softmax_free_attention(*map(asarray, (q, v, z))))
    for i in range(5):
        alone = np.asarray(softmax_free_attention(*(asarray(x[i]) for x in (q, v, z))))
        np.testing.assert_allclose(together[i], alone, rtol=0, atol=tolerance(q, z, v, 2.3e-16))
    z_bad = z.copy()
    z_bad[2, 0, 0] = np.nan
    beside_nan = np.asarray(softmax_free_attention(*map(asarray, (q, v, z_bad))))
    assert np.all(np.isnan(beside_nan[2]))
    others = [0, 1, 3, 4]
    assert np.array_equal(beside_nan[others], together[others])


def test_a_common_offset_changes_nothing_but_the_rounding_of_the_input():
    q, v, z = points(1, 100, 4), points(2, 100, 3), points(3, 8, 4)
    # An offset of 100 rounds the points themselves to eps·100, and that is all: uncentred, distances would be
    # off by eps·100² and A + δI not even positive definite.
    q32, z32, v32 = ((x + s).astype(np.float32) for x, s in ((q, 100.0), (z, 100.0), (v, 0.0)))
    result = softmax_free_attention(q32, v32, z32)
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(result, dense(q32, v32, z32), rtol=0, atol=tolerance(q, z, v, eps))


def test_memory_is_linear_in_the_tokens():
    # The n × n matrix would take 160 GB; a block of C takes 26 MB.
    n = 200_000
    q = np.linspace(-3.0, 3.0, n, dtype=np.float32)[:, None]
    z = np.linspace(-3.0, 3.0, 32, dtype=np.float32)[:, None]
    x = softmax_free_attention(q, np.ones((n, 1), dtype=np.float32), z, lengthscale=0.5)
    # Away from the ends the kernel sums to √(2π)ℓ·n/6; the ridge and the Nyström error take a per cent or two.
    assert x.shape == (n, 1)
    assert x[n // 2, 0] == pytest.approx(np.sqrt(2 * np.pi) * 0.5 * n / 6, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_feature", [False, True])
def test_half_precision_is_computed_in_single(dtype, per_feature):
    q, v, z = (torch.asarray(x).to(dtype) for x in (points(1, 40, 4), points(2, 40, 3), points(3, 8, 4)))
    ell = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=dtype) if per_feature else 1.5
    result = softmax_free_attention(q, v, z, lengthscale=ell)
    assert result.dtype == dtype
    expected = dense(*(x.double().numpy() for x in (q, v, z)), lengthscale=ell if not per_feature else ell.double())
    # One rounding to the dtype at the end, of numbers up to max|X|; fp32's error is smaller by far.
    np.testing.assert_allclose(
        result.double().numpy(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps * np.max(np.abs(expected))
    )


@pytest.mark.parametrize("empty", [0, 1, 2], ids=["q", "v", "landmarks"])
@pytest.mark.parametrize("library", [np.asarray, torch.asarray], ids=["numpy", "torch"])
def test_a_batch_may_be_empty_of_any_of_the_arrays(empty, library):
    arrays = [points(1, 5, 4), points(2, 5, 3), points(3, 2, 4)]
    arrays[empty] = arrays[empty][None][:0]
    assert tuple(softmax_free_attention(*map(library, arrays)).shape) == (0, 5, 3)


def test_autocast_does_not_reach_inside():
    q, v, z = (torch.asarray(x, dtype=torch.float32) for x in (points(1, 40, 4), points(2, 40, 3), points(3, 8, 4)))
    plain = softmax_free_attention(q, v, z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = softmax_free_attention(q, v, z)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, plain)


@pytest.mark.parametrize("normalize", [False, True])
def test_torch_gradients(normalize):
    q, v, z = (torch.asarray(x).requires_grad_() for x in (points(1, 2, 7, 3), points(2, 2, 7, 2), points(3, 2, 4, 3)))
    f = partial(softmax_free_attention, ridge=0.1, normalize=normalize)
    assert torch.autograd.gradcheck(f, (q, v, z))


def test_jax_jit_and_gradient_agree_with_torch():
    arrays = points(1, 2, 7, 3), points(2, 2, 7, 2), points(3, 2, 4, 3)
    weight = points(4, 2, 7, 2)

    def loss(q, v, z):
        return jax.numpy.sum(softmax_free_attention(q, v, z, lengthscale=1.2, normalize=True) * weight)

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*map(jax.numpy.asarray, arrays))
    tensors = [torch.asarray(x).requires_grad_() for x in arrays]
    expected = (softmax_free_attention(*tensors, lengthscale=1.2, normalize=True) * torch.asarray(weight)).sum()
    expected.backward()
    # A gradient passes the inverse twice, κ²·eps with κ ≤ 1 + 4/0.01.
    assert float(value) == pytest.approx(expected.item(), abs=1e-10)
    for ours, theirs in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(ours, theirs.grad, rtol=0, atol=401**2 * 2.3e-16 * 100)


def test_a_custom_inverse_sees_the_core_and_the_ridge():
    q, v, z = points(1, 40, 4), points(2, 40, 3), points(3, 8, 4)
    seen = {}

    def inverse(a, **options):
        seen.update(options, a=a)
        return np.linalg.inv(a + options["ridge"] * np.eye(a.shape[-1]))

    result = softmax_free_attention(q, v, z, ridge=0.2, inverse=inverse)
    assert {k: seen[k] for k in seen if k != "a"} == {"hermitian": True, "ridge": 0.2}
    np.testing.assert_allclose(np.diag(seen["a"]), 1.0, rtol=0, atol=1e-14)
    np.testing.assert_allclose(result, dense(q, v, z, ridge=0.2), rtol=0, atol=tolerance(q, z, v, 2.3e-16))


def test_textbook_steps_approach_the_inverse_from_afar():
    q, v, z = points(1, 40, 4), points(2, 40, 3), points(3, 20, 4)
    exact = dense(q, v, z, lengthscale=3.0)
    error = {
        steps: np.linalg.norm(
            softmax_free_attention(q, v, z, lengthscale=3.0, inverse=partial(pinv_newton, steps=steps)) - exact
        )
        for steps in (5, 20, 40)
    }
    # 20 steps leave eigenvalues below 2⁻¹⁰ of the largest where they were, 40 none that the ridge allows.
    assert error[40] < 1e-9 < error[20] < error[5]


def test_the_default_inverse_is_looked_up_at_the_call(monkeypatch):
    q, v, z = points(1, 10, 4), points(2, 10, 3), points(3, 4, 4)
    monkeypatch.setattr(pinv, "pinv_newton", lambda a, **options: np.zeros_like(a))
    assert np.array_equal(softmax_free_attention(q, v, z), np.zeros((10, 3)))


@pytest.mark.parametrize("asarray", [np.asarray, torch.asarray], ids=["numpy", "torch"])
def test_empty_axes(asarray):
    def attend(n, e, m, d):
        return np.asarray(softmax_free_attention(*(asarray(np.ones(shape)) for shape in ((n, d), (n, e), (m, d)))))

    assert attend(0, 3, 4, 2).shape == (0, 3)
    assert attend(5, 0, 4, 2).shape == (5, 0)
    assert np.array_equal(attend(5, 3, 0, 2), np.zeros((5, 3)))  # no landmark, a factor of rank 0
    # Points without features coincide: C = A = 1, and X = 5/(1 + δ).
    np.testing.assert_allclose(attend(5, 3, 1, 0), np.full((5, 3), 5 / 1.01), rtol=1e-14)


def f64(*shape):
    return np.zeros(shape)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((f64(5), f64(5, 2), f64(3, 4)), {}, ValueError, r"q must have at least two axes.*\(5,\)"),
        ((f64(5, 4), f64(5), f64(3, 4)), {}, ValueError, r"v must have at least two axes.*\(5,\)"),
        ((f64(5, 4), f64(5, 2), f64(3, 3)), {}, ValueError, r"q has shape \(5, 4\) and landmarks \(3, 3\).*features"),
        ((f64(5, 4), f64(6, 2), f64(3, 4)), {}, ValueError, r"q has shape \(5, 4\) and v \(6, 2\).*tokens"),
        ((f64(2, 5, 4), f64(5, 2), f64(3, 3, 4)), {}, ValueError, r"must broadcast.*\(2, 5, 4\).*\(3, 3, 4\)"),
        ((f64(5, 4), f64(5, 2), f64(3, 4)), {"lengthscale": 0.0}, ValueError, "lengthscale"),
        ((f64(5, 4), f64(5, 2), f64(3, 4)), {"lengthscale": np.array([1.0, 2.0, 0.0, 1.0])}, ValueError, "lengthscale"),
        ((f64(5, 4), f64(5, 2), f64(3, 4)), {"lengthscale": np.ones(3)}, ValueError, "lengthscale"),
        ((f64(5, 4), f64(5, 2), f64(3, 4)), {"ridge": -0.1}, ValueError, "ridge must be .* >= 0, not -0.1"),
        ((f64(5, 4), f64(5, 2), f64(3, 4)), {"ridge": np.nan}, ValueError, "ridge must be .* >= 0, not nan"),
        (
            (f64(5, 4), f64(5, 2), np.zeros((3, 4), np.float32)),
            {},
            TypeError,
            "float64 and landmarks has dtype float32",
        ),
        ((np.zeros((5, 4), int), f64(5, 2), f64(3, 4)), {}, TypeError, "q has dtype int64"),
        ((f64(5, 4) + 0j, f64(5, 2) + 0j, f64(3, 4) + 0j), {}, TypeError, "complex128.*real floating"),
        ((f64(5, 4), torch.zeros(5, 2, dtype=torch.float64), f64(3, 4)), {}, TypeError, "one library"),
        ((f64(5, 4), f64(5, 2), array_api_strict.zeros((3, 4))), {}, TypeError, "one library"),
        (([[0.0]], f64(1, 2), f64(3, 1)), {}, TypeError, "q must be an array, not list"),
    ],
)
def test_errors_name_the_argument(arguments, options, error, message):
    with pytest.raises(error, match=message):
        softmax_free_attention(*arguments, **options)
