"""Weights of SOFT on disk: the authors' files read, our own written and read as safetensors.

Our layout is the state dict of ``model.Soft``; the authors' (github.com/fudan-zvg/SOFT) has the same tensors under
other names. A file is never unpickled beyond plain tensors, and never replaced by a half-written one.

Run as ``python checkpoint.py IN OUT`` to turn an official file into one of ours.
"""

import argparse
import os
import pickle
import re
import secrets
import struct
from collections.abc import Mapping
from pathlib import Path

import model as soft
import safetensors
import safetensors.torch
import torch
from torch import Tensor

# What torch's restricted unpickler raises on files that are damaged, hostile or something else: all were met when
# random bits were flipped and files cut short.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
)
# Names inside a block, official to ours; a name that is not listed is the same in both.
_SOFTMAX_FREE = {
    "att.mha.W_q": "attn.query",
    "att.mha.W_v": "attn.value",
    "att.mha.ff": "attn.proj",
    "att.mha.attn.Qlandmark_op": "attn.landmark_conv",
    "att.mha.attn.Qnorm_act.0": "attn.landmark_norm",
    "att.mha.attn.conv": "attn.value_conv",
    "att.norm1": "norm1",
    "att.norm2": "norm2",
    "att.ff1": "mlp.fc1",
    "att.ff2": "mlp.fc2",
}
_SOFTMAX = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.q": "attn.query",
    "attn.kv": "attn.key_value",
    "attn.proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def _official_to_ours(key: str) -> str | None:
    """The name of an official tensor in ``model.Soft``, None if it has none."""
    if match := re.fullmatch(r"block([1-4])\.(\d+)\.(.+)\.(weight|bias)", key):
        stage, block, layer, kind = match.groups()
        layer = (_SOFTMAX if stage == "4" else _SOFTMAX_FREE).get(layer)
        return layer and f"stages.{int(stage) - 1}.blocks.{block}.{layer}.{kind}"
    if match := re.fullmatch(r"patch_embed([1-4])\.proj\.(\d+\.\w+)", key):
        return f"stages.{int(match[1]) - 1}.patch_embed.{match[2]}"
    if match := re.fullmatch(r"pos_embed([1-4])", key):
        return f"stages.{int(match[1]) - 1}.pos_embed"
    if key == "cls_token":
        return "stages.3.cls_token"
    return key if re.fullmatch(r"(norm|head)\.(weight|bias)", key) else None


def _ours_to_official(key: str) -> str | None:
    """The inverse of ``_official_to_ours``."""
    if match := re.fullmatch(r"stages\.([0-3])\.blocks\.(\d+)\.(.+)\.(weight|bias)", key):
        stage, block, layer, kind = match.groups()
        names = {ours: official for official, ours in (_SOFTMAX if stage == "3" else _SOFTMAX_FREE).items()}
        return names.get(layer) and f"block{int(stage) + 1}.{block}.{names[layer]}.{kind}"
    if match := re.fullmatch(r"stages\.([0-3])\.patch_embed\.(\d+\.\w+)", key):
        return f"patch_embed{int(match[1]) + 1}.proj.{match[2]}"
    if match := re.fullmatch(r"stages\.([0-3])\.pos_embed", key):
        return f"pos_embed{int(match[1]) + 1}"
    if key == "stages.3.cls_token":
        return "cls_token"
    return key if re.fullmatch(r"(norm|head)\.(weight|bias)", key) else None


def _renamed(state_dict: Mapping[str, Tensor], rename, layout: str) -> dict[str, Tensor]:
    renamed = {key: rename(key) for key in state_dict}
    if unknown := [key for key, new in renamed.items() if new is None]:
        raise ValueError(f"{len(unknown)} keys do not belong to the {layout} layout of SOFT: {_listed(unknown)}")
    return {new: state_dict[key] for key, new in renamed.items()}


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict under the names of ``model.Soft``. Raises ValueError for a key it does not know."""
    return _renamed(state_dict, _official_to_ours, "official")


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ``model.Soft`` under the authors' names; the inverse of ``from_official``."""
    return _renamed(state_dict, _ours_to_official, "model.Soft")


def load_official(path: str | os.PathLike, *, name: str | None = None) -> soft.Soft:
    """A model that computes what the authors' does, from a file of theirs.

    Parameters
    ----------
    path : path
        A .safetensors file, or a torch file whose weights are the whole of it or stand under ``state_dict_ema``,
        ``state_dict`` or ``model`` (the first that is there); names may begin with ``module.``.
    name : str, optional
        The timm name, such as "soft_norm_tiny". The default is the plain model of the file's depths; that weights
        belong to a normalised model cannot be seen in the file.

    Returns
    -------
    Soft
        In eval mode and the dtype of the file, with the authors' unconverged inverse and with landmarks that grow
        with the image.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it cannot be read as tensors alone, or its tensors are not those of the model; all differences are told.
    """
    state_dict = _read_official(Path(path))
    return _published_model(name or _name_from_depths(state_dict), state_dict)


def _published_model(name: str, state_dict: Mapping[str, Tensor]) -> soft.Soft:
    published = {"trained": "official"}
    if "head.weight" in state_dict:
        published["num_classes"] = len(state_dict["head.weight"])
    if name not in soft.CONFIGS:
        raise ValueError(f"there is no model {name!r}; the names are {', '.join(soft.CONFIGS)}")
    model = soft.Soft(**soft.CONFIGS[name] | published)
    _check_layout(state_dict, to_official(model.state_dict()), name)
    model.to(state_dict["norm.weight"].dtype).load_state_dict(from_official(state_dict))
    return model.eval()


def _read_official(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        content = load(path)[0]
    else:
        # timm's training script, which the authors used, stores its arguments beside the weights. A Namespace
        # holds attributes and runs nothing.
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            raise ValueError(
                f"{path} is not a torch file of tensors alone, or is damaged ({error}); it has not been unpickled"
            ) from error
    for wrapping in ("state_dict_ema", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapping), Mapping):
            content = content[wrapping]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict, alone or under state_dict_ema, state_dict or model")
    return {key.removeprefix("module."): value for key, value in content.items()}


def _name_from_depths(state_dict: Mapping[str, Tensor]) -> str:
    blocks = {match.groups() for key in state_dict if (match := re.match(r"block([1-4])\.(\d+)\.", key))}
    depths = tuple(sum(stage == str(i) for stage, _ in blocks) for i in (1, 2, 3, 4))
    for name, config in soft.CONFIGS.items():
        if config["depths"] == depths:  # the plain models are listed before the normalised
            return name
    raise ValueError(f"no SOFT model has the depths {depths} found in the file; if it should be one, pass its name")


def _check_layout(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> None:
    missing = [key for key in expected if key not in state_dict]
    unexpected = [key for key in state_dict if key not in expected]
    wrong = [
        f"{key} {tuple(state_dict[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of the wrong shape": wrong}
    if found := [f"{len(keys)} {kind}: {_listed(keys)}" for kind, keys in kinds.items() if keys]:
        raise ValueError(f"the file does not hold the weights of {name}; " + "; ".join(found))


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:8]) + (", …" if len(keys) > 8 else "")


def save(
    path: str | os.PathLike, state_dict: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
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


def load(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict and the metadata of a safetensors file, on the CPU.

    Raises FileNotFoundError if there is no such file, ValueError if it is anything but a whole safetensors file;
    a pickle is refused unread.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is truncated or damaged ({error})") from error


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert an official SOFT checkpoint to safetensors in our layout.")
    parser.add_argument("source", metavar="IN", help="official .pth, .pth.tar or .safetensors file")
    parser.add_argument("target", metavar="OUT", help="safetensors file to write")
    parser.add_argument("--name", help="timm name of the model; needed for the normalised ones (soft_norm_…)")
    arguments = parser.parse_args()
    try:
        state_dict = _read_official(Path(arguments.source))
        name = arguments.name or _name_from_depths(state_dict)
        converted = _published_model(name, state_dict).state_dict()
        save(arguments.target, converted, metadata={"model": name})
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{arguments.target}: {len(converted)} tensors of {name}")


if __name__ == "__main__":
    main()
