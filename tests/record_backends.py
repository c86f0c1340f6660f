"""What tests/test_backends.py found, for the table of the documentation.

    python tests/record_backends.py --output docs/results/backends.json

The tests are run, and for each function and library what they say of it is kept: the largest relative error, "equal"
for indices, "refused" where a traced program cannot hold it, or why it was not run. A failure keeps nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from datetime import date
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIBRARIES = ("lowrank", "numpy", "array-api-compat", "array-api-strict", "torch", "jax")


class Recorder:
    """What each test said, by function and library."""

    def __init__(self) -> None:
        self.said: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test, _, parameters = report.nodeid.rpartition("::")[2].partition("[")
        if "says_the_same" not in test:
            return
        way, _, name = parameters.removesuffix("]").rpartition("-")
        way = way or "Dask"  # whose test has no other
        row = self.said.setdefault(name, {})
        if report.when == "setup" and report.skipped:
            row[way] = report.longrepr[2].removeprefix("Skipped: ")
        elif report.when == "call" and report.passed:
            row[way] = dict(report.user_properties)["said"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    output = parser.parse_args().output
    recorder = Recorder()
    if code := pytest.main([str(HERE / "test_backends.py"), "-n", "0", "-q"], plugins=[recorder]):
        sys.exit(int(code))
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    about = {"command": "python tests/record_backends.py", "date": date.today().isoformat()}
    about |= {"machine": f"{platform.machine()} CPU", "python": platform.python_version(), **versions}
    output.write_text(json.dumps({**about, "rows": recorder.said}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
