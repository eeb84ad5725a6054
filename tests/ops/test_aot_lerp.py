"""The lerp kernel compiled for sm_80 and sm_90: 128-bit loads and stores, nothing spilled, registers in bounds."""

import re

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl

from senseflow_kernels.lerp import FIELDS, ROUNDS
from senseflow_kernels.testing import Case, compile_apart

BLOCK, WARPS = 2048, 8  # of a launch on a GPU: 8 elements a thread, so 1 vector of bf16 or int16 and 2 of fp32
# (constexprs, vectors read, vectors written), EMA's three streams last
KINDS = {
    "fp32": (dict(PHI=tl.float32, THETA=tl.float32), 2 + 2, 2),
    "fp32 from bf16": (dict(PHI=tl.float32, THETA=tl.bfloat16), 2 + 1, 2),
    "nearest": (dict(PHI=tl.bfloat16, THETA=tl.bfloat16), 1 + 1, 1),
    "split": (dict(PHI=tl.bfloat16, THETA=tl.bfloat16, SPLIT=True), 2 + 1, 2),
    "split, theta too, ema": (
        dict(PHI=tl.bfloat16, THETA=tl.bfloat16, SPLIT=True, SPLIT_THETA=True, EMA=True), 2 + 2 + 2, 2 + 2,
    ),
    "stochastic": (dict(PHI=tl.bfloat16, THETA=tl.bfloat16, RANDOM=True), 1 + 1, 1),
    "stochastic, ema": (dict(PHI=tl.bfloat16, THETA=tl.bfloat16, RANDOM=True, EMA=True), 1 + 1 + 2, 1 + 2),
    "stochastic, unaligned": (dict(PHI=tl.bfloat16, THETA=tl.bfloat16, RANDOM=True, WIDE=False), 0, 0),
}  # fmt: skip


def case(options, arch):
    signature = dict(table_ptr="*i64", map_ptr="*i32", lam_ptr="*fp32", weight="fp32", ema_weight="fp32")
    if options.get("RANDOM"):
        signature["step_ptr"] = "*i64"
    flags = dict(SPLIT=False, SPLIT_THETA=False, RANDOM=False, EMA=False, WIDE=True, EMULATE=False)
    sizes = dict(FIELDS=FIELDS, CHUNK=4 * BLOCK, BLOCK=BLOCK, ROUNDS=ROUNDS)
    kernel = "senseflow_kernels.lerp:_kernel"
    return Case(kernel, signature, {**flags, **sizes, **options}, ["table_ptr", "map_ptr"], arch, WARPS)


@pytest.fixture(scope="module")
def reports():
    cases = [case(options, arch) for arch in (80, 90) for options, *_ in KINDS.values()]
    names = [(arch, name) for arch in (80, 90) for name in KINDS]
    return dict(zip(names, compile_apart(cases), strict=True))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("arch", [80, 90])
def test_vectors_and_registers(reports, arch, name):
    """64 registers of 256 threads let four programs share an SM: 4 x 2048 elements in flight."""
    _, loads, stores = KINDS[name]
    report = reports[arch, name]
    assert (report.vector_loads, report.vector_stores) == (loads, stores)
    assert report.local == report.stack == 0 and "ld.local" not in report.ptx
    assert report.registers <= 64
    assert report.shared <= 8192  # bf16 beside fp32 changes layout through it


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("arch", [80, 90])
def test_offsets_are_64_bit(reports, arch, name):
    """A chunk's number times CHUNK is a product of 64 bits; within a tile int32 is enough."""
    ptx, chunk = reports[arch, name].ptx, 4 * BLOCK
    assert not re.search(rf"(mul|mad)\.lo\.[su]32[^;]*, {chunk};|shl\.b32[^;]*, {chunk.bit_length() - 1};", ptx)
    assert re.search(rf"mul\.wide\.[su]32[^;]*, {chunk};|shl\.b64[^;]*, {chunk.bit_length() - 1};", ptx)
