"""What holds whatever goes on around a call: memory limits, other threads, other processes, other runs."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import test_backends
from test_backends import CASES, Way, element

HERE = Path(__file__).parent
MIB = 2**20

# Each program defines small() and large(), which do the same on a few and on many points, and dense(), which is what
# large() avoids. It may have ALLOWANCE more address space than it has after small().
PROLOGUE = """
import resource, sys
import numpy as np
import lowrank
x = np.random.default_rng(0).standard_normal((20_000, 3))
y, v = x[:15_000] + 0.5, x[:15_000, :2]
"""
EPILOGUE = """
small()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + ALLOWANCE
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    dense()
except MemoryError:
    fits = False
else:
    fits = True
assert not fits, "the dense way fits as well, so that nothing would be shown"
large()
"""
STREAMED = {
    "gaussian_matmul": (
        """
def small(): lowrank.gaussian_matmul(x[:50], y[:50], v[:50])
def large(): assert np.isfinite(lowrank.gaussian_matmul(x, y, v)).all()
def dense(): lowrank.gaussian_kernel(x, y)
""",
        96 * MIB,
    ),
    "kernel_ridge": (
        """
def small(): lowrank.kernel_ridge(x[:50], x[:50, 0], ridge=1.0, rank=20, rng=0)
x = x[:8_000]
def large(): assert np.isfinite(lowrank.kernel_ridge(x, x[:, 0], ridge=1e4, rank=40, rng=0).predict(y)).all()
def dense(): lowrank.gaussian_kernel(x, x)
""",
        256 * MIB,
    ),
    "nystrom": (
        """
def small(): lowrank.nystrom(x[:50], rank=20, rng=0, landmarks="rpcholesky")
def large(): assert lowrank.nystrom(x, rank=40, rng=0, landmarks="rpcholesky").trace_error > 0
def dense(): lowrank.gaussian_kernel(x, x)
""",
        96 * MIB,
    ),
    "softmax_free_attention": (
        """
def small(): lowrank.softmax_free_attention(x[:50], x[:50], x[:20])
def large(): assert np.isfinite(lowrank.softmax_free_attention(x, x, x[::100])).all()
def dense(): lowrank.gaussian_kernel(x, x)
""",
        96 * MIB,
    ),
    "pinv_newton of a tall matrix": (
        """
a = np.random.default_rng(0).standard_normal((4_000_000, 3)).astype(np.float32)
def small(): lowrank.pinv_newton(a[:50])
def large(): assert np.isfinite(lowrank.pinv_newton(a)).all()
def dense(): np.linalg.svd(a.astype(np.float64), full_matrices=False)
""",
        160 * MIB,
    ),
}


@pytest.mark.parametrize("name", STREAMED)
def test_streams_within_a_memory_limit(name):
    program, allowance = STREAMED[name]
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + program + EPILOGUE.replace("ALLOWANCE", str(allowance))],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr


def host_results(way: Way) -> dict[str, np.ndarray]:
    arrays = way.arrays(test_backends.data())
    return {
        name: np.asarray(case.function(element(arrays, 0) if case.single else arrays)) for name, case in CASES.items()
    }


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_calls_from_many_threads_do_not_disturb_each_other(library):
    alone = host_results(Way(library))
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(host_results, [Way(library)] * 24))
    for results in together:
        for name, result in results.items():
            np.testing.assert_array_equal(result, alone[name], err_msg=name)


RESULTS = """
import json, sys
from test_robustness import Way, host_results
print(json.dumps({name: result.tolist() for name, result in host_results(Way(sys.argv[1])).items()}))
"""


def in_a_new_process(library: str, *, threads: int, seed: int) -> dict[str, list]:
    """What that process finds; JSON keeps every bit of a float."""
    settings = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(seed)}
    done = subprocess.run(
        [sys.executable, "-c", RESULTS, library],
        capture_output=True,
        text=True,
        cwd=HERE,
        env={**os.environ, **settings},
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_another_run_gives_the_same_bits_and_more_threads_change_the_last_digits_at_most(library):
    first = in_a_new_process(library, threads=1, seed=1)
    assert in_a_new_process(library, threads=1, seed=2) == first
    on_two = in_a_new_process(library, threads=2, seed=1)
    eps = np.finfo(np.float64).eps
    for name, case in CASES.items():
        a, b = np.asarray(first[name]), np.asarray(on_two[name])
        assert np.max(np.abs(a - b)) <= test_backends.ROUNDINGS * case.condition * eps * np.max(np.abs(a)), name


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning", "ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_another_process_computes_as_this_one_does(start):
    here = host_results(Way("numpy"))
    with multiprocessing.get_context(start).Pool(1) as pool:
        there = pool.apply(host_results, (Way("numpy"),))
    for name, result in there.items():
        np.testing.assert_array_equal(result, here[name], err_msg=name)
