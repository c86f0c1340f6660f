"""The house: what `import lowrank` brings, which room knows which, and what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import array_api_compat
import numpy as np
import pytest

import lowrank

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path.stem for path in (ROOT / "lowrank").glob("*.py") if path.stem != "__init__")
# Each room, and the rooms it may know. Whatever a room may know, those may not know it.
MAY_KNOW = {
    "_array": set(),
    "_accurate": {"_array"},
    "_differentials": {"_array"},
    "_native": set(),
    "_native_newton": {"_native"},
    "_native_core": {"_native"},
    "_torch_rules": {"_array", "_differentials", "_native_newton", "_newton", "_schedule"},
    "_gradients": {"_array", "_differentials", "_native_newton", "_newton", "_torch_rules"},
    "kernels": {"_array", "_gradients"},
    "_schedule": set(),
    "_newton": {"_array", "_schedule"},
    "_definite": {"_array", "_accurate", "_native_core", "_newton", "_schedule"},
    "_elimination": {"_accurate", "_array", "_definite", "_newton", "_schedule"},
    "_truncated": {"_array", "_accurate", "_newton", "_schedule"},
    "_tall": {"_array", "_accurate", "_newton", "_truncated"},
    "_fused_kernels": set(),
    "_fused": {"_array", "_newton", "_fused_kernels"},
    "pinv": {"_array", "_newton", "_definite", "_elimination", "_truncated", "_tall", "_gradients", "_fused"},
    "_segments": {"_array"},
    "landmarks": {"_array", "_segments"},
    "_core": {"_array"},
    "_certificate": {"_array", "_core"},
    "_saved": set(),
    "_low_rank": {"_array", "landmarks", "_core", "_certificate", "_saved"},
    "factor": {"_array", "kernels", "landmarks", "_core", "_low_rank"},
    "solve": {"_array", "kernels", "factor"},
    "_nearby": {"_array"},
    "_formula": {"_array", "_nearby", "kernels"},
    "_attend": {"_array", "kernels", "_formula"},
    "_fused_attention": set(),
    "_native_attention": {"_array", "_formula", "_attend", "_native"},
    "_native_mlp": {"_native"},
    "_torch_attention": {
        "_array",
        "_segments",
        "_nearby",
        "_formula",
        "_attend",
        "_fused_attention",
        "_native_attention",
    },
    "_jax_attention": {"_array", "_nearby", "_formula"},
    "attention": {"_array", "_segments", "kernels", "pinv", "_nearby", "_formula", "_attend", "_native_core"}
    | {"_native_attention", "_torch_attention", "_jax_attention"},
    "_depthwise": {"_array"},
    "nn": {"_array", "_formula", "_depthwise", "_torch_attention", "attention"},
    "_kernel_features": {"_array", "kernels", "landmarks", "_core"},
    "sklearn": {"_array", "_kernel_features"},
    "_chunk": {"_array", "_core"},
    "dask": {"_array", "kernels", "landmarks", "_core", "factor", "_chunk"},
    "__main__": set(),
}


def imported_rooms(room: str) -> set[str]:
    """Rooms imported anywhere in a module, inside functions included."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / "lowrank" / f"{room}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "lowrank":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lowrank."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lowrank.")}
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_imports_flow_one_way(room):
    assert imported_rooms(room) <= MAY_KNOW[room]


def test_import_direction_has_no_way_back():
    def reaches(room: str) -> set[str]:
        return MAY_KNOW[room].union(*(reaches(r) for r in MAY_KNOW[room]))

    assert all(room not in reaches(room) for room in MAY_KNOW)


def test_import_brings_no_heavy_library():
    program = (
        "import sys, time, numpy; start = time.perf_counter(); import lowrank; took = time.perf_counter() - start;"
        "heavy = {'torch', 'cupy', 'jax', 'sklearn', 'dask', 'scipy.linalg', 'triton'} & set(sys.modules);"
        "print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names():
    assert sorted(lowrank.__all__) == [
        "Certificate",
        "KernelRidge",
        "LowRank",
        "NewtonSchedule",
        "PinvInfo",
        "gaussian_kernel",
        "gaussian_matmul",
        "kernel_ridge",
        "laplacian_kernel",
        "matern32_kernel",
        "matern52_kernel",
        "median_lengthscale",
        "newton_schedule",
        "nystrom",
        "pinv_newton",
        "rpcholesky",
        "segment_means",
        "softmax_free_attention",
        "squared_distances",
        "uniform",
    ]
    for name in lowrank.__all__:
        doc = getattr(lowrank, name).__doc__
        assert doc is not None, name
        # Everything but the scalar recursion takes or holds arrays.
        assert "shape" in doc or "tuple of float" in doc or "NewtonSchedule" in doc, name


def test_no_module_bears_the_name_of_a_function():
    assert not set(lowrank.__all__) & set(ROOMS)


def test_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == lowrank.__version__
    assert f"version: {lowrank.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_core_needs_three_libraries():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert sorted(d.split(">")[0] for d in dependencies) == ["array-api-compat", "numpy", "scipy"]


def test_it_tells_what_a_bug_report_needs():
    done = subprocess.run([sys.executable, "-m", "lowrank"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"lowrank {lowrank.__version__}, Python {sys.version.split()[0]}")
    start = next(i for i, line in enumerate(lines) if line.startswith("array libraries"))
    versions = {line.split()[0]: line.split()[-1] for line in lines[1:start]}
    assert versions["numpy"] == np.__version__
    assert versions["array-api-compat"] == array_api_compat.__version__
    checked = lines[start + 1 :]
    assert {line.split()[0].rstrip(",") for line in checked} >= {"numpy", "torch", "jax"}
    # Condition 1.4, and a few operations in float32.
    assert all(float(line.split()[-1]) < 1e-6 for line in checked)
