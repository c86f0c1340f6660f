"""SOFT, a vision transformer whose first three stages attend without softmax, in linear time.

Lu et al., "SOFT: Softmax-free Transformer with Linear Complexity" (NeurIPS 2021) and, for the normalised
variants, "Softmax-free Linear Transformers" (IJCV 2024). Importing this module registers soft_tiny … soft_huge,
soft_norm_tiny … soft_norm_huge and soft_digits with timm. Three things differ from the published models, each
for a reason given where it is set: the core is inverted to convergence, the landmark grid does not grow with the
image, and drop path drops whole samples.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, to_2tuple, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from lowrank import pinv
from lowrank.nn import SoftmaxFreeAttention

HEAD_DIM = 32

# Arguments of Soft by name. Parameters, counted: 13.07, 38.86, 45.81, 64.70 and 87.11 million. (The papers give 24 M
# for "small"; the authors' code builds 38.86 M.)
CONFIGS = {
    "soft_tiny": {"depths": (1, 2, 3, 2), "widths": (64, 128, 320, 512)},
    "soft_small": {"depths": (1, 3, 20, 4), "widths": (64, 128, 320, 512)},
    "soft_medium": {"depths": (1, 3, 29, 5), "widths": (64, 128, 288, 512)},
    "soft_large": {"depths": (1, 3, 40, 5), "widths": (64, 128, 320, 512)},
    "soft_huge": {"depths": (1, 5, 49, 5), "widths": (64, 128, 352, 512)},
}
CONFIGS |= {name.replace("soft", "soft_norm"): config | {"normalize": True} for name, config in CONFIGS.items()}
# For 32 × 32 single-channel images: 8² tokens, then 4², 2² and 1 + 1; 4², 4² and 2² landmarks.
CONFIGS["soft_digits"] = {
    "depths": (1, 1, 1, 1),
    "widths": (32, 64, 96, 128),
    "strides": (2, 1, 1),
    "value_kernels": (5, 3, 3),
    "stem_width": 16,
    "img_size": 32,
    "in_chans": 1,
    "num_classes": 10,
    "landmark_grid": 4,
}


def published_inverse(a: Tensor, *, hermitian: bool, ridge: float) -> Tensor:
    """The core inverse that the released SOFT weights were trained with: 20 textbook steps, unconverged.

    α = 1.8/(max row sum of A)², per matrix, of A without the ridge. At cond(A) ≈ 5·10³ the result is more than
    half off the inverse, and the weights have adapted to it: a converged inverse moves their logits by 13 %.
    """
    alpha = 1.8 / a.sum(-1).amax(-1).square()
    return pinv.pinv_newton(a, hermitian=hermitian, ridge=ridge, alpha=alpha, steps=20)


def published_norm_inverse(a: Tensor, *, hermitian: bool, ridge: float) -> Tensor:
    """The core inverse of the released normalised weights (to be used with ``ridge=0``), made independent of the batch.

    α = 2/(max row sum of A)², halved at most 10 times while ‖I − αA²‖₁ > 1.01, then 20 textbook steps. The
    published code takes one α for the whole batch, so that a prediction depends on its batch-mates; here every
    matrix has its own.
    """
    eye, square = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device), a @ a
    alpha = 2 / a.sum(-1).amax(-1).square()
    for _ in range(10):
        residual = (eye - alpha[..., None, None] * square).abs().sum(-2).amax(-1)
        alpha = torch.where(residual > 1.01, alpha / 2, alpha)
    return pinv.pinv_newton(a, hermitian=hermitian, ridge=ridge, alpha=alpha, steps=20)


class SoftmaxFreeBlock(nn.Module):
    """Post-norm block of stages 1 to 3: x ← norm1(x + attn(x)), x ← norm2(x + mlp(x))."""

    def __init__(self, dim: int, *, drop_path: float, **attention):
        super().__init__()
        self.attn = SoftmaxFreeAttention(dim, num_heads=dim // HEAD_DIM, **attention)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, act_layer=partial(nn.GELU, approximate="tanh"))
        self.norm2 = nn.LayerNorm(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.norm1(x + self.drop_path(self.attn(x, size)))  # (B, N, C)
        return self.norm2(x + self.drop_path(self.mlp(x)))  # (B, N, C)


class SoftmaxAttention(nn.Module):
    """Ordinary multi-head attention of stage 4, scale d^-½."""

    def __init__(self, dim: int):
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)  # (B, heads, N, d)
            for y in (self.query(x), *self.key_value(x).chunk(2, dim=-1))
        )
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, N, C)


class SoftmaxBlock(nn.Module):
    """Pre-norm block of stage 4. It takes ``size`` like its softmax-free siblings, and has no use for it."""

    def __init__(self, dim: int, *, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SoftmaxAttention(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))  # (B, N, C)
        return x + self.drop_path(self.mlp(self.norm2(x)))  # (B, N, C)


def conv_norm_relu(in_chans: int, out_chans: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_chans, out_chans, 3, stride=stride, padding=1)
    # Tokens are an image with its channels last, and so it need not be turned round.
    conv.weight = nn.Parameter(conv.weight.detach().contiguous(memory_format=torch.channels_last))
    return [conv, nn.BatchNorm2d(out_chans), nn.ReLU(inplace=True)]


class Stage(nn.Module):
    """Convolutions that shrink the image, position embeddings of its tokens, and blocks.

    ``grid`` is the image's size after the convolutions, in tokens, that the embeddings are made for; any other is
    served by bilinear interpolation. With ``class_token`` one more token, with an embedding of its own, comes first.
    """

    def __init__(
        self, patch_embed: list[nn.Module], blocks: list[nn.Module], dim: int, grid: tuple[int, int], class_token: bool
    ):
        super().__init__()
        self.grid = grid
        self.patch_embed = nn.Sequential(*patch_embed)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1] + class_token, dim))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        image = self.patch_embed(image.contiguous(memory_format=torch.channels_last))  # (B, C, H, W)
        size = image.shape[-2], image.shape[-1]
        x = image.flatten(2).transpose(1, 2)  # (B, N, C)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, 1 + N, C)
        x = x + self.positions(size)
        for block in self.blocks:
            x = block(x, size)
        return x, size

    def positions(self, size: tuple[int, int]) -> Tensor:
        """Position embeddings of an H × W image, (1, N, C) or, after the class token's, (1, 1 + N, C)."""
        if size == self.grid:
            return self.pos_embed
        slots = 0 if self.cls_token is None else 1
        image = self.pos_embed[:, slots:].transpose(1, 2).unflatten(2, self.grid)  # (1, C, H₀, W₀)
        image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)  # (1, C, H, W)
        return torch.cat([self.pos_embed[:, :slots], image.flatten(2).transpose(1, 2)], dim=1)


class Soft(nn.Module):
    """SOFT on images (B, in_chans, H, W) of any size; logits (B, num_classes).

    ``depths`` and ``widths`` are the blocks and channels of the four stages; ``strides`` and ``value_kernels`` are
    those of ``SoftmaxFreeAttention`` in the first three. ``img_size`` is the size that position embeddings are made
    for. Drop path rises linearly over all blocks from 0 to ``drop_path_rate``.

    ``landmark_grid`` bounds the landmarks' rows and columns, without which their number would grow with the image
    and the cost with its square; 7 changes nothing at 224 pixels and below. None is the published behaviour (and
    timm.create_model, which drops arguments that are None, cannot pass it on).

    ``inverse=None`` inverts the core, with its ridge, to convergence. That holds for ``normalize=True`` as well,
    where the published models have no ridge: there A alone is singular to working precision, and its pseudoinverse
    has no derivative wherever a singular value crosses the cutoff. To continue from released weights pass
    ``inverse=published_inverse``, or ``inverse=published_norm_inverse, ridge=0.0`` to a normalised model.
    """

    def __init__(
        self,
        *,
        depths: tuple[int, int, int, int],
        widths: tuple[int, int, int, int],
        strides: tuple[int, int, int] = (8, 4, 2),
        value_kernels: tuple[int, int, int] = (9, 5, 3),
        stem_width: int = 32,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        landmark_grid: int | None = 7,
        normalize: bool = False,
        ridge: float = 0.01,
        inverse: Callable[..., Tensor] | None = None,
    ):
        super().__init__()
        if any(width % HEAD_DIM for width in widths):
            raise ValueError(f"widths must be multiples of the head dimension {HEAD_DIM}, not {widths}")
        stem = [
            *conv_norm_relu(in_chans, stem_width, 2),
            *conv_norm_relu(stem_width, stem_width, 1),
            *conv_norm_relu(stem_width, widths[0], 2),
        ]
        embeds = [stem] + [conv_norm_relu(widths[i - 1], widths[i], 2) for i in (1, 2, 3)]
        total = sum(depths)
        rates = iter([drop_path_rate * i / max(total - 1, 1) for i in range(total)])
        common = {"grid": landmark_grid, "normalize": normalize, "ridge": ridge, "inverse": inverse}
        attention = [common | {"stride": r, "value_kernel": k} for r, k in zip(strides, value_kernels, strict=True)]

        self.stages = nn.ModuleList()
        # A convolution of stride 2 rounds up, and the stem has two.
        grid = tuple((n + 1) // 2 for n in to_2tuple(img_size))
        for i, (embed, depth, dim) in enumerate(zip(embeds, depths, widths, strict=True)):
            grid = tuple((n + 1) // 2 for n in grid)
            if i < 3:
                blocks = [SoftmaxFreeBlock(dim, drop_path=next(rates), **attention[i]) for _ in range(depth)]
            else:
                blocks = [SoftmaxBlock(dim, drop_path=next(rates)) for _ in range(depth)]
            self.stages.append(Stage(embed, blocks, dim, grid, class_token=i == 3))
        self.num_features = widths[-1]
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.reset_classifier(num_classes)
        self.apply(self._init_linear)
        for name in self.no_weight_decay():
            trunc_normal_(self.get_parameter(name), std=0.02)

    @staticmethod
    def _init_linear(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> list[str]:
        """Parameters that weight decay must leave alone, besides biases and norms."""
        return [name for name, _ in self.named_parameters() if name.endswith(("pos_embed", "cls_token"))]

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A new, untrained head; with 0 classes the model returns the class token's features."""
        self.num_classes = num_classes
        like = self.norm.weight
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            self._init_linear(self.head)

    def forward_stages(self, image: Tensor) -> list[Tensor]:
        """Tokens (B, N, C) after each stage; after stage 4 (B, 1 + N, C), class token first, not yet normed."""
        outputs = []
        for stage in self.stages:
            x, size = stage(image)  # (B, N, C)
            outputs.append(x)
            if stage is not self.stages[-1]:
                image = x.transpose(1, 2).unflatten(2, size)  # (B, C, H, W)
        return outputs

    def forward_features(self, image: Tensor) -> Tensor:
        return self.norm(self.forward_stages(image)[-1])  # (B, 1 + N, C)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x[:, 0])  # (B, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(image))


def _register(name: str, config: dict) -> None:
    """Let ``timm.create_model(name, **kwargs)`` build ``Soft(**config, **kwargs)``, kwargs taking precedence."""

    def build(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs) -> Soft:
        if pretrained:
            raise ValueError(f"{name} has no weights to download; read a released file with checkpoint.load_official")
        return Soft(**config | kwargs)

    build.__name__ = build.__qualname__ = name
    register_model(build)


for _name, _config in CONFIGS.items():
    _register(_name, _config)
