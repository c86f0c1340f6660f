"""The tests that numpy, scipy and torch ship for their pseudoinverses pass with ``pinv_newton`` in their place, and
those that scikit-learn ships for its ``Nystroem`` with the one of ``lowrank.sklearn``.

The scripts of ``tests/conformance`` run in processes of their own, because they replace functions of those libraries
before the libraries' tests import them. What of them takes minutes is run by hand, without ``--quick``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conformance.harness import Verdict

import lowrank

SCRIPTS = Path(__file__).parent / "conformance"


def run(script: Path, *options: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(Path(lowrank.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, str(script), *options], capture_output=True, encoding="utf-8", env=environment
    )


# The least numbers of cases are those of today's releases, halved: a run that found next to nothing to do has failed.
@pytest.mark.parametrize(
    ("script", "options", "least"),
    [
        ("run_numpy.py", ["--quick"], 50),
        ("run_scipy.py", [], 20),
        ("run_torch.py", ["--quick"], 30),
        ("run_sklearn.py", [], 60),
    ],
)
def test_the_librarys_own_tests_pass(script, options, least):
    done = run(SCRIPTS / script, *options)
    summary = done.stdout.splitlines()[-1] if done.stdout else ""
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if "FAIL" in line) + done.stderr
    counts = re.search(r"(\d+) passed, \d+ listed with a reason, 0 failed", summary)
    assert counts, done.stdout + done.stderr
    assert int(counts[1]) >= least


@pytest.mark.parametrize(
    ("expected", "error", "calls", "status"),
    [
        ({}, None, 1, 0),
        ({}, "wrong", 1, 1),
        ({}, None, 0, 1),
        ({"case": "a reason"}, "wrong", 1, 0),
        ({"case": "a reason"}, None, 1, 1),
        ({"another case": "a reason"}, None, 1, 1),
    ],
    ids=["passes", "fails", "never calls", "listed", "listed but passes", "listed but absent"],
)
def test_the_verdict(expected, error, calls, status, capsys):
    verdict = Verdict("library", expected)
    verdict.record("case", error=error, calls=calls, seconds=0.0)
    assert verdict.finish() == status
    assert ("FAIL" in capsys.readouterr().out) == bool(status)


def test_nothing_run_is_a_failure(capsys):
    assert Verdict("library", {}).finish() == 1
    assert "1 failed" in capsys.readouterr().out


def test_a_wrong_pseudoinverse_is_found(tmp_path):
    for file in SCRIPTS.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        wrong = text.replace("return x, info.rank", "return x * 1.001, info.rank")
        assert (wrong != text) == (file.name == "substitutes.py")
        (tmp_path / file.name).write_text(wrong, encoding="utf-8")
    script = tmp_path / "run_some.py"
    script.write_text("import run_scipy\n\ndel run_scipy.SELECTION[1:]\nraise SystemExit(run_scipy.main())\n")
    done = run(script)
    assert done.returncode == 1
    assert "TestPinv::test_simple_real  [1 calls" in done.stdout
    assert "FAIL: failed in call" in done.stdout


def test_a_build_without_tests_is_named(tmp_path):
    script = tmp_path / "run_without.py"
    script.write_text("from harness import require_shipped\nrequire_shipped('numpy.linalg.no_such_tests')\n")
    (tmp_path / "harness.py").write_text((SCRIPTS / "harness.py").read_text(encoding="utf-8"), encoding="utf-8")
    done = run(script)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "numpy.linalg.no_such_tests is not there: this build of numpy ships without its tests."
    )
