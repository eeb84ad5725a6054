"""What the tests of joint_attention share: tensors, gradients, the comparison with the formula in fp64."""

import torch

from senseflow_kernels._attention_probe import formula

FP32, BF16 = torch.float32, torch.bfloat16
CPU = torch.device("cpu")


def tensors(batch=2, rows=33, columns=47, heads=3, dim=16, dtype=FP32, device=CPU):
    shapes = [(batch, n, heads, dim) for n in (rows, columns, columns, rows)]
    return [torch.randn(s, dtype=torch.float64).to(device, dtype) for s in shapes]


def gradients(attend, q, k, v, dout):
    """out, dq, dk, dv."""
    inputs = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def relative(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


def assert_exact(attend, q, k, v, dout, mask=None, scale=None, tolerance=None):
    truth = gradients(lambda q, k, v: formula(q, k, v, mask, scale), *(t.double() for t in (q, k, v, dout)))
    # 2-norms. fp32: sums of at most 128 products, each 2^-24 off, and the softmax's exp: 1e-6 leaves a factor of 4.
    # bf16: P, dS and the result are rounded to 2^-9; dS is a difference of two numbers of twice its size.
    tolerance = tolerance or {torch.float64: 1e-13, FP32: 1e-6, BF16: 2**-6, torch.float16: 2**-9}[q.dtype]
    for name, value, exact in zip(("out", "dq", "dk", "dv"), gradients(attend, q, k, v, dout), truth, strict=True):
        assert value.dtype == q.dtype
        assert relative(value, exact) <= tolerance, name
