"""The source distribution and the wheel: do they build, install where nothing else is, and work?

    python tests/install.py            with the versions of the dependencies that pip would choose
    python tests/install.py --least    with the least that pyproject.toml allows

The wheel is built from the source distribution and installed into an empty environment. There tests/core, which needs
NumPy alone, and `python -m lowrank` are run out of sight of this folder, so that what is tested is what was installed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]


def least_versions() -> list[str]:
    """Every dependency at the version from which it is allowed."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return [dependency.replace(">=", "==") for dependency in dependencies]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--least", action="store_true", help="the least versions that pyproject.toml allows")
    versions = least_versions() if parser.parse_args().least else []

    def run(*command: object) -> None:
        print("+", *(Path(str(part)).name for part in command), flush=True)
        subprocess.run([str(part) for part in command], cwd=folder, check=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
        (wheel,), (_,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
        venv.create(folder / "empty", with_pip=True)
        python = folder / "empty" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", wheel, *versions)
        run(python, "-m", "lowrank")
        run(python, "-m", "pip", "install", "--quiet", "pytest", "hypothesis", *versions)
        shutil.copytree(ROOT / "tests" / "core", folder / "core")
        shutil.copy(ROOT / "tests" / "conftest.py", folder)
        run(python, "-m", "pytest", "-q", "core")


if __name__ == "__main__":
    main()
