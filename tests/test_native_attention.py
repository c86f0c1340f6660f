"""The compiled kernels of attention on a CPU against its formula in float64, and what they promise besides."""

import array_api_compat
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lowrank import _attend, _native, _native_attention, softmax_free_attention
from lowrank import _torch_attention as rule
from lowrank._formula import Factor
from lowrank._segments import segment_means

pytestmark = pytest.mark.skipif(not _native.is_built(), reason="no C compiler was found when lowrank was installed")
EPS = 2.0**-23
XP = array_api_compat.array_namespace(torch.zeros(1))


@pytest.fixture(params=[0, 2**62], ids=["chunks", "whole"])
def entries(request, monkeypatch):
    """Entries of C up to which an element is one thread's."""
    monkeypatch.setattr(_native_attention, "WHOLE_ENTRIES", request.param)
    monkeypatch.setattr(_native_attention, "WHOLE_ELEMENTS", 1)


def points(seed, *shape, spread=0.5):
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arrays(batch=(2, 3), n=300, m=7, d=5, e=4, *, solves=True):
    """q, z, v, M, P or None, a centre and a cotangent. P has a condition of two, and M inverts it or is orthogonal."""
    q, z, v, g = points(0, *batch, n, d), points(1, *batch, m, d), points(2, *batch, n, e), points(3, *batch, n, e)
    core, _ = torch.linalg.qr(points(4, *batch, m, m))
    system = core @ torch.diag(torch.linspace(1, 2, m)) @ core.mT if solves else None
    return q, z, v, torch.linalg.inv(system) if solves else core, system, z.mean(-2, keepdim=True), g


def there_and_back(way, q, z, v, core, system, centre, g, scale=0.7, *, of_gram=False):
    """X, σ, w, q̄, z̄, v̄, and M̄ or P̄, or None if ``of_gram``."""
    given = q, z, v, core, system, centre, scale
    out, sums, weights = way.forward(*given, XP)
    return out, sums, weights, *way.backward(*given, sums, weights, g, XP, of_gram=of_gram)


def of_float64(given, **options):
    return there_and_back(_attend, *(None if x is None else x.double() for x in given), **options)


def assert_right(given, count, **options):
    """Against float64, where what is found is a sum of so many terms of order one, or of products with such sums."""
    ways = there_and_back(_native_attention, *given, **options), of_float64(given, **options)
    for name, x, y in zip(["X", "σ", "w", "q̄", "z̄", "v̄", "M̄"], *ways, strict=True):
        if x is None and y is None and name == "M̄":
            continue
        assert x.shape == y.shape, name
        # Roundings of sums grow like the root of their length; the largest entry is of one, and three follow another.
        assert (x.double() - y).abs().max() < 16 * EPS * count**0.5 * y.abs().max(), name


@pytest.mark.parametrize("solves", [False, True])
@pytest.mark.parametrize(
    ("batch", "n", "m", "d", "e"),
    [
        ((2, 3), 300, 7, 5, 4),
        ((1, 1), 1, 1, 1, 1),
        ((1, 2), 128, 12, 16, 32),
        ((3, 1), 129, 13, 17, 33),
        ((1, 1), 2500, 49, 32, 32),
        ((2, 4), 1025, 50, 20, 64),
        ((1, 2), 40, 130, 100, 7),
    ],
    ids=str,
)
def test_they_compute_what_the_formula_says(batch, n, m, d, e, solves, width, entries):
    given = arrays(batch, n, m, d, e, solves=solves)
    given = (given[0] * d**-0.5, given[1] * d**-0.5, *given[2:5], given[5] * d**-0.5, given[6])
    assert_right(given, n * m)
    if solves:
        assert_right(given, n * m, of_gram=True)


def test_a_factor_solves_as_well(entries):
    q, z, v, core, system, centre, g = arrays()
    expected = of_float64((q, z, v, core, system, centre, g))
    factored = there_and_back(_native_attention, q, z, v, Factor(torch.linalg.cholesky(system)), system, centre, g)
    for x, y in zip(factored, expected, strict=True):
        assert (x - y).abs().max() < 16 * EPS * (300 * 7) ** 0.5 * y.abs().max()


@pytest.mark.parametrize("which", [0, 2, 6], ids=["q", "v", "g"])
@pytest.mark.parametrize(
    "made",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.mT.contiguous().mT,
        lambda x: x[:, :, :1, :1].expand(x.shape),
        lambda x: torch.cat([x, x], -1)[..., 1 : 1 + x.shape[-1]],
        lambda x: torch._neg_view(-x),
        lambda x: x[:, :, ::2].repeat_interleave(2, 2)[:, :, : x.shape[2]],
    ],
    ids=["tokens", "transposed", "one number", "part of a row", "negated", "repeated"],
)
def test_rows_may_lie_anywhere(which, made, width):
    given = list(arrays(n=200, d=16, e=16))
    given[which] = made(given[which])
    assert_right(given, 200 * 7)
    contiguous = there_and_back(_native_attention, *(x if x is None else x.resolve_neg().contiguous() for x in given))
    for x, y in zip(there_and_back(_native_attention, *given), contiguous, strict=True):
        assert torch.equal(x, y)


def test_results_have_the_strides_of_their_arguments():
    q, z, v, *others = arrays()
    q, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, v))
    out, _, _, q_bar, _, v_bar, _ = there_and_back(_native_attention, q, z, v, *others)
    assert (out.stride(), q_bar.stride(), v_bar.stride()) == (v.stride(), q.stride(), v.stride())


@pytest.mark.parametrize("d", [16, 20, 32])
@pytest.mark.parametrize("of_tokens", [False, True])
def test_large_cotangents_are_those_of_their_elements(d, of_tokens, width, entries):
    """They are stored past the caches where rows are whole lines of them, those of 20 numbers are not."""
    given = arrays((2, 6), 1500, 7, d, 32)
    if of_tokens:
        given = tuple(x if x is None else x.transpose(1, 2).contiguous().transpose(1, 2) for x in given)
    assert_right(given, 1500 * 7)
    of_all = there_and_back(_native_attention, *given)
    for i in range(2):
        for k in range(6):
            alone = there_and_back(_native_attention, *(x[i : i + 1, k : k + 1] for x in given))
            for x, y in zip(of_all, alone, strict=True):
                assert torch.equal(x[i, k], y[0, 0])


@pytest.mark.parametrize("halves", [(0,), (2, 6), (0, 2, 6)], ids=str)
@pytest.mark.parametrize("e", [4, 16])
def test_half_precision_is_rounded_at_the_end_alone(halves, e, width, entries):
    given = list(arrays(e=e))
    for i in halves:
        given[i] = given[i].bfloat16()
    wide = there_and_back(_native_attention, *(x.float() for x in given))
    for x, y, like in zip(there_and_back(_native_attention, *given), wide, [2, 1, 1, 0, 1, 2, 1], strict=True):
        assert x.dtype == given[like].dtype
        assert torch.equal(x, y.to(x.dtype))


def test_half_precision_holds_what_is_no_number_and_what_is_too_large():
    q, z, v, _, _, centre, _ = arrays(batch=(4, 1), n=30)
    v[0], v[1], v[2] = torch.nan, torch.inf, -3.3895e38
    core = torch.ones(4, 1, 7, 7)
    found, wide = (
        _native_attention.forward(q, z, x, core, None, centre, 0.7, XP)[0] for x in (v.bfloat16(), v.bfloat16().float())
    )
    assert found[0].isnan().all()
    assert (found[1] == torch.inf).all()
    assert (found[2] == -torch.inf).all()
    assert torch.equal(found.isnan(), wide.isnan())
    assert torch.equal(torch.nan_to_num(found, 7.0), torch.nan_to_num(wide.bfloat16(), 7.0))


def test_results_do_not_depend_on_the_number_of_threads(entries):
    given = arrays(batch=(2, 3), n=3000, m=20, d=16, e=16)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(there_and_back(_native_attention, *given))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2, 6], ids=["q", "z", "v", "g"])
def test_what_is_no_number_stays_in_its_element(which, value, width, entries):
    given = arrays(n=200)
    clean = there_and_back(_native_attention, *given)
    spoilt = [x.clone() for x in given]
    spoilt[which][1, 2, 3, 1] = value
    spoilt[5] = spoilt[1].mean(-2, keepdim=True)
    found = there_and_back(_native_attention, *spoilt)
    element = torch.zeros(2, 3, dtype=torch.bool)
    element[1, 2] = True
    for x, y in zip(found, clean, strict=True):
        assert torch.equal(x[~element], y[~element])
    # The landmark's distances to all points are no numbers, and so is a point's to all landmarks. One at infinity is
    # far from everything, but for those arithmetic of ∞ − ∞.
    assert any(not torch.isfinite(x[element]).all() for x in found)


def test_exponentials_are_right_to_rounding_and_none_is_below_the_normal_numbers(width):
    """One point, one landmark at the origin: σ is exp(−q²/2)."""
    q = torch.cat([torch.linspace(0, 15, 4001), torch.tensor([1e4, 1e15, 1e18, 3e38, torch.inf, torch.nan])])
    one = torch.ones(len(q), 1, 1, 1)
    zero = torch.zeros_like(one)
    _, found, _ = _native_attention.forward(q[:, None, None, None], zero, one, one, None, zero, 1.0, XP)
    found, half = found.flatten()[:4001].double(), 0.5 * q[:4001].double() ** 2
    kept = half < 69.8
    # Of the argument one rounding, that of a square: x·eps.
    assert ((found - torch.exp(-half)).abs() <= EPS * (2 + half) * torch.exp(-half))[kept].all()
    assert (found[half > 69.81] == 0).all()
    assert found[0] == 1


@pytest.mark.parametrize("far", [1e4, 1e10, 1e18])
def test_points_far_from_all_landmarks_get_nothing(far, width):
    q, z, v, *others = arrays()
    q[:, :, 100:] += far
    out, *_ = _native_attention.forward(q, z, v, *others[:3], 0.7, XP)
    assert torch.equal(out[:, :, 100:], torch.zeros_like(out[:, :, 100:]))
    near, *_ = _native_attention.forward(q[:, :, :100], z, v[:, :, :100], *others[:3], 0.7, XP)
    torch.testing.assert_close(out[:, :, :100], near)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (300, 49), (2500, 49), (40, 130)])
def test_sums_that_rounding_would_spoil_are_right(n, m, factored, width, entries):
    """M is 1000 in a direction of which σ has nothing, and σ is right to rounding of the points."""
    q, z, v = points(0, 2, 3, n, 32, spread=0.3), points(1, 2, 3, m, 32, spread=0.3), points(2, 2, 3, n, 4).abs()
    z[..., 1, :] = z[..., 0, :]
    between = torch.tensor([1.0, -1.0] + [0.0] * (m - 2), dtype=torch.float64) / 2**0.5
    system = (torch.eye(m) - (1 - 1e-3) * torch.outer(between, between)).expand(2, 3, m, m)
    core = Factor(torch.linalg.cholesky(system.float())) if factored else torch.linalg.inv(system).float()
    _, sums, w = _native_attention.forward(q, z, v, core, system, z.mean(-2, keepdim=True), 1.0, XP)
    exact = torch.exp(-0.5 * torch.cdist(q.double(), z.double()) ** 2).mT @ v.double()
    assert ((sums / exact - 1).abs() < 4 * EPS).all()
    assert torch.linalg.norm(w - torch.linalg.solve(system, exact)) < 4 * EPS * torch.linalg.norm(w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_are_landmarks_move_nothing(dtype, width, entries):
    """H(z − x) of a token that is a landmark, and alone, is 0, whatever H is."""
    q = (3 * points(0, 1, 8, 40, 64, spread=1.0)).to(dtype)
    v, g = points(1, 1, 8, 40, 5).to(dtype), points(2, 1, 8, 40, 5).to(dtype)
    leaves = [x.clone().requires_grad_() for x in (q, v, q)]
    q_bar, _, z_bar = torch.autograd.grad(softmax_free_attention(*leaves), leaves, g)
    assert q_bar.abs().max() < 1e-12
    assert z_bar.abs().max() < 1e-12


def test_elements_whose_sums_are_right_are_left_alone(width, entries):
    """Of two elements one is near singular, and the other as it is by itself, bit for bit."""
    q, z, v, g = points(0, 2, 1, 700, 32), points(1, 2, 1, 49, 32, spread=1.0), points(2, 2, 1, 700, 32), None
    z[0] = z[0, :, :1] + 1e-2 * z[0]
    g = points(3, 2, 1, 700, 32)

    def gradients(*given):
        leaves = [x.clone().requires_grad_() for x in given[:3]]
        return torch.autograd.grad(softmax_free_attention(*leaves), leaves, given[3])

    for both, one in zip(gradients(q, v, z, g), gradients(q[1:], v[1:], z[1:], g[1:]), strict=True):
        assert torch.equal(both[1:], one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (2, 50, 7), (2, 3, 512, 32), (2, 3, 2, 100, 5), (70_000, 4)])
def test_means_of_segments(shape, dtype, width):
    """Rounded once, but for sums of 32 terms; in rows apart from one another, too, and negated without a copy."""
    x = points(5, *shape).to(dtype)
    apart = torch.stack([x, x], -2)[..., 0, :]
    for given in (x, apart, torch.view_as_complex(torch.stack([x.float(), -x.float()], -1)).conj().imag):
        for count in {1, (shape[-2] + 1) // 2, shape[-2]}:
            exact = segment_means(given.double(), count, XP)
            z, centre = _native_attention.means(given, count)
            assert z.dtype == centre.dtype == torch.float32
            assert (z - exact).abs().max() <= 8 * EPS * given.abs().max()
            assert (centre - exact.mean(-2, keepdim=True)).abs().max() <= 8 * EPS * given.abs().max()


@pytest.mark.parametrize("threads", [1, 2])
def test_means_do_not_depend_on_threads(threads, monkeypatch):
    x = points(6, 1, 1, 70_000, 32)
    found = _native_attention.means(x, 49)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert all(map(torch.equal, found, _native_attention.means(x, 49)))


@pytest.mark.parametrize("entries", [0, 2**18], ids=["chunks", "whole"])
@pytest.mark.parametrize("method", ["newton", "direct"])
def test_many_landmarks_nearby(method, entries, width, monkeypatch):
    """More than a block of points, and than a core solves for."""
    monkeypatch.setattr(_native_attention, "WHOLE_ENTRIES", entries)
    q, v, g, z = points(1, 1, 700, 32), points(2, 1, 700, 32), points(3, 1, 700, 32), points(4, 1, 300, 32, spread=1.0)
    z[:, 150:] = z[:, :150] + 1e-3 * z[:, 150:]

    def gradients(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, v, z)]
        return torch.autograd.grad(softmax_free_attention(*leaves, method=method), leaves, g.to(dtype))

    for found, expected in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert torch.linalg.norm(found - expected) < 16 * EPS * torch.linalg.norm(expected)


@pytest.mark.parametrize("method", ["newton", "direct"])
@pytest.mark.parametrize("kind", ["random", "pairs", "clusters", "ball", "line"])
def test_gradients_at_near_singular_landmarks(kind, method, width):
    """To 2e-6, and 1e-6 in tokens and values."""
    q, v, g, z = points(1, 2, 700, 32), points(2, 2, 700, 32), points(3, 2, 700, 32), points(4, 2, 49, 32, spread=1.0)
    near = points(5, 2, 49, 32, spread=1.0)
    if kind == "pairs":
        z[:, 24:48] = z[:, :24] + 1e-3 * near[:, :24]
    elif kind == "clusters":
        z = z[:, :7].repeat_interleave(7, 1) + 1e-4 * near
    elif kind == "ball":
        z = z[:, :1] + 1e-2 * near
    elif kind == "line":
        z = torch.linspace(-1, 1, 49)[:, None] * near[:, :1] / 2

    def exact(q, v, z):
        c, a = (
            torch.exp(-(torch.cdist(x, z, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / 2 / 32**0.5)
            for x in (q, z)
        )
        return c @ torch.linalg.solve(a + 0.01 * torch.eye(49), c.mT @ v)

    def gradients(way, *given):
        leaves = [x.requires_grad_() for x in given]
        return torch.autograd.grad(way(*leaves), leaves, g.to(given[0].dtype))

    expected = gradients(exact, *(x.double() for x in (q, v, z)))
    found = gradients(lambda *given: softmax_free_attention(*given, method=method), q, v, z)
    bounds = 1e-6, 1e-6, 2e-6
    for ours, theirs, bound in zip(found, expected, bounds, strict=True):
        assert torch.linalg.norm(ours.double() - theirs) < bound * torch.linalg.norm(theirs)


@pytest.mark.parametrize(("n", "e"), [(3, 5), (4096, 8)])
def test_large_pages_change_nothing(n, e, monkeypatch):
    """Asked for of every result, at addresses of any kind, or of none."""
    given = arrays(batch=(1, 2), n=n, e=e)
    usual = there_and_back(_native_attention, *given)
    monkeypatch.setattr(_native_attention, "LARGE", 0)
    for x, y in zip(there_and_back(_native_attention, *given), usual, strict=True):
        assert torch.equal(x, y)


def test_no_kernel_matrix_exceeds_one():
    """Where rounding would make a squared distance negative: points on landmarks far from their mean."""
    z = 3e3 + points(1, 1, 1, 8, 16)
    z[..., 4:, :] -= 6e3
    _, sums, _ = _native_attention.forward(
        z, z, torch.ones(1, 1, 8, 16), torch.eye(8)[None, None], None, z.mean(-2, keepdim=True), 1.0, XP
    )
    # Four points at most are near a landmark.
    assert sums.max() <= 4


def test_which_way_is_taken(monkeypatch):
    q, z, v = (x[0, 0] for x in arrays()[:3])

    class Named(torch.Tensor):
        """A tensor that may mean something else."""

    assert rule._way(q, z, v) is _native_attention
    assert rule._way(q.bfloat16(), z, v.bfloat16()) is _native_attention
    assert rule._way(torch.nn.Parameter(q), z, v) is _native_attention
    assert rule._way(q.half(), z, v.half()) is _attend
    assert rule._way(q.double(), z.double(), v.double()) is _attend
    assert rule._way(q.as_subclass(Named), z, v) is _attend
    assert rule._way(*(x.repeat(1, 24)[:, :96] for x in (q, z, v))) is _native_attention
    assert rule._way(*(x.repeat(1, 20)[:, :97] for x in (q, z)), v) is _attend
    assert rule._way(q, z, v.repeat(1, 25)[:, :97]) is _attend
    with FlopCounterMode(display=False):
        assert rule._way(q, z, v) is _attend
    with monkeypatch.context() as changed:
        changed.setattr(_native, "team", lambda: None)
        changed.setattr(torch, "get_num_threads", lambda: 2)
        assert rule._way(q, z, v) is _attend
    monkeypatch.setattr(_native, "is_built", lambda: False)
    assert rule._way(q, z, v) is _attend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["newton", "direct"])
def test_attention_is_the_same_without_a_compiler(dtype, method, monkeypatch):
    q, z, v, *_, g = arrays(n=500, m=12, d=8, e=8)
    q, z, v, g = (x.to(dtype) for x in (q, z, v, g))

    def all_of():
        leaves = [x.clone().requires_grad_() for x in (q, v, z)]
        out = softmax_free_attention(*leaves, method=method)
        return out.detach(), *torch.autograd.grad(out, leaves, g)

    compiled = all_of()
    monkeypatch.setattr(_native, "is_built", lambda: False)
    for x, y in zip(compiled, all_of(), strict=True):
        # In z̄ the condition of P, at most 1 + 12/0.01, meets sums of 500 terms.
        assert (x - y).abs().max() <= (2**-8 if x.dtype == torch.bfloat16 else 1e3 * EPS) * y.abs().max()


def test_no_memory_is_an_error_and_no_result():
    q, z, v, _, _, centre, _ = arrays()
    call = _native_attention._Call(q, z, v, centre, 1.0)
    call.reads(summed=v)
    call.makes("sums", 1)
    call.task.m = 2**40
    with pytest.raises(MemoryError, match=r"lowrank_attend makes of .* n=300, m=1099511627776,"):
        call.run(_native_attention.SUMS)


def test_what_is_computed_in_is_no_result(entries):
    """Memory that threads worked in before holds other numbers then."""
    given = arrays(n=150)
    first = there_and_back(_native_attention, *given)
    copies = [x.clone() for x in first]
    there_and_back(_native_attention, *arrays(n=700, m=30, d=40, e=50))
    assert all(map(torch.equal, first, copies))
    assert all(map(torch.equal, there_and_back(_native_attention, *given), copies))
