"""Attention by its formula, all of C at once, where landmarks nearly coincide: of JAX, ``torch.func``, and again."""

import array_api_compat.torch as xp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lowrank import softmax_free_attention
from lowrank._formula import gaussian_gram
from lowrank._nearby import nearby

EPS = 2.0**-23
KINDS = ["random", "pairs", "equal", "clusters", "all", "ball"]
OPTIONS = [{}, {"method": "direct"}, {"normalize": True}, {"landmark_mask": True}, {"queries": True}, {"mask": True}]


def points(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def near_singular(kind):
    """q, v, landmarks that nearly coincide but are far from one another else, and a cotangent."""
    sizes = enumerate((300, 300, 300, 49, 49))
    q, v, g, z, step = (points(k, 2, n, 32) for k, n in sizes)
    if kind == "pairs":
        z[:, 24:48] = z[:, :24] + 1e-3 * step[:, :24]
    elif kind == "equal":
        z[:, 24:48] = z[:, :24]
    elif kind == "clusters":
        z = z[:, :7].repeat_interleave(7, 1) + 1e-4 * step
    elif kind == "all":
        z = z[:, :1] + 1e-2 * step
    elif kind == "ball":
        z = z[:, :1] + 0.2 * step
    return q, v, z, g


def attention(options, xp):
    def of(q, v, z):
        given = dict(options)
        if "landmark_mask" in given:
            given["landmark_mask"] = xp.broadcast_to(xp.arange(49) % 5 != 3, (2, 49))
        if "mask" in given:
            given["mask"] = xp.broadcast_to(xp.arange(300) % 7 != 3, (2, 300))
        if "queries" in given:
            given["queries"] = xp.flip(q, (1,))
        return softmax_free_attention(q, v, z, **given)

    return of


def recorded(f, given, g, **options):
    leaves = [x.clone().requires_grad_() for x in given]
    return torch.autograd.grad(f(*leaves), leaves, g, **options)


def by_func(options, given, g):
    f = attention(options, torch)
    return torch.func.grad(lambda *given: (f(*given) * g).sum(), (0, 1, 2))(*given)


def by_graph(options, given, g):
    return recorded(attention(options, torch), given, g, create_graph=True)


def by_many(options, given, g):
    found = recorded(attention(options, torch), given, torch.stack([g, g.flip(1)]), is_grads_batched=True)
    return [x[0] for x in found]


def by_jax(options, given, g):
    f = attention(options, jnp)
    slope = jax.grad(lambda *given: (f(*given) * g.numpy()).sum(), (0, 1, 2))
    return [torch.from_numpy(np.array(x)) for x in jax.jit(slope)(*(jnp.asarray(x.numpy()) for x in given))]


WAYS = [by_func, by_jax, by_graph, by_many]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("way", WAYS)
def test_gradients_in_single_precision(way, options, kind):
    """For torch it is that of the result alone. Of differences between landmarks, which JAX takes, rounding is as small
    as they are, and no condition of P comes in, but in a ball, where smooth combinations of many landmarks are smaller
    than differences of two, some of it."""
    *given, g = near_singular(kind)
    exact = recorded(attention(options, torch), [x.double() for x in given], g.double())
    for found, expected in zip(way(options, given, g), exact, strict=True):
        most = 1 if way is not by_jax else 64 if kind == "ball" else 24
        assert torch.linalg.norm(found - expected) < most * EPS * torch.linalg.norm(expected)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("kind", ["pairs", "clusters"])
@pytest.mark.parametrize("func", [False, True], ids=["recorded", "func"])
def test_gradients_of_compiled_programs(kind, func):
    *given, g = near_singular(kind)
    exact = recorded(softmax_free_attention, [x.double() for x in given], g.double())
    if func:
        slope = torch.func.grad(lambda *given: (softmax_free_attention(*given) * g).sum(), (0, 1, 2))
        found = torch.compile(slope, fullgraph=True, backend="aot_eager")(*given)
    else:
        compiled = torch.compile(softmax_free_attention, fullgraph=True, backend="aot_eager")
        found = recorded(compiled, given, g)
    for x, y in zip(found, exact, strict=True):
        assert torch.linalg.norm(x - y) < EPS * torch.linalg.norm(y)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("count", [False, True])
def test_programs_are_compiled_for_one_size_after_the_other(count):
    """From the second on torch's compiler takes sizes for symbols, those of landmarks too."""
    torch._dynamo.reset()  # It compiles no more than eight programs of a line of code.
    compiled = torch.compile(softmax_free_attention, fullgraph=True, backend="aot_eager")
    for m in (6, 7, 9):
        given = points(0, 2, 10 * m, 4), points(1, 2, 10 * m, 3), 5 if count else points(2, 2, m, 4)
        torch.testing.assert_close(compiled(*given), softmax_free_attention(*given), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["pairs", "clusters"])
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_second_derivatives_in_single_precision(library, kind):
    """They have P⁻¹ once more, and with it what is left of the condition."""
    *given, g = near_singular(kind)
    along = [points(10 + k, *x.shape) for k, x in enumerate(given)]

    def twice(given, g, along):
        leaves = [x.clone().requires_grad_() for x in given]
        once = torch.autograd.grad(softmax_free_attention(*leaves), leaves, g, create_graph=True)
        return torch.autograd.grad(sum((x * y).sum() for x, y in zip(once, along, strict=True)), leaves)

    def twice_by_jax(given, g, along):
        given, g, along = ([jnp.asarray(x.numpy()) for x in many] for many in (given, [g], along))
        slope = jax.grad(lambda *given: (softmax_free_attention(*given) * g[0]).sum(), (0, 1, 2))
        of = jax.grad(lambda *given: sum((x * y).sum() for x, y in zip(slope(*given), along, strict=True)), (0, 1, 2))
        return [torch.from_numpy(np.array(x)) for x in of(*given)]

    exact = twice([x.double() for x in given], g.double(), [x.double() for x in along])
    found = (twice if library == "torch" else twice_by_jax)(given, g, along)
    for x, y in zip(found, exact, strict=True):
        assert torch.linalg.norm(x - y) < 100 * EPS * torch.linalg.norm(y)


def test_forward_derivatives():
    *given, _ = near_singular("pairs")
    along = [points(10 + k, *x.shape) for k, x in enumerate(given)]
    _, exact = torch.func.jvp(softmax_free_attention, *(tuple(x.double() for x in many) for many in (given, along)))
    _, ours = torch.func.jvp(softmax_free_attention, tuple(given), tuple(along))
    _, by_jax = jax.jvp(softmax_free_attention, *([jnp.asarray(x.numpy()) for x in many] for many in (given, along)))
    assert torch.linalg.norm(ours - exact) < 24 * EPS * torch.linalg.norm(exact)
    # Some of it is made of C, whose rounding P⁻¹, of norm 1/δ at the most, multiplies.
    assert torch.linalg.norm(torch.from_numpy(np.array(by_jax)) - exact) < 100 * EPS * torch.linalg.norm(exact)


@pytest.mark.parametrize("kind", ["pairs", "clusters", "all"])
def test_what_differs_is_right_entry_by_entry(kind):
    """L A Lᵀ, whose entries are small where two landmarks each are near their parents."""
    *_, z, _ = near_singular(kind)
    centre, scale = z.mean(-2, keepdim=True), 32**-0.25
    near = nearby(z, centre, scale, xp)
    y, wide = (z - centre) * scale, (z.double() - centre.double()) * scale
    a, exact = gaussian_gram(y, xp), torch.exp(-0.5 * torch.cdist(wide, wide) ** 2)
    exact = near.links @ exact @ near.links.mT
    found = near.of_gram(a, y, xp)
    assert (near.links.sum(-1) == 0).any()
    # Of the larger of the two diagonal entries, each of which is ‖z − p‖²; points of norm 5 at the most.
    size = exact.diagonal(dim1=-2, dim2=-1)
    largest = torch.maximum(size[..., :, None], size[..., None, :])
    assert ((found - exact).abs() <= 32 * EPS * largest).all()


def test_who_wants_no_derivative_does_not_pay():
    given = [jnp.asarray(x.numpy()) for x in near_singular("pairs")[:3]]
    compiled = jax.jit(softmax_free_attention).lower(*given).as_text()
    assert "exponential " in compiled
    assert "exponential_minus_one" not in compiled

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(32))

        def forward(self, q, v, z):
            return softmax_free_attention(q * self.weight, v, z)

    program = torch.export.export(Module(), near_singular("pairs")[:3])
    operations = {str(node.target) for node in program.graph.nodes}
    assert "aten.exp.default" in operations
    assert "aten.expm1.default" not in operations


@pytest.mark.parametrize("way", WAYS)
def test_tokens_out_of_reach_have_no_part_in_derivatives(way):
    """Nor have their values, however large; C is 0 there, and what differs between landmarks would be infinite."""
    q, v, z, g = near_singular("all")
    far, large = torch.cat([q, 1e4 * q], 1), torch.cat([v, 1e4 * v], 1)
    q_bar, v_bar, z_bar = way({}, (far, large, z), torch.cat([g, g], 1))
    for found, expected in zip((q_bar, v_bar), way({}, (q, v, z), g)[:2], strict=True):
        assert not found[:, 300:].any()
        torch.testing.assert_close(found[:, :300], expected, rtol=0, atol=24 * EPS * expected.abs().max().item())
    assert torch.isfinite(z_bar).all()
