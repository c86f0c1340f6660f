"""Depthwise convolution whose filters get their gradient three columns at a time, against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from lowrank import _depthwise
from lowrank._depthwise import _ByColumns, depthwise_convolution
from lowrank.nn import SoftmaxFreeAttention

ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")
FILTERS = [(9, 9), (5, 5), (7, 7), (1, 5), (3, 7), (5, 3), (1, 1)]


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(_depthwise, "_FEWEST", 1)


def tensors(*, size=(11, 13), filters=(5, 5), dtype=torch.float64, channels=6, batch=2, last=True):
    """An image, filters and a cotangent; numbers that bfloat16 has."""
    generator = torch.Generator().manual_seed(0)
    image, g = (torch.randn(batch, *size, channels, generator=generator).bfloat16().to(dtype) for _ in range(2))
    image, g = image.movedim(-1, 1), g.movedim(-1, 1)
    image, g = (image, g) if last else (image.contiguous(), g.contiguous())
    return image, torch.randn(channels, 1, *filters, generator=generator).bfloat16().to(dtype), g


def torchs(image, filters):
    return F.conv2d(image, filters, padding=[k // 2 for k in filters.shape[2:]], groups=len(filters))


def gradients(function, image, filters, g):
    image, filters = (x.detach().requires_grad_() for x in (image, filters))
    out = function(image, filters)
    return out.detach(), *torch.autograd.grad(out, (image, filters), g.to(out.dtype))


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
@pytest.mark.parametrize("size", [(11, 13), (2, 3), (1, 1), (1, 40)], ids=str)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_values_and_gradients(dtype, filters, size, last):
    exact = gradients(torchs, *tensors(size=size, filters=filters, last=last))
    # Sums of so many terms at the most, in float32; what they are of is exact, and the result rounded.
    magnitudes = gradients(torchs, *(x.abs() for x in tensors(size=size, filters=filters, last=last)))
    terms = max(filters[0] * filters[1], 2 * size[0] * size[1])
    given = tensors(size=size, filters=filters, dtype=dtype, last=last)
    found = gradients(depthwise_convolution, *given)
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # Torch's own, which sums in bfloat16, is left to do as it does.
        assert all(map(torch.equal, found, gradients(torchs, *given)))
        return
    for x, right, most in zip(found, exact, magnitudes, strict=True):
        assert x.dtype == dtype
        bound = terms * torch.finfo(torch.float32).eps * most + torch.finfo(dtype).eps * right.abs()
        assert torch.all((x.double() - right).abs() <= bound)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_derivatives_against_differences_once_and_twice(filters):
    image, filters, _ = tensors(size=(3, 4), filters=filters, channels=2, batch=1)
    given = image.requires_grad_(), filters.requires_grad_()
    assert torch.autograd.gradcheck(_ByColumns.apply, given, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(_ByColumns.apply, given)


def rule(image, filters):
    return type(depthwise_convolution(image, filters).grad_fn).__name__


@ONEDNN
def test_the_rule_is_for_what_is_slow(monkeypatch):
    image, filters, _ = tensors(dtype=torch.float32)
    filters.requires_grad_()
    assert rule(image, filters) == "_ByColumnsBackward"
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert rule(image.bfloat16(), filters.detach().bfloat16().requires_grad_()) == "_ByColumnsBackward"
    assert rule(image.double(), filters.detach().double().requires_grad_()) == "ConvolutionBackward0"
    assert rule(image, filters[..., :3].detach().requires_grad_()) == "ConvolutionBackward0"
    assert rule(image.clone().requires_grad_(), filters.detach()) == "ConvolutionBackward0"
    with torch.no_grad():
        assert depthwise_convolution(image, filters).grad_fn is None
    monkeypatch.setattr(_depthwise, "_FEWEST", image.numel() * 25 + 1)
    assert rule(image, filters) == "ConvolutionBackward0"
    monkeypatch.setattr(_depthwise, "_FEWEST", image.numel() * 25)
    assert rule(image, filters) == "_ByColumnsBackward"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert rule(image, filters) == "ConvolutionBackward0"


def test_mixed_dtypes_are_refused_in_torchs_words():
    image, filters, _ = tensors()
    with pytest.raises(RuntimeError, match="type"):
        depthwise_convolution(image.float(), filters.requires_grad_())


@pytest.mark.parametrize("frozen", [0, 1], ids=["image", "filters"])
def test_what_is_frozen_has_no_gradient(frozen):
    image, filters, g = tensors(dtype=torch.float32)
    given = [image.requires_grad_(), filters.requires_grad_()]
    expected = gradients(torchs, *given, g)[2 - frozen]
    given[frozen].requires_grad_(False)
    found = torch.autograd.grad(depthwise_convolution(*given), given[1 - frozen], g)[0]
    # One order of summation or another.
    torch.testing.assert_close(found, expected, rtol=0, atol=286 * 16 * torch.finfo(torch.float32).eps)


def test_autocast_is_torchs():
    image, filters, g = tensors(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (gradients(f, image, filters, g) for f in (depthwise_convolution, torchs))
    assert found[0].dtype == torch.bfloat16
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        # Each rounded once, or three times: in bfloat16 by either, and back.
        torch.testing.assert_close(x.float(), y.float(), rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-3)


def test_transformations_of_torch_func():
    image, filters, g = tensors(dtype=torch.float32)

    def loss(function, filters):
        return (function(image, filters) * g).sum()

    found, expected = (torch.func.grad(lambda w, f=f: loss(f, w))(filters) for f in (depthwise_convolution, torchs))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_layer_asks_for_it(monkeypatch):
    seen = []
    monkeypatch.setattr(_depthwise, "_slow_dtype", lambda image, filters: seen.append(tuple(filters.shape)))
    SoftmaxFreeAttention(64, num_heads=2, stride=2, value_kernel=5)(torch.randn(1, 64, 64), (8, 8))
    assert seen == [(64, 1, 5, 5)]
