"""Every example runs at toy size and leaves its plot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_runs_and_leaves_its_plot(script, tmp_path):
    command = [
        sys.executable,
        "-W",
        "error",
        str(script),
        "--quick",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    assert (tmp_path / f"{script.stem}.png").read_bytes().startswith(b"\x89PNG")
