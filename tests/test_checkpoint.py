"""Checkpoints: the authors' layout, files that are damaged or hostile, and files that must survive."""

import argparse
import os
import pickle
import subprocess
import sys

import attentions
import checkpoint
import numpy as np
import pytest
import timm
import torch


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


def small_state():
    return {"weight": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(7), "half": torch.ones(3).bfloat16()}


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
    attention = model.stages[1].blocks[0].attn
    assert (attention.inverse, attention.ridge, attention.grid) == (attentions.published_inverse, 0.01, None)


def test_the_average_of_the_weights_is_preferred(tmp_path, official):
    content = {"state_dict": {"norm.weight": torch.zeros(1)}, "state_dict_ema": official}
    torch.save(content, tmp_path / "both.pth")
    assert checkpoint.load_official(tmp_path / "both.pth").num_classes == 5


def test_official_names_in_a_safetensors_file_and_the_norm_variant(tmp_path, tiny, official):
    checkpoint.save(tmp_path / "official.safetensors", official)
    model = checkpoint.load_official(tmp_path / "official.safetensors", name="soft_norm_tiny")
    assert same(model.state_dict(), tiny.state_dict())
    attention = model.stages[0].blocks[0].attn
    assert attention.normalize
    assert (attention.inverse, attention.ridge, attention.grid) == (attentions.published_norm_inverse, 0.0, None)


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
    with pytest.raises(ValueError, match=r"no model 'soft_titanic'; the names are soft_tiny, "):
        checkpoint.load_official(tmp_path / "short.pth", name="soft_titanic")


@pytest.mark.parametrize("content", [3, [torch.zeros(1)], {"epoch": 3}, {"model": {"epoch": 3}}])
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


def test_the_command_converts(tmp_path, tiny, official):
    torch.save({"state_dict_ema": official}, tmp_path / "in.pth")
    command = [sys.executable, checkpoint.__file__, str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "187 tensors of soft_tiny" in done.stdout
    state, metadata = checkpoint.load(tmp_path / "out.safetensors")
    assert metadata == {"model": "soft_tiny"}
    assert same(state, tiny.state_dict())


def test_the_command_fails_with_a_message(tmp_path, monkeypatch, capsys):
    (tmp_path / "in.pth").write_bytes(b"not a checkpoint")
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors")])
    with pytest.raises(SystemExit) as exit_:
        checkpoint.main()
    assert exit_.value.code == 2
    assert "in.pth is not a torch file" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
