"""Write a SOFT checkpoint as a program that needs no code of this project: ONNX, or torch.export's .pt2.

    python examples/soft/export.py CHECKPOINT OUT.onnx
    python examples/soft/export.py CHECKPOINT OUT.pt2

The program takes images (batch, channels, height, width) in float32, normalised as in training, of any number and of
any size that gives every stage its landmark grid, and returns logits; with a --size below that, of this size alone. The
file is loaded, by onnxruntime or torch, and compared with the model at several sizes; OUT is there only if they agree.
"""

from __future__ import annotations

import argparse
import importlib.util
import operator
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import checkpoint
import model as soft
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from lowrank.nn import SoftmaxFreeAttention

# Some thirty layers of float32, each right to a few eps, leave 1e-6.
TOLERANCE = 1e-4
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="safetensors file of ours")
    parser.add_argument("output", metavar="OUT", type=Path, help="new file, .onnx or .pt2")
    size = {"nargs": 2, "type": int, "metavar": ("H", "W")}
    parser.add_argument("--size", **size, help="size to trace with; it binds the program only below the landmark grid")
    options = parser.parse_args(arguments)
    if options.output.suffix not in (".onnx", ".pt2"):
        parser.error(f"OUT must end in .onnx or .pt2, not {options.output.name!r}")
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if options.output.suffix == ".onnx" and missing:
        parser.error(f"ONNX needs {', '.join(missing)}; install {' '.join(ONNX_PACKAGES)}, or write a .pt2 file")
    if options.size is not None and min(options.size) < 1:
        parser.error(f"--size must be positive, not {options.size[0]} {options.size[1]}")
    return parser, options


def smallest(model: soft.Soft) -> int:
    """Pixels a side from which on each stage has its landmark grid or, where that grows, two rows and columns."""
    sides = [1]
    for stage, info in zip(model.stages, model.feature_info, strict=True):
        attention = stage.blocks[0].attn
        if isinstance(attention, SoftmaxFreeAttention):
            tokens = attention.stride * max(attention.grid or (2,))
            sides.append(info["reduction"] * (tokens - 1) + 1)  # convolutions round up
    return max(sides)


def made_for(model: soft.Soft) -> tuple[int, int]:
    """The size that its position embeddings are made for, whose landmarks it has been trained with."""
    return tuple(n * model.feature_info[0]["reduction"] for n in model.stages[0].grid)


def trace(model: soft.Soft, size: tuple[int, int]) -> ExportedProgram:
    channels = model.stages[0].patch_embed[0].in_channels
    # Landmarks that are fewer than the grid make the core's size a symbol, which its iteration is not written for.
    axes = (0, 2, 3) if min(size) >= smallest(model) else (0,)
    shapes = ({axis: Dim.AUTO for axis in axes},)
    return torch.export.export(model, (torch.zeros(2, channels, *size),), dynamic_shapes=shapes)


def least_size(program: ExportedProgram) -> tuple[int, int] | None:
    """The least (H, W) that the program was proven for, None if it is for one size alone."""
    image = next(node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    size = image.meta["val"].shape[2:]
    if any(isinstance(n, int) for n in size):
        return None
    return tuple(int(program.range_constraints[n.node.expr].lower) for n in size)


def write(program: ExportedProgram, path: Path) -> None:
    if path.suffix == ".pt2":
        torch.export.save(program, path)
        return
    names = {"input_names": ["image"], "output_names": ["logits"]}
    axes = ({0: "batch", 2: "height", 3: "width"} if least_size(program) else {0: "batch"},)
    torch.onnx.export(program, dynamo=True, verbose=False, dynamic_shapes=axes, **names).save(path)


def read(path: Path) -> Callable[[Tensor], Tensor]:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


@torch.no_grad()
def difference(run: Callable[[Tensor], Tensor], model: soft.Soft, shape: tuple[int, int, int]) -> float:
    """Largest difference of logits, over the largest logit, on random images (batch, H, W)."""
    batch, *size = shape
    channels = model.stages[0].patch_embed[0].in_channels
    image = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))
    expected = model(image)
    try:
        return ((run(image) - expected).abs().max() / expected.abs().max()).item()
    except AssertionError:  # how a .pt2 program refuses a size
        return float("inf")


def export(model: soft.Soft, path: Path, size: tuple[int, int]) -> float:
    """Write the program to ``path``, if it agrees with the model; returns the largest relative difference."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder, warnings.catch_warnings():
        # Of what torch's exporters themselves are built on.
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        program = trace(model, size)
        least = least_size(program)
        write(program, part := Path(folder) / path.name)
        run = read(part)
        shapes = [(2, *size), (1, *(least or size)), (3, *(reversed(size) if least else size))]
        usual = made_for(model)
        covered = usual == size if least is None else all(map(operator.ge, usual, least))
        if covered:
            shapes.append((1, *usual))
        print(f"{'batch':>5} {'height':>6} {'width':>6}  relative difference")
        worst = 0.0
        for shape in dict.fromkeys(shapes):
            found = difference(run, model, shape)
            worst = found if not found <= worst else worst  # NaN as well
            print(f"{shape[0]:5} {shape[1]:6} {shape[2]:6}  {found:.2e}")
        if worst <= TOLERANCE:
            os.replace(part, path)
            valid = "from {} × {} pixels on".format(*least) if least else "for {} × {} pixels alone".format(*size)
            other = "" if covered else "; --size {} {} makes one for the model's own size".format(*usual)
            print(f"{path} is valid {valid}{other}", file=sys.stderr)
    return worst


def main(arguments: list[str] | None = None) -> None:
    parser, options = parse_arguments(arguments)
    try:
        checkpoint.check_new(options.output)
        model, _ = checkpoint.load_model(options.checkpoint)
        model = model.float()
        start = 32 * -(-max(smallest(model), *made_for(model)) // 32)
        # Two lengths that differ from each other and from those that are special to the model.
        worst = export(model, options.output, tuple(options.size or (start + 32, start + 64)))
    except (OSError, ValueError) as error:
        parser.error(checkpoint.first_line(error))
    if not worst <= TOLERANCE:
        print(f"the program differs by {worst:.1e}, more than {TOLERANCE:.0e}; it was not kept", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
