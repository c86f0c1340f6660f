"""scipy's own tests of ``scipy.linalg.pinv`` and ``pinvh``, and of what calls a pseudoinverse, with ``pinv_newton``.

``python tests/conformance/run_scipy.py`` takes the tests from the installed scipy, prints one line for each and exits
with 0 where all pass but the listed ones. ``scipy.integrate`` and ``scipy.stats`` call numpy's function.
"""

from __future__ import annotations

import sys

import numpy as np
import scipy
import scipy.linalg
from harness import Counted, Verdict, replaced, run_shipped_tests
from substitutes import numpy_pinv, scipy_pinv, scipy_pinvh

SELECTION = [
    "scipy.linalg.tests.test_basic::TestPinv",
    "scipy.linalg.tests.test_basic::TestPinvSymmetric",
    "scipy.linalg.tests.test_basic::test_auto_rcond",
    "scipy.linalg.tests.test_basic::TestOverwrite::test_pinv",
    "scipy.linalg.tests.test_basic::TestOverwrite::test_pinvh",
    "scipy.linalg.tests.test_batch::TestBatch::test_pinv",
    "scipy.linalg.tests.test_batch::TestBatch::test_matmat[pinv]",
    "scipy.integrate.tests.test_bvp::test_singular_term",
    "scipy.stats.tests.test_hypotests::TestEppsSingleton::test_statistic_1",
    "scipy.stats.tests.test_hypotests::TestEppsSingleton::test_statistic_2",
    "scipy.stats.tests.test_hypotests::TestEppsSingleton::test_epps_singleton_array_like",
    "scipy.stats.tests.test_hypotests::TestEppsSingleton::test_epps_singleton_nonfinite",
]

# Case → why it cannot pass.
EXPECTED_FAILURES: dict[str, str] = {}


def main() -> int:
    verdict, counted = Verdict(f"scipy {scipy.__version__}", EXPECTED_FAILURES), Counted()
    substitutes = {
        (np.linalg, "pinv"): counted(numpy_pinv),
        (scipy.linalg, "pinv"): counted(scipy_pinv),
        (scipy.linalg, "pinvh"): counted(scipy_pinvh),
    }
    # Before the test modules are imported, for most of them import the function and not its module.
    with replaced(substitutes):
        run_shipped_tests(verdict, SELECTION, counted)
    return verdict.finish()


if __name__ == "__main__":
    sys.exit(main())
