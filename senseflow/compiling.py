"""Regional torch.compile: the blocks that repeat, in place, so names of weights, classes and files stay diffusers'.

Blocks of one class share their code, so what is compiled is a small number of variants: with and without gradients, the
batch and (for guidance) twice the batch, and the few forms that blocks of one network have (SD 3.5's last block, and
its ones with dual attention). Shapes are static: one text length and one side per preset.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from senseflow.config import Config, UserError
from senseflow.data.packages import cache_folder
from senseflow.steps import Parts

# Of one piece of code: networks x gradients x batches x forms of a block, and a margin. Dynamo's own 8 is below that.
VARIANTS = 64
MODES = {"blocks": "default", "max": "max-autotune-no-cudagraphs"}  # graphs are senseflow.graphs' own


def regions(parts: Parts, cfg: Config) -> list[nn.Module]:
    """What is compiled by itself: the transformer blocks of the three networks, the backbone's blocks up to the last
    one read, the VAE's decoder; these two not with disc.checkpointing. DMD2's classifier reads the fake's middle block
    through a hook, which compiled code may leave out: that block is not compiled then."""
    found: list[nn.Module] = []
    for net in (parts.student, parts.fake, parts.teacher):
        blocks = parts.adapter.blocks(net)
        hooked = blocks[len(blocks) // 2] if net is parts.fake and cfg.disc.kind == "fake_features" else None
        found += [block for block in blocks if block is not hooked]
    if cfg.disc.checkpointing:  # whose forwards are wrapped, layer by layer
        return found
    if parts.vfm is not None:
        found += list(parts.vfm.blocks)[: max(cfg.disc.taps) + 1]  # type: ignore[arg-type]
    if parts.adapter.vae is not None:
        vae: Any = parts.adapter.vae
        found.append(getattr(vae, "inner", vae).decoder)
    return found


def compile_parts(parts: Parts, cfg: Config, backend: str = "inductor") -> int:
    """Puts what `regions` names under torch.compile as kernels.compile says, in place; returns how many modules.

    A graph break is an error, not a slower path; so is a shape that keeps changing, after VARIANTS of them. Compiled
    code is kept in SENSEFLOW_CACHE/inductor, so the next run starts with it (TORCHINDUCTOR_CACHE_DIR: elsewhere).
    Raises UserError where it cannot be: with data.buckets, whose every size would be compiled, with
    model.checkpointing selective, which chooses among operators that compiled code does not show, and sharded.
    """
    if cfg.kernels.compile == "off":
        return 0
    if cfg.data.buckets:
        raise UserError(f"kernels.compile = {cfg.kernels.compile!r}: allowed is off with data.buckets = True")
    if cfg.model.checkpointing == "selective":
        how = "off with model.checkpointing = 'selective'"
        raise UserError(f"kernels.compile = {cfg.kernels.compile!r}: allowed is {how}")
    if parts.world.sharded:  # whose hooks gather weights around each block
        raise UserError(f"kernels.compile = {cfg.kernels.compile!r}: allowed is off with dist.mode = 'fsdp'")
    import torch._dynamo

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, VARIANTS)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 16 * VARIANTS)
    options: dict[str, Any] = dict(fullgraph=True, dynamic=False, backend=backend)
    if backend == "inductor":
        options["mode"] = MODES[cfg.kernels.compile]
    some = regions(parts, cfg)
    for module in some:
        module.compile(**options)
    return len(some)


def uncompiled() -> AbstractContextManager[object]:
    """Inside: compiled modules run as they were written. For evaluation, whose batches would be variants of their own,
    and for whatever counts operators."""
    return torch.compiler.set_stance("force_eager")
