"""Landmarks given by their number: the means of segments, and what torch's autograd makes of them."""

import numpy as np
import pytest
import torch

from lowrank import _attend, _native, segment_means, softmax_free_attention
from lowrank.kernels import gaussian_kernel

# Equal segments, longer ones first, and as many as there are tokens but one.
SIZES = [(98, 49), (100, 7), (9, 8)]


def points(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(n, batch=(2, 3), dtype=torch.float64):
    return points(0, *batch, n, 8, dtype=dtype), points(1, *batch, n, 5, dtype=dtype)


def means(q, count):
    return segment_means(q, rank=count, kernel=gaussian_kernel)


@pytest.mark.parametrize(("n", "count"), SIZES)
def test_a_number_stands_for_means(n, count, xp):
    q, v = (xp.asarray(x.numpy()) for x in pair(n))
    found = xp.check(softmax_free_attention(q, v, count), q, (2, 3, n, 5))
    np.testing.assert_array_equal(found, xp.check(softmax_free_attention(q, v, means(q, count)), q, (2, 3, n, 5)))


@pytest.mark.parametrize("count", [5, np.int64(6), 2**70])
def test_few_tokens_are_landmarks_themselves(count):
    q, v = pair(5)
    gram = gaussian_kernel(q, q, lengthscale=8**0.25)
    exact = gram @ torch.linalg.solve(gram + 0.01 * torch.eye(5), gram @ v)
    torch.testing.assert_close(softmax_free_attention(q, v, count), exact)
    assert softmax_free_attention(q[..., :0, :], v[..., :0, :], count).shape == (2, 3, 0, 5)


def gradients(attention, *inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, points(2, *out.shape, dtype=out.dtype))]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("entries", [2**21, 7 * 20], ids=["whole", "in parts"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "direct"}, {"normalize": True}, {"ridge": 0.0}, {"lengthscale": True}, {"queries": True}],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize(("n", "count"), SIZES)
def test_gradients_are_those_of_means(n, count, options, dtype, entries, compiled, monkeypatch):
    """But for the order in which two terms of a gradient in q are added, each perhaps rounded before; and for what the
    kernels make of the means, which they round otherwise."""
    if not compiled:
        monkeypatch.setattr(_native, "is_built", lambda: False)
    monkeypatch.setattr(_attend, "_CPU_ENTRIES", entries)
    given = dict(options)
    if "lengthscale" in given:
        given["lengthscale"] = torch.linspace(1, 2, 8, dtype=dtype)
    if "queries" in given:
        given["queries"] = points(3, 2, 3, 4, 8, dtype=dtype)
    inputs = pair(n, dtype=dtype)
    found = gradients(lambda q, v: softmax_free_attention(q, v, count, **given), *inputs)
    expected = gradients(lambda q, v: softmax_free_attention(q, v, means(q, count), **given), *inputs)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == dtype
        most = 16 if compiled and dtype == torch.float32 and "normalize" not in options else 4
        assert torch.all((x - y).abs() <= most * torch.finfo(dtype).eps * y.abs().max())


def test_gradients_of_an_array_that_is_broadcast():
    q, v = pair(20, batch=(1, 3))[0], points(1, 4, 1, 20, 5)
    found = gradients(lambda q, v: softmax_free_attention(q, v, 6), q, v)
    expected = gradients(lambda q, v: softmax_free_attention(q, v, means(q, 6)), q, v)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_derivatives_against_differences_once_and_twice():
    inputs = [x.requires_grad_() for x in pair(11, batch=(2,))]

    def attention(q, v):
        return softmax_free_attention(q, v, 3)

    assert torch.autograd.gradcheck(attention, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(attention, inputs)


def test_autograd_has_nothing_to_add_to_the_gradient_in_q():
    """Which would be an array of the size of q made of the means' cotangents, and another for the sum."""
    q, v = (x.requires_grad_() for x in pair(98, dtype=torch.float32))
    node = softmax_free_attention(q, v, 49).grad_fn
    assert [type(n).__name__ for n, _ in node.next_functions if n is not None] == ["AccumulateGrad"] * 2
    assert [n.variable.shape for n, _ in node.next_functions if n is not None] == [q.shape, v.shape]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_compiled_and_transformed_they_are_means_too():
    q, v = pair(98, dtype=torch.float32)
    eager = softmax_free_attention(q, v, 49)
    compiled = torch.compile(lambda q, v: softmax_free_attention(q, v, 49), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, v), eager)
    torch.testing.assert_close(torch.vmap(lambda q, v: softmax_free_attention(q, v, 49))(q, v), eager)
