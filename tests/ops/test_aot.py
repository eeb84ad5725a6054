"""Every score and hinge kernel compiled for sm_80 and sm_90 without a GPU; budgets read from PTX and cubin."""

import re

import pytest

pytest.importorskip("triton")
from senseflow_kernels.testing import Case, compile_apart

WIDE = ("x_ptr", "xt_ptr", "fake_ptr", "cond_ptr", "uncond_ptr", "diff_ptr", "n")


def score_case(arch: int, dtype: str, cfg: bool, epsilon: bool) -> Case:
    tensors = ["x_ptr", "xt_ptr", "fake_ptr", "cond_ptr"] + ["uncond_ptr"] * cfg
    signature = {name: f"*{dtype}" for name in tensors} | {
        "sigma_ptr": "*fp32", "diff_ptr": "*fp32", "partial_ptr": "*fp32", "norm_ptr": "*fp32", "rms_ptr": "*fp32",
        "loss_ptr": "*fp32", "counter_ptr": "*i32", "n": "i64", "count": "fp32", "batch": "i32", "tiles": "i32",
        "eps": "fp32",
    }  # fmt: skip
    signature |= {"guidance_ptr": "*fp32"} if cfg else {}
    signature |= {"alpha_ptr": "*fp32"} if epsilon else {}
    constexprs = dict(EPSILON=epsilon, PER_BATCH=False, BLOCK=2048, SLOTS=128)
    wide = [name for name in WIDE if name in signature]
    return Case("senseflow_kernels.score:_forward_kernel", signature, constexprs, wide, arch)


def backward_case(arch: int, dtype: str) -> Case:
    signature = {"diff_ptr": "*fp32", "norm_ptr": "*fp32", "dloss_ptr": "*fp32", "dx_ptr": f"*{dtype}", "n": "i64",
                 "numel": "fp32", "eps": "fp32"}  # fmt: skip
    constexprs = dict(LOSS=True, BLOCK=2048, EMULATE=False)
    return Case("senseflow_kernels.score:_backward_kernel", signature, constexprs, ("diff_ptr", "dx_ptr", "n"), arch)


def hinge_case(arch: int, dtype: str, heads: int) -> Case:
    signature = {
        "heads": (f"*{dtype}",) * heads, "sizes": ("i64",) * heads, "starts": ("i64",) * heads, "weight_ptr": "*fp32",
        "grad_ptr": "*fp32", "partial_ptr": "*fp32", "loss_ptr": "*fp32", "stats_ptr": "*fp32", "counter_ptr": "*i32",
        "scale": "fp32", "count": "fp32", "tiles": "i32",
    }  # fmt: skip
    constexprs = dict(HEADS=heads, REALS=heads // 2, HINGE=True, BLOCK=2048, SLOTS=1024)
    wide = ["grad_ptr"] + [(i, j) for i in range(3) for j in range(heads)]
    return Case("senseflow_kernels.hinge:_kernel", signature, constexprs, wide, arch)


CASES = {
    f"{name} sm_{arch}": (case, loads, stores, registers)
    for arch in (80, 90)
    for name, case, loads, stores, registers in [
        # per thread 16 elements of each tensor: 2 loads of 128 bits in bf16, 4 in fp32; the difference is fp32
        ("score bf16 cfg", score_case(arch, "bf16", True, False), 5 * 2, 4, 80),
        ("score bf16 embedded guidance", score_case(arch, "bf16", False, False), 4 * 2, 4, 80),
        ("score fp16 epsilon", score_case(arch, "fp16", True, True), 5 * 2, 4, 128),
        ("score fp32 cfg", score_case(arch, "fp32", True, False), 5 * 4, 4, 128),
        ("backward bf16", backward_case(arch, "bf16"), 4, 2, 48),
        ("backward fp32", backward_case(arch, "fp32"), 4, 4, 48),
        ("hinge bf16, 10 heads", hinge_case(arch, "bf16", 10), 10 * 2, 10 * 4, 64),
        ("hinge fp32, 16 heads", hinge_case(arch, "fp32", 16), 16 * 4, 16 * 4, 64),
    ]
}


@pytest.fixture(scope="module")
def reports():
    return dict(zip(CASES, compile_apart([case for case, *_ in CASES.values()]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_resources(name, reports):
    """128-bit loads and stores wherever the data is, nothing in local memory, a register budget."""
    report, (_, loads, stores, registers) = reports[name], CASES[name]
    assert report.vector_loads >= loads
    assert report.vector_stores >= stores
    assert report.stack == 0 and report.local == 0
    assert report.registers <= registers
    assert not re.search(r"\b(ld|st)\.local", report.ptx)


@pytest.mark.parametrize("name", CASES)
def test_offsets_are_64_bit(name, reports):
    """A tensor of more than 2^31 elements is addressed right: block * BLOCK and b * n are 64-bit products.

    In PTX a product of block numbers by BLOCK in 32 bits would be mul.lo.s32, mad.lo.s32 or shl.b32 by log2(BLOCK).
    """
    ptx = reports[name].ptx
    assert not re.search(r"(mul|mad)\.lo\.[su]32[^;]*, 2048", ptx)
    assert not re.search(r"shl\.b32[^;]*, 11;", ptx)
    assert re.search(r"mul\.wide\.[su]32[^;]*, 2048;|shl\.b64[^;]*, 11;|mul\.lo\.s64[^;]*, 2048;", ptx)
    assert re.search(r"(mul|mad)\.lo\.s64", ptx)  # b * n
