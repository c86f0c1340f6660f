"""scikit-learn's way of speaking: a transformer in the place of its ``Nystroem``, and a ridge regressor on top of it.

Validation and kernels are scikit-learn's (``sklearn.metrics.pairwise``), but for the Gaussian kernel of dense data,
which is :func:`lowrank.gaussian_kernel` because that is accurate wherever the points lie. What this room adds is the
core: F = k(x, z) W^{-1/2} with W = k(z, z), formed so that 0 ≼ K − FFᵀ up to roundoff in single precision as well
(derived at ``_whitened``). The symmetric root is scikit-learn's choice, so that the features are its features where W
is well conditioned.

The approximation is that of Williams & Seeger, "Using the Nyström method to speed up kernel machines", NeurIPS 2000;
the predictive variance that of the deterministic training conditional in Quiñonero-Candela & Rasmussen, "A unifying
view of sparse approximate Gaussian process regression", JMLR 6, 2005, §5.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Self, overload

import numpy as np
from array_api_compat import array_namespace, is_array_api_obj

try:
    from sklearn.base import (
        BaseEstimator,
        ClassNamePrefixFeaturesOutMixin,
        MultiOutputMixin,
        RegressorMixin,
        TransformerMixin,
        _fit_context,
    )
except ModuleNotFoundError as missing:
    raise ImportError(
        "lowrank.sklearn is built on scikit-learn, which is not installed; "
        "install it together with this package: pip install 'lowrank[sklearn]'"
    ) from missing

from scipy.sparse import issparse
from sklearn.metrics.pairwise import KERNEL_PARAMS, PAIRWISE_KERNEL_FUNCTIONS, pairwise_kernels
from sklearn.utils import check_array, check_random_state, gen_batches
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from lowrank import landmarks as _landmarks
from lowrank._array import Array, arithmetic, device, from_host, is_half, namespace, to_host, widest_real
from lowrank._core import SHIFT
from lowrank.kernels import gaussian_kernel

# Features held at a time by NystroemRidge, 32 MiB of float64: chunks of thousands of rows, at which products run at
# their full speed.
_CHUNK_ENTRIES = 2**22
# Rows of the square blocks of which only the diagonal is wanted.
_DIAGONAL_ROWS = 64


class _KernelFeatures(BaseEstimator):
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
        return _cast(X, like.dtype)

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
            block = _cast(block, X.dtype)
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
        wide = _cast(z, np.float64 if issparse(z) else widest_real(z, namespace(z=z)))
        return self._block(wide, wide)

    def _features(self, X: Any) -> Array:
        """k(x, z) W^{-1/2} in float64, where the device has it."""
        if self._precomputed:
            c = _finite(_dense(_taken(X, to_host(self.component_indices_), 1)), X, self.components_)
        else:
            c = self._block(X, self.components_)
        features = _cast(c, self._root[0].dtype)
        with arithmetic(features):
            for part in self._root:
                features = features @ part
        return features

    def _chunks(self, X: Any) -> Iterator[tuple[slice, Array]]:
        """Some rows at a time, and their features."""
        for rows in gen_batches(X.shape[0], max(1, _CHUNK_ENTRIES // self.normalization_.shape[0])):
            yield rows, self._features(X[rows, :])


class Nystroem(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _KernelFeatures):
    """Features of a kernel from a subset of the training data: k(x, y) ≈ φ(x)·φ(y).

    In the place of :class:`sklearn.kernel_approximation.Nystroem`: the same parameters and attributes, the same
    landmarks for the same ``random_state``, and the same features where the kernel matrix of the landmarks is well
    conditioned; but with FFᵀ ≼ K in single precision as well, landmarks of one's own choice, and an adaptive number
    of them.

    Parameters
    ----------
    kernel : str or callable, default="rbf"
        A name of :func:`sklearn.metrics.pairwise.kernel_metrics`, ``"precomputed"``, a function of two rows that
        returns a number, or a kernel of :mod:`sklearn.gaussian_process.kernels`.
    gamma, coef0, degree : float, default=None
        Of the named kernels; None leaves it to the kernel. gamma is in inverse squared units of X for ``"rbf"``,
        exp(−γ‖x − y‖²), which is a lengthscale of 1/√(2γ).
    kernel_params : dict, default=None
        Further keyword arguments of the kernel.
    n_components : int, default=100
        How many landmarks where they are to be chosen, and at most as many with ``"rpcholesky"``. More than there are
        samples are as many as there are samples, with a warning.
    random_state : int, RandomState instance or None, default=None
        For the choice of landmarks.
    n_jobs : int, default=None
        Threads for scikit-learn's kernels.
    landmarks : str, callable or array, default="uniform"
        ``"uniform"``, ``"segment_means"`` or ``"rpcholesky"``, the functions of :mod:`lowrank.landmarks`; a callable
        of the same signature, ``(x, /, *, rank, kernel, rng)``; indices of rows of X, shape (k,); or points of shape
        (k, n_features), such as the centres of k-means.
    rtol : float, default=None
        With ``"rpcholesky"``: stop at tr(K − FFᵀ) ≤ rtol·tr K; from 0 to 1.

    Attributes
    ----------
    components_ : array or sparse matrix, shape (n_components, n_features)
        The landmarks; with a precomputed kernel their rows of it, shape (n_components, n_samples).
    component_indices_ : integer array, shape (n_components,), or None
        Which rows of X they are; None where they are points of their own.
    normalization_ : array, shape (n_components, n_components)
        W^{-1/2}, symmetric, W = k(z, z) + νI, ν = 30·eps·‖W‖_∞, without the negative part of W.
    clipped_mass_ : float
        Σ|λ| over the negative eigenvalues of W that were left out, over Σ|λ| of all; 0 for a positive semidefinite
        kernel. In [0, 1].
    n_features_in_ : int
    feature_names_in_ : array, one name for each feature
        Where X has names.

    Notes
    -----
    Single precision: the kernel matrix of the landmarks and its eigendecomposition are computed in float64, and
    K − FFᵀ ≽ −c·eps·‖K‖ for any points. scikit-learn takes both in the dtype of X, and FFᵀ overshoots K by up to
    about √eps·‖K‖ there.

    Kernels other than the Gaussian, and that of sparse data, are evaluated by scikit-learn: relative errors δ in their
    values, which for the Gaussian of sparse data are about eps·γ‖x‖², lower the bound by up to δ²/(30 eps)·n‖K‖.

    Kernels that are not positive semidefinite (sigmoid, additive chi-squared): W is replaced by its positive part, the
    nearest positive semidefinite matrix (Higham, "Computing a nearest symmetric positive semidefinite matrix", Linear
    Algebra Appl. 103, 1988), and ``clipped_mass_`` says how much that left out. scikit-learn's singular values replace
    W by its absolute value, and so turn a negative direction into a positive one of the same size: with all samples as
    landmarks FFᵀ is the positive part of K here, and its absolute value there. For kernels that are positive
    semidefinite there is no difference.

    Array API: under ``sklearn.config_context(array_api_dispatch=True)`` torch and CuPy arrays give features in their
    library and on their device, and O(n_components²) numbers go by way of the host.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.sklearn import Nystroem
    >>> x = np.linspace(0, 1, 50)[:, None]
    >>> features = Nystroem(gamma=1.0, n_components=6, random_state=0).fit_transform(x)
    >>> features.shape
    (50, 6)
    >>> bool(np.max(np.abs(features @ features.T - np.exp(-((x - x.T) ** 2)))) < 1e-4)
    True
    """

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None) -> Self:
        """Choose the landmarks and factor their kernel matrix, in n_components² kernel values.

        Parameters
        ----------
        X : array-like or sparse matrix, shape (n_samples, n_features)
            (n_samples, n_samples), the kernel matrix, if that is precomputed.
        y : ignored

        Returns
        -------
        Nystroem
            Itself.

        Raises
        ------
        InvalidParameterError
            A ValueError of scikit-learn's: if a parameter of the class is of another type or out of range.
        ValueError
            If X is not a matrix of real numbers, has no rows, has NaN or infinite values, or is not square where it is
            the kernel matrix; if the kernel returns NaN or infinite values, or is not symmetric; if landmarks are
            neither indices nor points, are empty, do not fit X, or are to be means of a sparse X; if ``rtol`` comes
            with another rule than ``"rpcholesky"``, or gamma, coef0 or degree with a kernel that does not take them.

        Warns
        -----
        UserWarning
            If n_components is more than there are samples.
        """
        X = _floating(validate_data(self, X, accept_sparse="csr"))
        self._fit_landmarks(X)
        self._n_features_out = self.normalization_.shape[0]
        return self

    def transform(self, X: Any) -> Array:
        """The features of new data.

        Parameters
        ----------
        X : array-like or sparse matrix, shape (n_samples, n_features)
            With a precomputed kernel k(x, training data), shape (n_samples, n_training_samples).

        Returns
        -------
        array, shape (n_samples, n_components)
            In the dtype of the data that were fitted.

        Raises
        ------
        NotFittedError
            If ``fit`` has not been called.
        ValueError
            If X is not a matrix of real numbers, has no rows, has NaN or infinite values, other features than the data
            that were fitted or, where arrays are dispatched on, another library or device; or if the kernel returns NaN
            or infinite values.
        """
        check_is_fitted(self)
        X = self._validated(X, "transform")
        xp, dtype = namespace(normalization=self.normalization_), self.normalization_.dtype
        return xp.concat([xp.astype(features, dtype) for _, features in self._chunks(X)])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class NystroemRidge(MultiOutputMixin, RegressorMixin, _KernelFeatures):
    """Kernel ridge regression within the span of a few landmarks, with predictive variance, chunk by chunk.

    The minimiser of Σᵢ wᵢ(yᵢ − φ(xᵢ)·c)² + α‖c‖² on the features φ of :class:`Nystroem`, which is
    :class:`sklearn.kernel_ridge.KernelRidge` where all samples are landmarks. The features of a few thousand samples
    are held at a time: one pass over the data, and O(n_components²) numbers kept.

    Parameters
    ----------
    alpha : float, default=1.0
        α, not negative, in the units of the kernel; as a Gaussian process, the variance of the noise in y.
    kernel, gamma, coef0, degree, kernel_params, n_components, random_state, n_jobs, landmarks, rtol
        As for :class:`Nystroem`. Landmarks are chosen without regard to ``sample_weight``.

    Attributes
    ----------
    coef_ : array, shape (n_components,) or (n_targets, n_components)
        c.
    n_samples_seen_ : int
        Over all calls of ``partial_fit``.
    components_, component_indices_, normalization_, clipped_mass_, n_features_in_, feature_names_in_
        As for :class:`Nystroem`.

    Notes
    -----
    Everything but the kernel values is computed in float64, where the device has it.

    ``predict(x, return_std=True)`` takes y as a Gaussian process of covariance k plus noise of variance α/wᵢ, so that
    units of y matter. Its variance is that of the deterministic training conditional, in which the landmarks carry all
    that is learnt and the prior of a new point is exact:

        σ²(x) = k(x, x) − φ(x)·φ(x) + α φ(x)ᵀ(FᵀF + αI)⁻¹φ(x)

    Far from the landmarks that is k(x, x). Without the first two terms, as for any Bayesian linear regression on φ
    (subset of regressors), it would be zero there: certain where nothing is known. It is the deviation of the noiseless
    function; add α to its square for that of an observation. With all samples as landmarks it is that of
    :class:`sklearn.gaussian_process.GaussianProcessRegressor`. A deviation below about √(100·eps·k(x, x)) is rounding.

    References
    ----------
    Quiñonero-Candela & Rasmussen, "A unifying view of sparse approximate Gaussian process regression", JMLR 6, 2005,
    §4 (subset of regressors) and §5 (deterministic training conditional).

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.sklearn import NystroemRidge
    >>> x = np.linspace(0, 6, 200)[:, None]
    >>> model = NystroemRidge(1e-4, gamma=0.5, n_components=30, random_state=0).fit(x, np.sin(x[:, 0]))
    >>> mean, std = model.predict(np.asarray([[3.0], [60.0]]), return_std=True)
    >>> abs(float(mean[0] - np.sin(3.0))) < 1e-3
    True
    >>> std.round(2)
    array([0., 1.])
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **_KernelFeatures._parameter_constraints,
        "alpha": [Interval(Real, 0, None, closed="left")],
    }
    # The shape of y without its rows.
    _targets: tuple[int, ...]

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        kernel: str | Callable[..., Any] = "rbf",
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
        super().__init__(
            kernel,
            gamma=gamma,
            coef0=coef0,
            degree=degree,
            kernel_params=kernel_params,
            n_components=n_components,
            random_state=random_state,
            n_jobs=n_jobs,
            landmarks=landmarks,
            rtol=rtol,
        )
        self.alpha = alpha

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit to all data at once.

        Parameters
        ----------
        X : array-like or sparse matrix, shape (n_samples, n_features)
        y : array-like, shape (n_samples,) or (n_samples, n_targets)
        sample_weight : array-like, shape (n_samples,), default=None
            Not negative; a weight of 2 counts as two samples.

        Returns
        -------
        NystroemRidge
            Itself.

        Raises
        ------
        InvalidParameterError
            As :meth:`Nystroem.fit`.
        ValueError
            As :meth:`Nystroem.fit`, and if y does not have a row of finite numbers for each sample; if sample_weight
            does not have one for each, or a negative one, or one that is not finite; if α is too small for the features
            to determine c: the message names their rank.

        Warns
        -----
        UserWarning
            As :meth:`Nystroem.fit`.
        """
        return self._fit_chunk(X, y, sample_weight, first=True)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Add a chunk of data; the landmarks are chosen from the first, unless they are given as points.

        After chunks X₁, X₂, … the model is that of ``fit`` on all of them with these landmarks, up to rounding.

        Parameters
        ----------
        X, y, sample_weight
            As for ``fit``.

        Returns
        -------
        NystroemRidge
            Itself.

        Raises
        ------
        InvalidParameterError
            As :meth:`NystroemRidge.fit`.
        ValueError
            As :meth:`NystroemRidge.fit`, and if X has other features, or y other targets, than the first chunk.

        Warns
        -----
        UserWarning
            As :meth:`NystroemRidge.fit`.
        """
        return self._fit_chunk(X, y, sample_weight, first=not hasattr(self, "coef_"))

    @overload
    def predict(self, X: Any, return_std: Literal[False] = False) -> Array: ...
    @overload
    def predict(self, X: Any, return_std: Literal[True]) -> tuple[Array, Array]: ...
    def predict(self, X: Any, return_std: bool = False) -> Array | tuple[Array, Array]:
        """The regression function at new points, and how uncertain it is.

        Parameters
        ----------
        X : array-like or sparse matrix, shape (n_samples, n_features)
        return_std : bool, default=False

        Returns
        -------
        mean : array, shape (n_samples,) or (n_samples, n_targets)
        std : array, of the shape of ``mean``
            Only with ``return_std``; the same for all targets.

        Raises
        ------
        NotFittedError
            As :meth:`Nystroem.transform`.
        ValueError
            As :meth:`Nystroem.transform`, and if ``return_std`` is asked of a precomputed kernel, whose k(x, x) at new
            points is not known, or of one that is not positive semidefinite, which is no covariance.
        """
        check_is_fitted(self)
        X = self._validated(X, "predict")
        xp = namespace(coef=self.coef_)
        if return_std:
            self._check_covariance()
        means, variances = [], []
        for rows, features in self._chunks(X):
            with arithmetic(features):
                means.append(features @ self._coef)
                if return_std:
                    variances.append(self._variance(self._diagonal(X[rows, :]), features))
        mean = xp.astype(xp.reshape(xp.concat(means), (X.shape[0], *self._targets)), self.coef_.dtype)
        if not return_std:
            return mean
        std = xp.astype(xp.sqrt(xp.clip(xp.concat(variances), min=0.0)), mean.dtype)
        return mean, (std if mean.ndim == 1 else xp.broadcast_to(std[:, None], mean.shape))

    def _fit_chunk(self, X: Any, y: Any, sample_weight: Any, *, first: bool) -> Self:
        X, y = validate_data(self, X, y, accept_sparse="csr", multi_output=True, y_numeric=True, reset=first)
        targets = tuple(y.shape[1:])
        if not first and targets != self._targets:
            raise ValueError(
                f"y has shape {tuple(y.shape)}; in the first chunk a sample had targets of shape {self._targets}, "
                "keep to that or call fit"
            )
        weights = None
        if sample_weight is not None:
            if isinstance(sample_weight, Real) and not math.isfinite(sample_weight):
                raise ValueError(f"sample_weight must be finite, not {sample_weight}")
            weights = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
        if first:
            X = _floating(X)
            self._fit_landmarks(X)
            self._gram, self._moment, self._targets, self.n_samples_seen_ = 0.0, 0.0, targets, 0
        gram, moment = self._accumulated(_cast(X, self.normalization_.dtype), y, weights)
        self._solve(self._gram + gram, self._moment + moment)
        self.n_samples_seen_ += X.shape[0]
        return self

    def _accumulated(self, X: Any, y: Array, weights: Array | None) -> tuple[Array, Array]:
        """Σ w f fᵀ and Σ w f yᵀ over the rows, in float64 where there is float64."""
        like = self.normalization_
        xp = namespace(normalization=like)
        make = {"dtype": widest_real(like, xp), "device": device(like)}
        k = like.shape[0]
        y = xp.reshape(xp.asarray(y, **make), (X.shape[0], -1))
        w = xp.ones((X.shape[0], 1), **make) if weights is None else xp.asarray(weights, **make)[:, None]
        gram, moment = xp.zeros((k, k), **make), xp.zeros((k, y.shape[1]), **make)
        for rows, features in self._chunks(X):
            weighted = (w[rows, :] * features).T
            with arithmetic(features):
                gram = gram + weighted @ features
                moment = moment + weighted @ y[rows, :]
        return gram, moment

    def _solve(self, gram: Array, moment: Array) -> None:
        """The coefficients, and √α (FᵀF + αI)^{-1/2} for the variance, by one eigendecomposition on the host."""
        like = self.normalization_
        xp = namespace(normalization=like)
        values, vectors = np.linalg.eigh(to_host(gram).astype(np.float64))
        values = np.maximum(values, 0.0)
        # eigh and the accumulation of FᵀF leave errors of about k·eps·‖FᵀF‖ in the smallest eigenvalues.
        rounding = values.size * float(np.finfo(np.float64).eps) * values[-1]
        if values[0] + self.alpha <= rounding:
            raise ValueError(
                f"alpha={self.alpha} leaves the coefficients undetermined: of {values.size} features the data have "
                f"rank {int(np.sum(values > rounding))} up to rounding; take alpha above {rounding:.2g}, or fewer "
                "components"
            )
        projected = vectors.T @ to_host(moment).astype(np.float64)
        coef = vectors @ (projected / (values + self.alpha)[:, None])
        posterior = vectors * np.sqrt(self.alpha / (values + self.alpha))
        self._gram, self._moment = gram, moment
        self._coef, self._posterior = (from_host(a, like, xp, dtype=gram.dtype) for a in (coef, posterior))
        self.coef_ = from_host(coef.T if self._targets else coef[:, 0], like, xp)

    def _check_covariance(self) -> None:
        if self._precomputed:
            raise ValueError(
                "return_std needs k(x, x) of the new points, which a precomputed kernel does not tell; name the kernel"
            )
        if self.clipped_mass_ > 0:
            raise ValueError(
                f"return_std needs a covariance, and the kernel is not positive semidefinite: {self.clipped_mass_:.2g} "
                "of its eigenvalues' mass was clipped"
            )

    def _variance(self, prior: Array, features: Array) -> Array:
        """k(x, x) − φ·φ + α φᵀ(FᵀF + αI)⁻¹φ."""
        xp = namespace(features=features)
        learnt = features @ self._posterior
        return _cast(prior, features.dtype) - xp.sum(features * features, axis=1) + xp.sum(learnt * learnt, axis=1)


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


def _cast(X: Any, dtype: Any) -> Any:
    return X.astype(dtype) if issparse(X) else array_namespace(X).astype(X, dtype, copy=False)


def _floating(X: Any) -> Any:
    """X in float32 if it is that or of half precision, and in float64 otherwise."""
    like = _like(X)
    xp = array_namespace(like)
    return _cast(X, xp.float32 if like.dtype == xp.float32 or is_half(like) else widest_real(like, xp))


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
