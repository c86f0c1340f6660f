"""Newton's textbook steps by compiled kernels against the plain ones in float64, and what they promise besides."""

import array_api_compat.torch as xp
import pytest
import torch

from lowrank import _native, _native_newton, pinv_newton
from lowrank._newton import textbook_steps

pytestmark = pytest.mark.skipif(not _native.is_built(), reason="no C compiler was found when lowrank was installed")
EPS = 2.0**-23


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def problem(*batch, m, symmetric=False):
    """X₀ = Aᵀ/2, A with singular values from a half to one, and a cotangent."""
    u, _ = torch.linalg.qr(normal(0, *batch, m, m).double())
    v, _ = torch.linalg.qr(normal(1, *batch, m, m).double())
    a = (u @ torch.diag(torch.linspace(0.5, 1, m).double()) @ (u if symmetric else v).mT).float()
    return 0.5 * a.mT, a, normal(2, *batch, m, m)


def found(x, a, g, count):
    return _native_newton.steps(x, a, count), *_native_newton.cotangents(x, a, g, count)


def plain(x, a, g, count):
    given = [y.double().requires_grad_() for y in (x, a)]
    out = textbook_steps(*given, count, xp)
    return out.detach(), *torch.autograd.grad(out, given, g.double(), allow_unused=True, materialize_grads=True)


def assert_right(x, a, g, count):
    for y, exact in zip(found(x, a, g, count), plain(x, a, g, count), strict=True):
        assert y.shape == exact.shape
        # Sums of m terms; X and A are of norm two, and the steps of the first four double what is off.
        size = max(exact.abs().max(), g.abs().max())
        assert (y - exact).abs().max() <= 64 * EPS * a.shape[-1] ** 0.5 * size


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 8])
@pytest.mark.parametrize(("batch", "m"), [((), 1), ((2, 3), 7), ((3,), 16), ((2,), 49), ((1,), 128)], ids=str)
def test_steps_and_cotangents_are_those_of_the_plain_iteration(batch, m, count, symmetric, width):
    assert_right(*problem(*batch, m=m, symmetric=symmetric), count)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 2e38])
def test_cotangents_of_any_size(scale):
    x, a, g = problem(2, m=9)
    g /= g.abs().max()
    unit, scaled = (_native_newton.cotangents(x, a, y, 4) for y in (g, g * scale))
    for y, z in zip(unit, scaled, strict=True):
        # What the scale makes of the smallest of them is no normal number.
        torch.testing.assert_close(z, y * scale, rtol=64 * EPS, atol=2.0**-148 + 64 * EPS * scale)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["X", "A", "G"])
@pytest.mark.parametrize(
    "made",
    [lambda y: y.mT.contiguous().mT, lambda y: y[:1].expand(y.shape), lambda y: torch._neg_view(-y)],
    ids=["transposed", "repeated", "negated"],
)
def test_arrays_may_lie_anywhere(which, made):
    given = [problem(3, m=9)[0][:1].repeat(3, 1, 1), *problem(3, m=9)[1:]]
    given[1] = given[1][:1].repeat(3, 1, 1)
    given[which] = made(given[which])
    assert_right(*given, 4)


def test_what_is_no_number_stays_in_its_matrix():
    x, a, g = problem(3, m=9)
    clean = found(x, a, g, 4)
    a[1, 2, 3] = torch.nan
    for y, z in zip(found(x, a, g, 4), clean, strict=True):
        assert y[1].isnan().any()
        assert torch.equal(y[[0, 2]], z[[0, 2]])


def test_results_do_not_depend_on_the_number_of_threads():
    given, before, some = problem(30, m=20), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            some.append(found(*given, 6))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, some[0], some[1]))
    assert all(map(torch.equal, some[0], some[2]))


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        (lambda y: y.double(), 4),
        (lambda y: y.to("meta"), 4),
        (lambda y: y[:, :5], 4),
        (lambda y: y[:0], 4),
        (lambda y: y.repeat(1, 15, 15)[:, :129, :129], 4),
        (lambda y: y, 2**12),
    ],
    ids=["float64", "meta", "wide", "none", "large", "many steps"],
)
def test_whom_they_do_not_serve(change, steps):
    x, a, _ = problem(2, m=9)
    assert _native_newton.applies(x, a, 4)
    assert not _native_newton.applies(change(x), change(a), steps)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_pinv_newton_and_its_derivatives_are_the_same_without_a_compiler(ridge, monkeypatch):
    z = normal(3, 4, 12, 5)
    a = torch.exp(-0.5 * torch.cdist(z, z).square())
    g = normal(4, 4, 12, 12)

    def all_of():
        leaf = a.clone().requires_grad_()
        x = pinv_newton(leaf, hermitian=True, ridge=ridge, steps=6)
        (once,) = torch.autograd.grad(x, leaf, g, create_graph=True)
        plainly = pinv_newton(a, hermitian=True, ridge=ridge, steps=6)
        return (
            x.detach(),
            plainly,
            *torch.autograd.grad(x, leaf, g, retain_graph=True),
            *torch.autograd.grad(once.sum(), leaf),
        )

    asked, real = [], _native_newton.steps
    monkeypatch.setattr(_native_newton, "steps", lambda *given: asked.append(given) or real(*given))
    compiled = all_of()
    assert len(asked) == 2
    monkeypatch.setattr(_native, "is_built", lambda: False)
    for y, z in zip(compiled, all_of(), strict=True):
        # Six steps double what each is off, and a derivative has the square of X.
        assert (y - z).abs().max() <= 2**6 * 16 * EPS * z.abs().max()
    assert len(asked) == 2
