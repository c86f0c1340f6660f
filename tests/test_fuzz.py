"""Every public function on whatever arrays there are: any shape, stride, dtype, scale, NaN and infinity.

What must hold of all: an answer has the library, dtype and shape that are promised; only TypeError and ValueError are
raised, and with a message; a finite input of moderate size gives finite results, and what is not finite stays where the
docstring says. The short run is part of the suite; ``-m slow`` is the long one of 10⁵ cases, with a new seed each time,
which hypothesis prints on failure.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import array_api_compat
import dask
import dask.array as da
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lowrank
from lowrank import dask as chunked
from lowrank._array import to_host
from lowrank.nn import SoftmaxFreeAttention, gaussian_attention
from lowrank.sklearn import Nystroem, NystroemRidge

CASES = 100_000
REAL = ("float16", "float32", "float64")
EXPONENT = {"float16": 1, "float32": 10, "float64": 60, "complex64": 10, "complex128": 60}  # of moderate sizes


class Arrays:
    """Arrays of one library and dtype, and whether all so far were finite and of moderate size."""

    def __init__(self, draw: Callable[[Any], Any], *, dtypes=REAL, libraries=("numpy", "torch")):
        self.draw = draw
        self.dtype, self.library = draw(st.sampled_from(dtypes)), draw(st.sampled_from(libraries))
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        self.tame = True

    def of(self, *shape: int, scale: bool = True, poison: bool = True) -> Any:
        x = self.rng.standard_normal(shape)
        if self.dtype.startswith("complex"):
            x = x + 1j * self.rng.standard_normal(shape)
        x = x.astype(self.dtype)
        usual = EXPONENT[self.dtype]
        if scale and (e := self.draw(st.sampled_from((0, 0, 0, -usual, usual, -4 * usual, 4 * usual)))):
            self.tame &= abs(e) <= usual
            with np.errstate(over="ignore", under="ignore"):
                x = (x * 10.0**e).astype(self.dtype)
        if x.size and self.draw(st.integers(0, 5)) == 0:  # ties and repetition
            x = np.round(x)
        if poison and x.size and self.draw(st.integers(0, 7)) == 0:
            x.reshape(-1)[self.rng.integers(x.size)] = self.draw(st.sampled_from((np.nan, np.inf, -np.inf)))
        self.tame &= bool(np.isfinite(x).all())
        return self.laid_out(x)

    def laid_out(self, x: np.ndarray) -> Any:
        """The same values, with strides of some kind."""
        way = self.draw(st.sampled_from(("plain", "transposed", "reversed", "spread", "read-only")))
        if way == "transposed" and x.ndim > 1:
            x = np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)
        elif way == "reversed" and x.ndim and self.library == "numpy":
            x = np.ascontiguousarray(x[::-1])[::-1]
        elif way == "spread" and x.ndim:
            x = np.repeat(x, 2, axis=-1)[..., ::2]
        if self.library == "torch":
            return torch.from_numpy(x.copy(order="K") if x.flags.writeable else x.copy())
        if way == "read-only":
            x = x.copy()
            x.flags.writeable = False
        return x


def check(result: Any, like: Any, shape: tuple[int, ...], *, finite: bool) -> np.ndarray:
    assert array_api_compat.array_namespace(result) is array_api_compat.array_namespace(like)
    assert result.dtype == like.dtype
    assert array_api_compat.device(result) == array_api_compat.device(like)
    assert tuple(result.shape) == shape
    values = to_host(result)
    if finite:
        assert np.isfinite(values).all()
    return values


def attempt(function: Callable[[], Any], *, lines: int = 1) -> Any:
    """The result, or None where the function refuses in its own words, of so many lines."""
    try:
        return function()
    except (TypeError, ValueError) as error:
        message = str(error)
    assert len(message) > 15, message
    assert len(message.splitlines()) <= lines, message
    return None


def batch(draw) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(0, 3), max_size=2)))


def size(draw, least: int = 0, most: int = 9) -> int:
    return draw(st.integers(least, most))


def pinv(draw) -> None:
    arrays = Arrays(draw, dtypes=(*REAL, "complex64", "complex128"))
    lead, m, n = batch(draw), size(draw), size(draw)
    a = arrays.of(*lead, m, n)
    how = draw(st.sampled_from(("plain", "hermitian", "ridge", "direct", "steps")))
    options = {"plain": {}, "direct": {"method": "direct"}, "steps": {"steps": size(draw)}}.get(
        how, {"hermitian": True}
    )
    if how in ("hermitian", "ridge"):
        a = array_api_compat.array_namespace(a).asarray(a @ a.mT.conj() if arrays.dtype.startswith("c") else a @ a.mT)
        m = n = a.shape[-1]
        options |= {"ridge": 10.0 ** draw(st.integers(-3, 2))} if how == "ridge" else {}
    found = attempt(lambda: lowrank.pinv_newton(a, return_info=True, **options))
    if found is None:
        return
    x, info = found
    values = check(x, a, (*lead, n, m), finite=False)
    host = to_host(a)
    whole = np.isfinite(host).all((-1, -2)) if host.size else np.ones(lead, bool)
    assert np.array_equal(to_host(info.finite) | ~whole, np.ones(lead, bool)) or how != "plain"
    if host.size:
        assert np.isnan(values[~whole]).all()  # to the last entry, not a few
    if arrays.tame and how in ("plain", "direct"):
        assert np.isfinite(values).all()
        # What is right for a right pseudoinverse: A X A = A, to the cutoff.
        wide = host.astype(np.complex128)
        if host.size and arrays.dtype != "float16":
            rest = wide @ values.astype(np.complex128) @ wide - wide
            cutoff = 1e-4 if arrays.dtype in ("float32", "complex64") else 1e-9
            assert (
                np.linalg.norm(rest, axis=(-1, -2)) <= cutoff * (np.linalg.norm(wide, axis=(-1, -2)) + 1e-300)
            ).all()


def kernels(draw) -> None:
    arrays = Arrays(draw)
    lead, n, m, d = batch(draw), size(draw), size(draw), size(draw)
    x, y = arrays.of(*lead, n, d), arrays.of(*lead, m, d)
    kernel = draw(
        st.sampled_from(
            (lowrank.gaussian_kernel, lowrank.laplacian_kernel, lowrank.matern32_kernel, lowrank.matern52_kernel)
        )
    )
    ell = 10.0 ** draw(st.integers(-2, 2))
    found = attempt(lambda: kernel(x, y, lengthscale=ell))
    if found is not None:
        values = check(found, x, (*lead, n, m), finite=arrays.tame)
        assert not ((values < 0) | (values > 1)).any()
    found = attempt(lambda: lowrank.squared_distances(x, y))
    if found is not None:
        values = check(found, x, (*lead, n, m), finite=arrays.tame)
        assert not (values < 0).any()


def matmul(draw) -> None:
    arrays = Arrays(draw)
    lead, n, m, d, e = batch(draw), size(draw), size(draw), size(draw), size(draw)
    x, y, v = arrays.of(*lead, n, d), arrays.of(*lead, m, d), arrays.of(*lead, m, e)
    found = attempt(lambda: lowrank.gaussian_matmul(x, y, v))
    if found is not None:
        check(found, x, (*lead, n, e), finite=arrays.tame)


def attention(draw) -> None:
    arrays = Arrays(draw)
    lead, n, m, d, e = batch(draw), size(draw), size(draw), size(draw), size(draw)
    q, v, z = arrays.of(*lead, n, d), arrays.of(*lead, n, e), arrays.of(*lead, m, d)
    options = {"ridge": 10.0 ** draw(st.integers(-3, 0)), "normalize": draw(st.booleans())}
    found = attempt(lambda: lowrank.softmax_free_attention(q, v, z, **options))
    if found is not None:
        check(found, q, (*lead, n, e), finite=arrays.tame and arrays.dtype != "float16")


def full_attention(draw) -> None:
    arrays = Arrays(draw, libraries=("torch",))
    lead, n, d, e = batch(draw), size(draw, 1), size(draw, 1), size(draw, 1)
    q, v = arrays.of(*lead, n, d), arrays.of(*lead, n, e)
    found = attempt(lambda: gaussian_attention(q, v))
    if found is not None:
        check(found, q, (*lead, n, e), finite=arrays.tame and arrays.dtype != "float16")


def layer(draw) -> None:
    arrays = Arrays(draw, dtypes=("float32", "float64"), libraries=("torch",))
    height, width, b = size(draw), size(draw), size(draw, 0, 3)
    x = arrays.of(b, height * width, 8)
    torch.manual_seed(0)
    options = {"grid": draw(st.none() | st.integers(1, 4)), "stride": draw(st.none() | st.integers(1, 3))}
    if options["grid"] is None and options["stride"] is None:
        options["grid"] = 2
    net = SoftmaxFreeAttention(8, num_heads=2, value_kernel=draw(st.sampled_from((None, 3))), **options).to(x.dtype)
    mask = torch.from_numpy(arrays.rng.random((b, height * width)) < 0.7) if draw(st.booleans()) else None
    with torch.no_grad():
        found = attempt(lambda: net(x, (height, width), mask=mask))
    if found is not None:
        values = check(found, x, (b, height * width, 8), finite=arrays.tame)
        # What is not finite stays in its own image.
        moderate = x.abs().amax((1, 2)) < 1e5 if x.numel() else torch.ones(b, dtype=torch.bool)
        assert np.isfinite(values[moderate.numpy()]).all()


def factor(draw) -> None:
    arrays = Arrays(draw, dtypes=("float32", "float64", "float16"))
    n, d = size(draw), size(draw)
    x = arrays.of(n, d)
    landmarks = draw(st.sampled_from(("uniform", "segment_means", "rpcholesky")))
    rank = draw(st.integers(0, 10))
    found = attempt(lambda: lowrank.nystrom(x, landmarks=landmarks, rank=rank, rng=0))
    if found is None:
        return
    assert np.isfinite(to_host(x)).all()
    f = check(found.factor, x, (n, found.rank), finite=True)
    assert 0 <= float(found.trace_error) <= n * (1 + 1e-4)
    residual = np.eye(n) if n == 0 else to_host(lowrank.gaussian_kernel(x, x)).astype(float) - f.astype(float) @ f.T
    eps = 1.2e-7 if arrays.dtype == "float32" else 2.2e-16
    if arrays.tame:
        assert np.linalg.eigvalsh(residual).min(initial=0) > -100 * n * eps
    asked(found, arrays, x)


def asked(found: lowrank.LowRank, arrays: Arrays, x: Any) -> None:
    """Everything that a factorisation of finite points can be asked; what comes in may be anything."""
    n, d = x.shape
    tame = arrays.tame
    b, new = arrays.of(n, scale=False), arrays.of(size(arrays.draw), d)
    whole, near = bool(np.isfinite(to_host(b)).all()), bool(np.isfinite(to_host(new)).all())
    assert np.isfinite(float(found.logdet(ridge=0.1)))
    for product in (attempt(lambda: found.solve(b, ridge=0.1)), attempt(lambda: found @ b)):
        if product is not None:
            check(product, x, (n,), finite=whole)
    check(found.diagonal(), x, (n,), finite=True)
    values, vectors = found.eigh()
    check(values, x, (found.rank,), finite=True)
    check(vectors, x, (n, found.rank), finite=True)
    rows = attempt(lambda: found.features(new))
    if rows is not None:
        assert near
        check(rows, x, (new.shape[0], found.rank), finite=True)
    small = attempt(lambda: found.truncate(rank=size(arrays.draw), rtol=arrays.draw(st.none() | st.floats())))
    if small is not None:
        check(small.factor, x, (n, small.rank), finite=True)
        assert float(small.trace_error) >= float(found.trace_error) * (1 - 1e-5)
    certificate = attempt(lambda: found.certificate(x, rng=0))
    if certificate is not None:
        assert 0 <= certificate.spectral[0] <= certificate.spectral[1] < np.inf
        assert 0 <= certificate.frobenius[0] <= certificate.frobenius[1] < np.inf
    assert certificate is not None or not tame


def landmarks(draw) -> None:
    arrays = Arrays(draw)
    lead, n, d = batch(draw), size(draw), size(draw)
    x, rank = arrays.of(*lead, n, d), draw(st.integers(-1, 10))
    found = attempt(lambda: lowrank.uniform(x, rank=rank, rng=0))
    if found is not None:
        chosen = to_host(found)
        assert len(set(chosen.tolist())) == rank == len(chosen)
        assert ((chosen >= 0) & (chosen < n)).all()
    found = attempt(lambda: lowrank.segment_means(x, rank=rank, kernel=lowrank.gaussian_kernel))
    if found is not None:
        check(found, x, (*lead, rank, d), finite=arrays.tame)
    found = attempt(lambda: lowrank.rpcholesky(x, rank=rank, kernel=lowrank.gaussian_kernel, rng=0))
    if found is not None:
        chosen = to_host(found)
        assert 1 <= len(chosen) <= rank
        assert len(set(chosen.tolist())) == len(chosen)
    found = attempt(lambda: lowrank.median_lengthscale(x, rng=0))
    assert found is None or 0 < found < np.inf


def ridge_regression(draw) -> None:
    arrays = Arrays(draw, dtypes=("float32", "float64"))
    n, d = size(draw), size(draw)
    x = arrays.of(n, d)
    y = arrays.of(n, scale=False) if draw(st.booleans()) else arrays.of(n, size(draw, 0, 3), scale=False)
    found = attempt(lambda: lowrank.kernel_ridge(x, y, ridge=10.0 ** draw(st.integers(-3, 1)), rank=n or 1, rng=0))
    if found is not None:
        assert np.isfinite(to_host(x)).all()
        assert np.isfinite(to_host(y)).all()
        check(found.predict(x), x, tuple(y.shape), finite=True)


def estimators(draw) -> None:
    arrays = Arrays(draw, dtypes=("float32", "float64"), libraries=("numpy",))
    n, d = size(draw), size(draw)
    x, y = arrays.of(n, d), arrays.of(n, scale=False)
    with np.errstate(all="ignore"):
        # Some refusals are scikit-learn's, which explains them.
        found = attempt(lambda: Nystroem(n_components=size(draw, 1), random_state=0).fit(x), lines=5)
        if found is not None:
            assert np.isfinite(found.transform(x)).all()
        found = attempt(lambda: NystroemRidge(n_components=size(draw, 1), random_state=0).fit(x, y), lines=5)
        if found is not None:
            assert np.isfinite(found.predict(x)).all()


def chunks_of_rows(draw) -> None:
    arrays = Arrays(draw, dtypes=("float16", "float32", "float64"), libraries=("numpy",))
    n, d = size(draw), size(draw)
    x, y = arrays.of(n, d), arrays.of(n, scale=False)
    x_, y_ = (da.from_array(a, chunks=(size(draw, 1), *a.shape[1:])) for a in (x, y))
    options = {"landmarks": draw(st.sampled_from(("uniform", "rpcholesky"))), "rank": size(draw), "rng": 0}
    with dask.config.set(scheduler="synchronous"), np.errstate(all="ignore"):
        found = attempt(lambda: chunked.nystrom(x_, **options))
        factor = None if found is None else attempt(lambda: found.factor.compute())
        if factor is not None:
            assert np.isfinite(x).all()
            check(factor, x, (n, found.rank), finite=True)
        fit = attempt(lambda: chunked.ridge(x_, y_, ridge=10.0 ** draw(st.integers(-3, 1)), **options))
        if fit is not None:
            assert np.isfinite(x).all()
            assert np.isfinite(y).all()
            check(fit.predict(x), x, (n,), finite=True)


def schedule(draw) -> None:
    condition, tolerance = draw(st.floats()), draw(st.floats())
    found = attempt(lambda: lowrank.newton_schedule(condition, tolerance=tolerance, definite=draw(st.booleans())))
    if found is not None:
        assert found.bounds[-1] <= tolerance
        assert all(a >= b for a, b in zip(found.bounds, found.bounds[1:], strict=False))
        assert list(found.products) == sorted(found.products)
        assert len(found.products) == len(found.bounds)


CHECKS = [
    pinv,
    kernels,
    matmul,
    attention,
    full_attention,
    layer,
    factor,
    landmarks,
    ridge_regression,
    estimators,
    chunks_of_rows,
    schedule,
]


@pytest.mark.filterwarnings("ignore:n_components:UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("body", CHECKS, ids=lambda body: body.__name__)
def test_a_few(body):
    @given(st.data())
    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    def run(data):
        body(data.draw)

    run()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:n_components:UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("body", CHECKS, ids=lambda body: body.__name__)
def test_many(body):
    seen = 0

    @given(st.data())
    @settings(
        max_examples=int(os.environ.get("FUZZ_CASES", CASES)) // len(CHECKS) + 1,
        derandomize=False,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    def run(data):
        nonlocal seen
        seen += 1
        body(data.draw)

    run()
    print(f"{body.__name__}: {seen} cases")
