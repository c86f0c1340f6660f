"""Checkpoints: the authors' layout, files that are damaged or hostile, and files that must survive."""

import argparse
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import checkpoint
import numpy as np
import pytest
import timm
import torch
from conftest import refused_by

# Depths, widths and heads as published; head dimension 32, 224 pixels.
SIZES = {
    "tiny": ((1, 2, 3, 2), (64, 128, 320, 512), (2, 4, 10, 16)),
    "small": ((1, 3, 20, 4), (64, 128, 320, 512), (2, 4, 10, 16)),
    "medium": ((1, 3, 29, 5), (64, 128, 288, 512), (2, 4, 9, 16)),
    "large": ((1, 3, 40, 5), (64, 128, 320, 512), (2, 4, 10, 16)),
    "huge": ((1, 5, 49, 5), (64, 128, 352, 512), (2, 4, 11, 16)),
}
NAMES = [f"soft_{norm}{size}" for norm in ("", "norm_") for size in SIZES]


def linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name, dim):
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def conv_norm(name, position, before, after):
    shapes = {f"{name}.{position}.weight": (after, before, 3, 3), f"{name}.{position}.bias": (after,)}
    running = {f"{name}.{position + 1}.running_{what}": (after,) for what in ("mean", "var")}
    return shapes | norm(f"{name}.{position + 1}", after) | running | {f"{name}.{position + 1}.num_batches_tracked": ()}


def official_layout(depths, widths, heads, classes=1000):
    """Every official name and shape, from the published description alone."""
    c1, c2, c3, c4 = widths
    shapes = {f"pos_embed{i}": (1, n, c) for i, n, c in zip((1, 2, 3, 4), (3136, 784, 196, 50), widths, strict=True)}
    shapes["cls_token"] = (1, 1, c4)
    for position, before, after in ((0, 3, 32), (3, 32, 32), (6, 32, c1)):
        shapes |= conv_norm("patch_embed1.proj", position, before, after)
    for stage, before, after in ((2, c1, c2), (3, c2, c3), (4, c3, c4)):
        shapes |= conv_norm(f"patch_embed{stage}.proj", 0, before, after)
    for stage, r, k in ((1, 8, 9), (2, 4, 5), (3, 2, 3)):
        c = widths[stage - 1]
        for i in range(depths[stage - 1]):
            att = f"block{stage}.{i}.att"
            for name in ("W_q", "W_v", "ff"):
                shapes |= linear(f"{att}.mha.{name}", c, c)
            shapes[f"{att}.mha.attn.Qlandmark_op.weight"] = (32, 32, r, r)
            shapes |= norm(f"{att}.mha.attn.Qnorm_act.0", 32)
            shapes[f"{att}.mha.attn.conv.weight"] = (heads[stage - 1], 1, k, k)
            shapes |= norm(f"{att}.norm1", c) | norm(f"{att}.norm2", c)
            shapes |= linear(f"{att}.ff1", 4 * c, c) | linear(f"{att}.ff2", c, 4 * c)
    for i in range(depths[3]):
        block = f"block4.{i}"
        shapes |= norm(f"{block}.norm1", c4) | norm(f"{block}.norm2", c4)
        shapes |= linear(f"{block}.attn.q", c4, c4) | linear(f"{block}.attn.kv", 2 * c4, c4)
        shapes |= linear(f"{block}.attn.proj", c4, c4)
        shapes |= linear(f"{block}.mlp.fc1", 4 * c4, c4) | linear(f"{block}.mlp.fc2", c4, 4 * c4)
    return shapes | norm("norm", c4) | linear("head", classes, c4)


def shapes_of(state_dict):
    return {key: tuple(value.shape) for key, value in state_dict.items()}


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return timm.create_model("soft_tiny", num_classes=5).eval()


@pytest.fixture(scope="module")
def official(tiny):
    return checkpoint.to_official(tiny.state_dict())


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key
    return True


def computes(model, name):
    """Whether a model of 5 classes is ``name`` with the authors' inverse and landmarks, and not without."""
    x = torch.randn(1, 3, 64, 256, generator=torch.Generator().manual_seed(0))  # 16 landmark columns, and not 7
    results = []
    for published in ({"trained": "official"}, {}):
        other = timm.create_model(name, num_classes=5, **published).eval()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            results.append(torch.equal(model(x), other(x)))
    return results == [True, False]


def small_state():
    return {"weight": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(7), "half": torch.ones(3).bfloat16()}


def test_the_layout_written_here_is_the_published_one():
    published = json.loads((Path(__file__).parent / "data" / "soft_tiny_shapes.json").read_text())
    assert official_layout(*SIZES["tiny"]) == {key: tuple(shape) for key, shape in published.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_size_has_the_official_layout_both_ways(name):
    layout = official_layout(*SIZES[name.split("_")[-1]])
    with torch.device("meta"):
        ours = timm.create_model(name).state_dict()
        theirs = {key: torch.empty(shape) for key, shape in layout.items()}
    assert shapes_of(checkpoint.to_official(ours)) == layout
    assert shapes_of(checkpoint.from_official(theirs)) == shapes_of(ours)
    assert name in checkpoint.PUBLISHED


def test_layouts_are_inverse_to_each_other(tiny, official):
    assert len(official) == 187
    assert "block1.0.att.mha.attn.Qlandmark_op.weight" in official
    assert same(checkpoint.from_official(official), tiny.state_dict())
    assert same(checkpoint.to_official(checkpoint.from_official(official)), official)


@pytest.mark.parametrize(
    "key",
    ["block5.0.norm1.weight", "block4.0.attn.qkv.weight", "block1.0.norm1.weight", "pos_embed5", "head.gain", "x"],
)
def test_an_unknown_name_is_refused(key):
    with pytest.raises(ValueError, match=f"1 keys do not belong to the official layout of SOFT: {key}"):
        checkpoint.from_official({key: torch.zeros(1)})
    with pytest.raises(ValueError, match=r"1 keys do not belong to the model.Soft layout"):
        checkpoint.to_official({"stages.0.blocks.0.attn.key_value.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("wrapping", "prefix"), [("state_dict", ""), ("state_dict_ema", "module."), ("model", "module."), (None, "")]
)
def test_official_files_in_every_wrapping(tmp_path, tiny, official, wrapping, prefix):
    content = {prefix + key: value for key, value in official.items()}
    if wrapping is not None:
        content = {wrapping: content, "epoch": 299, "args": argparse.Namespace(lr=1e-3, model="soft")}
    torch.save(content, tmp_path / "official.pth.tar")
    model = checkpoint.load_official(tmp_path / "official.pth.tar")
    assert same(model.state_dict(), tiny.state_dict())
    assert not model.training
    assert computes(model, "soft_tiny")


def test_the_average_of_the_weights_is_preferred(tmp_path, official):
    content = {"state_dict": {"norm.weight": torch.zeros(1)}, "state_dict_ema": official}
    torch.save(content, tmp_path / "both.pth")
    assert checkpoint.load_official(tmp_path / "both.pth").num_classes == 5


def test_official_names_in_a_safetensors_file_and_the_norm_variant(tmp_path, tiny, official):
    checkpoint.save(tmp_path / "official.safetensors", official)
    model = checkpoint.load_official(tmp_path / "official.safetensors", name="soft_norm_tiny")
    assert same(model.state_dict(), tiny.state_dict())
    assert computes(model, "soft_norm_tiny")


def test_all_differences_are_told_in_one_error(tmp_path, official):
    content = dict(official)
    del content["cls_token"], content["block1.0.att.ff1.bias"]
    content["extra.weight"] = torch.zeros(2)
    content["pos_embed2"] = torch.zeros(1, 100, 128)
    torch.save(content, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="weights of soft_tiny") as error:
        checkpoint.load_official(tmp_path / "wrong.pth")
    message = str(error.value)
    assert "2 missing: block1.0.att.ff1.bias, cls_token" in message
    assert "1 unexpected: extra.weight" in message
    assert "1 of the wrong shape: pos_embed2 (1, 100, 128) instead of (1, 784, 128)" in message


def test_an_unknown_model_is_named(tmp_path, official):
    torch.save({k: v for k, v in official.items() if not k.startswith("block2.1.")}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"depths \(1, 1, 3, 2\)"):
        checkpoint.load_official(tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"have no model 'soft_titanic'; theirs are soft_tiny, "):
        checkpoint.load_official(tmp_path / "short.pth", name="soft_titanic")


@pytest.mark.parametrize("content", [3, [torch.zeros(1)], {"epoch": 3}, {"model": {"epoch": 3}}, {0: torch.zeros(1)}])
def test_a_torch_file_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        checkpoint.load_official(tmp_path / "empty.pth")


@pytest.mark.parametrize("metadata", [None, {"model": "soft_digits", "accuracy": "0.97"}])
def test_what_is_saved_is_loaded(tmp_path, metadata):
    checkpoint.save(tmp_path / "a.safetensors", small_state(), metadata=metadata)
    state, found = checkpoint.load(tmp_path / "a.safetensors")
    assert same(state, small_state())
    assert found == (metadata or {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_view_is_saved_as_it_looks(tmp_path):
    state = {"transposed": torch.arange(6.0).reshape(2, 3).T}
    checkpoint.save(tmp_path / "a.safetensors", state)
    assert same(checkpoint.load(tmp_path / "a.safetensors")[0], state)


class MakesAFile:
    """A pickle that creates a file in whoever unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["pickle", "torch", "torch-legacy"])
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_pickle_is_refused_and_not_executed(tmp_path, how, name):
    path, victim = tmp_path / name, tmp_path / "executed"
    content = {"state_dict": MakesAFile(victim)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))  # torch's own
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(ValueError, match="weights"):
        checkpoint.load(path)
    with pytest.raises(ValueError, match="weights"):
        checkpoint.load_official(path)
    assert not victim.exists()
    pickle.loads(pickle.dumps(content))  # the trap is live
    assert victim.exists()


def test_a_truncated_file_is_refused_at_every_length(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, small_state(), metadata={"model": "soft_digits"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.safetensors is not a safetensors file, or is truncated"):
            checkpoint.load(path)


def test_a_truncated_torch_file_is_refused(tmp_path, official):
    path = tmp_path / "official.pth"
    torch.save(official, path)
    whole = path.read_bytes()
    for length in (0, 1, 10, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a torch file of tensors alone, or is damaged"):
            checkpoint.load_official(path)


def test_flipped_bits_in_the_header_are_refused_or_seen(tmp_path):
    path, state = tmp_path / "a.safetensors", {"weight": torch.arange(6.0).reshape(2, 3)}
    checkpoint.save(path, state)
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    unseen = []
    for position in range(size):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                found, _ = checkpoint.load(path)
            except ValueError:
                continue
            # What still is a header must differ in a name, a dtype or a shape, which loading into a model finds.
            if [(k, v.dtype, v.shape) for k, v in found.items()] == [(k, v.dtype, v.shape) for k, v in state.items()]:
                unseen.append(whole[position : position + 1])
    # White space that pads the header may become other white space.
    assert set(unseen) <= {b" "}, unseen


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_torch_files_raise_one_kind_of_error(tmp_path):
    path, random = tmp_path / "official.pth", np.random.default_rng(0)
    for legacy in (False, True):
        state = {"norm.weight": torch.zeros(3), "norm.bias": torch.zeros(3)}
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=not legacy)
        whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        for _ in range(200):
            damaged = whole.copy()
            # The pickle stands in the first half of a zip file, and fills a legacy one.
            damaged[random.integers(len(whole) // 2, size=8)] ^= np.uint8(1) << random.integers(8, dtype=np.uint8)
            path.write_bytes(damaged.tobytes())
            with pytest.raises(ValueError, match=r"official\.pth|SOFT model"):  # unread, or read and not a model
                checkpoint.load_official(path)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint.load_official(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        checkpoint.load(tmp_path)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, small_state())
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"weight": torch.zeros(1000)})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("state", "metadata", "message"),
    [
        ({"weight": torch.zeros(1)}, {"epoch": 3}, "metadata must map str to str, not 'epoch' to 3"),
        ({"weight": torch.zeros(1), "epoch": 3}, None, "'epoch' is a int"),
    ],
)
def test_what_is_not_a_tensor_or_a_string_is_refused(tmp_path, state, metadata, message):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, small_state())
    before = path.read_bytes()
    with pytest.raises(TypeError, match=message):
        checkpoint.save(path, state, metadata=metadata)
    assert path.read_bytes() == before


@pytest.fixture
def digits(tmp_path):
    """A small file of ours, and its model."""
    torch.manual_seed(0)
    model = timm.create_model("soft_digits", num_classes=4).eval()
    metadata = {"model": "soft_digits", "arguments": json.dumps({"num_classes": 4, "drop_path_rate": 0.05})}
    checkpoint.save(tmp_path / "digits.safetensors", model.state_dict(), metadata=metadata)
    return tmp_path / "digits.safetensors", model


def test_a_model_is_built_from_its_file(digits):
    path, model = digits
    loaded, metadata = checkpoint.load_model(path)
    assert metadata["model"] == "soft_digits"
    assert not loaded.training
    assert loaded.stages[3].blocks[0].drop_path.drop_prob == pytest.approx(0.05)
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    checkpoint.save(path, {key: value.double() for key, value in model.state_dict().items()}, metadata=metadata)
    assert checkpoint.load_model(path)[0].head.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "has no metadata 'model' and 'arguments'"),
        ({"model": "soft_digits"}, "has no metadata 'model' and 'arguments'"),
        (
            {"model": "soft_titanic", "arguments": "{}"},
            r"holds a model 'soft_titanic', which there is not; .*soft_tiny",
        ),
        ({"model": "soft_digits", "arguments": "{num_classes"}, r"do not fit soft_digits: arguments {num_classes \("),
        ({"model": "soft_digits", "arguments": "3"}, "do not fit soft_digits: arguments 3"),
        ({"model": "soft_digits", "arguments": '{"wings": 2}'}, "unknown: wings"),
        ({"model": "soft_digits", "arguments": '{"checkpoint_path": "x"}'}, "unknown: checkpoint_path"),
        ({"model": "soft_digits", "arguments": '{"trained": "hard"}'}, "do not fit soft_digits: .*hard"),
        ({"model": "soft_digits", "arguments": '{"in_chans": -1}'}, "do not fit soft_digits"),
        (
            {"model": "soft_digits", "arguments": '{"num_classes": 7}'},
            r"weights of soft_digits; 2 of the wrong shape: head.weight \(4, 128\) instead of \(7, 128\)",
        ),
    ],
)
def test_a_file_that_does_not_fit_its_metadata_is_refused(digits, metadata, message):
    path, model = digits
    checkpoint.save(path, model.state_dict(), metadata=metadata)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load_model(path)
    assert str(path) in str(error.value)


def test_what_is_no_floating_weight_is_refused(digits):
    path, model = digits
    metadata = checkpoint.load(path)[1]
    checkpoint.save(path, {key: value.int() for key, value in model.state_dict().items()}, metadata=metadata)
    with pytest.raises(ValueError, match=r"norm.weight is of torch.int32"):
        checkpoint.load_model(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["soft_tiny", "soft_norm_tiny"])
def test_the_command_converts_both_ways(tmp_path, official, capsys, name, suffix):
    """Official to ours, which loads as the authors' model, and back to the very tensors."""
    there, back = tmp_path / "ours.safetensors", tmp_path / f"back{suffix}"
    torch.save({"state_dict_ema": official}, tmp_path / "in.pth.tar")
    checkpoint.main([str(tmp_path / "in.pth.tar"), str(there), "--name", name])
    assert f"187 tensors of {name}" in capsys.readouterr().out
    model, metadata = checkpoint.load_model(there)
    assert metadata["model"] == name
    assert json.loads(metadata["arguments"]) == {"trained": "official", "num_classes": 5}
    assert computes(model, name)
    checkpoint.main(["--to-official", str(there), str(back)])
    out, err = capsys.readouterr()
    assert f"187 tensors of {name} under the authors' names" in out
    assert err == ""
    found = checkpoint.load(back)[0] if suffix == ".safetensors" else torch.load(back, weights_only=True)["state_dict"]
    assert same(found, official)
    assert len(list(tmp_path.iterdir())) == 3


def test_weights_of_another_inverse_become_official_with_a_word(tmp_path, tiny, capsys):
    metadata = {"model": "soft_tiny", "arguments": '{"num_classes": 5}'}
    checkpoint.save(tmp_path / "in.safetensors", tiny.state_dict(), metadata=metadata)
    checkpoint.main(["--to-official", str(tmp_path / "in.safetensors"), str(tmp_path / "out.pth")])
    assert "has not been trained with the authors' inverse" in capsys.readouterr().err
    assert same(checkpoint.load_official(tmp_path / "out.pth").state_dict(), tiny.state_dict())


def test_the_script_runs(tmp_path, tiny, official):
    torch.save({"state_dict_ema": official}, tmp_path / "in.pth")
    command = [sys.executable, checkpoint.__file__, str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "187 tensors of soft_tiny" in done.stdout
    assert same(checkpoint.load(tmp_path / "out.safetensors")[0], tiny.state_dict())


def refused(capsys, *arguments):
    return refused_by(checkpoint.main, capsys, *arguments)


def test_the_command_fails_with_one_line(tmp_path, official, digits, capsys):
    (tmp_path / "bad.pth").write_bytes(b"not a checkpoint")
    torch.save({"state_dict": MakesAFile(tmp_path / "executed")}, tmp_path / "hostile.pth")
    good, out = tmp_path / "good.pth", tmp_path / "out.safetensors"
    torch.save(official, good)
    before = sorted(path.name for path in tmp_path.iterdir())
    back = ("--to-official",)
    assert "bad.pth is not a torch file" in refused(capsys, tmp_path / "bad.pth", out)
    assert "hostile.pth is not a torch file" in refused(capsys, tmp_path / "hostile.pth", out)
    assert "there is no file" in refused(capsys, tmp_path / "nowhere.pth", out)
    assert "there is no file" in refused(capsys, *back, tmp_path / "nowhere.safetensors", out)
    assert "no model 'soft_titanic'" in refused(capsys, good, out, "--name", "soft_titanic")
    assert "no model 'soft_digits'" in refused(capsys, good, out, "--name", "soft_digits")
    line = refused(capsys, good, out, "--name", "soft_medium")
    assert "does not hold the weights of soft_medium" in line
    assert "missing: block2.2." in line
    assert "of the wrong shape: pos_embed3 (1, 196, 320) instead of (1, 196, 288)" in line
    assert "'soft_digits'" in refused(capsys, *back, digits[0], out)
    assert "is in our layout already" in refused(capsys, digits[0], out)
    assert "is not a safetensors file" in refused(capsys, *back, good, out)
    assert "must end in .safetensors, not 'out.pth'" in refused(capsys, good, tmp_path / "out.pth")
    assert "must end in .safetensors or .pth, not 'out.pt'" in refused(capsys, *back, digits[0], tmp_path / "out.pt")
    assert "--name soft_tiny is for official files" in refused(capsys, *back, digits[0], out, "--name", "soft_tiny")
    assert "there is no folder" in refused(capsys, good, tmp_path / "nowhere" / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_the_authors_code_could_not_load_is_not_made_official(tmp_path, capsys):
    model = timm.create_model("soft_tiny", num_classes=5, img_size=64)
    metadata = {"model": "soft_tiny", "arguments": '{"num_classes": 5, "img_size": 64}'}
    checkpoint.save(tmp_path / "in.safetensors", model.state_dict(), metadata=metadata)
    line = refused(capsys, "--to-official", tmp_path / "in.safetensors", tmp_path / "out.pth")
    assert "holds no model of the authors', for it is not their soft_tiny; 4 of the wrong shape: " in line
    assert not (tmp_path / "out.pth").exists()


def test_nothing_is_overwritten(tmp_path, official, capsys):
    torch.save(official, tmp_path / "in.pth")
    out = tmp_path / "out.safetensors"
    out.write_text("precious")
    assert "exists; name another file" in refused(capsys, tmp_path / "in.pth", out)
    assert "exists; name another file" in refused(capsys, "--to-official", tmp_path / "in.pth", out)
    assert out.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "out.safetensors"]


def test_an_unwritable_folder_is_seen_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    assert "cannot be written to" in refused(capsys, tmp_path / "in.pth", tmp_path / "out.safetensors")
