"""Adam's moments in 8 bits: floats whose exponent is counted from that of their block, rounded at random.

exp_avg has a sign and 3 bits of mantissa; exp_avg_sq is kept as its root, which is what a step divides by, with 4 bits
and no sign. Each spans 16 powers of two below the exponent of its block (2^-32 of the largest for exp_avg_sq), which is
the smallest that no element of the block rounds up beyond:

    code c > 0 of exponent e means 2^(e - 15 + (c >> M)) (1 + (c mod 2^M) / 2^M), code 0 means 0

No table and no division: a code is the top of an fp32 number's bits, so that a C++ loop vectorises. An exponent that is
a power of two and not the block's largest value itself keeps the codes of a block when another element of it grows.
Rounding to nearest would freeze exp_avg_sq: at beta2 = .999 its root moves by some .05 % a step, half a code is 2 %. At
random the mean is right. A root that is not 0 keeps code 1 where it is smaller: 0 would make a step infinite. A NaN or
an infinity makes the whole block NaN (exponent -128).

Blocks lie within an index of dim 0 of the full parameter, so a shard on dim 0 has whole blocks and its own exponents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MANTISSA = {"m": 3, "v": 4}
BLOCKS = (256, 128, 64)
LEAST = 4096  # elements: smaller parameters stay in fp32, there is nothing to save
NOT_FINITE = -128
HALF = 1 << 15  # as the random bits: to the nearest code


def block_of(shape: Sequence[int]) -> int:
    """Elements of a block for a (full) parameter of this shape: the largest of BLOCKS that divides the elements of one
    index of dim 0; 0 (it stays in fp32) where there is none, with one dimension or under LEAST elements."""
    numel = torch.Size(shape).numel()
    if len(shape) < 2 or numel < LEAST:
        return 0
    return next((block for block in BLOCKS if numel // shape[0] % block == 0), 0)


def encode(value: Tensor, name: str, block: int, bits: Tensor | int) -> tuple[Tensor, Tensor]:
    """(codes uint8 [n], exponents int8 [n / block]) of fp32 [n]; name: m or v, of which the root is taken here.

    bits: int64 [n] in [0, 2^16), that the rounding is done with, or HALF.
    """
    mantissa = MANTISSA[name]
    cut = 23 - mantissa
    value = value.double().sqrt().float() if name == "v" else value  # exact: torch's fp32 root may be an ulp off
    size = value.view(torch.int32) & 0x7FFFFFFF
    largest = size.view(-1, block).amax(1)
    exponent = (((largest.long() + (1 << cut) - 1) >> 23) - 127).clamp(-110, 127)
    exponent = torch.where(largest >= 0x7F800000, NOT_FINITE, exponent)
    base = torch.where(exponent == NOT_FINITE, 0, (exponent + 112) << 23).int().repeat_interleave(block)
    above, first = size - base, 1 << cut
    bits = torch.as_tensor(bits, dtype=torch.int32, device=value.device)
    if name == "v":
        small = value > 0
    else:
        small = bits.float() * (base + first).view(torch.float32) < value.abs() * 65536
    code = ((above + (bits << (cut - 16))) >> cut).clamp(max=(16 << mantissa) - 1)
    code = torch.where(base == 0, 0, torch.where(above < first, small.int(), code))
    if name == "m":
        code = code | (value.view(torch.int32) >> 24 & 0x80)
    return code.to(torch.uint8), exponent.to(torch.int8)


def decode(code: Tensor, exponent: Tensor, name: str) -> Tensor:
    """fp32 [n] of codes uint8 [n] and exponents int8 [n / block]; the square of the root for v."""
    mantissa = MANTISSA[name]
    if not len(code):
        return torch.zeros_like(code, dtype=torch.float32)
    exponent = exponent.int().repeat_interleave(len(code) // len(exponent))
    base = torch.where(exponent == NOT_FINITE, 0, (exponent + 112) << 23)
    size = code.int() & ((16 << mantissa) - 1)
    value = (base + (size << (23 - mantissa))).view(torch.float32)
    value = torch.where(base == 0, torch.nan, torch.where(size == 0, 0.0, value))
    return value * value if name == "v" else torch.where(code >= 128, -value, value)
