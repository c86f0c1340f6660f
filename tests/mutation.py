"""Mutation testing: is there a test that notices when a line of a room is wrong?

    python tests/mutation.py pinv kernels factor --output docs/results/mutation.txt

A mutant of ``lowrank/ROOM.py`` differs in one place: a comparison, an operation, a number, a condition, a statement
that is left out. A seeded sample of them is run against tests/core, which needs NumPy alone and seconds; a mutant that
no test notices has survived, and is listed with its line to be judged. Places that only other array libraries reach
(derivatives, traces) and messages are left out.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATIONS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult, ast.Mod: ast.Mult, ast.MatMult: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
# Reached with torch, JAX or under a trace alone.
ELSEWHERE = (
    "_gradients", "is_traced", "carries_derivative", "has_derivative", "stop_gradient", "_fused",
    "_warn_unless_idempotent",
)  # fmt: skip


def mutations(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Replacements of one node, each with what is done."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        changed = copy.deepcopy(node)
        changed.ops = [COMPARISONS[type(node.ops[0])]()]
        yield "comparison", changed
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        changed = copy.deepcopy(node)
        changed.op = OPERATIONS[type(node.op)]()
        yield "operation", changed
    if isinstance(node, ast.BoolOp):
        changed = copy.deepcopy(node)
        changed.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "and for or", changed
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield "operand alone", copy.deepcopy(node.operand)
    if isinstance(node, ast.IfExp):
        changed = copy.deepcopy(node)
        changed.body, changed.orelse = changed.orelse, changed.body
        yield "other way round", changed
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "opposite", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "another number", ast.Constant(node.value + 1)
    if isinstance(node, ast.Raise):
        yield "left out", ast.Pass()


def head(node: ast.AST) -> str:
    """What decides whether a node is reached: its text, but of a statement that holds others its first line alone."""
    if isinstance(node, ast.FunctionDef):
        return node.name
    return ast.unparse(node).partition("\n")[0] if hasattr(node, "body") else ast.unparse(node)


def places(tree: ast.Module) -> list[tuple[ast.AST, str, int | None]]:
    """Parent, field and index of every node that a test could see changed."""
    found = []

    def visit(node: ast.AST) -> None:
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list"):
                continue
            for i, child in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr | ast.Import | ast.ImportFrom):
                    continue
                if any(name in head(child) for name in ELSEWHERE):
                    continue
                found.append((node, field, i if isinstance(value, list) else None))
                visit(child)

    visit(tree)
    return found


def mutants(source: str) -> list[tuple[int, str, str, str]]:
    """Line, what was there, what is there now, and the whole source, of all mutants."""
    tree, made = ast.parse(source), []
    for parent, field, index in places(tree):
        holder = getattr(parent, field)
        node = holder if index is None else holder[index]
        for kind, changed in mutations(node):
            ast.copy_location(changed, node)
            put(parent, field, index, changed)
            text = ast.unparse(ast.fix_missing_locations(tree))
            put(parent, field, index, node)
            made.append((node.lineno, ast.unparse(node), f"{kind}: {ast.unparse(changed)}", text))
    return made


def put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def survives(room: str, source: str) -> bool:
    """Whether tests/core passes with this source for the room."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("lowrank", "tests/core"):
            shutil.copytree(ROOT / part, Path(folder) / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "tests/conftest.py"):
            shutil.copy(ROOT / part, Path(folder) / part)
        (Path(folder) / "lowrank" / f"{room}.py").write_text(source)
        command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider", "tests/core"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=60, check=False)
        except subprocess.TimeoutExpired:
            return False  # a loop without end is noticed
        return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rooms", nargs="+", metavar="ROOM", help="names of modules of lowrank, without .py")
    parser.add_argument("--sample", type=int, default=150, help="mutants of each room (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file to write the report to as well")
    options = parser.parse_args()
    for room in options.rooms:
        if not (ROOT / "lowrank" / f"{room}.py").is_file():
            parser.error(f"there is no room {room!r} in lowrank/")
    lines = []
    for room in options.rooms:
        source = (ROOT / "lowrank" / f"{room}.py").read_text()
        if not survives(room, source):
            parser.error(f"tests/core fails with {room}.py as it is")
        every = mutants(source)
        sample = sorted(random.Random(options.seed).sample(every, min(options.sample, len(every))))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            alive = list(pool.map(lambda mutant, room=room: survives(room, mutant[3]), sample))
        killed = len(sample) - sum(alive)
        lines.append(f"{room}: {killed} of {len(sample)} noticed, {killed / len(sample):.0%}; {len(every)} possible")
        lines += [
            f"  line {line}: {before}  →  {after}"
            for (line, before, after, _), survived in zip(sample, alive, strict=True)
            if survived
        ]
        print("\n".join(lines[-1 - sum(alive) :]), flush=True)
    if options.output is not None:
        options.output.write_text(f"seed {options.seed}\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
