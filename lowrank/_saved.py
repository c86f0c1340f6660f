"""Named arrays and a description of them in one file, in the safetensors format.

The format holds arrays and text and no code (https://huggingface.co/docs/safetensors), so that a file from anywhere may
be read. The description is one JSON string in its header, and beside it stands the SHA-256 (FIPS 180-4) of everything:
what is read is what was written, to the bit, or is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_KEY, _DIGEST = "lowrank", "sha256"


def write(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], description: Mapping[str, Any]) -> None:
    """Write the arrays; at any moment ``path`` is the old file, if there was one, or the whole new one."""
    path = _checked_path(path)
    if path.is_dir() or not path.name:
        raise IsADirectoryError(f"path names a folder, {str(path)!r}; name a file in it")
    if "\0" in path.name or not path.parent.is_dir():
        raise FileNotFoundError(f"path is {str(path)!r}, and there is no such folder; make it first")
    with _told_what_to_install():
        from safetensors.numpy import save

    arrays = {name: np.asarray(a, order="C") for name, a in arrays.items()}
    described = json.dumps(dict(description))
    content = save(arrays, {_KEY: described, _DIGEST: _digest(arrays, described)})
    # In the same folder, for a rename is atomic only within one file system.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and their description.

    Raises ``FileNotFoundError`` if there is no file, ``ValueError`` if it is not one of ours or not whole.
    """
    path = _checked_path(path)
    with _told_what_to_install():
        from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is truncated or damaged ({error})") from error
    if not metadata.keys() & {_KEY, _DIGEST}:
        raise ValueError(f"{path} is a safetensors file of something else; it holds {sorted(arrays)[:8]}")
    if metadata.get(_DIGEST) != _digest(arrays, metadata.get(_KEY, "")):
        raise ValueError(f"{path} is damaged: its SHA-256 is not that of what was written; take another copy")
    return arrays, json.loads(metadata[_KEY])


def _digest(arrays: Mapping[str, np.ndarray], described: str) -> str:
    digest = hashlib.sha256(described.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].data)
    return digest.hexdigest()


def _checked_path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a pathlib.Path, not {type(path).__name__}")
    return Path(path)


@contextlib.contextmanager
def _told_what_to_install() -> Iterator[None]:
    try:
        yield
    except ImportError as missing:
        raise ImportError(
            "factorisations are kept in files by safetensors, which is not installed: pip install 'lowrank[save]'"
        ) from missing
