"""What Python and the compiled kernels have to agree on."""

from pathlib import Path

import pytest

from lowrank import _attend, _native, _native_attention, _native_core, _native_mlp, _native_newton

STRUCTURES = {
    "rows": _native_attention.Rows,
    "attention": _native_attention.Task,
    "segments": _native_attention.Segments,
    "core": _native_core.Task,
    "newton": _native_newton.Task,
    "mlp": _native_mlp.Task,
    "gelu": _native_mlp.Activation,
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_have_the_same_fields_in_the_same_order(name):
    text = Path(_native.__file__).with_name("_native_kernels.c").read_text()
    body = text.split(f"struct {name} {{")[1].split("}")[0].replace("struct rows", "")
    names = [name for line in body.strip().split(";") for name in line.replace("*", " ").replace(",", " ").split()]
    declared = [name for name in names if name not in ("int64_t", "const", "float", "double", "void", "char")]
    assert declared == [name for name, _ in STRUCTURES[name]._fields_]


@pytest.mark.parametrize("name", ["FEW", "REACH", "CLOSE"])
def test_sums_are_the_same(name):
    text = Path(_native.__file__).with_name("_native_kernels.c").read_text()
    assert f"#define {name} {getattr(_attend, name)}\n" in text.replace("f\n", "\n")


@pytest.mark.parametrize("name", ["PANEL", "BLOCK"])
def test_sizes_are_the_same(name):
    text = Path(_native.__file__).with_name("_native_kernels.c").read_text()
    assert f"#define {name} {getattr(_native_mlp, name)}\n" in text
