"""Attention maps: they are the rows of the approximate attention, and the cells are those that landmarks see."""

import json
import subprocess
import sys

import checkpoint
import numpy as np
import pytest
import timm
import torch
import visualize
from PIL import Image

from lowrank.nn import SoftmaxFreeAttention

SIZE = (8, 10)


def little_layer(*, normalize=False, grid=3):
    torch.manual_seed(0)
    layer = SoftmaxFreeAttention(64, num_heads=2, stride=2, grid=grid, value_kernel=3, normalize=normalize).double()
    return layer, torch.randn(2, SIZE[0] * SIZE[1], 64, dtype=torch.float64)


def kernel(x, y):
    return np.exp(-0.5 * ((x[..., :, None, :] - y[..., None, :, :]) ** 2).sum(-1))


@pytest.mark.parametrize("normalize", [False, True])
def test_rows_are_those_of_the_whole_attention(normalize):
    layer, x = little_layer(normalize=normalize)
    with torch.no_grad():
        q, z = (y.numpy() / 32**0.25 for y in layer._queries_and_landmarks(x, SIZE, None)[:2])
    a, c = kernel(z, z), kernel(q, z)
    inverse = np.linalg.inv(a + 0.01 * np.eye(9))
    if normalize:
        root = np.sqrt(a.sum(-1))
        inverse = inverse / (root[..., :, None] * root[..., None, :])
    whole = c @ inverse @ np.swapaxes(c, -1, -2)  # (B, heads, N, N)
    tokens = [3, 79, 40]
    rows = visualize.attention_rows(layer, x, SIZE, tokens)
    assert rows.shape == (2, 2, 3, 80)
    np.testing.assert_allclose(rows.numpy(), whole[:, :, tokens], rtol=0, atol=1e-10)


def test_the_layer_is_left_as_it_was():
    layer, x = little_layer()
    with torch.no_grad():
        before = layer(x, SIZE)
        visualize.attention_rows(layer, x, SIZE, [0])
        assert torch.equal(layer(x, SIZE), before)


@pytest.mark.parametrize("grid", [3, 4, 9, None])
def test_cells_are_the_tokens_that_landmarks_see(grid):
    layer, x = little_layer(grid=grid)
    rows, columns = visualize.landmark_cells(layer, SIZE)
    x = x[:1].clone().requires_grad_()
    z = layer._queries_and_landmarks(x, SIZE, None)[1].sum((0, 1, 3))  # (m,)
    assert len(z) == len(rows) * len(columns)
    for landmark, value in enumerate(z):
        (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
        seen = gradient[0].abs().sum(-1).reshape(SIZE) > 0
        expected = torch.zeros(SIZE, dtype=torch.bool)
        (top, bottom), (left, right) = rows[landmark // len(columns)], columns[landmark % len(columns)]
        expected[top:bottom, left:right] = True
        assert torch.equal(seen, expected), landmark


def test_fractions_name_tokens():
    assert visualize.token_at((0, 0), SIZE) == 0
    assert visualize.token_at((1, 1), SIZE) == 79
    assert visualize.token_at((0.5, 0.25), SIZE) == 4 * 10 + 2
    assert visualize.fractions("0.25,0.3") == (0.25, 0.3)
    assert visualize.spread(49, 5) == [0, 12, 24, 36, 48]
    assert visualize.spread(4, 5) == [0, 1, 2, 3]


@pytest.fixture
def digits(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("soft_digits").eval()
    data = {"spec": ["digits"], "seed": 0, "mean": [0.25], "std": [0.5]}
    metadata = {"model": "soft_digits", "arguments": "{}", "data": json.dumps(data)}
    checkpoint.save(tmp_path / "digits.safetensors", model.state_dict(), metadata=metadata)
    return tmp_path / "digits.safetensors", model


@pytest.fixture
def figures(monkeypatch):
    """What is drawn, instead of files."""
    drawn = {}
    monkeypatch.setattr(visualize, "finish", lambda figure, path: drawn.update({path.name: figure}))
    yield drawn
    for figure in drawn.values():
        visualize.plt.close(figure)


def maps(figure, row, column):
    """The images in a panel, the photograph first."""
    axes = np.array(figure.axes).reshape(-1, figure.axes[0].get_subplotspec().get_gridspec().ncols)
    return [image.get_array() for image in axes[row, column].get_images()]


def test_a_checkpoint_draws_what_it_computes(tmp_path, digits, figures):
    path, model = digits
    pixels = np.random.default_rng(0).integers(256, size=(32, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    visualize.main([str(path), str(tmp_path / "wide.png"), "--output", str(tmp_path / "out"), "--tokens", "0,0", "1,1"])
    assert sorted(figures) == ["wide-attention.png", "wide-landmarks.png"]
    figure = figures["wide-attention.png"]
    assert figure.get_suptitle() == "soft_digits: wide"
    grey = torch.from_numpy(np.array(Image.fromarray(pixels).convert("L"))).float() / 255
    image = ((grey - 0.25) / 0.5)[None, None]
    for stage, (attention, x, size) in enumerate(visualize.layers(model, image, block=-1)):
        rows = visualize.attention_rows(attention, x, size, [0, size[0] * size[1] - 1])[0].mean(0)
        for i in range(2):
            photograph, heat = maps(figure, i, 1 + stage)
            assert photograph.shape == (32, 64)
            np.testing.assert_allclose(heat, rows[i].reshape(size), rtol=0, atol=1e-5)
    figure = figures["wide-landmarks.png"]
    attention, x, size = visualize.layers(model, image, block=-1)[0]
    weights = attention.landmark_attention(x, size)[0].mean(0)
    np.testing.assert_allclose(maps(figure, 0, 5)[1], weights[:, -1].reshape(size), rtol=0, atol=1e-5)
    assert len(figure.axes[0].patches) == 16
    assert len(maps(figure, 2, 0)) == 1


def test_an_untrained_model_says_so_over_the_photographs(tmp_path, figures):
    visualize.main(["soft_digits", "--output", str(tmp_path / "out")])
    assert sorted(figures) == [
        f"{name}-{kind}.png" for name in ("china", "flower") for kind in ("attention", "landmarks")
    ]
    assert figures["china-attention.png"].get_suptitle() == "soft_digits, untrained: china"


@pytest.mark.parametrize("channels", [1, 3])
def test_plot_attention_shows_columns_of_the_first_stage(figures, tmp_path, channels):
    torch.manual_seed(0)
    model = timm.create_model("soft_digits", in_chans=channels)
    images = torch.randn(3, channels, 32, 32)
    visualize.plot_attention(model, images, tmp_path / "a.png", columns=4)
    (attention, x, size) = visualize.layers(model, images, block=0)[0]
    weights = attention.landmark_attention(x, size).mean(1)
    photograph, heat = maps(figures["a.png"], 2, 4)
    assert photograph.shape == ((32, 32) if channels == 1 else (32, 32, 3))
    np.testing.assert_array_equal(heat, weights[2, :, 15].reshape(size))
    assert len(figures["a.png"].axes) == 3 * 5


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        visualize.main([str(argument) for argument in arguments])
    assert exit_.value.code == 2
    line = capsys.readouterr().err.partition("error: ")[2]
    assert line.count("\n") == 1
    return line


def test_what_cannot_be_drawn_is_told_in_one_line(tmp_path, digits, capsys):
    path, _ = digits
    out = ("--output", tmp_path / "out")
    (tmp_path / "corrupt.jpg").write_bytes(b"no jpeg")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "short.jpg").write_bytes(whole[: len(whole) // 2])
    assert "corrupt.jpg cannot be read as an image" in refused(capsys, path, tmp_path / "corrupt.jpg", *out)
    assert "short.jpg cannot be read" in refused(capsys, path, tmp_path / "good.jpg", tmp_path / "short.jpg", *out)
    assert "nowhere.jpg cannot be read" in refused(capsys, path, tmp_path / "nowhere.jpg", *out)
    assert "there is no model 'soft_titanic'; there are soft_tiny" in refused(capsys, "soft_titanic", *out)
    assert "there is no file" in refused(capsys, tmp_path / "nowhere.safetensors", *out)
    for wrong in ("0.5", "0.5,2", "a,b", "nan,0"):
        assert f"between 0 and 1 such as 0.25,0.3, not {wrong}" in refused(capsys, path, *out, "--tokens", wrong)
    assert "32 tokens at most" in refused(capsys, path, *out, "--tokens", *["0,0"] * 33)
    assert "is not an empty folder" in refused(capsys, path, "--output", tmp_path)
    assert "is not an empty folder" in refused(capsys, path, "--output", path)
    softmax = timm.create_model("soft_digits", attn="softmax")
    metadata = {"model": "soft_digits", "arguments": '{"attn": "softmax"}'}
    checkpoint.save(tmp_path / "softmax.safetensors", softmax.state_dict(), metadata=metadata)
    assert "there is no softmax-free attention to draw" in refused(capsys, tmp_path / "softmax.safetensors", *out)
    assert not (tmp_path / "out").exists()


def test_the_script_writes_its_files(tmp_path, digits):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 30), "red").save(tmp_path / folder / "same.jpg")
    images = [str(tmp_path / folder / "same.jpg") for folder in ("one", "two")]
    command = [sys.executable, visualize.__file__, str(digits[0]), *images, "--output", str(tmp_path / "new" / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    files = sorted((tmp_path / "new" / "out").iterdir())
    assert sorted(done.stdout.splitlines()) == [str(file) for file in files]
    assert [file.name for file in files] == [
        f"{name}-{kind}.png" for name in ("same-1", "same") for kind in ("attention", "landmarks")
    ]
    for file in files:
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert image.size[0] > 500
