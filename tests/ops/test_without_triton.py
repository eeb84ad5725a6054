"""A machine without Triton: import, every op's values, one line an op, strict. The process without it is this file."""

import json
import logging
import os
import subprocess
import sys

if __name__ == "__main__":
    sys.modules["triton"] = None  # type: ignore[assignment]  # `import triton` raises ModuleNotFoundError

import torch

import senseflow_kernels as sk

OPS = ("dmd_loss", "score_gradient", "hinge", "lerp", "modulate", "joint_qkv")


def values() -> list[float]:
    """Results of every op, gradients included, one after another."""
    torch.manual_seed(0)
    x, x_t, fake, cond, uncond = torch.randn(5, 3, 40)
    sigma, guidance, x = torch.rand(3), 8 * torch.rand(3), x.requires_grad_()
    out = sk.dmd_loss(x, x_t, fake, cond, uncond, sigma=sigma, guidance=guidance)
    (dx,) = torch.autograd.grad(out.loss, x)
    grad = sk.score_gradient(x.detach(), x_t, fake, cond, uncond, sigma=sigma, guidance=guidance).grad
    hinge = sk.hinge_discriminator([x_t, fake[:, :7]], [cond, uncond[:, :7]], sigma)
    sk.lerp_([x_t], [fake], 0.97)
    y = sk.layer_norm_modulate(cond[None], fake[:1], uncond[:1])
    qkv = sk.joint_qkv([sk.QKV(cond[None], fake[None], uncond[None], sigma[:1].expand(20), guidance[:1].expand(20))], 2)
    return torch.cat([t.detach().flatten() for t in (*out, dx, grad, *hinge, x_t, y, *qkv)]).tolist()


def refusals() -> list[str]:
    """What strict mode says."""
    x, found = torch.ones(2, 8), []
    calls = (
        lambda: sk.dmd_loss(x, x, x, x, sigma=x[:, 0]), lambda: sk.hinge_generator([x]),
        lambda: sk.lerp_([x], [x.clone()], 0.9), lambda: sk.gate_residual(x[None], x[:1], x[None]),
    )  # fmt: skip
    with sk.strict():
        for call in calls:
            try:
                call()
            except sk.Unavailable as why:
                found.append(str(why))
    return found


def test_every_op_runs_in_torch_and_says_why_once():
    env = {k: v for k, v in os.environ.items() if k not in ("SENSEFLOW_KERNELS", "TRITON_INTERPRET")}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, said, refused = json.loads(done.stdout)
    sk.launches.clear()
    want = values()  # of the kernels, in the interpreter
    if not torch.cuda.is_available():
        assert {*sk.launches} == {"dmd_loss", "dmd_loss_backward", "hinge", "lerp", "modulate", "joint_qkv"}
    torch.testing.assert_close(torch.tensor(found), torch.tensor(want), rtol=1e-5, atol=1e-6)
    assert said == [f"{op} runs in torch, not in Triton: Triton is not installed" for op in OPS]
    reason = "Triton is not installed, and strict mode forbids another path"
    assert refused == [f"{op}: {reason}" for op in ("dmd_loss", "hinge", "lerp", "modulate")]


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def main() -> None:
    from senseflow_kernels import _ext

    assert not torch.cuda.is_initialized()  # by the imports
    assert sk.reason_against() == "Triton is not installed" and not sk.is_available()
    _ext.reason_against = lambda *_: "hidden too"
    lines, log = Lines(), logging.getLogger("senseflow_kernels")
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    found = values()
    values()
    print(json.dumps([found, lines.said, refusals()]))


if __name__ == "__main__":
    main()
