"""The core of attention by compiled kernels against its formulas, and what they promise besides."""

import array_api_compat
import pytest
import torch

from lowrank import (
    _attend,
    _definite,
    _native,
    _native_core,
    attention,
    pinv,
    pinv_newton,
    softmax_free_attention,
)
from lowrank.kernels import gaussian_kernel

pytestmark = pytest.mark.skipif(not _native.is_built(), reason="no C compiler was found when lowrank was installed")
EPS = 2.0**-23
XP = array_api_compat.array_namespace(torch.zeros(1))


def landmarks(*shape, spread=0.5, seed=0):
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gram(z, ridge):
    return _native_core.gram(z, z.new_zeros(*z.shape[:-2], 1, z.shape[-1]), 1.0, ridge)


def core_of(z, ridge):
    """M and P."""
    a, system = gram(z, ridge)
    return attention._approximate_inverse(a, ridge, "newton", XP), system


def tolerance(z):
    """What the steps leave, and rounding, which meets the condition."""
    return EPS ** (1 / 3), 8 * EPS * z.shape[-2] ** 0.5


SHAPES = [(1, 1), (2, 3, 7, 5), (1, 1, 49, 32), (2, 128, 64), (3, 16, 16), (1, 17, 33)]


@pytest.mark.parametrize("ridge", [0.01, 1e-3, 10.0])
@pytest.mark.parametrize("spread", [0.02, 0.5, 3.0], ids=["near", "usual", "far"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_are_the_gram_matrix_and_nearly_its_inverse(shape, spread, ridge, width):
    z = landmarks(*shape, spread=spread)
    m = shape[-2]
    core, system = core_of(z, ridge)
    exact, eye = gaussian_kernel(z.double(), z.double()), torch.eye(m, dtype=torch.float64)
    assert core.shape == system.shape == (*shape[:-1], m)
    assert torch.equal(system, system.mT)
    # The kernels' exponential, and the expansion's rounding, of d products.
    size = z.double().square().sum(-1).amax()
    assert ((system - (exact + ridge * eye)).abs() <= 1e-12 + 8 * shape[-1] * size * 2.0**-52).all()
    left, rounding = tolerance(z)
    off = torch.linalg.matrix_norm(eye - core.double() @ system.double(), 2)
    assert (off <= left + rounding * (1 + m / ridge)).all()


def test_landmarks_are_centred_and_scaled_without_rounding(width):
    z = landmarks(2, 3, 9, 5) + 1000
    centre = z.mean(-2, keepdim=True)
    _, system = _native_core.gram(z, centre, 0.3, 0.01)
    y = (z.double() - centre.double()) * 0.3
    exact = gaussian_kernel(y, y) + 0.01 * torch.eye(9, dtype=torch.float64)
    size = y.square().sum(-1).amax()
    assert ((system - exact).abs() <= 1e-12 + 8 * 5 * size * 2.0**-52).all()


@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (1, 49, 32)], ids=str)
def test_the_steps_are_those_of_the_plain_way(shape, width):
    z = landmarks(*shape)
    core, _ = core_of(z, 0.01)
    known = {"upper": float(shape[-2]), "tol": EPS ** (1 / 3)}
    plain, _ = _definite.scaled_newton(_attend.gram(z.double(), XP), ridge=0.01, **known, xp=XP)
    # Rounding of P, times ‖M‖², and of each product.
    assert ((core - plain).abs() < 64 * EPS * shape[-2] / 0.01).all()


def test_an_element_that_is_no_number_or_too_far_out_is_nan():
    z = landmarks(3, 2, 9, 4)
    clean, _ = core_of(z, 0.01)
    spoilt = z.clone()
    spoilt[1, 0, 3, 2] = torch.nan
    spoilt[2, 1, 5] = torch.inf
    core, _ = core_of(spoilt, 0.01)
    lost = torch.tensor([[False, False], [True, False], [False, True]])
    assert core[lost].isnan().all()
    assert torch.equal(core[~lost], clean[~lost])


def test_a_matrix_that_is_not_definite_is_nan():
    """Of landmarks that nearly coincide rounding of A exceeds the ridge."""
    core, _ = core_of(landmarks(1, 30, 4, spread=0.01), 1e-9)
    assert core.isnan().all()


def test_results_do_not_depend_on_the_number_of_threads():
    z, before = landmarks(6, 5, 30, 20), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(core_of(z, 0.01))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2]))


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z.double(),
        lambda z: z.to("meta"),
        lambda z: z.repeat(1, 15, 1)[:, :129],
        lambda z: z[:, :0],
        lambda z: z[..., :0],
    ],
    ids=["float64", "meta", "many", "none", "no features"],
)
def test_whom_they_do_not_serve(change):
    z = landmarks(2, 9, 4)
    assert _native_core.applies(z)
    assert not _native_core.applies(change(z))


def test_a_ridge_whose_inverse_overflows_leaves_nan():
    a, _ = gram(landmarks(2, 9, 4), 0.01)
    assert pinv_newton(a, hermitian=True, ridge=1e-39, upper=9.0, tol=0.01).isnan().all()


@pytest.mark.parametrize("method", ["newton", "direct"])
def test_attention_asks_them_through_pinv_newton(method, monkeypatch):
    asked = []
    for name in ("gram", "inverse"):
        real = getattr(_native_core, name)
        monkeypatch.setattr(
            _native_core, name, lambda *a, _of=(name, real), **b: asked.append(_of[0]) or _of[1](*a, **b)
        )
    q, z = landmarks(2, 50, 4), landmarks(2, 9, 4, seed=1)
    found = softmax_free_attention(q, q, z, method=method)
    assert asked == (["gram", "inverse"] if method == "newton" else ["gram"])
    with monkeypatch.context() as other:
        other.setattr(pinv, "pinv_newton", lambda a, **_: torch.zeros_like(a))
        softmax_free_attention(q, q, z)
    assert asked.count("inverse") == (method == "newton")
    monkeypatch.setattr(_native, "is_built", lambda: False)
    plain = softmax_free_attention(q, q, z, method=method)
    # Sums of 50 terms, and the condition of P, 1 + 9/0.01 at the most, in what follows from them.
    torch.testing.assert_close(found, plain, rtol=0, atol=64 * EPS * 50**0.5)
