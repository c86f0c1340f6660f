"""What the conformance scripts share: the verdict on a run, and how tests shipped inside a package are run.

A run is conformant when every case passes but those listed with a reason, every listed case fails, and every case that
passes has called the substitute at least once: what never reached it shows nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


class Counted:
    """Counts the calls of the functions it wraps."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return function(*args, **kwargs)

        return counted


class Verdict:
    """The record of a run: one line per case as it ends, the counts and the exit status at the end."""

    def __init__(self, title: str, expected_failures: Mapping[str, str]) -> None:
        self.title, self.expected = title, dict(expected_failures)
        self.passed: list[str] = []
        self.listed: list[str] = []
        self.wrong: list[str] = []
        self.calls = 0
        self.started = time.perf_counter()

    def record(self, case: str, *, error: str | None, calls: int, seconds: float) -> None:
        """Judge one case: ``error`` is None where its assertions held."""
        self.calls += calls
        if error is None and calls == 0:
            error = "passed without a call of the substitute"
        if error is None and case in self.expected:
            self.wrong.append(case)
            outcome = f"FAIL: listed as impossible ({self.expected[case]}), but it passes; take it off the list"
        elif error is None:
            self.passed.append(case)
            outcome = "pass"
        elif case in self.expected:
            self.listed.append(case)
            outcome = f"listed: {self.expected[case]}"
        else:
            self.wrong.append(case)
            outcome = f"FAIL: {error}"
        print(f"{case}  [{calls} calls, {seconds:.1f} s]  {outcome}", flush=True)

    def finish(self) -> int:
        """Print the summary; 0 where the run is conformant, else 1."""
        ran = {*self.passed, *self.listed, *self.wrong}
        absent = [case for case in self.expected if case not in ran]
        for case in absent:
            print(f"FAIL: {case} is listed as impossible, but there is no such case")
        failures = len(self.wrong) + len(absent) + (not ran)
        print(
            f"{self.title}: {len(self.passed)} passed, {len(self.listed)} listed with a reason, {failures} failed; "
            f"{self.calls} calls of the substitutes in {time.perf_counter() - self.started:.0f} s"
        )
        return 1 if failures else 0


@contextlib.contextmanager
def replaced(substitutes: Mapping[tuple[Any, str], Callable]) -> Iterator[None]:
    """Inside, ``getattr(module, name)`` is the substitute."""
    originals = {(module, name): getattr(module, name) for module, name in substitutes}
    try:
        for (module, name), substitute in substitutes.items():
            setattr(module, name, substitute)
        yield
    finally:
        for (module, name), original in originals.items():
            setattr(module, name, original)


def run_shipped_tests(verdict: Verdict, selection: Sequence[str], counted: Counted) -> None:
    """Run tests of an installed package under pytest, each ``module::test``, and record every one.

    Where several parameters of a test do not concern the substitutes, ``module::test[word]`` keeps those whose
    identifier contains the word.
    """
    import pytest

    for chosen in selection:
        require_shipped(chosen.split("::")[0])
    words = {chosen.split("[")[0]: chosen.split("[")[1].rstrip("]") for chosen in selection if "[" in chosen}

    class Recorder:
        def pytest_collection_modifyitems(self, items: list) -> None:
            items[:] = [item for item in items if words.get(_case(item).split("[")[0], "") in item.name]

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
            self.case, self.error, self.before, started = _case(item), None, counted.calls, time.perf_counter()
            result = yield
            verdict.record(
                self.case,
                error=self.error,
                calls=counted.calls - self.before,
                seconds=time.perf_counter() - started,
            )
            return result

        def pytest_runtest_logreport(self, report: Any) -> None:
            if not report.passed:
                crash = getattr(report.longrepr, "reprcrash", None)
                self.error = f"{report.outcome} in {report.when}: {crash.message if crash else report.longreprtext}"

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                verdict.record(report.nodeid, error=report.longreprtext, calls=0, seconds=0.0)

    # An empty configuration: the one of the directory around the environment belongs to other tests.
    options = ["-c", os.devnull, "-p", "no:cacheprovider", "-p", "no:terminal", "--pyargs"]
    names = [chosen.split("[")[0] for chosen in selection]
    status = pytest.main([*options, *names], plugins=[Recorder()])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        verdict.record("collection", error=f"pytest ended with {status!r}", calls=0, seconds=0.0)


def require_shipped(module: str) -> None:
    """Exit with one clear sentence where the installed package came without this module of tests."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        sys.exit(
            f"{module} is not there: this build of {module.split('.')[0]} ships without its tests. "
            f"Install one that has them, as the wheels of PyPI do, and run again."
        )


def _case(item: Any) -> str:
    return "::".join([item.module.__name__, *item.nodeid.split("::")[1:]])
