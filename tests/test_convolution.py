"""The convolution by products with cells against torch's own."""

import convolution
import pytest
import torch
import torch.nn.functional as F
from convolution import CellConv2d, _ByCells
from torch import nn

ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")
# Size of the image, kernel, stride, padding.
SHAPES = [
    ((14, 14), (3, 3), (2, 2), (1, 1)),
    ((7, 5), (3, 3), (2, 2), (1, 1)),
    ((1, 1), (3, 3), (2, 2), (1, 1)),
    ((1, 2), (3, 3), (1, 1), (1, 1)),
    ((9, 8), (2, 3), (2, 1), (0, 2)),
    ((9, 8), (3, 2), (4, 3), (0, 0)),
    ((5, 6), (5, 1), (1, 5), (3, 0)),
    ((3, 3), (1, 1), (3, 3), (2, 2)),
]


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(convolution, "MANY", 1)


def tensors(*, size=(7, 5), kernel=(3, 3), dtype=torch.float64, batch=2, last=True):
    """An image, filters and a bias; numbers that bfloat16 has."""
    generator = torch.Generator().manual_seed(0)
    image, weight, bias = (
        torch.randn(shape, generator=generator).bfloat16().to(dtype)
        for shape in ((batch, *size, 5), (4, *kernel, 5), (4,))
    )
    image, weight = image.movedim(-1, 1), weight.movedim(-1, 1)
    return (image, weight, bias) if last else (image.contiguous(), weight.contiguous(), bias)


def layer(kernel, stride, padding, *, weight=None, bias=None):
    made = CellConv2d(5, 4, kernel, stride=stride, padding=padding)
    if weight is not None:
        made.to(weight.dtype).load_state_dict({"weight": weight, "bias": bias})
    return made


def gradients(function, *given):
    given = [x.detach().requires_grad_() for x in given]
    out = function(*given)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, given, weight if given[0].min() < 0 else weight.abs())


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_values_and_gradients(dtype, size, kernel, stride, padding, last):
    def by_cells(*given):
        return _ByCells.apply(*given, stride, padding)

    def torchs(*given):
        return F.conv2d(*given, stride=stride, padding=padding)

    given = tensors(size=size, kernel=kernel, last=last)
    exact, magnitudes = gradients(torchs, *given), gradients(torchs, *(x.abs() for x in given))
    found = gradients(by_cells, *tensors(size=size, kernel=kernel, last=last, dtype=dtype))
    # Sums of so many terms at the most, in float32, of numbers that are exact but for what each place in a filter adds
    # to the image's gradient, which is rounded before; and the result is.
    terms = 1 + max(5 * kernel[0] * kernel[1], 4 * kernel[0] * kernel[1], 2 * size[0] * size[1])
    places = kernel[0] * kernel[1]
    for x, right, most in zip(found, exact, magnitudes, strict=True):
        assert x.dtype == dtype
        assert x.shape == right.shape
        bound = terms * torch.finfo(torch.float32).eps * most + places * torch.finfo(dtype).eps * most
        assert torch.all((x.double() - right).abs() <= bound)


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), SHAPES[1:5], ids=str)
def test_derivatives_against_differences_once_and_twice(size, kernel, stride, padding):
    given = [x.requires_grad_() for x in tensors(size=size, kernel=kernel, batch=1)]

    def function(*given):
        return _ByCells.apply(*given, stride, padding)

    assert torch.autograd.gradcheck(function, given, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_what_is_frozen_has_no_gradient(frozen):
    given = [x.requires_grad_() for x in tensors()]
    expected = gradients(lambda *y: F.conv2d(*y, padding=1), *given)[1:]
    for k in frozen:
        given[k].requires_grad_(False)
    out = _ByCells.apply(*given, (1, 1), (1, 1))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    out.backward(weight)
    for k, (x, right) in enumerate(zip(given, expected, strict=True)):
        assert (x.grad is None) == (k in frozen)
        if k not in frozen:
            torch.testing.assert_close(x.grad, right)


def rule(module, image):
    return type(module(image).grad_fn).__name__


@ONEDNN
def test_the_rule_is_for_many_filters_that_are_trained(monkeypatch):
    image, weight, bias = tensors(dtype=torch.float32)
    made = layer(3, 2, 1, weight=weight, bias=bias)
    assert rule(made, image) == "_ByCellsBackward"
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert rule(layer(3, 2, 1).bfloat16(), image.bfloat16()) == "_ByCellsBackward"
    assert rule(layer(3, 2, 1).double(), image.double()) == "ConvolutionBackward0"
    with torch.no_grad():
        assert made(image).grad_fn is None
    for options in ({"dilation": 2}, {"padding": "same", "stride": 1}, {"bias": False}, {"padding_mode": "reflect"}):
        other = CellConv2d(5, 4, 3, **({"padding": 1} | options))
        assert rule(other, image) == "ConvolutionBackward0"
    assert rule(CellConv2d(5, 5, 3, groups=5), image) == "ConvolutionBackward0"
    monkeypatch.setattr(convolution, "MANY", weight.numel() + 1)
    assert rule(made, image) == "ConvolutionBackward0"
    monkeypatch.setattr(convolution, "MANY", weight.numel())
    assert rule(made, image) == "_ByCellsBackward"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert rule(made, image) == "ConvolutionBackward0"


def test_other_inputs_are_refused_in_torchs_words():
    made = layer(3, 2, 1)
    with pytest.raises(RuntimeError, match="expected input"):
        made(torch.zeros(2, 3, 8, 8))
    with pytest.raises(RuntimeError, match="size"):
        CellConv2d(5, 4, 9)(torch.zeros(2, 5, 8, 8))
    assert made(torch.zeros(5, 8, 8)).shape == (4, 4, 4)
    assert made(torch.zeros(0, 5, 8, 8)).shape == (0, 4, 4, 4)


def test_autocast_is_torchs():
    image, weight, bias = tensors(dtype=torch.float32)
    ours = layer(3, 2, 1, weight=weight, bias=bias)
    theirs = nn.Conv2d(5, 4, 3, stride=2, padding=1)
    theirs.load_state_dict(ours.state_dict())

    def outcome(module):
        leaf = image.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = module(leaf)
        return out.detach(), *torch.autograd.grad(out, (leaf, *module.parameters()), torch.ones_like(out))

    for x, y in zip(outcome(ours), outcome(theirs), strict=True):
        assert x.dtype == y.dtype
        # Sums of up to 45 numbers of order one, each rounded once or, the image's gradient, for each place in a filter.
        torch.testing.assert_close(x.float(), y.float(), rtol=0, atol=9 * 2**-8 * float(y.abs().max()))


def test_transformations_and_compilers_see_torchs_operator():
    made, (image, _, _) = layer(3, 2, 1), tensors(dtype=torch.float32)
    parameters = dict(made.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(made, parameters, (image,)).square().sum()

    found = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(made(image).square().sum(), tuple(made.parameters()))
    for x, y in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    exported = torch.export.export(made, (image,))
    assert any("conv2d" in str(node.target) for node in exported.graph.nodes)
