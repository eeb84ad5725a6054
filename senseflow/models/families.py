"""The teacher families by name. Adding one: a file with its Adapter, a row here and a preset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import senseflow_kernels
from senseflow.config import Config, Kernels, Model, UserError
from senseflow.models.embedded import SIDE, EmbeddedAdapter, load_vae, teacher_folder
from senseflow.models.fp8 import to_fp8
from senseflow.models.lora import lora_pair
from senseflow.models.recompute import checkpoint_blocks
from senseflow.models.vae import decode_in
from senseflow_kernels import fuse_mmdit

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _embedded(model: Model, source: str, device: torch.device) -> Any:
    if model.side != SIDE:
        raise UserError(f"model.side = {model.side}: allowed is {SIDE} with model.family = 'embedded'")
    folder = teacher_folder(source)
    return EmbeddedAdapter(model.shift, model.shift_kind, str(device), load_vae(folder, device), folder)


def _sd3(model: Model, source: str, device: torch.device) -> Any:
    from senseflow.models.sd3 import SD3Adapter

    return SD3Adapter(source, model.side, model.shift, model.text_length or 256, compute(model, device), device)


def _flux(model: Model, source: str, device: torch.device) -> Any:
    from senseflow.models.flux import FluxAdapter

    return FluxAdapter(source, model.side, model.shift, model.text_length or 512, compute(model, device), device)


def _sdxl(model: Model, source: str, device: torch.device) -> Any:
    from senseflow.models.sdxl import SDXLAdapter

    return SDXLAdapter(source, model.side, compute(model, device), device)


def _flux2(model: Model, source: str, device: torch.device) -> Any:
    from senseflow.models.flux2 import Flux2Adapter

    return Flux2Adapter(source, model.side, model.shift, model.text_length or 512, compute(model, device), device)


FAMILIES: dict[str, Callable[[Model, str, torch.device], Any]] = {
    "embedded": _embedded, "sd35": _sd3, "flux": _flux, "sdxl": _sdxl, "flux2": _flux2,
}  # fmt: skip
FUSED = ("embedded", "sd35", "flux")  # whose networks are MMDiTs that `fuse_mmdit` knows; SDXL's is a U-Net


def compute(model: Model, device: torch.device) -> torch.dtype:
    """The dtype of frozen networks and of the arithmetic inside the trained ones."""
    del device
    return DTYPES[model.dtype]


def make_adapter(model: Model, device: torch.device, source: str | Path = "") -> Any:
    """The adapter of a family, its VAE loaded, from `source` or else model.teacher.

    Raises UserError when no teacher is named, or a file is missing or does not load.
    """
    where = str(source) or model.teacher
    if not where and model.family != "embedded":
        raise UserError(
            f"model.teacher = '': family {model.family!r} needs a diffusers folder or a hub id: --teacher PATH"
        )
    adapter = FAMILIES[model.family](model, where, device)
    decode_in(adapter.vae, DTYPES[model.decode])
    return adapter


def make_networks(
    cfg: Config, adapter: Any, device: torch.device, place: Callable[[nn.Module], None] = lambda net: None
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(teacher, student, fake) of a run, on the adapter's device, their blocks fused and checkpointed as the config
    says. On the device "meta" without any weights. place: puts a full student or fake where it shall be, one after the
    other, so that no rank holds both whole. Raises UserError as its parts do."""
    teacher = adapter.load_network(DTYPES[cfg.model.dtype])
    storage = DTYPES["fp32" if cfg.train.precision == "fp32" else "bf16"]
    pair = []
    if cfg.model.variant == "lora":
        pair += lora_pair(adapter, teacher, cfg.lora, cfg.seed)
    for i in range(2):
        if cfg.model.variant == "full":
            pair.append(adapter.student_of(teacher, storage))
        fuse_networks(cfg.kernels, cfg.model.family, device, pair[i])
        checkpoint_blocks(pair[i], cfg.model.checkpointing)
        if cfg.model.variant == "full":
            place(pair[i])
    fuse_networks(cfg.kernels, cfg.model.family, device, teacher)
    if cfg.model.teacher_dtype == "fp8":
        to_fp8(teacher, adapter.blocks(teacher))
    student, fake = pair
    return teacher, student, fake


def fuse_networks(kernels: Kernels, family: str, device: torch.device, *networks: nn.Module) -> bool:
    """Puts the networks' blocks on the fused operations, in place, as `kernels` says; returns whether it did.

    Weights, state dict, class and config stay diffusers' own, so saving, copying and resuming do not notice.
    Raises UserError for kernels.attention where nothing heeds it, and for a diffusers that `fuse_mmdit` does not know.
    """
    # In torch's own operators the fused form is fewer of them: for what trains on a CPU. The others are tests there.
    # Shapes are a CPU's, unless `planned` makes them a GPU's: a plan holds the blocks that the run will have.
    helps = senseflow_kernels.is_available(device) or (family == "embedded" and device.type in ("cpu", "meta"))
    wanted = kernels.fuse == "true" or (kernels.fuse == "auto" and helps)
    if family not in FUSED or not wanted:
        if kernels.attention != "auto":
            why = f"kernels.fuse = {kernels.fuse!r} on {device.type}" if family in FUSED else f"family {family!r}"
            raise UserError(
                f"kernels.attention = {kernels.attention!r}: fused blocks alone heed it, and {why} has none; "
                "allowed is auto"
            )
        return False
    try:
        for net in networks:
            fuse_mmdit(net, attention=None if kernels.attention == "auto" else kernels.attention)
    except ValueError as error:
        raise UserError(f"{error}; --kernels.fuse false runs it unfused") from None
    return True
