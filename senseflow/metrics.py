"""Scores of pictures over a frozen feature network: KID, Frechet distance, text alignment.

N, M samples, D features, K distinct captions. The scores are comparable with each other only, never
with published Inception FID: call them KID-Lite0 and FD-Lite0. Print `half_floor` of the real set
beside them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNEL_ROWS = 1024  # rows of the kernel matrix that exist at one time: 1024 x 50k doubles are 0.4 GB


class FeatureNet(Protocol):
    """What a score needs of a network: pixels [B, 3, H, W] in [-1, 1] -> features [B, D]."""

    def features(self, pixels: Tensor) -> Tensor: ...


def kid(x: Tensor, y: Tensor, standardise: bool = False) -> float:
    """Kernel inception distance: unbiased MMD^2 with the kernel (a.b / D + 1)^3, in fp64.

    x: features [N, D] of the pictures judged; y: [M, D] of the reference; N, M >= 2. About 0 for
    two samples of one distribution, and it may be slightly negative. All pairs are used: no random
    subsets, so no seed. standardise: first subtract the mean and divide by the deviation of y, per
    feature. Raises ValueError for other shapes.
    """
    x, y = _pair(x, y)
    if standardise:
        mean, std = standard_scale(y)
        x, y = (x - mean) / std, (y - mean) / std
    n, m = len(x), len(y)
    within_x = (_kernel_sum(x, x) - _kernel_diagonal(x)) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - _kernel_diagonal(y)) / (m * (m - 1))
    return float(within_x + within_y - 2 * _kernel_sum(x, y) / (n * m))


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to x [N, D] and y [M, D] (N, M >= 2), in fp64.

    |mx - my|^2 + tr(Sx) + tr(Sy) - 2 tr((Sx Sy)^(1/2)). The eigenvalues of (Sx Sy)^(1/2) are the
    singular values of A B^T for any Sx = A^T A, Sy = B^T B; taking A and B from the centred data
    keeps singular covariances (N < D) exact, where a matrix square root loses half the digits.
    Biased upwards for few samples. Raises ValueError for other shapes.
    """
    x, y = _pair(x, y)
    a = (x - x.mean(0)) / math.sqrt(len(x) - 1)
    b = (y - y.mean(0)) / math.sqrt(len(y) - 1)
    traces = a.square().sum() + b.square().sum()
    if len(a) > a.shape[1]:
        a = torch.linalg.qr(a, mode="r").R  # the same A^T A, but D x D
    if len(b) > b.shape[1]:
        b = torch.linalg.qr(b, mode="r").R
    cross = torch.linalg.svdvals(a @ b.T).sum()
    distance = (x.mean(0) - y.mean(0)).square().sum() + traces - 2 * cross
    return max(float(distance), 0.0)


def half_floor(features: Tensor, seed: int = 0) -> tuple[float, float]:
    """(KID, FD) of one random half of real features [N, D] against the other: the scores' floor."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    order = order.to(features.device)
    half = len(features) // 2
    x, y = features[order[:half]], features[order[half : 2 * half]]
    return kid(x, y), frechet_distance(x, y)


def patches(images: Tensor, size: int, n: int) -> Tensor:
    """n square crops per image on an even grid from border to border (n = 1: the centre).

    images: [N, C, H, W], any dtype; n: 1, 4, 9, 16, ... Returns [N*n, C, size, size], the n crops
    of one image side by side, row by row. Raises ValueError for another n, or a size larger than
    the image.
    """
    h, w = images.shape[-2:]
    side = math.isqrt(n)
    if n < 1 or side * side != n:
        raise ValueError(f"n must be a square number (1, 4, 9, ...), got {n}")
    if not 1 <= size <= min(h, w):
        raise ValueError(f"size must be 1 to {min(h, w)}, got {size}")

    def starts(free: int) -> list[int]:
        return [free // 2] if side == 1 else [round(free * i / (side - 1)) for i in range(side)]

    crops = [images[..., top : top + size, left : left + size] for top in starts(h - size) for left in starts(w - size)]
    return torch.stack(crops, 1).flatten(0, 1)


def standard_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [D] of features [N, D]; a constant feature gets a safe deviation."""
    std, mean = torch.std_mean(x, 0, correction=0)
    floor = (1e-3 * std.mean()).clamp_min(torch.finfo(x.dtype).tiny)
    return mean, torch.maximum(std, floor)


class ScoreNet(nn.Module):
    """Features of a frozen network, standardised by the mean and deviation [D] of a reference set.

    dither: deviation of the Gaussian noise that is added to the pixels first, in levels of 255; 0: none. A network
    trained on photographs tells a flat background of 254 from one of 255 better than it tells shapes: where pictures
    have such backgrounds, an undithered distance is about a fraction of a level that nobody sees.
    """

    mean: Tensor
    std: Tensor
    dither: Tensor

    def __init__(self, net: FeatureNet, mean: Tensor, std: Tensor, dither: float = 0.0) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())
        self.register_buffer("dither", torch.tensor(float(dither)))

    @classmethod
    def fit(cls, net: FeatureNet, pixels: Tensor, batch: int = 64, dither: float = 0.0, seed: int = 0) -> ScoreNet:
        """Measures mean and deviation over pixels [N, 3, H, W] in [-1, 1], dithered as by `forward` with this seed."""
        return cls(net, *standard_scale(extract(net, dithered(pixels, dither, seed), batch)), dither)

    def forward(self, pixels: Tensor, batch: int = 64, seed: int = 0) -> Tensor:
        """Pixels [N, 3, H, W] in [-1, 1] -> standardised features fp32 [N, D], without gradient.

        seed: of the dither; two sets that are compared need two.
        """
        return (extract(self.net, dithered(pixels, float(self.dither), seed), batch) - self.mean) / self.std

    def save(self, path: str | Path) -> None:
        """Mean, deviation and dither as safetensors; the network itself stays in its package."""
        _save(path, {"mean": self.mean, "std": self.std, "dither": self.dither})

    @classmethod
    def load(cls, path: str | Path, net: FeatureNet) -> ScoreNet:
        """Reads what `save` wrote. Raises UserError for a missing, cut off or other file."""
        state = _load(path, ("mean", "std", "dither"))
        return cls(net, state["mean"], state["std"], float(state["dither"]))


def dithered(pixels: Tensor, levels: float, seed: int) -> Tensor:
    """pixels [N, 3, H, W] in [-1, 1] and normal noise of `levels` of 255; the same seed gives the same noise."""
    if levels == 0:
        return pixels
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    return pixels + (levels / 127.5) * noise.to(pixels)


@torch.no_grad()
def extract(net: FeatureNet, pixels: Tensor, batch: int = 64) -> Tensor:
    """Pixels [N, 3, H, W] in [-1, 1] -> features fp32 [N, D], `batch` pictures at a time."""
    return torch.cat([net.features(part).float() for part in pixels.split(batch)])


class AlignmentModel(nn.Module):
    """Small dual encoder: image features [N, Di] and text vectors [K, Dt] into one space."""

    def __init__(self, image_dim: int, text_dim: int, dim: int = 256, hidden: int = 512) -> None:
        super().__init__()
        self.image_head = _head(image_dim, hidden, dim)
        self.text_head = _head(text_dim, hidden, dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def images(self, features: Tensor) -> Tensor:
        """[N, Di] -> unit vectors [N, dim]."""
        return F.normalize(self.image_head(features), dim=-1)

    def texts(self, features: Tensor) -> Tensor:
        """[K, Dt] -> unit vectors [K, dim]."""
        return F.normalize(self.text_head(features), dim=-1)

    def save(self, path: str | Path) -> None:
        """All weights as safetensors; shapes tell the sizes."""
        _save(path, self.state_dict())

    @classmethod
    def load(cls, path: str | Path) -> AlignmentModel:
        """Reads what `save` wrote. Raises UserError for a missing, cut off or other file."""
        names = ("image_head.1.weight", "text_head.1.weight", "image_head.3.weight", "log_scale")
        state = _load(path, names)
        hidden, image_dim = state[names[0]].shape
        model = cls(image_dim, state[names[1]].shape[1], state[names[2]].shape[0], hidden)
        try:
            model.load_state_dict(dict(state))
        except RuntimeError as error:
            raise _user_error(f"{path} is no alignment model: {error}".replace("\n", " ")) from error
        return model.eval()


def train_alignment(
    image_feats: Tensor,
    text_feats: Tensor,
    seed: int,
    steps: int,
    labels: Tensor | None = None,
    batch: int = 256,
    lr: float = 1e-3,
) -> AlignmentModel:
    """Trains an AlignmentModel with symmetric InfoNCE on real pictures only; same seed, same model.

    image_feats: [N, Di]; text_feats: [K, Dt]; labels: int64 [N], the row of text_feats that
    describes each image (default: row i for image i). Images of one caption in a batch are no
    negatives of each other. Raises ValueError when labels do not fit. The global random state is
    left as it was.
    """
    labels = _labels(image_feats, text_feats, labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AlignmentModel(image_feats.shape[1], text_feats.shape[1]).to(image_feats.device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        rows = torch.randperm(len(labels), generator=generator)[:batch].to(labels.device)
        own = labels[rows]
        scale = model.log_scale.exp().clamp(max=100.0)
        logits = scale * model.images(image_feats[rows]) @ model.texts(text_feats[own]).T
        loss = info_nce(logits, own)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def info_nce(logits: Tensor, own: Tensor) -> Tensor:
    """Symmetric InfoNCE: logits [b, b] of image i and the text of image j; own: caption ids [b].

    Images of one caption share the target evenly, so they are no negatives of each other.
    """
    target = (own[:, None] == own[None, :]).to(logits.dtype)
    target = target / target.sum(1, keepdim=True)  # symmetric, so it serves both directions
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def recall_at_1(image_feats: Tensor, text_feats: Tensor, labels: Tensor | None = None) -> float:
    """Share of images whose most similar text is their own caption.

    image_feats: [N, dim] and text_feats: [K, dim] of one space (cosine is taken here); labels:
    int64 [N], default row i for image i. The texts must be distinct captions. Raises ValueError
    when labels do not fit.
    """
    labels = _labels(image_feats, text_feats, labels)
    similarity = F.normalize(image_feats.float(), dim=1) @ F.normalize(text_feats.float(), dim=1).T
    return float((similarity.argmax(1) == labels).float().mean())


def mean_cosine(image_feats: Tensor, text_feats: Tensor, labels: Tensor | None = None) -> float:
    """Mean cosine of each image with its own caption; arguments as for recall_at_1."""
    labels = _labels(image_feats, text_feats, labels)
    own = text_feats.float()[labels]
    return float(F.cosine_similarity(image_feats.float(), own, dim=1).mean())


def _head(width: int, hidden: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, dim))


def _labels(image_feats: Tensor, text_feats: Tensor, labels: Tensor | None) -> Tensor:
    """Caption row of each image, checked."""
    n, k = len(image_feats), len(text_feats)
    if labels is None:
        if n != k:
            raise ValueError(f"without labels, images and texts must pair up: got {n} and {k}")
        return torch.arange(n, device=image_feats.device)
    if labels.shape != (n,) or (n and not 0 <= int(labels.min()) <= int(labels.max()) < k):
        raise ValueError(f"labels must be {n} rows of the {k} texts, got shape {tuple(labels.shape)}")
    return labels.to(image_feats.device)


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two feature sets in fp64, shapes checked."""
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"features must be [N, D] and [M, D] with N, M >= 2, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return x.detach().double(), y.detach().double()


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """Sum of (a.b / D + 1)^3 over all pairs."""
    parts = [((rows @ y.T) / y.shape[1] + 1).pow(3).sum() for rows in x.split(KERNEL_ROWS)]
    return torch.stack(parts).sum()


def _kernel_diagonal(x: Tensor) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1).pow(3).sum()


def _save(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes beside the target and renames, so that a crash leaves no half file."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial)
    os.replace(partial, path)


def _load(path: str | Path, names: tuple[str, ...]) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _user_error(f"{path} cannot be read as safetensors: {error}") from error
    if missing := [n for n in names if n not in state]:
        raise _user_error(f"{path} has no tensor {missing[0]!r}: it was written by something else")
    return state


def _user_error(message: str) -> ValueError:
    from senseflow.config import UserError

    return UserError(message)
