"""Softmax-free attention of torch tensors on a CPU by compiled kernels.

A block of C stays in the nearest caches from its distances to the last product with it.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from lowrank import _native
from lowrank._array import Namespace
from lowrank._attend import AMPLIFIED, inner_cotangent, landmark_cotangents, most_amplified, solved
from lowrank._formula import CORRECTIONS, Factor

# What is computed of chunks of the points, of whole elements of the batch, and of elements that are in chunks.
SUMS, WIDE_SUMS, PRODUCT, COTANGENTS, FORWARD, BACKWARD, SOLUTION = range(7)
MEANS = 0
# Entries of an element's part of C up to which it is kept from the sums to the product, 1 MiB, half of a large second
# cache; and how many elements there are to be then, if chunks could be shared among more threads.
WHOLE_ENTRIES, WHOLE_ELEMENTS = 2**18, 8
# Features of a point or a value. Of 96, calls with 8 to 128 landmarks take 0.5 to 1.0 of the time of the blocks, of 128
# up to 1.25: a block no longer fits the nearest caches, and a library's products of large matrices are as fast.
MOST_FEATURES = 96
# Bytes from which on the memory of an array is always new to the process with GNU's C library. Of smaller ones, that is
# to be used again, large pages are no help.
LARGE = 1 << 25
# Landmarks up to which w is solved for by one core.
MOST_LANDMARKS = 128


class Rows(ctypes.Structure):
    """Rows of an array of two batch axes, as ``struct rows`` has them."""

    _fields_ = (
        ("at", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("of_batch", "of_head", "of_row", "half")),
    )


class Task(ctypes.Structure):
    """``struct attention``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("heads", "elements", "n", "m", "d", "e")),
        *((name, ctypes.c_int64) for name in ("transposed_core", "corrections", "of_gram", "most")),
        *((name, Rows) for name in ("q", "summed", "v", "g", "out", "q_bar", "v_bar")),
        *((name, ctypes.c_void_p) for name in ("centre", "z", "core", "system")),
        *((name, ctypes.c_void_p) for name in ("w", "sigma_bar", "sums", "z_bar", "from_q", "wide_sums", "amplified")),
        ("scale", ctypes.c_double),
    )


class Segments(ctypes.Structure):
    """``struct segments``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("heads", "elements", "n", "m", "d")),
        ("points", Rows),
        *((name, ctypes.c_void_p) for name in ("z", "centre")),
    )


@functools.cache
def chunk() -> int:
    """How many points of an element are taken at a time."""
    return int(_native.kernels().lowrank_chunk())


def applies(q: Tensor, z: Tensor, v: Tensor) -> bool:
    """Whether they are float32, q and v bfloat16 perhaps, and of not too many features."""
    return z.dtype == torch.float32 and _native.serve(z) and apply_to(q) and apply_to(v)


def apply_to(x: Tensor) -> bool:
    """Whether tokens are float32 or bfloat16, and of not too many features."""
    return x.dtype in (torch.float32, torch.bfloat16) and x.shape[-1] <= MOST_FEATURES and _native.serve(x)


def means(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means of ``count`` segments of points (..., n, d), as ``_segments`` has them but in float32 whatever the dtype of
    the points, and the mean of those, (..., 1, d)."""
    *batch, n, d = points.shape
    rows = _rows_of(points.reshape((-1, *points.shape[-3:])) if len(batch) > 2 else points[(None,) * (2 - len(batch))])
    z, centre = (points.new_empty(*batch, k, d, dtype=torch.float32) for k in (count, 1))
    task = Segments(heads=rows.shape[1], elements=rows.shape[0] * rows.shape[1], n=n, m=count, d=d)
    task.points = Rows(rows.data_ptr(), *rows.stride()[:3], rows.dtype == torch.bfloat16)
    _native.run("lowrank_segments", task, MEANS, {"z": z, "centre": centre})
    return z, centre


def forward(
    q: Tensor,
    z: Tensor,
    v: Tensor,
    core: Tensor | Factor,
    system: Tensor | None,
    centre: Tensor,
    scale: float,
    xp: Namespace,
    *,
    most: int = AMPLIFIED,
) -> tuple[Tensor, Tensor, Tensor]:
    """X, σ and w, as ``_attend.forward`` has them."""
    call = _Call(q, z, v, centre, scale)
    call.task.most = 0 if system is None else most
    core = call.inverse(core)
    out = call.writes("out", v)
    call.reads(summed=v)
    if call.is_whole(core):
        call.solves(core, system)
        sums, weights = call.makes("sums"), call.makes("w")
        call.run(FORWARD)
    else:
        sums, weights = call.solution(core, system, call.by_chunks("sums", SUMS), xp)
        call.packs(w=weights)
        call.run(PRODUCT)
    return out, sums, weights


def backward(
    q: Tensor,
    z: Tensor,
    v: Tensor,
    core: Tensor | Factor,
    system: Tensor | None,
    centre: Tensor,
    scale: float,
    sums: Tensor,
    weights: Tensor,
    g: Tensor,
    xp: Namespace,
    *,
    of_gram: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q̄, z̄, v̄, and M̄ or P̄, as ``_attend.backward`` has them."""
    call = _Call(q, z, v, centre, scale)
    call.task.most = 0 if system is None else most_amplified(of_gram=of_gram)
    core = call.inverse(core)
    q_bar, v_bar = call.writes("q_bar", q), call.writes("v_bar", v)
    call.reads(summed=g, v=v, g=g)
    if call.is_whole(core):
        call.solves(core, system, transposed=system is None)
        call.packs(w=weights)
        call.task.of_gram = of_gram
        w_bar, sigma_bar, z_bar = call.makes("sums"), call.makes("sigma_bar"), call.makes("z_bar")
        call.run(BACKWARD)
        inner = None if of_gram else inner_cotangent(system, w_bar, sigma_bar, sums, weights)
        return q_bar, z_bar, v_bar, inner
    inverse = xp.matrix_transpose(core) if system is None else core
    w_bar, sigma_bar = call.solution(inverse, system, call.by_chunks("sums", SUMS), xp)
    call.packs(w=weights, sigma_bar=sigma_bar)
    from_q = call.by_chunks("from_q", COTANGENTS)
    given = w_bar, sigma_bar, sums, weights, system, z, centre, scale, xp
    z_bar, inner = landmark_cotangents(from_q[..., :-1], from_q[..., -1:], *given, of_gram=of_gram)
    return q_bar, z_bar, v_bar, inner


def _rows_of(x: Tensor) -> Tensor:
    """x with its rows contiguous."""
    known = (x.stride(-1) == 1 or x.shape[-1] == 1) and not x.is_neg()
    return x if known else _native.packed(x)


class _Call:
    """A task, and the arrays that it points to."""

    def __init__(self, q: Tensor, z: Tensor, v: Tensor, centre: Tensor, scale: float) -> None:
        self.batch, (n, d), m, e = q.shape[:2], q.shape[2:], z.shape[-2], v.shape[-1]
        heads, elements = self.batch[1], self.batch.numel()
        self.task = Task(heads=heads, elements=elements, n=n, m=m, d=d, e=e, scale=scale)
        self.arrays: dict[str, Tensor] = {}
        self.reads(q=q)
        self.packs(centre=centre, z=z)

    def inverse(self, core: Tensor | Factor) -> Tensor | Factor:
        """Of few landmarks the matrix itself, which the kernels take."""
        few = isinstance(core, Factor) and self.task.m <= MOST_LANDMARKS
        return torch.cholesky_inverse(core.lower) if few else core

    def is_whole(self, core: Tensor | Factor) -> bool:
        """Whether elements are small enough, and enough of them, for one thread each."""
        task = self.task
        many = task.elements >= WHOLE_ELEMENTS or task.n <= chunk()
        return many and task.n * task.m <= WHOLE_ENTRIES and not isinstance(core, Factor)

    def reads(self, **arrays: Tensor) -> None:
        for name, x in arrays.items():
            self._rows(name, _rows_of(x))

    def writes(self, name: str, like: Tensor) -> Tensor:
        """New memory, with the strides of ``like`` where its rows are contiguous."""
        out = torch.empty_like(like, requires_grad=False)
        if out.stride(-1) != 1:
            out = torch.empty_like(like, memory_format=torch.contiguous_format)
        if out.nbytes >= LARGE:
            _native.kernels().lowrank_large_pages(ctypes.c_void_p(out.data_ptr()), ctypes.c_size_t(out.nbytes))
        self._rows(name, out)
        return out

    def packs(self, **arrays: Tensor) -> None:
        for name, x in arrays.items():
            x = x if x.shape[:2] == self.batch else x.expand(*self.batch, *x.shape[2:])
            self._points(name, _native.packed(x))

    def makes(self, name: str, *chunks: int) -> Tensor:
        width = {"from_q": self.task.d + 1, "z_bar": self.task.d}.get(name, self.task.e)
        dtype = torch.float64 if name in ("wide_sums", "from_q") else torch.float32
        out = self.arrays["z"].new_empty(*self.batch, *chunks, self.task.m, width, dtype=dtype)
        self._points(name, out)
        return out

    def by_chunks(self, name: str, what: int) -> Tensor:
        """What is computed of chunks, and summed over them."""
        count = -(-self.task.n // chunk())
        out = self.makes(name, count)
        self.run(what)
        return out[:, :, 0] if count == 1 else out.sum(2)

    def solves(self, core: Tensor, system: Tensor | None, *, transposed: bool = False) -> None:
        self.packs(core=core)
        if system is not None:
            self.packs(system=system.to(torch.float64))
            self.task.corrections = CORRECTIONS
        self.task.transposed_core = transposed

    def solution(
        self, core: Tensor | Factor, system: Tensor | None, sums: Tensor, xp: Namespace
    ) -> tuple[Tensor, Tensor]:
        """σ and w as ``_attend.solved`` has them, for sums over all chunks."""
        few = not isinstance(core, Factor) and self.task.m <= MOST_LANDMARKS
        if not few:
            z = (self.arrays["z"] - self.arrays["centre"]) * self.task.scale
            half_z = 0.5 * z.square().sum(-1)[..., None, :]
            exact = self.exact_sums if self.task.most else None
            sums, w, _ = solved(core, system, sums, half_z, exact, self.task.most, xp)
            return sums, w
        self.packs(sums=sums)
        self.solves(core, system)
        w, amplified = self.makes("w"), sums.new_empty(self.batch, dtype=torch.bool)
        self._points("amplified", amplified)
        self.run(SOLUTION)
        if bool(amplified.any()):
            self._points("wide_sums", self.exact_sums(amplified))
            self.run(SOLUTION)
        return self.arrays["sums"], w

    def exact_sums(self, amplified: Tensor) -> Tensor:
        self._points("amplified", amplified)
        return self.by_chunks("wide_sums", WIDE_SUMS).contiguous()

    def run(self, what: int) -> None:
        _native.run("lowrank_attend", self.task, what)

    def _rows(self, name: str, x: Tensor) -> None:
        self.arrays[name] = x
        setattr(self.task, name, Rows(x.data_ptr(), *x.stride()[:3], x.dtype == torch.bfloat16))

    def _points(self, name: str, x: Tensor) -> None:
        self.arrays[name] = x
        setattr(self.task, name, x.data_ptr())
