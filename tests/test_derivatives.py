"""Derivatives of torch's rules where they are differentiated again, also of inputs that are made of one another."""

import pytest
import torch
from convolution import _ByCells
from mlp import _Compiled

from lowrank import _native_mlp, softmax_free_attention
from lowrank._depthwise import _ByColumns
from lowrank._torch_rules import TextbookSteps
from lowrank.nn import SoftmaxFreeAttention


def points(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def of_landmarks(x):
    return softmax_free_attention(x, x.cos(), x[..., ::5, :] + x[..., 1::5, :].sin())


def of_numbers(x):
    return softmax_free_attention(x, x.cos(), 4)


def of_columns(x):
    return _ByColumns.apply(x, x[0, :, None, :5, :3].sin())


def of_cells(x):
    return _ByCells.apply(x, x[:, :, :3, :3].sin(), x[0, 0, 0, :1], (1, 1), (1, 1))


def of_steps(x):
    a = x[0] @ x[0].mT / 20
    return TextbookSteps.apply(a / 40, a, 4)


@pytest.mark.parametrize("function", [of_landmarks, of_numbers, of_columns, of_cells, of_steps])
def test_inputs_made_of_one_another(function):
    """Each has its own cotangent, whether it is to be differentiated again or not."""
    x = points(0, 1, 2, 20, 8).requires_grad_()
    out = function(x)
    g = points(1, *out.shape)
    (once,) = torch.autograd.grad(out, x, g, retain_graph=True)
    (again,) = torch.autograd.grad(out, x, g, create_graph=True)
    torch.testing.assert_close(again, once)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x, fast_mode=True)


def test_weights_made_of_tokens():
    x = points(0, 3, 32, dtype=torch.float32).requires_grad_()
    weights = x.new_ones(128, 1) * x[:1].sin(), x.new_zeros(128), x[:1].mT * x.new_ones(1, 128), x[0]
    if not _native_mlp.applies(x, *weights):
        pytest.skip("the package was built without compiled kernels")
    g = points(1, 3, 32, dtype=torch.float32)
    out = _Compiled.apply(x, *weights, True)
    (once,) = torch.autograd.grad(out, x, g, retain_graph=True)
    (again,) = torch.autograd.grad(out, x, g, create_graph=True)
    # Sums of 128 terms at the most, three times over.
    torch.testing.assert_close(again, once, rtol=0, atol=3 * 128 * 2.0**-24 * once.abs().max().item())


@pytest.mark.parametrize("options", [{"stride": 2}, {"grid": 3}, {"grid": 3, "value_kernel": 3}])
def test_a_layer_whose_landmarks_are_of_its_queries(options):
    torch.manual_seed(0)
    layer = SoftmaxFreeAttention(8, num_heads=2, **options).double()
    x = points(0, 1, 36, 8).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: layer(x, (6, 6)), x, fast_mode=True)


@pytest.mark.parametrize("method", ["newton", "direct"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_second_derivatives_are_right_to_rounding(dtype, method):
    """As those of the formula with a solve: nothing of the approximate inverse is in them. By as many corrections as w
    needs, that in z would be wrong by 4e-7 and 8e-4."""
    given = points(0, 1, 200, 8), points(1, 1, 200, 4), points(2, 1, 20, 8)
    g, directions = points(3, 1, 200, 4), [points(4 + i, *x.shape) for i, x in enumerate(given)]

    def formula(q, v, z):
        c, a = (torch.exp(-0.5 * (x[..., :, None, :] - z[..., None, :, :]).square().sum(-1) / 8**0.5) for x in (q, z))
        return c @ torch.linalg.solve(a + 0.01 * torch.eye(20, dtype=a.dtype), c.mT @ v)

    def twice(attention, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        once = torch.autograd.grad(attention(*leaves), leaves, g.to(dtype), create_graph=True)
        along = sum((x * y.to(dtype)).sum() for x, y in zip(once, directions, strict=True))
        return [*once, *torch.autograd.grad(along, leaves)]

    exact = twice(formula, torch.float64)
    found = twice(lambda *given: softmax_free_attention(*given, method=method), dtype)
    # The condition of A + 0.01·I is 3 here.
    for x, y in zip(found, exact, strict=True):
        assert torch.linalg.norm(x - y) < 16 * torch.finfo(dtype).eps * torch.linalg.norm(y)
