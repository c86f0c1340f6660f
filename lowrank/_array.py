"""The one room that knows that array libraries differ.

Everything else in the package is written against the Python array API standard (2023.12) and asks
this module for what the standard leaves open: which namespace a set of arrays belongs to, whether
values may be looked at now or only inside a traced program, a triangular solve, reproducible random
numbers, and moving a small core to the host and back.
"""

from __future__ import annotations

import contextlib
import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

import array_api_compat as compat
import numpy as np

Array = Any
Namespace = Any


def namespace(**arrays: Array) -> Namespace:
    """The array API namespace shared by the named arrays, after checking that they can work together.

    Raises ``TypeError`` for anything that is not a dense array of values, for two libraries, two dtypes or a dtype
    that is not floating; ``ValueError`` for two devices. The messages name the argument.
    """
    for name, x in arrays.items():
        if not compat.is_array_api_obj(x) or isinstance(x, (type, np.matrix, np.ma.MaskedArray)):
            raise TypeError(f"{name} must be an array, not {type(x).__name__}; convert it first, e.g. numpy.asarray")
        if compat.is_dask_array(x):
            raise TypeError(f"{name} is a Dask array (shape {x.shape}); compute it first, or use lowrank.dask")
        if compat.is_torch_array(x) and not is_dense(x):
            raise TypeError(f"{name} is a sparse tensor, {x.layout} (shape {tuple(x.shape)}); make it dense first")
    (first, x0), *others = arrays.items()
    xp = compat.array_namespace(x0)
    if x0.dtype not in (xp.float32, xp.float64, xp.complex64, xp.complex128) and not is_half(x0):
        raise TypeError(
            f"{first} has dtype {x0.dtype} (shape {tuple(x0.shape)}); a floating dtype is needed, "
            "convert it to float32 or float64 first"
        )
    for name, x in others:
        if type(x) is not type(x0) and compat.array_namespace(x) is not xp:
            raise TypeError(
                f"{first} is a {type(x0).__module__} array and {name} a {type(x).__module__} array; "
                "bring both to one library"
            )
        if x.dtype != x0.dtype:
            raise TypeError(
                f"{first} has dtype {x0.dtype} and {name} has dtype {x.dtype} "
                f"(shapes {tuple(x0.shape)}, {tuple(x.shape)}); convert one of them"
            )
    if others and not is_traced(*arrays.values()):
        for name, x in others:
            if (of_other := device(x)) != (of_first := device(x0)):
                raise ValueError(
                    f"{first} (shape {tuple(x0.shape)}) is on device {of_first} and {name} "
                    f"(shape {tuple(x.shape)}) on {of_other}; move one of them"
                )
    if compat.is_torch_array(x0) and x0.is_meta:
        raise TypeError(f"{first} (shape {tuple(x0.shape)}) is on the device meta, where tensors hold no values")
    return xp


def is_dense(x: Array) -> bool:
    """Whether a torch tensor has a place in memory for each of its numbers."""
    import torch

    return x.layout is torch.strided


def unwrapped(xp: Namespace) -> Namespace:
    """The library itself, whose functions do without looking for operands of two dtypes first."""
    if compat.is_torch_namespace(xp):
        import torch

        return torch
    return xp


def block_namespace(block: Any, x: Array, z: Array) -> Namespace:
    """The namespace of what a kernel returned for the points x and z, after checking that it is one number a pair."""
    xp = namespace(**{"what the kernel got": x, "what the kernel returned": block})
    wanted = (*broadcast_shapes(tuple(x.shape[:-2]), tuple(z.shape[:-2])), x.shape[-2], z.shape[-2])
    if tuple(block.shape) != wanted:
        raise ValueError(
            f"the kernel returned a block of shape {tuple(block.shape)} for points of shapes {tuple(x.shape)} and "
            f"{tuple(z.shape)}; it should be {wanted}"
        )
    return xp


def number(value: Any) -> float:
    """A real number as a float, infinite if it is too large for one; NaN, which is in no range, for all else."""
    if not isinstance(value, numbers.Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def fix_sizes(x: Array) -> None:
    """Have the sizes of matrices be numbers that constants can be made from. Where torch's compiler takes them for
    symbols, to have one program for many, they are these numbers from here on, and others get programs of their own."""
    for size in x.shape[-2:]:
        len(range(size))


def is_integer(value: Any) -> bool:
    """Whether value is an integer, of Python or NumPy, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_flag(name: str, value: Any) -> None:
    """Raise ``TypeError`` for what is neither True nor False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, not {shown(value)}")


def shown(value: Any) -> str:
    """A value as a message names it, on one line and not too long: an array by its shape, all else by its repr."""
    shape = getattr(value, "shape", ())
    if isinstance(shape, tuple) and shape:
        return f"an array of shape {tuple(shape)} and type {type(value).__name__}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:59]}…"


def device(x: Array) -> Any:
    """The device of x, for arrays made beside it; None, the library's choice, inside a traced JAX program."""
    if compat.is_torch_array(x):
        return x.device
    return None if compat.is_jax_array(x) and is_traced(x) else compat.device(x)


def is_half(x: Array) -> bool:
    """Whether x is float16 or bfloat16, dtypes that are stored but not computed in."""
    return str(x.dtype).rsplit(".")[-1] in ("float16", "bfloat16")


def is_traced(first: Array, *others: Array) -> bool:
    """Whether any array of one library is symbolic, so that no value of it may decide what is computed next."""
    if compat.is_torch_array(first):
        import torch

        if torch.compiler.is_compiling():
            return True
        functorch, arrays = torch._C._functorch, (first, *others)
        # A vmapped tensor shows a batch of values as one, so that it has no single truth value.
        if functorch.peek_interpreter_stack() is not None:
            arrays = tuple(map(_unwrapped, arrays))
            if any(map(functorch.is_batchedtensor, arrays)):
                return True
        return any(map(functorch.is_legacy_batchedtensor, arrays))
    if compat.is_jax_array(first):
        import jax

        return any(isinstance(x, jax.core.Tracer) for x in (first, *others))
    return False


def _unwrapped(x: Array) -> Array:
    """The torch tensor whose derivatives torch.func follows, or x."""
    from torch._C import _functorch as functorch

    while functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    return x


def arithmetic(x: Array) -> contextlib.AbstractContextManager[Any]:
    """Products of x are formed in its own dtype here, outside of autocast and at JAX's highest precision, and
    overflow travels as Inf or NaN to where results are judged, on NumPy as on every other library. Whether torch
    may use TF32 on a GPU is a setting of the whole process, and stays the user's."""
    if compat.is_torch_array(x):
        import torch

        kind = x.device.type
        # To enter a context takes as long as a small product.
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
    if compat.is_jax_array(x):
        import jax

        return jax.default_matmul_precision("highest")
    return np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore")


def has_derivative(x: Array) -> bool:
    """Whether x's library differentiates, so that a rule of one's own can be attached."""
    return compat.is_torch_array(x) or compat.is_jax_array(x)


def is_transformed(*arrays: Array) -> bool:
    """Whether torch follows derivatives of x in a way that ``backward`` of a rule does not serve: forward, or by one of
    the transformations of ``torch.func``."""
    if not compat.is_torch_array(arrays[0]):
        return False
    import torch

    forward = torch.autograd.forward_ad
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return forward._current_level >= 0 and any(forward.unpack_dual(x).tangent is not None for x in arrays)


def carries_derivative(x: Array) -> bool:
    """Whether operations on x are being recorded for the way back (torch; JAX traces instead)."""
    if not compat.is_torch_array(x):
        return False
    import torch

    return x.requires_grad and torch.is_grad_enabled()


def is_followed(*arrays: Array) -> bool:
    """Whether a derivative of what is made of the arrays, or another program, may be asked for; where not, a rule of
    one's own is an expense."""
    return is_traced(*arrays) or any(map(carries_derivative, arrays)) or is_transformed(*arrays)


def may_be_differentiated(*arrays: Array) -> bool:
    """Whether derivatives of what is made of the arrays by the library's operations may be asked for: of all that JAX
    traces, or torch.compile, unless gradients are off, and of what torch records. An exported program is for its
    results."""
    if not compat.is_torch_array(arrays[0]):
        return is_traced(*arrays)
    import torch

    if torch.compiler.is_compiling():
        # It does not tell whether torch.func is at work.
        return torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled()
    return is_transformed(*arrays) or any(map(carries_derivative, arrays))


def stop_gradient(x: Array) -> Array:
    """x without its history of derivatives."""
    if compat.is_torch_array(x):
        return x.detach()
    if compat.is_jax_array(x):
        import jax

        return jax.lax.stop_gradient(x)
    return x


def matrix_transpose_conj(x: Array, xp: Namespace) -> Array:
    """xᴴ over the last two axes."""
    return xp.conj(x.mT) if xp.isdtype(x.dtype, "complex floating") else x.mT


def real_dtype(x: Array, xp: Namespace) -> Any:
    """The real dtype of x's precision."""
    return xp.real(x[..., :0, :0]).dtype if xp.isdtype(x.dtype, "complex floating") else x.dtype


def widest_real(x: Array, xp: Namespace) -> Any:
    """float64 where x's namespace and device have it, else float32 (JAX without x64, for one)."""
    known = xp.__array_namespace_info__().dtypes(kind="real floating", device=device(x))
    return known.get("float64", xp.float32)


def generator(rng: int | np.random.Generator | None) -> np.random.Generator:
    """The host's generator; every backend draws the same numbers from one seed."""
    if rng is not None and not isinstance(rng, (int, np.integer, np.random.Generator)):
        raise TypeError(f"rng must be None, an int or a numpy.random.Generator, not {type(rng).__name__}")
    if isinstance(rng, (int, np.integer)) and rng < 0:
        raise ValueError(f"rng must not be negative where it is an int, not {shown(rng)}")
    return np.random.default_rng(rng)


def to_host(x: Array) -> np.ndarray:
    """x as a NumPy array, without its history of derivatives."""
    if compat.is_torch_array(x):
        from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

        # What torch.func follows holds no numbers itself, nor does anything that is made of it there.
        with temporarily_clear_interpreter_stack():
            return _unwrapped(x).detach().cpu().numpy()
    if compat.is_cupy_array(x):
        return x.get()
    if compat.is_numpy_array(x) or compat.is_jax_array(x):
        return np.asarray(x)
    return np.from_dlpack(x)


def from_host(values: np.ndarray, like: Array, xp: Namespace, *, dtype: Any = None) -> Array:
    """A NumPy array brought to the namespace and device of ``like``, in its dtype unless another is named."""
    return xp.asarray(values, dtype=like.dtype if dtype is None else dtype, device=device(like))


def solve_triangular(lower: Array, b: Array, xp: Namespace) -> Array:
    """L⁻¹ b for lower-triangular L, by the library's own triangular solve."""
    if compat.is_torch_array(b):
        return xp.linalg.solve_triangular(lower, b, upper=False)
    if compat.is_jax_array(b):
        import jax.scipy.linalg as linalg
    elif compat.is_cupy_array(b):
        import cupyx.scipy.linalg as linalg
    elif compat.is_numpy_array(b):
        import scipy.linalg as linalg
    else:
        return xp.linalg.solve(lower, b)
    return linalg.solve_triangular(lower, b, lower=True)


def cholesky(a: Array, xp: Namespace) -> Array:
    """The lower Cholesky factor, of NaN where there is none, whether the library raises there or not."""
    if compat.is_torch_array(a):
        lower, failed = xp.linalg.cholesky_ex(a)
        if is_on_cpu(a) and not is_traced(a) and not bool(failed.any()):
            return lower
        return xp.where((failed != 0)[..., None, None], xp.full_like(lower, float("nan")), lower)
    try:
        if compat.is_cupy_array(a):
            import cupyx

            with cupyx.errstate(linalg="raise"):
                return xp.linalg.cholesky(a)
        return xp.linalg.cholesky(a)
    except np.linalg.LinAlgError:
        return xp.full_like(a, float("nan"))


def split_rows(x: Array, at: int) -> tuple[Array, Array]:
    """x[..., :at, :] and x[..., at:, :], whose derivatives torch joins instead of adding up two of the size of x."""
    if compat.is_torch_array(x):
        first, second = x.split((at, x.shape[-2] - at), dim=-2)
        return first, second
    return x[..., :at, :], x[..., at:, :]


def solve_cholesky(lower: Array, b: Array) -> Array:
    """(L Lᴴ)⁻¹ b of torch tensors."""
    import torch

    return torch.cholesky_solve(b, lower)


def gradients_of(function: Callable[..., Array], inputs: tuple[Array, ...], g: Array, wants: tuple[bool, ...]) -> Any:
    """For a cotangent g of function(*inputs), of torch tensors, the cotangents of those inputs that are wanted and None
    for the others; to be differentiated again, or for many g at once."""
    import torch

    with torch.enable_grad():
        # Of inputs that are made of one another the cotangents are to be each one's own: views of them are not.
        inputs = tuple(x.view_as(x) if wants_x else x for x, wants_x in zip(inputs, wants, strict=True))
        out = function(*inputs)
    wanted = [x for x, wants_x in zip(inputs, wants, strict=True) if wants_x]
    found = iter(torch.autograd.grad(out, wanted, g, create_graph=torch.is_grad_enabled()))
    return tuple(next(found) if wants_x else None for wants_x in wants)


def onednn_dtype(*arrays: Array) -> Any:
    """What oneDNN computes in with torch tensors on a CPU; None if it is not there, or not for what these are."""
    import torch

    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return None
    dtypes, half = {x.dtype for x in arrays}, torch.bfloat16
    if torch.is_autocast_enabled("cpu"):
        dtypes = {torch.get_autocast_dtype("cpu")} if dtypes <= {torch.float32, half} else set()
    if dtypes == {torch.float32} or (dtypes == {half} and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return dtypes.pop()
    return None


def sum_in_place(fresh: Array, x: Array) -> Array:
    """x + fresh of torch tensors of one shape, in the memory of ``fresh``, which nobody else has, or of its cast to the
    dtype of x, where nothing follows what happens to it."""
    import torch

    followed = torch.is_grad_enabled() or is_traced(fresh, x) or is_transformed(fresh, x)
    if followed or torch.result_type(fresh, x) != x.dtype:
        return x + fresh
    return fresh.to(x.dtype).add_(x)


def broadcast_shapes(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """NumPy's rule, for sizes that may be symbols of a traced program. Raises ``ValueError``."""
    if all(shape == shapes[0] for shape in shapes):
        return shapes[0] if shapes else ()
    rank = max(map(len, shapes), default=0)
    result = []
    for sizes in zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True):
        largest = [size for size in sizes if size != 1] or [1]
        if any(size != largest[0] for size in largest):
            raise ValueError(f"the shapes {shapes} do not broadcast")
        result.append(largest[0])
    return tuple(result)


def is_on_cpu(x: Array) -> bool:
    """Whether x lives in the host's memory, where small caches reward small chunks."""
    if compat.is_torch_array(x):
        return x.device.type == "cpu"
    return compat.is_numpy_array(x) or str(getattr(compat.device(x), "platform", compat.device(x))).lower().startswith(
        "cpu"
    )


def add_scaled(x: Array, y: Array, alpha: float, xp: Namespace) -> Array:
    """x + αy, in one pass where the library has it."""
    return xp.add(x, y, alpha=alpha) if compat.is_torch_array(x) else x + alpha * y


def accumulate(x: Array, y: Array, alpha: float) -> Array:
    """x + αy in the memory of x, which is the caller's own, where the library writes to arrays."""
    if compat.is_torch_array(x):
        return x.add_(y, alpha=alpha)
    x += alpha * y
    return x


def transposed_copy(x: Array, xp: Namespace) -> Array:
    """xᵀ in memory of its own, of a library that writes to arrays: torch takes up to a quarter less time for a product
    with it than with a view."""
    copy = xp.empty((*x.shape[:-2], x.shape[-1], x.shape[-2]), dtype=x.dtype, device=device(x))
    copy[...] = xp.matrix_transpose(x)
    return copy


def equal(x: Array, y: Array, xp: Namespace) -> bool:
    """Whether all entries of two arrays of one shape are equal."""
    if compat.is_torch_array(x):
        import torch

        return torch.equal(x, y)
    return bool(xp.all(x == y))


def elementwise_product_subtracted(x: Array) -> Callable[[Array, Array], Array]:
    """(a, b) ↦ x − ab, entry by entry, in the memory of x, of a library that writes to arrays."""
    if compat.is_torch_array(x):
        return functools.partial(x.addcmul_, value=-1)
    product = np.empty_like(x)

    def subtract(a: Array, b: Array) -> Array:
        return np.subtract(x, np.multiply(a, b, out=product), out=x)

    return subtract


def writes(x: Array) -> bool:
    """Whether x's library writes results to arrays that it is handed."""
    return compat.is_torch_array(x) or compat.is_numpy_array(x) or compat.is_cupy_array(x)


def is_contiguous(x: Array) -> bool:
    """Whether the numbers of x lie one after the other, in the order of its axes."""
    return bool(x.is_contiguous() if compat.is_torch_array(x) else x.flags.c_contiguous)


def is_plain(x: Array) -> bool:
    """Whether x is an array of its library as such, and none of a class that was derived from it."""
    if compat.is_torch_array(x):
        import torch

        return type(x) is torch.Tensor
    return type(x) is np.ndarray


def new_memory(like: Array, xp: Namespace, size: int) -> Array:
    """``size`` numbers of the dtype and on the device of ``like``, to be written to at any time, also outside of the
    inference mode that torch may be in."""
    if compat.is_torch_array(like):
        import torch

        with torch.inference_mode(False):
            return torch.empty(size, dtype=like.dtype, device=like.device)
    return xp.empty(size, dtype=like.dtype, device=device(like))


def exp_of_negative(x: Array, xp: Namespace) -> Array:
    """exp(min(x, 0)) in the memory of x, of a library that writes to arrays, and 0 where that would be below ε^⅘, ε the
    smallest normal number: CPUs take a hundred times as long for products of numbers below it."""
    lowest = 0.8 * math.log(float(xp.finfo(x.dtype).smallest_normal))
    negligible = math.exp(lowest) * (1 + 1e-3)  # what is at the lowest, however exp rounds
    if compat.is_torch_array(x):
        import torch

        return torch.threshold_(x.clamp_(lowest, 0).exp_(), negligible, 0.0)
    x = xp.exp(xp.clip(x, lowest, 0.0, out=x), out=x)
    x *= x > negligible
    return x


def identity(like: Array, xp: Namespace) -> Array:
    """I of the order, dtype and device of a square matrix."""
    if not is_traced(like):
        return xp.eye(like.shape[-1], dtype=like.dtype, device=device(like))
    # By comparison, for torch's exporters break eye(n) into writes to a view, and do not follow those.
    k = xp.arange(like.shape[-1], device=device(like))
    return xp.astype(k[:, None] == k[None, :], like.dtype)


def add_to_diagonal(x: Array, alpha: Array | float, xp: Namespace) -> Array:
    """x + αI in the memory of x, which is the caller's own, where the library writes to arrays; α is a number or an
    array of x's batch shape."""
    along: Array = alpha if isinstance(alpha, (int, float)) else alpha[..., None]
    if compat.is_torch_array(x) and not is_traced(x):  # exporters do not follow writes to a view
        x.diagonal(dim1=-2, dim2=-1).add_(along)
    elif compat.is_numpy_array(x):
        np.einsum("...ii->...i", x)[...] += along
    else:
        every: Array = along if isinstance(alpha, (int, float)) else along[..., None]
        x += every * identity(x, xp)
    return x


def add_product(
    x: Array, a: Array, b: Array, xp: Namespace, *, beta: float = 1.0, alpha: float = 1.0, out: Array | None = None
) -> Array:
    """βx + α a @ b, the sum in the product's own pass where the library has that; in the memory of ``out``, which may
    be x itself, where the library writes to arrays."""
    if compat.is_torch_array(x) and x.ndim in (2, 3):
        fused = xp.addmm if x.ndim == 2 else xp.baddbmm
        return fused(x, a, b, beta=beta, alpha=alpha, out=out)
    product = a @ b if out is None or out is x else xp.matmul(a, b, out=out)
    if alpha != 1.0:
        product *= alpha
    return accumulate(product, x, beta)


def product_and_sums(a: Array, b: Array, rows: Array, columns: Array, out: Array, xp: Namespace) -> Array:
    """a @ b + rows + columns, of one column and one row, in the memory of ``out``, of a library that writes to arrays;
    in two passes where products add."""
    if compat.is_torch_array(out):
        return add_product(xp.add(rows, columns, out=out), a, b, xp, out=out)
    out = xp.matmul(a, b, out=out)
    out += columns
    out += rows
    return out


def stacked_product(a: Array, b: Array, xp: Namespace, *, out: Array | None = None) -> Array:
    """a @ b of two arrays of three axes, without what torch does to find out that they are; in the memory of ``out``,
    of a library that writes to arrays."""
    product = xp.bmm if compat.is_torch_array(a) and a.ndim == 3 else xp.matmul
    return product(a, b) if out is None else product(a, b, out=out)
