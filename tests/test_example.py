"""The drop-in example runs as its docstring says, agrees, and says so when it does not."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(ROOT / "kernels"), str(ROOT / "examples"), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= dict(SENSEFLOW_KERNELS="torch", OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(path))
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)


def test_before_and_after_agree():
    done = run(str(ROOT / "examples" / "dmd2_dropin.py"), "--steps", "20", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 steps on cpu" in done.stdout and "TOO LARGE" not in done.stdout
    for name in ("losses", "gradients of step 1", "student", "ema", "fake", "heads"):
        assert name in done.stdout


def test_a_wrong_form_is_found():
    """Guidance left out of the loss: exit status 1, and the line says which number."""
    wrong = (
        "import sys, dmd2_dropin as e; right = e.dmd_after;"
        "e.AFTER = ((lambda x, x_t, fake, cond, uncond, sigma: right(x, x_t, fake, cond, cond, sigma)), *e.AFTER[1:]);"
        "sys.argv = ['dmd2_dropin.py', '--steps', '2', '--device', 'cpu']; sys.exit(e.main())"
    )
    done = run("-c", wrong)
    assert done.returncode == 1 and "TOO LARGE" in done.stdout, done.stdout + done.stderr
