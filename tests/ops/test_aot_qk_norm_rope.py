"""joint_qkv's kernels compiled for sm_80 and sm_90 at FLUX's and SD3.5 Large's sizes: what a GPU would run."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from senseflow_kernels import _qk_norm_rope as op
from senseflow_kernels.testing import Case, compile_apart

NONE = "constexpr"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def wide(kernel: str, signature: dict) -> list:
    """Everything a launch sees divisible by 16: pointers and strides, not the numbers of tokens or programs."""
    names, found = list(getattr(op, kernel).arg_names), []
    for name, kind in signature.items():
        if isinstance(kind, tuple) and name not in ("counts", "rows"):
            found += [(names.index(name), i) for i, k in enumerate(kind) if k != NONE]
        elif kind[0] == "*":
            found.append(name)
    return found


def case(kernel, signature, heads, head_dim, streams, parts, arch, dtype, rope, **constexprs) -> Case:
    if rope:
        signature |= dict(cos_ptr="*fp32", sin_ptr="*fp32")
    shape = op.blocks(heads, head_dim) | dict(EMULATE=False)
    warps = shape.pop("num_warps")
    most = op.registers(warps, DTYPES[dtype]) if kernel == "_backward_kernel" else None
    constexprs |= dict(STREAMS=streams, PARTS=parts, **shape)
    return Case(f"{op.__name__}:{kernel}", signature, constexprs, wide(kernel, signature), arch, warps, most)


def forward(arch, dtype, heads, head_dim, streams=2, rope=False) -> Case:
    parts, x = min(streams + 1, 3), f"*{dtype}"
    signature = dict(
        xs=(x,) * parts * streams, strides=("i64",) * 2 * parts * streams,
        weights=(x, x, NONE)[:parts] * streams, outs=(x,) * parts, counts=("i32",) * streams, total="i32", eps="fp32",
    )  # fmt: skip
    return case("_forward_kernel", signature, heads, head_dim, streams, parts, arch, dtype, rope)


def backward(arch, dtype, heads, head_dim, streams=2, rope=False, frozen=False) -> Case:
    """frozen: weights without gradients, one token a program (a constant then, as a launch makes of every 1)."""
    parts, x = min(streams + 1, 3), f"*{dtype}"
    partial = NONE if frozen else "*fp32"
    signature = dict(
        grads=(x,) * parts, grad_strides=("i64",) * 3 * parts, xs=(x, x, NONE)[:parts] * streams,
        strides=("i64",) * 2 * parts * streams, weights=(x, x, NONE)[:parts] * streams, outs=(x,) * streams,
        partials=(partial, partial, NONE)[:parts] * streams, counts=("i32",) * streams, eps="fp32",
    )  # fmt: skip
    constexprs = dict(tokens=1) if frozen else {}
    signature |= {} if frozen else dict(tokens="i32")
    return case("_backward_kernel", signature, heads, head_dim, streams, parts, arch, dtype, rope, **constexprs)


def weights(arch, dtype, head_dim) -> Case:
    signature = dict(partials=("*fp32",) * 4, rows=("i32",) * 4, outs=(f"*{dtype}",) * 4)
    constexprs = dict(D=head_dim, WIDTH=head_dim, ROWS=512, COLUMNS=8, WEIGHTS=4, EMULATE=False)
    return Case(f"{op.__name__}:_weights_kernel", signature, constexprs, wide("_weights_kernel", signature), arch, 8)


# (case, vectors a thread reads and writes of the tensors of one program kind, registers). 16 elements a thread are 2
# vectors of bf16, 4 of fp32, per tensor and branch; a second tile of heads (38 of 32) is unrolled or not.
KINDS = {
    "forward, FLUX bf16": (forward, ("bf16", 24, 128, 2, True), 2 * 3 * 2, 2 * 3 * 2, 64),
    "forward, FLUX fp32": (forward, ("fp32", 24, 128, 2, True), 2 * 3 * 4, 2 * 3 * 4, 64),
    "forward, FLUX single bf16": (forward, ("bf16", 24, 128, 1, True), 2 * 2, 2 * 2, 64),
    "forward, SD3.5L bf16": (forward, ("bf16", 38, 64), 2 * 3 * 2, 2 * 3 * 2, 64),
    "forward, SD3.5L fp32": (forward, ("fp32", 38, 64), 2 * 3 * 4, 2 * 3 * 4, 64),
    "backward, FLUX bf16": (backward, ("bf16", 24, 128, 2, True), 2 * 5 * 2, 2 * 3 * 2, 80),
    "backward, FLUX fp32": (backward, ("fp32", 24, 128, 2, True), 2 * 5 * 4, 2 * 3 * 4, 128),
    "backward, FLUX bf16, frozen": (backward, ("bf16", 24, 128, 2, True, True), 2 * 5 * 2, 2 * 3 * 2, 80),
    "backward, FLUX single bf16": (backward, ("bf16", 24, 128, 1, True), 4 * 2, 2 * 2, 80),
    "backward, SD3.5L bf16": (backward, ("bf16", 38, 64), 2 * 5 * 2, 2 * 3 * 2, 96),
    "backward, SD3.5L fp32": (backward, ("fp32", 38, 64), 2 * 5 * 4, 2 * 3 * 4, 128),
    "backward, SD3.5L bf16, frozen": (backward, ("bf16", 38, 64, 2, False, True), 2 * 5 * 2, 2 * 3 * 2, 96),
    "weights, 128": (weights, ("bf16", 128), 4 * 4, 0, 64),
}
SM_90_ALONE = ("frozen", "single", "weights")
NAMES = [(arch, name) for arch in (80, 90) for name in KINDS if arch == 90 or not any(w in name for w in SM_90_ALONE)]


def marked(names):
    """Every kernel is fast at every size once, in bf16 for sm_90; a compilation takes a second."""
    return [pytest.param(*n, marks=() if n[0] == 90 and "fp32" not in n[1] else pytest.mark.slow) for n in names]


@pytest.fixture(scope="module")
def reports(selected):
    """Of the cases that are run, compiled in one process."""
    names = selected("arch", "name")
    found = compile_apart([KINDS[name][0](arch, *KINDS[name][1]) for arch, name in names])
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize(("arch", "name"), marked(NAMES))
def test_vectors_and_registers(reports, arch, name):
    """Every load and store of a tensor has 128 bits, and so have the tables'; nothing is spilled."""
    _, _, loads, stores, registers = KINDS[name]
    report = reports[arch, name]
    assert report.vector_loads >= loads and report.vector_stores >= stores
    if not name.startswith("weights"):
        assert len(re.findall(r"\bld\.global", report.ptx)) == report.vector_loads
        # one row of partial sums a program, fp32, by fewer threads than a warp has: not a vector each
        narrow = 0 if name.startswith("forward") or "frozen" in name else 2 * (1 if "single" in name else 2)
        assert len(re.findall(r"\bst\.global", report.ptx)) <= report.vector_stores + narrow
    assert report.stack == 0 and report.local == 0 and not re.search(r"\b(ld|st)\.local", report.ptx)
    assert report.registers <= registers


@pytest.mark.parametrize(("arch", "name"), marked(NAMES))
def test_shared_memory_only_for_sums_over_rows(reports, arch, name):
    """The pairs of RoPE stay in registers: no layout change through shared memory on the way."""
    if name.startswith("forward") or "frozen" in name:
        assert reports[arch, name].shared == 0 and "bar.sync" not in reports[arch, name].ptx
    else:
        assert reports[arch, name].shared <= 8192


@pytest.mark.parametrize(("arch", "name"), marked(n for n in NAMES if not n[1].startswith("weights")))
def test_offsets_are_64_bit(reports, arch, name):
    """token * stride and b * stride are 64-bit products, nothing multiplies a program's number in 32 bits but the
    division by the number of parts."""
    ptx = reports[arch, name].ptx
    _, (_, heads, head_dim, *_), *_ = KINDS[name]
    assert re.search(r"(mul|mad)\.lo\.s64", ptx)
    width = heads * head_dim
    assert not re.search(rf"(mul|mad)\.lo\.[su]32[^;]*, ({width}|{2 * width}|{3 * width});", ptx)
