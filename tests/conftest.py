"""Backends and matrices shared by all tests.

``xp`` runs a test once per array library. A machine without a GPU skips the two CUDA backends and says
so; any other library that is missing is an error, because the test extra installs it. Libraries are imported where
they are used: tests/core needs NumPy alone.
"""

from __future__ import annotations

import importlib
import os

# Before any library reads it: matrices here are small, and threads that wait for each other cost a multiple.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_ENABLE_X64", "1")

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import array_api_compat
import hypothesis
import numpy as np
import pytest

from lowrank._array import to_host

hypothesis.settings.register_profile("lowrank", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("lowrank")


@dataclass(frozen=True)
class Backend:
    """An array library, as far as a test needs one."""

    name: str
    asarray: Callable[[np.ndarray], Any]

    def check(self, result: Any, like: Any, shape: tuple[int, ...], dtype: Any = None) -> np.ndarray:
        """Assert namespace, device, dtype and shape of a result, and return it as a NumPy array."""
        assert array_api_compat.array_namespace(result) is array_api_compat.array_namespace(like)
        assert array_api_compat.device(result) == array_api_compat.device(like)
        assert result.dtype == (like.dtype if dtype is None else dtype)
        assert tuple(result.shape) == shape
        return to_host(result)


def _read_only(x: np.ndarray) -> np.ndarray:
    x = np.array(x)
    x.flags.writeable = False
    return x


def _of(library: str, **options: Any) -> Callable[[np.ndarray], Any]:
    """What makes an array of a library, imported for that."""
    return lambda x: importlib.import_module(library).asarray(np.array(x), **options)


_BACKENDS: dict[str, Callable[[np.ndarray], Any]] = {
    "numpy": np.asarray,
    "numpy-read-only": _read_only,
    "array-api-strict": _of("array_api_strict"),
    "torch": _of("torch"),
    "jax": _of("jax.numpy"),
    "cupy": _of("cupy"),
    "torch-cuda": _of("torch", device="cuda"),
}


@pytest.fixture(params=list(_BACKENDS), scope="session")
def xp(request: pytest.FixtureRequest) -> Backend:
    if request.param in ("cupy", "torch-cuda") and not importlib.import_module("torch").cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return Backend(request.param, _BACKENDS[request.param])


def refused_by(main: Callable[[list[str]], None], capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line in which a command refuses its arguments, having printed nothing else and with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    usage, _, line = err.partition("error: ")
    assert usage.startswith("usage: ")
    assert line.count("\n") == 1
    return line


def from_spectrum(
    singular_values: np.ndarray, m: int, n: int, *, seed: int = 0, complex_: bool = False, dtype: Any = np.float64
) -> tuple[np.ndarray, np.ndarray]:
    """An m × n matrix of the given nonzero singular values, in ``dtype``, and its pseudoinverse in fp64."""
    rng = np.random.default_rng(seed)
    sigma = np.asarray(singular_values, dtype=np.float64)

    def orthonormal(p: int) -> np.ndarray:
        z = rng.standard_normal((p, p)) + (1j * rng.standard_normal((p, p)) if complex_ else 0.0)
        return np.linalg.qr(z)[0][:, : len(sigma)]

    u, v = orthonormal(m), orthonormal(n)
    return ((u * sigma) @ v.conj().T).astype(dtype), (v / sigma) @ u.conj().T


def gaussian_gram(points: np.ndarray, lengthscale: float = 1.0) -> np.ndarray:
    """The Gram matrix of the Gaussian kernel by direct sums in fp64."""
    points = np.asarray(points, dtype=np.float64)
    d2 = np.sum((points[..., :, None, :] - points[..., None, :, :]) ** 2, axis=-1)
    return np.exp(-0.5 * d2 / lengthscale**2)


@pytest.fixture(params=[4, 8, 16], ids=str)
def width(request, monkeypatch):
    """Floats in a vector of the compiled kernels: what this processor has, and what smaller ones have."""
    from lowrank import _native

    if request.param > _native.lanes():
        pytest.skip("this processor's vectors are shorter")
    monkeypatch.setattr(_native, "lanes", lambda: request.param)
