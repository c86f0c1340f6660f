"""``python -m lowrank``: versions, array libraries and devices, which is what a report of a bug should begin with.

Nothing is computed but one small inverse for each library and device that is found, by ``pinv_newton`` in float32, and
what it leaves of I − XA, which shows that the library works there: some 1e-7 where it does. Libraries are looked for,
never assumed; one that is installed and broken shows the error that it has.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

import lowrank

# Distributions whose versions matter; CuPy has another for every CUDA.
LIBRARIES = ("numpy", "scipy", "array-api-compat", "torch", "triton", "jax", "scikit-learn", "dask", "safetensors")


def main() -> None:
    print(f"lowrank {lowrank.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in LIBRARIES:
        print(f"  {name:<18}{version(name) or 'not installed'}")
    cupy = [name for name in installed() if name.startswith("cupy")]
    print(f"  {'cupy':<18}{', '.join(f'{name} {version(name)}' for name in cupy) or 'not installed'}")
    built = "built" if importlib.util.find_spec("lowrank._native_kernels") else "not built: there was no C compiler"
    print(f"  {'compiled kernels':<18}{built}")
    print("array libraries and devices, and what a 4 × 4 inverse in float32 leaves of I − XA:")
    for label, asarray in arrays():
        print(f"  {label:<40}{residual(asarray):.1e}")


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed() -> list[str]:
    return sorted({distribution.name for distribution in importlib.metadata.distributions()})


def arrays() -> Iterator[tuple[str, Callable[[np.ndarray], Any]]]:
    """What makes an array of each library on each of its devices."""
    yield "numpy", np.asarray
    if importlib.util.find_spec("torch"):
        import torch

        yield f"torch, cpu, {torch.get_num_threads()} threads", torch.from_numpy
        for i in range(torch.cuda.device_count()):
            yield f"torch, {torch.cuda.get_device_name(i)}", partial(torch.asarray, device=f"cuda:{i}")
    if importlib.util.find_spec("jax"):
        import jax

        for device in jax.devices():
            yield f"jax, {device}", partial(jax.device_put, device=device)
    if importlib.util.find_spec("cupy"):
        import cupy

        if cupy.cuda.is_available():
            for i in range(cupy.cuda.runtime.getDeviceCount()):
                name = cupy.cuda.runtime.getDeviceProperties(i)["name"].decode()

                yield f"cupy, {name}", partial(_on_cupy_device, i)


def _on_cupy_device(i: int, x: np.ndarray) -> Any:
    import cupy

    with cupy.cuda.Device(i):
        return cupy.asarray(x)


def residual(asarray: Callable[[np.ndarray], Any]) -> float:
    a = asarray(np.eye(4, dtype=np.float32) + np.float32(0.1))
    return float(abs(lowrank.pinv_newton(a) @ a - asarray(np.eye(4, dtype=np.float32))).max())


if __name__ == "__main__":
    main()
