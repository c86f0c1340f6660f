"""torch's own samples for ``torch.linalg.pinv`` and ``torch.pinverse``, given to ``pinv_newton`` as well.

``python tests/conformance/run_torch.py`` takes the operators' entries (OpInfo) from the installed torch. For each
entry and dtype, every sample must give what torch's operator gives, in values and in first derivatives, contiguous and
not, to the tolerance with which torch compares that dtype; and in double precision torch's own gradient tests must
pass: gradcheck, forward mode, and both kinds of second derivatives. Those of the samples with 50 rows or columns take
most of the time; ``--quick`` takes few of them, and no conjugate views.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from harness import Counted, Verdict
from substitutes import torch_pinv

# Case → why it cannot pass.
EXPECTED_FAILURES: dict[str, str] = {}

# Entry of the operator database (name, variant) → what is called in place of its operator.
SUBSTITUTES: dict[tuple[str, str], Callable] = {
    ("pinverse", ""): torch_pinv,
    ("linalg.pinv", ""): torch_pinv,
    ("linalg.pinv", "hermitian"): torch_pinv,
    ("linalg.pinv", "singular"): lambda a, b: torch_pinv(a @ b.mT),
}
# Samples with an axis longer than this are large.
LARGE = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="check the derivatives of few of the large samples")
    quick = parser.parse_args().quick
    try:
        import torch
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_utils import set_rng_seed
    except ModuleNotFoundError as missing:
        sys.exit(f"torch's testing modules need {missing.name}, which is not installed: pip install {missing.name}")

    verdict, counted = Verdict(f"torch {torch.__version__}", EXPECTED_FAILURES), Counted()
    entries = {(op.name, op.variant_test_name): op for op in op_db if (op.name, op.variant_test_name) in SUBSTITUTES}
    if entries.keys() != SUBSTITUTES.keys():
        sys.exit(f"torch {torch.__version__} has no samples for {sorted(SUBSTITUTES.keys() - entries.keys())}")
    for key, theirs in entries.items():
        ours = copy.copy(theirs)
        ours.op = counted(SUBSTITUTES[key])
        for dtype in sorted(theirs.supported_dtypes("cpu"), key=str):
            for name, check in _checks(ours, theirs, dtype, quick).items():
                # The seed of torch's tests, set for each so that a case is the same whichever others run.
                set_rng_seed(1234)
                case = "::".join([".".join(filter(None, key)), str(dtype).removeprefix("torch."), name])
                _run(verdict, counted, case, check)
    return verdict.finish()


def _run(verdict: Verdict, counted: Counted, case: str, check: Callable[[], None]) -> None:
    before, started, error = counted.calls, time.perf_counter(), None
    try:
        check()
    except (AssertionError, RuntimeError, ValueError, TypeError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    verdict.record(case, error=error, calls=counted.calls - before, seconds=time.perf_counter() - started)


def _checks(ours: Any, theirs: Any, dtype: Any, quick: bool) -> dict[str, Callable[[], None]]:
    """The checks of one entry in one dtype, by name."""
    import torch
    from torch.testing._internal.common_utils import TestGradients

    fewer = copy.copy(ours)
    if quick:
        fewer.sample_inputs_func, fewer.test_conjugated_samples = partial(_few, ours.sample_inputs_func), False
    checks: dict[str, Callable[[], None]] = {
        "values": partial(_compare_values, ours, theirs, dtype),
        "derivatives": partial(_compare_derivatives, fewer, theirs, dtype),
    }
    if dtype in (torch.float64, torch.complex128):
        test, entry = TestGradients(), ("cpu", dtype, fewer, fewer.op)
        # As test_fn_grad, test_forward_mode_AD, test_fn_gradgrad and test_fn_fwgrad_bwgrad call them.
        checks["gradcheck"] = partial(test._grad_test_helper, *entry)
        checks["forward mode"] = partial(
            test._grad_test_helper,
            *entry,
            check_forward_ad=True,
            check_backward_ad=False,
            check_batched_grad=False,
            check_batched_forward_grad=fewer.check_batched_forward_grad,
        )
        checks["gradgradcheck"] = partial(test._check_helper, *entry, "bwgrad_bwgrad")
        checks["forward over reverse"] = partial(test._check_helper, *entry, "fwgrad_bwgrad")
    return checks


def _compare_values(ours: Any, theirs: Any, dtype: Any) -> None:
    """Each sample, and its noncontiguous copy, through both operators; Hermitian ones read the lower triangle."""
    import torch

    for sample in ours.sample_inputs("cpu", dtype):
        for given in (sample, sample.noncontiguous()):
            x, expected = (op.op(given.input, *given.args, **given.kwargs) for op in (ours, theirs))
            torch.testing.assert_close(x, expected)


def _compare_derivatives(ours: Any, theirs: Any, dtype: Any) -> None:
    """The same for first derivatives. In single precision theirs are taken in double, since those of torch's own
    operator in single are off by more than the tolerance on some samples."""
    import torch

    double = torch.complex128 if dtype.is_complex else torch.float64
    for sample in ours.sample_inputs("cpu", dtype, requires_grad=True):
        for given in (sample, sample.noncontiguous()):
            reference = given.transform(lambda t: t.detach().to(double).requires_grad_() if t.requires_grad else t)
            x, expected = _applied(ours, given), _applied(theirs, reference)
            cotangent = torch.randn_like(x)
            for got, wanted in zip(
                torch.autograd.grad(x, [given.input, *given.args], cotangent),
                torch.autograd.grad(expected, [reference.input, *reference.args], cotangent.to(double)),
                strict=True,
            ):
                torch.testing.assert_close(got, wanted.to(dtype))


def _applied(op: Any, sample: Any) -> Any:
    """The operator, of a + aᴴ where it expects a Hermitian matrix, so that every small change of a is a fair one."""
    return op.gradcheck_wrapper(op.op, sample.input, *sample.args, **sample.kwargs)


def _few(samples: Callable[..., Iterator], *args: Any, **kwargs: Any) -> Iterator:
    """Of the large samples, which are factors of a product, only single square matrices of rank two."""
    for sample in samples(*args, **kwargs):
        large = max(max(t.shape) for t in (sample.input, *sample.args)) > LARGE
        if not large or (sample.input.shape == sample.args[0].shape and tuple(sample.input.shape[1:]) == (2,)):
            yield sample


if __name__ == "__main__":
    sys.exit(main())
