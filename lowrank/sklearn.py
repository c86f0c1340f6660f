"""scikit-learn's way of speaking: a transformer in the place of its ``Nystroem``, and a ridge regressor on top of it.

The features of both are made in ``_kernel_features``, with the symmetric root of W = k(z, z), scikit-learn's choice, so
that they are its features where W is well conditioned. The regressor takes rows in chunks, in one call or in several,
and keeps the sums of its normal equations. Its predictive variance is that of the deterministic training conditional in
Quiñonero-Candela & Rasmussen, "A unifying view of sparse approximate Gaussian process regression", JMLR 6, 2005, §5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, ClassVar, Literal, Self, overload

import numpy as np

try:
    from sklearn.base import (
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

from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from lowrank._array import Array, arithmetic, device, from_host, namespace, to_host, widest_real
from lowrank._kernel_features import KernelFeatures, cast, floating


class Nystroem(ClassNamePrefixFeaturesOutMixin, TransformerMixin, KernelFeatures):
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
        X = floating(validate_data(self, X, accept_sparse="csr"))
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


class NystroemRidge(MultiOutputMixin, RegressorMixin, KernelFeatures):
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
        **KernelFeatures._parameter_constraints,
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
            X = floating(X)
            self._fit_landmarks(X)
            self._gram, self._moment, self._targets, self.n_samples_seen_ = 0.0, 0.0, targets, 0
        gram, moment = self._accumulated(cast(X, self.normalization_.dtype), y, weights)
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
        return cast(prior, features.dtype) - xp.sum(features * features, axis=1) + xp.sum(learnt * learnt, axis=1)
