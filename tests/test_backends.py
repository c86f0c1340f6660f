"""Every public function of arrays on every array library, plain and inside their transformations: does it say there
what it says of NumPy arrays in double precision?

tests/record_backends.py keeps what came out, and the documentation shows it as a table. What is refused in a traced
program is named here: a function that learns to do it fails its test, and its row changes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import array_api_compat
import dask.array as da
import numpy as np
import pytest
from conftest import from_spectrum

import lowrank
from lowrank import dask as chunked
from lowrank._array import to_host, widest_real

KERNEL = partial(lowrank.gaussian_kernel, lengthscale=2.0)
RIDGE = 0.1


def data() -> dict[str, np.ndarray]:
    """Two batch elements of everything: points x, landmarks y, their values, and matrices of condition 4."""
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((2, 40, 3)),
        "y": rng.standard_normal((2, 9, 3)),
        "at_x": rng.standard_normal((2, 40, 2)),
        "at_y": rng.standard_normal((2, 9, 2)),
        "tall": np.stack([from_spectrum(np.linspace(1.0, 4.0, 5), 8, 5, seed=seed)[0] for seed in (0, 1)]),
    }


def factored(a: dict[str, Any]) -> lowrank.LowRank:
    return lowrank.nystrom(a["x"], kernel=KERNEL, landmarks=a["y"])


# The largest condition that a result may feel. Of k(y, y): 5e2. Of F Fᵀ + ridge: trace over ridge, 40/0.1.
CORE, RIDGED = 5e2, 4e2


@dataclass(frozen=True)
class Case:
    """A function of the arrays above: of the whole batch, or of one element where ``single`` says so."""

    function: Callable[[dict[str, Any]], Any]
    condition: float = 1.0
    single: bool = False
    traced: bool = True  # may be part of a traced program


CASES = {
    "squared_distances": Case(lambda a: lowrank.squared_distances(a["x"], a["y"])),
    "gaussian_kernel": Case(lambda a: KERNEL(a["x"], a["y"])),
    "laplacian_kernel": Case(lambda a: lowrank.laplacian_kernel(a["x"], a["y"], lengthscale=2.0)),
    "matern32_kernel": Case(lambda a: lowrank.matern32_kernel(a["x"], a["y"], lengthscale=2.0)),
    "matern52_kernel": Case(lambda a: lowrank.matern52_kernel(a["x"], a["y"], lengthscale=2.0)),
    "gaussian_matmul": Case(lambda a: lowrank.gaussian_matmul(a["x"], a["y"], a["at_y"], lengthscale=2.0)),
    "median_lengthscale": Case(lambda a: lowrank.median_lengthscale(a["x"]), single=True, traced=False),
    "pinv_newton": Case(lambda a: lowrank.pinv_newton(a["tall"]), 4.0),
    "pinv_newton, ridge": Case(
        lambda a: lowrank.pinv_newton(KERNEL(a["y"], a["y"]), hermitian=True, ridge=RIDGE), 9 / RIDGE
    ),
    "pinv_newton, steps": Case(lambda a: lowrank.pinv_newton(a["tall"], steps=12), 4.0),
    "pinv_newton, direct": Case(lambda a: lowrank.pinv_newton(a["tall"], method="direct"), 4.0),
    "uniform": Case(lambda a: lowrank.uniform(a["x"], rank=8, rng=0), single=True),
    "segment_means": Case(lambda a: lowrank.segment_means(a["x"], rank=8, kernel=KERNEL)),
    "rpcholesky": Case(lambda a: lowrank.rpcholesky(a["x"], rank=8, kernel=KERNEL, rng=0), single=True, traced=False),
    "nystrom, points": Case(lambda a: factored(a).to_dense(), CORE),
    "nystrom, rpcholesky": Case(
        lambda a: lowrank.nystrom(a["x"], kernel=KERNEL, landmarks="rpcholesky", rank=8, rng=0).to_dense(),
        CORE,
        single=True,
        traced=False,
    ),
    "LowRank @ v": Case(lambda a: factored(a) @ a["at_x"], CORE),
    "LowRank.diagonal": Case(lambda a: factored(a).diagonal(), CORE),
    "LowRank.solve": Case(lambda a: factored(a).solve(a["at_x"], ridge=RIDGE), RIDGED),
    "LowRank.logdet": Case(lambda a: factored(a).logdet(ridge=RIDGE), RIDGED),
    "LowRank.eigh": Case(lambda a: factored(a).eigh()[0], CORE),
    "LowRank.features": Case(lambda a: factored(a).features(a["y"]), CORE),
    "LowRank.truncate": Case(lambda a: factored(a).truncate(rank=4).to_dense(), CORE),
    "LowRank.certificate": Case(
        # A tenth of the trace is left. (Which columns are drawn depends on the order of equal entries of the diagonal.)
        lambda a: factored(a).certificate(a["x"], rng=0).trace,
        10 * CORE,
        single=True,
        traced=False,
    ),
    "kernel_ridge": Case(
        lambda a: lowrank.kernel_ridge(a["x"], a["at_x"], kernel=KERNEL, ridge=RIDGE, rank=9, rng=0).predict(a["y"]),
        RIDGED,
        single=True,
        traced=False,
    ),
    "softmax_free_attention": Case(
        lambda a: lowrank.softmax_free_attention(a["x"], a["at_x"], a["y"], ridge=RIDGE), 9 / RIDGE
    ),
    "softmax_free_attention, queries": Case(
        lambda a: lowrank.softmax_free_attention(a["x"], a["at_x"], a["y"], ridge=RIDGE, queries=a["y"]), 9 / RIDGE
    ),
    "softmax_free_attention, normalize": Case(
        lambda a: lowrank.softmax_free_attention(a["x"], a["at_x"], a["y"], ridge=RIDGE, normalize=True), 9 / RIDGE
    ),
}


@dataclass(frozen=True)
class Way:
    """A library and a dtype of it, the transformation that a function goes through, and where it computes."""

    library: str
    dtype: str = "float64"
    transformation: str | None = None
    device: str | None = None

    def arrays(self, values: dict[str, np.ndarray]) -> dict[str, Any]:
        module = importlib.import_module(self.library)
        options = {} if self.device is None else {"device": self.device}
        return {name: module.asarray(np.array(v, dtype=self.dtype), **options) for name, v in values.items()}

    def transform(self, function: Callable) -> Callable:
        if self.transformation is None:
            return function
        module, name = self.transformation.split(".")
        return getattr(importlib.import_module(module), name)(function)


WAYS = {
    "NumPy": Way("numpy"),
    "NumPy, float32": Way("numpy", "float32"),
    "array-api-strict": Way("array_api_strict"),
    "torch": Way("torch"),
    "torch, float32": Way("torch", "float32"),
    "torch.vmap": Way("torch", transformation="torch.vmap"),
    "JAX": Way("jax.numpy"),
    "JAX, float32": Way("jax.numpy", "float32"),
    "jax.jit": Way("jax.numpy", transformation="jax.jit"),
    "jax.vmap": Way("jax.numpy", transformation="jax.vmap"),
    "CuPy": Way("cupy"),
    "torch on CUDA": Way("torch", device="cuda"),
}
# A hundred roundings, each of which the condition may magnify.
ROUNDINGS = 100


@pytest.fixture(params=list(WAYS))
def way(request) -> Way:
    chosen = WAYS[request.param]
    on_cuda = chosen.library == "cupy" or chosen.device == "cuda"
    if on_cuda and not importlib.import_module("torch").cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return chosen


def element(values: dict[str, Any], i: int) -> dict[str, Any]:
    return {name: v[i, ...] for name, v in values.items()}


def expected(case: Case, mapped: bool) -> np.ndarray:
    values = data()
    if mapped:
        return np.stack([np.asarray(case.function(element(values, i))) for i in (0, 1)])
    return np.asarray(case.function(element(values, 0) if case.single else values))


@pytest.mark.parametrize("name", CASES)
def test_it_says_the_same(name, way, record_property):
    case, mapped = CASES[name], (way.transformation or "").endswith("vmap")
    function, arrays = way.transform(case.function), way.arrays(data())
    if case.single and not mapped:
        arrays = element(arrays, 0)
    if way.transformation is not None and not case.traced:
        with pytest.raises(TypeError, match=r"traced|numbers|values"):
            function(arrays)
        record_property("said", "refused")
        return
    result, right = function(arrays), expected(case, mapped)
    if array_api_compat.is_array_api_obj(result):
        like = arrays["x"]
        assert array_api_compat.array_namespace(result) is array_api_compat.array_namespace(like)
        assert array_api_compat.device(result) == array_api_compat.device(like)
        result = to_host(result)
    result = np.asarray(result)
    assert result.shape == right.shape
    if right.dtype.kind == "i":
        np.testing.assert_array_equal(result, right)
        record_property("said", "equal")
        return
    error = float(np.max(np.abs(result - right)) / np.max(np.abs(right)))
    assert error <= ROUNDINGS * case.condition * np.finfo(way.dtype).eps
    record_property("said", f"{error:.0e}" if error else "0")


# Functions of x in chunks of rows, and their condition. The ridge fit of Dask arrays is that of the features alone.
DASK = {
    "nystrom, points": (lambda x, a: _chunked(x, a).factor @ _chunked(x, a).factor.T, CORE),
    "LowRank.features": (lambda x, a: _chunked(x, a).features(a["y"]), CORE),
    "dask.ridge": (
        lambda x, a: chunked.ridge(
            x, da.from_array(a["at_x"], chunks=(7, 2)), kernel=KERNEL, landmarks=a["y"], ridge=RIDGE
        ).predict(a["y"]),
        RIDGED,
    ),
}


def _chunked(x: da.Array, a: dict[str, np.ndarray]) -> chunked.ChunkedLowRank:
    return chunked.nystrom(x, kernel=KERNEL, landmarks=a["y"])


@pytest.mark.parametrize("name", DASK)
def test_dask_says_the_same(name, record_property):
    function, condition = DASK[name]
    a = element(data(), 0)
    result = np.asarray(function(da.from_array(a["x"], chunks=(7, 3)), a))
    if name in CASES:
        right = CASES[name].function(a)
    else:
        f = factored(a)
        gram = f.factor.T @ f.factor + RIDGE * np.eye(f.rank)
        right = f.features(a["y"]) @ np.linalg.solve(gram, f.factor.T @ a["at_x"])
    error = float(np.max(np.abs(result - right)) / np.max(np.abs(right)))
    assert error <= ROUNDINGS * condition * np.finfo(np.float64).eps
    record_property("said", f"{error:.0e}" if error else "0")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_torchs_default_dtype_does_not_matter(name, dtype):
    import torch

    case, arrays = CASES[name], Way("torch", dtype).arrays(data())
    results = []
    for default in (torch.float64, torch.float32):  # the last is torch's own
        torch.set_default_dtype(default)
        results.append(case.function(element(arrays, 0) if case.single else arrays))
    wide, usual = results
    if isinstance(usual, torch.Tensor):
        assert wide.dtype == usual.dtype
    np.testing.assert_array_equal(np.asarray(wide), np.asarray(usual))


def test_devices_without_double_precision_get_none():
    strict = pytest.importorskip("array_api_strict", minversion="2.5")
    for name, widest in (("CPU_DEVICE", strict.float64), ("no_float64", strict.float32)):
        x = strict.ones(2, dtype=strict.float32, device=strict.Device(name))
        assert widest_real(x, strict) == widest


def test_every_public_function_of_arrays_is_here():
    of_arrays = {name for name in lowrank.__all__ if name[0].islower()} - {"newton_schedule"}  # which is of numbers
    assert {name.split(",")[0] for name in CASES} >= of_arrays
