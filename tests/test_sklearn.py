"""The scikit-learn estimators: scikit-learn's contract, below K in single precision, the exact cases of ridge."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from unittest import SkipTest

import numpy as np
import pytest
import scipy.sparse
import sklearn
import sklearn.kernel_approximation
import torch
from conftest import gaussian_gram
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import kernel_metrics, pairwise_kernels
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator

import lowrank
import lowrank.sklearn
from lowrank._array import to_host
from lowrank.sklearn import Nystroem, NystroemRidge

# Kernels of rows of x ≥ 0 that are positive semidefinite, with parameters that keep 30 landmarks well conditioned.
POSITIVE = {
    "rbf": {"gamma": 2.0},
    "laplacian": {"gamma": 1.0},
    "chi2": {"gamma": 2.0},
    "cosine": {},
    "linear": {},
    "poly": {"gamma": 0.1, "degree": 3, "coef0": 1.0},
}
INDEFINITE = {"sigmoid": {"gamma": 0.5, "coef0": -1.0}, "additive_chi2": {}}
EPS = {np.float32: np.finfo(np.float32).eps, np.float64: np.finfo(np.float64).eps}
dispatched = pytest.mark.skipif(os.environ.get("SCIPY_ARRAY_API") != "1", reason="run by test_array_api_dispatch")
all_landmarks = pytest.mark.filterwarnings("ignore:n_components=:UserWarning")


def points(n, d, *, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).uniform(size=(n, d)).astype(dtype)


def lowest(k, features):
    """λ_min(K − FFᵀ)/‖K‖."""
    f = features.astype(np.float64)
    return np.linalg.eigvalsh(k - f @ f.T)[0] / np.linalg.norm(k, 2)


# scikit-learn's contract


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "estimator",
    [
        Nystroem(),
        Nystroem(landmarks="rpcholesky", rtol=1e-3),
        Nystroem(kernel="laplacian", n_components=5, landmarks="segment_means"),
        NystroemRidge(),
        NystroemRidge(kernel="poly", landmarks="rpcholesky"),
    ],
    ids=repr,
)
def test_estimator_checks(estimator):
    # Skipped are those of the array API, which test_array_api_dispatch runs.
    results = check_estimator(estimator, on_fail=None, on_skip=None)
    assert {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"} == {}
    skipped = {r["check_name"] for r in results if r["status"] == "skipped"}
    assert all(name.startswith("check_array_api") for name in skipped)
    assert sum(r["status"] == "passed" for r in results) > 40


@dispatched
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("estimator", [Nystroem(), NystroemRidge()], ids=repr)
def test_dispatched_estimator_checks(estimator, monkeypatch):
    # scikit-learn asks whether torch was built for a GPU, and means whether there is one.
    monkeypatch.setattr(torch.backends.cuda, "is_built", torch.cuda.is_available)
    results = check_estimator(estimator, on_fail=None, on_skip=None)
    # Nothing is expected to fail, though scikit-learn expects check_array_api_same_namespace and
    # check_transformer_preserve_dtypes to fail for its own Nystroem.
    assert {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"} == {}
    passed = {r["check_name"] for r in results if r["status"] == "passed"}
    assert {"check_array_api_input", "check_array_api_mixed_inputs", "check_array_api_same_namespace"} <= passed
    assert all(isinstance(r["exception"], SkipTest) for r in results if r["status"] == "skipped")


def test_array_api_dispatch():
    # scikit-learn dispatches only where scipy was imported with this variable set.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "dispatched", __file__],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"SCIPY_ARRAY_API": "1", "PYTHONPATH": str(Path(lowrank.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_without_scikit_learn_the_extra_is_named():
    program = "import sys; sys.modules['sklearn'] = None; import lowrank; import lowrank.sklearn"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: lowrank.sklearn is built on scikit-learn")
    assert "pip install 'lowrank[sklearn]'" in done.stderr


def test_parameters_are_those_of_scikit_learn_and_two_more():
    theirs, ours = sklearn.kernel_approximation.Nystroem().get_params(), Nystroem().get_params()
    assert {name: ours[name] for name in theirs} == theirs
    assert ours.keys() - theirs.keys() == {"landmarks", "rtol"}


def test_survives_clone_pickle_and_search():
    x = points(60, 3)
    model = Nystroem(gamma=1.0, n_components=20, random_state=0, landmarks=x[:20]).fit(x)
    assert clone(model).get_params().keys() == model.get_params().keys()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).transform(x), model.transform(x))
    search = GridSearchCV(
        make_pipeline(Nystroem(n_components=20, random_state=0), LogisticRegression()),
        {"nystroem__gamma": [1e-4, 2.0], "nystroem__landmarks": ["uniform", "rpcholesky"]},
        cv=3,
    ).fit(x, np.linalg.norm(x - 0.5, axis=1) < 0.48)
    assert search.best_params_["nystroem__gamma"] == 2.0


def test_feature_names_and_pandas():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(points(30, 2), columns=["a", "b"], index=range(100, 130))
    model = Nystroem(n_components=4, random_state=0).set_output(transform="pandas").fit(frame)
    features = model.transform(frame)
    assert list(features.columns) == [f"nystroem{i}" for i in range(4)]
    assert list(features.index) == list(frame.index)
    assert list(model.feature_names_in_) == ["a", "b"]
    assert model.n_features_in_ == 2
    with pytest.raises(ValueError, match="feature names"):
        model.transform(frame[["b", "a"]])


# The same as scikit-learn's, and below K where that is not


@pytest.mark.parametrize("kernel", list(POSITIVE))
def test_the_features_of_scikit_learn(kernel):
    x, parameters = points(60, 40), dict(kernel=kernel, n_components=15, random_state=3, **POSITIVE[kernel])
    theirs, ours = sklearn.kernel_approximation.Nystroem(**parameters).fit(x), Nystroem(**parameters).fit(x)
    np.testing.assert_array_equal(ours.component_indices_, theirs.component_indices_)
    np.testing.assert_array_equal(ours.components_, theirs.components_)
    w = pairwise_kernels(ours.components_, metric=kernel, **POSITIVE[kernel])
    condition = np.linalg.cond(w)
    assert condition < 1e4
    # The shift of 30 eps‖W‖_∞ changes W^{-1/2} by 15 eps·15·κ of its norm.
    tolerance = 15 * EPS[np.float64] * 15 * condition
    np.testing.assert_allclose(
        ours.normalization_, theirs.normalization_, rtol=0, atol=tolerance * np.linalg.norm(theirs.normalization_, 2)
    )
    np.testing.assert_allclose(ours.transform(x), theirs.transform(x), rtol=0, atol=tolerance * np.abs(w).max())
    assert ours.clipped_mass_ == 0


@pytest.mark.parametrize("gamma", [0.5, 5.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_as_good_as_scikit_learn_in_double_and_below_k_in_single(seed, gamma):
    x = np.random.default_rng(seed).standard_normal((1000, 2))
    parameters = dict(gamma=gamma, n_components=300, random_state=seed)
    k = gaussian_gram(x, (2 * gamma) ** -0.5)
    traces = [
        np.trace(k) - np.sum(estimator(**parameters).fit_transform(x) ** 2)
        for estimator in (Nystroem, sklearn.kernel_approximation.Nystroem)
    ]
    # The shift is 1e-12 to 1e-11 here, and scikit-learn cuts off at 1e-12.
    assert 0 <= traces[0] <= 1.5 * traces[1]
    single = x.astype(np.float32)
    k = gaussian_gram(single, (2 * gamma) ** -0.5)
    assert lowest(k, Nystroem(**parameters).fit_transform(single)) >= -1e-6
    # Of the order of √eps = 3.5e-4.
    assert lowest(k, sklearn.kernel_approximation.Nystroem(**parameters).fit_transform(single)) <= -5e-5


HOSTILE = {
    "duplicates": lambda r: np.repeat(r.standard_normal((8, 3)), 10, axis=0),
    "constant columns": lambda r: np.concatenate([r.standard_normal((80, 1)), np.full((80, 2), 3.7)], axis=1),
    "offset 50": lambda r: 50 + r.standard_normal((80, 3)),
    "offset 1e4": lambda r: 1e4 + r.standard_normal((80, 3)),
    "clusters": lambda r: (100 * r.standard_normal((5, 3)))[np.arange(80) % 5] + 0.01 * r.standard_normal((80, 3)),
    "far clusters": lambda r: (1e4 * r.standard_normal((5, 3)))[np.arange(80) % 5] + 1e-3 * r.standard_normal((80, 3)),
    "one point": lambda r: np.full((80, 3), 7.3),
}


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("data", list(HOSTILE))
def test_below_k_on_hostile_data(data, dtype):
    x = HOSTILE[data](np.random.default_rng(0)).astype(dtype)
    for lengthscale in (1e-3, 0.1, 1.0, 30.0, 1e3):
        k = gaussian_gram(x, lengthscale)
        for m in (30, 80):
            features = Nystroem(gamma=0.5 / lengthscale**2, n_components=m, random_state=0).fit_transform(x)
            assert features.dtype == dtype
            # Measured: −1.4 eps in float64, where eigvalsh itself is no better, and 0 in float32.
            assert lowest(k, features) >= -5 * EPS[dtype]
        f = features.astype(np.float64)
        assert np.linalg.norm(k - f @ f.T, 2) <= 80 * EPS[dtype] * np.linalg.norm(k, 2)


@pytest.mark.parametrize("n", [200, 700, 2000])
def test_the_shift_outweighs_the_products(n):
    # One point repeated is where rounding errors add up most. All rows f of F are alike, K = 11ᵀ, and so
    # λ_min(K − FFᵀ) = (1 − ‖f‖²) n. With products in single precision it was −17 eps·‖K‖ at n = 700.
    x = np.full((n, 2), 7.3, dtype=np.float32)
    f = Nystroem(gamma=1.0, n_components=n, random_state=0).fit_transform(x)[0].astype(np.float64)
    assert -5 * EPS[np.float32] <= 1 - f @ f <= 80 * EPS[np.float32]


@all_landmarks
@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("kernel", list(POSITIVE))
def test_exact_when_all_samples_are_landmarks(kernel, sparse, dtype):
    if sparse and kernel == "chi2":
        pytest.skip("scikit-learn's chi2 kernel takes dense data only")
    x = points(40, 6, dtype=dtype)
    k = pairwise_kernels(x.astype(np.float64), metric=kernel, **POSITIVE[kernel])
    model = Nystroem(kernel, n_components=100, random_state=0, **POSITIVE[kernel])
    features = model.fit_transform(scipy.sparse.csr_array(x) if sparse else x)
    assert features.dtype == dtype
    assert features.shape == (40, 40)
    f = features.astype(np.float64)
    # The shift is 30 eps·‖K‖_∞, and scikit-learn's products are good to about d·eps.
    assert np.linalg.norm(f @ f.T - k, 2) <= 80 * EPS[dtype] * np.linalg.norm(k, np.inf)


def test_too_many_components_warn():
    with pytest.warns(UserWarning, match="n_components=50 is more than the 10 samples"):
        Nystroem(n_components=50).fit(points(10, 2))


@pytest.mark.parametrize("kernel", sorted(kernel_metrics()))
def test_every_kernel_of_scikit_learn(kernel):
    x = points(30, 4)
    model = Nystroem(kernel, n_components=5, random_state=0).fit(x)
    features = model.transform(x)
    assert features.shape == (30, 5)
    # On the landmarks themselves F is the positive part of W (up to the shift, which a singular W shows the root of).
    w = pairwise_kernels(model.components_, metric=kernel)
    values, vectors = np.linalg.eigh(w)
    f = features[model.component_indices_]
    expected = vectors @ np.diag(np.maximum(values, 0)) @ vectors.T
    if model.clipped_mass_ == 0:
        np.testing.assert_allclose(f @ f.T, expected, rtol=0, atol=100 * EPS[np.float64] * np.linalg.norm(w, np.inf))
    mass = np.sum(np.abs(values[values < 0])) / np.sum(np.abs(values))
    assert model.clipped_mass_ == pytest.approx(mass, abs=1e-12)
    assert (model.clipped_mass_ > 0.01) == (kernel == "additive_chi2")


def linear(x, y, scale=1.0):
    return scale * float((x @ y.T).sum()) if scipy.sparse.issparse(x) else scale * float(x @ y)


def test_kernels_on_two_rows_and_of_gaussian_processes():
    x = points(20, 6)
    by_name = Nystroem("linear", n_components=5, random_state=0).fit_transform(x)
    parameters = {"scale": 4.0}
    model = Nystroem(linear, kernel_params=parameters, n_components=5, random_state=0)
    # Features near the null directions of W are roots of rounding errors, so that products are compared.
    tolerance = dict(rtol=0, atol=1e-11)
    np.testing.assert_allclose(model.fit_transform(x), 2 * by_name, **tolerance)
    np.testing.assert_allclose(model.fit_transform(scipy.sparse.csr_array(x)), 2 * by_name, **tolerance)
    assert parameters == {"scale": 4.0}
    process = Nystroem(ConstantKernel(2.0) * RBF(0.5), n_components=5, random_state=0).fit_transform(x)
    by_name = Nystroem(gamma=2.0, n_components=5, random_state=0).fit_transform(x)
    np.testing.assert_allclose(process, np.sqrt(2.0) * by_name, **tolerance)


def test_named_parameters_leave_the_dictionary_alone():
    parameters = {"coef0": 2.0}
    model = Nystroem("poly", gamma=0.5, degree=2, kernel_params=parameters, n_components=5).fit(points(20, 3))
    assert parameters == {"coef0": 2.0}
    x = model.components_
    k = (0.5 * x @ x.T + 2.0) ** 2
    f = model.transform(x)
    np.testing.assert_allclose(f @ f.T, k, rtol=0, atol=60 * EPS[np.float64] * np.linalg.norm(k, np.inf))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("landmarks", ["uniform", "rpcholesky", [3, 1, 25]])
def test_a_precomputed_kernel(landmarks, sparse):
    x, new = points(30, 3), points(7, 3, seed=1)
    k, k_new = gaussian_gram(np.concatenate([x, new])), None
    k, k_new = k[:30, :30], k[30:, :30]
    if sparse:
        k, k_new = scipy.sparse.csr_array(k), scipy.sparse.csr_array(k_new)
    precomputed = Nystroem("precomputed", n_components=6, random_state=0, landmarks=landmarks).fit(k)
    pivots = precomputed.component_indices_
    assert precomputed.components_.shape == (len(pivots), 30)
    by_name = Nystroem(gamma=0.5, landmarks=x[pivots]).fit(x)
    # W has a condition number of up to 1e4, which the rounding errors of K and of its root are multiplied by.
    np.testing.assert_allclose(precomputed.transform(k_new), by_name.transform(new), rtol=0, atol=1e-9)
    assert precomputed.__sklearn_tags__().input_tags.pairwise
    assert not by_name.__sklearn_tags__().input_tags.pairwise


# Kernels that are not positive semidefinite


def indefinite(values, seed=0):
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))[0]
    k = (q * values) @ q.T
    return (k + k.T) / 2, (q * np.maximum(values, 0)) @ q.T, (q * np.abs(values)) @ q.T


@pytest.mark.parametrize("dtype", list(EPS))
def test_the_positive_part_of_a_prescribed_spectrum(dtype):
    values = np.asarray([4.0, 2.0, 1.0, 0.5, 1e-3, -0.25, -0.25])
    k, positive, absolute = indefinite(values)
    model = Nystroem("precomputed", landmarks=list(range(7))).fit(k.astype(dtype))
    f = model.transform(k.astype(dtype)).astype(np.float64)
    # The shift, and K rounded to the dtype: 30 eps‖K‖_∞ with ‖K‖_∞ ≤ √7·4, eight times over for the eigenvalue 1e-3.
    np.testing.assert_allclose(f @ f.T, positive, rtol=0, atol=8 * 30 * EPS[dtype] * 4 * np.sqrt(7))
    assert model.clipped_mass_ == pytest.approx(0.5 / np.sum(np.abs(values)), rel=100 * float(EPS[dtype]))
    # scikit-learn's singular values know no sign.
    theirs = sklearn.kernel_approximation.Nystroem("precomputed", n_components=7, random_state=0).fit_transform(k)
    np.testing.assert_allclose(theirs @ theirs.T, absolute, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kernel", list(INDEFINITE))
def test_the_positive_part_of_a_named_kernel(kernel):
    x = points(25, 4)
    k = pairwise_kernels(x, metric=kernel, **INDEFINITE[kernel])
    values, vectors = np.linalg.eigh(k)
    assert values[0] < -0.1
    model = Nystroem(kernel, n_components=25, random_state=0, **INDEFINITE[kernel])
    f = model.fit_transform(x)
    positive = (vectors * np.maximum(values, 0)) @ vectors.T
    # Eigenvalues within the shift of zero may go either way, and a few of them are as large as the shift.
    np.testing.assert_allclose(f @ f.T, positive, rtol=0, atol=25 * 30 * EPS[np.float64] * np.linalg.norm(k, np.inf))
    assert model.clipped_mass_ == pytest.approx(np.sum(np.maximum(-values, 0)) / np.sum(np.abs(values)), abs=1e-9)


# Landmarks


def test_landmarks_of_every_kind():
    x = points(200, 2)
    centres = KMeans(10, n_init=1, random_state=0).fit(x).cluster_centers_
    given = Nystroem(gamma=4.0, landmarks=centres).fit(x)
    np.testing.assert_array_equal(given.components_, centres)
    assert given.component_indices_ is None
    assert given.transform(x).shape == (200, 10)

    seen = {}

    def rule(x, /, *, rank, kernel, rng):
        seen.update(shape=x.shape, rank=rank, block=kernel(x[:3], x[:2]), drawn=rng.random())
        each = x[:, None, :]
        seen["diagonal"] = kernel(each, each)[:, 0, 0]
        return np.arange(rank)

    chosen = Nystroem("linear", n_components=3, landmarks=rule, random_state=0).fit(x)
    np.testing.assert_array_equal(chosen.component_indices_, [0, 1, 2])
    assert (seen["shape"], seen["rank"]) == ((200, 2), 3)
    np.testing.assert_allclose(seen["block"], x[:3] @ x[:2].T, rtol=1e-15)
    np.testing.assert_allclose(seen["diagonal"], np.sum(x * x, axis=1), rtol=1e-15)
    first = seen["drawn"]
    chosen.fit(x)
    assert seen["drawn"] == first

    listed = Nystroem(gamma=4.0, landmarks=lambda x, /, **_: centres.tolist()).fit(x)
    np.testing.assert_array_equal(listed.components_, centres)
    indices = Nystroem(landmarks=[7, 3], n_components=100).fit(x)
    np.testing.assert_array_equal(indices.components_, x[[7, 3]])
    means = Nystroem(landmarks="segment_means", n_components=4).fit(x)
    np.testing.assert_allclose(means.components_, x.reshape(4, 50, 2).mean(axis=1), rtol=1e-14)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("kernel", ["rbf", "linear", "callable"])
def test_the_rank_is_adaptive(kernel, sparse):
    x = points(120, 3)
    k = gaussian_gram(x, 1.0) if kernel == "rbf" else x @ x.T
    ours = {"rbf": {"gamma": 0.5}, "linear": {"kernel": "linear"}, "callable": {"kernel": linear}}[kernel]
    data = scipy.sparse.csr_array(x) if sparse else x
    ranks = {}
    for rtol in (0.3, 1e-4):
        model = Nystroem(landmarks="rpcholesky", rtol=rtol, n_components=100, random_state=0, **ours).fit(data)
        f = model.transform(data)
        assert np.trace(k) - np.sum(f * f) <= rtol * np.trace(k) * (1 + 1e-9)
        ranks[rtol] = f.shape[1]
        assert len(model.get_feature_names_out()) == f.shape[1]
        if kernel != "rbf":
            assert f.shape[1] <= 3
    assert ranks[0.3] < ranks[1e-4] < 60


def test_sparse_data_give_the_features_of_dense_data():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(40, 30)) * (rng.uniform(size=(40, 30)) < 0.2)
    model = Nystroem(gamma=0.2, n_components=10, random_state=0)
    dense, sparse = model.fit_transform(x), model.fit_transform(scipy.sparse.csr_array(x))
    assert scipy.sparse.issparse(model.components_)
    np.testing.assert_allclose(sparse, dense, rtol=0, atol=1e-12)
    by_points = Nystroem(gamma=0.2, landmarks=model.components_).fit(x)
    np.testing.assert_allclose(by_points.transform(scipy.sparse.csr_array(x)), dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.int64, np.float16, bool])
def test_other_dtypes_are_computed_in_floating_point(dtype):
    x = (10 * points(20, 3)).astype(dtype)
    features = Nystroem("linear", n_components=4, random_state=0).fit_transform(x)
    assert features.dtype == (np.float32 if dtype == np.float16 else np.float64)


# Other arrays


@pytest.fixture
def arrays(xp):
    if xp.name in ("jax", "numpy-read-only"):
        pytest.skip("not an array that scikit-learn dispatches to")
    with sklearn.config_context(array_api_dispatch=True):
        yield xp


@dispatched
@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("landmarks", ["uniform", "rpcholesky", "segment_means"])
def test_dispatched_features(arrays, landmarks, dtype):
    x = points(50, 3, dtype=dtype)
    x_ = arrays.asarray(x)
    model = Nystroem(gamma=20.0, n_components=8, random_state=0, landmarks=landmarks)
    f = arrays.check(model.fit(x_).transform(x_), like=x_, shape=(50, 8)).astype(np.float64)
    arrays.check(model.components_, like=x_, shape=(8, 3))
    arrays.check(model.normalization_, like=x_, shape=(8, 8))
    expected = Nystroem(gamma=20.0, landmarks=to_host(model.components_)).fit(x).transform(x).astype(np.float64)
    w = gaussian_gram(to_host(model.components_), 40.0**-0.5)
    np.testing.assert_allclose(f @ f.T, expected @ expected.T, rtol=0, atol=30 * EPS[dtype] * np.linalg.cond(w))
    assert lowest(gaussian_gram(x, 40.0**-0.5), f) >= -5 * EPS[dtype]


@dispatched
@pytest.mark.parametrize("targets", [(), (2,)])
def test_dispatched_ridge(arrays, targets):
    x = points(50, 3)
    y, weights = np.sin(4 * x[:, 0]), points(50, 1)[:, 0]
    y = np.stack([y, 2 * y], axis=1) if targets else y
    model = NystroemRidge(1e-3, gamma=1.0, n_components=8, random_state=0)
    expected = model.fit(x, y, weights).predict(x, return_std=True)
    x_ = arrays.asarray(x)
    result = model.fit(x_, arrays.asarray(y), arrays.asarray(weights)).predict(x_, return_std=True)
    for got, wanted in zip(result, expected, strict=True):
        got = arrays.check(got, like=x_, shape=(50, *targets))
        # Both are good to eps·λ_max/α with λ_max of about 50.
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-9)
    model.partial_fit(x_, arrays.asarray(y))
    with pytest.raises(ValueError, match=r"NystroemRidge.predict\(\) must use the same namespace"):
        model.predict(x) if arrays.name != "numpy" else model.predict(torch.asarray(x))


# Ridge


@pytest.fixture
def curve():
    x = np.random.default_rng(0).uniform(-3, 3, size=(80, 1))
    y = np.sin(2 * x[:, 0]) + 0.1 * np.random.default_rng(1).standard_normal(80)
    return x, y, np.linspace(-6, 6, 50)[:, None]


@pytest.mark.parametrize("landmarks", ["uniform", "rpcholesky"])
def test_the_exact_ridge_and_gaussian_process(curve, landmarks):
    x, y, new = curve
    y = np.stack([y, x[:, 0]], axis=1)
    model = NystroemRidge(0.01, gamma=0.5, n_components=80, landmarks=landmarks, random_state=0).fit(x, y)
    mean, std = model.predict(new, return_std=True)
    exact = KernelRidge(alpha=0.01, kernel="rbf", gamma=0.5).fit(x, y)
    process = GaussianProcessRegressor(RBF(1.0), alpha=0.01, optimizer=None).fit(x, y)
    # What is left of K at the data, R = K − FFᵀ, has ‖R‖ ≤ 60 eps·‖K‖_∞; at new points, where k(x, x) = 1, a row of it
    # has the norm √‖R‖ at most, and predictions are its products with the dual coefficients.
    left = np.sqrt(60 * EPS[np.float64] * np.linalg.norm(gaussian_gram(x), np.inf))
    tolerance = left * np.linalg.norm(exact.dual_coef_)
    assert tolerance < 1e-4
    np.testing.assert_allclose(mean, exact.predict(new), rtol=0, atol=tolerance)
    exact_mean, exact_std = process.predict(new, return_std=True)
    np.testing.assert_allclose(mean, exact_mean, rtol=0, atol=tolerance)
    # The variance has k(x, X)(K + α)⁻¹ in the place of the dual coefficients, of norm 1/(2√α) at most.
    np.testing.assert_allclose(std**2, exact_std**2, rtol=0, atol=left / np.sqrt(0.01))
    assert std.shape == mean.shape == (50, 2)
    assert model.coef_.shape[0] == 2
    assert model.score(x, y) > 0.95


@pytest.mark.parametrize("weighted", [False, True])
def test_the_deterministic_training_conditional(curve, weighted):
    x, y, new = curve
    alpha, w = 0.05, (points(80, 1, seed=2)[:, 0] if weighted else np.ones(80))
    model = NystroemRidge(alpha, gamma=0.5, landmarks=np.linspace(-3, 3, 9)[:, None])
    model.fit(x, y, w if weighted else None)
    mean, std = model.predict(new, return_std=True)
    # As Quiñonero-Candela & Rasmussen write it: Σ = (K_uf Λ⁻¹ K_fu + K_uu)⁻¹ with noise Λ = α/w.
    z = model.components_
    k_uu, k_uf, k_us = (pairwise_kernels(z, b, metric="rbf", gamma=0.5) for b in (z, x, new))
    sigma = np.linalg.inv((k_uf * w / alpha) @ k_uf.T + k_uu)
    expected = k_us.T @ sigma @ (k_uf * w / alpha) @ y
    variance = 1 - np.sum(k_us * np.linalg.solve(k_uu, k_us), axis=0) + np.sum(k_us * (sigma @ k_us), axis=0)
    assert np.linalg.cond(k_uu) < 1e6
    # eps times the condition numbers of K_uu and of the solution, 80/0.05 more.
    np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(std**2, variance, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", list(EPS))
def test_far_from_the_data_nothing_is_known(curve, dtype):
    x, y, _ = (a.astype(dtype) for a in curve)
    model = NystroemRidge(1e-3, gamma=0.5, n_components=10, random_state=0).fit(x, y)
    mean, std = model.predict(np.asarray([[0.0], [30.0]], dtype=dtype), return_std=True)
    assert mean.dtype == std.dtype == dtype
    assert std[0] < 0.3
    assert std[1] == pytest.approx(1.0, abs=1e-6)
    assert mean[1] == pytest.approx(0.0, abs=1e-6)


def test_a_function_within_the_span_is_recovered_without_a_ridge():
    # Well-conditioned features: y = φ(x)·c is fitted exactly, up to eps·κ(FᵀF).
    x = points(200, 30)
    features = Nystroem("linear", n_components=10, random_state=0).fit_transform(x)
    c = np.arange(10.0)
    model = NystroemRidge(0.0, kernel="linear", n_components=10, random_state=0).fit(x, features @ c)
    tolerance = 100 * EPS[np.float64] * np.linalg.cond(features) ** 2 * np.linalg.norm(c)
    assert tolerance < 1e-8
    np.testing.assert_allclose(model.coef_, c, rtol=0, atol=tolerance)


def test_chunks_are_the_whole(curve, monkeypatch):
    x, y, new = curve
    w = points(80, 1, seed=2)[:, 0]
    z = x[:12]
    whole = NystroemRidge(0.01, gamma=0.5, landmarks=z).fit(x, y, w)
    chunked = NystroemRidge(0.01, gamma=0.5, landmarks=z)
    for rows in (slice(0, 5), slice(5, 60), slice(60, 80)):
        assert chunked.partial_fit(x[rows], y[rows], w[rows]) is chunked
    assert chunked.n_samples_seen_ == whole.n_samples_seen_ == 80
    # eps·λ_max/α = 2e-16·80/0.01, and the features' own condition number of the same size.
    tolerance = dict(rtol=0, atol=1e-9)
    np.testing.assert_allclose(chunked.predict(new), whole.predict(new), **tolerance)
    monkeypatch.setattr("lowrank._kernel_features._CHUNK_ENTRIES", 12 * 7)
    streamed = clone(whole).fit(x, y, w)
    for got, wanted in zip(streamed.predict(new, True), whole.predict(new, True), strict=True):
        np.testing.assert_allclose(got, wanted, **tolerance)
    chosen = NystroemRidge(0.01, gamma=0.5, n_components=8, random_state=0).partial_fit(x[:30], y[:30])
    before = chosen.components_
    assert chosen.partial_fit(x[30:], y[30:]).components_ is before
    again = NystroemRidge(0.01, gamma=0.5, landmarks=before).fit(x, y)
    np.testing.assert_allclose(chosen.predict(new), again.predict(new), **tolerance)


def test_a_weight_is_a_number_of_repetitions(curve):
    x, y, new = curve
    w = np.random.default_rng(0).integers(0, 4, size=80)
    model = NystroemRidge(0.01, gamma=0.5, landmarks=x[:10])
    weighted = model.fit(x, y, w).predict(new, return_std=True)
    repeated = model.fit(np.repeat(x, w, axis=0), np.repeat(y, w)).predict(new, return_std=True)
    for got, wanted in zip(weighted, repeated, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-8)


def test_the_variance_of_kernels_without_a_constant_diagonal(curve):
    x, y, new = curve

    def product(a, b):
        return float(a @ b) + 1.0

    parameters = dict(n_components=3, random_state=0)
    named = NystroemRidge(0.1, kernel="poly", gamma=1.0, coef0=1.0, degree=1, **parameters).fit(x, y)
    called = NystroemRidge(0.1, kernel=product, **parameters).fit(x, y)
    _, std = named.predict(new, return_std=True)
    # Two features, a line: the exact posterior of a Bayesian linear regression.
    a, b = np.concatenate([np.ones((80, 1)), x], axis=1), np.concatenate([np.ones((50, 1)), new], axis=1)
    exact = 0.1 * np.sum(b * np.linalg.solve(a.T @ a + 0.1 * np.eye(2), b.T).T, axis=1)
    np.testing.assert_allclose(std**2, exact, rtol=0, atol=1e-11)
    np.testing.assert_allclose(called.predict(new, return_std=True)[1] ** 2, exact, rtol=0, atol=1e-11)
    gaussian = NystroemRidge(0.1, kernel=ConstantKernel(4.0) * RBF(0.3), **parameters).fit(x, y)
    assert gaussian.predict(np.asarray([[50.0]]), return_std=True)[1] == pytest.approx(2.0)


# Bad input


def raises(exception, match):
    return pytest.raises(exception, match=match)


def test_bad_landmarks():
    x = points(20, 3)
    for landmarks, message in [
        ([0, 20], "rows 0 to 20 and X has the rows 0 to 19"),
        ([-1], "rows -1 to -1"),
        ([0.5, 1.5], "neither integer indices nor points"),
        ([], "there are no landmarks"),
        (x[:4, :2], "landmarks have 2 features and X .* has 3"),
        (np.full((2, 3), np.nan), "landmarks contains NaN"),
    ]:
        with raises(ValueError, message):
            Nystroem(landmarks=landmarks).fit(x)
    with raises(ValueError, "must be indices"):
        Nystroem("precomputed", landmarks=x).fit(gaussian_gram(x))
    with raises(ValueError, "averages dense points"):
        Nystroem(landmarks="segment_means", n_components=3).fit(scipy.sparse.csr_array(x))
    with raises(ValueError, "'landmarks' parameter"):
        Nystroem(landmarks="greedy").fit(x)
    with raises(ValueError, "rtol=0.1 is reached by landmarks='rpcholesky'"):
        Nystroem(rtol=0.1, n_components=3).fit(x)


def test_a_kernel_matrix_of_zeros_has_features_of_zero():
    features = Nystroem("linear", landmarks="rpcholesky", n_components=3).fit_transform(np.zeros((20, 3)))
    assert features.shape == (20, 1)
    assert np.all(features == 0)


def test_bad_kernels():
    x = points(20, 3)
    with raises(ValueError, "must be square, not"):
        Nystroem("precomputed", n_components=3).fit(x)
    skewed = gaussian_gram(x)
    skewed[0, 1] += 0.1
    with raises(ValueError, "the kernel is not symmetric: .* by 0.1"):
        Nystroem("precomputed", landmarks=[0, 1, 2]).fit(skewed)
    with raises(ValueError, "returned NaN or infinite values"):
        Nystroem(lambda a, b: float("nan"), n_components=3).fit(x)
    for kernel in ("precomputed", linear):
        with raises(ValueError, "Don't pass gamma, coef0 or degree to NystroemRidge with a"):
            NystroemRidge(kernel=kernel, gamma=1.0).fit(gaussian_gram(x), x)


def test_bad_ridges(curve):
    x, y, _ = curve
    with raises(ValueError, "alpha=0.0 leaves the coefficients undetermined: of 5 features the data have rank 1"):
        NystroemRidge(0.0, n_components=5).fit(np.ones((20, 1)), np.ones(20))
    with raises(ValueError, "Negative values in data passed to `sample_weight`"):
        NystroemRidge(n_components=5).fit(x, y, -np.ones(80))
    model = NystroemRidge(n_components=5).fit(x, y)
    coefficients = model.coef_
    with raises(ValueError, r"y has shape \(80, 2\); in the first chunk a sample had targets of shape \(\)"):
        model.partial_fit(x, np.stack([y, y], axis=1))
    assert model.coef_ is coefficients
    k = gaussian_gram(x)
    with raises(ValueError, "precomputed kernel does not tell"):
        NystroemRidge(kernel="precomputed", n_components=5).fit(k, y).predict(k, return_std=True)
    positive = np.abs(x)
    with raises(ValueError, "not positive semidefinite: .* was clipped"):
        NystroemRidge(kernel="additive_chi2", n_components=5).fit(positive, y).predict(positive, return_std=True)


# Examples


def run_example(name, folder, *options):
    script = Path(__file__).parents[1] / "examples" / f"{name}.py"
    command = [sys.executable, "-W", "error", str(script), *options, "--output", str(folder)]
    path = os.pathsep.join(filter(None, [str(Path(lowrank.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return done.stdout.splitlines()


def test_kernel_pca(tmp_path):
    *_, last = run_example("kernel_pca", tmp_path, "--quick")
    _, variance, exact, correlation = (float(word) for word in last.split())
    # tr(K − FFᵀ)/n is 0.01 at most, and so is what any variance loses.
    assert exact - 0.01 <= variance <= exact
    assert correlation > 0.99


def test_spectral_clustering(tmp_path):
    _, spectral, plain = run_example("spectral_clustering", tmp_path, "--quick")
    assert float(spectral.split()[-1]) > 0.99
    assert float(plain.split()[-1]) < 0.1
