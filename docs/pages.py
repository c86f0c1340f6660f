"""Pages that are made when the documentation is built: the gallery, by running the examples, and the benchmarks and the
table of backends, from the results that are kept beside them.

    python docs/pages.py        writes them into docs/generated/ without building anything else
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
GALLERY = sorted((ROOT / "examples").glob("*.py"))
# Columns of a benchmark's table, and how a cell is written; all others are in the file.
COLUMNS = {
    "attention": ["heads", "n", "pass", "method", "median", "spread", "memory", "error"],
    "kernel_ridge": ["data", "points", "method", "setting", "seconds", "test error", "steps"],
    "newton_schedule": ["kind", "kappa", "products"],
    "nystrom": ["points", "n", "rank", "method", "seconds", "to floor", "error"],
    "pinv": ["kind", "size", "batch", "kappa", "method", "median", "min ratio", "worst error"],
    "pinv_accuracy": ["condition", "pinv_newton", "20 textbook steps", "Cholesky"],
    "soft": ["size", "batch", "pass", "method", "median", "images/s", "memory", "gmacs", "ratio"],
}
VERSIONS = ("python", "numpy", "array-api-compat", "array-api-strict", "torch", "jax")
UNITS = {
    "attention": "Seconds, bytes, and errors relative to the largest entry.",
    "kernel_ridge": "Seconds; the test error of the housing data is a mean square, of the digits a share.",
    "newton_schedule": "Matrix products to the tolerance, by method.",
    "nystrom": "Seconds; `to floor` is the time over that of the kernel block and of the product it cannot do without.",
    "pinv": "Milliseconds; `min ratio` is the least time over pinv_newton's, so that below 1 is faster than it.",
    "pinv_accuracy": "Median relative errors in float32.",
    "soft": "Seconds and bytes; `ratio` is the literal transcription's time over the row's.",
}


def write(docs: Path) -> None:
    folder = docs / "generated"
    folder.mkdir(exist_ok=True)
    gallery(folder)
    (folder / "benchmarks.md").write_text(benchmarks(docs))
    (folder / "backends.md").write_text(backends(docs))


def sections(script: Path) -> tuple[str, str]:
    """First line and rest of a script's docstring."""
    title, _, rest = ast.get_docstring(ast.parse(script.read_text())).partition("\n")
    return title.rstrip("."), rest.strip("\n")


def gallery(folder: Path) -> None:
    """A page for each example, with what it prints and draws, and one that lists them."""
    names = []
    for script in GALLERY:
        title, text = sections(script)
        with tempfile.TemporaryDirectory() as output:
            command = [sys.executable, str(script), "--quick", "--output", output]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{script.name} failed: {done.stderr.strip()}")
            (folder / f"{script.stem}.png").write_bytes((Path(output) / f"{script.stem}.png").read_bytes())
        page = (
            f"# {title}\n\n{literal_indents(text)}\n\n![What it draws]({script.stem}.png)\n\n"
            "It prints, at the small size that it was run with for this page:\n\n"
            f"```text\n{done.stdout.rstrip()}\n```\n\n"
            f"```{{literalinclude}} ../../{script.relative_to(ROOT)}\n:language: python\n```\n"
        )
        (folder / f"{script.stem}.md").write_text(page)
        names.append(script.stem)
    listed = "\n".join(names)
    (folder / "gallery.md").write_text(
        "# Examples\n\nEach was run when this page was built, at its smallest size.\n\n"
        f"```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"
    )


def literal_indents(text: str) -> str:
    """Indented paragraphs of a docstring as fenced blocks."""
    blocks = [f"```bash\n{block.strip()}\n```" if block.startswith("    ") else block for block in text.split("\n\n")]
    return "\n\n".join(blocks)


def benchmarks(docs: Path) -> str:
    parts = [
        "# Benchmarks\n\n"
        "Every row of every result that is kept, made by the scripts in `examples/benchmarks/` with the command that "
        "is given; where `lowrank` loses, the row stands here like the others. The machines are shared and noisy: "
        "ratios within a table mean more than seconds.\n"
    ]
    for name, columns in COLUMNS.items():
        results = json.loads((docs / "results" / f"{name}.json").read_text())
        about = {k: v for k, v in results.items() if isinstance(v, str | int | float) and k != "command"}
        title, _ = sections(ROOT / "examples" / "benchmarks" / f"{name}.py")
        parts += [
            f"## {name}\n",
            f"{title}.\n",
            f"```bash\n{results['command']}\n```\n",
            ", ".join(f"{key} {value}" for key, value in about.items()) + f". {UNITS[name]}\n",
            f"![The figure of {name}](../figures/{name}.png)\n",
            table(columns, results["rows"]),
        ]
    return "\n".join(parts)


def backends(docs: Path) -> str:
    results = json.loads((docs / "results" / "backends.json").read_text())
    rows = results["rows"]
    # A machine without a GPU has no errors to show for one: a column of nothing but reasons is a line of text.
    every = list(dict.fromkeys(way for row in rows.values() for way in row))
    unseen = [way for way in every if any("no CUDA" in row.get(way, "") for row in rows.values())]
    ways = [way for way in every if way not in unseen]
    versions = ", ".join(f"{name} {results[name]}" for name in VERSIONS)
    return (
        "# Array libraries\n\n"
        "What the tests (`tests/test_backends.py`) found when they last filled this table: the largest error of every "
        "function on every library, relative to the largest entry of what NumPy says in float64; *equal*, for indices; "
        "*refused*, by a TypeError that says so, where a traced program has no values to decide by. Library, dtype and "
        "device of every result were those of its arguments. (Factors in float32 are what the shift of 30·eps·‖W‖ "
        "makes of them, which keeps F Fᵀ below K; W has a condition of 300 here.)\n\n"
        f"```bash\n{results['command']}\n```\n\n{results['date']}, {results['machine']}: {versions}.\n\n"
        + table(["function", *ways], [{"function": f"`{name}`", **row} for name, row in rows.items()])
        + (f"\nNot run, for want of a CUDA device: {', '.join(unseen)}.\n" if unseen else "")
        + "\nTorch's default dtype changes nothing, to the last bit (tested). `lowrank.nn` is for torch, "
        "`lowrank.sklearn` takes what scikit-learn takes, `lowrank.dask` Dask arrays of NumPy or CuPy chunks.\n"
    )


def table(columns: list[str], rows: Iterable[dict]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(part)}" for key, part in value.items())
    return str(value).replace("|", "\\|")


if __name__ == "__main__":
    write(ROOT / "docs")
