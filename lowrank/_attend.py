"""C M (Cᵀ v) with C = exp(−s²‖q − z‖²/2), of many points q and few landmarks z, by blocks of C that stay in the cache.

Nothing of the size of C is stored: forward and back, a block of C is computed where it is used. With σ = Cᵀ v, w = M σ,
the result X = C w, a cotangent G of it, and H = C ∘ (G wᵀ + v σ̄ᵀ), the chain rule reads

    w̄ = Cᵀ G,   σ̄ = Mᵀ w̄,   M̄ = w̄ σᵀ,   v̄ = C σ̄,
    q̄ = s² (H z − diag(H1) q),   z̄ = s² (Hᵀ q − diag(Hᵀ1) z),

with q and z from any common origin; here it is near the landmarks (``centre``). Per entry of C that is d + 2e products
and an exponential forward, 3d + 4e and an exponential back. w has to be known before X: where the points of a batch
element need more blocks than are kept, the others are computed twice.

An inverse M of P that carries rounding errors gives w with an error of cond(P)·eps of ‖M‖‖σ‖, while w itself is much
smaller: σ is smooth, and M is large where A has its small eigenvalues. Where P is given, w solves P w = σ, by two
corrections w ← w + M(σ − P w) with M held fixed and σ − P w in double precision; so does σ̄, and P̄ = −σ̄ wᵀ. In float32
this makes X ten to a hundred times as accurate where landmarks nearly coincide, and z̄ a hundred times (N. J. Higham,
"Accuracy and Stability of Numerical Algorithms", 2002, chapter 12, on iterative refinement). The Cholesky factor of P
can take the place of M: to solve with it is nearly as accurate, and one correction is enough.

What is left is σ's own error. Rounding puts eps σⱼ into each row for itself, and M makes of that eps ‖M diag(‖σⱼ‖)‖,
relative to ‖w‖ a number that can be had once w is there, and is the error of z̄ to a factor of two, from 5e-7 to 3e-3.
Where it exceeds 1e-5, in float32 and if there is a way back, σ and w̄ are summed again with C and all else in double
precision, and so is z̄, which leaves 5e-8. In the others sums are formed of a few terms at a time, which halves their
error.

Where a point is a landmark, or nearly so, and others are far, Hz and diag(H1) q are large and their difference is not:
there it is formed of the differences of points and landmarks, which are exact.

The formula itself, all of C at once, is in ``_formula``.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lowrank._array import (
    Array,
    Namespace,
    add_product,
    device,
    exp_of_negative,
    identity,
    is_contiguous,
    is_on_cpu,
    is_plain,
    new_memory,
    product_and_sums,
    stacked_product,
    transposed_copy,
    widest_real,
)
from lowrank._formula import CORRECTIONS, Factor
from lowrank.kernels import _slices

# Entries of a block of C, that is of how many points are taken together. It is written once and read by two to six
# operations: smaller ones stay in nearer caches, and take longer for all the calls. Of half as many, calls for 196 to
# 65,536 points and 1 to 80 batch elements take 1.0 to 1.1 of the time; twice as many save as much again, for twice the
# memory. A GPU wants few and large operations.
_CPU_ENTRIES, _GPU_ENTRIES = 2**21, 2**25
# Blocks that are kept until C is needed again: to read one takes a third of the time of computing it. Two of a CPU's
# are 16 MiB in float32.
_CPU_BLOCKS, _GPU_BLOCKS = 2, 1
# Points whose part of a sum over points is added to it as one: the error of a sum is that of so many terms. Twice as
# many leave a fifth more of it, and half as many no less.
FEW = 32
# Entries of C, of points within a tenth of a lengthscale from a landmark, whose cotangents are formed of differences.
CLOSE = 0.995
# For how many of its eps rounding of σ may count in w before σ is summed in double precision. The error that is left in
# z̄ was at most 1.5 times that in hundreds of sets of landmarks with about as much, 1e-5 in float32; and 3 times where
# the derivative of P is not taken with that of C, so that what is left of the two is less than either: then half. And
# s²‖z‖²/2 of a landmark for which there are twice as many eps, for the exponents are as large.
AMPLIFIED, REACH = 56, 8


def most_amplified(*, of_gram: bool) -> int:
    return AMPLIFIED if of_gram else AMPLIFIED // 2


def is_checked(system: Array | None, z: Array, xp: Namespace) -> bool:
    """Whether w solves for P, and there is a precision above that of z."""
    return system is not None and z.dtype != widest_real(z, xp)


def applied(core: Array | Factor, system: Array | None, sigma: Array, xp: Namespace) -> Array:
    """w = Mσ, or, with P, the solution of P w = σ that M leads to, in the values and not in the derivative.

    What is missing is computed in double precision: of singular directions w is the larger the less of σ there is in
    them, and rounding of the sums P w would be in all.
    """
    factored = isinstance(core, Factor)

    def multiplied(b: Array) -> Array:
        return core @ b if factored else stacked_product(core, b, xp)

    w = multiplied(xp.astype(sigma, core.lower.dtype if isinstance(core, Factor) else core.dtype, copy=False))
    if system is not None:
        wide = widest_real(sigma, xp)
        sigma, system = (xp.astype(x, wide, copy=False) for x in (sigma, system))
        for _ in range(1 if factored else CORRECTIONS):
            w = w + multiplied(xp.astype(sigma - system @ xp.astype(w, wide), w.dtype))
    return w


def gram(z: Array, xp: Namespace) -> Array:
    """k(z, z) of a library that writes to arrays, without a derivative and in few operations: squares from the
    product's own diagonal make k(zᵢ, zᵢ) = 1."""
    a = z @ xp.matrix_transpose(z)
    half = 0.5 * xp.linalg.diagonal(a)
    a -= half[..., :, None] + half[..., None, :]
    return exp_of_negative(a, xp)


def inner_cotangent(system: Array | None, w_bar: Array, sigma_bar: Array, sigma: Array, w: Array) -> Array:
    """M̄, or P̄ where P is given."""
    return w_bar @ sigma.mT if system is None else -sigma_bar @ w.mT


def gram_cotangent(z: Array, system: Array, sigma_bar: Array, w: Array, xp: Namespace) -> Array:
    """z̄ = Gz − diag(G1) z, G = P ∘ (P̄ + P̄ᵀ), for P = k(z, z) + δI and its cotangent P̄ = −σ̄wᵀ, in the precision of z."""
    sigma_bar, w, system = (xp.astype(x, z.dtype, copy=False) for x in (sigma_bar, w, system))
    g = sigma_bar @ xp.matrix_transpose(w)
    g = -(g + xp.matrix_transpose(g)) * system
    g = xp.where(identity(g, xp) == 1, xp.zeros_like(g), g)  # what it is times there is zᵢ − zᵢ
    return g @ z - xp.sum(g, axis=-1, keepdims=True) * z


def landmark_cotangents(
    from_q: Array,
    columns: Array,
    w_bar: Array,
    sigma_bar: Array,
    sigma: Array,
    w: Array,
    system: Array | None,
    z: Array,
    centre: Array,
    scale: float,
    xp: Namespace,
    *,
    of_gram: bool,
) -> tuple[Array, Array | None]:
    """z̄ and M̄ or P̄, for Hᵀx and Hᵀ1, x = (q − centre)s. ``of_gram``: P̄ is None, and z̄ has what z has in P = k(z, z) +
    δI; little may be left of the two, and so all is in double precision."""
    wide, inner = widest_real(z, xp), None
    from_q, columns, y, c = (xp.astype(x, wide) for x in (from_q, columns, z, centre))
    y = (y - c) * scale
    z_bar = from_q - columns * y
    if of_gram:
        z_bar = z_bar + gram_cotangent(y, system, sigma_bar, w, xp)
    else:
        inner = inner_cotangent(system, w_bar, sigma_bar, sigma, w)
    return xp.astype(z_bar * scale, z.dtype), inner


def forward(
    q: Array,
    z: Array,
    v: Array,
    core: Array | Factor,
    system: Array | None,
    centre: Array,
    scale: float,
    xp: Namespace,
    *,
    most: int = AMPLIFIED,
) -> tuple[Array, Array, Array]:
    """X, σ and w for arrays of four axes and one batch shape (B, H); X is of the dtype of v.

    ``most`` is for how many of its eps rounding of σ may count in w, or 0 where there is no way back: X is nearly as
    right whatever it is.
    """
    out = xp.empty_like(v)  # with the strides of v
    memory, plan, found = _Memory(centre, xp), _planned(q, z), []
    room = memory.take("c", plan.room)
    for group, blocks in plan.groups:
        z_, core_, system_, c_ = (_flat(x, group, xp) for x in (z, core, system, centre))
        v_at = _together(v, group, blocks, "v", memory, xp)
        block = _Blocks(q[(*group, ...)], z_ - c_, centre[(*group, ...)], scale, blocks, room, memory, xp)
        sigma: Any = None
        for rows in blocks:
            c, few = block.at(rows), FEW if most else rows.stop
            sigma = _summed(sigma, c, v_at(rows), few, xp)
        exact = None
        if most and is_checked(system, z, xp):
            exact = functools.partial(_exact_sums, q, z_, v_at, c_, scale, group, blocks, memory, xp)
        sigma, w, _ = solved(core_, system_, sigma, block.half_z, exact, most, xp)
        for rows in reversed(blocks):
            _put_product(out, group, rows, block.at(rows), w, "x0", memory, xp)
        found.append((sigma, w))
    sums, weights = (_joined(parts, plan, v.shape[:2], xp) for parts in zip(*found, strict=True))
    return out, sums, weights


def backward(
    q: Array,
    z: Array,
    v: Array,
    core: Array | Factor,
    system: Array | None,
    centre: Array,
    scale: float,
    sums: Array,
    weights: Array,
    g: Array,
    xp: Namespace,
    *,
    of_gram: bool,
) -> tuple[Array, Array, Array, Array | None]:
    """q̄, z̄, v̄, and M̄ or, where P is given, P̄, for the cotangent g of X; with P̄ in z̄, and None, if ``of_gram``."""
    q_bar, v_bar, s2 = xp.empty_like(q), xp.empty_like(v), scale * scale
    most = most_amplified(of_gram=of_gram)
    memory, plan, found = _Memory(centre, xp), _planned(q, z), []
    room = memory.take("c", plan.room)
    for group, blocks in plan.groups:
        z_, core_, system_, c_, sigma, w = (_flat(x, group, xp) for x in (z, core, system, centre, sums, weights))
        v_at, g_at = (_together(x, group, blocks, name, memory, xp) for x, name in ((v, "v"), (g, "g")))
        block = _Blocks(q[(*group, ...)], z_ - c_, centre[(*group, ...)], scale, blocks, room, memory, xp)
        w_bar: Any = None
        for rows in blocks:
            x = block.points(rows, _room(q_bar, group, rows, block.name_of_points(rows), memory, xp))
            w_bar = _summed(w_bar, block.at(rows, x), g_at(rows), FEW, xp)
        # P is symmetric, and M, which inverts it from the left, serves the way back as well.
        inverse = xp.matrix_transpose(core_) if system_ is None else core_
        exact = None
        if is_checked(system, z, xp):
            exact = functools.partial(_exact_sums, q, z_, g_at, c_, scale, group, blocks, memory, xp)
        w_bar, sigma_bar, amplified = solved(inverse, system_, w_bar, block.half_z, exact, most, xp)
        w_t, sigma_bar_t = transposed_copy(w, xp), transposed_copy(sigma_bar, xp)
        from_q: Any = None
        columns: Any = None
        for rows in reversed(blocks):
            x = _room(q_bar, group, rows, block.name_of_points(rows), memory, xp)
            c = block.at(rows, x if block.holds(rows) else block.points(rows, x))
            _put_product(v_bar, group, rows, c, sigma_bar, "h", memory, xp)
            h = stacked_product(g_at(rows), w_t, xp, out=memory.take("h", c.shape))
            h = add_product(h, v_at(rows), sigma_bar_t, xp, out=h)
            h *= c
            close = _taken_close(c, h, q[(*group, rows, slice(None))], z_, xp)
            from_q = _plus(from_q, xp.matrix_transpose(h), x, xp)
            of_h = xp.sum(h, axis=-2)[..., None]
            columns = of_h if columns is None else columns + of_h
            x *= xp.sum(h, axis=-1, keepdims=True)
            x = add_product(x, h, block.z, xp, beta=-s2, alpha=s2, out=x)
            if close is not None:
                x -= s2 * close[0]
                from_q += close[1]
            _bring(q_bar, group, rows, x, xp)
        from_q = from_q * scale
        if amplified is not None:
            of_group = q, z_, g_at, v_at, w, sigma_bar, c_, scale, group, blocks, memory, xp
            exact_from_q, exact_columns = _exact_cotangents(*of_group)
            from_q = xp.where(amplified, exact_from_q, from_q)
            columns = xp.where(amplified, exact_columns, columns)
        given = from_q, columns, w_bar, sigma_bar, sigma, w, system_, z_, c_
        found.append(landmark_cotangents(*given, scale, xp, of_gram=of_gram))
    z_bar, inner_bar = (
        None if parts[0] is None else _joined(parts, plan, q.shape[:2], xp) for parts in zip(*found, strict=True)
    )
    return q_bar, z_bar, v_bar, inner_bar


def _taken_close(c: Array, h: Array, q: Array, z: Array, xp: Namespace) -> tuple[Array, Array] | None:
    """What points q, of two batch axes, that are close to landmarks z, of one, bring to H(x − z) and Hᵀ(x − z), or None
    where there are none; it is taken from H. Their differences are exact, and where a point is a landmark, and others
    are far, they are all there is but for rounding of Hz and H1."""
    element, row, landmark = xp.nonzero(c > CLOSE)
    if len(row) == 0:
        return None
    q = xp.reshape(q, (-1, *q.shape[2:]))
    gaps = (xp.astype(q[element, row], z.dtype) - z[element, landmark]) * h[element, row, landmark][:, None]
    of_rows, of_columns = (xp.zeros((len(h), k, z.shape[-1]), dtype=z.dtype, device=device(z)) for k in h.shape[1:])
    of_rows.index_put_((element, row), gaps, accumulate=True)
    of_columns.index_put_((element, landmark), gaps, accumulate=True)
    h[element, row, landmark] = 0
    return of_rows, of_columns


def solved(
    core: Array | Factor,
    system: Array | None,
    sums: Array,
    half_z: Array,
    exact: Callable[[Array], Array] | None,
    most: int,
    xp: Namespace,
) -> tuple[Array, Array, Array | None]:
    """σ and w for sums over C; and where rounding of the sums counts in w for more than ``most`` eps, and ``exact`` is
    given, for what that makes of the elements of the batch where it does: sums in double precision, and anything of
    the others. Which those are, (..., 1, 1), or None if there are none.

    ``half_z`` are s²‖z‖²/2, or their negatives, (..., 1, m).
    """
    w = applied(core, system, sums, xp)
    if exact is None:
        return sums, w, None
    amplified = _amplification(core, sums, half_z, w, xp) > most
    if not bool(xp.any(amplified)):
        return sums, w, None
    wide, amplified = exact(amplified), amplified[..., None, None]
    w = xp.where(amplified, applied(core, system, wide, xp), w)
    return xp.where(amplified, xp.astype(wide, sums.dtype), sums), w, amplified


def _amplification(core: Array | Factor, sums: Array, half_z: Array, w: Array, xp: Namespace) -> Array:
    """For how many of its eps rounding of σ, of each row for itself, counts in w = Mσ, of each element of the batch;
    NaN where all is 0."""
    core = core @ identity(core.lower, xp) if isinstance(core, Factor) else core
    rounded = xp.linalg.vector_norm(sums, axis=-1) * (1 + xp.abs(half_z[..., 0, :]) / REACH)
    return xp.linalg.matrix_norm(core * rounded[..., None, :]) / xp.linalg.matrix_norm(w)


class _Plan(NamedTuple):
    """Batch elements that are taken together, with the rows of their blocks; and the shape of the room for blocks of C,
    in which a group has a place for each of its blocks, but the last for all that find none of their own."""

    groups: list[tuple[tuple[slice, slice], list[slice]]]
    room: tuple[int, int]


def _planned(q: Array, z: Array) -> _Plan:
    on_cpu = is_on_cpu(q)
    entries, kept = (_CPU_ENTRIES, _CPU_BLOCKS) if on_cpu else (_GPU_ENTRIES, _GPU_BLOCKS)
    return _plan(*q.shape[:-1], z.shape[-2], entries, kept)


@functools.lru_cache(maxsize=16)
def _plan(batch: int, heads: int, n: int, m: int, entries: int, kept: int) -> _Plan:
    """Groups are elements whose part of C is a block, or one element."""
    most = max(1, entries // m)  # rows in a block, of all its batch elements
    found, sizes = [], []
    for images in _slices(batch, _share(batch, max(1, most // (n * heads)))):
        for some_heads in _slices(heads, _share(heads, max(1, most // n))):
            elements = len(range(batch)[images]) * len(range(heads)[some_heads])
            blocks = _slices(n, _share(n, max(1, most // elements)))
            found.append(((images, some_heads), blocks))
            sizes.append(elements * blocks[0].stop * m)
    return _Plan(found, (min(kept, max(len(blocks) for _, blocks in found)), max(sizes)))


def _share(total: int, most: int) -> int:
    """The size of parts of at most ``most``, all but the last of them equal and that one little smaller."""
    return math.ceil(total / math.ceil(total / most)) if total else most


class _Kept(threading.local):
    """The blocks of a thread that outlive a call."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[object, ...], Array] = {}


_kept = _Kept()


class _Memory:
    """Blocks to write to, the same ones again and again, on a CPU in all calls of a thread: the first touch of fresh
    memory can take longer than what is computed in it."""

    def __init__(self, like: Array, xp: Namespace) -> None:
        self.new = functools.partial(new_memory, like, xp)
        self.dtype, self.about = like.dtype, (type(like), like.dtype)
        self.of_call: dict[tuple[object, ...], Array] = {}
        self.of_thread = _kept.blocks if is_on_cpu(like) and is_plain(like) else self.of_call
        self.xp = xp

    def take(self, name: str, shape: tuple[int, ...]) -> Array:
        size = math.prod(shape)
        stays = size <= (_CPU_BLOCKS if name == "c" else 1) * _CPU_ENTRIES
        blocks, key = self.of_thread if stays else self.of_call, (name, *self.about)
        if key not in blocks or blocks[key].shape[0] < size:
            blocks[key] = self.new(size)
        return self.xp.reshape(blocks[key][:size], shape)


class _Blocks:
    """Blocks of C for some points of two batch axes, as they lie in memory, and landmarks of one, which are centred."""

    def __init__(
        self,
        q: Array,
        z: Array,
        centre: Array,
        scale: float,
        blocks: list[slice],
        places: Array,
        memory: _Memory,
        xp: Namespace,
    ) -> None:
        self.q, self.z, self.centre, self.memory, self.xp = q, z, centre, memory, xp
        self.half_s2 = 0.5 * scale * scale
        self.rows, self.places = blocks[0].stop, places
        self.held: list[slice | None] = [None] * len(places)
        # s²zᵀ and −s²‖z‖²/2, of which C is made.
        self.z_t = transposed_copy(z * (2 * self.half_s2), xp)
        self.half_z = xp.sum(z * z, axis=-1)[..., None, :] * -self.half_s2

    def holds(self, rows: slice) -> bool:
        """Whether C there, and with it the points, are as they were computed."""
        return self.held[self._place(rows)] == rows

    def name_of_points(self, rows: slice) -> str:
        return f"x{self._place(rows)}"

    def _place(self, rows: slice) -> int:
        return min(rows.start // self.rows, len(self.held) - 1)

    def points(self, rows: slice, out: Array) -> Array:
        """The points q − centre, their batch elements on one axis, in the memory of ``out``."""
        points = self.q[:, :, rows, :]
        room = self.xp.reshape(out, points.shape)
        if points.dtype == out.dtype:
            self.xp.subtract(points, self.centre, out=room)
        else:
            room[...] = points
            room -= self.centre
        return out

    def at(self, rows: slice, x: Array | None = None) -> Array:
        """C there, of the points x or those that are there; until a block that takes its place is asked for."""
        place = self._place(rows)
        (batch, m, d), count = self.z.shape, rows.stop - rows.start
        c = self.xp.reshape(self.places[place, : batch * count * m], (batch, count, m))
        if self.held[place] != rows:
            if x is None:
                x = self.points(rows, self.memory.take("x0", (batch, count, d)))
            half_x = self.xp.linalg.vector_norm(x, axis=-1, keepdims=True) ** 2 * -self.half_s2
            exp_of_negative(product_and_sums(x, self.z_t, half_x, self.half_z, c, self.xp), self.xp)
            self.held[place] = rows
        return c


def exact_sums(q: Array, z: Array, v: Array, centre: Array, scale: float, xp: Namespace) -> Array:
    """Cᵀv of arrays of four axes, with C and all else in double precision."""
    plan, memory, parts = _planned(q, z), _Memory(centre, xp), []
    for group, blocks in plan.groups:
        z_, c_ = (_flat(x, group, xp) for x in (z, centre))
        v_at = _together(v, group, blocks, "v", memory, xp)
        parts.append(_exact_sums(q, z_, v_at, c_, scale, group, blocks, memory, xp))
    return _joined(tuple(parts), plan, q.shape[:2], xp)


def exact_cotangents(
    q: Array, z: Array, g: Array, v: Array, w: Array, sigma_bar: Array, centre: Array, scale: float, xp: Namespace
) -> tuple[Array, Array]:
    """Hᵀx and Hᵀ1, x = (q − centre)s, of arrays of four axes, likewise."""
    plan, memory, parts = _planned(q, z), _Memory(centre, xp), []
    for group, blocks in plan.groups:
        z_, c_, w_, s_ = (_flat(x, group, xp) for x in (z, centre, w, sigma_bar))
        g_at, v_at = (_together(x, group, blocks, name, memory, xp) for x, name in ((g, "g"), (v, "v")))
        parts.append(_exact_cotangents(q, z_, g_at, v_at, w_, s_, c_, scale, group, blocks, memory, xp))
    from_q, columns = (_joined(x, plan, q.shape[:2], xp) for x in zip(*parts, strict=True))
    return from_q, columns


def _exact_sums(
    q: Array,
    z: Array,
    v_at: Callable[[slice], Array],
    centre: Array,
    scale: float,
    group: tuple[slice, slice],
    blocks: list[slice],
    memory: _Memory,
    xp: Namespace,
    _: Array | None = None,
) -> Array:
    """Cᵀv of a group, for its landmarks and their centre."""
    total = None
    for rows, _, c in _exact_blocks(q, z, centre, scale, group, blocks, memory, xp):
        total = _plus(total, xp.matrix_transpose(c), xp.astype(v_at(rows), c.dtype), xp)
    return total


def _exact_cotangents(
    q: Array,
    z: Array,
    g_at: Callable[[slice], Array],
    v_at: Callable[[slice], Array],
    w: Array,
    sigma_bar: Array,
    centre: Array,
    scale: float,
    group: tuple[slice, slice],
    blocks: list[slice],
    memory: _Memory,
    xp: Namespace,
) -> tuple[Array, Array]:
    """Hᵀx and Hᵀ1 of a group."""
    from_q: Any = 0
    columns: Any = 0
    for rows, x, c in _exact_blocks(q, z, centre, scale, group, blocks, memory, xp):
        g, v, w_t, s_t = (xp.astype(y, c.dtype) for y in (g_at(rows), v_at(rows), w.mT, sigma_bar.mT))
        h = c * (g @ w_t + v @ s_t)
        from_q, columns = from_q + xp.matrix_transpose(h) @ x, columns + xp.sum(h, axis=-2)[..., None]
    return from_q, columns


def _exact_blocks(
    q: Array,
    z: Array,
    centre: Array,
    scale: float,
    group: tuple[slice, slice],
    blocks: list[slice],
    memory: _Memory,
    xp: Namespace,
) -> Iterator[tuple[slice, Array, Array]]:
    """Rows, x = (q − centre)s and C there, in double precision."""
    wide = widest_real(z, xp)
    centre = xp.astype(centre, wide)
    z = (xp.astype(z, wide) - centre) * scale
    z_t, half_z = transposed_copy(z, xp), 0.5 * xp.sum(z * z, axis=-1)[..., None, :]
    q_at = _together(q, group, blocks, "exact", memory, xp)
    for rows in blocks:
        x = (xp.astype(q_at(rows), wide) - centre) * scale
        c = x @ z_t - (half_z + 0.5 * xp.sum(x * x, axis=-1, keepdims=True))
        yield rows, x, exp_of_negative(c, xp)


def _flat(x: Any, group: tuple[slice, slice], xp: Namespace) -> Any:
    """The batch elements of a group on one axis; a view where one image, or one head, is all there is."""
    if x is None:
        return None
    if isinstance(x, Factor):
        return Factor(_flat(x.lower, group, xp))
    x = x[(*group, ...)]
    return xp.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]))


def _together(
    x: Array, group: tuple[slice, slice], blocks: list[slice], name: str, memory: _Memory, xp: Namespace
) -> Callable[[slice], Array]:
    """What gives the points of a block, the batch elements on one axis: views, or copies in the memory of that name and
    in its dtype, made once where there is but one block."""
    part = x[(*group, ...)]
    shape = (part.shape[0] * part.shape[1], *part.shape[2:])

    def copied(rows: slice) -> Array:
        points = part[:, :, rows, :]
        room = memory.take(name, (shape[0], *points.shape[2:]))
        xp.reshape(room, points.shape)[...] = points
        return room

    if part.dtype == memory.dtype and (1 in part.shape[:2] or is_contiguous(part)):
        whole = xp.reshape(part, shape)
    elif len(blocks) == 1:
        whole = copied(blocks[0])
    else:
        return copied
    return lambda rows: whole[:, rows, :]


def _room(out: Array, group: tuple[slice, slice], rows: slice, name: str, memory: _Memory, xp: Namespace) -> Array:
    """Where to write a part of ``out``, the batch elements on one axis: there, if that can be seen so, or aside."""
    part = out[(*group, rows, slice(None))]
    shape = (part.shape[0] * part.shape[1], *part.shape[2:])
    return xp.reshape(part, shape) if _is_room(part, memory.dtype) else memory.take(name, shape)


def _bring(out: Array, group: tuple[slice, slice], rows: slice, values: Array, xp: Namespace) -> None:
    """What was written to the room for a part of ``out`` to where it belongs."""
    if not _is_room(out[(*group, rows, slice(None))], values.dtype):
        _put(out, group, rows, values, xp)


def _is_room(part: Array, dtype: Any) -> bool:
    return part.dtype == dtype and is_contiguous(part)


def _put(out: Array, group: tuple[slice, slice], rows: slice, values: Array, xp: Namespace) -> None:
    part = out[(*group, rows, slice(None))]
    part[...] = xp.reshape(values, part.shape)


def _put_product(
    out: Array, group: tuple[slice, slice], rows: slice, a: Array, b: Array, name: str, memory: _Memory, xp: Namespace
) -> None:
    """``name`` is of a block whose values are no longer, or not yet, of use."""
    room = _room(out, group, rows, name, memory, xp)
    _bring(out, group, rows, stacked_product(a, b, xp, out=room), xp)


def _joined(parts: tuple[Array, ...], plan: _Plan, batch: tuple[int, ...], xp: Namespace) -> Array:
    """What groups gave for each of their batch elements, on the two batch axes."""
    if len(parts) == 1:
        return xp.reshape(parts[0], (*batch, *parts[0].shape[1:]))
    out = xp.empty((*batch, *parts[0].shape[1:]), dtype=parts[0].dtype, device=device(parts[0]))
    for (group, _), part in zip(plan.groups, parts, strict=True):
        _put(out, group, slice(None), part, xp)
    return out


def _plus(total: Array | None, a: Array, b: Array, xp: Namespace) -> Array:
    """total + a @ b, where there is a total."""
    return stacked_product(a, b, xp) if total is None else add_product(total, a, b, xp, out=total)


def _summed(total: Array | None, c: Array, v: Array, few: int, xp: Namespace) -> Array:
    """total + Cᵀv, where there is a total, the sum over points formed of sums over ``few``."""
    (batch, count, m), e = c.shape, v.shape[-1]
    whole = count // few * few
    for rows, of_each in ((slice(0, whole), few), (slice(whole, count), count - whole)):
        if rows.start == rows.stop:
            continue
        c_parts, v_parts = (xp.reshape(x[:, rows, :], (-1, of_each, x.shape[-1])) for x in (c, v))
        found = stacked_product(xp.matrix_transpose(c_parts), v_parts, xp)
        found = xp.sum(xp.reshape(found, (batch, -1, m, e)), axis=1)
        total = found if total is None else total + found
    return total
