"""Named arrays and a description of them in one file, in the safetensors format.

The format holds arrays and text and no code (https://huggingface.co/docs/safetensors), so that a file from anywhere may
be read. The description is one JSON string in its header.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_KEY = "lowrank"


def write(path: str | os.PathLike, arrays: Mapping[str, np.ndarray], description: Mapping[str, Any]) -> None:
    """Write the arrays; at any moment ``path`` is the old file, if there was one, or the whole new one."""
    from safetensors.numpy import save

    content = save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, {_KEY: json.dumps(dict(description))})
    path = Path(path)
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


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and their description.

    Raises ``FileNotFoundError`` if there is no file, ``ValueError`` if it is not one of ours or not whole.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            described = (file.metadata() or {}).get(_KEY)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is truncated or damaged ({error})") from error
    if described is None:
        raise ValueError(f"{path} is a safetensors file of something else; it holds {sorted(arrays)[:8]}")
    return arrays, json.loads(described)
