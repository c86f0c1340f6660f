"""The segmentation example: its shapes, its score, and that backbone and head learn together."""

import subprocess
import sys

import fit
import pytest
import segmentation
import torch


def test_shapes_are_what_their_labels_say():
    images, labels = segmentation.shapes(400, (64, 96), seed=0)
    assert images.shape == (400, 1, 64, 96)
    assert labels.shape == (400, 64, 96)
    again, _ = segmentation.shapes(400, (64, 96), seed=0)
    assert torch.equal(images, again)
    other, _ = segmentation.shapes(400, (64, 96), seed=1)
    assert not torch.equal(images, other)
    shares = torch.bincount(labels.flatten(), minlength=4) / labels.numel()
    assert bool((shares > 0.03).all()), shares  # the background has four fifths, and no class is rare
    # Noise of deviation 0.3 about 0 on the background, about ± 0.5 … 1.5 on a shape.
    pixels = images[:, 0]
    assert abs(float(pixels[labels == 0].std()) - 0.3) < 0.01
    assert 0.5 < float(pixels[labels > 0].abs().mean()) < 1.2
    # Areas in units of the squared radius: 0.64π, 1.4², and 3√3·R²/4 with R = 1; far apart enough to be told.
    images, labels = segmentation.shapes(2000, (200, 200), seed=2, most=1)
    inside = ~(labels[:, [0, -1]].any((1, 2)) | labels[:, :, [0, -1]].any((1, 2)))
    kinds, areas = labels.amax((1, 2))[inside], (labels > 0).sum((1, 2))[inside] / 200**2
    for kind, unit in ((1, 2.01), (2, 1.96), (3, 1.30)):
        low, high = 0.14**2 * unit, 0.26**2 * unit
        found = areas[kinds == kind]
        assert len(found) > 50
        assert float(found.min()) > 0.9 * low
        assert float(found.max()) < 1.1 * high


def test_intersection_over_union_by_hand():
    class Fixed(torch.nn.Module):
        def forward(self, images):
            return torch.nn.functional.one_hot(images[:, 0].long(), 4).movedim(-1, 1).float()

    predicted = torch.tensor([[0, 1, 1], [2, 2, 3]])
    labels = torch.tensor([[[0, 1, 2], [2, 3, 3]]])
    scores = segmentation.intersection_over_union(Fixed(), predicted[None, None].float(), labels)
    assert scores.tolist() == pytest.approx([1.0, 1 / 2, 1 / 3, 1 / 2])


def test_backbone_and_head_learn_together_at_any_size():
    torch.manual_seed(0)
    net = segmentation.Segmenter("soft_cluttered", 4, in_chans=1, img_size=(32, 48))
    images, labels = segmentation.shapes(8, (32, 48), seed=0)
    before = net.backbone.model.stages[0].blocks[0].attn.query.weight.detach().clone()
    with torch.no_grad():
        start = float(torch.nn.functional.cross_entropy(net(images), labels))
    fit.fit(net, fit.shuffled(images, labels, batch_size=8, seed=0), steps=25, lr=2e-3)
    with torch.no_grad():
        end = float(torch.nn.functional.cross_entropy(net(images), labels))
    assert end < 0.6 * start
    assert not torch.equal(before, net.backbone.model.stages[0].blocks[0].attn.query.weight)
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert net.eval()(torch.zeros(1, 1, 70, 45)).shape == (1, 4, 70, 45)


def test_the_script(tmp_path):
    command = [sys.executable, segmentation.__file__, "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["size", "mean", "IoU", *segmentation.CLASSES]
    assert len(lines) == 1 + 1 + len(segmentation.OTHER_SIZES)
    assert (tmp_path / "segmentation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--model", "unet"], "there is no 'unet'; the names are"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        segmentation.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
