"""The core of attention by compiled kernels against its formulas, and what they promise besides."""

import array_api_compat
import pytest
import torch

from lowrank import _attend, _definite, _native, _native_core, attention, softmax_free_attention
from lowrank.kernels import gaussian_kernel

pytestmark = pytest.mark.skipif(not _native.is_built(), reason="no C compiler was found when lowrank was installed")
EPS = 2.0**-23
XP = array_api_compat.array_namespace(torch.zeros(1))
WIDTHS = [k for k in (4, 8, 16) if _native.is_built() and k <= _native.lanes()]


@pytest.fixture(params=WIDTHS, ids=str)
def width(request, monkeypatch):
    """Floats in a vector: what this processor has, and what smaller ones have."""
    monkeypatch.setattr(_native, "lanes", lambda: request.param)


def landmarks(*shape, spread=0.5, seed=0):
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bounds(z):
    return attention._bounds(z, XP)


SHAPES = [(1, 1), (2, 3, 7, 5), (1, 1, 49, 32), (2, 128, 64), (3, 16, 16), (1, 17, 33), (0, 2, 7, 5)]


@pytest.mark.parametrize("ridge", [0.01, 1e-3, 10.0])
@pytest.mark.parametrize("spread", [0.02, 0.5, 3.0], ids=["near", "usual", "far"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_are_the_gram_matrix_and_nearly_its_inverse(shape, spread, ridge, width):
    z = landmarks(*shape, spread=spread)
    m = shape[-2]
    core, system = _native_core.gram_core(z, ridge, **bounds(z))
    exact, eye = gaussian_kernel(z.double(), z.double()), torch.eye(m, dtype=torch.float64)
    assert core.shape == system.shape == (*shape[:-1], m)
    # The expansion's exponent is off by some EPS of ‖z‖².
    size = z.square().sum(-1).amax() if z.numel() else 0
    assert torch.equal(system, system.mT)
    assert ((system - (exact + ridge * eye)).abs() <= EPS * (8 * size + 2 + ridge)).all()
    # What the steps leave, in the norm, and rounding, which meets the condition.
    left = eye - core.double() @ system.double()
    tol = bounds(z)["tol"] + 8 * EPS * m**0.5 * (1 + m / ridge)
    assert (torch.linalg.matrix_norm(left, 2) <= tol).all()


@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (1, 49, 32)], ids=str)
def test_the_steps_are_those_of_the_plain_way(shape, width):
    z = landmarks(*shape)
    core, _ = _native_core.gram_core(z, 0.01, **bounds(z))
    a = _attend.gram(z.double(), XP)
    known = {"upper": float(shape[-2]), "tol": bounds(z)["tol"]}
    plain, _ = _definite.scaled_newton(a, ridge=0.01, **known, xp=XP)
    # Rounding of P, times ‖M‖², and of each product.
    assert ((core - plain).abs() < 64 * EPS * shape[-2] / 0.01**2 * 0.01).all()


def test_an_element_that_is_no_number_or_too_far_out_is_nan():
    z = landmarks(3, 2, 9, 4)
    clean, _ = _native_core.gram_core(z, 0.01, **bounds(z))
    spoilt = z.clone()
    spoilt[1, 0, 3, 2] = torch.nan
    spoilt[2, 1, 5] = torch.inf
    core, _ = _native_core.gram_core(spoilt, 0.01, **bounds(z))
    lost = torch.tensor([[False, False], [True, False], [False, True]])
    assert core[lost].isnan().all()
    assert torch.equal(core[~lost], clean[~lost])


def test_a_matrix_that_is_not_definite_is_nan():
    """Of landmarks far from the origin rounding exceeds the ridge."""
    z = landmarks(1, 30, 4, spread=0.01) + 3e3
    core, _ = _native_core.gram_core(z, 1e-4, **bounds(z))
    assert core.isnan().all()


def test_results_do_not_depend_on_the_number_of_threads():
    z, before = landmarks(6, 5, 30, 20), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(_native_core.gram_core(z, 0.01, **bounds(z)))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2]))


@pytest.mark.parametrize(
    ("change", "ridge"),
    [
        (lambda z: z.double(), 0.01),
        (lambda z: z.to("meta"), 0.01),
        (lambda z: z.repeat(1, 15, 1)[:, :129], 0.01),
        (lambda z: z[:, :0], 0.01),
        (lambda z: z[..., :0], 0.01),
        (lambda z: z, 1e-39),
    ],
    ids=["float64", "meta", "many", "none", "no features", "no ridge"],
)
def test_whom_they_do_not_serve(change, ridge):
    z = landmarks(2, 9, 4)
    assert _native_core.applies(z, 0.01)
    assert not _native_core.applies(change(z), ridge)


@pytest.mark.parametrize("method", ["newton", "direct"])
def test_attention_asks_them_for_newton_alone(method, monkeypatch):
    asked = []
    real = _native_core.gram_core
    monkeypatch.setattr(_native_core, "gram_core", lambda *a, **b: asked.append(a) or real(*a, **b))
    q, z = landmarks(2, 50, 4), landmarks(2, 9, 4, seed=1)
    found = softmax_free_attention(q, q, z, method=method)
    assert len(asked) == (method == "newton")
    monkeypatch.setattr(_native, "is_built", lambda: False)
    plain = softmax_free_attention(q, q, z, method=method)
    # Sums of 50 terms, and the condition of P, 1 + 9/0.01 at the most, in what follows from them.
    torch.testing.assert_close(found, plain, rtol=0, atol=64 * EPS * 50**0.5)
