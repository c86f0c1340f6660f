"""SoftmaxFreeAttention against a transcription of its formulas, one head and one token at a time."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from lowrank.nn import SoftmaxFreeAttention
from lowrank.pinv import pinv_newton

SIZE = (7, 9)


def tokens(dim, *, batch=2, size=SIZE, seed=0, dtype=torch.float64):
    return torch.randn(batch, size[0] * size[1], dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(dim=12, *, seed=1, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return SoftmaxFreeAttention(dim, num_heads=3, **options).to(dtype)


def gelu(x):
    return np.vectorize(lambda t: 0.5 * t * (1 + math.erf(t / math.sqrt(2))))(x)


def pooled(image, grid):
    """Adaptive average pooling of (H, W, d): cell i of g covers the rows from ⌊iH/g⌋ to ⌈(i + 1)H/g⌉."""
    edges = [[(i * n // g, -(-(i + 1) * n // g)) for i in range(g)] for n, g in zip(image.shape[:2], grid, strict=True)]
    return np.array([[image[a:b, c:d].mean((0, 1)) for c, d in edges[1]] for a, b in edges[0]])


def transcription(module, x, size):
    """(output, C) for one image x (N, C) in NumPy."""
    w = {name: value.detach().numpy() for name, value in module.named_parameters()}
    height, width = size
    heads, d, r = module.num_heads, module.head_dim, module.stride
    query = (x @ w["query.weight"].T + w["query.bias"]) / d**0.25
    value = x @ w["value.weight"].T + w["value.bias"]
    outputs, blocks = [], []
    for h in range(heads):
        q, v = query[:, h * d : (h + 1) * d], value[:, h * d : (h + 1) * d]
        z = q.reshape(height, width, d)
        if r is not None:
            # [rows, columns, channel out] of the patches that fit
            z = np.array(
                [
                    [
                        np.einsum("oiab,abi->o", w["landmark_conv.weight"], z[i : i + r, j : j + r])
                        for j in range(0, width - r + 1, r)
                    ]
                    for i in range(0, height - r + 1, r)
                ]
            )
        if module.grid is not None:
            z = pooled(z, [min(g, n) for g, n in zip(module.grid, z.shape[:2], strict=True)])
        z = z.reshape(-1, d)
        if r is not None:
            mean, variance = z.mean(-1, keepdims=True), z.var(-1, keepdims=True)
            z = (z - mean) / np.sqrt(variance + 1e-5)
            z = gelu(z * w["landmark_norm.weight"] + w["landmark_norm.bias"])
        c = np.array([[math.exp(-0.5 * np.sum((a - b) ** 2)) for b in z] for a in q])
        a = np.array([[math.exp(-0.5 * np.sum((a - b) ** 2)) for b in z] for a in z])
        core = np.linalg.inv(a + module.ridge * np.eye(len(a)))
        if module.normalize:
            core = np.diag(a.sum(1) ** -0.5) @ core @ np.diag(a.sum(1) ** -0.5)
        out = c @ core @ c.T @ v
        if module.value_conv is not None:
            k = module.value_conv.kernel_size[0]
            padded = np.zeros((height + k - 1, width + k - 1, d))
            padded[k // 2 : k // 2 + height, k // 2 : k // 2 + width] = v.reshape(height, width, d)
            kernel = w["value_conv.weight"][h, 0]
            for i in range(height):
                for j in range(width):
                    out[i * width + j] += np.einsum("ab,abc->c", kernel, padded[i : i + k, j : j + k])
        outputs.append(out)
        blocks.append(c)
    return np.concatenate(outputs, 1) @ w["proj.weight"].T + w["proj.bias"], np.array(blocks)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 3},
        {"stride": 2, "normalize": True, "value_kernel": 3, "ridge": 0.05},
        {"stride": 2, "grid": 2, "value_kernel": 5},
        {"stride": 3, "grid": 100},
        {"grid": (2, 4)},
        {"grid": 3, "normalize": True, "value_kernel": 1},
    ],
    ids=str,
)
def test_agrees_with_the_formulas(options):
    module, x = layer(**options), tokens(12)
    with torch.no_grad():
        out, c = module(x, SIZE), module.landmark_attention(x, SIZE)
    assert out.shape == x.shape
    for image in range(2):
        expected, expected_c = transcription(module, x[image].numpy(), SIZE)
        # κ·eps with κ ≤ 1 + m/ridge ≤ 1200, times sums over 63 tokens; C itself knows no κ.
        np.testing.assert_allclose(out[image], expected, rtol=0, atol=1200 * 63 * 2.3e-16)
        np.testing.assert_allclose(c[image], expected_c, rtol=0, atol=1e-14)


def test_a_grid_as_fine_as_the_convolution_is_no_pooling():
    x = tokens(12, size=(8, 12))
    free, bounded = layer(stride=4), layer(stride=4, grid=(2, 3))
    assert torch.equal(free(x, (8, 12)), bounded(x, (8, 12)))


@pytest.mark.parametrize(("stride", "grid", "expected"), [(4, None, 64), (4, 3, 9), (None, (2, 5), 10)])
def test_number_of_landmarks(stride, grid, expected):
    module = layer(stride=stride, grid=grid)
    assert module.landmark_attention(tokens(12, size=(32, 32)), (32, 32)).shape == (2, 3, 1024, expected)


def test_state_has_plain_names():
    expected = {f"{name}.{kind}" for name in ("query", "value", "proj") for kind in ("weight", "bias")}
    assert set(layer(grid=2).state_dict()) == expected
    expected |= {"landmark_conv.weight", "landmark_norm.weight", "landmark_norm.bias", "value_conv.weight"}
    module = layer(stride=3, value_kernel=5)
    assert set(module.state_dict()) == expected
    assert module.value_conv.weight.shape == (3, 1, 5, 5)
    assert module.landmark_conv.weight.shape == (4, 4, 3, 3)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_match_finite_differences(normalize):
    module = layer(6, stride=2, grid=2, value_kernel=3, ridge=0.1, normalize=normalize)
    x = tokens(6, batch=1, size=(4, 5)).requires_grad_()
    parameters = [parameter for parameter in module.parameters()]

    def f(x, *parameters):
        named = dict(zip((name for name, _ in module.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(module, named, (x, (4, 5)))

    assert torch.autograd.gradcheck(f, (x, *parameters), fast_mode=True)


def test_a_training_step_in_single_precision_is_finite_everywhere():
    module = layer(48, stride=2, grid=7, value_kernel=3, dtype=torch.float32)
    x = tokens(48, size=(14, 14), dtype=torch.float32)
    module(x, (14, 14)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert float(parameter.grad.abs().max()) > 0, name


def test_the_inverse_is_handed_on():
    x = tokens(12)
    converged, short = layer(stride=2), layer(stride=2, inverse=partial(pinv_newton, steps=3))
    with torch.no_grad():
        assert float((converged(x, SIZE) - short(x, SIZE)).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    module, x = layer(12, stride=3, value_kernel=3, dtype=torch.float32), tokens(12, dtype=torch.float32)
    with torch.no_grad():
        exact = module(x, SIZE)
        half = module.to(dtype)(x.to(dtype), SIZE)
    assert half.dtype == dtype
    # Weights, tokens and landmarks are rounded to the dtype; the core passes that on with its condition, up to
    # 1 + 6/0.01, in the worst direction, and with some ten in an ordinary one.
    assert float((half.float() - exact).abs().max()) < 50 * torch.finfo(dtype).eps * float(exact.abs().max())


def test_autocast_keeps_the_core_in_single_precision():
    module, x = layer(12, stride=3, value_kernel=3, dtype=torch.float32), tokens(12, dtype=torch.float32)
    cores = []

    def inverse(a, **options):
        cores.append(a.dtype)
        return pinv_newton(a, **options)

    module.inverse = inverse
    with torch.no_grad():
        exact = module(x, SIZE)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x, SIZE)
        c = module.landmark_attention(x, SIZE)
    assert cores == [torch.float32, torch.float32]
    assert out.dtype == c.dtype == torch.bfloat16
    assert float((out - exact).abs().max()) < 50 * torch.finfo(torch.bfloat16).eps * float(exact.abs().max())


def test_images_do_not_see_each_other():
    module, x = layer(12, stride=3, value_kernel=3), tokens(12, batch=4)
    with torch.no_grad():
        together = module(x, SIZE)
        for i in range(4):
            # Other batches multiply in other orders: roundoff, κ·eps.
            assert float((module(x[i : i + 1], SIZE) - together[i]).abs().max()) < 600 * 63 * 2.3e-16


@pytest.mark.parametrize(
    ("dim", "options", "message"),
    [
        (12, {"num_heads": 5, "stride": 2}, "divisor of dim, not 5 with dim=12"),
        (12, {"num_heads": 0, "stride": 2}, "divisor of dim, not 0"),
        (12, {"num_heads": 3}, "neither is given"),
        (12, {"num_heads": 3, "stride": 0}, "stride must be at least 1, not 0"),
        (12, {"num_heads": 3, "grid": 0}, "grid must have .*, not 0"),
        (12, {"num_heads": 3, "grid": (2, 0)}, r"grid must have .*, not \(2, 0\)"),
        (12, {"num_heads": 3, "grid": 2, "value_kernel": 4}, "value_kernel must be odd .*, not 4"),
    ],
)
def test_constructor_errors(dim, options, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxFreeAttention(dim, **options)


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((2, 62, 12), (7, 9), r"x has 62 tokens \(shape \(2, 62, 12\)\), not the 7 × 9"),
        ((2, 63, 11), (7, 9), r"x must have shape \(B, N, 12\), not \(2, 63, 11\)"),
        ((63, 12), (7, 9), r"x must have shape \(B, N, 12\)"),
        ((2, 14, 12), (2, 7), "2 × 7 has no room for one landmark cell of stride 3"),
    ],
)
def test_input_errors(shape, size, message):
    with pytest.raises(ValueError, match=message):
        layer(stride=3)(torch.zeros(shape, dtype=torch.float64), size)
