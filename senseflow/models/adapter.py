"""What the algorithm needs to know of a teacher family, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from senseflow import meta


@dataclass(frozen=True)
class Condition:
    """Encoded prompts. embeds: token embeddings [B, L, D]; pooled: one text vector each, [B, P]."""

    embeds: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.embeds)

    def index(self, idx: Tensor) -> Condition:
        """The prompts at positions idx, int64 [K]."""
        return Condition(self.embeds[idx], self.pooled[idx])

    def cat(self, other: Condition) -> Condition:
        """These prompts, then the other ones."""
        return Condition(torch.cat([self.embeds, other.embeds]), torch.cat([self.pooled, other.pooled]))

    def to(self, device: str | torch.device) -> Condition:
        return Condition(self.embeds.to(device), self.pooled.to(device))


class Adapter(Protocol):
    """One teacher family. sigma is always fp32 [B]; latents x are [B, C, H, W]."""

    schedule: Any  # flow.FlowSchedule or flow.DiffusionSchedule
    latent_shape: tuple[int, ...]
    parameterization: str  # "flow": predicts v = eps - x0; "epsilon": predicts eps
    network: str  # the subfolder of a diffusers pipeline that holds the distilled network
    vae: Any  # a frozen AutoencoderKL, or None: latents are pixels

    def load_network(self, dtype: torch.dtype) -> nn.Module:
        """The teacher, frozen, in dtype."""
        ...

    def student_of(self, teacher: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
        """What student and fake start from: a trainable copy of the teacher, kept in dtype."""
        ...

    def blocks(self, net: nn.Module) -> list[nn.Module]:
        """What is sharded, compiled or checkpointed by itself, in the order of the forward."""
        ...

    def predict(
        self, net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition, guidance: Tensor | None = None
    ) -> Tensor:
        """The network's prediction, same shape and dtype as x. guidance fp32 [B] is for a network that embeds it."""
        ...

    def features(self, net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """Image tokens [B, T, D] of the middle block, for disc.kind fake_features."""
        ...

    def text_shape(self, net: Any) -> tuple[int, int, int]:
        """(tokens, their width, width of the pooled vector) of an encoded prompt, known without an encoder."""
        ...

    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Latents of pixels; noise, of the latents' shape, draws from a VAE's posterior."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, Hp, Wp] in [-1, 1], differentiable."""
        ...

    def uncond(self, batch: int) -> Condition | None:
        """What guidance starts from, `batch` times: the encoded empty prompt, or zeros. None: the teacher embeds its
        guidance."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Condition: ...

    def free_text(self) -> None:
        """Drops the text encoders from memory."""
        ...


def in_dtype(x: Tensor, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast of x's device to a half dtype, in which a network with fp32 weights computes; nothing for fp32."""
    if x.is_meta and dtype != torch.float32:
        return meta.Autocast(dtype)
    if x.is_meta:
        return nullcontext()
    return torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32)


def cast(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """net in fp32, bf16 or fp16, in place. Not by to(dtype), at which diffusers warns."""
    return {torch.float32: net.float, torch.bfloat16: net.bfloat16, torch.float16: net.half}[dtype]()


def middle_output(blocks: Sequence[nn.Module], forward: Callable[[], object]) -> Any:
    """What the middle one of `blocks` returns while `forward` runs."""
    caught: list[Any] = []
    hook = blocks[len(blocks) // 2].register_forward_hook(lambda _m, _i, out: caught.append(out))
    try:
        forward()
    finally:
        hook.remove()
    return caught[0]


def middle_tokens(blocks: Sequence[nn.Module], forward: Callable[[], object], stream: int) -> Tensor:
    """Element `stream` of what the middle one of `blocks` returns while `forward` runs."""
    return middle_output(blocks, forward)[stream]
