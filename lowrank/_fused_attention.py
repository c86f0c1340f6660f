"""Triton kernels for the tall products of softmax-free attention, which never store C = k(q, z) in global memory.

k(x, y) = exp(−‖x − y‖²/2), for tokens q and landmarks z that are divided by the lengthscale and centred on the mean
landmark already: −‖x − y‖²/2 = xᵀy − ‖x‖²/2 − ‖y‖²/2, clamped at 0, so that no entry of C exceeds 1 and no running
maximum is needed. A block of C is made in registers, multiplied, and forgotten; backward makes it again (as in
T. Dao, "FlashAttention-2", 2023, whose division of the backward pass this is). With M the inverse core, attention is

    s = Cᵀv = transposed_product(q, z, v),   w = M s,   out = C w = product(q, z, w),

and from the cotangent g of out, w̄ = transposed_product(q, z, g), s̄ = Mᵀw̄, M̄ = w̄ sᵀ, the tokens and the landmarks
receive, with P = C ∘ (g wᵀ + v s̄ᵀ),

    v̄ = C s̄,   q̄ = P z − q ∘ rowsum(P),   z̄ = Pᵀq − z ∘ colsum(P) = cotangents(q, z, v, g, w, s_bar).

Two kinds of programs: one holds a few landmarks and runs through a stretch of the tokens (Cᵀv, z̄), the other holds a
few tokens and runs through the landmarks (C w, q̄ and v̄). A program with both kinds of sums does not fit into
registers. Sums over tokens are one partial sum per stretch, added by torch: no atomics, the same bits every time.

What it costs at least, for n tokens of d features with values of e and m landmarks (b bytes per number):

    transposed_product, product    2d + 2e flops per entry of C     (d + e)b bytes per token, each
    cotangents, q̄ and v̄            4d + 6e                          (2d + 3e)b
    cotangents, z̄                  4d + 4e                          (d + 2e)b

and one exponential per entry in each; at m = 49, d = e = 32 in float32, 6300 flops for 256 bytes, 25 per byte.
Float32 is multiplied as such ("ieee", no tensor cores), and arithmetic is the limit. Halves are multiplied in
float32 as well, by tensor cores in three parts ("tf32x3"), near the memory's limit: C and w keep their digits, which
matters where large entries of w cancel in C w.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # as in a torch for CPUs alone: `applies` is then never true
    triton = None

# Numbers of features and of landmarks that are served, and the dtypes.
_LARGEST = 128
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Features that a product takes at a time, the least that Triton's products are defined for: the operands of a product
# of float32 numbers without tensor cores are in registers as a whole.
_STEP = 16
# Tokens, landmarks and warps of a program that runs through the tokens, and of one that runs through the landmarks, by
# the larger of the padded d and e. What they hold fits, but for a few bytes, into the 255 registers of a
# thread, in either precision and on compute capabilities 8.0 and 9.0, as the compiler reports; and 32 KiB of shared
# memory suffice.
_BLOCKS = {
    16: ((32, 64, 4), (64, 16, 4)),
    32: ((32, 64, 4), (64, 16, 4)),
    64: ((32, 64, 8), (64, 16, 8)),
    128: ((32, 32, 8), (32, 16, 8)),
}
# A sum over n tokens is split into stretches of about so many, and into at most so many stretches: 13 at 3136 tokens,
# and partial sums that are a small part of what is read. n alone decides, for the elements of a batch to be the same
# in any company.
_STRETCH = 256
_MOST_STRETCHES = 512


def _jit(function: Callable[..., Any]) -> Any:
    return function if triton is None else triton.jit(function)


def _kernel(function: Callable[..., Any]) -> Any:
    """A kernel that is compiled once for all numbers of tokens."""
    return function if triton is None else triton.jit(function, do_not_specialize=("n", "parts"))


@_jit
def _entries(start, row, rows, row_stride, column, columns, column_stride):
    """Entries of a matrix in float32, 0 outside of it. ``row`` and ``column`` broadcast against each other."""
    at = start + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    return tl.load(at, mask=(row < rows) & (column < columns), other=0.0).to(tl.float32)


@_jit
def _write(start, row, rows, row_stride, columns, column_stride, tile, WIDTH: tl.constexpr):
    row, column = row[:, None], tl.arange(0, WIDTH)[None, :]
    at = start + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    tl.store(at, tile.to(start.dtype.element_ty), mask=(row < rows) & (column < columns))


@_jit
def _rows(start, row, rows, row_stride, columns, column_stride, WIDTH: tl.constexpr):
    return _entries(start, row[:, None], rows, row_stride, tl.arange(0, WIDTH)[None, :], columns, column_stride)


@_jit
def _add_product(
    total, x, i, x_rows, x_row, x_column, y, j, y_rows, y_row, y_column,
    width, WIDTH: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + x_i y_jᵀ, a few features at a time."""
    for k in range(0, WIDTH, STEP):
        feature = k + tl.arange(0, STEP)
        left = _entries(x, i[:, None], x_rows, x_row, feature[None, :], width, x_column)
        right = _entries(y, j[None, :], y_rows, y_row, feature[:, None], width, y_column)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@_jit
def _gaussian(
    x, i, x_rows, x_row, x_column, y, j, y_rows, y_row, y_column,
    width, WIDTH: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """k(x_i, y_j). Rows beyond the last count as points at the origin; what they are multiplied with is zero."""
    exponent = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    xx, yy = tl.zeros((ROWS, 1), dtype=tl.float32), tl.zeros((1, COLUMNS), dtype=tl.float32)
    for k in range(0, WIDTH, STEP):
        feature = k + tl.arange(0, STEP)
        left = _entries(x, i[:, None], x_rows, x_row, feature[None, :], width, x_column)
        right = _entries(y, j[None, :], y_rows, y_row, feature[:, None], width, y_column)
        xx += tl.sum(left * left, axis=1)[:, None]
        yy += tl.sum(right * right, axis=0)[None, :]
        exponent = tl.dot(left, right, exponent, input_precision=PRECISION)
    exponent -= 0.5 * (xx + yy)
    # Not tl.minimum, which makes 0 of a NaN.
    return tl.exp(tl.where(exponent > 0, 0.0, exponent))


@_jit
def _of_head(start, which, heads, batch_stride, head_stride):
    return start + (which // heads) * batch_stride + (which % heads) * head_stride


@_kernel
def _transposed_product(
    q, z, v, partial,
    q_batch, q_head, q_row, q_column, v_batch, v_head, v_row, v_column,
    heads, n, m, d, e, parts, stretch,
    D: tl.constexpr, E: tl.constexpr, TOKENS: tl.constexpr, LANDMARKS: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Cᵀv for a few landmarks, summed over one of ``parts`` stretches of the tokens."""
    tiles = tl.cdiv(m, LANDMARKS)
    program = tl.program_id(0).to(tl.int64)
    tile, part, which = program % tiles, (program // tiles) % parts, program // (tiles * parts)
    q = _of_head(q, which, heads, q_batch, q_head)
    v = _of_head(v, which, heads, v_batch, v_head)
    z += which * m * d
    partial += (which * parts + part) * m * e

    landmark = tile * LANDMARKS + tl.arange(0, LANDMARKS)
    total = tl.zeros((LANDMARKS, E), dtype=tl.float32)
    for k in range(0, stretch, TOKENS):
        token = part * stretch + k + tl.arange(0, TOKENS)
        c = _gaussian(
            z, landmark, m, d, 1, q, token, n, q_row, q_column, d, D, STEP, PRECISION, LANDMARKS, TOKENS
        )  # fmt: skip
        total = tl.dot(c, _rows(v, token, n, v_row, e, v_column, E), total, input_precision=PRECISION)
    _write(partial, landmark, m, e, e, 1, total, E)


@_kernel
def _product(
    q, z, w, out,
    q_batch, q_head, q_row, q_column, out_batch, out_head, out_row, out_column,
    heads, n, m, d, e, parts,
    D: tl.constexpr, E: tl.constexpr, TOKENS: tl.constexpr, LANDMARKS: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """C w for a few tokens."""
    program = tl.program_id(0).to(tl.int64)
    which, token = program // parts, (program % parts) * TOKENS + tl.arange(0, TOKENS)
    q = _of_head(q, which, heads, q_batch, q_head)
    out = _of_head(out, which, heads, out_batch, out_head)
    z += which * m * d
    w += which * m * e

    total = tl.zeros((TOKENS, E), dtype=tl.float32)
    for k in range(0, m, LANDMARKS):
        landmark = k + tl.arange(0, LANDMARKS)
        c = _gaussian(
            q, token, n, q_row, q_column, z, landmark, m, d, 1, d, D, STEP, PRECISION, TOKENS, LANDMARKS
        )  # fmt: skip
        total = tl.dot(c, _rows(w, landmark, m, e, e, 1, E), total, input_precision=PRECISION)
    _write(out, token, n, out_row, e, out_column, total, E)


@_kernel
def _cotangent_of_landmarks(
    q, z, v, g, w, s_bar, partial,
    q_batch, q_head, q_row, q_column, v_batch, v_head, v_row, v_column, g_batch, g_head, g_row, g_column,
    heads, n, m, d, e, parts, stretch,
    D: tl.constexpr, E: tl.constexpr, TOKENS: tl.constexpr, LANDMARKS: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pᵀq − z ∘ colsum(P) for a few landmarks, summed over one of ``parts`` stretches of the tokens."""
    tiles = tl.cdiv(m, LANDMARKS)
    program = tl.program_id(0).to(tl.int64)
    tile, part, which = program % tiles, (program // tiles) % parts, program // (tiles * parts)
    q = _of_head(q, which, heads, q_batch, q_head)
    v = _of_head(v, which, heads, v_batch, v_head)
    g = _of_head(g, which, heads, g_batch, g_head)
    z += which * m * d
    w += which * m * e
    s_bar += which * m * e
    partial += (which * parts + part) * m * d

    landmark = tile * LANDMARKS + tl.arange(0, LANDMARKS)
    total = tl.zeros((LANDMARKS, D), dtype=tl.float32)
    sums = tl.zeros((LANDMARKS,), dtype=tl.float32)
    for k in range(0, stretch, TOKENS):
        token = part * stretch + k + tl.arange(0, TOKENS)
        p = tl.zeros((LANDMARKS, TOKENS), dtype=tl.float32)
        p = _add_product(p, w, landmark, m, e, 1, g, token, n, g_row, g_column, e, E, STEP, PRECISION)
        p = _add_product(p, s_bar, landmark, m, e, 1, v, token, n, v_row, v_column, e, E, STEP, PRECISION)
        p *= _gaussian(
            z, landmark, m, d, 1, q, token, n, q_row, q_column, d, D, STEP, PRECISION, LANDMARKS, TOKENS
        )  # fmt: skip
        total = tl.dot(p, _rows(q, token, n, q_row, d, q_column, D), total, input_precision=PRECISION)
        sums += tl.sum(p, axis=1)
    total -= _rows(z, landmark, m, d, d, 1, D) * sums[:, None]
    _write(partial, landmark, m, d, d, 1, total, D)


@_kernel
def _cotangents_of_tokens(
    q, z, v, g, w, s_bar, q_bar, v_bar,
    q_batch, q_head, q_row, q_column, v_batch, v_head, v_row, v_column, g_batch, g_head, g_row, g_column,
    q_bar_batch, q_bar_head, q_bar_row, q_bar_column, v_bar_batch, v_bar_head, v_bar_row, v_bar_column,
    heads, n, m, d, e, parts,
    D: tl.constexpr, E: tl.constexpr, TOKENS: tl.constexpr, LANDMARKS: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P z − q ∘ rowsum(P) and C s̄ for a few tokens."""
    program = tl.program_id(0).to(tl.int64)
    which, token = program // parts, (program % parts) * TOKENS + tl.arange(0, TOKENS)
    q = _of_head(q, which, heads, q_batch, q_head)
    v = _of_head(v, which, heads, v_batch, v_head)
    g = _of_head(g, which, heads, g_batch, g_head)
    q_bar = _of_head(q_bar, which, heads, q_bar_batch, q_bar_head)
    v_bar = _of_head(v_bar, which, heads, v_bar_batch, v_bar_head)
    z += which * m * d
    w += which * m * e
    s_bar += which * m * e

    of_q, of_v = tl.zeros((TOKENS, D), dtype=tl.float32), tl.zeros((TOKENS, E), dtype=tl.float32)
    sums = tl.zeros((TOKENS,), dtype=tl.float32)
    for k in range(0, m, LANDMARKS):
        landmark = k + tl.arange(0, LANDMARKS)
        c = _gaussian(
            q, token, n, q_row, q_column, z, landmark, m, d, 1, d, D, STEP, PRECISION, TOKENS, LANDMARKS
        )  # fmt: skip
        of_v = tl.dot(c, _rows(s_bar, landmark, m, e, e, 1, E), of_v, input_precision=PRECISION)
        p = tl.zeros((TOKENS, LANDMARKS), dtype=tl.float32)
        p = _add_product(p, g, token, n, g_row, g_column, w, landmark, m, e, 1, e, E, STEP, PRECISION)
        p = _add_product(p, v, token, n, v_row, v_column, s_bar, landmark, m, e, 1, e, E, STEP, PRECISION)
        p *= c
        of_q = tl.dot(p, _rows(z, landmark, m, d, d, 1, D), of_q, input_precision=PRECISION)
        sums += tl.sum(p, axis=1)
    of_q -= _rows(q, token, n, q_row, d, q_column, D) * sums[:, None]
    _write(q_bar, token, n, q_bar_row, d, q_bar_column, of_q, D)
    _write(v_bar, token, n, v_bar_row, e, v_bar_column, of_v, E)


def applies(q: torch.Tensor, z: torch.Tensor, v: torch.Tensor, /) -> bool:
    """Whether the products of this room take these tensors.

    Shapes (..., n, d), (..., m, d) and (..., n, e) with the same one or two batch axes and m, d, e from 1 to 128; q and
    v of one dtype, float32, float16 or bfloat16, and z of the same or of float32; on one NVIDIA GPU, with Triton.
    """
    if triton is None or torch.version.hip is not None or not (q.device == z.device == v.device):
        return False
    if not (q.ndim == z.ndim == v.ndim and 3 <= q.ndim <= 4 and q.shape[:-2] == z.shape[:-2] == v.shape[:-2]):
        return False
    return (
        q.device.type == "cuda"
        and q.dtype == v.dtype
        and q.dtype in _DTYPES
        and z.dtype in (q.dtype, torch.float32)
        and q.shape[-2] == v.shape[-2]
        and q.shape[-1] == z.shape[-1]
        and all(1 <= size <= _LARGEST for size in (*z.shape[-2:], v.shape[-1]))
    )


@torch.library.custom_op(
    "lowrank::transposed_product", mutates_args=(), schema="(Tensor q, Tensor z, Tensor v) -> Tensor"
)
def transposed_product(q: torch.Tensor, z: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """k(q, z)ᵀ v of shape (..., m, e) in float32, for tokens q (..., n, d), landmarks z (..., m, d), v (..., n, e).

    q and v may have any strides. Raises as all operators here: TypeError for other dtypes, ValueError for other shapes.
    """
    _check(q, z, tokens={"v": v}, landmarks={})
    n, m, d, e = q.shape[-2], z.shape[-2], z.shape[-1], v.shape[-1]
    blocks, _ = _blocks(q, d, e)
    parts, stretch = _stretches(n, blocks["TOKENS"])
    partial = q.new_empty((q.shape[:-2].numel(), parts, m, e), dtype=torch.float32)
    _run(
        _transposed_product, partial.shape[0] * parts * triton.cdiv(m, blocks["LANDMARKS"]), blocks,
        q, z.contiguous(), v, partial,
        *_strides(q), *_strides(v), _heads(q), n, m, d, e, parts, stretch,
    )  # fmt: skip
    return partial.sum(dim=1).reshape(*q.shape[:-2], m, e)


@transposed_product.register_fake
def _(q: torch.Tensor, z: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    _check(q, z, tokens={"v": v}, landmarks={})
    return _of_landmarks(z, v.shape[-1])


@torch.library.custom_op("lowrank::product", mutates_args=(), schema="(Tensor q, Tensor z, Tensor w) -> Tensor")
def product(q: torch.Tensor, z: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """k(q, z) w of shape (..., n, e) in the dtype of q, for w of shape (..., m, e).

    With two batch axes, (batch, heads), the result lies in memory as (batch, n, heads, e): joining the heads is a view.
    """
    _check(q, z, tokens={}, landmarks={"w": w})
    n, m, d, e = q.shape[-2], z.shape[-2], z.shape[-1], w.shape[-1]
    _, blocks = _blocks(q, d, e)
    parts = triton.cdiv(n, blocks["TOKENS"])
    out = _of_tokens(q, e)
    _run(
        _product, q.shape[:-2].numel() * parts, blocks,
        q, z.contiguous(), w.contiguous(), out, *_strides(q), *_strides(out), _heads(q), n, m, d, e, parts,
    )  # fmt: skip
    return out


@product.register_fake
def _(q: torch.Tensor, z: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    _check(q, z, tokens={}, landmarks={"w": w})
    return _of_tokens(q, w.shape[-1])


@torch.library.custom_op(
    "lowrank::cotangents",
    mutates_args=(),
    schema="(Tensor q, Tensor z, Tensor v, Tensor g, Tensor w, Tensor s_bar)"
    " -> (Tensor q_bar, Tensor z_bar, Tensor v_bar)",
)
def cotangents(
    q: torch.Tensor, z: torch.Tensor, v: torch.Tensor, g: torch.Tensor, w: torch.Tensor, s_bar: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """P z − q ∘ rowsum(P), Pᵀq − z ∘ colsum(P) and C s̄ for P = C ∘ (g wᵀ + v s̄ᵀ), C = k(q, z).

    g, the cotangent of ``product``'s result, is of the shape of v; w and s̄ are of shape (..., m, e). The cotangents of
    q and v have their shapes and dtypes, and the layout of ``product``'s result; that of z is in float32.
    """
    _check(q, z, tokens={"v": v, "g": g}, landmarks={"w": w, "s_bar": s_bar})
    n, m, d, e = q.shape[-2], z.shape[-2], z.shape[-1], v.shape[-1]
    along, across = _blocks(q, d, e)
    z, w, s_bar = z.contiguous(), w.contiguous(), s_bar.contiguous()
    given = (q, z, v, g, w, s_bar)
    strides = (*_strides(q), *_strides(v), *_strides(g))

    parts, stretch = _stretches(n, along["TOKENS"])
    partial = q.new_empty((q.shape[:-2].numel(), parts, m, d), dtype=torch.float32)
    _run(
        _cotangent_of_landmarks, partial.shape[0] * parts * triton.cdiv(m, along["LANDMARKS"]), along,
        *given, partial, *strides, _heads(q), n, m, d, e, parts, stretch,
    )  # fmt: skip

    parts = triton.cdiv(n, across["TOKENS"])
    q_bar, v_bar = _of_tokens(q, d), _of_tokens(v, e)
    _run(
        _cotangents_of_tokens, q.shape[:-2].numel() * parts, across,
        *given, q_bar, v_bar, *strides, *_strides(q_bar), *_strides(v_bar), _heads(q), n, m, d, e, parts,
    )  # fmt: skip
    return q_bar, partial.sum(dim=1).reshape(z.shape), v_bar


@cotangents.register_fake
def _(
    q: torch.Tensor, z: torch.Tensor, v: torch.Tensor, g: torch.Tensor, w: torch.Tensor, s_bar: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(q, z, tokens={"v": v, "g": g}, landmarks={"w": w, "s_bar": s_bar})
    return _of_tokens(q, q.shape[-1]), _of_landmarks(z, z.shape[-1]), _of_tokens(v, v.shape[-1])


def _check(
    q: torch.Tensor, z: torch.Tensor, *, tokens: dict[str, torch.Tensor], landmarks: dict[str, torch.Tensor]
) -> None:
    """That nothing will be read beyond its end, or as what it is not: ``tokens`` and ``landmarks`` are of one width."""
    given = {"q": q, "z": z} | tokens | landmarks
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items())
    d, e = z.shape[-1], next(iter((tokens | landmarks).values())).shape[-1]
    for name, x in given.items():
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} has dtype {x.dtype}; the kernels take float32, float16 and bfloat16 ({shapes})")
        rows = z.shape[-2] if name == "z" or name in landmarks else q.shape[-2]
        if x.ndim not in (3, 4) or x.shape != (*q.shape[:-2], rows, d if name in ("q", "z") else e):
            raise ValueError(f"{name} does not fit the other tensors, of shapes (batch, rows, columns): {shapes}")
    if not all(1 <= size <= _LARGEST for size in (z.shape[-2], d, e)):
        raise ValueError(f"the kernels take 1 to {_LARGEST} landmarks, features and values: {shapes}")


def _of_tokens(like: torch.Tensor, width: int) -> torch.Tensor:
    """A new tensor (..., n, width), as (batch, n, heads, width) in memory if there are heads."""
    if like.ndim == 3:
        return like.new_empty((*like.shape[:-1], width))
    batch, heads, n, _ = like.shape
    return like.new_empty((batch, n, heads, width)).transpose(1, 2)


def _of_landmarks(z: torch.Tensor, width: int) -> torch.Tensor:
    return z.new_empty((*z.shape[:-1], width), dtype=torch.float32)


def _strides(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Those of batch, head, row and column; a single batch axis has no heads."""
    return x.stride() if x.ndim == 4 else (x.stride(0), 0, x.stride(1), x.stride(2))


def _heads(x: torch.Tensor) -> int:
    return x.shape[1] if x.ndim == 4 else 1


def _stretches(n: int, block: int) -> tuple[int, int]:
    """How many stretches n tokens are divided into, and how many tokens, whole blocks, each has."""
    wanted = max(1, min(triton.cdiv(n, _STRETCH), _MOST_STRETCHES))
    stretch = block * max(1, triton.cdiv(n, wanted * block))
    return triton.cdiv(n, stretch), stretch


def _blocks(q: torch.Tensor, d: int, e: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the kernels that run along the tokens, and those that run across the landmarks, are compiled for."""
    widths = {"D": max(_STEP, triton.next_power_of_2(d)), "E": max(_STEP, triton.next_power_of_2(e))}
    shared = widths | {"STEP": _STEP, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32x3"}
    along, across = (
        shared | {"TOKENS": tokens, "LANDMARKS": landmarks, "num_warps": warps}
        for tokens, landmarks, warps in _BLOCKS[max(widths.values())]
    )
    return along, across


def _run(kernel: Any, programs: int, blocks: dict[str, Any], q: torch.Tensor, *arguments: Any) -> None:
    if programs:
        with torch.cuda.device_of(q):
            kernel[(programs,)](q, *arguments, **blocks, num_stages=1, enable_fp_fusion=True)
