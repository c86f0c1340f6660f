"""Exported programs: they compute what the model does at sizes they were not traced with, or are not kept."""

import json

import checkpoint
import export
import onnxruntime
import pytest
import timm
import torch
from conftest import refused_by

# Three classes, and a size of its own that the program is to be valid at.
SMALL = {"num_classes": 3, "img_size": 64, "landmark_grid": 3}


def saved(path, **arguments):
    torch.manual_seed(0)
    model = timm.create_model("soft_digits", **arguments).eval()
    metadata = {"model": "soft_digits", "arguments": json.dumps(arguments)}
    checkpoint.save(path, model.state_dict(), metadata=metadata)
    return path, model


@pytest.fixture
def digits(tmp_path):
    return saved(tmp_path / "digits.safetensors", **SMALL)


def run(path, image):
    if path.suffix == ".pt2":
        with torch.no_grad():
            return torch.export.load(path).module()(image)
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("attn", ["softmax", pytest.param("soft", marks=pytest.mark.slow)])
def test_programs_take_any_number_and_size(tmp_path, capsys, attn, suffix):
    """Softmax-free attention takes half a minute to trace, and test_soft_model does so as well."""
    path, model = saved(tmp_path / "digits.safetensors", attn=attn, **SMALL)
    out = tmp_path / f"program{suffix}"
    export.main([str(path), str(out)])
    stdout, stderr = capsys.readouterr()
    assert f"{out} is valid from 33 × 33 pixels on\n" in stderr
    table = [line.split() for line in stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [tuple(map(int, row[:3])) for row in table] == [(2, 96, 128), (1, 33, 33), (3, 128, 96), (1, 64, 64)]
    assert all(float(row[3]) < 1e-5 for row in table)
    for shape in ((1, 1, 64, 64), (4, 1, 33, 50), (2, 1, 111, 64)):
        image = torch.randn(shape)
        with torch.no_grad():
            expected = model(image)
        # Some ten layers of float32, each right to a few eps.
        torch.testing.assert_close(run(out, image), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([path.name, out.name])


@pytest.mark.slow
def test_a_size_without_the_landmark_grid_is_the_only_one(tmp_path, capsys):
    path, model = saved(tmp_path / "digits.safetensors")
    out = tmp_path / "program.pt2"
    export.main([str(path), str(out), "--size", "32", "32"])
    assert f"{out} is valid for 32 × 32 pixels alone\n" in capsys.readouterr().err
    image = torch.randn(5, 1, 32, 32)
    with torch.no_grad():
        expected = model(image)
    torch.testing.assert_close(run(out, image), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("name", "arguments", "least"),
    [
        ("soft_tiny", {}, 4 * (8 * 7 - 1) + 1),
        ("soft_digits", {}, 16 * (1 * 4 - 1) + 1),
        ("soft_tiny", {"trained": "official"}, 4 * (8 * 2 - 1) + 1),
        ("soft_digits", {"attn": "softmax"}, 1),
    ],
)
def test_the_least_size_has_room_for_every_grid(name, arguments, least):
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    assert export.smallest(model) == least
    assert export.made_for(model) == ((224, 224) if name == "soft_tiny" else (32, 32))


@pytest.mark.parametrize(
    "wrong", [lambda image: torch.ones(len(image), 3), lambda image: torch.full((1, 3), torch.nan)]
)
def test_a_program_that_differs_is_not_kept(tmp_path, digits, monkeypatch, capsys, wrong):
    path, model = digits
    monkeypatch.setattr(export, "trace", lambda *_: None)
    monkeypatch.setattr(export, "least_size", lambda _: (33, 33))
    monkeypatch.setattr(export, "write", lambda _, part: part.write_text("a program"))
    monkeypatch.setattr(export, "read", lambda _: lambda image: model(image) * (1 + 5e-5))
    export.main([str(path), str(tmp_path / "close.pt2")])
    assert (tmp_path / "close.pt2").read_text() == "a program"
    capsys.readouterr()
    monkeypatch.setattr(export, "read", lambda _: wrong)
    with pytest.raises(SystemExit) as exit_:
        export.main([str(path), str(tmp_path / "far.pt2")])
    assert exit_.value.code == 1
    assert "more than 1e-04; it was not kept" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["close.pt2", "digits.safetensors"]


def refused(capsys, *arguments):
    return refused_by(export.main, capsys, *arguments)


def test_what_cannot_be_exported_is_told_in_one_line(tmp_path, digits, monkeypatch, capsys):
    path, _ = digits
    out = tmp_path / "program.onnx"
    (tmp_path / "there.onnx").write_text("precious")
    assert "must end in .onnx or .pt2, not 'program.pt'" in refused(capsys, path, tmp_path / "program.pt")
    assert "exists; name another file" in refused(capsys, path, tmp_path / "there.onnx")
    assert (tmp_path / "there.onnx").read_text() == "precious"
    assert "there is no folder" in refused(capsys, path, tmp_path / "nowhere" / "program.onnx")
    assert "there is no file" in refused(capsys, tmp_path / "nowhere.safetensors", out)
    assert "--size must be positive, not 0 64" in refused(capsys, path, out, "--size", "0", "64")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    assert "ONNX needs onnxscript; install onnx onnxscript onnxruntime" in refused(capsys, path, out)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["digits.safetensors", "there.onnx"]
