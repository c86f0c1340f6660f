"""The compiled kernels of an MLP and its activation against the formulas in float64, and what they promise besides."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lowrank import _native, _native_mlp

pytestmark = pytest.mark.skipif(not _native.is_built(), reason="no C compiler was found when lowrank was installed")
EPS = 2.0**-23


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arrays(rows=(300,), c=32, f=64):
    """x, W₁, b₁, W₂, b₂ and a cotangent, u being of order one."""
    w1, w2 = normal(1, f, c) * c**-0.5, normal(3, c, f) * f**-0.5
    return normal(0, *rows, c), w1, normal(2, f), w2, normal(4, c), normal(5, *rows, c)


def there_and_back(x, w1, b1, w2, b2, g, residual=False):
    out = _native_mlp.forward(x, w1, b1, w2, b2, residual=residual)
    return out, *_native_mlp.backward(x, w1, b1, w2, g, residual=residual)


def of_float64(x, w1, b1, w2, b2, g, residual=False):
    given = [y.double().requires_grad_() for y in (x, w1, b1, w2, b2)]
    x, w1, b1, w2, b2 = given
    out = F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2) + (x if residual else 0)
    return out.detach(), *torch.autograd.grad(out, given, g.double())


def assert_right(given, count, **options):
    """Where what is found are sums of at most so many terms of order one."""
    for x, y in zip(there_and_back(*given, **options), of_float64(*given, **options), strict=True):
        assert x.shape == y.shape
        # Roundings of sums grow like the root of their length; two sums and an activation follow one another.
        assert (x.double() - y).abs().max() < 4 * EPS * count**0.5 * max(1, y.abs().max())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("rows", "c", "f"),
    [
        ((1,), 32, 32),
        ((128,), 32, 64),
        ((129,), 64, 32),
        ((2, 3, 200), 96, 320),
        ((1030,), 32, 128),
        ((40,), 320, 1280),
    ],
    ids=str,
)
def test_they_compute_what_the_formula_says(rows, c, f, residual, width):
    assert_right(arrays(rows, c, f), max(math.prod(rows), c, f), residual=residual)


@pytest.mark.parametrize("which", [0, 1, 2, 3, 5], ids=["x", "W₁", "b₁", "W₂", "g"])
@pytest.mark.parametrize(
    "made",
    [
        lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
        lambda x: x[..., :1].expand(x.shape),
        lambda x: torch._neg_view(-x),
    ],
    ids=["transposed", "one number", "negated"],
)
def test_arrays_may_lie_anywhere(which, made):
    given = list(arrays())
    given[which] = made(given[which])
    assert_right(given, 300)


def test_results_do_not_depend_on_the_number_of_threads():
    given, before = arrays((3000,), 64, 128), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(there_and_back(*given))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        for x, y in zip(found[0], others, strict=True):
            assert torch.equal(x, y)


def test_what_is_no_number_stays_in_its_row():
    x, *others = arrays()
    x[7, 3] = torch.nan
    out, x_bar, *_ = there_and_back(x, *others)
    expected = there_and_back(*arrays())
    for found, clean in zip((out, x_bar), expected, strict=False):
        assert found[7].isnan().all()
        rest = torch.arange(300) != 7
        assert torch.equal(found[rest], clean[rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_activation_and_its_derivative(dtype, width):
    u = torch.cat([torch.linspace(-30, 30, 40_001), torch.tensor([-1e18, -1e4, 1e4, -0.0, 1e-30])]).to(dtype)
    g = normal(6, len(u)).to(dtype)
    exact = u.double().requires_grad_()
    # torch's own, of a tanh, loses figures where u is negative.
    y = math.sqrt(8 / math.pi) * (exact + 0.044715 * exact**3)
    right = exact * torch.sigmoid(y)
    (slope,) = torch.autograd.grad(right.sum(), exact)
    h, u_bar, right = _native_mlp.gelu(u), _native_mlp.gelu(u, g), right.detach().abs()
    assert h.dtype == u_bar.dtype == dtype
    # Below 0 the exponent y of σ is rounded, and from −70 on σ is taken for 0.
    rounding, g, exponent = torch.finfo(dtype).eps / 2, g.double(), (-y.detach()).clamp(0, 70)
    assert ((h.double().abs() - right).abs() <= (rounding + 4 * EPS + 2 * EPS * exponent) * right + 1e-29).all()
    assert ((u_bar.double() - slope * g).abs() <= (rounding * slope.abs() + 4 * EPS) * g.abs()).all()
    assert _native_mlp.gelu(torch.tensor([torch.nan, 1.0]).to(dtype)).isnan().tolist() == [True, False]


def test_the_activation_of_arrays_of_any_size_and_layout(width):
    for size in (0, 1, 5, 127, 129, 2**14, 2**14 + 1):
        u, g = normal(7, size), normal(8, size)
        torch.testing.assert_close(_native_mlp.gelu(u), F.gelu(u, approximate="tanh"), rtol=8 * EPS, atol=8 * EPS)
        expected = torch.ops.aten.gelu_backward(g, u, approximate="tanh")
        torch.testing.assert_close(_native_mlp.gelu(u, g), expected, rtol=64 * EPS, atol=64 * EPS)
    u = normal(7, 30, 50)
    assert torch.equal(_native_mlp.gelu(u.mT), _native_mlp.gelu(u).mT)
    assert torch.equal(_native_mlp.gelu(u[:, ::2]), _native_mlp.gelu(u)[:, ::2])
    assert torch.equal(_native_mlp.gelu(torch._neg_view(-u)), _native_mlp.gelu(u))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double(),
        lambda x: x.to("meta"),
        lambda x: x[..., :31],
        lambda x: x[:0],
        lambda x: torch.nn.parameter.Buffer(x).as_subclass(type("Named", (torch.Tensor,), {})),
    ],
    ids=["float64", "meta", "odd width", "no rows", "subclass"],
)
def test_whom_they_do_not_serve(change):
    x, w1, b1, w2, b2, _ = arrays()
    assert _native_mlp.applies(x, w1, b1, w2, b2)
    x = change(x)
    assert not _native_mlp.applies(x, w1[:, : x.shape[-1]], b1, w2, b2)


def test_who_counts_gets_the_plain_way():
    x, *weights, _ = arrays()
    with FlopCounterMode(display=False):
        assert not _native_mlp.applies(x, *weights)
        assert not _native_mlp.activates(x)


def test_one_error_without_memory(monkeypatch):
    monkeypatch.setattr(_native.kernels(), "lowrank_gelu", lambda *_: 1)
    with pytest.raises(MemoryError, match="lowrank_gelu makes of count=3, half=0"):
        _native_mlp.gelu(torch.zeros(3))
