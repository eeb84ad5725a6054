"""What a kernel becomes on a GPU, seen without one: compiled ahead of time, its PTX and its resources read.

`compile_apart` does it in a process of its own, for the interpreter's process cannot compile. Needs Triton.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Report:
    """registers a thread; stack, local, shared in bytes; vector_*: 128-bit global loads and stores in the PTX."""

    ptx: str
    registers: int
    stack: int
    local: int
    shared: int
    vector_loads: int
    vector_stores: int


@dataclass(frozen=True)
class Case:
    """Arguments of `compile_kernel`, the kernel by name ("senseflow_kernels.lerp:_kernel"), to cross a process."""

    kernel: str
    signature: Mapping[str, Any]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible: Sequence[str | tuple[int, ...]] = ()
    arch: int = 90
    num_warps: int = 4
    maxnreg: int | None = None


def compile_kernel(
    fn: Any, signature: Mapping[str, Any], constexprs: Mapping[str, Any],
    divisible: Sequence[str | tuple[int, ...]] = (), arch: int = 90, num_warps: int = 4,
    maxnreg: int | None = None,
) -> Report:  # fmt: skip
    """Compiles a Triton kernel for sm_`arch`; no GPU needed.

    signature: type by argument name ("*bf16", "i32"; a tuple of types for a tuple argument); arguments it lacks are
    constexprs, None where constexprs does not name them either. divisible: arguments known to be multiples of 16
    (what a launch sees in a pointer's value), by name or by path: (i,), or (i, j) within a tuple. Without it every
    load is scalar. maxnreg: registers a thread at most. Raises RuntimeError under TRITON_INTERPRET, and what the
    compiler raises.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels decorated under TRITON_INTERPRET=1 cannot be compiled: use compile_apart")
    names = list(fn.arg_names)
    unknown = {*signature, *constexprs} - {*names}
    if unknown:
        raise ValueError(f"{fn.__name__} has no arguments {sorted(unknown)}, it has {names}")
    types = {name: signature.get(name, "constexpr") for name in names}
    constants = {(i,): constexprs.get(name) for i, name in enumerate(names) if name not in signature}
    paths = [(names.index(d),) if isinstance(d, str) else d for d in divisible]
    attrs = {path: [["tt.divisibility", 16]] for path in paths}
    source = ASTSource(fn, types, constexprs=constants, attrs=attrs)  # type: ignore[arg-type]
    # What a launch does by default; said, because Triton's default is about to change.
    options = {"num_warps": num_warps, "enable_fp_fusion": True, "maxnreg": maxnreg}
    done: Any = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx, used = done.asm["ptx"], _resources(done.asm["cubin"])
    return Report(
        ptx, used["REG"], used["STACK"], used["LOCAL"], max(used["SHARED"], done.metadata.shared),
        vector_loads=len(re.findall(r"ld\.global[\w.:]*\.(?:v4\.[bfu]32|v2\.[bfu]64)", ptx)),
        vector_stores=len(re.findall(r"st\.global[\w.:]*\.(?:v4\.[bfu]32|v2\.[bfu]64)", ptx)),
    )  # fmt: skip


def _resources(cubin: bytes) -> dict[str, int]:
    """{"REG": registers, "STACK": bytes, ...} by cuobjdump, which Triton's wheel carries."""
    import triton

    bundled = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    tool = bundled if os.path.exists(bundled) else shutil.which("cuobjdump")
    if tool is None:
        raise RuntimeError("no cuobjdump: neither in Triton's wheel nor on PATH")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", out)}


def compile_apart(cases: Sequence[Case]) -> list[Report]:
    """The reports of all cases, in order, compiled in one process without the interpreter.

    Raises RuntimeError with that process's stderr where one fails.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-m", "senseflow_kernels.testing"], input=pickle.dumps([*cases]), env=environment,
        capture_output=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr.decode()[-4000:])
    return [Report(**fields) for fields in pickle.loads(done.stdout)]


def _main() -> None:
    """Cases from stdin, reports to stdout, both pickled: constexprs may be Triton's dtypes."""
    reports = []
    for case in pickle.load(sys.stdin.buffer):
        module, name = case.kernel.split(":")
        fn = getattr(importlib.import_module(module), name)
        options = (case.divisible, case.arch, case.num_warps, case.maxnreg)
        report = compile_kernel(fn, case.signature, case.constexprs, *options)
        reports.append(vars(report))
    sys.stdout.buffer.write(pickle.dumps(reports))


if __name__ == "__main__":
    _main()
