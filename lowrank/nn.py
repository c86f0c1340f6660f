"""Torch modules built on the package's array functions: attention whose cost is linear in the tokens.

``SoftmaxFreeAttention`` is the layer of SOFT (Lu et al., "SOFT: Softmax-free Transformer with Linear
Complexity", NeurIPS 2021, sections 3.1 and 3.2; the depthwise convolution of the values and the symmetric
normalisation are of "Softmax-free Linear Transformers", IJCV 2024). Beyond the papers, its landmarks can be
pooled to a fixed grid: without it their number, and so the cost per token, grows with the resolution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank._array import arithmetic, namespace
from lowrank.attention import _gaussian_block, softmax_free_attention


class SoftmaxFreeAttention(nn.Module):
    """Multi-head softmax-free self-attention over the tokens of an image.

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
    stride : int, optional
        r: landmarks are GELU(LayerNorm(convolution of Q)), the convolution with kernel and stride r, without
        bias and the same for all heads. An H × W image has ⌊H/r⌋ × ⌊W/r⌋ of them.
    grid : int or (int, int), optional
        Largest number of landmark rows and columns. What is finer, the convolution's result or, without
        ``stride``, Q itself, is brought to it by adaptive average pooling. At least one of ``stride`` and ``grid``
        is needed, and the cost is linear in H·W only with a grid.
    value_kernel : int, optional
        k, odd: adds the depthwise k × k convolution of V, without bias, one filter per head.
    ridge, normalize, inverse
        As in :func:`lowrank.softmax_free_attention`.

    Raises
    ------
    ValueError
        If ``num_heads`` does not divide ``dim``, neither ``stride`` nor ``grid`` is given, a size is not
        positive or ``value_kernel`` is even.

    Examples
    --------
    >>> import torch
    >>> from lowrank.nn import SoftmaxFreeAttention
    >>> layer = SoftmaxFreeAttention(64, num_heads=2, stride=4, grid=7, value_kernel=5)
    >>> layer(torch.zeros(1, 32 * 48, 64), (32, 48)).shape
    torch.Size([1, 1536, 64])
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        stride: int | None = None,
        grid: int | tuple[int, int] | None = None,
        value_kernel: int | None = None,
        ridge: float = 0.01,
        normalize: bool = False,
        inverse: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must be a positive divisor of dim, not {num_heads} with dim={dim}")
        if stride is None and grid is None:
            raise ValueError("landmarks need a stride (a convolution), a grid (pooling), or both; neither is given")
        if stride is not None and stride < 1:
            raise ValueError(f"stride must be at least 1, not {stride}")
        rows, columns = (grid, grid) if isinstance(grid, int) else grid or (1, 1)
        if rows < 1 or columns < 1:
            raise ValueError(f"grid must have at least one row and one column, not {grid}")
        if value_kernel is not None and (value_kernel < 1 or value_kernel % 2 == 0):
            raise ValueError(f"value_kernel must be odd and positive, so that it has a centre, not {value_kernel}")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.stride, self.grid = stride, None if grid is None else (rows, columns)
        self.ridge, self.normalize, self.inverse = ridge, normalize, inverse

        self.query = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        if stride is not None:
            self.landmark_conv = nn.Conv2d(self.head_dim, self.head_dim, stride, stride=stride, bias=False)
            self.landmark_norm = nn.LayerNorm(self.head_dim)
        self.value_conv = None
        if value_kernel is not None:
            self.value_conv = nn.Conv2d(
                num_heads, num_heads, value_kernel, padding=value_kernel // 2, groups=num_heads, bias=False
            )

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Attend over tokens x of shape (B, N, dim), the rows of an image of size (H, W), N = H·W; same shape back."""
        q, z = self._queries_and_landmarks(x, size)
        v = self.value(x)  # (B, N, dim)
        out = softmax_free_attention(
            q,
            self._split_heads(v),
            z,
            lengthscale=1.0,
            ridge=self.ridge,
            normalize=self.normalize,
            inverse=self.inverse,
        )  # (B, heads, N, d)
        out = out.transpose(1, 2).flatten(2)  # (B, N, dim)
        if self.value_conv is not None:
            out = out + self._convolved(v, size, self.value_conv.weight)
        return self.proj(out)

    @torch.no_grad()
    def landmark_attention(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """C = k(Q, z), shape (B, heads, N, m): what each token of x pays each landmark, for plots.

        ``x`` and ``size`` are those of :meth:`forward`. Landmarks run along the rows of their grid. Values are in
        [0, 1]; no gradient is recorded.
        """
        q, z = self._queries_and_landmarks(x, size)
        working = torch.promote_types(q.dtype, torch.float32)
        with arithmetic(q):
            return _gaussian_block(q.to(working), z.to(working), namespace(q=q)).to(q.dtype)

    def _queries_and_landmarks(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Scaled queries (B, heads, N, d) and landmarks (B, heads, m, d) of one dtype."""
        self._check_input(x, size)
        # With Q already divided by d^¼ the kernel's lengthscale is 1, and landmarks are made of what is compared.
        q = self._split_heads(self.query(x)) * self.head_dim**-0.25  # (B, heads, N, d)
        batch, heads, _, d = q.shape
        z = q.reshape(batch * heads, *size, d).permute(0, 3, 1, 2)  # (B·heads, d, H, W)
        if self.stride is not None:
            z = self.landmark_conv(z)  # (B·heads, d, H/r, W/r)
        if self.grid is not None:
            # Before the norm, which restores the spread that averaging takes away. Never to a finer grid:
            # repeated landmarks add nothing but a singular core.
            z = F.adaptive_avg_pool2d(z, (min(self.grid[0], z.shape[2]), min(self.grid[1], z.shape[3])))
        z = z.flatten(2).transpose(1, 2)  # (B·heads, m, d)
        if self.stride is not None:
            z = F.gelu(self.landmark_norm(z))
        # Under autocast the norm answers in fp32; C and A must see the same, queries' precision.
        return q, z.reshape(batch, heads, -1, d).to(q.dtype)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, heads, N, d)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _convolved(self, v: Tensor, size: tuple[int, int], weight: Tensor) -> Tensor:
        """Depthwise convolution of v (B, N, dim), one filter of weight (heads, 1, k, k) for a head's channels."""
        image = v.unflatten(1, size).permute(0, 3, 1, 2)  # (B, dim, H, W), channels last in memory
        # Repeating the filters and keeping the channels last is the fastest way by far on a CPU, forward and
        # backward: 7 ms at 64 × 64 × 16², against 23 with the channels first and 71 with them folded into the batch.
        filters = weight.repeat_interleave(self.head_dim, dim=0)  # (dim, 1, k, k)
        image = F.conv2d(image, filters, padding=weight.shape[-1] // 2, groups=self.dim)
        return image.permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, dim)

    def _check_input(self, x: Tensor, size: tuple[int, int]) -> None:
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (B, N, {self.dim}), not {tuple(x.shape)}")
        height, width = size
        if x.shape[1] != height * width:
            raise ValueError(f"x has {x.shape[1]} tokens (shape {tuple(x.shape)}), not the {height} × {width} of size")
        if min(height, width) < (self.stride or 1):
            raise ValueError(
                f"size {height} × {width} has no room for one landmark cell of stride {self.stride}; "
                "enlarge the input or lower the stride"
            )

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, stride={self.stride}, grid={self.grid}, "
            f"ridge={self.ridge}, normalize={self.normalize}"
        )
