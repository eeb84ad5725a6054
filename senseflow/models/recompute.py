"""Activation checkpointing: what a forward does not keep, the backward computes again."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from senseflow import meta

# Of a block what takes its time: results of matrix products, convolutions and attention. The rest is norms, gates,
# activations and casts, which cost the backward little to make again and hold most of the bytes.
KEPT = (
    "mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable", "_scaled_mm",
)  # fmt: skip
PARTS_OF_A_DECODER = ("ResnetBlock2D", "Attention", "Upsample2D")


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    namespace, _, name = op._schema.name.partition("::")
    kept = (namespace == "aten" and name in KEPT) or "flash_attn" in name or "fwd" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class _Both(ExitStack):
    """The contexts of a recomputation, entered together."""

    def __init__(self, *contexts: AbstractContextManager[Any]):
        super().__init__()
        self._inner = contexts

    def __enter__(self) -> Any:
        for context in self._inner:
            self.enter_context(context)
        return super().__enter__()


def _contexts(how: str) -> tuple[Any, Any]:
    """(of the forward, of the recomputation), for which shapes stand for what they did in the forward."""
    first, again = create_selective_checkpoint_contexts(_policy) if how == "selective" else (nullcontext(),) * 2
    return first, _Both(again, *modes) if (modes := meta.again()) else again


def run(how: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    """function(*args), its activations kept as `how` says: full keeps its inputs, selective also the results of matrix
    products and attention. None of these networks draws random numbers, so no generator state is kept."""
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=partial(_contexts, how), **kwargs
    )


def checkpoint_blocks(net: Any, how: str) -> None:
    """Sets model.checkpointing on a diffusers network, in place: of each transformer block, or of each layer of a
    U-Net. Weights, state dict and results stay; the gradients too, bit for bit where the arithmetic repeats itself."""
    if how != "none":
        net.enable_gradient_checkpointing(partial(run, how))


def recomputed(modules: Iterable[nn.Module]) -> None:
    """Each of these keeps its inputs alone, in place."""
    for module in modules:
        module.forward = partial(run, "full", module.forward)


def recompute_decoder(vae: Any) -> None:
    """Each layer of an AutoencoderKL's decoder keeps its inputs alone. Layers, not its whole blocks: the last block's
    at 1024 pixels are most of the decoder's. vae None, or one without a decoder: nothing."""
    inner = getattr(vae, "inner", vae)
    if inner is not None:
        recomputed(m for m in inner.decoder.modules() if type(m).__name__ in PARTS_OF_A_DECODER)
