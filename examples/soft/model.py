"""SOFT, a vision transformer whose first three stages attend without softmax, in linear time.

Lu et al., "SOFT: Softmax-free Transformer with Linear Complexity" (NeurIPS 2021) and, for the normalised
variants, "Softmax-free Linear Transformers" (IJCV 2024). Importing this module registers soft_tiny … soft_huge,
soft_norm_tiny … soft_norm_huge and two models for small images with timm. Three things differ from the published
models, each for a reason given where it is set: the core is inverted to convergence, the landmark grid does not grow
with the image, and drop path drops whole samples. ``trained="official"`` takes the first two back.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from attentions import HEAD_DIM, ClassTokenAttention, build_attention
from convolution import CellConv2d
from mlp import TokenMlp, has_hooks
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank._array import is_traced, is_transformed, sum_in_place
from lowrank.nn import SoftmaxFreeAttention

# Arguments of Soft by name. Parameters, counted: 13.07, 38.86, 45.81, 64.70 and 87.11 million. (The papers give 24 M
# for "small"; the authors' code builds 38.86 M.)
CONFIGS = {
    "soft_tiny": {"depths": (1, 2, 3, 2), "widths": (64, 128, 320, 512)},
    "soft_small": {"depths": (1, 3, 20, 4), "widths": (64, 128, 320, 512)},
    "soft_medium": {"depths": (1, 3, 29, 5), "widths": (64, 128, 288, 512)},
    "soft_large": {"depths": (1, 3, 40, 5), "widths": (64, 128, 320, 512)},
    "soft_huge": {"depths": (1, 5, 49, 5), "widths": (64, 128, 352, 512)},
}
CONFIGS |= {name.replace("soft", "soft_norm"): config | {"attn": "soft_norm"} for name, config in CONFIGS.items()}
_SMALL = {"depths": (1, 1, 1, 1), "widths": (32, 64, 96, 128), "value_kernels": (5, 3, 3), "stem_width": 16}
_SMALL |= {"in_chans": 1, "num_classes": 10}
# For 32 × 32 single-channel images: 8² tokens, then 4², 2² and 1 + 1; 4², 4² and 2² landmarks.
CONFIGS["soft_digits"] = _SMALL | {"strides": (2, 1, 1), "img_size": 32, "landmark_grid": 4}
# For 64 × 64 single-channel images: 32² tokens, then 16², 8² and 4² + 1; 7² landmarks each time.
CONFIGS["soft_cluttered"] = _SMALL | {"stem_strides": (2, 1, 1), "strides": (4, 2, 1), "img_size": 64}


def _timm_config(config: dict) -> dict:
    """What timm knows of a model's input, for its transforms."""
    side, chans, classes = (
        config.get(key, usual) for key, usual in (("img_size", 224), ("in_chans", 3), ("num_classes", 1000))
    )
    mean, std = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if chans == 3 else ((0.5,), (0.5,))
    known = {"input_size": (chans, side, side), "num_classes": classes, "mean": mean, "std": std}
    return known | {
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "first_conv": "stages.0.patch_embed.0",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({name: _timm_config(config) for name, config in CONFIGS.items()})


class PostNormBlock(nn.Module):
    """Block of stages 1 to 3: x ← norm1(x + attn(x)), x ← norm2(x + mlp(x)). ``attn`` takes x and the image's size."""

    def __init__(self, attn: nn.Module, dim: int, *, drop_path: float):
        super().__init__()
        self.attn = attn
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = TokenMlp(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        seen = torch.compiler.is_compiling() or any(map(has_hooks, self.modules()))
        known = not seen and type(self.drop_path) is DropPath
        y = self.drop_path(self.attn(x, size))  # (B, N, C)
        # What the library's attention has just made is nobody else's.
        x = self.norm1(sum_in_place(y, x) if known and type(self.attn) is SoftmaxFreeAttention else x + y)
        if known and type(self.mlp) is TokenMlp and not (self.training and self.drop_path.drop_prob):
            return self.norm2(self.mlp.plus_input(x))  # (B, N, C)
        return self.norm2(x + self.drop_path(self.mlp(x)))  # (B, N, C)


class PreNormBlock(nn.Module):
    """Block of stage 4. It takes ``size`` like its post-norm siblings, and has no use for it."""

    def __init__(self, dim: int, *, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ClassTokenAttention(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = TokenMlp(dim, approximate="none")
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))  # (B, N, C)
        return x + self.drop_path(self.mlp(self.norm2(x)))  # (B, N, C)


def conv_norm_relu(in_chans: int, out_chans: int, stride: int) -> list[nn.Module]:
    conv = CellConv2d(in_chans, out_chans, 3, stride=stride, padding=1)
    # Tokens are an image with its channels last, and so it need not be turned round.
    conv.weight = nn.Parameter(conv.weight.detach().contiguous(memory_format=torch.channels_last))
    return [conv, nn.BatchNorm2d(out_chans), nn.ReLU(inplace=True)]


class PatchEmbed(nn.Sequential):
    """Convolutions, norms and activations of images (B, C, H, W), on a CPU a few images at a time where nothing is to
    be differentiated, counted or seen, so that what lies between the layers stays in the cache, and with the norms in
    the filters."""

    PIXELS = 2**17

    def forward(self, image: Tensor) -> Tensor:
        image = image.contiguous(memory_format=torch.channels_last)
        counted = any(layer.training or has_hooks(layer) for layer in self)
        followed = torch.is_grad_enabled() or is_traced(image) or is_transformed(image)
        if followed or image.device.type != "cpu" or counted:
            return super().forward(image)
        layers, parts = self._folded(image), []
        for part in image.split(max(1, self.PIXELS // max(1, math.prod(image.shape[2:])))):
            for layer in layers:
                part = layer(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _folded(self, image: Tensor) -> list[Callable[[Tensor], Tensor]]:
        """The layers, batch norms being part of the convolution before them where its filters are fewer numbers than
        what it makes."""
        layers, pixels = list(self), image[:, 0].numel()
        for i, (conv, norm) in enumerate(itertools.pairwise(self)):
            if type(conv) in (nn.Conv2d, CellConv2d):
                pixels //= math.prod(conv.stride)
                known = type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats
                if known and conv.weight.numel() < pixels * conv.out_channels:
                    statistics = norm.running_mean, norm.running_var, norm.eps
                    folded = nn.utils.fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, norm.weight, norm.bias)
                    layers[i : i + 2] = partial(conv._conv_forward, weight=folded[0], bias=folded[1]), nn.Identity()
        return layers


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
        self.patch_embed = PatchEmbed(*patch_embed)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1] + class_token, dim))
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        image = self.patch_embed(image)  # (B, C, H, W)
        size = image.shape[-2], image.shape[-1]
        x = image.flatten(2).transpose(1, 2)  # (B, N, C)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, 1 + N, C)
        x = x + self.positions(size)
        for block in self.blocks:
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, size, use_reentrant=False) if recompute else block(x, size)
        return x, size

    def positions(self, size: tuple[int, int]) -> Tensor:
        """Position embeddings of an H × W image, (1, N, C) or, after the class token's, (1, 1 + N, C)."""
        # An exported program must not depend on which size it is.
        if not torch.compiler.is_compiling() and size == self.grid:
            return self.pos_embed
        slots = 0 if self.cls_token is None else 1
        image = self.pos_embed[:, slots:].transpose(1, 2).unflatten(2, self.grid)  # (1, C, H₀, W₀)
        image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)  # (1, C, H, W)
        return torch.cat([self.pos_embed[:, :slots], image.flatten(2).transpose(1, 2)], dim=1)


class Soft(nn.Module):
    """SOFT on images (B, in_chans, H, W) of any size; logits (B, num_classes).

    Parameters
    ----------
    depths, widths : four int each
        Blocks and channels of the stages.
    strides, value_kernels : three int each
        Those of ``SoftmaxFreeAttention`` in the first three stages. Other attentions have the same ``value_kernels``.
    stem_width, stem_strides
        Channels of the first two convolutions, and strides of all three.
    img_size : int or (int, int)
        The size that position embeddings are made for.
    drop_rate, drop_path_rate : float
        Dropout before the head; drop path, which rises linearly over all blocks from 0 to this.
    attn : str
        Attention of the first three stages, one of ``attentions.ATTENTIONS``.
    softmax_free_stage4 : bool
        Makes stage 4 like the others, each of its tokens a landmark up to ``landmark_grid``: no class token, and the
        head reads the mean of the tokens.
    landmark_grid : int, optional
        Bounds the landmarks' rows and columns, without which their number would grow with the image and the cost with
        its square. By default 7, which changes nothing at 224 pixels and below; with ``trained="official"``
        no bound.
    trained : {"official"}, optional
        What weights were trained with. By default the core is inverted, with its ridge of 0.01, to convergence. That
        holds for ``attn="soft_norm"`` as well, where the published models have no ridge: there A alone is singular to
        working precision, and its pseudoinverse has no derivative wherever a singular value crosses the cutoff.
        "official" is ``published_inverse`` or, without ridge, ``published_norm_inverse``.
    """

    def __init__(
        self,
        *,
        depths: tuple[int, int, int, int],
        widths: tuple[int, int, int, int],
        strides: tuple[int, int, int] = (8, 4, 2),
        value_kernels: tuple[int, int, int] = (9, 5, 3),
        stem_width: int = 32,
        stem_strides: tuple[int, int, int] = (2, 1, 2),
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn: str = "soft",
        softmax_free_stage4: bool = False,
        landmark_grid: int | None = None,
        trained: str | None = None,
    ):
        super().__init__()
        if any(width % HEAD_DIM for width in widths):
            raise ValueError(f"widths must be multiples of the head dimension {HEAD_DIM}, not {widths}")
        if landmark_grid is None and trained is None:
            landmark_grid = 7
        stem = zip((in_chans, stem_width, stem_width), (stem_width, stem_width, widths[0]), stem_strides, strict=True)
        embeds = [[layer for shape in stem for layer in conv_norm_relu(*shape)]]
        embeds += [conv_norm_relu(widths[i - 1], widths[i], 2) for i in (1, 2, 3)]
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])

        self.stages, self.feature_info = nn.ModuleList(), []
        grid, reduction = to_2tuple(img_size), 1
        for i, (embed, depth, dim) in enumerate(zip(embeds, depths, widths, strict=True)):
            for stride in stem_strides if i == 0 else (2,):
                grid, reduction = tuple(-(-n // stride) for n in grid), reduction * stride  # convolutions round up
            with_class = i == 3 and not softmax_free_stage4
            attention = partial(
                build_attention,
                attn,
                dim,
                trained=trained,
                grid=landmark_grid,
                stride=(*strides, 1)[i],
                value_kernel=(*value_kernels, 3)[i],
                tokens=grid,
            )
            blocks = [
                PreNormBlock(dim, drop_path=rate) if with_class else PostNormBlock(attention(), dim, drop_path=rate)
                for rate in itertools.islice(rates, depth)
            ]
            self.stages.append(Stage(embed, blocks, dim, grid, with_class))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self.num_features = self.head_hidden_size = widths[-1]
        self.global_pool = "avg" if softmax_free_stage4 else "token"
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        self.apply(self._init_linear)
        for name in sorted(self.no_weight_decay()):  # of a set, whose order is not the same in every process
            trunc_normal_(self.get_parameter(name), std=0.02)

    @staticmethod
    def _init_linear(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone, besides biases and norms."""
        return {name for name, _ in self.named_parameters() if name.endswith(("pos_embed", "cls_token"))}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Depth of a parameter, for timm's layer-wise learning rates."""
        fine = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)\.", (0,)), (r"^norm", (99999,))]
        return {"stem": r"^stages\.0\.patch_embed", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what enters each block, and compute the rest again on the way back."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained head; with 0 classes the model returns features, of all tokens with ``global_pool=""``."""
        known = ("", "avg") if self.stages[-1].cls_token is None else ("", "avg", "token")
        if global_pool not in (None, *known):
            raise ValueError(f"global_pool must be one of {known}, not {global_pool!r}")
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        like = self.norm.weight
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            self._init_linear(self.head)

    def forward_stages(self, image: Tensor) -> list[Tensor]:
        """Tokens (B, N, C) after each stage, not normed; a class token, if there is one, comes first, (B, 1 + N, C)."""
        return [x for x, _ in self._stages(image)]

    def _stages(self, image: Tensor, count: int = 4) -> list[tuple[Tensor, tuple[int, int]]]:
        """Tokens after each of the first stages, and the size (H, W) of the image that they are."""
        outputs = []
        for stage in self.stages[:count]:
            x, size = stage(image)  # (B, N, C)
            outputs.append((x, size))
            if stage.cls_token is None:
                image = x.transpose(1, 2).unflatten(2, size)  # (B, C, H, W)
        return outputs

    def forward_features(self, image: Tensor) -> Tensor:
        return self.norm(self.forward_stages(image)[-1])  # (B, N, C), or (B, 1 + N, C)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        slots = 0 if self.stages[-1].cls_token is None else 1
        if self.global_pool:
            x = x[:, slots:].mean(1) if self.global_pool == "avg" else x[:, 0]  # (B, C)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)  # (B, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(image))

    def forward_intermediates(
        self,
        image: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """What ``forward_features`` returns, and maps (B, C, H, W) of the stages asked for, as everywhere in timm.

        ``norm`` applies the final norm to stage 4, the only one it was made for. With ``stop_early`` or
        ``intermediates_only`` no stage runs in vain, and what comes first is not normed.
        """
        if output_fmt != "NCHW":
            raise ValueError(f'output_fmt must be "NCHW", not {output_fmt!r}')
        taken, last = feature_take_indices(len(self.stages), indices)
        outputs = self._stages(image, last + 1 if stop_early or intermediates_only else len(self.stages))
        maps = []
        for i in taken:
            x, size = outputs[i]
            x = self.norm(x) if norm and i == 3 else x
            x = x[:, x.shape[1] - size[0] * size[1] :]  # without the class token
            maps.append(x.transpose(1, 2).unflatten(2, size))  # (B, C, H, W)
        if intermediates_only:
            return maps
        x, _ = outputs[-1]
        return (self.norm(x) if len(outputs) == 4 else x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last that is asked for, and with them, or on demand, norm and head."""
        taken, last = feature_take_indices(len(self.stages), indices)
        pruned = last + 1 < len(self.stages)
        self.stages = self.stages[: last + 1]
        if pruned or prune_norm:
            self.norm = nn.Identity()
        if pruned or prune_head:
            self.num_classes, self.head = 0, nn.Identity()
        return taken


def _register(name: str, config: dict) -> None:
    """Let ``timm.create_model(name, **kwargs)`` build ``Soft(**config, **kwargs)``, kwargs taking precedence."""

    def build(pretrained: bool = False, **kwargs) -> Soft:
        if pretrained:
            raise ValueError(f"{name} has no weights to download; read a released file with checkpoint.load_official")
        features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
        return build_model_with_cfg(Soft, name, False, feature_cfg=features, **config | kwargs)

    build.__name__ = build.__qualname__ = name
    register_model(build)


for _name, _config in CONFIGS.items():
    _register(_name, _config)
