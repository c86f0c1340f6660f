"""Torch modules built on the package's array functions: attention whose cost is linear in the tokens.

``SoftmaxFreeAttention`` is the layer of SOFT (Lu et al., "SOFT: Softmax-free Transformer with Linear
Complexity", NeurIPS 2021, sections 3.1 and 3.2; the depthwise convolution of the values and the symmetric
normalisation are of "Softmax-free Linear Transformers", IJCV 2024). Beyond the papers, its landmarks can be
pooled to a fixed grid: without it their number, and so the cost per token, grows with the resolution. It also takes
sequences, batches of images or sequences of several sizes (a mask tells tokens from padding), and tokens that ask
where they are not the tokens asked. ``gaussian_attention`` is what it approximates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank._array import arithmetic, is_integer, is_on_cpu, is_traced, namespace, number, shown, sum_in_place
from lowrank._depthwise import depthwise_convolution
from lowrank._formula import gaussian_block
from lowrank._torch_attention import gaussian_product
from lowrank.attention import _check_options, softmax_free_attention

_CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d}


class SoftmaxFreeAttention(nn.Module):
    """Multi-head softmax-free attention over the tokens of an image or of a sequence.

    Queries, which are the keys as well, are Q = W_q x / d^¼ and values V = W_v x, per head of d = dim/num_heads
    contiguous channels. Landmarks z come from the image of the queries. Each head computes C A⁺ (Cᵀ V) with
    C = exp(−‖Q − z‖²/2), A = exp(−‖z − z‖²/2) by :func:`lowrank.softmax_free_attention`, and a linear layer
    ``proj`` mixes the heads.

    Parameters
    ----------
    dim : int
        Channels of the input and of the output.
    num_heads : int
        Heads; a divisor of ``dim``.
    spatial_dims : int
        2 for images, 1 for sequences: everything said below of H and W then holds for the one length N.
    stride : int, optional
        r: landmarks are GELU(LayerNorm(convolution of Q)), the convolution with kernel and stride r, without
        bias and the same for all heads. An H × W image has ⌊H/r⌋ × ⌊W/r⌋ of them.
    grid : int or tuple of spatial_dims int, optional
        Largest number of landmarks along each axis, an int for all axes alike. What is finer, the convolution's
        result or, without ``stride``, Q itself, is brought to it by adaptive average pooling: landmark i of g is the
        mean of the cells from ⌊iL/g⌋ to ⌈(i + 1)L/g⌉ of L, so that segments share a cell where g does not divide L.
        At least one of ``stride`` and ``grid`` is needed, and the cost is linear in H·W only with a grid.
    value_kernel : int, optional
        k, odd: adds the depthwise convolution of V, of k tokens along each axis, without bias, one filter per head.
    ridge, normalize, method, inverse
        As in :func:`lowrank.softmax_free_attention`.

    Raises
    ------
    TypeError
        If ``dim``, ``num_heads``, ``spatial_dims``, ``stride`` or ``value_kernel`` is not an int, ``normalize`` is
        neither True nor False, or ``inverse`` is not callable.
    ValueError
        If ``num_heads`` does not divide ``dim``, ``spatial_dims`` is neither 1 nor 2, neither ``stride`` nor ``grid``
        is given, a size is not positive, ``grid`` has another number of axes or is not of ints, ``value_kernel`` is
        even, ``ridge`` is negative or not finite, ``method`` is neither "newton" nor "direct", or is "direct" beside
        an ``inverse``.

    Notes
    -----
    *Fewer tokens than the grid.* An axis shorter than its ``grid`` is not pooled. Without a ``stride``, an image
    within the grid along both axes has its tokens for landmarks, and the result is exact up to the ridge:
    K (K + ridge·I)⁻¹ K V with K = k(Q, Q).

    *There is no causal option.* Landmarks are means over tokens of the whole image or sequence, and C A⁺ Cᵀ sends
    what every token gave to every landmark on to every token: the attention matrix is never formed, so there is
    nothing from which the part above the diagonal could be taken away. For the same reason a mask can name tokens,
    but not pairs of them.

    *float16* ends at 65504. Queries and landmarks beyond raise ValueError on a CPU. On a GPU, where looking at a
    value would stall the device, and inside a traced program they make NaN of the outputs of their batch element, and
    of no other (though a token outside all landmark cells, or of ``queries``, may merely count as infinitely far from
    everything). bfloat16 and float32 have the range; distances, core and sums are in float32 at least.

    Examples
    --------
    >>> import torch
    >>> from lowrank.nn import SoftmaxFreeAttention
    >>> layer = SoftmaxFreeAttention(64, num_heads=2, stride=4, grid=7, value_kernel=5)
    >>> layer(torch.zeros(1, 32 * 48, 64), (32, 48)).shape
    torch.Size([1, 1536, 64])

    Two sequences of 100 and 60 tokens in one batch:

    >>> layer = SoftmaxFreeAttention(64, num_heads=2, spatial_dims=1, grid=16)
    >>> mask = torch.arange(100) < torch.tensor([[100], [60]])
    >>> layer(torch.zeros(2, 100, 64), mask=mask).shape
    torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        spatial_dims: int = 2,
        stride: int | None = None,
        grid: int | tuple[int, ...] | None = None,
        value_kernel: int | None = None,
        ridge: float = 0.01,
        normalize: bool = False,
        method: str = "newton",
        inverse: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        optional = {"stride": stride, "value_kernel": value_kernel}
        sizes = {"dim": dim, "num_heads": num_heads, "spatial_dims": spatial_dims, **optional}
        for name, value in sizes.items():
            if not (is_integer(value) or (value is None and name in optional)):
                raise TypeError(f"{name} must be an int, not {shown(value)}")
        if dim < 1 or num_heads < 1 or dim % num_heads:
            heads = shown(num_heads)
            raise ValueError(f"num_heads must be a positive divisor of dim, not {heads} with dim={shown(dim)}")
        if spatial_dims not in _CONVOLUTION:
            raise ValueError(f"spatial_dims must be 1 (sequences) or 2 (images), not {shown(spatial_dims)}")
        if stride is None and grid is None:
            raise ValueError("landmarks need a stride (a convolution), a grid (pooling), or both; neither is given")
        if stride is not None and stride < 1:
            raise ValueError(f"stride must be at least 1, not {shown(stride)}")
        if grid is not None:
            axes = tuple(grid) if isinstance(grid, (tuple, list)) else (grid,) * spatial_dims
            if len(axes) != spatial_dims or not all(is_integer(g) and g > 0 for g in axes):
                raise ValueError(
                    f"grid must have at least one landmark along each of {spatial_dims} axes, not {shown(grid)}; "
                    "give an int, or one for each axis"
                )
        if value_kernel is not None and (value_kernel < 1 or value_kernel % 2 == 0):
            raise ValueError(
                f"value_kernel must be odd and positive, so that it has a centre, not {shown(value_kernel)}"
            )
        _check_options(ridge, normalize, method, inverse)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.spatial_dims, self.stride, self.grid = spatial_dims, stride, None if grid is None else axes
        self.ridge, self.normalize, self.method, self.inverse = ridge, normalize, method, inverse

        self.query = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        convolution = _CONVOLUTION[spatial_dims]
        if stride is not None:
            self.landmark_conv = convolution(self.head_dim, self.head_dim, stride, stride=stride, bias=False)
            self.landmark_norm = nn.LayerNorm(self.head_dim)
        self.value_conv = None
        if value_kernel is not None:
            self.value_conv = convolution(
                num_heads, num_heads, value_kernel, padding=value_kernel // 2, groups=num_heads, bias=False
            )

    def forward(
        self,
        x: Tensor,
        size: int | tuple[int, ...] | None = None,
        *,
        mask: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        """Attend over the tokens of an image or of a sequence.

        Parameters
        ----------
        x : Tensor, shape (B, N, dim)
            Tokens, an image's row by row.
        size : (int, int), or int or (int,)
            (H, W) of the images, N = H·W; the length N of sequences, which may be left out.
        mask : Tensor of bool, shape (B, N), optional
            True where a token takes part. The others, whatever they hold, are as if absent, from landmarks, sums and
            value convolution: an image padded on the right and at the bottom, or a sequence padded at the end, gives
            what it gives alone. A landmark cell of the strided convolution counts if all its tokens do. Pooling to
            the grid ranks the cells among the rows and the columns that have any that counts, L of them, and takes
            the mean of those that count between the edges of min(grid, L) landmarks along the axis.
        queries : Tensor, shape (B, N', dim), optional
            Tokens that ask, where they are not ``x`` (cross attention), projected by the same weights; k(queries, x)
            is approximated by k(queries, z) A⁺ k(z, x) with landmarks from ``x``. That is no Gram matrix, and the
            theory ends here: neither is the approximation below it in the order of semidefinite matrices, nor does
            the Nyström error of k(x, x) bound this one. ``mask`` concerns ``x`` alone.

        Returns
        -------
        Tensor, shape (B, N, dim), or (B, N', dim) with ``queries``
            Exact zeros, without the bias of ``proj``, at masked tokens. An element whose tokens are all masked is
            zero; ``queries`` to it get the bias of ``proj``, as nothing was added up.

        Raises
        ------
        TypeError
            If ``x`` or ``queries`` is no tensor of floating dtype, or not of the layer's dtype outside of autocast, or
            if ``mask`` is none of bool.
        ValueError
            If ``size`` is not of ints, if shapes, ``size`` and devices do not fit, the size has no room for a landmark
            cell, ``queries`` meet a layer with a value convolution (they are no image), or float16 overflows (see the
            class). Also if an element has tokens, but no whole cell of the strided convolution.

        Notes
        -----
        To see whether an element has tokens, but no whole cell, the host waits for the device once; in a traced program
        nobody looks, and the element's attention is zero, as with no landmarks.
        """
        size = self._checked_size(x, size)
        if queries is not None:
            self._check_queries(x, queries)
        if mask is not None:
            self._check_mask(x, mask, queries)
            x = x.masked_fill(~mask.unsqueeze(2), 0)  # NaN in the padding would reach the weights' gradients
        tokens = self._as_multiplied(x)
        q, z, landmark_mask = self._queries_and_landmarks(tokens, size, mask)
        asking = None if queries is None else self._split_heads(self.query(queries))
        self._check_range(x, q, z)
        if queries is not None:
            self._check_range(queries, asking, asking)
        v = self.value(tokens)  # (B, N, dim)
        if mask is not None:
            # All that takes a masked token out of the sums: its query is finite, W_q 0 + b, and so is its row of C.
            v = v.masked_fill(~mask.unsqueeze(2), 0)
        out = softmax_free_attention(
            q,
            self._split_heads(v),
            z,
            ridge=self.ridge,
            normalize=self.normalize,
            landmark_mask=None if landmark_mask is None else landmark_mask.unsqueeze(1),
            queries=asking,
            method=self.method,
            inverse=self.inverse,
        )  # (B, heads, N, d)
        out = out.transpose(1, 2).flatten(2)  # (B, N, dim)
        if self.value_conv is not None:
            out = sum_in_place(self._convolved(v, size, self.value_conv.weight), out)
        out = self.proj(out)
        return out if mask is None or queries is not None else out.masked_fill(~mask.unsqueeze(2), 0)

    def _as_multiplied(self, x: Tensor) -> Tensor:
        """x in the dtype that autocast has both projections take it in, once for the two."""
        kind = x.device.type
        plain = type(self.query) is type(self.value) is nn.Linear and x.dtype != torch.float64
        return x.to(torch.get_autocast_dtype(kind)) if plain and torch.is_autocast_enabled(kind) else x

    @torch.no_grad()
    def landmark_attention(self, x: Tensor, size: int | tuple[int, ...] | None = None) -> Tensor:
        """C = k(Q, z), shape (B, heads, N, m): what each token of x pays each landmark, for plots.

        ``x`` and ``size`` are those of :meth:`forward`. Landmarks run along the rows of their grid. Values are in
        [0, 1]; no gradient is recorded.

        Raises
        ------
        TypeError
            If ``x`` is no tensor of floating dtype, or not of the layer's dtype outside of autocast.
        ValueError
            If ``size`` is not of ints, if shapes and ``size`` do not fit, or the size has no room for a landmark cell.
        """
        q, z, _ = self._queries_and_landmarks(x, self._checked_size(x, size), None)
        working, scale = torch.promote_types(q.dtype, torch.float32), self.head_dim**-0.25
        with arithmetic(q):
            return gaussian_block(q.to(working) * scale, z.to(working) * scale, namespace(q=q)).to(q.dtype)

    def _queries_and_landmarks(
        self, x: Tensor, size: tuple[int, ...], mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries and landmarks, both times d^¼, (B, heads, N, d) and (B, heads, m, d) of one dtype, and which of these
        there are for each element, (B, m), where a mask makes that a question."""
        q = self.query(x)  # (B, N, dim)
        image, stride = q.unflatten(1, size), self.stride or 1
        cells = None if mask is None else self._whole_cells(mask.unflatten(1, size))  # (B, H/r, W/r)
        if self.grid is not None:
            # Before the norm, which restores the spread that averaging takes away, and before the convolution, which
            # is linear and of a grid costs as much for a large image as for a small one. Never to a finer grid:
            # repeated landmarks add nothing but a singular core. (Not min(g, n): in a program compiled for sizes of
            # every kind that is a formula, while the core's schedule needs g, a number.)
            lengths = tuple(n // stride for n in size)
            grid = tuple(g if g <= n else n for g, n in zip(self.grid, lengths, strict=True))
            image, cells = _pooled(image, cells, grid, stride)
        heads, d = self.num_heads, self.head_dim
        if self.stride is None:
            z = image.flatten(1, -2).unflatten(-1, (heads, d))  # (B, m, heads, d)
        else:
            # The division by d^¼ is left to the kernel's lengthscale, but for the norm, whose eps is a length.
            scale = d**-0.25
            z = F.gelu(self.landmark_norm(self._convolved_cells(image) * scale)) / scale
        # Under autocast the norm answers in fp32; C and A must see the same, queries' precision.
        z = z.transpose(1, 2).to(q.dtype).contiguous()  # (B, heads, m, d)
        q = self._split_heads(q)  # (B, heads, N, d)
        return q, z, None if cells is None else cells.flatten(1)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, heads, N, d)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _convolved(self, v: Tensor, size: tuple[int, ...], weight: Tensor) -> Tensor:
        """Depthwise convolution of v (B, N, dim), one filter of weight (heads, 1, k, k) for a head's channels."""
        if self.spatial_dims == 1:
            # As an image of one row: 1.1 ms forward and backward at 4 × 4096 × 64, k = 5, against 12.6 with conv1d.
            size, weight = (1, *size), weight.unsqueeze(2)
        image = v.unflatten(1, size).movedim(-1, 1)  # (B, dim, H, W), channels last in memory
        # Repeating the filters and keeping the channels last is the fastest way by far on a CPU, forward and
        # backward: 7 ms at 64 × 64 × 16², against 23 with the channels first and 71 with them folded into the batch.
        filters = weight.repeat_interleave(self.head_dim, dim=0)  # (dim, 1, k, k)
        image = depthwise_convolution(image, filters)
        return image.movedim(1, -1).flatten(1, 2)  # (B, N, dim)

    def _convolved_cells(self, image: Tensor) -> Tensor:
        """The convolution of the landmarks, of an image (B, H, W, dim): (B, m, heads, d), m = ⌊H/r⌋·⌊W/r⌋.

        Its cells do not overlap: it is a product with what they hold. Heads as so many images of a strided convolution
        take two to three times as long on a CPU.
        """
        dims, r = self.spatial_dims, self.stride
        for axis in range(1, 2 * dims, 2):  # (B, *(L, r), dim); to unfold is the same, but slow on its way back
            cells, rest = divmod(image.shape[axis], r)
            if is_traced(image) or rest:
                image = image.narrow(axis, 0, cells * r)
            image = image.unflatten(axis, (cells, r))
        image = image.unflatten(-1, (self.num_heads, self.head_dim))
        places, within = range(1, 2 * dims, 2), range(2, 2 * dims + 1, 2)
        cells = image.permute(0, *places, 2 * dims + 1, *within, 2 * dims + 2)  # (B, *L, heads, *r, d)
        cells = cells.flatten(dims + 2).flatten(1, dims)
        return F.linear(cells, self.landmark_conv.weight.movedim(1, -1).flatten(1))

    def _whole_cells(self, mask: Tensor) -> Tensor:
        """Which cells of the convolution, or tokens without one, count: mask (B, H, W) -> (B, H/r, W/r)."""
        if self.stride is None:
            return mask
        cells = mask
        for axis in range(1, mask.ndim):
            cells = cells.unfold(axis, self.stride, self.stride).all(-1)
        if not is_traced(mask):
            lost = mask.flatten(1).any(1) & ~cells.flatten(1).any(1)
            if lost.any():
                raise ValueError(
                    f"batch element {int(lost.nonzero()[0])} has tokens under the mask, but not one whole landmark "
                    f"cell of {self.stride} tokens along each axis; enlarge it, mask it entirely or lower the stride"
                )
        return cells

    def _checked_size(self, x: Tensor, size: int | tuple[int, ...] | None) -> tuple[int, ...]:
        """The size as a tuple of spatial_dims, after checking that x is made of it."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a tensor of floating dtype, not {given}; convert it first")
        namespace(x=x)
        # Under autocast, and in layers that others put in the place of this one, dtypes are their matter.
        plain = type(self.query) is nn.Linear and not torch.is_autocast_enabled(x.device.type)
        if plain and x.dtype != self.query.weight.dtype:
            raise TypeError(f"x has dtype {x.dtype} and the layer {self.query.weight.dtype}; convert one of them")
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (B, N, {self.dim}), not {tuple(x.shape)}")
        if size is None and self.spatial_dims == 1:
            size = x.shape[1]
        lengths: tuple[Any, ...] = tuple(size) if isinstance(size, (tuple, list)) else (size,)
        # A size may be a symbol of a traced program, or a tensor of one.
        whole = all(isinstance(k, (int, torch.SymInt)) or _is_integer_or_scalar(k) for k in lengths)
        if len(lengths) != self.spatial_dims or not whole:
            wanted = "N or (N,) of a sequence" if self.spatial_dims == 1 else "(H, W) of an image of N = H·W tokens"
            raise ValueError(f"size must be {wanted}, not {shown(size)}; x has shape {tuple(x.shape)}")
        if x.shape[1] != math.prod(lengths):
            raise ValueError(f"x has {x.shape[1]} tokens (shape {tuple(x.shape)}), not the {_listed(lengths)} of size")
        if min(lengths) < (self.stride or 1):
            raise ValueError(
                f"size {_listed(lengths)} has no room for one landmark cell of stride {self.stride or 1}; "
                "enlarge the input or lower the stride"
            )
        return lengths

    def _check_queries(self, x: Tensor, queries: Tensor) -> None:
        if self.value_conv is not None:
            raise ValueError(
                "queries cannot be combined with value_kernel: the convolution of the values lives on the image of x, "
                "where queries have no place; build the layer with value_kernel=None"
            )
        if not isinstance(queries, Tensor) or not queries.is_floating_point():
            given = queries.dtype if isinstance(queries, Tensor) else type(queries).__name__
            raise TypeError(f"queries must be a tensor of floating dtype, not {given}; convert them first")
        if queries.ndim != 3 or queries.shape[0] != x.shape[0] or queries.shape[2] != self.dim:
            raise ValueError(f"queries must have shape ({x.shape[0]}, N', {self.dim}), not {tuple(queries.shape)}")
        if queries.device != x.device:
            raise ValueError(f"x is on device {x.device} and queries on {queries.device}; move one of them")
        namespace(queries=queries)
        if queries.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x has dtype {x.dtype} and queries {queries.dtype}; convert one of them")

    def _check_mask(self, x: Tensor, mask: Tensor, queries: Tensor | None) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            given = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
            raise TypeError(f"mask must be a tensor of dtype torch.bool, True where a token takes part, not of {given}")
        asking = (x if queries is None else queries).shape[1]
        if mask.shape != x.shape[:2]:
            shape = tuple(mask.shape)
            if shape[-2:] in ((asking, x.shape[1]), (x.shape[1], x.shape[1])):
                raise ValueError(
                    f"mask has shape {shape}, one entry for each pair of tokens: causal and other pairwise masks are "
                    "impossible here, as every landmark is made from, and passes on to, all tokens and the attention "
                    f"matrix is never formed; mask tokens instead, with shape {tuple(x.shape[:2])}"
                )
            raise ValueError(f"mask must have the shape (B, N) = {tuple(x.shape[:2])} of x's tokens, not {shape}")
        if mask.device != x.device:
            raise ValueError(f"x is on device {x.device} and mask on {mask.device}; move one of them")

    @staticmethod
    def _check_range(x: Tensor, q: Tensor, z: Tensor) -> None:
        """That queries q and landmarks z of finite tokens x did not overflow, where looking costs little."""
        if q.dtype != torch.float16 or is_traced(x, q) or not is_on_cpu(q):
            return
        finite_x, finite_q, finite_z = (torch.isfinite(y).flatten(1).all(1) for y in (x, q, z))
        lost = finite_x & ~(finite_q & finite_z)
        if lost.any():
            raise ValueError(
                f"queries or landmarks of batch element {int(lost.nonzero()[0])} overflow float16, which ends at "
                "65504; use bfloat16 or float32, or normalise the tokens"
            )

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, spatial_dims={self.spatial_dims}, "
            f"stride={self.stride}, grid={self.grid}, ridge={self.ridge}, normalize={self.normalize}"
        )


def gaussian_attention(q: Tensor, v: Tensor, /, *, lengthscale: float | None = None) -> Tensor:
    """All of k(q, q) v, k(x, y) = exp(−‖(x − y)/ℓ‖²/2): what softmax-free attention approximates, in quadratic time.

    Torch's softmax attention computes it with one key more, and keeps no n × n block, forward or back.

    Parameters
    ----------
    q : Tensor, shape (..., n, d)
        Queries, which are the keys as well, of floating dtype; half precision is computed in float32.
    v : Tensor, shape (..., n, e)
        Values.
    lengthscale : float, optional
        ℓ, in the units of ``q``; d^¼ by default, which is exp(−‖x − y‖²/(2√d)).

    Returns
    -------
    Tensor, shape (..., n, e)
        Of the dtype and on the device of ``q``. Relative errors are eps·‖(q − q̄)/ℓ‖², q̄ the mean query.

    Raises
    ------
    TypeError
        If ``q`` and ``v`` are not tensors of one floating dtype.
    ValueError
        If ``q`` and ``v`` have fewer than two axes, differ in leading axes or tokens, or are on different devices, or
        ``lengthscale`` is no positive, finite number.

    Examples
    --------
    >>> import torch
    >>> from lowrank.nn import gaussian_attention
    >>> gaussian_attention(torch.zeros(1, 4, 2), torch.ones(1, 4, 3))[0, 0]
    tensor([4., 4., 4.])
    """
    dtypes = [x.dtype if isinstance(x, Tensor) else type(x).__name__ for x in (q, v)]
    if not (isinstance(q, Tensor) and isinstance(v, Tensor) and q.is_floating_point() and q.dtype == v.dtype):
        raise TypeError(f"q and v must be tensors of one floating dtype, not {dtypes[0]} and {dtypes[1]}; convert them")
    if q.ndim < 2 or q.shape[:-1] != v.shape[:-1]:
        shapes = f"{tuple(q.shape)} and {tuple(v.shape)}"
        raise ValueError(
            f"q and v must have shapes (..., n, d), (..., n, e), equal but for the last axis, not {shapes}"
        )
    namespace(q=q, v=v)
    ell = q.shape[-1] ** 0.25 if lengthscale is None else number(lengthscale)
    if not 0 < ell < math.inf:
        raise ValueError(f"lengthscale must be positive, not {shown(lengthscale)}")
    working = torch.promote_types(q.dtype, torch.float32)
    with arithmetic(q):
        x = (q.to(working) - q.to(working).mean(-2, keepdim=True)) / ell
        return gaussian_product(x, x, v.to(working)).to(q.dtype)


def _is_integer_or_scalar(value: Any) -> bool:
    return is_integer(value) or (isinstance(value, Tensor) and value.ndim == 0)


def _listed(size: tuple[int, ...]) -> str:
    return " × ".join(map(str, size))


def _pooled(image: Tensor, cells: Tensor | None, grid: tuple[int, ...], r: int) -> tuple[Tensor, Tensor | None]:
    """Adaptive average pooling to ``grid`` cells of an image (B, *L·r, C) of *L cells, r tokens long along each axis,
    and of what is less than a cell at its ends: to (B, *grid·r, C), each token the mean of those at its place in cells
    that count, all or those of (B, *L); and which of the means exist, (B, *grid), if that is a question. The others are
    zero."""
    lengths = [n // r for n in image.shape[1:-1]]
    if cells is None and not is_traced(image):
        for axis, (n, g) in enumerate(zip(lengths, grid, strict=True), 1):
            if g < n:
                # As an image of one column whose channels are last in memory, as they are.
                column = _by_cells(image.narrow(axis, 0, n * r), axis, r).flatten(0, 1).unsqueeze(2).movedim(-1, 1)
                means = F.adaptive_avg_pool2d(column, (g, 1)).movedim(1, -1)
                image = means.reshape(*image.shape[:axis], g * r, *image.shape[axis + 1 :])
        return image, None
    # In traced programs as well: exporters write pooling down, and compilers a crop, for one size alone.
    counted = image.new_ones((image.shape[0], *lengths), dtype=torch.bool) if cells is None else cells
    working = torch.promote_types(image.dtype, torch.float32)  # in which a sum does not overflow and a count is exact
    sums, counts, here = image.to(working), counted.unsqueeze(-1).to(working), counted.unsqueeze(-1)
    for axis, n in enumerate(lengths, 1):
        sums, here = sums.narrow(axis, 0, n * r), here.repeat_interleave(r, axis)
    sums = torch.where(here, sums, 0)
    with arithmetic(image):
        for axis, g in enumerate(grid, 1):
            across = [other for other in range(1, counted.ndim) if other != axis]
            present = counted.any(across) if across else counted  # (B, L_k)
            segments = _segments(present, g).to(working)  # (B, g, L_k)
            sums, counts = (_added(y, axis, k, segments) for y, k in ((sums, r), (counts, 1)))
    there = counts
    for axis in range(1, counted.ndim):
        there = there.repeat_interleave(r, axis)
    return (sums / there.clamp(min=1)).to(image.dtype), None if cells is None else counts.squeeze(-1) > 0


def _by_cells(image: Tensor, axis: int, r: int) -> Tensor:
    """(B, *before, L·r, *after) -> (B, before, L, r·after)."""
    before, after = math.prod(image.shape[1:axis]), math.prod(image.shape[axis + 1 :])
    return image.reshape(image.shape[0], before, image.shape[axis] // r, r * after)


def _added(image: Tensor, axis: int, r: int, segments: Tensor) -> Tensor:
    """Sums of cells of r along an axis, those of each of (B, g, L)."""
    sums = torch.einsum("bpls,bgl->bpgs", _by_cells(image, axis, r), segments)
    return sums.reshape(*image.shape[:axis], segments.shape[1] * r, *image.shape[axis + 1 :])


def _segments(present: Tensor, count: int) -> Tensor:
    """(B, count, L), True where one of (B, L) that are present lies in a segment: ranked among the present, p of them,
    those from ⌊ip/g⌋ to ⌈(i + 1)p/g⌉ for segment i of g = min(count, p). Segments from g on are empty."""
    rank = present.cumsum(1).unsqueeze(1) - 1  # (B, 1, L)
    p = present.sum(1)[:, None, None]  # (B, 1, 1)
    g = p.clamp(min=1, max=count)
    i = torch.arange(count, device=present.device)[:, None]  # (count, 1)
    first, end = i * p // g, -(-(i + 1) * p // g)
    return present.unsqueeze(1) & (first <= rank) & (rank < end)
