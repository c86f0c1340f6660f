"""Softmax-free attention: the product of a Gaussian Gram matrix with values, in time linear in the tokens.

Queries and keys are the same tokens, so the attention matrix k(q, q) is a Gram matrix and a few landmarks z
give its Nyström approximation C A⁺ Cᵀ, C = k(q, z), A = k(z, z) (Lu et al., "SOFT: Softmax-free Transformer
with Linear Complexity", NeurIPS 2021, eq. 8; the symmetric normalisation is from "Softmax-free Linear
Transformers", IJCV 2024). Only products of tall and small matrices occur, on any array library.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import numpy as np

from lowrank import pinv as _pinv
from lowrank._array import Array, Namespace, arithmetic, is_half, namespace
from lowrank.kernels import _checked_lengthscale, _expanded_squared_distances


def softmax_free_attention(
    q: Array,
    v: Array,
    landmarks: Array,
    /,
    *,
    lengthscale: float | Array | None = None,
    ridge: float = 0.01,
    normalize: bool = False,
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
    landmarks : array, shape (..., m, d)
        z. Leading axes of the three arrays are batch axes and broadcast.
    lengthscale : float or array of shape (d,), optional
        ℓ, in the units of ``q``; must be positive. The default is d^¼, so that k = exp(−‖q − z‖²/(2√d)), the
        counterpart of softmax attention's scale.
    ridge : float
        δ ≥ 0: the core inverted is A + δ I, whose condition number is at most 1 + m/δ. The default is the
        value that the published models were trained with.
    normalize : bool
        Replace A⁺ by D^{-½} A⁺ D^{-½}, D the diagonal of the row sums of A (without the ridge).
    inverse : callable, optional
        Called as ``inverse(a, hermitian=True, ridge=ridge)`` with a of shape (..., m, m); returns (a + δ I)⁺.
        The default is :func:`lowrank.pinv_newton`; ``functools.partial(pinv_newton, steps=20)`` is the
        unconverged iteration of the paper.

    Returns
    -------
    array, shape (..., n, e)
        Of the dtype, on the device and of the library of ``q``.

    Raises
    ------
    TypeError
        If the arguments are not arrays of one library and one real floating dtype.
    ValueError
        If their shapes do not fit, they are on different devices, ``lengthscale`` is not positive or
        ``ridge`` is negative.

    Notes
    -----
    Distances are expanded, ‖q‖² + ‖z‖² − 2qᵀz, after subtraction of the mean landmark z̄, and clamped at zero:
    one product, whatever the values. The relative error of an entry of C is then of the order of
    eps·‖q − z̄‖²/ℓ², and an entry of A has eps·‖z − z̄‖²/ℓ². Should the latter exceed the ridge, A + δ I may
    cease to be positive definite, and ``pinv_newton`` answers NaN for that batch element.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import softmax_free_attention
    >>> q = np.linspace(-1.0, 1.0, 1000)[:, None]
    >>> x = softmax_free_attention(q, np.ones((1000, 2)), q[::100], lengthscale=0.5)
    >>> x.shape
    (1000, 2)
    """
    xp = namespace(q=q, v=v, landmarks=landmarks)
    if xp.isdtype(q.dtype, "complex floating"):
        raise TypeError(f"q has dtype {q.dtype} (shape {tuple(q.shape)}); attention needs a real floating dtype")
    _check_shapes(q, v, landmarks)
    ell = max(q.shape[-1], 1) ** 0.25 if lengthscale is None else _checked_lengthscale(lengthscale, q, xp)
    if not (isinstance(ridge, numbers.Real) and math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge must be a finite number >= 0, not {ridge!r}")
    # Looked up at the call, so that whoever replaces the iteration in its own room is heard here.
    invert = _pinv.pinv_newton if inverse is None else inverse

    result_dtype = q.dtype
    if is_half(q):
        q, v, landmarks = (xp.astype(x, xp.float32) for x in (q, v, landmarks))
    with arithmetic(q):
        c = _gaussian_block(q, landmarks, ell, xp)  # (..., n, m)
        a = _gaussian_block(landmarks, landmarks, ell, xp)  # (..., m, m)
        core = invert(a, hermitian=True, ridge=ridge)
        weights = xp.matrix_transpose(c) @ v  # (..., m, e)
        if normalize:
            scale = 1 / xp.sqrt(xp.sum(a, axis=-1, keepdims=True))  # D^{-½}; D ≥ 1, as k(z, z) = 1
            weights = scale * (core @ (scale * weights))
        else:
            weights = core @ weights
        out = c @ weights
    return xp.astype(out, result_dtype, copy=False)


def _gaussian_block(x: Array, z: Array, ell: float | Array, xp: Namespace) -> Array:
    """k(x, z) by the expansion centred on the mean of z, always: no value decides how it is computed."""
    return xp.exp(-0.5 * _expanded_squared_distances(x / ell, z / ell, xp))


def _check_shapes(q: Array, v: Array, landmarks: Array) -> None:
    shapes = {"q": tuple(q.shape), "v": tuple(v.shape), "landmarks": tuple(landmarks.shape)}
    for name, shape in shapes.items():
        if len(shape) < 2:
            raise ValueError(f"{name} must have at least two axes, tokens and features, not the shape {shape}")
    if shapes["q"][-1] != shapes["landmarks"][-1]:
        raise ValueError(
            f"q has shape {shapes['q']} and landmarks {shapes['landmarks']}; "
            "their last axes, the features, must be equal"
        )
    if shapes["q"][-2] != shapes["v"][-2]:
        raise ValueError(
            f"q has shape {shapes['q']} and v {shapes['v']}; their second axes from the end, the tokens, must be equal"
        )
    try:
        np.broadcast_shapes(*(shape[:-2] for shape in shapes.values()))
    except ValueError:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"the leading axes must broadcast; the shapes are {listed}") from None
