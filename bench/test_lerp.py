"""IDA's lerp over a network's parameters: our modes, the loops of others, torch's foreach, NVIDIA apex."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench import peers
from bench.harness import CUDA, DEVICE, relative_error
from senseflow_kernels import Lerp, join_fp32

LAM = 0.97
BF16, FP32 = torch.bfloat16, torch.float32


class Case(NamedTuple):
    """size: large or small; mode: ours; phi, theta: dtypes; stored, moved: bytes a parameter, in memory and a step."""

    size: str
    mode: str
    phi: torch.dtype
    theta: torch.dtype
    stored: int
    moved: int


# Read phi and theta, write phi; split reads and writes its low half too.
KINDS = [
    ("fp32", FP32, BF16, 6, 10), ("fp32", FP32, FP32, 8, 12), ("nearest", BF16, BF16, 4, 6),
    ("split", BF16, BF16, 6, 10), ("stochastic", BF16, BF16, 4, 6),
]  # fmt: skip
SIZES = {"large": 8_000_000_000, "small": 13_200_000} if CUDA else {"small": 4_000_000}
CASES = [Case(size, *kind) for size in SIZES for kind in KINDS]
OURS = ["ours", "ours, tensors"]
OTHERS = [*peers.LERP_FORMS, "apex", "compile"]
# Nobody else has split or stochastic: the others stand beside fp32 and nearest.
PAIRS = [(c, form) for c in CASES for form in OURS + (OTHERS if c.mode in ("fp32", "nearest") else [])]


def parameters_of(case: Case) -> int:
    """The size asked for, or as many as nine tenths of the free memory hold."""
    n = SIZES[case.size]
    if CUDA:
        gc.collect()  # what a form that ran out of memory left in its traceback
        torch.cuda.empty_cache()
        n = min(n, int(0.9 * torch.cuda.mem_get_info()[0]) // case.stored)
    return n // 4096 * 4096


def pieces(flat: Tensor, width: int) -> list[Tensor]:
    """flat as a transformer's parameters: of each layer six width x width, two width x 4 width, eight of width."""
    sizes, left = [], flat.numel()
    layer = [width * width] * 6 + [4 * width * width] * 2 + [width] * 8
    while left:
        for size in layer:
            sizes.append(min(size, left))
            left -= sizes[-1]
            if not left:
                break
    return list(flat.split(sizes))


class Weights:
    """phi, low and theta of one case as flat tensors, theta 10 % away from phi; and each as a list of tensors."""

    def __init__(self, case: Case):
        n = parameters_of(case)
        self.n, width = n, 2432 if case.size == "large" else 128
        self.phi = torch.empty(n, dtype=case.phi, device=DEVICE)
        self.theta = torch.empty(n, dtype=case.theta, device=DEVICE)
        self.low = torch.zeros(n, dtype=torch.int16, device=DEVICE) if case.mode == "split" else None
        self.phis, self.thetas = pieces(self.phi, width), pieces(self.theta, width)
        self.lows = None if self.low is None else pieces(self.low, width)
        self.name = f"{case.size}: {n:.3g} parameters in {len(self.phis)}, phi {_short(case.phi)}, theta "
        self.name += _short(case.theta)

    def fill(self) -> None:
        """As at the start: the steps of the form before have brought phi to theta."""
        random = torch.Generator(DEVICE).manual_seed(0)
        self.phi.normal_(std=0.02, generator=random)
        self.theta.normal_(std=0.02, generator=random)
        step = 1 << 28  # the copy of a slice, never of everything
        for i in range(0, self.n, step):
            self.theta[i : i + step].mul_(0.1).add_(self.phi[i : i + step].to(self.theta.dtype))
        if self.low is not None:
            self.low.zero_()


def _short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP32: "fp32"}[dtype]


_current: dict[Case, Weights] = {}


def weights_of(case: Case) -> Weights:
    """Filled anew; the last case's go first, for there is room for one alone."""
    if case not in _current:
        _current.clear()
        _current[case] = Weights(case)
    _current[case].fill()
    return _current[case]


def step_of(case: Case, form: str, w: Weights) -> Callable[[], None]:
    """One update. Raises ImportError for a package that is not there."""
    if form == "ours":
        low = None if w.low is None else [w.low]
        plan = Lerp([w.phi], [w.theta], case.mode, low=low)
        return lambda: plan.step(LAM)
    if form == "ours, tensors":
        plan = Lerp(w.phis, w.thetas, case.mode, low=w.lows)
        return lambda: plan.step(LAM)
    if form == "compile":
        torch._dynamo.reset()
        compiled = torch.compile(lambda p, t: p.lerp_(t.to(p.dtype), 1 - LAM), dynamic=False)
        return lambda: compiled(w.phi, w.theta)
    move = peers.apex_axpby() if form == "apex" else peers.LERP_FORMS[form]
    return lambda: move(w.phis, w.thetas, LAM)


def value_error(case: Case, w: Weights, step: Callable[[], None]) -> float:
    """Of one step against fp64, over a slice at the beginning, in the middle and at the end (all is too much)."""
    width = min(1 << 20, w.n // 3)
    slices = [slice(at, at + width) for at in (0, (w.n - width) // 2, w.n - width)]

    def read() -> Tensor:
        parts = [w.phi[s] if w.low is None else join_fp32(w.phi[s], w.low[s]) for s in slices]
        return torch.cat([p.double() for p in parts])

    truth = LAM * read() + (1 - LAM) * torch.cat([w.theta[s].double() for s in slices])
    step()
    return relative_error(read(), truth)


# bf16: half an ulp to nearest, a whole one at random; mul_ then add_ rounds twice.
TOLERANCES = {"fp32": 1e-7, "split": 1e-7, "nearest": 2**-8, "stochastic": 2**-7}


def name_of(value: Case | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value.size}-{value.mode}-{_short(value.phi)}-{_short(value.theta)}"


@pytest.mark.parametrize(("case", "form"), PAIRS, ids=name_of)
def test_lerp(measure, leave_out, case: Case, form: str) -> None:
    op = f"lerp {case.mode}"
    if form == "compile" and not CUDA:
        leave_out(op, case.size, form, "torch.compile is timed on CUDA alone")
    w = weights_of(case)
    try:
        step = step_of(case, form, w)
    except ImportError as why:
        leave_out(op, w.name, form, f"not importable: {why}")
    try:
        error = value_error(case, w, step)
    except torch.OutOfMemoryError:  # a cast of all of theta, at the largest size
        leave_out(op, w.name, form, "out of memory")
    measure(
        op=op, case=w.name, form=form, mode="call", fn=step, bytes=case.moved * w.n,
        kind="ours" if form in OURS else form if form == "compile" else "package" if form == "apex" else "torch",
        error=error, tolerance=TOLERANCES[case.mode], rounds=20 if CUDA else 8,
    )  # fmt: skip
