"""What the estimators of ``sklearn`` have in common: parameters, landmarks, kernels, the features F = k(x, z) W^{-1/2}.

Validation and kernels are scikit-learn's (``sklearn.metrics.pairwise``), but for the Gaussian kernel of dense data,
which is :func:`lowrank.gaussian_kernel` because that is accurate wherever the points lie. What is ours is the core: W =
k(z, z) whitened so that 0 ≼ K − FFᵀ up to roundoff in single precision as well (derived at ``_whitened``). The
approximation is that of Williams & Seeger, "Using the Nyström method to speed up kernel machines", NeurIPS 2000.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from array_api_compat import array_namespace, is_array_api_obj
from scipy.sparse import issparse
from sklearn.base import BaseEstimator
from sklearn.metrics.pairwise import KERNEL_PARAMS, PAIRWISE_KERNEL_FUNCTIONS, pairwise_kernels
from sklearn.utils import check_array, check_random_state, gen_batches
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import validate_data

from lowrank import landmarks as _landmarks
from lowrank._array import Array, arithmetic, device, from_host, is_half, namespace, to_host, widest_real
from lowrank._core import SHIFT
from lowrank.kernels import gaussian_kernel

# Features held at a time by NystroemRidge, 32 MiB of float64: chunks of thousands of rows, at which products run at
# their full speed.
_CHUNK_ENTRIES = 2**22
# Rows of the square blocks of which only the diagonal is wanted.
_DIAGONAL_ROWS = 64


class KernelFeatures(BaseEstimator):
    """Parameters, landmarks and features: what the transformer and the regressor have in common."""

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "kernel": [StrOptions({*PAIRWISE_KERNEL_FUNCTIONS, "precomputed"}), callable],
        "gamma": [Interval(Real, 0, None, closed="left"), None],
        "coef0": [Interval(Real, None, None, closed="neither"), None],
        "degree": [Interval(Real, 1, None, closed="left"), None],
        "kernel_params": [dict, None],
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "random_state": ["random_state"],
        "n_jobs": [Integral, None],
        "landmarks": [StrOptions({"uniform", "segment_means", "rpcholesky"}), callable, "array-like", "sparse matrix"],
        "rtol": [Interval(Real, 0, 1, closed="left"), None],
    }

    def __init__(
        self,
        kernel: str | Callable[..., Any] = "rbf",
        *,
        gamma: float | None = None,
        coef0: float | None = None,
        degree: float | None = None,
        kernel_params: dict[str, Any] | None = None,
        n_components: int = 100,
        random_state: int | np.random.RandomState | None = None,
        n_jobs: int | None = None,
        landmarks: str | Callable[..., Any] | Array = "uniform",
        rtol: float | None = None,
    ) -> None:
        self.kernel = kernel
        self.gamma = gamma
        self.coef0 = coef0
        self.degree = degree
        self.kernel_params = kernel_params
        self.n_components = n_components
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.landmarks = landmarks
        self.rtol = rtol

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.array_api_support = True
        tags.input_tags.sparse = not (isinstance(self.landmarks, str) and self.landmarks == "segment_means")
        tags.input_tags.pairwise = self._precomputed
        return tags

    @property
    def _precomputed(self) -> bool:
        return isinstance(self.kernel, str) and self.kernel == "precomputed"

    def _validated(self, X: Any, method: str) -> Any:
        """New data, checked to be like those that were fitted, in their dtype."""
        X = validate_data(self, X, accept_sparse="csr", reset=False)
        like, new = self.normalization_, _like(X)
        if array_namespace(like) is not array_namespace(new) or device(like) != device(new):
            raise ValueError(
                f"{type(self).__name__}.{method}() must use the same namespace and device as fit(), where X was a "
                f"{type(like).__module__} array on {device(like)}; now it is a {type(new).__module__} array on "
                f"{device(new)}"
            )
        return cast(X, like.dtype)

    # Kernels

    def _kernel_arguments(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in ("gamma", "coef0", "degree") if getattr(self, name) is not None}
        if callable(self.kernel) or self._precomputed:
            if given:
                kind = "precomputed" if self._precomputed else "callable"
                raise ValueError(
                    f"Don't pass gamma, coef0 or degree to {type(self).__name__} with a {kind} kernel (got {given}); "
                    "a callable takes its arguments from kernel_params"
                )
        else:
            given = {name: value for name, value in given.items() if name in KERNEL_PARAMS[self.kernel]}
        return {**(self.kernel_params or {}), **given}

    def _block(self, X: Any, Z: Any) -> Array:
        """k(X, Z) as a dense array in the dtype of X."""
        arguments = self._kernel_arguments()
        gamma = arguments.get("gamma", 1 / X.shape[1])
        if isinstance(self.kernel, str) and self.kernel == "rbf" and gamma and not (issparse(X) or issparse(Z)):
            block = gaussian_kernel(X, Z, lengthscale=1 / math.sqrt(2 * gamma))
        else:
            block = pairwise_kernels(X, Z, metric=self.kernel, filter_params=True, n_jobs=self.n_jobs, **arguments)
            block = cast(block, X.dtype)
        return _finite(block, X, Z)

    def _diagonal(self, X: Any) -> Array:
        """k(x, x) for every row."""
        like = _like(X)
        if hasattr(self.kernel, "diag"):
            values = self.kernel.diag(X)
        elif callable(self.kernel):
            rows = ((X[[i], :] if issparse(X) else X[i, ...]) for i in range(X.shape[0]))
            arguments = self._kernel_arguments()
            values = np.asarray([float(self.kernel(row, row, **arguments)) for row in rows])
        else:
            xp = namespace(X=like)
            chunks = (X[rows, :] for rows in gen_batches(X.shape[0], _DIAGONAL_ROWS))
            return xp.concat([xp.linalg.diagonal(self._block(chunk, chunk)) for chunk in chunks])
        return from_host(values, like, namespace(X=like))

    # Landmarks

    def _choose(self, X: Any) -> tuple[Any, np.ndarray | None]:
        """The landmarks, and which rows of X they are unless they are points of their own."""
        chosen, n = self.landmarks, X.shape[0]
        if self.rtol is not None and not (isinstance(chosen, str) and chosen == "rpcholesky"):
            raise ValueError(
                f"rtol={self.rtol} is reached by landmarks='rpcholesky', which knows the error at every rank; "
                f"leave it out for landmarks={chosen!r}"
            )
        if isinstance(chosen, str) or callable(chosen):
            if self.n_components > n:
                warnings.warn(
                    f"n_components={self.n_components} is more than the {n} samples there are; {n} is used instead, "
                    "which evaluates the whole kernel matrix",
                    stacklevel=4,
                )
            chosen = self._drawn(X, min(self.n_components, n))
        chosen = chosen if is_array_api_obj(chosen) or issparse(chosen) else np.asarray(chosen)
        if chosen.ndim not in (1, 2):
            raise ValueError(
                f"landmarks must be indices (k,) or points (k, n_features), not of shape {tuple(chosen.shape)} and "
                f"dtype {chosen.dtype}"
            )
        if chosen.ndim != 1:
            return self._checked_points(chosen, X), None
        indices = _checked_indices(to_host(chosen), n)
        return _taken(X, indices, 0), indices

    def _drawn(self, X: Any, rank: int) -> Any:
        """What the rule named or given by ``landmarks`` makes of the rows of X."""
        random, rule = check_random_state(self.random_state), self.landmarks
        if isinstance(rule, str) and rule == "uniform":
            # The draw of sklearn.kernel_approximation.Nystroem, so that one seed gives the same landmarks.
            return random.permutation(X.shape[0])[:rank]
        points: Any = X
        kernel: Callable[[Array, Array], Array] | None = self._kernel_at(lambda a: a)
        if self._precomputed:
            points, kernel = _dense(X), None
        elif isinstance(rule, str) and issparse(X):
            if rule == "segment_means":
                raise ValueError(
                    f"landmarks='segment_means' averages dense points and X is sparse (shape {X.shape}); take "
                    "'uniform' or 'rpcholesky', or give the points"
                )
            # A rule that takes arrays is shown the numbers of the rows.
            wide = X.astype(np.float64)
            points = np.arange(X.shape[0], dtype=np.float64)[:, None]
            kernel = self._kernel_at(lambda a: wide[a[:, 0].astype(np.int64)])
        if isinstance(rule, str):
            rule = getattr(_landmarks, rule)
        if self.rtol is not None:
            rule = functools.partial(rule, rtol=self.rtol)
        return rule(points, rank=rank, kernel=kernel, rng=np.random.default_rng(random.randint(2**31 - 1)))

    def _kernel_at(self, look_up: Callable[[Array], Any]) -> Callable[[Array, Array], Array]:
        """The kernel as the rules of :mod:`lowrank.landmarks` call it: blocks, or single points for the diagonal."""

        def kernel(a: Array, b: Array) -> Array:
            if a.ndim == 2:
                return self._block(look_up(a), look_up(b))
            if a.ndim != 3 or a is not b or a.shape[1] != 1:
                raise ValueError(
                    f"scikit-learn's kernels take points (n, d), not shapes {tuple(a.shape)} and {tuple(b.shape)}"
                )
            return self._diagonal(look_up(a[:, 0, :]))[:, None, None]

        return kernel

    def _checked_points(self, points: Any, X: Any) -> Any:
        if self._precomputed:
            raise ValueError(f"kernel='precomputed' has no points; landmarks of shape {points.shape} must be indices")
        if points.shape[0] == 0:
            raise ValueError("there are no landmarks; give one at least")
        points = check_array(points, accept_sparse="csr", input_name="landmarks")
        if points.shape[1] != X.shape[1]:
            raise ValueError(f"landmarks have {points.shape[1]} features and X (shape {X.shape}) has {X.shape[1]}")
        if issparse(points):
            return points.astype(X.dtype)
        like = _like(X)
        return namespace(X=like).asarray(points, dtype=like.dtype, device=device(like))

    # The core and the features

    def _fit_landmarks(self, X: Any) -> None:
        """Choose the landmarks and factor their kernel matrix, in float64."""
        if self._precomputed and X.shape[0] != X.shape[1]:
            raise ValueError(f"with kernel='precomputed' X is the kernel matrix and must be square, not {X.shape}")
        self._kernel_arguments()
        like = _like(X)
        xp = namespace(X=like)
        z, indices = self._choose(X)
        wide = widest_real(like, xp)
        whitening, rotation, clipped = _whitened(to_host(self._core(z, indices)), eps=float(xp.finfo(X.dtype).eps))
        root = whitening @ rotation.T
        self.components_ = z
        self.component_indices_ = None if indices is None else from_host(indices, like, xp, dtype=xp.int64)
        self.normalization_ = from_host(root, like, xp)
        self.clipped_mass_ = clipped
        # One product where it is of a higher precision than its result, two where it is not: see _whitened.
        parts = [root] if wide != self.normalization_.dtype else [whitening, rotation.T]
        self._root = [from_host(part, like, xp, dtype=wide) for part in parts]

    def _core(self, z: Any, indices: np.ndarray | None) -> Array:
        """k(z, z) in float64, where the device has it."""
        if self._precomputed:
            assert indices is not None
            return _dense(_taken(z, indices, 1))
        wide = cast(z, np.float64 if issparse(z) else widest_real(z, namespace(z=z)))
        return self._block(wide, wide)

    def _features(self, X: Any) -> Array:
        """k(x, z) W^{-1/2} in float64, where the device has it."""
        if self._precomputed:
            c = _finite(_dense(_taken(X, to_host(self.component_indices_), 1)), X, self.components_)
        else:
            c = self._block(X, self.components_)
        features = cast(c, self._root[0].dtype)
        with arithmetic(features):
            for part in self._root:
                features = features @ part
        return features

    def _chunks(self, X: Any) -> Iterator[tuple[slice, Array]]:
        """Some rows at a time, and their features."""
        for rows in gen_batches(X.shape[0], max(1, _CHUNK_ENTRIES // self.normalization_.shape[0])):
            yield rows, self._features(X[rows, :])


def _whitened(w: np.ndarray, *, eps: float) -> tuple[np.ndarray, np.ndarray, float]:
    """V (S + ν)^{-1/2}, V, and the part of Σ|λ| left out, where V S Vᵀ is the positive part of W.

    An eigenvalue within ν of zero counts as zero, and what lies below as negative. ν is that of :mod:`lowrank.factor`,
    and so is the reason why F = C V (S + ν)^{-1/2} Vᵀ is below K: an error E in F₁(S + ν)^{1/2} = CV + E lowers
    λ_min(K − F₁F₁ᵀ) to no less than −‖E‖²/ν. A relative error γ of F₁Vᵀ adds 2γ√(λ‖K‖) to F Fᵀ in a direction of
    eigenvalue λ of K, where the shift has taken away about 30 eps‖K‖.

    Single precision: C is in error by a few eps, and its product with the symmetric root is formed in double and
    rounded once, γ = eps/2. (In single, sums of m equal terms have errors of one sign: measured −17 eps‖K‖ for one
    point repeated 700 times.)

    Double precision: the product C(V(S + ν)^{-1/2}Vᵀ) would err by eps/√ν in every direction, and by √eps‖K‖ in F Fᵀ,
    which is what happens to scikit-learn's in single precision. (C V(S + ν)^{-1/2})Vᵀ does not: scaling a column
    commutes with rounding, so that |E| ≤ γ|C||V|, and Vᵀ is orthogonal.
    """
    w = w.astype(np.float64)
    if np.max(np.abs(w - w.T)) > math.sqrt(eps) * np.max(np.abs(w)):
        raise ValueError(
            f"the kernel is not symmetric: k(z, z) of the landmarks (shape {w.shape}) differs from its transpose by "
            f"{np.max(np.abs(w - w.T)):.3g}"
        )
    values, vectors = np.linalg.eigh((w + w.T) / 2)
    # As in lowrank.factor, the floor is for W = 0.
    shift = max(SHIFT * eps * float(np.max(np.sum(np.abs(w), axis=1))), float(np.finfo(np.float32).tiny))
    kept = values > -shift
    clipped = float(np.sum(np.abs(values[~kept])) / max(np.sum(np.abs(values)), shift))
    vectors, values = vectors[:, kept], np.maximum(values[kept], 0.0)
    return vectors / np.sqrt(values + shift), vectors, clipped


def _like(X: Any) -> Array:
    """X, or where it is sparse the array of its values, to make arrays beside."""
    return X.data if issparse(X) else X


def _dense(X: Any) -> Array:
    return X.toarray() if issparse(X) else X


def cast(X: Any, dtype: Any) -> Any:
    return X.astype(dtype) if issparse(X) else array_namespace(X).astype(X, dtype, copy=False)


def floating(X: Any) -> Any:
    """X in float32 if it is that or of half precision, and in float64 otherwise."""
    like = _like(X)
    xp = array_namespace(like)
    return cast(X, xp.float32 if like.dtype == xp.float32 or is_half(like) else widest_real(like, xp))


def _taken(X: Any, indices: np.ndarray, axis: int) -> Any:
    """Rows (axis 0) or columns (axis 1) of X."""
    if issparse(X):
        return X[indices] if axis == 0 else X[:, indices]
    xp = namespace(X=X)
    return xp.take(X, from_host(indices, X, xp, dtype=xp.int64), axis=axis)


def _finite(block: Array, X: Any, Z: Any) -> Array:
    xp = namespace(block=block)
    if not bool(xp.all(xp.isfinite(block))):
        raise ValueError(f"the kernel returned NaN or infinite values for points of shapes {X.shape} and {Z.shape}")
    return block


def _checked_indices(indices: np.ndarray, n: int) -> np.ndarray:
    if indices.size == 0:
        raise ValueError("there are no landmarks; give one at least")
    if indices.dtype.kind not in "iu":
        raise ValueError(
            f"landmarks of shape {indices.shape} and dtype {indices.dtype} are neither integer indices nor points; "
            "give indices (k,) or points (k, n_features)"
        )
    if indices.min() < 0 or indices.max() >= n:
        raise ValueError(f"landmarks are rows {indices.min()} to {indices.max()} and X has the rows 0 to {n - 1}")
    return indices
