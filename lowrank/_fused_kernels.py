"""The Triton kernel behind ``_fused`` and the operator ``lowrank::scaled_newton`` that torch knows it by.

Apart from ``_fused``, since the kernel's names and the operator have to exist before a compiler looks at them: they
come with the import of this module, and so do torch and Triton. The mathematics is that of ``_definite.scaled_newton``,
with steps of order 2 alone (V. Pan and R. Schreiber, SIAM J. Sci. Stat. Comput. 12, 1991).
"""

import math

import torch
import triton
import triton.language as tl

# As in _newton.MARGIN: two per cent by which the bound on ‖P‖ exceeds the row sums.
_MARGIN = tl.constexpr(1.02)
_EPS = tl.constexpr(2.0**-23)
# Steps end where the square of ‖I − E‖ is below rounding, for all that is known of κ is that it is u/ridge at the most.
_ENOUGH = tl.constexpr(2.0**-12.5)
# Steps grow the smallest ratio, eps, almost 4-fold: 12 reach 1, and 4 more the tolerance.
_MOST_STEPS = tl.constexpr(24)
# Newton squares a residual of 0.9 to below a half in three passes, and the fourth leaves a quarter.
_MOST_PASSES = tl.constexpr(4)
# Columns of a factor that a product takes at a time, the least that Triton's products are defined for.
_BLOCK = tl.constexpr(16)


@triton.jit
def _block(start, row, column, n):
    """Entries of the n × n matrix at ``start``, 0 outside of it."""
    return tl.load(start + row * n + column, mask=(row < n) & (column < n), other=0.0)


@triton.jit
def _write(start, row, column, n, tile):
    """Store a tile where all threads of the program have read what was there, and will find it."""
    tl.debug_barrier()
    tl.store(start + row * n + column, tile, mask=(row < n) & (column < n))
    tl.debug_barrier()


@triton.jit
def _product(a, b, n, SIZE: tl.constexpr):
    """a @ b of two matrices in memory, a few columns of a and rows of b at a time."""
    row, column, inner = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :], tl.arange(0, _BLOCK)
    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for k in range(0, n, _BLOCK):
        left = _block(a, row, k + inner[None, :], n)
        right = _block(b, k + inner[:, None], column, n)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def _grid(tile, axis: tl.constexpr, BITS: tl.constexpr):
    """σ for which (a + σ) − σ is a rounded to BITS bits below the power of two that bounds |a| along ``axis``."""
    largest = tl.max(tl.abs(tile), axis=axis, keep_dims=True)
    # On the bits of a float, this rounds the mantissa up to a power of two; 0 stays 0.
    power = (largest.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    return power.to(tl.float32, bitcast=True) * (1.5 * 2.0 ** (24 - BITS))


@triton.jit
def _accurate_residual(x, p, sigma_x, sigma_p, n, SIZE: tl.constexpr):
    """XP − I from split factors, as _accurate.accurate_product has it, in one accumulator.

    The products of leading bits and their sums are whole multiples of one unit below 2²⁴ of it, hence exact, if no
    product is rounded to fewer bits first: "ieee" and nothing less. −I joins them while they are, and the remainder
    is summed onto what cancellation has left.
    """
    row, column, inner = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :], tl.arange(0, _BLOCK)
    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for k in range(0, n, _BLOCK):
        left = _block(x, row, k + inner[None, :], n)
        right = _block(p, k + inner[:, None], column, n)
        total = tl.dot((left + sigma_x) - sigma_x, (right + sigma_p) - sigma_p, total, input_precision="ieee")
    total -= tl.where((row == column) & (row < n), 1.0, 0.0)
    for k in range(0, n, _BLOCK):
        left = _block(x, row, k + inner[None, :], n)
        right = _block(p, k + inner[:, None], column, n)
        leading = (left + sigma_x) - sigma_x
        total = tl.dot(leading, right - ((right + sigma_p) - sigma_p), total, input_precision="ieee")
        total = tl.dot(left - leading, right, total, input_precision="ieee")
    return total


@triton.jit
def _invert(a, p, x, e, figures, ridge, n, SIZE: tl.constexpr, BITS: tl.constexpr):
    """The inverse of P = A + ridge·I, A ≽ 0 of order n ≤ SIZE, and its steps, products, bound and validity.

    P, X and E are three tiles of SIZE² numbers, each of 64 KiB for SIZE = 128: with the operands and sums of a product
    more than registers and shared memory hold on most devices. So they live in global memory, where the caches keep
    what one program works on, and in registers are one accumulator, the blocks being multiplied, and one tile more
    where X changes.

    Tiles are padded by zeros, and so is the identity in them: every iterate is then zero there, whatever P holds. An
    entry of P that is not finite leaves no finite row in E, and all comparisons below come out false.
    """
    which = tl.program_id(0).to(tl.int64)
    a, p, x, e = a + which * n * n, p + which * n * n, x + which * n * n, e + which * n * n
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]

    eye = tl.where((row == column) & (row < n), 1.0, 0.0)
    tile = _block(a, row, column, n) + ridge * eye
    _write(p, row, column, n, tile)
    sigma_p = _grid(tile, 0, BITS)
    upper = tl.max(tl.sum(tl.abs(tile), axis=1), axis=0) * _MARGIN
    low = tl.maximum(ridge / upper, _EPS)
    # A change of P in its last bits moves X by κ·eps: a pass below may leave that much, and a residual of its root.
    # (Triton's interpreter does not divide a constant by a tensor.)
    small = tl.minimum(2 * tl.sqrt(n * tl.maximum(1 / (low * (512 / _EPS)), _EPS / 4)), 0.25)

    # X ← ρ(2X − XPX), ρ = 2/(2 − ε²), leads a spectrum of E = XP in [low, high] = [1 − ε, 1 + ε] into one in
    # [ρ(1 − ε²), ρ]. Followed at both ends, low keeps its digits where ε is next to 1, and high where ε is next to 0.
    # The first step, from X = scale·I, takes no product.
    low, high = low * (2 / (1 + low)), 2 / (1 + low)
    scale = high / upper
    rho = 2 / (1 + low * high)
    low, high = rho * low * high, rho
    _write(x, row, column, n, (rho * scale) * (2 * eye - scale * tile))
    steps = 1
    while (steps < _MOST_STEPS) & (tl.maximum(1 - low, high - 1) > _ENOUGH):
        rho = 2 / (1 + low * high)
        low, high = rho * low * high, rho
        _write(e, row, column, n, _product(x, p, n, SIZE))
        change = _product(e, x, n, SIZE)
        _write(x, row, column, n, rho * (2 * _block(x, row, column, n) - change))
        steps += 1
    bound = tl.maximum(1 - low, high - 1)

    # X ← X − (E − I)X squares E − I, until what was squared last was small; that it was proves X an inverse. The
    # symmetric part is taken after that: it is as near to P⁻¹, but its own residual is κ times as large.
    residual = small + 0.5
    passes = 0
    while (passes < _MOST_PASSES) & (residual > small) & (residual < 1):
        sigma_x = _grid(_block(x, row, column, n), 1, BITS)
        rest = _accurate_residual(x, p, sigma_x, sigma_p, n, SIZE)
        residual = tl.sqrt(tl.sum(tl.sum(rest * rest, axis=1), axis=0))
        _write(e, row, column, n, rest)
        change = _product(e, x, n, SIZE)
        _write(x, row, column, n, _block(x, row, column, n) - change)
        bound = bound * bound
        passes += 1

    valid = residual <= 0.5
    tile = _block(x, row, column, n)
    _write(x, row, column, n, tl.where(valid, 0.5 * (tile + tl.trans(tile)), float("nan")))
    figures += which * 4
    tl.store(figures, 1.0 * (steps + passes))
    tl.store(figures + 1, 2.0 * (steps - 1) + 4.0 * passes)
    tl.store(figures + 2, bound)
    tl.store(figures + 3, valid.to(tl.float32))


# Warps of a program for each padded size: enough threads that their registers hold an accumulator and two blocks.
_WARPS = {16: 1, 32: 4, 64: 8, 128: 16}


@torch.library.custom_op(
    "lowrank::scaled_newton", mutates_args=(), schema="(Tensor a, float ridge) -> (Tensor x, Tensor figures)"
)
def scaled_newton(a: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(A + ridge·I)⁻¹ of the shape (..., n, n) of a, and its steps, products, bound and validity, of shape (..., 4)."""
    n, count = a.shape[-1], math.prod(a.shape[:-2])
    x, figures = _results(a, ridge)
    size = max(16, triton.next_power_of_2(n))
    # Leading bits so few that sums of `size` of their products fit into the 24 of a float32, as in _accurate.
    bits = (24 - size.bit_length()) // 2
    if count:
        with torch.cuda.device_of(a):
            # A product fused with the sum that splits it would leave bits in neither part.
            _invert[(count,)](
                a.contiguous(), torch.empty_like(x), x, torch.empty_like(x), figures, ridge, n,
                SIZE=size, BITS=bits, num_warps=_WARPS[size], num_stages=1, enable_fp_fusion=False,
            )  # fmt: skip
    return x, figures


@scaled_newton.register_fake
def _results(a: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    return a.new_empty(a.shape), a.new_empty((*a.shape[:-2], 4))
