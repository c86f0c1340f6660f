"""Test a SOFT checkpoint: top-1 and top-5 accuracy, images per second and memory.

    python examples/soft/evaluate.py CHECKPOINT

CHECKPOINT is a safetensors file of ours, tested on the data that it was trained for with the split and the
statistics it remembers, or an official file, for which --data is needed and images are normalised by ImageNet's
statistics. Images/s are of the model alone, data being at hand, after one call that is not counted. The last line is
the top-1 accuracy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import sys
import time
from pathlib import Path

import checkpoint
import model as soft
import torch
from data import Data, open_data
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help=".safetensors of ours, or an official file")
    parser.add_argument("--name", help="timm name of an official file's model: for soft_norm_… and .safetensors")
    parser.add_argument("--data", nargs="+", metavar=("NAME", "PATH"), help="digits, imagefolder PATH or a data set")
    parser.add_argument("--batch-size", type=int, default=64, help="images per call (default: %(default)s)")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that read images (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, not {options.batch_size}")
    if options.workers < 0:
        parser.error(f"--workers must be at least 0, not {options.workers}")
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:  # no such kind of device; none here
        parser.error(f"--device {options.device} cannot be used: {checkpoint.first_line(error)}")
    return parser, options


def read_model(path: Path, name: str | None) -> tuple[soft.Soft, dict[str, str]]:
    """A model and its metadata, which of an official file are none."""
    if path.suffix == ".safetensors" and name is None:
        return checkpoint.load_model(path)
    return checkpoint.load_official(path, name=name), {}


def data_of(model: soft.Soft, metadata: dict[str, str], spec: list[str] | None) -> Data:
    """The data to test on. Statistics belong to the weights and the split to what they have seen, whatever the data."""
    known = {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
    if "data" in metadata:
        known = json.loads(metadata["data"])
        spec = spec or known["spec"]
    if spec is None:
        raise ValueError("the checkpoint does not say what data it was trained for; name some by --data")
    img_size = 224
    if "model" in metadata:
        arguments = soft.CONFIGS[metadata["model"]] | json.loads(metadata["arguments"])
        img_size = arguments.get("img_size", img_size)
        if not isinstance(img_size, int):
            raise ValueError(f"the checkpoint takes images of {img_size} pixels, and data come as squares alone")
    statistics = {key: known[key] for key in ("mean", "std")}
    data = open_data(spec, img_size=img_size, seed=known.get("seed", 0), statistics=statistics)
    if len(data.classes) != model.num_classes:
        raise ValueError(
            f"the checkpoint tells {model.num_classes} classes apart and {data.name} has {len(data.classes)}; "
            "give data of its classes by --data"
        )
    if (channels := model.stages[0].patch_embed[0].in_channels) != data.in_chans:
        raise ValueError(f"the checkpoint takes images of {channels} channels and {data.name} has {data.in_chans}")
    return data


@torch.no_grad()
def evaluate(
    model: soft.Soft, data: Data, *, batch_size: int, device: str = "cpu", amp: bool = False, workers: int = 0
) -> dict[str, float]:
    """Images, top1, top5 where there are five classes, images/s of the model and peak memory in MiB."""
    model, device = model.to(device).eval(), torch.device(device)
    dtype = model.norm.weight.dtype
    autocast = torch.autocast(device.type, dtype=torch.bfloat16) if amp else contextlib.nullcontext()
    depth = 5 if model.num_classes >= 5 else 1
    right, images, seconds = torch.zeros(depth, dtype=torch.int64), 0, 0.0
    for x, labels in data.evaluation(batch_size, workers):
        x = x.to(device, dtype)  # (B, C, H, W)
        with autocast:
            if images == 0:
                model(x)
            logits, spent = timed(model, x, device)  # (B, classes)
        ranked = logits.topk(depth, dim=1).indices.cpu()  # (B, depth)
        right += (ranked == labels[:, None]).sum(0)
        images, seconds = images + len(labels), seconds + spent
    if images == 0:
        raise ValueError(f"{data.name} has no images to test on")
    results = {"images": images, "top1": right[0].item() / images}
    if depth == 5:
        results["top5"] = right.sum().item() / images
    return results | {"images/s": images / seconds, "peak memory, MiB": peak_memory(device)}


def timed(model: soft.Soft, x: Tensor, device: torch.device) -> tuple[Tensor, float]:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    logits = model(x)
    synchronize()
    return logits, time.perf_counter() - started


def peak_memory(device: torch.device) -> float:
    """MiB that torch has allocated at most on a GPU; of a CPU the process's resident set, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main(arguments: list[str] | None = None) -> None:
    parser, options = parse_arguments(arguments)
    try:
        model, metadata = read_model(options.checkpoint, options.name)
        data = data_of(model, metadata, options.data)
        results = evaluate(
            model,
            data,
            batch_size=options.batch_size,
            device=options.device,
            amp=options.amp,
            workers=options.workers,
        )
    except (OSError, ValueError) as error:
        parser.error(checkpoint.first_line(error))
    print(f"{options.checkpoint} on {data.name}, {options.device}" + (", bfloat16" if options.amp else ""))
    for key, value in results.items():
        print(f"{key:<18}{value:>12.4f}" if key.startswith("top") else f"{key:<18}{value:>12.0f}")
    print(f"top1={results['top1']:.4f}")


if __name__ == "__main__":
    main()
