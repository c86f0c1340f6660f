"""Means of consecutive points, landmarks of attention (Xiong et al., "Nyströmformer", AAAI 2021, eq. 9), and back."""

from __future__ import annotations

from typing import Any

from lowrank._array import Array, Namespace, split_rows


def segment_means(x: Array, count: int, xp: Namespace) -> Array:
    """Means of ``count`` segments of points (..., n, d), whose lengths differ by one at most, the longer ones first."""
    means = [xp.mean(segments, axis=-2) for segments in _segments(x, count, xp)]
    return means[0] if len(means) == 1 else xp.concat(means, axis=-2)


def add_cotangents(x_bar: Any, means_bar: Any, xp: Namespace) -> None:
    """To cotangents of points, in place, those of their segments' means; of torch tensors, where autograd would make an
    array of the size of x of them, and another of the sum."""
    start = 0
    for segments in _segments(x_bar, means_bar.shape[-2], xp):
        stop = start + segments.shape[-3]
        segments.add_(means_bar[..., start:stop, None, :], alpha=1 / segments.shape[-2])
        start = stop


def _segments(x: Array, count: int, xp: Namespace) -> list[Array]:
    """Those of each length, (..., segments, points, d), of torch tensors views."""
    *batch, n, d = x.shape
    short, longer = n // count, n % count  # and not divmod, which symbols of a traced program have not
    if longer == 0:
        return [xp.reshape(x, (*batch, count, short, d))]
    first, rest = split_rows(x, longer * (short + 1))
    return [xp.reshape(first, (*batch, longer, short + 1, d)), xp.reshape(rest, (*batch, count - longer, short, d))]
