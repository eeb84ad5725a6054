"""A frozen network in 8 bits a weight: float8 (e4m3) and one power of two an output channel, made wider layer by layer.

e4m3 has 3 bits behind the point, so a weight is off by at most 1/16 of itself, whatever its size: a floating format
needs a scale for its range alone. As a power of two it costs no bit, and weight times scale is exact in bf16. The
matrix product is the same as before, so what 8 bits change is the weights and nothing else; they save memory, not time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 448.0  # of e4m3
FP8 = torch.float8_e4m3fn


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [out, in], power of two [out, 1] in weight's dtype) of a weight [out, in]: their product is the weight to
    1/16 of itself, or to 2^-18 of its row's largest. A row of zeros has the scale 1."""
    largest = weight.detach().float().abs().amax(1, keepdim=True)
    scale = torch.exp2(torch.ceil(torch.log2(largest / LARGEST)))
    scale = torch.where(largest > 0, scale, 1.0)
    return (weight.detach().float() / scale).to(FP8), scale.to(weight.dtype)


class Fp8Linear(nn.Linear):
    """A Linear whose weight is kept as `quantised` gives it; frozen. Its arithmetic is that of the dtype it had."""

    scale: Tensor

    @classmethod
    def of(cls, linear: nn.Linear) -> Fp8Linear:
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features, bias=False)
        weight, scale = quantised(linear.weight)
        new.weight = nn.Parameter(weight, requires_grad=False)
        new.register_buffer("scale", scale)
        new.bias = linear.bias
        return new

    def widened(self) -> Tensor:
        """The weight that is meant, [out, in] in the dtype it had: exact."""
        return self.weight.to(self.scale.dtype).mul_(self.scale)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.widened(), self.bias)


def to_fp8(net: Any, blocks: Iterable[nn.Module]) -> int:
    """Replaces every Linear of a frozen network's blocks, in place; returns how many. Norms, embeddings, convolutions
    and what stands outside of the blocks stay as they are: a few percent of the weights, and what errors grow from."""
    inside = {id(m) for block in blocks for m in block.modules() if type(m) is nn.Linear}
    names = [name for name, m in net.named_modules() if id(m) in inside]
    for name in names:
        net.set_submodule(name, Fp8Linear.of(net.get_submodule(name)))
    return len(names)
