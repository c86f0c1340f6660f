"""Weights of SOFT on disk: the authors' files read and written, our own written and read as safetensors.

    python examples/soft/checkpoint.py IN OUT                 official to ours, a safetensors file
    python examples/soft/checkpoint.py --to-official IN OUT   ours to official, .safetensors or .pth

Our layout is the state dict of ``model.Soft``; the authors' (github.com/fudan-zvg/SOFT) has the same tensors under
other names. A file of ours says in its header which model it holds: ``model``, its timm name, and ``arguments``, a
JSON object of what timm.create_model was given besides. A file is never unpickled beyond plain tensors, never
replaced by a half-written one, and by the command not at all.
"""

import argparse
import contextlib
import inspect
import json
import os
import pickle
import re
import secrets
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import model as soft
import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor

# The models that the authors' code builds; the normalised ones have the same tensors as the plain.
PUBLISHED = tuple(f"soft_{n}{size}" for n in ("", "norm_") for size in ("tiny", "small", "medium", "large", "huge"))
# What torch's restricted unpickler raises on files that are damaged, hostile or something else: all were met when
# random bits were flipped and files cut short.
UNREADABLE = (pickle.UnpicklingError, struct.error, RuntimeError, EOFError, LookupError, OverflowError)
UNREADABLE += (ValueError, TypeError, AttributeError, AssertionError)
# Layers of a block, official to ours.
_SOFTMAX_FREE = {"att.norm1": "norm1", "att.norm2": "norm2", "att.ff1": "mlp.fc1", "att.ff2": "mlp.fc2"}
_SOFTMAX_FREE |= {"att.mha.W_q": "attn.query", "att.mha.W_v": "attn.value", "att.mha.ff": "attn.proj"}
_SOFTMAX_FREE |= {"att.mha.attn.Qlandmark_op": "attn.landmark_conv", "att.mha.attn.conv": "attn.value_conv"}
_SOFTMAX_FREE |= {"att.mha.attn.Qnorm_act.0": "attn.landmark_norm"}
_SOFTMAX = {"attn.q": "attn.query", "attn.kv": "attn.key_value", "attn.proj": "attn.proj"}
_SOFTMAX |= {name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
# All layers and lone tensors, official to ours and back; * stands for the number of a block.
_OURS = {"cls_token": "stages.3.cls_token", "norm": "norm", "head": "head"}
for _s, _layers in enumerate((_SOFTMAX_FREE, _SOFTMAX_FREE, _SOFTMAX_FREE, _SOFTMAX)):
    _OURS[f"pos_embed{_s + 1}"] = f"stages.{_s}.pos_embed"
    _OURS |= {f"patch_embed{_s + 1}.proj.{i}": f"stages.{_s}.patch_embed.{i}" for i in (0, 1, 3, 4, 6, 7)}
    _OURS |= {f"block{_s + 1}.*.{theirs}": f"stages.{_s}.blocks.*.{ours}" for theirs, ours in _layers.items()}
_OFFICIAL = {ours: official for official, ours in _OURS.items()}
_BLOCK = re.compile(r"(block\d|stages\.\d\.blocks)\.(\d+)\.")
_KINDS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _rename(key: str, names: Mapping[str, str]) -> str | None:
    """The name of a tensor in the other layout, None if it has none."""
    layer, _, kind = key.rpartition(".")
    if block := _BLOCK.match(layer):
        layer = f"{block[1]}.*.{layer[block.end() :]}"
    if layer in names and kind in _KINDS:
        new = f"{names[layer]}.{kind}"
        return new.replace("*", block[2]) if block else new
    return names.get(key)


def _renamed(state_dict: Mapping[str, Tensor], names: Mapping[str, str], layout: str) -> dict[str, Tensor]:
    renamed = {key: _rename(key, names) for key in state_dict}
    if unknown := [key for key, new in renamed.items() if new is None]:
        raise ValueError(f"{len(unknown)} keys do not belong to the {layout} layout of SOFT: {_listed(unknown)}")
    return {new: state_dict[key] for key, new in renamed.items()}


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict under the names of ``model.Soft``. Raises ValueError for a key it does not know."""
    return _renamed(state_dict, _OURS, "official")


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ``model.Soft`` under the authors' names; the inverse of ``from_official``."""
    return _renamed(state_dict, _OFFICIAL, "model.Soft")


def load_official(path: str | Path, *, name: str | None = None) -> soft.Soft:
    """A model that computes what the authors' does, in eval mode, from a file of theirs and in its dtype.

    ``path`` is a .safetensors file, or a torch file whose weights are the whole of it or stand under
    ``state_dict_ema``, ``state_dict`` or ``model`` (the first that is there); names may begin with ``module.``.
    ``name`` defaults to the plain model of the file's depths; that weights belong to a normalised model, such as
    "soft_norm_tiny", cannot be seen in the file. Raises FileNotFoundError if there is no such file, ValueError if it
    cannot be read as tensors alone, or if its tensors are not those of the model; all differences are told.
    """
    return _named_official(Path(path), name)[1]


def _named_official(path: Path, name: str | None) -> tuple[str, soft.Soft]:
    state_dict = _read_official(path)
    name = name or _name_from_depths(state_dict, path)
    head = state_dict.get("head.weight", torch.empty(1000))
    model = _published_model(name, len(head) if head.ndim else 1000)
    _check_layout(state_dict, to_official(model.state_dict()), f"{path} does not hold the weights of {name}")
    return name, _filled(model, from_official(state_dict))


def _published_model(name: str, num_classes: int) -> soft.Soft:
    if name not in PUBLISHED:
        raise ValueError(f"the authors have no model {name!r}; theirs are {', '.join(PUBLISHED)}")
    return timm.create_model(name, trained="official", num_classes=num_classes)


def _filled(model: soft.Soft, state_dict: Mapping[str, Tensor]) -> soft.Soft:
    if not (dtype := state_dict["norm.weight"].dtype).is_floating_point:
        raise ValueError(f"norm.weight is of {dtype}, and so the file holds no weights")
    model.to(dtype).load_state_dict(state_dict)
    return model.eval()


def _read_official(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        content = load(path)[0]
    else:
        # timm's training script, which the authors used, stores its arguments beside the weights. A Namespace
        # holds attributes and runs nothing.
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            raise ValueError(
                f"{path} is not a torch file of tensors alone, or is damaged ({first_line(error)}); "
                "it has not been unpickled"
            ) from error
    for wrapping in ("state_dict_ema", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapping), Mapping):
            content = content[wrapping]
            break
    tensors = content.items() if isinstance(content, Mapping) else [(None, content)]
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors):
        raise ValueError(f"{path} holds no state dict, alone or under state_dict_ema, state_dict or model")
    if any(key.startswith("stages.") for key in content):
        raise ValueError(f"{path} is in our layout already; --to-official turns it into the authors'")
    return {key.removeprefix("module."): value for key, value in content.items()}


def _name_from_depths(state_dict: Mapping[str, Tensor], path: Path) -> str:
    blocks = {match.groups() for key in state_dict if (match := re.match(r"block([1-4])\.(\d+)\.", key))}
    depths = tuple(sum(stage == str(i) for stage, _ in blocks) for i in (1, 2, 3, 4))
    if names := [name for name in PUBLISHED if soft.CONFIGS[name]["depths"] == depths]:
        return names[0]  # the plain model, listed before the normalised
    raise ValueError(f"no SOFT model has the depths {depths} found in {path}; if it should be one, pass its name")


def _check_layout(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], complaint: str) -> None:
    missing = [key for key in expected if key not in state_dict]
    unexpected = [key for key in state_dict if key not in expected]
    wrong = [
        f"{key} {tuple(state_dict[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of the wrong shape": wrong}
    if found := [f"{len(keys)} {kind}: {_listed(keys)}" for kind, keys in kinds.items() if keys]:
        raise ValueError(f"{complaint}; " + "; ".join(found))


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:8]) + (", …" if len(keys) > 8 else "")


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def load_model(path: str | Path) -> tuple[soft.Soft, dict[str, str]]:
    """The model of a file of ours, in eval mode and the dtype of the file, and the file's metadata.

    Raises FileNotFoundError or, if the file is damaged, does not say which model it holds or holds another, ValueError.
    """
    state_dict, metadata = load(path)
    if not metadata.keys() >= {"model", "arguments"}:
        raise ValueError(f"{path} has no metadata 'model' and 'arguments', which say what model it holds")
    if (name := metadata["model"]) not in soft.CONFIGS:
        raise ValueError(f"{path} holds a model {name!r}, which there is not; there are {', '.join(soft.CONFIGS)}")
    try:
        arguments = json.loads(metadata["arguments"])
        # Not for timm, which would take a file's or an address's name for an argument.
        if unknown := sorted(set(arguments) - set(inspect.signature(soft.Soft).parameters)):
            raise ValueError(f"unknown: {_listed(unknown)}")
        model = timm.create_model(name, **arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"the metadata of {path} do not fit {name}: arguments {metadata['arguments']} ({first_line(error)})"
        ) from error
    _check_layout(state_dict, model.state_dict(), f"{path} does not hold the weights of {name}")
    return _filled(model, state_dict), metadata


def save(path: str | Path, state_dict: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict as safetensors, atomically: ``path`` is the old file or the whole new one at any moment.

    ``metadata`` is kept in the file's header, strings to strings. Raises TypeError if anything else is given as
    metadata or as a tensor.
    """
    metadata = dict(metadata or {})
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata must map str to str, not {key!r} to {value!r}")
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"state_dict must hold tensors; {key!r} is a {type(value).__name__}")
    content = safetensors.torch.save({key: value.contiguous() for key, value in state_dict.items()}, metadata)
    with replacing(Path(path)) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which becomes ``path`` at the end, at once and for good; after an error nothing has changed."""
    # In the same folder, for a rename is atomic only within one file system.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or the new name may be lost with the power
    finally:
        os.close(folder)


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict and the metadata of a safetensors file, on the CPU.

    Raises FileNotFoundError or, for all but a whole safetensors file, ValueError; a pickle is refused unread.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is truncated or damaged ({error})") from error


def check_new(path: Path) -> None:
    """Raise OSError unless a file can be made at ``path``: FileExistsError if something is there already."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists; name another file, nothing is overwritten")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}; make it, or name another")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"the folder {path.parent} cannot be written to; name another for {path.name}")


def _convert(source: Path, target: Path, name: str | None) -> str:
    name, model = _named_official(source, name)
    arguments = json.dumps({"trained": "official", "num_classes": model.num_classes})
    save(target, model.state_dict(), metadata={"model": name, "arguments": arguments})
    return f"{len(model.state_dict())} tensors of {name}"


def _convert_to_official(source: Path, target: Path) -> str:
    model, metadata = load_model(source)
    name, state_dict = metadata["model"], model.state_dict()
    with torch.device("meta"):
        expected = _published_model(name, model.num_classes or 1000).state_dict()
    _check_layout(state_dict, expected, f"{source} holds no model of the authors', for it is not their {name}")
    if json.loads(metadata["arguments"]).get("trained") != "official":
        print(
            f"{source} has not been trained with the authors' inverse; their code will compute otherwise",
            file=sys.stderr,
        )
    official = to_official(state_dict)
    if target.suffix == ".safetensors":
        save(target, official)
    else:
        with replacing(target) as file:
            torch.save({"state_dict": official}, file)
    return f"{len(official)} tensors of {name} under the authors' names"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Convert SOFT checkpoints between the authors' layout and ours.")
    parser.add_argument("source", metavar="IN", type=Path, help="official .pth, .pth.tar or .safetensors file, or ours")
    parser.add_argument("target", metavar="OUT", type=Path, help="new .safetensors file; official ones also .pth")
    parser.add_argument("--to-official", action="store_true", help="IN is ours and OUT is to be official")
    parser.add_argument("--name", help="timm name of an official model; needed for the normalised ones (soft_norm_…)")
    options = parser.parse_args(arguments)
    source, target, name = options.source, options.target, options.name
    suffixes = [".safetensors", ".pth"][: 1 + options.to_official]
    if target.suffix not in suffixes:
        parser.error(f"OUT must end in {' or '.join(suffixes)}, not {target.name!r}")
    if options.to_official and name is not None:
        parser.error(f"--name {name} is for official files; ours say which model they hold")
    try:
        check_new(target)
        done = _convert_to_official(source, target) if options.to_official else _convert(source, target, name)
    except (OSError, ValueError) as error:
        parser.error(first_line(error))
    print(f"{target}: {done}")


if __name__ == "__main__":
    main()
