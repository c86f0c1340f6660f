"""The MLP of SOFT's blocks, by compiled kernels where there are any, against timm's."""

import mlp
import pytest
import torch
from timm.layers import Mlp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lowrank import _native

DIM = 32
COMPILED = pytest.mark.skipif(not _native.is_built(), reason="no C compiler was found when lowrank was installed")


def pair(dtype=torch.float64):
    torch.manual_seed(0)
    ours, theirs = mlp.TokenMlp(DIM).to(dtype), Mlp(DIM, 4 * DIM, act_layer=lambda: torch.nn.GELU("tanh")).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def tokens(*shape, dtype=torch.float64):
    # Wide enough for the activation to be flat at either end.
    return 4 * torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(1), dtype=dtype)


def gradients(module, x):
    x = x.clone().requires_grad_()
    out = module(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    return out.detach(), *torch.autograd.grad(out, (x, *module.parameters()), cotangent)


@pytest.mark.parametrize("shape", [(8,), (2, 4), (2, 2, 2), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_those_of_the_layer(shape, dtype):
    ours, theirs = pair(dtype)
    x = tokens(*shape, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=30 * torch.finfo(dtype).eps)
    for found, expected in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        assert found.shape == expected.shape
        # Sums over eight tokens, or 128 channels, of numbers below 30.
        torch.testing.assert_close(found, expected, rtol=0, atol=500 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(8,), (2, 4), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_input_can_be_added(shape, dtype):
    ours, theirs = pair(dtype)
    x = tokens(*shape, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(ours.plus_input(x), x + theirs(x), rtol=0, atol=30 * torch.finfo(dtype).eps)
    found = torch.nn.ModuleList([ours])  # a module of the same parameters
    found.forward = ours.plus_input
    expected = torch.nn.ModuleList([theirs])
    expected.forward = lambda x: x + theirs(x)
    for a, b in zip(gradients(found, x), gradients(expected, x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=500 * torch.finfo(dtype).eps)
    assert torch.autograd.gradgradcheck(pair()[0].plus_input, tokens(3).requires_grad_())


ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")
BFLOAT16 = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN computes in bfloat16 on some processors only",
)


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


@ONEDNN
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("numbers", [1, 3 * 4 * DIM, 2**22], ids=["row", "rows", "all"])
def test_bias_and_activation_in_the_products_pass(approximate, numbers, monkeypatch):
    """Where nothing is to be differentiated and there are no kernels: one token at a time, three of eight, all."""
    monkeypatch.setattr(mlp, "FUSED", numbers)
    monkeypatch.setattr(_native, "is_built", lambda: False)
    torch.manual_seed(0)
    layer, x = mlp.TokenMlp(DIM, approximate=approximate), tokens(2, 4, dtype=torch.float32)
    theirs = Mlp(DIM, 4 * DIM, act_layer=lambda: torch.nn.GELU(approximate))
    theirs.load_state_dict(layer.state_dict())
    expected = theirs.double()(x.double()).float().detach()
    with torch.no_grad(), FlopCounterMode(display=False) as counter, Operators() as operators:
        found = layer(x)
    assert operators.seen & {"_linear_pointwise"}
    assert counter.get_total_flops() == 2 * 8 * 2 * DIM * 4 * DIM
    torch.testing.assert_close(found, expected, rtol=0, atol=30 * 2.0**-23)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        torch.testing.assert_close(layer.plus_input(x), x + expected, rtol=0, atol=30 * 2.0**-23)
    assert counter.get_total_flops() == 2 * 8 * 2 * DIM * 4 * DIM
    frozen = layer.requires_grad_(False)
    assert torch.equal(frozen(x), found)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with Operators() as operators:
        torch.testing.assert_close(frozen(x), found, rtol=0, atol=30 * 2.0**-23)
    assert not operators.seen & {"_linear_pointwise"}


@pytest.mark.parametrize("recorded", [False, True])
def test_tokens_of_another_width_are_refused_as_by_torch(recorded):
    layer = mlp.TokenMlp(DIM)
    with torch.set_grad_enabled(recorded), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.zeros(2, DIM + 1))


@BFLOAT16
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_right_as_torchs(autocast):
    layer, theirs = pair(torch.float32)
    x = tokens(200, dtype=torch.float32)
    exact = theirs.double()(x.double()).detach()
    theirs = theirs.float()
    with torch.no_grad():
        if autocast:
            with torch.autocast("cpu", torch.bfloat16), Operators() as operators:
                found, expected, added = layer(x), theirs(x), layer.plus_input(x)
            assert added.dtype == torch.float32
            assert torch.equal(added, x + found)
        else:
            with Operators() as operators:
                found, expected = (module.bfloat16()(x.bfloat16()) for module in (layer, theirs))
    assert operators.seen & {"_linear_pointwise"}
    assert found.dtype == torch.bfloat16
    ours, torchs = (torch.linalg.norm(y.double() - exact) for y in (found, expected))
    assert ours <= 1.1 * torchs  # the activation is rounded once, and not before it as well


def test_strides_of_tokens_and_cotangents_do_not_matter():
    ours, theirs = pair()
    x = tokens(4, 2).transpose(0, 1)
    for module in (ours, theirs):
        module(x).transpose(0, 1).flatten(1).sum().backward()  # expands
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_derivatives_against_differences_once_and_twice():
    ours, _ = pair()
    x = tokens(8).requires_grad_()
    assert torch.autograd.gradcheck(ours, x)
    assert torch.autograd.gradgradcheck(ours, x)


def test_many_cotangents_at_once():
    ours, theirs = pair()
    some = tokens(3, 8)
    found, expected = (
        torch.autograd.grad(module(tokens(8)), module.parameters(), some, is_grads_batched=True)
        for module in (ours, theirs)
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("frozen", ["fc1", "fc2"])
def test_frozen_layers_have_no_gradient(frozen):
    ours, theirs = pair()
    for module in (ours, theirs):
        getattr(module, frozen).requires_grad_(False)
        module(tokens(8)).square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


HOOKS = ["register_forward_hook", "register_forward_pre_hook"]
HOOKS += ["register_full_backward_hook", "register_full_backward_pre_hook"]


@COMPILED
def test_the_hidden_layer_is_not_stored(monkeypatch):
    ours, _ = pair(torch.float32)
    x, kept = tokens(100, dtype=torch.float32).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        out = ours(x)
    known = [y.data_ptr() for y in (x, *ours.parameters())]
    assert kept
    assert all(y.data_ptr() in known for y in kept)
    # Nor is it by torch's operations, of which there are none.
    for name in ("linear", "gelu"):
        monkeypatch.setattr(torch.nn.functional, name, None)
    ours(x)
    out.sum().backward()


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_activation_alone_is_compiled_as_well(dtype):
    act, u = mlp.Gelu("tanh"), tokens(50, dtype=torch.float32).to(dtype).requires_grad_()
    expected = torch.nn.functional.gelu(u, approximate="tanh")
    found = act(u)
    assert "Gelu" in type(found.grad_fn).__name__
    assert type(found.grad_fn) is not type(expected.grad_fn)
    close = {"rtol": torch.finfo(dtype).eps, "atol": 8 * 2.0**-23}
    torch.testing.assert_close(found, expected, **close)
    g = torch.randn(u.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (once,), (twice,) = (torch.autograd.grad(y, u, g, create_graph=True) for y in (found, expected))
    torch.testing.assert_close(once, twice)
    torch.testing.assert_close(torch.autograd.grad(found, u, g)[0], twice, rtol=close["rtol"], atol=1e-5)
    second = (torch.autograd.grad(y.sum(), u)[0] for y in (once, twice))
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("hook", HOOKS)
def test_who_wants_to_see_the_layers_between_does(hook):
    ours, theirs = pair()
    seen = []
    for module in (ours, theirs):
        getattr(module.act, hook)(lambda *given: seen.append(given[0]))
        module(tokens(8).requires_grad_()).sum().backward()
    assert seen == [ours.act, theirs.act]


@pytest.mark.parametrize(
    "change",
    [
        lambda mlp: setattr(mlp, "fc1", torch.nn.Linear(DIM, 4 * DIM, bias=False).double()),
        lambda mlp: setattr(mlp, "fc2", torch.nn.utils.parametrizations.weight_norm(mlp.fc2)),
        lambda mlp: setattr(mlp, "act", torch.nn.GELU()),
        lambda mlp: setattr(mlp, "act", torch.nn.Tanh()),
        lambda mlp: setattr(mlp, "norm", torch.nn.LayerNorm(4 * DIM).double()),
        lambda mlp: setattr(mlp.drop1, "p", 0.5),
    ],
    ids=["no bias", "parametrized", "exact", "tanh", "norm", "dropout"],
)
def test_layers_that_were_changed_are_used(change):
    ours, theirs = pair()
    torch.manual_seed(4)
    change(ours)
    torch.manual_seed(4)
    change(theirs)
    theirs.load_state_dict(ours.state_dict())
    torch.manual_seed(5)
    found = gradients(ours, tokens(8))
    torch.manual_seed(5)
    for x, y in zip(found, gradients(theirs, tokens(8)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_another_second_layer_is_torchs(dtype):
    ours, theirs = pair(dtype)
    torch.manual_seed(6)
    ours.fc2 = theirs.fc2 = torch.nn.Linear(4 * DIM, 2 * DIM).to(dtype)
    close = {"rtol": 0, "atol": 30 * torch.finfo(dtype).eps}
    torch.testing.assert_close(ours(tokens(8, dtype=dtype)), theirs(tokens(8, dtype=dtype)), **close)
    with pytest.raises(RuntimeError, match="must match the size"):
        ours.plus_input(tokens(8, dtype=dtype))


def test_dropout_is_for_training():
    ours, theirs = pair()
    for module in (ours, theirs):
        module.drop1.p = module.drop2.p = 0.5
        module.eval()
    torch.testing.assert_close(ours(tokens(8)), theirs(tokens(8)), rtol=0, atol=30 * torch.finfo(torch.float64).eps)


def test_transformations_of_torch_func():
    ours, theirs = pair()
    x = tokens(3, 4)
    for transform in (torch.func.vmap, torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(ours)(x), transform(theirs)(x))
    tangent = tokens(4, 3).reshape(x.shape)
    for found, expected in zip(*(torch.func.jvp(m, (x,), (tangent,)) for m in (ours, theirs)), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_torchs(dtype):
    ours, theirs = pair(torch.float32)
    x = tokens(8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(ours(x), theirs(x))
        assert ours(x).dtype == dtype
    assert torch.equal(ours.to(dtype)(x.to(dtype)), theirs.to(dtype)(x.to(dtype)))
