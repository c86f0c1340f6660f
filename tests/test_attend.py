"""The blocked way forward and back of attention against its formula, all of C at once and differentiated by torch."""

import functools
from concurrent.futures import ThreadPoolExecutor

import array_api_compat
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lowrank import _attend, _formula, _native, pinv, pinv_newton, softmax_free_attention
from lowrank import attention as room
from lowrank._array import exp_of_negative
from lowrank._torch_attention import gaussian_product
from lowrank.kernels import gaussian_kernel

EPS = 2.0**-23


def points(seed, *shape, spread=0.5, dtype=torch.float64):
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def arrays(batch=(2, 3), n=37, m=7, d=5, e=4, *, solves=False):
    """q, z, v, a core, the system that it inverts or None, and a centre."""
    q, z, v, core = points(0, *batch, n, d), points(1, *batch, m, d), points(2, *batch, n, e), points(3, *batch, m, m)
    system = core @ core.mT + torch.eye(m) if solves else None
    return q, z, v, torch.linalg.inv(system) if solves else core, system, z.mean(-2, keepdim=True)


XP = array_api_compat.array_namespace(torch.zeros(1))


@pytest.fixture
def uncompiled(monkeypatch):
    """The blocks, also where there are compiled kernels."""
    monkeypatch.setattr(_native, "is_built", lambda: False)


@pytest.fixture(params=[2**18, 7 * 37 * 3, 7 * 37, 7 * 10, 1], ids=["one", "images", "heads", "rows", "row"])
def entries(request, monkeypatch, uncompiled):
    """Entries of a block: for all elements at once, for an image, for a head, for ten points, for one."""
    monkeypatch.setattr(_attend, "_CPU_ENTRIES", request.param)


def gradients(f, *given):
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = f(*leaves)
    weight = points(9, *out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def ways(scale=1.0):
    """The blocked way and the formula, of q, z, v, core, system and centre."""
    return [
        functools.partial(lambda way, *given: way(*given, scale, XP), way) for way in (room._attended, _formula.plain)
    ]


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("solves", [False, True])
def test_blocks_agree_with_the_formula(batch, scale, solves, entries):
    q, z, v, core, system, centre = arrays(batch, solves=solves)
    inner = system if solves else core

    def of(way):
        return lambda q, z, v, inner: way(q, z, v, *((core, inner) if solves else (inner, None)), centre)

    for ours, expected in zip(*(gradients(of(way), q, z, v, inner) for way in ways(scale)), strict=True):
        assert ours.shape == expected.shape
        # Sums over at most 37 points of numbers of order one, and 7 landmarks.
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e3 * np.finfo(float).eps * expected.abs().max())


@pytest.mark.parametrize("solves", [False, True])
def test_numpy_blocks_agree_with_the_formula(solves, entries):
    given = [None if x is None else x.numpy() for x in arrays(solves=solves)]
    for x in given:
        if x is not None:
            x.flags.writeable = False
    xp = array_api_compat.array_namespace(given[0])
    ours, expected = (way(*given, 0.7, xp) for way in (room._attended, _formula.plain))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e3 * np.finfo(float).eps * np.max(np.abs(expected)))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("rows", "again"), [(40, 0), (10, 0), (8, 8), (4, 24), (1, 36)])
def test_what_is_kept_is_not_computed_again(rows, again, backward, monkeypatch):
    """Of 40 points those of three blocks, and of the last, whose turn comes again at once, are computed once."""
    q, z, v, _, system, centre = arrays(batch=(1, 1), n=40, solves=True)
    n, m, d, e = 40, 7, 5, 4
    monkeypatch.setattr(_attend, "_CPU_ENTRIES", rows * m)
    monkeypatch.setattr(_attend, "_CPU_BLOCKS", 4)
    core, counter = torch.linalg.inv(system), FlopCounterMode(display=False)
    out, sums, weights = _attend.forward(q, z, v, core, None, centre, 1.0, XP)
    with counter:
        if backward:
            _attend.backward(q, z, v, core, None, centre, 1.0, sums, weights, out, XP, of_gram=False)
        else:
            _attend.forward(q, z, v, core, None, centre, 1.0, XP)
    distances, others = (n + again) * d, n * (2 * d + 4 * e if backward else 2 * e)
    cores = m * m * e + (m * m * e if backward else 0)  # w or σ̄, and M̄
    assert counter.get_total_flops() == 2 * (m * (distances + others) + cores)


def test_what_others_computed_since_is_not_taken_for_ones_own(entries):
    """Gradients after other attentions of the same and of other sizes, of another dtype and of another thread, of two
    at once in either order, and for a second time, are those after none."""
    given = arrays()
    blocked = ways()[0]

    def result(seed):
        q, z, v, core, system, centre = given
        leaves = [x.detach().clone().requires_grad_() for x in (q + points(seed, *q.shape), z, v)]
        return leaves, blocked(*leaves, core, system, centre)

    def derivatives(leaves, out, **options):
        return torch.autograd.grad(out, leaves, torch.ones_like(out), **options)

    expected = [derivatives(*result(seed)) for seed in (10, 11)]
    (first, second), again = [result(seed) for seed in (10, 11)], result(10)
    attended(0, 100, "torch")
    with ThreadPoolExecutor(1) as pool:
        from_thread = pool.submit(lambda: derivatives(*result(10))).result()
        elsewhere = pool.submit(lambda: derivatives(*again)).result()
    found = [derivatives(*first, retain_graph=True), derivatives(*second)]
    for x, y in (*zip(found, expected, strict=True), (derivatives(*first), expected[0]), (from_thread, expected[0])):
        assert all(map(torch.equal, x, y))
    assert all(map(torch.equal, elsewhere, expected[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads_apart", [False, True])
def test_half_precision_is_rounded_at_the_end_alone(dtype, heads_apart, entries):
    """q and v of half precision, whose parts are cast when their turn comes, and their derivatives, against casts of
    all of them before and after."""
    q, z, v, _, system, centre = (x if x is None else x.float() for x in arrays(solves=True))
    core = torch.linalg.inv(system)
    if heads_apart:
        q, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, v))

    def cast_before(q, z, v):
        return room._attended(q.float(), z, v.float(), core, system, centre, 0.7, XP).to(dtype)

    def cast_in_parts(q, z, v):
        return room._attended(q, z, v, core, system, centre, 0.7, XP)

    expected, found = (gradients(f, q.to(dtype), z, v.to(dtype)) for f in (cast_before, cast_in_parts))
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        if x.dtype == torch.float32:
            # Sums over 37 points, which a library may take in another order for another layout.
            torch.testing.assert_close(x, y, rtol=0, atol=37 * EPS * y.abs().max().item())
        else:
            # Seldom is a number so near the middle of two of half precision that it then becomes the other.
            assert (x != y).double().mean() < 0.01


def test_half_precision_takes_memory_for_a_block_alone(monkeypatch, uncompiled):
    n, m, d, e = 1000, 7, 5, 4
    monkeypatch.setattr(_attend, "_CPU_ENTRIES", 100 * m)

    def kept():
        q, z, v = (points(i, *shape).bfloat16() for i, shape in enumerate([(n, d), (m, d), (n, e)]))
        softmax_free_attention(q.requires_grad_(), v.requires_grad_(), z).float().sum().backward()
        return {name: block.numel() for (name, *_), block in _attend._kept.blocks.items()}

    with ThreadPoolExecutor(1) as pool:
        sizes = pool.submit(kept).result()
    assert sizes == {"c": 200 * m, "x0": 100 * d, "x1": 100 * d, "v": 100 * e, "g": 100 * e, "h": 100 * m}


def test_half_precision_is_differentiated_twice():
    q, z, v = (x.bfloat16().requires_grad_() for x in (points(0, 9, 3), points(1, 4, 3), points(2, 9, 2)))

    def second(f):
        (slope,) = torch.autograd.grad(f(q, v, z).float().square().sum(), q, create_graph=True)
        return torch.autograd.grad(slope.float().square().sum(), (q, v, z))

    def all_single(q, v, z):
        return softmax_free_attention(q.float(), v.float(), z.float())

    # Roundings of the result, of the slope and of what is returned, of numbers as large as these.
    for x, y in zip(second(softmax_free_attention), second(all_single), strict=True):
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(x.float(), y.float(), rtol=0, atol=8 * 2**-8 * float(y.abs().max()))


def test_batch_axes_broadcast(entries):
    q, z, v, core, system, centre = arrays(solves=True)
    some = q[0], z[:, :1], v, core[:1, 1:2], system[:1, 1:2], centre[:, :1]
    leaves = [x.detach().clone().requires_grad_(i != 3) for i, x in enumerate(some[:5])]
    blocked, formula = ways()
    out = blocked(*leaves, some[5])
    torch.testing.assert_close(out, formula(*(x.expand(2, 3, *x.shape[-2:]) for x in some)))
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in leaves if x.requires_grad)


def test_strides_of_heads_are_kept(entries):
    """Heads cut out of tokens (B, n, H·e) come back as (B, n, H·e), without a copy, and so do derivatives."""
    q, z, v, *rest = arrays()

    def result_and_derivatives(q, v):
        leaves = [x.detach().requires_grad_() for x in (q, v)]
        out = ways()[0](leaves[0], z, leaves[1], *rest)
        return [out.detach(), *torch.autograd.grad((out * points(9, *out.shape)).sum(), leaves)]

    split = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, v)]
    for found, expected in zip(result_and_derivatives(*split), result_and_derivatives(q, v), strict=True):
        assert found.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("wants", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("solves", [False, True])
def test_only_the_derivatives_that_are_wanted(wants, solves):
    q, z, v, core, system, centre = arrays((2,), solves=solves)
    given = [x.requires_grad_(i in wants) for i, x in enumerate((q, z, v, system if solves else core))]
    inner = (core, system) if solves else (core, None)
    leaves = [given[i] for i in wants]
    blocked, formula = (way(*given[:3], *inner, centre).sum() for way in ways())
    theirs = torch.autograd.grad(formula, leaves)
    for create_graph in (True, False):
        ours = torch.autograd.grad(blocked, leaves, create_graph=create_graph, retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def attention(q, v, z):
    return softmax_free_attention(q, v, z, ridge=0.1)


def triple(n=9, m=4, d=3, e=2):
    return points(1, 2, n, d), points(2, 2, n, e), points(3, 2, m, d)


def test_second_derivatives():
    assert torch.autograd.gradgradcheck(attention, [x.requires_grad_() for x in triple()])


def test_many_cotangents_at_once():
    leaves = [x.requires_grad_() for x in triple()]
    out = attention(*leaves)
    cotangents = points(5, 3, *out.shape)
    together = torch.autograd.grad(out, leaves, cotangents, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(cotangents):
        for ours, theirs in zip(together, torch.autograd.grad(out, leaves, g, retain_graph=True), strict=True):
            torch.testing.assert_close(ours[i], theirs)


def test_transformations():
    q, v, z = triple()
    expected = gradients(attention, q, v, z)
    weight = points(9, *expected[0].shape)

    def loss(*given):
        return (attention(*given) * weight).sum()

    for ours, theirs in zip(torch.func.grad(loss, argnums=(0, 1, 2))(q, v, z), expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs)
    _, tangent = torch.func.jvp(loss, (q, v, z), (q, v, z))
    along = sum((g * x).sum() for g, x in zip(expected[1:], (q, v, z), strict=True))
    torch.testing.assert_close(tangent, along)
    mapped = torch.func.vmap(attention)(q, v, z)
    torch.testing.assert_close(mapped, expected[0])


def test_nothing_of_the_size_of_c_is_kept():
    """For backward the inputs are kept, and cores and sums of the landmarks; C would be n × m."""
    q, v, z = points(1, 4000, 3), points(2, 4000, 2), points(3, 40, 3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        attention(*(x.requires_grad_() for x in (q, v, z)))
    assert kept
    assert max(x.numel() for x in kept) <= q.numel()


@pytest.mark.parametrize("method", ["newton", "direct"])
@pytest.mark.parametrize("landmarks", ["random", "near-singular"])
def test_single_precision_gradients(landmarks, method, entries):
    """To 1e-5 of the largest entry, of what float64 gives for the formula."""
    q, v, z = (x.float() for x in (points(1, 2, 3, 37, 8), points(2, 2, 3, 37, 4), points(3, 2, 3, 12, 8)))
    if landmarks == "near-singular":
        z[..., 6:, :] = z[..., :6, :] + 1e-3 * z[..., 6:, :]

    def exact(q, v, z):
        """The same in float64, by an inverse of torch's and torch's derivatives."""
        x, y = q / 8**0.25, z / 8**0.25
        c, a = (torch.exp(-0.5 * (s[..., :, None, :] - y[..., None, :, :]).square().sum(-1)) for s in (x, y))
        return c @ torch.linalg.solve(a + 0.01 * torch.eye(12), c.mT @ v)

    expected = gradients(exact, *(x.double() for x in (q, v, z)))
    found = gradients(functools.partial(softmax_free_attention, method=method), q, v, z)
    # Entries of C are right to some eps, and the derivative in the landmarks has the inverse on both sides: where pairs
    # of landmarks nearly coincide C in float32 alone, all else exact, leaves 1e-5 of it wrong, as its differences of
    # 1e-3 are resolved to eps/1e-3.
    bounds = [1e-6] * 3 + [1e-5 if landmarks == "random" else 1e-4]
    for ours, theirs, bound in zip(found, expected, bounds, strict=True):
        assert torch.linalg.norm(ours.double() - theirs) < bound * torch.linalg.norm(theirs)


def test_gradients_ignore_what_is_masked(entries):
    q, v, z = points(1, 2, 3, 37, 5), points(2, 2, 3, 37, 4), points(3, 2, 3, 7, 5)
    mask = torch.arange(37) % 3 > 0
    landmark_mask = torch.arange(7) != 2

    def masked(q, v, z):
        return softmax_free_attention(q, v, z, mask=mask[None, None], landmark_mask=landmark_mask[None, None])

    def alone(q, v, z):
        return softmax_free_attention(q[..., mask, :], v[..., mask, :], z[..., landmark_mask, :])

    poisoned = [torch.where(m[:, None], x, torch.nan) for x, m in ((q, mask), (v, mask), (z, landmark_mask))]
    leaves = [x.requires_grad_() for x in poisoned]
    out = masked(*leaves)
    assert torch.equal(out[..., ~mask, :], torch.zeros_like(out[..., ~mask, :]))
    weight = points(9, *out.shape)
    ours = torch.autograd.grad((out * weight).sum(), leaves)
    clean = [x.requires_grad_() for x in (q, v, z)]
    theirs = torch.autograd.grad((alone(*clean) * weight[..., mask, :]).sum(), clean)
    for a, b in zip(ours, theirs, strict=True):
        # κ² of the core, 1 + 7/0.01, passes twice.
        torch.testing.assert_close(a, b, rtol=0, atol=701**2 * 2.3e-16 * 10)


def test_queries_of_their_own():
    q, v, z, asking = (x.requires_grad_() for x in (*triple(), points(4, 3, 1, 5, 3)))
    c, a, of_asking = (gaussian_kernel(x, z, lengthscale=3**0.25) for x in (q, z, asking))
    expected = of_asking @ torch.linalg.solve(a + 0.1 * torch.eye(z.shape[-2]), c.mT @ v)
    out = softmax_free_attention(q, v, z, ridge=0.1, queries=asking)
    assert out.shape == (3, 2, 5, 2)
    torch.testing.assert_close(out, expected)
    assert torch.autograd.gradcheck(
        lambda q, v, z, asking: softmax_free_attention(q, v, z, ridge=0.1, queries=asking), (q, v, z, asking)
    )


def test_queries_of_no_tokens_get_nothing():
    q, v, z = triple()
    out = softmax_free_attention(q[:, :0], v[:, :0], z, queries=q)
    assert torch.equal(out, torch.zeros_like(v))


def test_what_rounding_counts_for_is_asked_for_the_way_back_alone(monkeypatch, uncompiled):
    """Whoever only wants X does not pay for it."""

    class Asked(Exception):
        pass

    def asked(*_):
        raise Asked

    monkeypatch.setattr(_attend, "_amplification", asked)
    q, v, z = (x.float() for x in triple())
    softmax_free_attention(q, v, z)
    softmax_free_attention(q.numpy(), v.numpy(), z.numpy())
    for x in (q, v, z):
        with pytest.raises(Asked):
            softmax_free_attention(*(y.clone().requires_grad_() if y is x else y for y in (q, v, z)))
        with torch.no_grad():
            softmax_free_attention(*(y.clone().requires_grad_() if y is x else y for y in (q, v, z)))


def test_nothing_is_more_exact_than_double_precision(monkeypatch, uncompiled):
    monkeypatch.setattr(_attend, "_amplification", None)
    q, v, z = (x.requires_grad_() for x in triple())
    softmax_free_attention(q, v, z).sum().backward()


def near_singular(kind):
    """q, v, landmarks that nearly coincide, in pairs, in clusters or all, or lie on a line or in a plane, less than
    half a lengthscale apart, but are far from one another else, and a cotangent."""
    sizes = enumerate((500, 500, 500, 49, 49))
    q, v, g, z, step = (points(k, 2, n, 32, spread=1.0, dtype=torch.float32) for k, n in sizes)
    unit, other = step[:, :1] / step[:, :1].norm(dim=-1, keepdim=True), step[:, 1:2] / 32**0.5
    if kind == "pairs":
        z[:, 24:48] = z[:, :24] + 1e-3 * step[:, :24]
    elif kind == "clusters":
        z = z[:, :7].repeat_interleave(7, 1) + 1e-4 * step
    elif kind == "all":
        z = z[:, :1] + 1e-2 * step
    elif kind == "line":
        z = z[:, :1] + (torch.arange(49.0)[:, None] - 24) * unit
    elif kind == "plane":
        z = z[:, :1] + (torch.arange(49.0) % 7)[:, None] * unit + (torch.arange(49.0) // 7)[:, None] * other
    return q, v, z, g


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", ["random", "pairs", "clusters", "all", "line", "plane"])
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "direct"}, {"normalize": True}, {"landmark_mask": True}, {"queries": True}],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("entries", [2**21, 49 * 120], ids=["whole", "in parts"])
def test_gradients_at_near_singular_landmarks(options, kind, compiled, entries, monkeypatch):
    """In single precision to 16 eps: where the condition of P would count, sums are of double precision."""
    if not compiled:
        monkeypatch.setattr(_native, "is_built", lambda: False)
    monkeypatch.setattr(_attend, "_CPU_ENTRIES", entries)
    q, v, z, g = near_singular(kind)

    def gradients(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, v, z)]
        given = dict(options)
        if "landmark_mask" in given:
            given["landmark_mask"] = (torch.arange(49) % 5 != 3).expand(2, -1)
        if "queries" in given:
            given["queries"] = leaves[0].flip(1)
        return torch.autograd.grad(softmax_free_attention(*leaves, **given), leaves, g.to(dtype))

    for found, expected in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert torch.linalg.norm(found - expected) < 16 * EPS * torch.linalg.norm(expected)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("apart", [0.05, 0.2, 0.4, 0.55, 0.7, 0.9, 1.0, 1.2, 2.0])
@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_gradients_at_landmarks_on_a_grid(dimension, apart, compiled, monkeypatch):
    """To 1e-5, from nearly singular to well conditioned, whether sums are formed in double precision or are not."""
    if not compiled:
        monkeypatch.setattr(_native, "is_built", lambda: False)
    q, v, g, first = (points(k, 2, n, 32, spread=1.0, dtype=torch.float32) for k, n in enumerate((500, 500, 500, 1)))
    sides = torch.linalg.qr(points(4, 2, 32, dimension, spread=1.0, dtype=torch.float32))[0].mT
    grid = torch.cartesian_prod(*[torch.arange(float({1: 49, 2: 7, 3: 4}[dimension]))] * dimension)
    z = first + apart * 32**0.25 * (grid.reshape(-1, dimension)[:49] - grid.mean()) @ sides

    def gradients(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, v, z)]
        return torch.autograd.grad(softmax_free_attention(*leaves), leaves, g.to(dtype))

    for found, expected in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert torch.linalg.norm(found - expected) < 1e-5 * torch.linalg.norm(expected)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("entries", [2**21, 40 * 70], ids=["whole", "in parts"])
@pytest.mark.parametrize("off", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("spread", [1.0, 1.5])
def test_gradients_where_landmarks_are_tokens(spread, off, entries, compiled, monkeypatch):
    """Or nearly so, and far from all others: nothing is left of cotangents but for what the others bring, which is 1e-5
    of the entries that are large. Those of C are right to some eps of squared distances from the centre, d^½ here."""
    if not compiled:
        monkeypatch.setattr(_native, "is_built", lambda: False)
    monkeypatch.setattr(_attend, "_CPU_ENTRIES", entries)
    q, v, g = (points(k, 2, 400, 64, spread=spread, dtype=torch.float32) for k in range(3))
    z = q[:, ::10] + off * points(3, 2, 40, 64, spread=1.0, dtype=torch.float32)

    def gradients(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, v, z)]
        return torch.autograd.grad(softmax_free_attention(*leaves), leaves, g.to(dtype))

    for found, expected in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert torch.linalg.norm(found - expected) < 4 * 64**0.5 * spread**2 * EPS * torch.linalg.norm(expected)


def test_sums_in_double_precision_leave_what_is_kept_of_points(monkeypatch, uncompiled):
    """Where blocks are several, and all elements' tokens lie between those of others."""
    monkeypatch.setattr(_attend, "_CPU_ENTRIES", 2 * 3 * 5 * 20)
    q, v, g = (points(k, 2, 50, 3, 4, spread=1.0, dtype=torch.float32).transpose(1, 2) for k in range(3))
    z = points(3, 2, 3, 5, 4, spread=1e-2, dtype=torch.float32)

    def gradients(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, v, z)]
        return torch.autograd.grad(softmax_free_attention(*leaves), leaves, g.to(dtype))

    monkeypatch.setattr(_attend, "AMPLIFIED", 2)
    for found, expected in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert torch.linalg.norm(found - expected) < 16 * EPS * torch.linalg.norm(expected)


@pytest.mark.parametrize(("d", "e"), [(3, 2), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_softmax_attention_with_one_more_key_is_the_gaussian_product(d, e, dtype):
    x, y, v = points(1, 2, 3, 11, d, spread=1.5), points(2, 2, 3, 40, d, spread=1.5), points(3, 2, 3, 40, e)

    def formula(x, y, v):
        return torch.exp(-0.5 * (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)) @ v

    ours = gradients(gaussian_product, *(t.to(dtype) for t in (x, y, v)))
    for found, expected in zip(ours, gradients(formula, x, y, v), strict=True):
        # Exponents reach ‖x‖² ≤ 40, each right to eps of that; sums over 40 points.
        atol = 40 * torch.finfo(dtype).eps * expected.abs().max()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "direct"}, {"inverse": functools.partial(pinv_newton, method="direct")}],
    ids=["newton", "direct", "inverse"],
)
def test_compiled_whole(options):
    q, v, z = (x.float() for x in triple(n=40, m=6, d=4, e=3))
    f = functools.partial(softmax_free_attention, **options)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled, q, v, z), gradients(f, q, v, z), strict=True):
        # κ ≤ 1 + 6/0.01, in the inverse and again in its derivative.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=601 * EPS * 10 * theirs.abs().max())


@pytest.mark.parametrize("normalize", [False, True])
def test_solving_by_a_factor_agrees_with_newton(normalize, entries):
    q, v, z = triple(n=40, m=6, d=4, e=3)
    both = (functools.partial(softmax_free_attention, normalize=normalize, method=m) for m in ("newton", "direct"))
    for ours, theirs in zip(*(gradients(f, q, v, z) for f in both), strict=True):
        # κ ≤ 1 + 6/0.01, and again in the derivative.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=601**2 * np.finfo(float).eps * theirs.abs().max())


def test_which_way_the_core_is_solved(monkeypatch):
    seen = []
    monkeypatch.setattr(pinv, "pinv_newton", lambda a, **given: seen.append(given.get("method")) or a)
    q, v, z = triple()
    softmax_free_attention(q, v, z, method="direct")
    assert seen == []
    softmax_free_attention(q, v, z)
    softmax_free_attention(q, v, z, landmark_mask=torch.ones(2, 4, dtype=bool))
    assert seen == [None] * 2
    torch.func.vmap(functools.partial(softmax_free_attention, method="direct"))(q, v, z)
    softmax_free_attention(q, v, z, landmark_mask=torch.ones(2, 4, dtype=bool), method="direct")
    softmax_free_attention(q, v, z, ridge=0.0, method="direct")
    assert seen[2:] == ["direct"] * 3


@pytest.mark.parametrize("asarray", [np.asarray, torch.asarray], ids=["numpy", "torch"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_blocks_hold_no_number_below_the_normal_ones(asarray, dtype):
    tiny = float(np.finfo(dtype).smallest_normal)
    exponents = np.concatenate([np.linspace(1.1 * np.log(tiny), 1, 10_001), [np.nan, -np.inf]]).astype(dtype)
    x = asarray(exponents.copy())
    found = np.asarray(exp_of_negative(x, array_api_compat.array_namespace(x)))
    kept = exponents > 0.8 * np.log(tiny) + 0.01
    np.testing.assert_allclose(found[kept], np.exp(np.minimum(exponents[kept], 0)), rtol=4 * np.finfo(dtype).eps)
    assert np.isnan(found[-2])
    lost = found[~kept & ~np.isnan(exponents)]
    assert ((lost == 0) | (lost > 0.9 * tiny**0.8)).all()
    assert (found[exponents < 0.8 * np.log(tiny) - 0.01] == 0).all()


def test_tokens_far_from_all_landmarks_get_nothing(entries):
    q, v, z = (x.float() for x in triple(n=40, m=6, d=4, e=3))
    q[:, 10:] += 40
    out = softmax_free_attention(q, v, z)
    assert torch.equal(out[:, 10:], torch.zeros_like(out[:, 10:]))
    torch.testing.assert_close(out[:, :10], softmax_free_attention(q[:, :10], v[:, :10], z))


@pytest.mark.parametrize("create_graph", [False, True])
def test_derivatives_of_a_factor_of_many_cotangents_and_twice(create_graph):
    q, v, z = (x.requires_grad_() for x in triple(n=9, m=4, d=3, e=2))
    out = softmax_free_attention(q, v, z, ridge=0.1, method="direct")
    some = points(8, 3, *out.shape)
    together = torch.autograd.grad(out, (q, v, z), some, True, create_graph, is_grads_batched=True)
    for i, cotangent in enumerate(some):
        alone = torch.autograd.grad(out, (q, v, z), cotangent, retain_graph=True)
        for x, y in zip(together, alone, strict=True):
            torch.testing.assert_close(x[i], y)
    assert torch.autograd.gradgradcheck(
        lambda q, v, z: softmax_free_attention(q, v, z, ridge=0.1, method="direct"), (q, v, z)
    )


@pytest.mark.parametrize("method", ["newton", "direct"])
def test_a_core_that_is_not_definite_is_nan_in_its_element_alone(method):
    q, v, z = triple(n=9, m=4, d=3, e=2)
    far = z.clone()
    far[0] = z[:1] * 1e-3 + torch.arange(4)[:, None] * 1e9  # rounding of squares exceeds any ridge
    far[0, 0] = torch.nan
    out = softmax_free_attention(q, v, far, method=method)
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1], softmax_free_attention(q[1], v[1], z[1], method=method), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": torch.ones(2, 8, dtype=bool)}, ValueError, r"mask has shape \(2, 8\) and q \(2, 9, 3\)"),
        ({"mask": torch.ones(2, 9, 9, dtype=bool)}, ValueError, "pairs of tokens is impossible"),
        ({"mask": torch.ones(2, 9)}, TypeError, "mask must be a bool array .* not torch.float32"),
        ({"mask": np.ones((2, 9), bool)}, TypeError, "mask must be a bool array"),
        ({"mask": [True] * 9}, TypeError, "mask must be a bool array .* not list"),
        (
            {"landmark_mask": torch.ones(2, 9, dtype=bool)},
            ValueError,
            r"landmark_mask has shape .* landmarks \(2, 4, 3\)",
        ),
        ({"inverse": 3}, TypeError, "inverse must be a function .* not 3"),
        ({"queries": points(4, 2, 5, 4)}, ValueError, r"q has shape \(2, 9, 3\) and queries \(2, 5, 4\)"),
        ({"queries": points(4, 2, 5, 3).float()}, TypeError, "queries has dtype torch.float32"),
    ],
    ids=str,
)
def test_errors_name_the_argument(options, error, message):
    with pytest.raises(error, match=message):
        softmax_free_attention(*triple(), **options)


def attended(seed: int, n: int, library: str) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((2, 3, k, 8)).astype(np.float32) for k in (n, 12, n)]
    if library == "numpy":
        return (softmax_free_attention(arrays[0], arrays[2], arrays[1]),)
    q, z, v = (torch.tensor(x, requires_grad=True) for x in arrays)
    out = softmax_free_attention(q, v, z)
    return out.detach().numpy(), *(x.numpy() for x in torch.autograd.grad(out.square().sum(), (q, z, v)))


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_memory_that_is_used_again_is_in_no_result(library, uncompiled):
    first = attended(0, 100, library)
    copies = [x.copy() for x in first]
    others = [attended(seed, n, library) for seed, n in ((1, 100), (2, 301), (3, 7))]
    for x, copy, again in zip(first, copies, attended(0, 100, library), strict=True):
        assert np.array_equal(x, copy)
        assert np.array_equal(x, again)
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(lambda job: attended(*job, library), [(1, 100), (2, 301), (3, 7)] * 8))
    for found, expected in zip(at_once, others * 8, strict=True):
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


def test_memory_from_inference_serves_training_afterwards(uncompiled):
    class Named(torch.Tensor):
        """A tensor of a class of its own, which does not share memory with others."""

    def run():
        q, z = torch.zeros(1, 1, 50, 4), torch.zeros(1, 1, 5, 4)
        with torch.inference_mode():
            softmax_free_attention(q, q, z)
        assert isinstance(softmax_free_attention(*(x.as_subclass(Named) for x in (q, q, z))), Named)
        assert {kind for _, kind, _ in _attend._kept.blocks} == {torch.Tensor}
        x = q.clone().requires_grad_()
        softmax_free_attention(x, x, z).sum().backward()
        return bool(torch.isfinite(x.grad).all())

    # In a thread of its own, where nothing has been kept yet.
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result()


def test_no_more_is_kept_than_some_blocks():
    def kept():
        q, z = np.zeros((1, 1, 4000, 600), dtype=np.float32), np.zeros((1, 1, 2, 600), dtype=np.float32)
        softmax_free_attention(q, q, z)
        attended(0, 100, "numpy")
        return {key: block.size for key, block in _attend._kept.blocks.items()}

    with ThreadPoolExecutor(1) as pool:
        sizes = pool.submit(kept).result()
    assert 0 < len(sizes) <= 1 + _attend._CPU_BLOCKS
    assert max(size for (name, *_), size in sizes.items() if name != "c") <= _attend._CPU_ENTRIES < 4000 * 600
    assert max(sizes.values()) <= _attend._CPU_BLOCKS * _attend._CPU_ENTRIES
