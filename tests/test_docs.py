"""Every program in the documentation runs, and so do the commands of the page on SOFT."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import checkpoint
import pytest
import timm
import torch

ROOT = Path(__file__).parents[1]
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if "```python\n" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_programs_run(page):
    program = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_commands_of_the_page_on_soft_run(tmp_path):
    """As they stand there, with a shorter training and the name of its folder filled in."""
    block = re.search(r"```bash\ncd examples/soft\n(.*?)```", (ROOT / "docs" / "soft.md").read_text(), flags=re.DOTALL)
    commands = [line.partition("#")[0].split() for line in block[1].splitlines()]
    assert [command[1] for command in commands[:1]] == ["train.py"]
    commands[0] += ["--epochs", "1", "--output", "runs/short"]
    torch.save(checkpoint.to_official(timm.create_model("soft_tiny").state_dict()), tmp_path / "soft_tiny.pth")
    for python, *arguments in commands:
        assert python == "python"
        script, *filled = (argument.replace("runs/…", "runs/short") for argument in arguments)
        command = [sys.executable, str(ROOT / "examples" / "soft" / script), *filled]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert {"soft.onnx", "maps", "soft_tiny.safetensors"} <= {path.name for path in tmp_path.iterdir()}
