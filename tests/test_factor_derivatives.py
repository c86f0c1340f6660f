"""Derivatives of the factor and of what is asked of it, with the rows that are landmarks held fixed."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import gaussian_gram
from jax.test_util import check_grads
from test_factor import PIVOTS, gaussian, points

from lowrank.factor import nystrom
from lowrank.kernels import gaussian_kernel, squared_distances


def dense_evidence(k, y, ridge, xp):
    """log N(y; 0, K + ridge·I) without the constant, by dense factors."""
    lower = xp.linalg.cholesky(k + ridge * xp.eye(k.shape[0], dtype=k.dtype))
    half = xp.linalg.solve(lower, y)
    return -0.5 * half @ half - xp.sum(xp.log(xp.diagonal(lower)))


def evidence(result, y, ridge):
    return -0.5 * (y @ result.solve(y, ridge=ridge)) - 0.5 * result.logdet(ridge=ridge)


def test_torch_derivatives_are_those_of_the_dense_formula():
    x, z, y = (torch.asarray(a) for a in (points(12, 2), points(4, 2, seed=1), points(12, seed=2)))
    ell, ridge = torch.asarray([0.8, 1.2], dtype=torch.float64), torch.asarray(0.3, dtype=torch.float64)
    inputs = [a.clone().requires_grad_() for a in (x, z, ell, ridge)]

    def ours(x, z, ell, ridge):
        return evidence(nystrom(x, kernel=gaussian(ell), landmarks=z), y, ridge)

    def by_hand(x, z, ell, ridge):
        def k(a, b):
            return torch.exp(-0.5 * torch.sum(((a[:, None] - b[None]) / ell) ** 2, dim=-1))

        return dense_evidence(k(x, z) @ torch.linalg.inv(k(z, z)) @ k(z, x), y, ridge, torch)

    got, expected = ours(*inputs), by_hand(*inputs)
    # W has a condition number below 10 and K + ridge·I below 40; derivatives are of size 10.
    assert got.item() == pytest.approx(expected.item(), rel=1e-11)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(ours, inputs)
    assert torch.autograd.gradgradcheck(ours, inputs)


@pytest.mark.parametrize("by", ["indices", "uniform", "segment_means", "matrix"])
def test_torch_derivatives_of_everything(by):
    x = torch.asarray(points(10, 2)).requires_grad_()
    ell = torch.asarray(0.9, dtype=torch.float64, requires_grad=True)
    new = torch.asarray(points(3, 2, seed=5))

    def everything(x, ell):
        if by == "matrix":
            k = gaussian_kernel(x, x, lengthscale=ell)
            result, rows = nystrom(k, kernel=None, landmarks=[1, 8, 4]), k[:3, [1, 8, 4]]
        else:
            choice = {"landmarks": [1, 8, 4]} if by == "indices" else {"landmarks": by, "rank": 3, "rng": 0}
            result, rows = nystrom(x, kernel=gaussian(ell), **choice), new
        short = result.truncate(rank=2)
        return (
            result.to_dense(),
            result.diagonal(),
            result.trace_error,
            result.features(rows),
            short.to_dense(),
            short.trace_error,
            result.logdet(ridge=0.1),
            result.solve(x, ridge=0.1),
        )

    assert torch.autograd.gradcheck(everything, (x, ell))


def test_single_precision_trains_as_double_does():
    x, y = points(30, 2), points(30, seed=2)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        x_, y_ = torch.asarray(x).to(dtype), torch.asarray(y).to(dtype)
        ell = torch.asarray(0.8, dtype=dtype, requires_grad=True)
        evidence(nystrom(x_, kernel=gaussian(ell), landmarks=PIVOTS), y_, 0.5).backward()
        gradients.append(ell.grad.item())
    # Condition numbers below 100 (of W) and 60 (of K + ridge·I), in eps of single precision.
    assert gradients[0] == pytest.approx(gradients[1], rel=6000 * 1.2e-7)


def test_the_evidence_finds_the_lengthscale():
    rng = np.random.default_rng(0)
    x = rng.uniform(-4, 4, size=(150, 1))
    y = np.linalg.cholesky(gaussian_gram(x, 0.7) + 1e-2 * np.eye(150)) @ rng.standard_normal(150)
    x_, y_ = torch.asarray(x), torch.asarray(y)
    log_ell = torch.zeros((), dtype=torch.float64).add(np.log(3.0)).requires_grad_()
    log_ridge = torch.zeros((), dtype=torch.float64).requires_grad_()
    z = torch.linspace(-4, 4, 40, dtype=torch.float64)[:, None]
    optimiser = torch.optim.LBFGS([log_ell, log_ridge], max_iter=40, line_search_fn="strong_wolfe")

    def step():
        optimiser.zero_grad()
        loss = -evidence(nystrom(x_, kernel=gaussian(log_ell.exp()), landmarks=z), y_, log_ridge.exp())
        loss.backward()
        return loss

    optimiser.step(step)
    assert step().item() < 0.5 * 150  # far below that of the start, 3 and 1
    assert 0.5 < log_ell.exp().item() < 1.0
    assert 0.5e-2 < log_ridge.exp().item() < 2e-2


def test_choosing_landmarks_does_not_see_derivatives():
    seen = []

    def choose(x, /, *, rank, kernel, rng):
        seen.append(kernel(x, x).requires_grad)
        return [1, 8, 4]

    x = torch.asarray(points(10, 2)).requires_grad_()
    ell = torch.ones((), dtype=torch.float64, requires_grad=True)
    chosen = nystrom(x, kernel=gaussian(ell), landmarks=choose, rank=3)
    given = nystrom(x, kernel=gaussian(ell), landmarks=[1, 8, 4])
    assert seen == [False]
    gradients = [torch.autograd.grad(result.logdet(ridge=0.1), (x, ell)) for result in (chosen, given)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert gradients[0][1].abs().item() > 0.1


def test_jax_derivatives_are_torch_derivatives():
    x, z, y = points(12, 2), points(4, 2, seed=1), points(12, seed=2)

    def ours(x, z, ell, ridge, y):
        return evidence(nystrom(x, kernel=gaussian(ell), landmarks=z), y, ridge)

    arguments = (x, z, np.asarray([0.8, 1.2]), np.asarray(0.3))
    compiled = jax.jit(ours)
    inputs = [torch.asarray(a).requires_grad_() for a in arguments]
    expected = ours(*inputs, torch.asarray(y))
    here = [jnp.asarray(a) for a in arguments]
    assert float(compiled(*here, jnp.asarray(y))) == pytest.approx(expected.item(), rel=1e-11)
    assert float(ours(*here, jnp.asarray(y))) == pytest.approx(expected.item(), rel=1e-11)
    got = jax.grad(compiled, argnums=(0, 1, 2, 3))(*here, jnp.asarray(y))
    for a, b in zip(got, torch.autograd.grad(expected, inputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    check_grads(lambda *a: compiled(*a, jnp.asarray(y)), tuple(here), order=1)


def test_jax_programs():
    x = jnp.asarray(points(12, 2))

    @jax.jit
    def rows(x, pivots):
        by_index, drawn = nystrom(x, landmarks=pivots), nystrom(x, rank=3, rng=0)
        assert "trace_error=traced" in repr(drawn)
        return by_index.features(x), drawn.truncate(rank=2).to_dense()

    pivots = jnp.asarray([3, 7, 0])
    got, dense_rows = rows(x, pivots)
    np.testing.assert_allclose(got, nystrom(x, landmarks=pivots).factor, atol=1e-12)
    np.testing.assert_allclose(dense_rows, nystrom(x, rank=3, rng=0).truncate(rank=2).to_dense(), atol=1e-12)
    # Values are not known there: what is refused elsewhere is NaN.
    bad = jax.jit(lambda x: nystrom(x, kernel=squared_distances, landmarks=[1, 2, 3]).logdet(ridge=0.1))(x)
    assert np.isnan(float(bad))
    with pytest.raises(TypeError, match="rank found by rtol"):
        jax.jit(lambda x: nystrom(x, rank=3, rng=0).truncate(rtol=0.1).factor)(x)


def test_jax_without_double_precision():
    # A process of its own, for the setting is the process's.
    program = """
import functools, warnings
warnings.simplefilter("error")
import jax, numpy as np
from lowrank.factor import nystrom
from lowrank.kernels import gaussian_kernel
rng = np.random.default_rng(0)
for x in (rng.standard_normal((80, 2)), np.full((80, 2), 7.3), 1e4 + rng.standard_normal((80, 2))):
    x = x.astype(np.float32)
    for ell in (1e-3, 1.0, 1e3):
        k = np.exp(-0.5 * np.sum((x[:, None].astype(float) - x[None]) ** 2, axis=-1) / ell**2)
        for landmarks in (np.arange(80), np.arange(0, 80, 3)):
            kernel = functools.partial(gaussian_kernel, lengthscale=ell)
            result = nystrom(jax.numpy.asarray(x), kernel=kernel, landmarks=landmarks)
            f = np.asarray(result.factor).astype(float)
            print(np.linalg.eigvalsh(k - f @ f.T)[0] / np.linalg.norm(k, 2), result.logdet(ridge=0.1).dtype)
"""
    environment = {**os.environ, "JAX_ENABLE_X64": "0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 18
    for lowest, dtype in lines:
        assert float(lowest) >= -5 * np.finfo(np.float32).eps
        assert dtype == "float32"


def test_functions_of_torch_transform():
    x, y = torch.asarray(points(10, 2)), torch.asarray(points(10, seed=2))

    def loss(ell):
        return evidence(nystrom(x, kernel=gaussian(ell), landmarks=[1, 8, 4]), y, 0.5)

    ell = torch.asarray(0.9, dtype=torch.float64)
    eager = ell.clone().requires_grad_()
    expected = torch.autograd.grad(loss(eager), eager)[0]
    torch.testing.assert_close(torch.func.grad(loss)(ell), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("landmarks", ["uniform", "indices", "made there", "segment_means", "points"])
def test_landmarks_under_functions_of_torch_transform(landmarks):
    """Chosen by their numbers, which the tensors that torch.func follows do not hold themselves."""
    indices = torch.asarray([1, 8, 4])

    def loss(x):
        made = {"indices": indices, "made there": torch.asarray([1, 8, 4]), "points": x[::3] + 0.5}
        chosen = made.get(landmarks, landmarks)
        rank = 3 if isinstance(chosen, str) else None
        return nystrom(x, landmarks=chosen, rank=rank, rng=0).factor.square().cos().sum()

    x = torch.asarray(points(10, 2))
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(loss(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.func.jacrev(loss)(x), expected, rtol=1e-10, atol=1e-12)
    _, along = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(along, expected.sum(), rtol=1e-10, atol=1e-12)
