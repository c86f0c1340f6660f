"""The attentions that a SOFT model can have: the library's, the cores of the released weights, and SOFT's rivals.

Each is a module ``(x, size) -> x`` on the tokens (B, N, C) of an H × W image, with heads of ``HEAD_DIM`` channels, a
depthwise convolution of the values and a final linear layer. They differ in what they add up:

soft        the Nyström approximation of k(Q, Q) V: ``lowrank.nn.SoftmaxFreeAttention``.
soft_norm   the same, symmetrically normalised.
gaussian    k(Q, Q) V with all tokens. Quadratic.
softmax     softmax(QKᵀ/√d) V. Quadratic.
nystrom     Xiong et al., "Nyströmformer" (AAAI 2021): landmarks are means of queries and of keys, and the core is
            inverted by six steps of their polynomial, started for each matrix by itself.
linformer   Wang et al., "Linformer" (2020): keys and values are mapped to a fixed number of tokens by learned
            weights; for images of another size these are interpolated.
performer   Choromanski et al., "Rethinking Attention with Performers" (ICLR 2021): positive orthogonal random features,
            drawn once.
"""

from __future__ import annotations

import abc
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank import pinv
from lowrank._array import arithmetic, carries_derivative
from lowrank._depthwise import depthwise_convolution
from lowrank.nn import SoftmaxFreeAttention, gaussian_attention

HEAD_DIM = 32
# Keys up to which softmax attention is trained in float32 where tokens are bfloat16, on a CPU.
FEW_KEYS = 512


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


# The core of the released models, by name of the attention.
_PUBLISHED = {
    "soft": {"inverse": published_inverse},
    "soft_norm": {"normalize": True, "ridge": 0.0, "inverse": published_norm_inverse},
}


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(qkᵀ/√d) v, of queries (..., n, d), keys (..., m, d) and values (..., m, e), by torch's operator.

    On a CPU the operator's way back takes longer in bfloat16 than in float32 where keys are few: 10 ms instead of 2 for
    8 images of 16 heads and 50 tokens, and as long for about 700.
    """
    recorded = any(map(carries_derivative, (q, k, v)))
    if recorded and q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[-2] <= FEW_KEYS:
        with arithmetic(q):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v)


class Mixer(nn.Module, abc.ABC):
    """Projections, heads, convolution of the values; what is added up is ``attend`` of those that inherit.

    ``tokens`` is the size (H, W) of the image that the model is made for, and ``grid`` the largest number of landmarks
    along each axis.
    """

    has_keys = True

    def __init__(self, dim: int, *, value_kernel: int, tokens: tuple[int, int], grid: int):
        super().__init__()
        self.dim, self.grid = dim, grid
        self.query, self.value, self.proj = (nn.Linear(dim, dim) for _ in range(3))
        if self.has_keys:
            self.key = nn.Linear(dim, dim)
        heads = dim // HEAD_DIM
        self.value_conv = nn.Conv2d(heads, heads, value_kernel, padding=value_kernel // 2, groups=heads, bias=False)

    @abc.abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, heads, N, d) three times -> (B, heads, N, d)."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        values = self.value(x)  # (B, N, C)
        q = self.query(x)
        k = self.key(x) if self.has_keys else q
        q, k, v = (y.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for y in (q, k, values))  # (B, heads, N, d)
        out = self.attend(q, k, v, size).transpose(1, 2).flatten(2)  # (B, N, C)
        filters = self.value_conv.weight.repeat_interleave(HEAD_DIM, dim=0)  # (C, 1, k, k), one filter per head
        image = values.unflatten(1, size).movedim(-1, 1)  # (B, C, H, W)
        image = depthwise_convolution(image, filters)
        return self.proj(out + image.movedim(1, -1).flatten(1, 2))  # (B, N, C)


class GaussianAttention(Mixer):
    has_keys = False

    def attend(self, q, k, v, size):
        return gaussian_attention(q, v)


class SoftmaxAttention(Mixer):
    def attend(self, q, k, v, size):
        return softmax_attention(q, k, v)


class NystromAttention(Mixer):
    def attend(self, q, k, v, size):
        q = q * HEAD_DIM**-0.5
        q_mean, k_mean = (self.landmarks(y, size) for y in (q, k))  # (B, heads, m, d)
        left = torch.softmax(q @ k_mean.mT, -1)  # (B, heads, N, m)
        core = torch.softmax(q_mean @ k_mean.mT, -1)  # (B, heads, m, m)
        right = torch.softmax(q_mean @ k.mT, -1)  # (B, heads, m, N)
        return left @ (polynomial_inverse(core) @ (right @ v))

    def landmarks(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        """Means of the tokens in at most grid × grid cells: (B, heads, N, d) -> (B, heads, m, d)."""
        image = y.mT.flatten(0, 1).unflatten(2, size)  # (B·heads, d, H, W)
        image = F.adaptive_avg_pool2d(image, [min(self.grid, n) for n in size])
        return image.flatten(2).mT.unflatten(0, y.shape[:2])


def polynomial_inverse(a: Tensor, *, steps: int = 6) -> Tensor:
    """Nyströmformer's inverses (..., m, m): Z ← Z(13I − AZ(15I − AZ(7I − AZ)))/4, from Aᵀ/(‖A‖₁‖A‖_∞) (eq. 11)."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    rows, columns = (a.abs().sum(axis).amax(-1) for axis in (-1, -2))
    z = a.mT / (rows * columns)[..., None, None]
    for _ in range(steps):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


class LinformerAttention(Mixer):
    def __init__(self, dim, *, tokens, grid, **options):
        super().__init__(dim, tokens=tokens, grid=grid, **options)
        # To m tokens, of keys and of values, the same for all heads.
        self.mapping = nn.Parameter(torch.randn(2, grid**2, *tokens) / math.sqrt(math.prod(tokens)))

    def attend(self, q, k, v, size):
        # Sums over more tokens, of weights that are smaller by as much.
        scale = math.prod(self.mapping.shape[2:]) / math.prod(size)
        mapping = scale * F.interpolate(self.mapping, size=size, mode="bilinear", align_corners=False)  # (2, m, H, W)
        for_keys, for_values = mapping.flatten(2)  # (m, N)
        return softmax_attention(q, for_keys @ k, for_values @ v)


class PerformerAttention(Mixer):
    def __init__(self, dim, **options):
        super().__init__(dim, **options)
        count = round(HEAD_DIM * math.log(HEAD_DIM))  # as the authors choose
        blocks = torch.randn(-(-count // HEAD_DIM), HEAD_DIM, HEAD_DIM)
        directions = torch.linalg.qr(blocks).Q.mT.flatten(0, 1)[:count]  # orthonormal in each block
        lengths = torch.randn(count, HEAD_DIM).norm(dim=1, keepdim=True)  # those of Gaussian vectors
        self.register_buffer("directions", directions * lengths)  # (r, d)

    def attend(self, q, k, v, size):
        q, k = (self.features(y * HEAD_DIM**-0.25, over) for y, over in ((q, (-1,)), (k, (-2, -1))))
        total = q @ k.sum(-2).unsqueeze(-1)  # (B, heads, N, 1)
        return q @ (k.mT @ v) / total  # (B, heads, N, d)

    def features(self, y: Tensor, over: tuple[int, ...]) -> Tensor:
        """exp(ωᵀy − ‖y‖²/2) up to a factor that cancels, which keeps the largest of those ``over`` axes at 1."""
        exponents = y @ self.directions.to(y.dtype).T - 0.5 * y.square().sum(-1, keepdim=True)  # (B, heads, N, r)
        # The small constant is the authors': no token is without weight.
        return torch.exp(exponents - exponents.amax(over, keepdim=True).detach()) + 1e-4


MIXERS = {
    "gaussian": GaussianAttention,
    "softmax": SoftmaxAttention,
    "nystrom": NystromAttention,
    "linformer": LinformerAttention,
    "performer": PerformerAttention,
}
ATTENTIONS = ("soft", "soft_norm", *MIXERS)


def build_attention(
    name: str,
    dim: int,
    *,
    stride: int,
    value_kernel: int,
    tokens: tuple[int, int],
    grid: int | None,
    trained: str | None,
) -> nn.Module:
    """Attention over images of ``tokens``, with at most ``grid`` landmarks along each axis where it has landmarks.

    ``stride`` is that of ``SoftmaxFreeAttention``, and ``trained`` that of ``model.Soft``.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"attn must be one of {', '.join(ATTENTIONS)}, not {name!r}")
    if trained not in (None, "official"):
        raise ValueError(f"trained must be None or 'official', not {trained!r}")
    if trained and name not in _PUBLISHED:
        raise ValueError(f"there are no official weights with attn={name!r}, only with {' and '.join(_PUBLISHED)}")
    if name in MIXERS:
        return MIXERS[name](dim, value_kernel=value_kernel, tokens=tokens, grid=grid)
    core = _PUBLISHED[name] if trained else {"normalize": name == "soft_norm"}
    return SoftmaxFreeAttention(
        dim, num_heads=dim // HEAD_DIM, stride=stride, grid=grid, value_kernel=value_kernel, **core
    )


class ClassTokenAttention(nn.Module):
    """Ordinary multi-head attention of stage 4, scale d^-½, among tokens that are no image."""

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
        out = softmax_attention(q, k, v)  # (B, heads, N, d)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, N, C)
