"""All that a run needs to go on, in files that are the old one or the whole new one at any moment.

A folder holds the last few states as state-00000123.pt, 123 the steps done. They are read as tensors and plain Python
values alone, and only if every byte is as it was written.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoint import UNREADABLE, replacing

KEYS = {"step", "seconds", "sums", "history", "run", "model", "average", "optimizer"}


class Log:
    """log.csv, a row for an epoch; and TensorBoard's files, where that is installed."""

    def __init__(self, folder: Path, rows: list[dict[str, float]]):
        self.path, self.board = folder / "log.csv", None
        self._write(rows)
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder, purge_step=len(rows) + 1)

    def write(self, rows: list[dict[str, float]]) -> None:
        """All rows so far, of which the last is new."""
        self._write(rows)
        if self.board:
            for key, value in rows[-1].items():
                self.board.add_scalar(key, value, rows[-1]["epoch"])
            self.board.flush()

    def _write(self, rows: list[dict[str, float]]) -> None:
        with replacing(self.path) as file:
            log = csv.writer(io.TextIOWrapper(file, write_through=True, newline=""))
            log.writerow(rows[0] if rows else [])
            log.writerows([v if isinstance(v, int) else f"{v:.6g}" for v in row.values()] for row in rows)


@contextlib.contextmanager
def signals(handle: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM and SIGINT go to ``handle``; the second of a kind does what it did before."""

    def once(number: int, _: object) -> None:
        signal.signal(number, before[number])
        handle(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, once)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("state-"))


def states(folder: Path) -> list[Path]:
    """The state files, oldest first."""
    return sorted((p for p in folder.glob("state-*.pt") if p.stem[6:].isdigit()), key=step_of)


def save(folder: Path, content: dict[str, Any], *, keep: int) -> Path:
    """Write a state, then delete all but the last ``keep`` up to it, and what killed runs have left."""
    path = folder / f"state-{content['step']:08d}.pt"
    with replacing(path) as file:
        torch.save(content, file)
    # What comes after this step is damaged, or a future that will be another: see ``newest``.
    kept = [p for p in states(folder) if step_of(p) <= content["step"]][-keep:]
    for old in [*states(folder), *folder.glob(".*.part")]:
        if old not in kept:
            old.unlink(missing_ok=True)
    return path


def read(path: Path) -> dict[str, Any]:
    """The content of a state file, on the CPU. Raises ValueError if it is not whole or something else."""
    try:
        # torch does not look at the checksums that it writes.
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, zipfile.BadZipFile, *UNREADABLE) as error:
        raise ValueError(f"{path} is damaged or no state of a run ({str(error).partition(chr(10))[0]})") from error
    if not isinstance(content, dict) or not content.keys() >= KEYS:
        raise ValueError(f"{path} is no state of a run")
    return content


def newest(folder: Path) -> dict[str, Any]:
    """The newest state in the folder that can be read; those that cannot are named on stderr.

    Raises FileNotFoundError if there is none.
    """
    for path in reversed(states(folder)):
        try:
            return read(path)
        except ValueError as error:
            print(f"{error}; taking the one before", file=sys.stderr)
    raise FileNotFoundError(f"{folder} holds no state to resume from that can be read (state-….pt)")
