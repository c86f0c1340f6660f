"""Files that were damaged on their way: what reads them gives what was written, or refuses in one line."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import checkpoint
import numpy as np
import pytest
import state
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank import LowRank, gaussian_kernel, nystrom

CASES = 300
KERNEL = functools.partial(gaussian_kernel, lengthscale=1.3)


@st.composite
def damages(draw, whole: bytes) -> bytes:
    """The bytes cut short, with bits flipped, pieces in another order, or strange bytes in between."""
    content, n = bytearray(whole), len(whole)
    # Half of all damage is done where the structure is: at the beginning, or the end of an archive.
    at = st.integers(0, n - 1) | st.integers(0, min(n, 600) - 1) | st.integers(max(0, n - 600), n - 1)
    how = draw(st.sampled_from(("cut", "flipped", "shuffled", "inserted", "zeroed")))
    if how == "cut":
        del content[draw(at) :]
    elif how == "flipped":
        for position in draw(st.lists(at, min_size=1, max_size=8)):
            content[position] ^= 1 << draw(st.integers(0, 7))
    elif how == "shuffled":
        cuts = sorted({0, n, *draw(st.lists(at, min_size=2, max_size=6))})
        pieces = [content[a:b] for a, b in itertools.pairwise(cuts)]
        content = bytearray().join(draw(st.permutations(pieces)))
    elif how == "inserted":
        position = draw(at)
        content[position:position] = draw(st.binary(min_size=1, max_size=40))
    else:
        position = draw(at)
        content[position : position + draw(st.integers(1, 200))] = bytes(draw(st.integers(1, 200)))
    return bytes(content)


def low_rank(path: Path) -> list[Any]:
    held = LowRank.load(path, kernel=KERNEL)
    return [held.factor, held.landmarks, held.pivots, held.trace_error, held.cholesky, held.rotation]


def run_state(path: Path) -> list[Any]:
    content = state.read(path)
    return [content["model"]["weight"], *(content[key] for key in sorted(state.KEYS - {"model"}))]


def our_weights(path: Path) -> list[Any]:
    return list(checkpoint.load_model(path)[0].state_dict().values())


@functools.cache
def written(suffix: str, write: Callable[[Path], object]) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"written{suffix}"
        write(path)
        return path.read_bytes()


def write_low_rank(path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((12, 2))
    nystrom(x, kernel=KERNEL, rank=4, rng=0).truncate(rank=3).save(path)


def write_run_state(path: Path) -> None:
    torch.save({key: {"weight": torch.arange(6.0)} if key == "model" else 7 for key in state.KEYS}, path)


def write_our_weights(path: Path) -> None:
    model = timm.create_model("soft_digits", num_classes=2)
    checkpoint.save(path, model.state_dict(), metadata={"model": "soft_digits", "arguments": '{"num_classes": 2}'})


def compare(results: list[Any], right: list[Any]) -> bool:
    return len(results) == len(right) and all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(results, right, strict=True)
    )


# Whether the file says itself that it is what was written. In the others a flipped bit of a weight is another weight.
@pytest.mark.parametrize(
    ("suffix", "write", "read", "sealed"),
    [
        (".safetensors", write_low_rank, low_rank, True),
        (".pt", write_run_state, run_state, True),
        (".safetensors", write_our_weights, our_weights, False),
    ],
    ids=["LowRank", "state of a run", "weights"],
)
def test_it_is_read_as_written_or_refused(suffix, write, read, sealed, tmp_path):
    whole, path, refused = written(suffix, write), tmp_path / f"damaged{suffix}", []
    path.write_bytes(whole)
    right = read(path)

    @given(damages(whole))
    @settings(max_examples=CASES)
    def run(content):
        path.write_bytes(content)
        try:
            results = read(path)
        except ValueError as error:
            refused.append(str(error))
            return
        if sealed:
            assert compare(results, right)
        else:
            assert [np.shape(a) for a in results] == [np.shape(b) for b in right]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # torch, of a flipped bit in the version
        run()
    assert len(refused) > CASES // 4
    assert all(path.name in message and len(message.splitlines()) == 1 for message in refused)
