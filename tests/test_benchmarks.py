"""Every benchmark runs, prints a table and writes JSON; the headline claims it makes are asserted at small size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "examples" / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_runs_and_writes_its_results(script, tmp_path):
    command = [sys.executable, str(script), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads((tmp_path / f"{script.stem}.json").read_text())
    assert {"command", "date", "machine", "rows"} <= results.keys()
    assert len(done.stdout.splitlines()) == len(results["rows"]) + 1
    assert (tmp_path / f"{script.stem}.png").read_bytes().startswith(b"\x89PNG")


def test_pinv_is_as_accurate_as_cholesky(tmp_path):
    script = next(path for path in SCRIPTS if path.stem == "pinv_accuracy")
    subprocess.run([sys.executable, str(script), "--quick", "--output", str(tmp_path)], capture_output=True, check=True)
    rows = json.loads((tmp_path / "pinv_accuracy.json").read_text())["rows"]
    assert max(row["condition"] for row in rows) > 4.8e3
    for row in rows:
        assert row["pinv_newton, worst ratio to Cholesky"] <= 1.0
