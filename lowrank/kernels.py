"""Kernel blocks k(x, y) between two sets of points, and their product with a matrix in bounded memory.

Every kernel here is a function of the squared distance ‖(x − y)/ℓ‖², so what this room is about is that
distance: accurate in single precision wherever the points lie, and differentiable without keeping more than
the points themselves. The choice between the two ways of computing it, and the error of each, is derived at
``_SPREAD``. The kernels are those of Rasmussen & Williams, "Gaussian Processes for Machine Learning", 2006, §4.2.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import numpy as np

from lowrank._array import (
    Array,
    Namespace,
    arithmetic,
    broadcast_shapes,
    device,
    from_host,
    generator,
    has_derivative,
    is_followed,
    is_half,
    is_traced,
    namespace,
    number,
    shown,
    stop_gradient,
    to_host,
    writes,
)

# Squared distances in units of the lengthscale: u = (x − c)/ℓ, v = (y − c)/ℓ with c the mean of y, in arithmetic of
# unit roundoff ε/2. There are two ways, with these errors to first order:
#
#   sums       Σᵢ ((xᵢ − yᵢ)/ℓᵢ)². The difference of two floating-point numbers is correctly rounded wherever they
#              lie. With 1/ℓ and the product each term carries 7 roundings, and the sum d − 1 more:
#              |error| ≤ (d + 6)(ε/2)·‖u − v‖², a relative bound, whatever the offset and the spread of the points.
#   expansion  ‖u‖² + ‖v‖² − 2uᵀv, clamped at zero. A coordinate carries 3 roundings, each of the three sums d, the
#              combination 2: |error| ≤ (d + 8)(ε/2)·(‖u‖ + ‖v‖)² ≤ (d + 8)·ε·(‖u‖² + ‖v‖²), an absolute bound.
#
# As max_t (t/2)e^{−t/2} = 1/e, sums give a Gaussian to (d + 6)ε/(2e), and the expansion gives it to (d + 8)ε·S/2
# where S = max‖u‖² + max‖v‖². (Dividing by ℓ before the difference would put ε‖x‖/ℓ into the coordinates of the sums.)
#
# How much is needed is decided by the Nyström factor: entries of C = k(x, z) off by δ make λ_min(K − FFᵀ) as low as
# −δ²n/ε (see factor.py). Letting the expansion have errors up to 10⁻³√ε, as one might for a kernel alone, would give
# −10⁻⁶·n in any precision, and was measured to break the Cholesky factorisation of k(z, z) in float64. δ has to be a
# few ε, so the bound on S is a number, the same in every precision: the expansion is used where S ≤ 8. Measured
# there: entries off by 3 to 18 ε for d = 1 to 784, against 1 to 6 ε of the sums; λ_min the same with both.
# The two are then equally good for a factor, which may use one for k(x, z) and the other for k(z, z).
_SPREAD = 8.0

# Direct sums pass over the block once per feature. On a CPU they go by chunks of rows of so many entries, which stay
# in the cache from one feature to the next: measured 2 times faster than whole blocks on NumPy and 1.5 times on
# torch, flat between 2¹⁶ and 2¹⁹ entries.
_CACHE_ENTRIES = 2**18

# Entries of a block of gaussian_matmul. On a CPU (NumPy and torch, both precisions, sums and expansion) the time is the
# least with 2¹⁸ and within a fifth of that up to 2²⁰; 2²⁴ takes up to 2 times as long, and so does the dense product.
# The largest of the good ones, for a GPU's sake.
_BLOCK_ENTRIES = 2**20

# Pairs of points whose distances median_lengthscale looks at. The share of all pairs that lies below the median of a
# sample of p is ½ ± ½/√p: to a fifth of a percent.
_PAIRS = 2**16


def squared_distances(x: Array, y: Array, /) -> Array:
    """Squared Euclidean distances ‖x_i − y_j‖² between all pairs of two sets of points.

    Parameters
    ----------
    x : array, shape (..., n, d)
        Real floating; float16 and bfloat16 are computed in float32.
    y : array, shape (..., m, d)
        Leading axes of ``x`` and ``y`` are batch axes and broadcast.

    Returns
    -------
    array, shape (..., n, m)
        In the square of the units of ``x``; of its dtype, on its device, never negative.

    Raises
    ------
    TypeError
        If ``x`` and ``y`` are not arrays of one library and one real floating dtype.
    ValueError
        If they have fewer than two axes, different features, leading axes that do not broadcast, or different devices.

    Notes
    -----
    Sums of squared differences, feature by feature, whose relative error is at most (d + 6) eps/2; where
    max‖x − ȳ‖² + max‖y − ȳ‖² is at most 8 (in a batch element, with ȳ the mean of y) the product expansion,
    whose absolute error is at most (d + 8) eps times that number. ``squared_distances(x, x)`` from sums is exactly
    symmetric and its diagonal exactly zero. Inside a traced program, where values are not known, always sums.

    Derivatives (torch, JAX) are matrix products of the cotangent with the points, centred on ȳ; they keep the points
    and no block, and are accurate to eps times the distance of the points from ȳ.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.kernels import squared_distances
    >>> squared_distances(np.asarray([[0.0, 0.0], [3.0, 4.0]]), np.asarray([[0.0, 0.0]]))
    array([[ 0.],
           [25.]])
    """
    return _radial(lambda d2, xp: d2, x, y, 1.0)


def gaussian_kernel(x: Array, y: Array, /, *, lengthscale: float | Array = 1.0) -> Array:
    """Gaussian (RBF) kernel block, k(x, y) = exp(−‖(x − y)/ℓ‖²/2).

    Parameters
    ----------
    x : array, shape (..., n, d)
        Real floating; float16 and bfloat16 are computed in float32.
    y : array, shape (..., m, d)
        Leading axes of ``x`` and ``y`` are batch axes and broadcast.
    lengthscale : float or array of shape () or (d,)
        ℓ, in the units of ``x``, one for all features or one for each; must be positive. An array is of the
        library of ``x`` and of any real floating dtype.

    Returns
    -------
    array, shape (..., n, m)
        Of the dtype and on the device of ``x``; values in [0, 1].

    Raises
    ------
    TypeError
        If ``x`` and ``y`` are not arrays of one library and one real floating dtype, or ``lengthscale`` is neither a
        number nor a real floating array of that library.
    ValueError
        If the shapes do not fit, a lengthscale is not positive and finite (checked where its value is known, not in
        a traced program), or the devices differ.

    Notes
    -----
    Distances are those of :func:`lowrank.kernels.squared_distances`, in units of ℓ: an entry is off by at most
    4 (d + 8) eps, wherever the points lie.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.kernels import gaussian_kernel
    >>> x = np.asarray([[0.0], [2.0]])
    >>> gaussian_kernel(x, x, lengthscale=2.0).round(4)
    array([[1.    , 0.6065],
           [0.6065, 1.    ]])
    """
    return _radial(_gaussian, x, y, lengthscale)


def laplacian_kernel(x: Array, y: Array, /, *, lengthscale: float | Array = 1.0) -> Array:
    """Laplacian (exponential, Matérn 1/2) kernel block, k(x, y) = exp(−‖(x − y)/ℓ‖₂).

    The norm is Euclidean; scikit-learn's ``laplacian_kernel`` takes the 1-norm. The kernel has a kink at x = y, where
    its derivative is taken to be zero.

    Parameters
    ----------
    x : array, shape (..., n, d)
    y : array, shape (..., m, d)
    lengthscale : float or array of shape () or (d,)
        ℓ, in the units of ``x``; all three as for :func:`gaussian_kernel`.

    Returns
    -------
    array, shape (..., n, m)
        Of the dtype and on the device of ``x``; values in [0, 1].

    Raises
    ------
    TypeError, ValueError
        As :func:`gaussian_kernel`.
    """
    # Always sums: near the kink the root makes an absolute error ε of the square √ε, and a relative one ε/2.
    return _radial(_laplacian, x, y, lengthscale, choose=_always_sums)


def matern32_kernel(x: Array, y: Array, /, *, lengthscale: float | Array = 1.0) -> Array:
    """Matérn 3/2 kernel block, k(x, y) = (1 + a) e^{−a} with a = √3 ‖(x − y)/ℓ‖.

    Parameters
    ----------
    x : array, shape (..., n, d)
    y : array, shape (..., m, d)
    lengthscale : float or array of shape () or (d,)
        ℓ, in the units of ``x``; all three as for :func:`gaussian_kernel`.

    Returns
    -------
    array, shape (..., n, m)
        Of the dtype and on the device of ``x``; values in [0, 1].

    Raises
    ------
    TypeError, ValueError
        As :func:`gaussian_kernel`.
    """
    return _radial(_matern32, x, y, lengthscale)


def matern52_kernel(x: Array, y: Array, /, *, lengthscale: float | Array = 1.0) -> Array:
    """Matérn 5/2 kernel block, k(x, y) = (1 + a + a²/3) e^{−a} with a = √5 ‖(x − y)/ℓ‖.

    Parameters
    ----------
    x : array, shape (..., n, d)
    y : array, shape (..., m, d)
    lengthscale : float or array of shape () or (d,)
        ℓ, in the units of ``x``; all three as for :func:`gaussian_kernel`.

    Returns
    -------
    array, shape (..., n, m)
        Of the dtype and on the device of ``x``; values in [0, 1].

    Raises
    ------
    TypeError, ValueError
        As :func:`gaussian_kernel`.
    """
    return _radial(_matern52, x, y, lengthscale)


def gaussian_matmul(x: Array, y: Array, v: Array, /, *, lengthscale: float | Array = 1.0) -> Array:
    """The product k(x, y) v with the Gaussian kernel, by blocks: the n × m matrix is never formed.

    Parameters
    ----------
    x : array, shape (..., n, d)
        Real floating; float16 and bfloat16 are computed in float32.
    y : array, shape (..., m, d)
    v : array, shape (..., m, e)
        One row for each point of ``y``. Leading axes of the three arrays are batch axes and broadcast.
    lengthscale : float or array of shape () or (d,)
        ℓ, in the units of ``x``; see :func:`gaussian_kernel`.

    Returns
    -------
    array, shape (..., n, e)
        ``gaussian_kernel(x, y, lengthscale=lengthscale) @ v``, of the dtype and on the device of ``x``.

    Raises
    ------
    TypeError
        If ``x``, ``y`` and ``v`` are not arrays of one library and one real floating dtype, or ``lengthscale`` is
        neither a number nor a real floating array of that library.
    ValueError
        If the shapes do not fit, a lengthscale is not positive and finite, or the devices differ.

    Notes
    -----
    Distances are computed by one rule for all blocks of a batch element, as in :func:`squared_distances`. A block has
    at most 2²⁰ entries (or one per batch element), and a few blocks live at a time. Under automatic differentiation
    the library keeps every block for the way back, and the memory is that of the dense product.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.kernels import gaussian_matmul
    >>> x = np.linspace(0.0, 1.0, 5)[:, None]
    >>> gaussian_matmul(x, x, np.ones((5, 1)), lengthscale=1e3).round(4)[:, 0]
    array([5., 5., 5., 5., 5.])
    """
    xp = _checked_points(x, y, v=v)
    ell = _checked_lengthscale(lengthscale, x, xp)
    x_, y_, v_ = _widened(xp, x, y, v)
    with arithmetic(x_):
        s = _reciprocal(ell, x_, xp)
        c = _centre(y_, xp)
        way = _by_spread(x_, y_, s, c, xp)
        if way is _either:
            products = (_blockwise(always, x_, y_, v_, s, c, xp) for always in (_always_sums, _always_expansion))
            product = xp.where(_is_spread(x_, y_, s, c, xp), *products)
        else:
            product = _blockwise(lambda *_: way, x_, y_, v_, s, c, xp)
    return xp.astype(product, x.dtype, copy=False)


def median_lengthscale(x: Array, /, *, rng: int | np.random.Generator | None = None) -> float:
    """The median distance between two of the points, the usual starting value of a lengthscale.

    Parameters
    ----------
    x : array, shape (n, d)
        At least two points, real floating.
    rng : None, int or numpy.random.Generator
        Which pairs are looked at, where there are more than 2¹⁶ of them, that is for n > 362.

    Returns
    -------
    float
        In the units of ``x``. Exact for n ≤ 362; otherwise the median over 2¹⁶ pairs drawn independently.

    Raises
    ------
    TypeError
        If ``x`` is not an array of a real floating dtype, belongs to a traced program, or ``rng`` is none of the above.
    ValueError
        If ``x`` does not have two axes and two rows, ``rng`` is negative, or the median is not finite, as with NaN in
        ``x``, or zero, as it is where most points coincide.

    Notes
    -----
    A rule of thumb, known as the median heuristic: at this distance a Gaussian is e^{−1/2}. It is examined by Garreau,
    Jitkrittum & Kanagawa, "Large sample analysis of the median heuristic", arXiv 1707.07269, 2017. In memory of
    2¹⁸ coordinates and 2¹⁶ distances, whatever n. No derivative.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.kernels import median_lengthscale
    >>> median_lengthscale(np.asarray([[0.0], [3.0], [4.0]]))
    3.0
    """
    xp = namespace(x=x)
    if xp.isdtype(x.dtype, "complex floating"):
        raise TypeError(f"x has dtype {x.dtype} (shape {tuple(x.shape)}); distances need a real floating dtype")
    if is_traced(x):
        raise TypeError("x belongs to a traced program, in which no number can be read off; find the median outside")
    if x.ndim != 2 or x.shape[0] < 2:
        raise ValueError(f"x must hold at least two points, (n, d), not the shape {tuple(x.shape)}")
    first, second = _pairs(x.shape[0], generator(rng))
    x = stop_gradient(x)
    index_dtype = xp.__array_namespace_info__().default_dtypes()["indexing"]
    distances = []
    for part in _slices(first.size, max(1, _CACHE_ENTRIES // max(1, x.shape[1]))):
        a, b = (xp.take(x, from_host(i[part], x, xp, dtype=index_dtype), axis=0) for i in (first, second))
        with arithmetic(x):
            (gap,) = _widened(xp, a - b)
            # By the largest coordinate, so that squares neither overflow nor vanish.
            size = xp.max(xp.abs(gap), axis=-1) if x.shape[1] else xp.zeros(gap.shape[0], dtype=gap.dtype)
            unit = gap / xp.where(size > 0, size, xp.ones_like(size))[:, None]
            distances.append(to_host(size * xp.sqrt(xp.sum(unit * unit, axis=-1))))
    median = float(np.median(np.concatenate(distances)))
    if not (math.isfinite(median) and median > 0):
        why = "most points coincide" if median == 0 else "it holds NaN, infinite or huge values"
        raise ValueError(
            f"the median distance in x (shape {tuple(x.shape)}) is {median}, for {why}; name a lengthscale"
        )
    return median


def _pairs(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """All pairs i < j, or some of all pairs i ≠ j, every one as likely as any other."""
    if n * (n - 1) // 2 <= _PAIRS:
        first, second = np.triu_indices(n, 1)
        return first, second
    first, other = rng.integers(n, size=_PAIRS), rng.integers(n - 1, size=_PAIRS)
    return first, other + (other >= first)


def _blockwise(
    choose: Callable[..., Callable[..., Array]], x: Array, y: Array, v: Array, s: Array, c: Array, xp: Namespace
) -> Array:
    """Σ over blocks of y of k(x, y) v, for one block of x after the other."""
    n, m = x.shape[-2], y.shape[-2]
    batch = broadcast_shapes(tuple(x.shape[:-2]), tuple(y.shape[:-2]))
    entries = max(1, _BLOCK_ENTRIES // max(1, math.prod(batch)))
    if n == 0 or m == 0:
        batch = broadcast_shapes(batch, tuple(v.shape[:-2]))
        return xp.zeros((*batch, n, v.shape[-1]), dtype=x.dtype, device=device(x))
    rows = min(n, max(math.isqrt(entries), entries // m))
    columns = entries // rows
    strips = []
    for i in _slices(n, rows):
        strip = None
        for j in _slices(m, columns):
            d2 = _differentiable(choose, x[..., i, :], y[..., j, :], s, c, xp)
            part = _gaussian(d2, xp) @ v[..., j, :]
            strip = part if strip is None else strip + part
        strips.append(strip)
    return strips[0] if len(strips) == 1 else xp.concat(strips, axis=-2)


def _slices(n: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def _radial(
    profile: Callable[[Array, Namespace], Array],
    x: Array,
    y: Array,
    lengthscale: float | Array,
    choose: Callable[..., Callable[..., Array]] | None = None,
) -> Array:
    """profile(‖(x − y)/ℓ‖²) for checked arguments, in at least single precision, as an array of the dtype of x."""
    xp = _checked_points(x, y)
    ell = _checked_lengthscale(lengthscale, x, xp)
    x_, y_ = _widened(xp, x, y)
    with arithmetic(x_):
        d2 = _differentiable(choose or _by_spread, x_, y_, _reciprocal(ell, x_, xp), _centre(y_, xp), xp)
        return xp.astype(profile(d2, xp), x.dtype, copy=False)


def _gaussian(d2: Array, xp: Namespace) -> Array:
    return xp.exp(-0.5 * d2)


def _laplacian(d2: Array, xp: Namespace) -> Array:
    return xp.exp(-_root(d2, xp))


def _matern32(d2: Array, xp: Namespace) -> Array:
    a = _root(3 * d2, xp)
    return (1 + a) * xp.exp(-a) - 1.5 * _at_zero(d2, xp)


def _matern52(d2: Array, xp: Namespace) -> Array:
    a = _root(5 * d2, xp)
    return (1 + a + a * a / 3) * xp.exp(-a) - (5 / 6) * _at_zero(d2, xp)


def _root(d2: Array, xp: Namespace) -> Array:
    """√d2 with derivative 0 at 0, and at most 10³: there e^{−a} has long been zero, but at infinity a·e^{−a} is NaN."""
    zero = d2 == 0
    # Two selections: the root of 0 must not be taken even where it is not used, for its derivative is infinite.
    safe = xp.clip(xp.where(zero, xp.ones_like(d2), d2), max=1e6)
    return xp.where(zero, xp.zeros_like(d2), xp.sqrt(safe))


def _at_zero(d2: Array, xp: Namespace) -> Array:
    """d2 where it is 0, and 0 elsewhere: no value, but the slope that ``_root`` drops and second derivatives need."""
    return xp.where(d2 == 0, d2, xp.zeros_like(d2))


def _differentiable(
    choose: Callable[..., Callable[..., Array]], x: Array, y: Array, s: Array, c: Array, xp: Namespace
) -> Array:
    """Σᵢ sᵢ²(xᵢ − yᵢ)² in the way that choose(x, y, s, c, xp) names, with its derivative where the library has one."""
    # JAX's rule compiles as well, and serves where nothing is followed.
    if not has_derivative(x) or (writes(x) and not is_followed(x, y, s)):
        return choose(x, y, s, c, xp)(x, y, s, c, xp)
    from lowrank import _gradients

    return _gradients.squared_distances(choose, x, y, s, c, xp)


def _expanded_squared_distances(x: Array, y: Array, xp: Namespace) -> Array:
    """The expansion alone, whatever the values: for y of at least one point, in its own dtype."""
    return _differentiable(_always_expansion, x, y, _reciprocal(1.0, x, xp), _centre(y, xp), xp)


def _by_spread(x: Array, y: Array, s: Array, c: Array, xp: Namespace) -> Callable[..., Array]:
    """The way that the points call for: sums, expansion, or for each batch element its own."""
    if is_traced(x, y, s) or x.shape[-2] == 0 or y.shape[-2] == 0:
        return _sums
    spread = _is_spread(x, y, s, c, xp)
    if bool(xp.all(spread)):
        return _sums
    return _either if bool(xp.any(spread)) else _expansion


def _always_sums(*_: Array) -> Callable[..., Array]:
    return _sums


def _always_expansion(*_: Array) -> Callable[..., Array]:
    return _expansion


def _is_spread(x: Array, y: Array, s: Array, c: Array, xp: Namespace) -> Array:
    """Which batch elements spread too far for the expansion, shape (..., 1, 1)."""
    u, v = (x - c) * s, (y - c) * s
    reach = sum(xp.max(xp.sum(w * w, axis=-1, keepdims=True), axis=-2, keepdims=True) for w in (u, v))
    return xp.logical_not(reach <= _SPREAD)  # so that NaN and Inf count as far apart


def _either(x: Array, y: Array, s: Array, c: Array, xp: Namespace) -> Array:
    return xp.where(_is_spread(x, y, s, c, xp), _sums(x, y, s, c, xp), _expansion(x, y, s, c, xp))


def _sums(x: Array, y: Array, s: Array, c: Array, xp: Namespace) -> Array:
    n, m, d = x.shape[-2], y.shape[-2], x.shape[-1]
    batch = broadcast_shapes(tuple(x.shape[:-2]), tuple(y.shape[:-2]))
    if d == 0:
        return xp.zeros((*batch, n, m), dtype=x.dtype, device=device(x))
    # Features of y one after the other, each contiguous: it is read once for every row of x.
    features = xp.reshape(xp.matrix_transpose(y), (*y.shape[:-2], 1, d * m))
    scales = [s[..., i : i + 1] for i in range(s.shape[-1])] * (d // s.shape[-1])

    def block(x: Array) -> Array:
        total = None
        for i in range(d):
            difference = (x[..., i : i + 1] - features[..., i * m : (i + 1) * m]) * scales[i]
            square = difference * difference
            total = square if total is None else total + square
        return total

    # "cpu" is the device of NumPy and of torch; JAX compiles the loop, and a GPU wants few and large operations.
    rows = max(1, _CACHE_ENTRIES // max(1, m * math.prod(batch)))
    if n <= rows or is_traced(x) or str(device(x)) != "cpu":
        return block(x)
    return xp.concat([block(x[..., i, :]) for i in _slices(n, rows)], axis=-2)


def _expansion(x: Array, y: Array, s: Array, c: Array, xp: Namespace) -> Array:
    u = (x - c) * s
    v = u if y is x else (y - c) * s
    u2 = xp.sum(u * u, axis=-1)
    v2 = u2 if y is x else xp.sum(v * v, axis=-1)
    return xp.clip(u2[..., :, None] + v2[..., None, :] - 2 * (u @ xp.matrix_transpose(v)), min=0.0)


def _centre(y: Array, xp: Namespace) -> Array:
    """The mean point, shape (..., 1, d), and the origin for no points. Distances do not depend on it: a constant."""
    return stop_gradient(xp.sum(y, axis=-2, keepdims=True) / max(1, y.shape[-2]))


def _widened(xp: Namespace, *arrays: Array) -> list[Array]:
    return [xp.astype(x, xp.float32) if is_half(x) else x for x in arrays]


def _reciprocal(ell: float | Array, x: Array, xp: Namespace) -> Array:
    """1/ℓ as an array of the dtype of x and of shape (1, 1) or (1, d)."""
    if isinstance(ell, numbers.Real):
        return xp.full((1, 1), 1 / float(ell), dtype=x.dtype, device=device(x))
    return xp.reshape(1 / ell, (1, -1))


def _checked_points(x: Array, y: Array, **values: Array) -> Namespace:
    """The namespace of x, y and perhaps v, after checking that k(x, y) v makes sense."""
    arrays = {"x": x, "y": y, **values}
    xp = namespace(**arrays)
    if xp.isdtype(x.dtype, "complex floating"):
        raise TypeError(f"x has dtype {x.dtype} (shape {tuple(x.shape)}); distances need a real floating dtype")
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    for name, shape in shapes.items():
        if len(shape) < 2:
            raise ValueError(f"{name} must have at least two axes, (..., points, features), not the shape {shape}")
    if shapes["x"][-1] != shapes["y"][-1]:
        raise ValueError(f"x has shape {shapes['x']} and y {shapes['y']}; their last axes, the features, must be equal")
    if "v" in shapes and shapes["v"][-2] != shapes["y"][-2]:
        raise ValueError(f"v has shape {shapes['v']} and y {shapes['y']}; v needs one row for each point of y")
    try:
        broadcast_shapes(*(shape[:-2] for shape in shapes.values()))
    except ValueError:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"the leading axes must broadcast; the shapes are {listed}") from None
    return xp


def _checked_lengthscale(lengthscale: Array, x: Array, xp: Namespace) -> float | Array:
    """ℓ as a float, or as an array of shape () or (d,) in the dtype that x is computed in."""
    remedy = "give a positive number in the units of x, or an array of one per feature"
    if isinstance(lengthscale, numbers.Real):
        ell = number(lengthscale)
        if not 0 < ell < math.inf:
            raise ValueError(f"lengthscale must be positive and finite, not {shown(lengthscale)}; {remedy}")
        return ell
    if namespace(lengthscale=lengthscale) is not xp:
        raise TypeError(
            f"lengthscale is a {type(lengthscale).__module__} array and x is not; bring both to one library"
        )
    if tuple(lengthscale.shape) not in ((), (x.shape[-1],)):
        raise ValueError(
            f"lengthscale has shape {tuple(lengthscale.shape)} and x {tuple(x.shape)}; {remedy}: () or ({x.shape[-1]},)"
        )
    if xp.isdtype(lengthscale.dtype, "complex floating"):
        raise TypeError(f"lengthscale has dtype {lengthscale.dtype}; {remedy}")
    ells = xp.astype(lengthscale, xp.float32 if is_half(x) else x.dtype)
    if not is_traced(ells) and not bool(xp.all(xp.isfinite(ells) & (ells > 0))):
        values = np.ravel(to_host(ells))
        wrong = int(np.argmin(np.isfinite(values) & (values > 0)))
        raise ValueError(
            f"lengthscale must be positive and finite, not {float(values[wrong])} (entry {wrong} of the shape "
            f"{tuple(ells.shape)}); {remedy}"
        )
    return ells
