"""numpy's own tests of ``numpy.linalg.pinv``, run with ``pinv_newton`` in its place.

``python tests/conformance/run_numpy.py`` takes the tests from the installed numpy and exits with 0 where all pass but
the listed ones. The two classes of pinv tests run over numpy's matrices one by one: a matrix, and the copies of it
that differ in strides alone, make a case. ``--quick`` leaves out the strided copies of stacks of matrices, most of the
time; numpy marks the tests that use them as slow.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict

import numpy as np
from harness import Counted, Verdict, replaced, require_shipped, run_shipped_tests
from substitutes import numpy_pinv

MODULE = "numpy.linalg.tests.test_linalg"
CLASSES = ["TestPinv", "TestPinvHermitian"]
OTHERS = [
    f"{MODULE}::test_pinv_rtol_arg",
    f"{MODULE}::test_byteorder_check",
    "numpy.matrixlib.tests.test_defmatrix::TestProperties::test_pinv",
]

# Case → why it cannot pass.
EXPECTED_FAILURES: dict[str, str] = {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="leave out the strided copies of stacks of matrices")
    quick = parser.parse_args().quick
    verdict, counted = Verdict(f"numpy {np.__version__}", EXPECTED_FAILURES), Counted()
    require_shipped(MODULE)
    with replaced({(np.linalg, "pinv"): counted(numpy_pinv)}):
        _run_classes(verdict, counted, left_out={"generalized", "strided"} if quick else None)
        run_shipped_tests(verdict, OTHERS, counted)
    return verdict.finish()


def _run_classes(verdict: Verdict, counted: Counted, *, left_out: set[str] | None) -> None:
    """Every test method of every class, with TEST_CASES narrowed to one matrix and its strided copies, without those
    that have all the tags to be left out."""
    module = __import__(MODULE, fromlist=CLASSES)
    cases = [case for case in module.LinalgTestCase.TEST_CASES if left_out is None or not left_out <= case.tags]
    matrices, reached = _by_matrix(cases), set()
    for name in CLASSES:
        for matrix, copies in matrices.items():
            test, before, started, error = getattr(module, name)(), counted.calls, time.perf_counter(), None
            test.TEST_CASES = copies
            try:
                for method in sorted(m for m in dir(test) if m.startswith("test_")):
                    getattr(test, method)()
            except AssertionError as raised:
                error = str(raised)
            if counted.calls > before:
                reached.add(matrix)
                verdict.record(
                    f"{MODULE}::{name}[{matrix}]",
                    error=error,
                    calls=counted.calls - before,
                    seconds=time.perf_counter() - started,
                )
    for matrix in sorted(matrices.keys() - reached):
        verdict.record(f"{MODULE}[{matrix}]", error="no class of tests uses this matrix", calls=0, seconds=0.0)


def _by_matrix(cases: list) -> dict[str, list]:
    """The cases under the name of the matrix; a strided copy adds its strides to that name."""
    names = [case.name for case in cases if "strided" not in case.tags]
    groups = defaultdict(list)
    for case in cases:
        groups[max((n for n in names if f"{case.name}_".startswith(f"{n}_")), key=len)].append(case)
    return groups


if __name__ == "__main__":
    sys.exit(main())
