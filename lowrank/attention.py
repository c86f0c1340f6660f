"""Softmax-free attention: the product of a Gaussian Gram matrix with values, in time linear in the tokens.

Queries and keys are the same tokens, so the attention matrix k(q, q) is a Gram matrix and a few landmarks z
give its Nyström approximation C A⁺ Cᵀ, C = k(q, z), A = k(z, z) (Lu et al., "SOFT: Softmax-free Transformer
with Linear Complexity", NeurIPS 2021, eq. 8; the symmetric normalisation is from "Softmax-free Linear
Transformers", IJCV 2024). Only products of tall and small matrices occur, on any array library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import array_api_compat as compat

from lowrank import _attend
from lowrank import pinv as _pinv
from lowrank._array import (
    Array,
    Namespace,
    add_to_diagonal,
    arithmetic,
    broadcast_shapes,
    carries_derivative,
    check_flag,
    cholesky,
    fix_sizes,
    identity,
    is_half,
    is_integer,
    is_on_cpu,
    is_traced,
    is_transformed,
    may_be_differentiated,
    namespace,
    number,
    shown,
    stop_gradient,
    widest_real,
    writes,
)
from lowrank._formula import CORRECTIONS, Factor, from_gram, gaussian_gram, plain
from lowrank._nearby import nearby
from lowrank._segments import segment_means
from lowrank.kernels import _checked_lengthscale


def softmax_free_attention(
    q: Array,
    v: Array,
    landmarks: Array | int,
    /,
    *,
    lengthscale: float | Array | None = None,
    ridge: float = 0.01,
    normalize: bool = False,
    mask: Array | None = None,
    landmark_mask: Array | None = None,
    queries: Array | None = None,
    method: str = "newton",
    inverse: Callable[..., Array] | None = None,
) -> Array:
    r"""Nyström approximation of k(q, q) v, k(x, y) = exp(−‖(x − y)/ℓ‖²/2): X = C (A⁺ (Cᵀ v)).

    With landmarks z, C = k(q, z) and A = k(z, z). There is no softmax, and no normalisation unless asked for.
    The products are formed from the right, so the cost is O(n m (d + e) + m³) for n tokens and m landmarks.

    Parameters
    ----------
    q : array, shape (..., n, d)
        Queries, which are the keys as well. Real floating; float16 and bfloat16 are computed in float32.
    v : array, shape (..., n, e)
        Values.
    landmarks : array, shape (..., m, d), or int
        z. Leading axes of the three arrays are batch axes and broadcast. An int m stands for the means of m segments of
        the tokens, those of :func:`lowrank.segment_means`, or for the tokens themselves where there are no more than m.
    lengthscale : float or array of shape (d,), optional
        ℓ, in the units of ``q``; must be positive. The default is d^¼, so that k = exp(−‖q − z‖²/(2√d)), the
        counterpart of softmax attention's scale.
    ridge : float
        δ ≥ 0: the core inverted is A + δ I, whose condition number is at most 1 + m/δ. The default is the
        value that the published models were trained with.
    normalize : bool
        Replace A⁺ by D^{-½} A⁺ D^{-½}, D the diagonal of the row sums of A (without the ridge).
    mask : bool array, shape (..., n), optional
        True where a token takes part. The others, whatever they hold, contribute nothing and get an output of zero.
    landmark_mask : bool array, shape (..., m), optional
        True where a landmark takes part; the result is that of the others being absent.
    queries : array, shape (..., n', d), optional
        Tokens that ask, where they are not those that answer: the result is k(queries, z) A⁺ k(z, q) v, of shape
        (..., n', e). It approximates a block of a Gram matrix, not a Gram matrix, so that nothing is semidefinite
        about its error. ``mask`` concerns ``q`` and ``v`` alone then.
    method : {"newton", "direct"}
        How the system with A + δ I is solved (with δ = 0: how its pseudoinverse is found, which is used as it is).
        "newton": by two corrections of what an approximate inverse of :func:`lowrank.pinv_newton` gives. "direct": by
        the library's own factorisation and one correction, which on a CPU without compiled kernels takes less time.
    inverse : callable, optional
        In place of ``method``: called as ``inverse(a, hermitian=True, ridge=ridge)`` with a of shape (..., m, m);
        returns (a + δ I)⁺, which is used and differentiated as it is: ``functools.partial(pinv_newton, steps=20)`` is
        the unconverged iteration of the paper.

    Returns
    -------
    array, shape (..., n, e)
        Of the dtype, on the device and of the library of ``q``. Without landmarks, zero.

    Raises
    ------
    TypeError
        If the arguments are not arrays of one library and one real floating dtype, a mask is not a bool array of that
        library, ``lengthscale`` is neither a number nor a real floating array of it, ``normalize`` is neither True nor
        False, or ``inverse`` is not callable, or returns no array of the library and dtype of its argument.
    ValueError
        If their shapes do not fit, they are on different devices, ``landmarks`` is an int below 1, or an int beside a
        mask, ``lengthscale`` is not positive and finite, ``ridge``
        is negative or not finite, ``method`` is neither of the two, or is "direct" beside an ``inverse``, or that
        returns an array of another shape.

    Notes
    -----
    Distances are expanded, ‖q‖² + ‖z‖² − 2qᵀz, after subtraction of the mean landmark z̄, and clamped at zero:
    one product, whatever the values. The relative error of an entry of C is then of the order of
    eps·‖q − z̄‖²/ℓ². A is rounded from double precision, where the device has it (in traced programs it has an error of
    eps·‖z − z̄‖²/ℓ²). Should rounding exceed the ridge, A + δ I may cease to be positive definite, and ``pinv_newton``
    answers NaN for that batch element.

    In float32 the derivative in the landmarks is right to 1e-5 for torch, however near to singular A + δ I is; for
    JAX, and compiled for a GPU, to 1e-5 where landmarks nearly coincide, and to 1e-4 on lines and planes
    (docs/attention.md).

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import softmax_free_attention
    >>> q = np.linspace(-1.0, 1.0, 1000)[:, None]
    >>> x = softmax_free_attention(q, np.ones((1000, 2)), q[::100], lengthscale=0.5)
    >>> x.shape
    (1000, 2)
    """
    points = {"q": q, "v": v}
    points |= {} if is_integer(landmarks) else {"landmarks": landmarks}
    points |= {} if queries is None else {"queries": queries}
    xp = namespace(**points)
    if xp.isdtype(q.dtype, "complex floating"):
        raise TypeError(f"q has dtype {q.dtype} (shape {tuple(q.shape)}); attention needs a real floating dtype")
    _check_shapes(points)
    _check_mask("mask", mask, "q", q, xp)
    if is_integer(landmarks):
        _check_count(landmarks, q, mask, landmark_mask)
    else:
        _check_mask("landmark_mask", landmark_mask, "landmarks", landmarks, xp)
    ell = max(q.shape[-1], 1) ** 0.25 if lengthscale is None else _checked_lengthscale(lengthscale, q, xp)
    _check_options(ridge, normalize, method, inverse)
    ridge = float(ridge)

    result_dtype = q.dtype
    with arithmetic(q):
        x, v, solves = _only(q, mask, xp), _only(v, mask, xp), inverse is None and ridge > 0
        alone = solves and queries is None and not normalize
        z, c, of_segments = _landmarks(landmarks, x, v, landmark_mask, alone, xp)
        scale = 1.0
        if isinstance(ell, float):
            scale = 1 / ell
        else:
            given, wide = (x, z, c, queries), z.dtype
            x, z, c, queries = (None if y is None else xp.astype(y, wide, copy=False) / ell for y in given)
        if queries is not None:
            x, v = _with_queries(x, v, queries, xp)
        in_blocks = of_segments or _is_in_blocks(x, z, v)
        if solves and not in_blocks:
            out = _by_formula(x, z, v, landmark_mask, c, scale, ridge, normalize, method, xp)
        elif solves and landmark_mask is None and not normalize:
            core, system = _gram_core(stop_gradient(z), c, scale, ridge, method, xp)
            out = _attended(x, z, v, core, system, c, scale, xp, ridge=ridge, of_segments=of_segments)
        else:
            if in_blocks and not carries_derivative(z):  # the kernel's, where there is one
                a, wide_a = _gram(z, c, scale, 0.0, xp)
                a = wide_a if solves else a
            else:
                a = gaussian_gram(_wide_points(z, c, scale, xp) if solves else (z - c) * scale, xp)
            core, system = _core(a, landmark_mask, ridge, normalize, method, inverse, z.dtype, xp)
            out = _attended(x, z, v, core, system, c, scale, xp)
        out = out[..., q.shape[-2] :, :] if queries is not None else _only(out, mask, xp)
    return xp.astype(out, result_dtype, copy=False)


def _check_count(count: int, q: Array, mask: Array | None, landmark_mask: Array | None) -> None:
    if count < 1:
        raise ValueError(f"landmarks must be at least 1 where they are given by their number, not {shown(count)}")
    if mask is not None or landmark_mask is not None:
        name = "landmark_mask" if mask is None else "mask"
        raise ValueError(
            f"landmarks={shown(count)} are means over all tokens (q has shape {tuple(q.shape)}), which {name} makes a "
            "question; give landmarks as an array, or take lowrank.nn.SoftmaxFreeAttention, which pools under a mask"
        )


def _check_options(ridge: Any, normalize: Any, method: Any, inverse: Any) -> None:
    if not 0 <= number(ridge) < math.inf:
        raise ValueError(f"ridge must be a finite number >= 0, not {shown(ridge)}")
    check_flag("normalize", normalize)
    if inverse is not None and not callable(inverse):
        raise TypeError(f"inverse must be a function of (a, hermitian=, ridge=), or None, not {shown(inverse)}")
    if not isinstance(method, str) or method not in ("newton", "direct"):
        raise ValueError(f"method must be 'newton' or 'direct', not {shown(method)}")
    if method == "direct" and inverse is not None:
        raise ValueError("method='direct' has no meaning with inverse, which takes its place; leave one of them out")


def _only(x: Array, mask: Array | None, xp: Namespace) -> Array:
    """Rows of x where the mask is True, and zero rows, which carry no derivative, where it is not."""
    return x if mask is None else xp.where(mask[..., None], x, xp.zeros_like(x))


def _centre(z: Array, landmark_mask: Array | None, xp: Namespace) -> Array:
    """The mean landmark, shape (..., 1, d): a constant, as distances do not depend on it."""
    count: Any = max(1, z.shape[-2])
    if landmark_mask is not None:
        count = xp.clip(xp.sum(xp.astype(landmark_mask, z.dtype), axis=-1), min=1.0)[..., None, None]
    return stop_gradient(xp.sum(z, axis=-2, keepdims=True) / count)


def _landmarks(
    given: Array | int, x: Array, v: Array, mask: Array | None, alone: bool, xp: Namespace
) -> tuple[Array, Array, bool]:
    """z, in single precision or better, and the mean of them. And whether they are means of segments of the tokens x
    that are constants: if ``alone``, and blocks are formed, their derivative is taken with that of the tokens."""
    if is_integer(given) and given < x.shape[-2]:
        if alone and _is_in_blocks(x, x, v):
            return *_means_and_centre(stop_gradient(x), int(given), xp), True
        z = segment_means(x, int(given), xp)
    else:
        z = _only(x if is_integer(given) else given, mask, xp)
    # Tokens of half precision are left to those who take them part by part.
    z = xp.astype(z, xp.float32) if is_half(z) else z
    return z, _centre(z, mask, xp), False


def _means_and_centre(x: Array, count: int, xp: Namespace) -> tuple[Array, Array]:
    """Means of segments, and the mean of these."""
    if compat.is_torch_array(x):
        from lowrank import _native_attention

        if _native_attention.apply_to(x):
            return _native_attention.means(x, count)
    z = segment_means(x, count, xp)
    z = xp.astype(z, xp.float32) if is_half(z) else z
    return z, _centre(z, None, xp)


def _with_queries(q: Array, v: Array, queries: Array, xp: Namespace) -> tuple[Array, Array]:
    """Tokens and values with those of the queries behind them, which are 0: they answer nothing. All of X is computed
    of them, and yet a product with C of the queries alone, by softmax attention, takes longer."""
    batch = broadcast_shapes(*(tuple(x.shape[:-2]) for x in (q, v, queries)))
    none = xp.broadcast_to(xp.zeros_like(queries[..., :1]), (*queries.shape[:-1], v.shape[-1]))
    q, v, queries, none = (xp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (q, v, queries, none))
    return xp.concat([q, queries], axis=-2), xp.concat([v, none], axis=-2)


def _wide_points(z: Array, centre: Array, scale: float, xp: Namespace) -> Array:
    """(z − centre)s in double precision where the device has it: errors of P = k(z, z) + δI, and of how far landmarks
    are from each other, count cond(P) times."""
    wide = widest_real(z, xp)
    return (xp.astype(z, wide, copy=False) - xp.astype(centre, wide, copy=False)) * scale


def _by_formula(
    q: Array,
    z: Array,
    v: Array,
    landmark_mask: Array | None,
    centre: Array,
    scale: float,
    ridge: float,
    normalize: bool,
    method: str,
    xp: Namespace,
) -> Array:
    """X in operations of the library's own: of torch tensors on a CPU, if derivatives may be asked for, in double
    precision, and else in none above that of z."""
    differentiated = may_be_differentiated(q, z, v)
    if differentiated and compat.is_torch_array(z) and is_on_cpu(z):
        q, z, v, centre = (xp.astype(x, xp.float64, copy=False) for x in (q, z, v, centre))
    a, both = _masked_gram(gaussian_gram((z - centre) * scale, xp), landmark_mask, xp)
    core = _approximate_inverse(stop_gradient(a), ridge, method, xp)
    core = core if both is None else xp.where(both, core, xp.zeros_like(core))
    near = None
    if differentiated:
        near = nearby(z, centre, scale, xp, mask=landmark_mask)
    if near is not None and compat.is_jax_array(z):
        from lowrank._jax_attention import attend

        return attend(q, z, v, a, core, centre, landmark_mask, scale, ridge, normalize)
    return from_gram(q, z, v, a, core, near, centre, scale, ridge, xp, normalize=normalize)


def _masked_gram(a: Array, mask: Array | None, xp: Namespace) -> tuple[Array, Array | None]:
    """A, and with a mask of landmarks which entries count. The others are those of I: the inverse of a block diagonal
    matrix is block diagonal, and what is masked does not touch what is not."""
    if mask is None:
        return a, None
    both = mask[..., :, None] & mask[..., None, :]
    return xp.where(both, a, identity(a, xp)), both


def _gram_core(
    z: Array, centre: Array, scale: float, ridge: float, method: str, xp: Namespace
) -> tuple[Array | Factor, Array]:
    """M and P = k(z, z) + δI, as ``_core`` has them, in few operations: for blocks, whose way back knows P's."""
    a, system = _gram(z, centre, scale, ridge, xp)
    if _is_factored(a, method):
        return Factor(cholesky(xp.astype(system, a.dtype, copy=False), xp)), system
    return _approximate_inverse(a, ridge, method, xp), system


def _gram(z: Array, centre: Array, scale: float, ridge: float, xp: Namespace) -> tuple[Array, Array]:
    """k(z, z), and in double precision, where the device has it, k(z, z) + δI."""
    if compat.is_torch_array(z):
        from lowrank import _native_core

        if _native_core.applies(z):
            return _native_core.gram(z, centre, scale, ridge)
    a = _attend.gram(_wide_points(z, centre, scale, xp), xp)
    return xp.astype(a, z.dtype), add_to_diagonal(a, ridge, xp)  # the first a copy


def _core(
    a: Array,
    mask: Array | None,
    ridge: float,
    normalize: bool,
    method: str,
    inverse: Callable[..., Array] | None,
    dtype: Any,
    xp: Namespace,
) -> tuple[Array | Factor, Array | None]:
    """M, of that dtype, and what it inverts, P = A + δI or D^½ P D^½ for A = k(z, z); 0 in rows and columns of masked
    landmarks.

    P is None where M is no inverse of it, to be differentiated as such, but what it is: by a function of the caller's
    own, or the pseudoinverse of a matrix that may be singular. In the place of M there may be the factor of P.
    """
    a, both = _masked_gram(a, mask, xp)
    solves = inverse is None and ridge > 0
    system = a + ridge * identity(a, xp) if solves else None
    roots = _roots(a, xp) if normalize else None
    if solves and roots is not None:
        system = system * roots
    if solves and both is None and _is_factored(a, method):
        return Factor(cholesky(xp.astype(stop_gradient(system), dtype, copy=False), xp)), system
    if solves:
        core = _approximate_inverse(xp.astype(stop_gradient(a), dtype, copy=False), ridge, method, xp)
    else:
        core = _inverse(method, inverse)(a, hermitian=True, ridge=ridge)
        _check_inverse(core, a)
    if roots is not None:
        core = core / xp.astype(stop_gradient(roots) if solves else roots, dtype, copy=False)
    if both is not None:
        core = xp.where(both, core, xp.zeros_like(core))
    return core, system


def _roots(a: Array, xp: Namespace) -> Array:
    """d dᵀ with d the square roots of the row sums of A, which are at least 1, as k(z, z) = 1."""
    root = xp.sqrt(xp.sum(a, axis=-1, keepdims=True))
    return root * xp.matrix_transpose(root)


def _is_factored(a: Array, method: str) -> bool:
    """Whether P is solved with by its Cholesky factor, of 49 landmarks on a CPU in less time than by products that are
    not compiled. Masks, traced programs and ``torch.func`` want an inverse."""
    return method == "direct" and compat.is_torch_array(a) and not (is_traced(a) or is_transformed(a))


def _inverse(method: str, inverse: Callable[..., Array] | None) -> Callable[..., Array]:
    """Looked up at the call, so that whoever replaces the iteration in its own room is heard here."""
    usual = partial(_pinv.pinv_newton, method=method) if method == "direct" else _pinv.pinv_newton
    return usual if inverse is None else inverse


def _approximate_inverse(a: Array, ridge: float, method: str, xp: Namespace) -> Array:
    """What the corrections in ``_attend`` make of it is right to rounding."""
    if method == "direct":
        return _inverse(method, None)(a, hermitian=True, ridge=ridge)
    # Their error is a power of its error, and no row sum of A exceeds m.
    fix_sizes(a)
    most, tol = float(max(1, a.shape[-1])), float(xp.finfo(a.dtype).eps) ** (1 / (1 + CORRECTIONS))
    return _inverse(method, None)(a, hermitian=True, ridge=ridge, upper=most, tol=tol)


def _check_inverse(core: Any, a: Array) -> None:
    namespace(**{"what inverse got": a, "what inverse returned": core})
    if tuple(core.shape) != tuple(a.shape):
        raise ValueError(f"inverse returned the shape {tuple(core.shape)} for matrices of shape {tuple(a.shape)}")


def _attended(
    q: Array,
    z: Array,
    v: Array,
    core: Array | Factor,
    system: Array | None,
    centre: Array,
    scale: float,
    xp: Namespace,
    *,
    ridge: float | None = None,
    of_segments: bool = False,
) -> Array:
    """X for q (..., n, d), z (..., m, d), v (..., n, e), M and P (..., m, m), or M alone, and centre (..., 1, d).

    q and v may be of half precision: X is computed in the dtype of the others and returned in that of v.
    Where P is given M is a constant, and derivatives are those of P⁻¹. Where ``ridge`` is given as well, which is for
    blocks alone, P is k(z, z) + ridge·I without a history of derivatives, and its derivative is in that of z; and so is
    that of z, means of segments of q, in the one of q if ``of_segments``.
    """
    matrix = core.lower if isinstance(core, Factor) else core
    arrays = [x for x in (q, z, v, matrix, centre, system) if x is not None]
    if ridge is None and not _is_in_blocks(q, z, v, *arrays[3:]):
        return plain(q, z, v, core, system, centre, scale, xp)
    batch = broadcast_shapes(*(tuple(x.shape[:-2]) for x in arrays))
    both = (math.prod(batch[:-1]), batch[-1] if batch else 1)

    def four_axes(x: Any) -> Any:
        if isinstance(x, Factor):
            return Factor(four_axes(x.lower))
        if x is None or tuple(x.shape[:-2]) == both:
            return x
        return xp.reshape(xp.broadcast_to(x, (*batch, *x.shape[-2:])), (*both, *x.shape[-2:]))

    q, z, v, core, system, centre = map(four_axes, (q, z, v, core, system, centre))
    if compat.is_torch_array(q):
        from lowrank._torch_attention import attend

        recorded = any(map(carries_derivative, arrays))
        out = attend(q, z, v, core, system, centre, scale, ridge=ridge, recorded=recorded, of_segments=of_segments)
    else:
        out, _, _ = _attend.forward(q, z, v, core, system, centre, scale, xp, most=0)
    return out if len(batch) == 2 else xp.reshape(out, (*batch, *out.shape[-2:]))


def _is_in_blocks(q: Array, z: Array, v: Array, *others: Array) -> bool:
    """Whether C is formed by blocks: programs that are traced, and derivatives other than the first, backward, want one
    expression."""
    arrays = q, z, v, *others
    sizes = *q.shape[:-1], *z.shape[:-1], *v.shape
    return writes(q) and not is_traced(*arrays) and not is_transformed(*arrays) and min(sizes) > 0


def _check_shapes(points: dict[str, Array]) -> None:
    shapes = {name: tuple(x.shape) for name, x in points.items()}
    for name, shape in shapes.items():
        if len(shape) < 2:
            raise ValueError(f"{name} must have at least two axes, tokens and features, not the shape {shape}")
    for name in ("landmarks", "queries"):
        if name in shapes and shapes["q"][-1] != shapes[name][-1]:
            raise ValueError(
                f"q has shape {shapes['q']} and {name} {shapes[name]}; their last axes, the features, must be equal"
            )
    if shapes["q"][-2] != shapes["v"][-2]:
        raise ValueError(
            f"q has shape {shapes['q']} and v {shapes['v']}; their second axes from the end, the tokens, must be equal"
        )
    try:
        broadcast_shapes(*(shape[:-2] for shape in shapes.values()))
    except ValueError:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"the leading axes must broadcast; the shapes are {listed}") from None


def _check_mask(name: str, mask: Array | None, of: str, x: Array, xp: Namespace) -> None:
    if mask is None:
        return
    known = compat.is_array_api_obj(mask) and not isinstance(mask, type)
    if not known or compat.array_namespace(mask) is not xp or mask.dtype != xp.bool:
        kind = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"{name} must be a bool array of the library of {of}, True for what takes part, not {kind}")
    shape, wanted = tuple(mask.shape), tuple(x.shape[:-1])
    fits = len(shape) == len(wanted) and all(k in (1, n) for k, n in zip(shape[:-1], wanted[:-1], strict=True))
    if not fits or shape[-1] != wanted[-1]:
        raise ValueError(
            f"{name} has shape {shape} and {of} {tuple(x.shape)}; the mask needs the shape {wanted}, or 1 in place of "
            "its leading axes. A mask of pairs of tokens is impossible here: every token meets every landmark"
        )
    if not is_traced(mask, x) and compat.device(mask) != compat.device(x):
        raise ValueError(f"{name} is on device {compat.device(mask)} and {of} on {compat.device(x)}; move one of them")
