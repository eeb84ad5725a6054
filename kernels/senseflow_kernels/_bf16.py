"""fp32 values kept in 16 bits: split exactly into bf16 and int16, or rounded at random to bf16; torch and device forms.

The random bits belong to (seed, step, parameter, element of the full parameter): not to a rank, a shard or a launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from senseflow_kernels._launch import blocks_of, jit, tl

ROUNDS = 7  # of Philox: the fewest that pass BigCrush


# -- torch reference -----------------------------------------------------------------------------------------------


def split_fp32(value: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 as (bf16, int16): the value rounded to bf16, halves away from zero, and what its bits lack.

    Exact, but every NaN becomes the quiet one: CUDA's own, 0x7FFFFFFF, would read -0 in the bf16 half.
    """
    bits = value.masked_fill(value.isnan(), torch.nan).view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_fp32(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 of split_fp32's halves."""
    return ((high.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def random_bits(n: int, start: int, parameter: int, seed: int, step: Tensor) -> Tensor:
    """int64 [n] in [0, 2^16): the bits that elements start ... start + n - 1 of a parameter are rounded with.

    Philox-4x32-7 under the key seed at (element // 8, its high word, parameter, step): eight elements take the
    halves of its four words, low half first.
    """
    low = 0xFFFFFFFF
    group = torch.arange(start // 8, blocks_of(start + n, 8), device=step.device)
    c0, c1, c2, c3 = group & low, group >> 32, torch.full_like(group, parameter & low), (step & low).expand_as(group)
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(ROUNDS):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wrapped to 64 bits, which all are right
        c0, c1, c2, c3 = (b >> 32 & low) ^ c1 ^ k0, b & low, (a >> 32 & low) ^ c3 ^ k1, a & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    words = torch.stack((c0, c1, c2, c3), 1)
    return torch.stack((words & 0xFFFF, words >> 16), 2).flatten()[start % 8 : start % 8 + n]


def round_stochastic(value: Tensor, bits: Tensor) -> Tensor:
    """fp32 -> bf16, up in size with the probability of what is cut off. A finite value stays finite."""
    raw = value.view(torch.int32)
    size = raw & 0x7FFFFFFF
    up = (size + bits.int() >> 16).clamp_max(0x7F7F)
    special = torch.where(value.isinf(), 0x7F80, 0x7FC0)
    return (torch.where(size < 0x7F800000, up, special) | (raw >> 16 & 0x8000)).to(torch.int16).view(torch.bfloat16)


# -- device functions ----------------------------------------------------------------------------------------------


@jit
def load_joined(ptr, low_ptr, mask, SPLIT: tl.constexpr):
    """fp32 from ptr, of any floating type; with SPLIT from both halves, as join_fp32."""
    value = tl.load(ptr, mask)
    if SPLIT:
        bits = (value.to(tl.int16, bitcast=True).to(tl.int32) << 16) + tl.load(low_ptr, mask).to(tl.int32)
        value = bits.to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@jit
def store_split(ptr, low_ptr, value, mask):
    """Both halves of fp32, as split_fp32."""
    bits = tl.where(value == value, value.to(tl.int32, bitcast=True), 0x7FC00000)
    high = (bits + 0x8000) >> 16
    tl.store(low_ptr, (bits - (high << 16)).to(tl.int16), mask)
    tl.store(ptr, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask)


@jit
def noise(first, parameter, seed, step, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    """random_bits of the elements first ... first + BLOCK - 1, int32; first and BLOCK are multiples of 8."""
    counter = (first >> 3) + tl.arange(0, BLOCK // 8)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, parameter.to(tl.uint32), step.to(tl.uint32), ROUNDS)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [..., i, j] is word 2 i + j
    return tl.join(words & 0xFFFF, words >> 16).reshape(BLOCK).to(tl.int32)


@jit
def rounded_at_random(value, bits):
    """fp32 -> bf16, as round_stochastic."""
    raw = value.to(tl.int32, bitcast=True)
    size = raw & 0x7FFFFFFF
    up = tl.minimum((size + bits) >> 16, 0x7F7F)
    special = tl.where(size == 0x7F800000, 0x7F80, 0x7FC0)
    high = tl.where(size < 0x7F800000, up, special) | ((raw >> 16) & 0x8000)
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True)
