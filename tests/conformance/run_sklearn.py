"""scikit-learn's own tests of ``sklearn.kernel_approximation.Nystroem``, with ``lowrank.sklearn.Nystroem``.

``python tests/conformance/run_sklearn.py`` takes the tests from the installed scikit-learn, prints one line for each
and exits with 0 where all pass but the listed ones. Those of the array API run for the libraries and devices that this
machine has.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    # Before scipy is imported: scikit-learn dispatches to other arrays only if scipy does.
    os.environ["SCIPY_ARRAY_API"] = "1"

import sys
from collections.abc import Iterator
from unittest import SkipTest

import sklearn
import sklearn.kernel_approximation
import sklearn.utils._array_api
import torch
from harness import Counted, Verdict, replaced, run_shipped_tests
from sklearn.utils._testing import _array_api_for_tests

from lowrank.sklearn import Nystroem

MODULE = "sklearn.tests.test_kernel_approximation"
SELECTION = [
    f"{MODULE}::test_nystroem_approximation",
    f"{MODULE}::test_nystroem_approximation_array_api",
    f"{MODULE}::test_nystroem_default_parameters",
    f"{MODULE}::test_nystroem_singular_kernel",
    f"{MODULE}::test_nystroem_poly_kernel_params",
    f"{MODULE}::test_nystroem_callable",
    f"{MODULE}::test_nystroem_precomputed_kernel",
    f"{MODULE}::test_nystroem_component_indices",
    f"{MODULE}::test_get_feature_names_out[Nystroem]",
    "sklearn.linear_model.tests.test_sgd::test_ocsvm_vs_sgdocsvm",
]

# Case → why it cannot pass.
EXPECTED_FAILURES: dict[str, str] = {}


def main() -> int:
    verdict, counted = Verdict(f"scikit-learn {sklearn.__version__}", EXPECTED_FAILURES), Counted()
    combinations = sklearn.utils._array_api.yield_namespace_device_dtype_combinations

    def present() -> Iterator[tuple]:
        for combination in combinations():
            try:
                _array_api_for_tests(*combination)
            except SkipTest:
                continue
            yield combination

    substitutes = {
        (sklearn.kernel_approximation, "Nystroem"): counted(Nystroem),
        (sklearn.utils._array_api, "yield_namespace_device_dtype_combinations"): present,
        # scikit-learn asks whether torch was built for a GPU, and means whether there is one.
        (torch.backends.cuda, "is_built"): torch.cuda.is_available,
    }
    # Before the module of tests is imported, which imports the class.
    with replaced(substitutes):
        run_shipped_tests(verdict, SELECTION, counted)
    return verdict.finish()


if __name__ == "__main__":
    sys.exit(main())
