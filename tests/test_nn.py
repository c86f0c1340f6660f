"""SoftmaxFreeAttention against a transcription of its formulas, one head and one token at a time."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lowrank.nn import SoftmaxFreeAttention, gaussian_attention
from lowrank.pinv import pinv_newton

SIZE = (7, 9)


def tokens(dim, *, batch=2, size=SIZE, seed=0, dtype=torch.float64):
    return torch.randn(batch, math.prod(size), dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(dim=12, *, seed=1, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return SoftmaxFreeAttention(dim, num_heads=3, **options).to(dtype)


def roundoff(landmarks, n, *, ridge=0.01, dtype=torch.float64):
    """κ·n·eps: the core's largest condition number and sums over n tokens; entries of all else are of order 1."""
    return (1 + landmarks / ridge) * n * torch.finfo(dtype).eps


def together(*images, size):
    """Images or sequences (*size_i, C) at the front corner of one size each: tokens (B, N, C), mask (B, N), NaN
    for padding."""
    x = torch.full((len(images), *size, images[0].shape[-1]), math.nan, dtype=images[0].dtype)
    mask = torch.zeros(len(images), *size, dtype=torch.bool)
    for i, image in enumerate(images):
        place = (i, *(slice(n) for n in image.shape[:-1]))
        x[place], mask[place] = image, True
    return x.flatten(1, -2), mask.flatten(1)


def pieces(dim, *sizes, dtype=torch.float64):
    return [tokens(dim, batch=1, size=n, seed=i, dtype=dtype)[0].reshape(*n, dim) for i, n in enumerate(sizes)]


def gelu(x):
    return np.vectorize(lambda t: 0.5 * t * (1 + math.erf(t / math.sqrt(2))))(x)


def pooled(image, grid):
    """Adaptive average pooling of (H, W, d): cell i of g covers the rows from ⌊iH/g⌋ to ⌈(i + 1)H/g⌉."""
    edges = [[(i * n // g, -(-(i + 1) * n // g)) for i in range(g)] for n, g in zip(image.shape[:2], grid, strict=True)]
    return np.array([[image[a:b, c:d].mean((0, 1)) for c, d in edges[1]] for a, b in edges[0]])


def padded(image, kernel):
    """Zeros around (H, W, d), half a kernel's worth."""
    (height, width, d), (k, j) = image.shape, kernel
    result = np.zeros((height + k - 1, width + j - 1, d))
    result[k // 2 : k // 2 + height, j // 2 : j // 2 + width] = image
    return result


def transcription(module, x, size):
    """(output, C) for one image or sequence x (N, C) in NumPy; a sequence is an image of one column."""
    w = {name: value.detach().numpy() for name, value in module.named_parameters()}
    column = (1,) * (2 - module.spatial_dims)
    height, width = size + column
    heads, d, r = module.num_heads, module.head_dim, module.stride
    w = {name: value.reshape(value.shape + column) if "_conv" in name else value for name, value in w.items()}
    query = (x @ w["query.weight"].T + w["query.bias"]) / d**0.25
    value = x @ w["value.weight"].T + w["value.bias"]
    outputs, blocks = [], []
    for h in range(heads):
        q, v = query[:, h * d : (h + 1) * d], value[:, h * d : (h + 1) * d]
        z = q.reshape(height, width, d)
        if r is not None:
            # [rows, columns, channel out] of the patches that fit
            a, b = w["landmark_conv.weight"].shape[2:]
            z = np.array(
                [
                    [
                        np.einsum("oiab,abi->o", w["landmark_conv.weight"], z[i : i + a, j : j + b])
                        for j in range(0, width - b + 1, b)
                    ]
                    for i in range(0, height - a + 1, a)
                ]
            )
        if module.grid is not None:
            z = pooled(z, [min(g, n) for g, n in zip(module.grid + column, z.shape[:2], strict=True)])
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
            kernel = w["value_conv.weight"][h, 0]
            image = padded(v.reshape(height, width, d), kernel.shape)
            for i in range(height):
                for j in range(width):
                    patch = image[i : i + kernel.shape[0], j : j + kernel.shape[1]]
                    out[i * width + j] += np.einsum("ab,abc->c", kernel, patch)
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


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 3},
        {"stride": 2, "grid": 4, "value_kernel": 3, "normalize": True},
        {"grid": (6,), "value_kernel": 5},
        {"grid": 100, "value_kernel": 1},
    ],
    ids=str,
)
def test_sequences_agree_with_the_formulas(options):
    module, x = layer(spatial_dims=1, **options), tokens(12, size=(23,))
    with torch.no_grad():
        out, c = module(x), module.landmark_attention(x)
        assert torch.equal(module(x, 23), out)
        assert torch.equal(module(x, (23,)), out)
    for i in range(2):
        expected, expected_c = transcription(module, x[i].numpy(), (23,))
        np.testing.assert_allclose(out[i], expected, rtol=0, atol=roundoff(23, 23))
        np.testing.assert_allclose(c[i], expected_c, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("spatial_dims", "size"), [(1, (11,)), (2, (3, 5))])
def test_tokens_within_the_grid_are_the_landmarks(spatial_dims, size):
    module, x = layer(spatial_dims=spatial_dims, grid=11, ridge=0.05), tokens(12, size=size)
    with torch.no_grad():
        out, q, v = module(x, size), module.query(x) / 4**0.25, module.value(x)
        q, v = (y.unflatten(2, (3, 4)).transpose(1, 2) for y in (q, v))
        k = torch.exp(-0.5 * torch.cdist(q, q, compute_mode="donot_use_mm_for_euclid_dist").square())
        dense = k @ torch.linalg.solve(k + 0.05 * torch.eye(k.shape[-1], dtype=k.dtype), k @ v)
        dense = module.proj(dense.transpose(1, 2).flatten(2))
    n = math.prod(size)
    assert float((out - dense).abs().max()) < roundoff(n, n, ridge=0.05)


def test_a_grid_as_fine_as_the_convolution_is_no_pooling():
    x = tokens(12, size=(8, 12))
    free, bounded = layer(stride=4), layer(stride=4, grid=(2, 3))
    assert torch.equal(free(x, (8, 12)), bounded(x, (8, 12)))


@pytest.mark.parametrize("spatial_dims", [1, 2])
def test_landmarks_of_a_grid_are_convolved_at_one_cost(spatial_dims):
    def flops(length, **options):
        size = (length,) * spatial_dims
        with FlopCounterMode(display=False) as counter:
            layer(grid=3, spatial_dims=spatial_dims, **options)(tokens(12, size=size), size)
        return counter.get_total_flops()

    # Two images of 3 heads of 4 channels: the convolution is 3^s cells of 4^s·4 × 4 products.
    products = 2 * 3 * 3**spatial_dims * 4**spatial_dims * 4 * 4
    assert [flops(length, stride=4) - flops(length) for length in (12, 24, 50)] == [2 * products] * 3


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
        (12, {"num_heads": 3, "grid": (2, 2, 2)}, r"each of 2 axes, not \(2, 2, 2\)"),
        (12, {"num_heads": 3, "grid": -1, "spatial_dims": 1}, "each of 1 axes, not -1"),
        (12, {"num_heads": 3, "grid": (2, 2), "spatial_dims": 1}, r"each of 1 axes, not \(2, 2\)"),
        (12, {"num_heads": 3, "grid": 2, "spatial_dims": 3}, r"spatial_dims must be 1 \(sequences\) or 2 .*, not 3"),
        (12, {"num_heads": 3, "grid": 2, "value_kernel": 4}, "value_kernel must be odd .*, not 4"),
        (12, {"num_heads": 3, "grid": 2, "value_kernel": 0}, "value_kernel must be odd .*, not 0"),
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
        ((2, 0, 12), (0, 7), "0 × 7 has no room for one landmark cell of stride 3"),
        ((2, 63, 12), (-7, -9), "-7 × -9 has no room"),
        ((2, 63, 12), None, r"size must be \(H, W\) of an image of N = H·W tokens, not None; .* \(2, 63, 12\)"),
        ((2, 63, 12), 63, r"size must be \(H, W\) .*, not 63"),
        ((2, 63, 12), (7, 3, 3), r"size must be \(H, W\) .*, not \(7, 3, 3\)"),
    ],
)
def test_input_errors(shape, size, message):
    with pytest.raises(ValueError, match=message):
        layer(stride=3)(torch.zeros(shape, dtype=torch.float64), size)


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((2, 9, 12), 8, r"x has 9 tokens \(shape \(2, 9, 12\)\), not the 8 of size"),
        ((2, 9, 12), (3, 3), r"size must be N or \(N,\) of a sequence, not \(3, 3\)"),
        ((2, 2, 12), None, "2 has no room for one landmark cell of stride 3"),
    ],
)
def test_sequence_errors(shape, size, message):
    with pytest.raises(ValueError, match=message):
        layer(spatial_dims=1, stride=3)(torch.zeros(shape, dtype=torch.float64), size)


def test_state_of_a_layer_for_sequences():
    module, image = layer(spatial_dims=1, stride=3, value_kernel=5), layer(stride=3, value_kernel=5)
    assert set(module.state_dict()) == set(image.state_dict())
    assert module.value_conv.weight.shape == (3, 1, 5)
    assert module.landmark_conv.weight.shape == (4, 4, 3)
    assert "spatial_dims=1, stride=3" in repr(module)


IMAGES = [(7, 9), (9, 4), (5, 11), (3, 3)], (9, 11)
SEQUENCES = [(17,), (4,), (9,), (3,)], (17,)
MASKED = [
    ({"stride": 3}, IMAGES),
    ({"stride": 2, "value_kernel": 3, "normalize": True}, IMAGES),
    ({"stride": 2, "grid": 2, "value_kernel": 5}, IMAGES),
    ({"stride": 1, "grid": (4, 5)}, IMAGES),
    ({"stride": 3, "grid": 100}, IMAGES),
    ({"grid": (2, 4), "normalize": True}, IMAGES),
    ({"grid": 5, "value_kernel": 3}, IMAGES),
    ({"grid": 100}, IMAGES),
    ({"spatial_dims": 1, "stride": 3, "value_kernel": 3}, SEQUENCES),
    ({"spatial_dims": 1, "stride": 2, "grid": 4, "normalize": True}, SEQUENCES),
    ({"spatial_dims": 1, "grid": 5, "value_kernel": 5}, SEQUENCES),
]


@pytest.mark.parametrize(("options", "sizes"), MASKED, ids=str)
def test_padding_is_as_if_absent(options, sizes):
    """Outputs, and gradients of every parameter, with NaN in the padding, against one image after the other."""
    images, (sizes, size) = pieces(12, *sizes[0]), sizes
    module = layer(**options)
    x, mask = together(*images, size=size)
    x.requires_grad_()
    out = module(x, size, mask=mask)
    assert torch.equal(out[~mask], torch.zeros_like(out[~mask]))
    out[mask].square().sum().backward()
    out, bound = out.detach(), roundoff(x.shape[1], x.shape[1])
    gradients = [parameter.grad for parameter in module.parameters()]
    assert torch.equal(x.grad[~mask], torch.zeros_like(x.grad[~mask]))
    module.zero_grad()
    for i, image in enumerate(images):
        alone = image[None].flatten(1, -2).requires_grad_()
        expected = module(alone, sizes[i])
        assert float((out[i][mask[i]] - expected[0].detach()).abs().max()) < bound
        expected.square().sum().backward()
        # Derivatives of the core have κ², of which random cotangents see κ; the sums run over the outputs as well.
        assert float((x.grad[i][mask[i]] - alone.grad[0]).abs().max()) < 100 * bound
    for gradient, parameter in zip(gradients, module.parameters(), strict=True):
        scale = max(1.0, float(parameter.grad.abs().max()))
        assert float((gradient - parameter.grad).abs().max()) < 100 * bound * scale


def by_hand(module, x, keep):
    """Output (tokens kept, C) of one image x (H, W, C) under any mask (H, W), landmarks pooled from tokens."""
    w = {name: value.detach().numpy() for name, value in module.named_parameters()}
    d = module.head_dim
    rows, columns = (np.flatnonzero(keep.any(axis)) for axis in (1, 0))
    cells = []
    for i in range(min(module.grid[0], len(rows))):
        for j in range(min(module.grid[1], len(columns))):
            span = [
                of[k * len(of) // min(g, len(of)) : -(-(k + 1) * len(of) // min(g, len(of)))]
                for k, of, g in zip((i, j), (rows, columns), module.grid, strict=True)
            ]
            inside = [(a, b) for a in span[0] for b in span[1] if keep[a, b]]
            if inside:
                cells.append(inside)
    outputs = []
    for h in range(module.num_heads):
        part = slice(h * d, (h + 1) * d)
        q = (x @ w["query.weight"][part].T + w["query.bias"][part]) / d**0.25
        v = (x @ w["value.weight"][part].T + w["value.bias"][part])[keep]
        z = np.array([np.mean([q[a, b] for a, b in inside], axis=0) for inside in cells])
        c = np.exp(-0.5 * np.sum((q[keep][:, None] - z) ** 2, -1))
        a = np.exp(-0.5 * np.sum((z[:, None] - z) ** 2, -1))
        outputs.append(c @ np.linalg.solve(a + module.ridge * np.eye(len(a)), c.T @ v))
    return len(cells), np.concatenate(outputs, 1) @ w["proj.weight"].T + w["proj.bias"]


def test_masks_of_any_form():
    module, x = layer(grid=(3, 4)), tokens(12, batch=4)
    share = torch.tensor([0.7, 0.3, 0.1, 0.05])[:, None, None]
    mask = torch.rand(4, 7, 9, generator=torch.Generator().manual_seed(3)) < share
    mask[0, 2], mask[1, :, 4] = False, False
    with torch.no_grad():
        out = module(x, SIZE, mask=mask.flatten(1))
    counts = set()
    for i in range(4):
        keep = mask[i].numpy()
        m, expected = by_hand(module, x[i].reshape(7, 9, 12).numpy(), keep)
        counts.add(m)
        np.testing.assert_allclose(out[i][mask[i].flatten()], expected, rtol=0, atol=roundoff(12, 63))
    assert len(counts) > 2, "the masks were meant to leave landmarks without cells"
    assert max(counts) == 12


def test_a_mask_that_keeps_all_changes_nothing():
    x = tokens(12)
    for options in ({"stride": 2, "grid": 2, "value_kernel": 3}, {"grid": (2, 4)}, {"stride": 3}):
        module = layer(**options)
        with torch.no_grad():
            plain, masked = module(x, SIZE), module(x, SIZE, mask=torch.ones(2, 63, dtype=torch.bool))
        assert float((plain - masked).abs().max()) < roundoff(12, 63)


@pytest.mark.parametrize("options", [{"stride": 3, "value_kernel": 3, "normalize": True}, {"grid": 3}], ids=str)
def test_an_element_without_tokens_is_zero(options):
    module, x = layer(**options), tokens(12, batch=3)
    mask = torch.ones(3, 63, dtype=torch.bool)
    mask[1] = False
    x[1] = math.nan
    x.requires_grad_()
    out = module(x, SIZE, mask=mask)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert float((out - module(x, SIZE)).detach()[::2].abs().max()) < roundoff(9, 63)
    out.square().sum().backward()
    for name, y in (("x", x), *module.named_parameters()):
        assert bool(torch.isfinite(y.grad).all()), name
    assert torch.equal(x.grad[1], torch.zeros_like(x.grad[1]))
    assert float(x.grad[0].abs().max()) > 0


def test_gradients_under_a_mask_match_finite_differences():
    module = layer(6, stride=2, grid=2, value_kernel=3, ridge=0.1)
    x = tokens(6, size=(5, 6)).requires_grad_()
    mask = torch.ones(2, 5, 6, dtype=torch.bool)
    mask[0, 4:], mask[0, :, 4:], mask[1, 1, 1] = False, False, False

    def f(x, *parameters):
        named = dict(zip((name for name, _ in module.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(module, named, (x, (5, 6)), {"mask": mask.flatten(1)})

    assert torch.autograd.gradcheck(f, (x, *module.parameters()), fast_mode=True)


def one_row_left():
    mask = torch.ones(3, *SIZE, dtype=torch.bool)
    mask[1:, 1:] = False
    mask[2] = False
    return mask.flatten(1)


def test_tokens_without_a_whole_landmark_cell_are_an_error():
    module, x = layer(stride=2), tokens(12, batch=3)
    with pytest.raises(
        ValueError, match="batch element 1 has tokens under the mask, but not one whole landmark cell of 2"
    ):
        module(x, SIZE, mask=one_row_left())


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_a_traced_program_looks_at_no_mask():
    module, x = layer(stride=2), tokens(12, batch=3)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    mask = one_row_left()
    mask[0, 60:] = False
    with torch.no_grad():
        out = compiled(x, SIZE, mask=mask)
        assert float((out[0] - module(x[:1], SIZE, mask=mask[:1])[0]).abs().max()) < roundoff(12, 63)
    # No landmarks, no attention: what is left is the last layer's bias.
    assert torch.equal(out[1, :9], module.proj.bias.detach().expand(9, -1))
    assert torch.equal(out[1, 9:], torch.zeros_like(out[1, 9:]))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("masked", [False, True])
def test_a_compiled_layer_serves_every_size_beyond_the_grid(masked):
    module, graphs = layer(stride=2, grid=3, value_kernel=3), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    with torch.no_grad():
        for size in ((8, 10), (9, 13), (12, 11), (14, 17)):
            x = tokens(12, size=size)
            mask = torch.arange(x.shape[1]) < torch.tensor([[x.shape[1]], [60]]) if masked else None
            difference = compiled(x, size, mask=mask) - module(x, size, mask=mask)
            assert float(difference.abs().max()) < roundoff(9, x.shape[1])
    assert len(graphs) == 2, "one for the first size, one for all others"


@pytest.mark.parametrize(
    ("mask", "kind", "message"),
    [
        (torch.ones(2, 63), TypeError, "dtype torch.bool, True where a token takes part, not of dtype torch.float32"),
        ([[True] * 63] * 2, TypeError, "not of type list"),
        (torch.ones(2, 62, dtype=torch.bool), ValueError, r"\(B, N\) = \(2, 63\) of x's tokens, not \(2, 62\)"),
        (torch.ones(63, dtype=torch.bool), ValueError, r"\(B, N\) = \(2, 63\) of x's tokens, not \(63,\)"),
        (torch.ones(2, 7, 9, dtype=torch.bool), ValueError, r"\(B, N\) = \(2, 63\) .* not \(2, 7, 9\)"),
        (
            torch.ones(63, 63, dtype=torch.bool).tril(),
            ValueError,
            "causal and other pairwise masks are impossible here",
        ),
        (torch.ones(2, 63, 63, dtype=torch.bool), ValueError, "causal and other pairwise masks are impossible here"),
        (torch.ones(2, 3, 63, 63, dtype=torch.bool), ValueError, "causal and other pairwise masks are impossible"),
        (torch.ones(2, 63, dtype=torch.bool, device="meta"), ValueError, "x is on device cpu and mask on meta"),
    ],
    ids=["float", "list", "short", "one axis", "image", "causal", "pairs", "pairs by head", "device"],
)
def test_mask_errors(mask, kind, message):
    with pytest.raises(kind, match=message):
        layer(stride=3)(tokens(12), SIZE, mask=mask)


def test_queries_equal_to_the_tokens_change_nothing():
    module, x = layer(stride=2, normalize=True), tokens(12)
    with torch.no_grad():
        out = module(x, SIZE)
        assert float((module(x, SIZE, queries=x) - out).abs().max()) < roundoff(12, 63)
        # One after another, and in any order: who else asks makes no difference.
        some = module(x, SIZE, queries=x[:, [40, 3]])
    assert some.shape == (2, 2, 12)
    assert float((some - out[:, [40, 3]]).abs().max()) < roundoff(12, 63)


def test_queries_under_a_mask():
    module, queries = layer(spatial_dims=1, grid=4), tokens(12, size=(5,), seed=9)
    x, mask = together(*pieces(12, (13,), (6,)), size=(13,))
    with torch.no_grad():
        out = module(x, mask=mask, queries=queries)
        alone = module(x[1:, :6], queries=queries[1:])
        nobody = module(x, mask=torch.zeros_like(mask), queries=queries)
    assert out.shape == (2, 5, 12)
    assert float((out[1] - alone[0]).abs().max()) < roundoff(4, 13)
    assert torch.equal(nobody, module.proj.bias.detach().expand(2, 5, -1))


def test_gradients_of_queries_match_finite_differences():
    module = layer(6, spatial_dims=1, grid=3, ridge=0.1)
    x, queries = tokens(6, size=(7,)).requires_grad_(), tokens(6, size=(4,), seed=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, queries: module(x, queries=queries), (x, queries), fast_mode=True)


@pytest.mark.parametrize(
    ("queries", "options", "message"),
    [
        (torch.zeros(2, 5, 11), {}, r"queries must have shape \(2, N', 12\), not \(2, 5, 11\)"),
        (torch.zeros(3, 5, 12), {}, r"queries must have shape \(2, N', 12\), not \(3, 5, 12\)"),
        (torch.zeros(5, 12), {}, r"queries must have shape \(2, N', 12\), not \(5, 12\)"),
        (torch.zeros(2, 5, 12, device="meta"), {}, "x is on device cpu and queries on meta"),
        (torch.zeros(2, 5, 12), {"value_kernel": 3}, "queries cannot be combined with value_kernel"),
    ],
)
def test_query_errors(queries, options, message):
    with pytest.raises(ValueError, match=message):
        layer(stride=3, **options)(tokens(12), SIZE, queries=queries)


def test_a_mask_of_pairs_of_queries_and_tokens_is_refused():
    with pytest.raises(ValueError, match="pairwise masks are impossible"):
        layer(stride=3)(tokens(12), SIZE, queries=tokens(12, size=(5,)), mask=torch.ones(2, 5, 63, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"stride": 3, "value_kernel": 3}, {"grid": 2}], ids=str)
def test_half_precision_under_a_mask(dtype, options):
    module = layer(12, dtype=torch.float32, **options)
    x, mask = together(*pieces(12, (7, 9), (6, 5), dtype=torch.float32), size=SIZE)
    with torch.no_grad():
        exact = module(x, SIZE, mask=mask)
        with torch.autocast("cpu", dtype=dtype):
            mixed = module(x, SIZE, mask=mask)
        half = module.to(dtype)(x.to(dtype), SIZE, mask=mask)
    assert half.dtype == mixed.dtype == dtype
    # As in test_half_precision.
    bound = 50 * torch.finfo(dtype).eps * float(exact.abs().max())
    assert float((half.float() - exact).abs().max()) < bound
    assert float((mixed.float() - exact).abs().max()) < bound


def test_masked_means_of_many_half_precision_tokens():
    # Sums of tokens of 3000 overflow float16, and counts beyond 256 are no bfloat16: landmarks are means all the same.
    mask = torch.ones(1, 2000, dtype=torch.bool)
    for dtype, value in ((torch.float16, 3000.0), (torch.bfloat16, 1.0)):
        module = layer(12, dtype=dtype, spatial_dims=1, grid=3)
        with torch.no_grad():
            module.query.weight.copy_(torch.eye(12))
            module.query.bias.zero_()
            x = torch.full((1, 2000, 12), value, dtype=dtype)
            q, z, _ = module._queries_and_landmarks(x, (2000,), mask)
        assert torch.equal(z, q[:, :, :3])


def overflowing(dtype, *, options):
    module, x = layer(12, dtype=torch.float32, **options).to(dtype), tokens(12, batch=3, dtype=torch.float32)
    with torch.no_grad():
        module.query.weight.mul_(100)
    x[1, 30] = 1e4 * x[1, 30].sign()
    return module, x.to(dtype)


@pytest.mark.parametrize("options", [{"stride": 3}, {"grid": 2}], ids=str)
def test_float16_queries_that_overflow(options):
    module, x = overflowing(torch.float16, options=options)
    with torch.no_grad():
        assert not bool(torch.isfinite(module.query(x)[1]).all())
        with pytest.raises(ValueError, match="batch element 1 overflow float16, which ends at 65504; use bfloat16"):
            module(x, SIZE)
        with pytest.raises(ValueError, match="batch element 0 overflow float16"):
            module(x[::2], SIZE, queries=x[[1, 0]])
        with (
            torch.autocast("cpu", dtype=torch.float16),
            pytest.raises(ValueError, match="batch element 1 overflow float16"),
        ):
            module.float()(x.float(), SIZE)
        module.to(torch.float16)
        # Inside a traced program: NaN there, and only there.
        out = torch.func.vmap(lambda image: module(image[None], SIZE)[0])(x)
        assert bool(torch.isnan(out[1]).all())
        assert bool(torch.isfinite(out[::2]).all())
        # What is not finite to begin with is no overflow, and stays visible.
        x[1] = math.nan
        assert bool(torch.isnan(module(x, SIZE)[1]).all())
        assert bool(torch.isfinite(module(x, SIZE)[::2]).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_have_the_range(dtype):
    module, x = overflowing(dtype, options={"stride": 3})
    with torch.no_grad():
        assert bool(torch.isfinite(module(x, SIZE)).all())


@pytest.mark.parametrize(
    ("x", "size", "error", "message"),
    [
        (np.zeros((1, 12, 12)), (3, 4), TypeError, "floating dtype, not ndarray"),
        (torch.zeros(1, 12, 12, dtype=torch.int64), (3, 4), TypeError, "floating dtype, not torch.int64"),
        (torch.zeros(1, 12, 12), (3.0, 4.0), ValueError, r"size must be \(H, W\) .* not \(3.0, 4.0\)"),
    ],
)
def test_what_is_no_image_is_named(x, size, error, message):
    with pytest.raises(error, match=message):
        layer(stride=2, dtype=torch.float32)(x, size)


def test_a_grid_is_made_of_integers():
    with pytest.raises(ValueError, match=r"grid must have .* not 'a'"):
        layer(grid="a")


def test_no_image_is_an_empty_batch():
    assert layer(stride=2, grid=2, value_kernel=3)(torch.zeros(0, 12, 12, dtype=torch.float64), (3, 4)).shape == (
        0,
        12,
        12,
    )


def points(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("lengthscale", [None, 0.7])
def test_gaussian_attention_is_the_full_product(lengthscale):
    q, v = points(2, 3, 50, 8).requires_grad_(), points(2, 3, 50, 5, seed=1).requires_grad_()
    ell = 8**0.25 if lengthscale is None else lengthscale
    d2 = (q.unsqueeze(-2) - q.unsqueeze(-3)).square().sum(-1)
    expected = torch.exp(-d2 / (2 * ell**2)) @ v
    found = gaussian_attention(q, v, lengthscale=lengthscale)
    g = points(*expected.shape, seed=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 * float(expected.detach().abs().max()))
    for a, b in zip(torch.autograd.grad(found, (q, v), g), torch.autograd.grad(expected, (q, v), g), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(b.abs().max()))


def test_gaussian_attention_far_from_the_origin_and_in_half_precision():
    q, v = points(1, 40, 8), points(1, 40, 5, seed=1)
    expected = gaussian_attention(q, v)
    scale = float(expected.abs().max())
    # Rounding q + 100 to float32 costs eps·100 of a distance; an expansion around the origin would cost eps·100².
    far = gaussian_attention((q + 100.0).float(), v.float())
    assert float((far.double() - expected).abs().max()) < 100 * 1.2e-7 * 10 * scale
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = gaussian_attention(q.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16
    assert float((half.double() - expected).abs().max()) < 8e-3 * 5 * scale


@pytest.mark.parametrize(
    ("shapes", "lengthscale", "message"),
    [
        (((4, 2), (5, 2)), None, r"equal but for the last axis, not \(4, 2\) and \(5, 2\)"),
        (((2,), (2,)), None, r"not \(2,\) and \(2,\)"),
        (((4, 2), (4, 2)), 0.0, "lengthscale must be positive, not 0.0"),
    ],
)
def test_gaussian_attention_refuses(shapes, lengthscale, message):
    with pytest.raises(ValueError, match=message):
        gaussian_attention(points(*shapes[0]), points(*shapes[1]), lengthscale=lengthscale)


def test_gaussian_attention_refuses_what_is_no_tensor_of_floats():
    q = torch.ones(4, 2)
    for a, b, named in ((q.long(), q.long(), "int64"), (q.numpy(), q, "ndarray"), (q, q.double(), "float64")):
        with pytest.raises(TypeError, match=f"tensors of one floating dtype, not .*{named}"):
            gaussian_attention(a, b)
