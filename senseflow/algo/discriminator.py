"""Heads of D(x, c, r) on frozen vision features (SenseFlow), and DMD2's classifier on tokens.

Nothing here depends on how a batch is split: normalisation sees one sample at a time, and the power
iteration of the spectral norm runs when `update_spectral_norm` is called, never in a forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from senseflow.meta import exact

SPECTRAL_EPS = 1e-12
INITIAL_ITERATIONS = 15  # of the power iteration on fresh weights: training starts near norm 1
LEAK = 0.2


def _direction(x: Tensor, old: Tensor) -> Tensor:
    """x / |x|, or `old` where x is zero or NaN, which would stay in a power iteration for good."""
    norm = torch.linalg.vector_norm(x)
    return torch.where(norm > SPECTRAL_EPS, x / norm, old)


def _ring(x: Tensor, dim: int) -> Tensor:
    """x with its last slice before it and its first behind: circular padding by one, in one copy."""
    return torch.cat([x.narrow(dim, x.shape[dim] - 1, 1), x, x.narrow(dim, 0, 1)], dim)


class SpectralConv2d(nn.Conv2d):
    """Circular convolution whose weight, as a matrix [out, in*k*k], is divided by its 2-norm.

    x [B, in, H, W] -> [B, out, ceil(H/stride), ceil(W/stride)]; kernel 1 (stride 1) or 3. The norm is
    estimated as u.W v with buffers u [out] and v [in*k*k], which `power_iteration` moves and which
    are saved.
    """

    u: Tensor
    v: Tensor

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1):
        super().__init__(channels, out, kernel, stride, padding=kernel // 2, padding_mode="circular")
        self.register_buffer("u", F.normalize(torch.randn(out), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(channels * kernel * kernel), dim=0))
        for _ in range(0 if self.weight.is_meta else INITIAL_ITERATIONS):
            self.power_iteration()

    @torch.no_grad()
    def power_iteration(self) -> None:
        """One step: v <- W'u / |W'u|, u <- W v / |W v|, in place."""
        matrix = self.weight.flatten(1)
        with exact(matrix):
            self.v.copy_(_direction(matrix.mT @ self.u, self.v))
            self.u.copy_(_direction(matrix @ self.v, self.u))

    def spectral_norm(self) -> Tensor:
        """The estimate u.W v, a scalar with gradients to the weight."""
        matrix = self.weight.flatten(1)
        with exact(matrix):  # bf16 would lose 1/256 of the norm
            return torch.dot(self.u, matrix @ self.v).clamp_min(SPECTRAL_EPS)

    def forward(self, input: Tensor) -> Tensor:
        if self.kernel_size[0] > 1:
            y = F.conv2d(_ring(_ring(input, -2), -1), self.weight, None, self.stride)
        else:  # a matrix product over channels, which lie together in what a backbone gives
            y = F.linear(input.movedim(1, -1), self.weight.flatten(1)).movedim(-1, 1)
        # The same as a divided weight, but autocast can keep one bf16 copy of the parameter itself.
        assert self.bias is not None
        return torch.addcmul(self.bias[:, None, None], y, 1 / self.spectral_norm())


class LocalNorm(nn.Module):
    """Batch norm with groups of one sample: (x - mean_HW) / sqrt(var_HW + 1e-5), then affine.

    The variance is the biased one. x [B, C, H, W] -> the same. A 1x1 map becomes the bias alone.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # torch.group_norm, not F.group_norm: the latter refuses a single 1x1 map.
        return torch.group_norm(x, len(self.weight), self.weight, self.bias, self.eps)


class Residual(nn.Module):
    """(f(x) + x) / sqrt(2): keeps the variance when both are of one size and independent."""

    def __init__(self, f: nn.Module):
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return (self.f(x) + x) * math.sqrt(0.5)


def _block(channels: int, out: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(SpectralConv2d(channels, out, kernel), LocalNorm(out), nn.LeakyReLU(LEAK))


def _tower(dim: int, width: int, cmap: int, downsample: int) -> nn.Sequential:
    """[B, dim, h, w] -> [B, cmap, h', w']: pointwise block, stride-2 convolutions, pointwise map.

    A residual block stands between each two stride-2 convolutions (three of them: the paper's
    head); a tower with fewer than two has one at its end, so that even without a stride pixels see
    each other.
    """
    layers: list[nn.Module] = [_block(dim, width, 1)]
    for i in range(downsample):
        if i:
            layers.append(Residual(_block(width, width, 3)))
        layers.append(SpectralConv2d(width, width, 3, stride=2))
    if downsample < 2:
        layers.append(Residual(_block(width, width, 3)))
    return nn.Sequential(*layers, SpectralConv2d(width, cmap, 1))


class TextMap(nn.Module):
    """[B, P] -> [B, cmap], equalised learning rate: weight ~ N(0, 1), used times 1/sqrt(P).

    Without a bias: the last convolution of the reference tower adds one to the same sum.
    """

    def __init__(self, text_dim: int, cmap: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cmap, text_dim))

    def forward(self, text: Tensor) -> Tensor:
        return F.linear(text.to(self.weight.dtype), self.weight * self.weight.shape[1] ** -0.5)


class Head(nn.Module):
    """One tap's head: logit map = sum_k cls(f_x)_k (cmap(c)_k + refmap(f_r)_k) / sqrt(cmap)."""

    def __init__(self, dim: int, text_dim: int, cmap: int, width: int, downsample: int):
        super().__init__()
        self.main = _tower(dim, width, cmap, downsample)
        self.refmap = _tower(dim, width, cmap, downsample)
        self.cmap = TextMap(text_dim, cmap)

    def conditioning(self, text: Tensor, feature_r: Tensor) -> Tensor:
        """cmap(c) + refmap(f_r): [B, cmap, h', w']."""
        feature_r = feature_r.to(self.cmap.weight.dtype)
        return self.cmap(text)[:, :, None, None] + self.refmap(feature_r)

    def forward(self, feature_x: Tensor, condition: Tensor) -> Tensor:
        embedded = self.main(feature_x.to(self.cmap.weight.dtype))
        if embedded.shape != condition.shape:
            raise ValueError(f"maps of x {list(embedded.shape)} and condition {list(condition.shape)} differ")
        # Both are fp32 even under autocast: the terms have either sign and cancel in the sum.
        return (embedded * condition).sum(1).flatten(1) * condition.shape[1] ** -0.5


class VFMDiscriminator(nn.Module):
    """Heads of the discriminator D(x, c, r), one per tap of a frozen backbone (SenseFlow).

    dims: channels of each tap. text_dim: P of the text vector. cmap: length of the dot product.
    width: channels inside the heads, None or 0: each tap's own. downsample: stride-2 convolutions,
    3 for 73x73 maps (-> 10x10, 100 logits per head), 0 or 1 for 4x4 maps. Raises ValueError without
    taps or for a size below its least.
    """

    def __init__(
        self,
        dims: Sequence[int],
        text_dim: int,
        cmap: int = 64,
        width: int | None = None,
        downsample: int = 3,
    ):
        super().__init__()
        if not dims or min(*dims, text_dim, cmap, width or 1) < 1 or downsample < 0:
            raise ValueError(
                "VFMDiscriminator needs taps, sizes of at least 1 and downsample >= 0: got "
                f"dims={list(dims)}, {text_dim=}, {cmap=}, {width=}, {downsample=}"
            )
        self.heads = nn.ModuleList(Head(d, text_dim, cmap, width or d, downsample) for d in dims)

    def forward(self, features_x: Sequence[Tensor], text: Tensor, features_r: Sequence[Tensor]) -> list[Tensor]:
        """Logits of x given c and r, [B, h'*w'] per head, in the parameters' dtype (fp32).

        features_x, features_r: taps [B, C, h, w] of the image and of the sample's own real image,
        of equal sizes. text: [B, P]. Any float dtype. Raises ValueError for another number of taps
        or maps of different sizes.
        """
        return self.logits(features_x, self.conditioning(text, features_r))

    def conditioning(self, text: Tensor, features_r: Sequence[Tensor]) -> list[Tensor]:
        """What D knows of c and r, [B, cmap, h', w'] per head: one call serves real and fake."""
        return [
            head.conditioning(text, f)  # pyright: ignore[reportCallIssue]
            for head, f in zip(self.heads, self._checked(features_r), strict=True)
        ]

    def logits(self, features_x: Sequence[Tensor], conditions: Sequence[Tensor]) -> list[Tensor]:
        """Logits as of `forward`, from what `conditioning` returned."""
        taps = self._checked(features_x)
        return [head(f, c) for head, f, c in zip(self.heads, taps, conditions, strict=True)]

    def update_spectral_norm(self) -> None:
        """One power iteration of every convolution: call once per discriminator update.

        Not between a forward and its backward: autograd raises RuntimeError once u and v moved.
        """
        for module in self.modules():
            if isinstance(module, SpectralConv2d):
                module.power_iteration()

    def _checked(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        if len(features) != len(self.heads):
            raise ValueError(f"{len(self.heads)} heads need as many taps, got {len(features)}")
        return features


class FakeFeatureDiscriminator(nn.Module):
    """DMD2's classifier on the fake network's middle block: real or generated, seen through noise.

    Its form, not its sizes. dim: channels of a token. width: channels inside, None: dim.
    downsample: stages, each a stride-2 convolution, GroupNorm and SiLU; what is left of the grid is
    averaged before the last linear map.
    """

    def __init__(self, dim: int, width: int | None = None, downsample: int = 2):
        super().__init__()
        width = width or dim
        # Groups of four channels or more: a norm of one value alone would erase a 1x1 map.
        groups = max(g for g in range(1, 33) if width % g == 0 and (width // g >= 4 or g == 1))
        layers: list[nn.Module] = []
        for i in range(downsample):
            conv = nn.Conv2d(width if i else dim, width, 3, stride=2, padding=1)
            layers += [conv, nn.GroupNorm(groups, width), nn.SiLU()]
        self.stages = nn.Sequential(*layers)
        self.last = nn.Linear(width if downsample else dim, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, 1] of tokens [B, T, D], a square grid by rows. Raises ValueError otherwise."""
        batch, count, dim = tokens.shape
        side = math.isqrt(count)
        if side * side != count:
            raise ValueError(f"{count} tokens make no square grid")
        grid = tokens.to(self.last.weight.dtype).mT.reshape(batch, dim, side, side)
        return self.last(self.stages(grid).mean((2, 3)))

    def update_spectral_norm(self) -> None:
        """Nothing to do, no layer is normalised so; here so that a loop need not ask the kind."""


def softplus_generator(fake: Tensor) -> Tensor:
    """DMD2's non-saturating L_G = mean softplus(-D(fake)), fp32 scalar; fake: logits [B, *]."""
    return F.softplus(-fake.float()).mean()


def softplus_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """L_D = mean softplus(-D(real)) + mean softplus(D(fake)), fp32 scalar; logits [B, *]."""
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()
