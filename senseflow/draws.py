"""Every random number of a run, from a counter: (seed, iteration, global sample index, stream, element).

A number is a pure function of its counter, so it belongs to a sample and not to a rank, a resumed run continues with
the very same numbers, and splitting a batch changes nothing. The hash is splitmix64's finaliser, applied twice with the
stream key in between; int64 arithmetic wraps, as torch defines it.
"""

from __future__ import annotations

import copy
import math
from zlib import crc32

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX1, MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK = (1 << 64) - 1


def _signed(x: int) -> int:
    x &= MASK
    return x - (1 << 64) if x >= 1 << 63 else x


def _mix_int(x: int) -> int:
    x &= MASK
    x = ((x ^ (x >> 30)) * MIX1) & MASK
    x = ((x ^ (x >> 27)) * MIX2) & MASK
    return x ^ (x >> 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's >> keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(MIX1)
    x = (x ^ _shift(x, 27)) * _signed(MIX2)
    return x ^ _shift(x, 31)


class Draws:
    """The numbers of one run. `samples` are global sample indices, int64 [B]; results live on their device."""

    def __init__(self, seed: int):
        self.seed = seed
        self.clock: Tensor | None = None  # int64, 0-d: read instead of `iteration` on its device, by CUDA graphs

    def _key(self, iteration: int, stream: str) -> int:
        key = _mix_int(self.seed + GOLDEN)
        key = _mix_int(key ^ (iteration * GOLDEN))
        return _mix_int(key + crc32(stream.encode()) * MIX1)

    def _key_on(self, device: torch.device, iteration: int, stream: str) -> int | Tensor:
        """_key for arithmetic on a device: where the clock is, from the clock, so that a replay has new numbers."""
        if self.clock is None or self.clock.device != device:
            return _signed(self._key(iteration, stream))
        key = _mix(self.clock * _signed(GOLDEN) ^ _signed(_mix_int(self.seed + GOLDEN)))
        return _mix(key + _signed(crc32(stream.encode()) * MIX1))

    def _bits(self, iteration: int, samples: Tensor, stream: str, count: int) -> Tensor:
        """Random int64 [B, count]."""
        rows = _mix(samples.long() * _signed(GOLDEN) + self._key_on(samples.device, iteration, stream))
        elements = torch.arange(1, count + 1, device=samples.device) * _signed(GOLDEN)
        return _mix(rows[:, None] + elements)

    def uniform(self, iteration: int, samples: Tensor, stream: str, shape: tuple[int, ...] = ()) -> Tensor:
        """fp32 [B, *shape] in [0, 1), multiples of 2^-24."""
        bits = self._bits(iteration, samples, stream, math.prod(shape))
        return (_shift(bits, 40).float() * 2.0**-24).view(len(samples), *shape)

    def normal(self, iteration: int, samples: Tensor, stream: str, shape: tuple[int, ...] = ()) -> Tensor:
        """fp32 [B, *shape], standard normal by Box-Muller: one 64-bit word gives two numbers."""
        count = math.prod(shape)
        bits = self._bits(iteration, samples, stream, (count + 1) // 2)
        # (0, 1]: no log of zero; 32 bits reach out to 6.7 deviations
        radius = ((_shift(bits, 32) + 1).double() * 2.0**-32).float().clamp_min(2.0**-33)
        radius = (-2 * radius.log()).clamp_min(0).sqrt()
        angle = (bits & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
        return pairs[:, :count].reshape(len(samples), *shape)

    def on_host(self) -> Draws:
        """The same numbers by `iteration` alone, whatever the clock says."""
        found = copy.copy(self)
        found.clock = None
        return found

    def _host(self, iteration: int, stream: str) -> float:
        return (_mix_int(self._key(iteration, stream) + GOLDEN) >> 11) * 2.0**-53

    def coin(self, iteration: int, probability: float) -> bool:
        """The iteration's coin, on the host and equal on all ranks."""
        return self._host(iteration, "coin") < probability

    def integer(self, iteration: int, n: int) -> int:
        """Uniform in 0 ... n - 1, on the host and equal on all ranks: the rollout length."""
        return int(self._host(iteration, "rollout") * n)
