"""Depthwise convolution for torch, whose filters get their gradient three columns at a time.

On a CPU oneDNN takes, for each weight, three to ten times as long for the gradient of filters wider than three as of
narrower ones: 16 ms instead of 3.5 in float32, and 47 instead of 5.5 in bfloat16, for 9 × 9 filters of 64 channels and
8 images of 56 × 56. The gradient in columns j to j + 2 is that of filters of three columns whose image is moved by j.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank._array import carries_derivative, gradients_of, is_traced, is_transformed, onednn_dtype

# Columns of filters that oneDNN is quick with.
_COLUMNS = 3
# Multiplications below which three calls take longer than what they save.
_FEWEST = 1 << 22


def depthwise_convolution(image: Tensor, filters: Tensor) -> Tensor:
    """The image (B, C, H, W) filtered channel by channel, with zeros around it; filters (C, 1, h, w), h and w odd."""
    dtype = _slow_dtype(image, filters)
    return _convolved(image, filters) if dtype is None else _ByColumns.apply(image.to(dtype), filters.to(dtype))


def _convolved(image: Tensor, filters: Tensor) -> Tensor:
    return F.conv2d(image, filters, padding=_margins(filters), groups=len(filters))


def _margins(filters: Tensor) -> list[int]:
    return [k // 2 for k in filters.shape[2:]]


def _slow_dtype(image: Tensor, filters: Tensor) -> torch.dtype | None:
    """What oneDNN is to convolve in, if it is, and is to find a gradient that it is slow with."""
    if not carries_derivative(filters) or filters.shape[-1] <= _COLUMNS or image.device.type != "cpu":
        return None
    if image.numel() * math.prod(filters.shape[1:]) < _FEWEST:
        return None
    if is_traced(image, filters) or is_transformed(image, filters):
        return None
    return onednn_dtype(image, filters)


class _ByColumns(torch.autograd.Function):
    """Torch's convolution with a gradient W̄[:, j : j + 3] of the filters for each j = 0, 3, …; G and the image moved by
    j columns are all that it depends on."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, filters: Tensor) -> Tensor:
        ctx.save_for_backward(image, filters)
        return _convolved(image, filters)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        image, filters = ctx.saved_tensors
        if torch.is_grad_enabled() or is_traced(g):
            return gradients_of(_convolved, (image, filters), g, ctx.needs_input_grad)
        image_bar = filters_bar = None
        (rows, columns), (_, margin) = filters.shape[2:], _margins(filters)
        if ctx.needs_input_grad[0]:
            image_bar = _gradient(g, image, filters, [rows // 2, margin], 0)
        if ctx.needs_input_grad[1]:
            wide, width, parts = F.pad(image, (margin, margin)), image.shape[-1] - 1, []
            for j, some in zip(range(0, columns, _COLUMNS), filters.split(_COLUMNS, -1), strict=True):
                moved = wide[..., j : j + width + some.shape[-1]]
                parts.append(_gradient(g, moved, some, [rows // 2, 0], 1))
            filters_bar = torch.cat(parts, -1)
        return image_bar, filters_bar


def _gradient(g: Tensor, image: Tensor, filters: Tensor, padding: list[int], which: int) -> Tensor:
    """Of a depthwise convolution with stride 1, in the image (0) or in the filters (1)."""
    one, wanted = [1, 1], [k == which for k in range(3)]
    return torch.ops.aten.convolution_backward(
        g, image, filters, None, one, padding, one, False, [0, 0], len(filters), wanted
    )[which]
