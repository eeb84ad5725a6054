"""csrc's CUDA library as it was built: sm_80 and sm_90 code, 128-bit accesses, nothing spilled, registers in bounds."""

import re
import subprocess
from pathlib import Path

import pytest

from senseflow_kernels import _ext

triton = pytest.importorskip("triton", reason="Triton is not installed: its wheel carries cuobjdump")
LIBRARY = Path(_ext.__file__).with_name("libsenseflow_csrc_cuda.so")
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
pytestmark = [
    pytest.mark.skipif(not LIBRARY.exists(), reason=f"{LIBRARY.name} was not built: no nvcc at installation"),
    pytest.mark.skipif(not TOOL.exists(), reason="no cuobjdump in Triton's wheel"),
]


@pytest.fixture(scope="module")
def dump():
    def run(arch, what):
        command = [TOOL, f"--gpu-architecture=sm_{arch}", what, LIBRARY]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    return run


@pytest.mark.parametrize("arch", [80, 90])
def test_resources(dump, arch):
    """One kernel; at 128 registers a thread, for up to eight tensors of eight elements, an SM holds two blocks."""
    used = dump(arch, "--dump-resource-usage")
    assert used.count("update_kernel") == 1
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", used)}
    assert found["STACK"] == found["LOCAL"] == 0
    assert found["REG"] <= 128


@pytest.mark.parametrize("arch", [80, 90])
def test_accesses(dump, arch):
    """A tensor has at least one 128-bit load and one store, as fp32 (two vectors) and as halves; no local memory."""
    code = dump(arch, "-sass")
    # theta, grad, m, v, ema, phi, and the low halves of theta and phi; what is written, all of them but grad.
    assert len(re.findall(r"\bLDG\.E\.128", code)) >= 6 * 3 + 2
    assert len(re.findall(r"\bSTG\.E\.128", code)) >= 5 * 3 + 2
    assert not re.findall(r"\b(LD|ST)\.E", code)  # generic accesses, which ask first which memory it is
    assert not re.findall(r"\b(LDL|STL)\b", code)
    assert "IMAD.WIDE" in code or "IADD3.X" in code  # addresses have 64 bits
