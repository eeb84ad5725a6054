"""The adaLN kernels at the sizes of FLUX, SD 3.5 Large and Medium, compiled for sm_80 and sm_90 without a GPU."""

import re

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from senseflow_kernels import _adaln
from senseflow_kernels.testing import Case, compile_apart

TOKEN_ROWS = {"branches", "dys", "dbranches"}  # have a batch and a token stride


def case(kernel: str, arch: int, columns: int, dtype: str, branches: int, outputs: int) -> Case:
    """`kernel` with everything it can be asked for: branches with gates and the gradients of all."""
    some, many = [f"*{dtype}"] * branches, [f"*{dtype}"] * outputs
    backward = kernel == "_backward_kernel"
    tensors = {"x_ptr": f"*{dtype}"} if outputs or not backward else {}
    tuples = {"gates": some, "branches": some, "scales": many}
    if backward:
        tensors |= {"dx_ptr": f"*{dtype}", "partial_ptr": "*fp32"} | ({"dx_new_ptr": f"*{dtype}"} if branches else {})
        tuples |= {"dys": many, "dbranches": some}
    else:
        tensors |= {"x_new_ptr": f"*{dtype}"} if branches else {}
        tuples |= {"shifts": many, "ys": many}
    tensors |= {"stats_ptr": "*fp32"} if outputs else {}
    strides = {f"{name}_strides": ("i32",) * 2 for name in ("x", "dx_new") if f"{name}_ptr" in tensors}
    singular = dict(gates="gate", branches="branch", scales="scale", shifts="shift", dys="dy")
    for name, one in singular.items():
        strides[f"{one}_strides"] = ("i32",) * (len(tuples.get(name, ())) * (2 if name in TOKEN_ROWS else 1))
    arguments = list(getattr(_adaln, kernel).arg_names)
    given = {name: tuple(types) for name, types in tuples.items() if types}
    signature = tensors | given | {k: v for k, v in strides.items() if v and k in arguments} | {"n": "i32"}
    signature |= {"run": "i32", "programs": "i32"} if backward else {"blocks": "i32", "eps": "fp32"}
    chunk = _adaln.chunk_of(columns)
    two = outputs + branches == 1 if backward else bool(branches and outputs)
    constexprs = dict(
        BRANCHES=branches, OUTPUTS=outputs, D=columns, CHUNK=chunk, ROWS=_adaln.rows_of(chunk, two), UNIT=8,
        EMULATE=False,
    )  # fmt: skip
    constexprs |= dict(DX=True, DGATES=bool(branches), DMODULATION=bool(outputs)) if backward else {}
    # Alignment of the pointers alone: that of the rows comes from UNIT, as in a launch.
    divisible = [*tensors, *((arguments.index(name), j) for name, types in given.items() for j in range(len(types)))]
    return Case(f"senseflow_kernels._adaln:{kernel}", signature, constexprs, divisible, arch, _adaln.warps_of(chunk))


def vectors(case: Case) -> tuple[int, int]:
    """128-bit loads and stores a thread makes, as instructions, if every access is one: per piece of 8 columns one for
    bf16 and two for fp32, per token in flight for what belongs to a token."""
    s, c = case.signature, case.constexprs
    pieces = -(-c["D"] // c["CHUNK"])
    wide = 2 if s.get("x_ptr", s.get("dx_new_ptr")) == "*fp32" else 1

    def count(*names):
        return sum(len(s[name]) if isinstance(s.get(name), tuple) else name in s for name in names)

    rows, columns = c["ROWS"] * pieces * wide, pieces * wide
    loads = rows * count("x_ptr", "branches", "dys", "dx_new_ptr") + columns * count("gates", "scales", "shifts")
    stores = rows * count("x_new_ptr", "ys", "dx_ptr", "dbranches")
    sums = 2 * count("dys") + count("dbranches") if "partial_ptr" in s else 0
    return loads, stores + 2 * pieces * sums


# (columns, branches, outputs, most registers forward, backward). An SM has 65536: with 64 for each of 128 threads eight
# programs share one, with 96 five. The backward runs two, for which the 255 that a thread can have are enough: what
# bounds it is that nothing spills.
SIZES = {
    "FLUX modulate": (3072, 0, 1, 64, 255), "FLUX gate+modulate": (3072, 1, 1, 96, 255),
    "SD3.5L modulate": (2432, 0, 1, 64, 255), "SD3.5L gate+modulate": (2432, 1, 1, 96, 255),
    "FLUX gate": (3072, 1, 0, 64, 168), "SD3.5M modulate2": (1536, 0, 2, 64, 168),
    "SD3.5M 2 gates+modulate": (1536, 2, 1, 96, 255),
}  # fmt: skip
CASES = {
    f"{name} {kernel.split('_')[1]} {dtype} sm_{arch}": (case(kernel, arch, columns, dtype, some, many), budget)
    for name, (columns, some, many, *budgets) in SIZES.items()
    for kernel, budget in zip(("_forward_kernel", "_backward_kernel"), budgets, strict=True)
    for dtype, arch in (("bf16", 90), ("fp32", 80))
}


# Every kernel at every size is fast once, in bf16 for sm_90; a compilation takes a second.
NAMES = [pytest.param(name, marks=() if name.endswith("bf16 sm_90") else pytest.mark.slow) for name in CASES]


def column_sums() -> Case:
    """Second stage: 32 columns are 128 bytes, read by 8 threads with 128 bits each."""
    kinds = ("*bf16", "*bf16", "*fp32")
    constexprs = dict(D=3072, KINDS=3, COLUMNS=_adaln.SUM_COLUMNS, SLOTS=_adaln.SUM_SLOTS, EMULATE=False)
    where = ["partial_ptr", (1, 0), (1, 1), (1, 2)]
    signature = {"partial_ptr": "*fp32", "outs": kinds, "programs": "i32"}
    return Case("senseflow_kernels._adaln:_sum_kernel", signature, constexprs, where, 90, 4)


@pytest.fixture(scope="module")
def reports(selected):
    """Of the cases that are run, compiled in one process."""
    cases = {name: CASES[name][0] for name in selected("name")} | {"sums": column_sums()}
    return dict(zip(cases, compile_apart([*cases.values()]), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_resources(name, reports):
    """128-bit loads and stores of all tensors, nothing in local memory, a register budget."""
    report, (case, budget) = reports[name], CASES[name]
    assert (report.vector_loads, report.vector_stores) == vectors(case)
    assert report.stack == 0 and report.local == 0
    assert not re.search(r"\b(ld|st)\.local", report.ptx)
    assert report.registers <= budget


@pytest.mark.parametrize("name", NAMES)
def test_offsets_are_64_bit(name, reports):
    """Rows are found by 64-bit products, strides of 32 bits widened first: a tensor may have more than 2^31 elements.

    One product stays in 32 bits: the one that takes a program's number apart.
    """
    report, (case, _) = reports[name], CASES[name]
    assert len(re.findall(r"(?:mul|mad)\.lo\.[su]32", report.ptx)) <= 1
    row = case.constexprs["D"] * (2 if "bf16" in name else 4)
    assert re.search(rf"(mul|mad)\.lo\.s64[^;]*, {row}[,;]", report.ptx)


def test_column_sums(reports):
    assert reports["sums"].vector_loads == 4 and reports["sums"].stack == 0 and reports["sums"].registers <= 64
