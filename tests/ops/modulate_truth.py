"""What the adaLN tests share: inputs as a block has them, values and error bounds in fp64."""

import torch

from senseflow_kernels import (
    gate_residual,
    gate_residual_layer_norm_modulate,
    layer_norm_modulate,
    layer_norm_modulate2,
)

EPS = torch.finfo(torch.float32).eps
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HALF = {BF16: 2**-8, FP16: 2**-11, FP32: 2**-24}  # half an ulp, relative, at most
FORMS = {"modulate": (0, 1), "modulate2": (0, 2), "gate": (1, 0), "gate+modulate": (1, 1), "2 gates+modulate": (2, 1)}


def inputs(form, shape, dtype=FP32, vectors=None, device="cpu", seed=0, branch=None):
    """x, gates, branches, scales, shifts with gradients, strided as a block has them: x and the branches are the image
    part of a joint sequence, the vectors chunks of one linear's output."""
    batch, tokens, columns = shape
    some, outputs = FORMS[form]
    g = torch.Generator().manual_seed(seed)

    def rows(dtype):
        joint = 0.5 + torch.randn(batch, tokens + 2, columns, generator=g)
        return joint.to(device, dtype)[:, 2:].requires_grad_()

    chunks = torch.randn(batch, 6 * columns, generator=g).to(device, vectors or dtype).chunk(6, 1)
    vector = iter([c.requires_grad_() for c in chunks])
    gates, scales, shifts = ([next(vector) for _ in range(k)] for k in (some, outputs, outputs))
    return [rows(dtype)], gates, [rows(branch or dtype) for _ in range(some)], scales, shifts


def call(form, groups, eps=1e-6):
    """The public function of `form`: [x_new] + ys."""
    (x,), gates, branches, scales, shifts = groups
    if form == "modulate":
        return [layer_norm_modulate(x, scales[0], shifts[0], eps)]
    if form == "modulate2":
        return list(layer_norm_modulate2(x, scales[0], shifts[0], scales[1], shifts[1], eps))
    if form == "gate":
        return [gate_residual(x, gates[0], branches[0])]
    more = dict(gate2=gates[1], branch2=branches[1]) if len(gates) == 2 else {}
    return list(gate_residual_layer_norm_modulate(x, gates[0], branches[0], scales[0], shifts[0], eps, **more))


def flat(groups):
    return [t for group in groups for t in group]


def gradients(out, groups, seed=1):
    """(incoming gradients, gradient of every input)."""
    g = torch.Generator().manual_seed(seed)
    dout = [torch.randn(o.shape, generator=g).to(o) for o in out]
    return dout, list(torch.autograd.grad(out, flat(groups), dout))


def exact(groups, dout, stored, eps=1e-6):
    """(values, error bounds) of outputs and gradients in fp64, y being that of the x_new that was stored.

    Sums over D or over tokens: at most 24 fp32 roundings meet a term (three pieces, a tree of 1024; 18 tokens one
    after another, 5 partials, a tree of 64), typically far fewer; half an eps each, of the sum of absolute terms. So
    mean and rstd, hence xhat, are off by at most 12 eps (A + |xhat|) with A = mean|x| / std. dx_err is that of dx.
    """
    wide = [[t.detach().double().requires_grad_() for t in group] for group in groups]
    (x,), gates, branches, scales, shifts = wide
    value, terms, out, bounds = x, x.abs(), [], []
    for gate, branch in zip(gates, branches, strict=True):
        value = value + gate[:, None] * branch
        terms = terms + (gate[:, None] * branch).abs()
    if gates:
        out, bounds = [value], [2 * EPS * terms]
        value = value + (stored.double() - value).detach()
    dx_new = dout[0].double() if gates else torch.zeros_like(x)
    dx_err = EPS * dx_new.abs()
    if scales:
        gap = value - value.mean(2, keepdim=True)
        std = (gap.square().mean(2, keepdim=True) + eps).sqrt()
        xhat = gap / std
        xhat_err = 12 * EPS * (value.abs().mean(2, keepdim=True) / std + xhat.abs())
        w = torch.zeros_like(x)
        for scale, shift, dy in zip(scales, shifts, dout[len(out) :], strict=True):
            y = xhat * (1 + scale[:, None]) + shift[:, None]
            out.append(y)
            bounds.append(xhat_err * (1 + scale[:, None]).abs() + 2 * EPS * (y.abs() + shift[:, None].abs()))
            w = w + dy.double().abs() * (1 + scale[:, None]).abs()
        mean_w, mean_wx = w.mean(2, keepdim=True), (w * xhat.abs()).mean(2, keepdim=True)
        along = xhat_err * mean_wx + xhat.abs() * (w * xhat_err).mean(2, keepdim=True)
        dx_err = dx_err + (12 * EPS * 2 * (w + mean_w + xhat.abs() * mean_wx) + along) / std
    grads = list(torch.autograd.grad(out, flat(wide), [d.double() for d in dout]))
    dx = grads[0]
    bounds += [dx_err]
    bounds += [((dx_err + 12 * EPS * dx.abs()) * b.abs()).sum(1) for b in branches]  # dgate
    bounds += [(dx_err + EPS * dx.abs()) * g[:, None].abs() for g in gates]  # dbranch
    dys = [d.double().abs() for d in dout[bool(gates) :]]
    bounds += [(d * (xhat_err + 12 * EPS * xhat.abs())).sum(1) for d in dys]  # dscale
    bounds += [12 * EPS * d.sum(1) for d in dys]  # dshift
    return [*out, *grads], [b.detach() for b in bounds]


def assert_rounded_once(got, values, bounds):
    """Within the fp32 error and one rounding to the dtype; 2^-25 is half of fp16's smallest number."""
    for a, b, bound in zip(got, values, bounds, strict=True):
        least = 2**-25 if a.dtype == FP16 else 0.0
        # The rounding is of the fp32 result: half an ulp of it, at most twice that at a power of two's edge.
        assert ((a.double() - b).abs() <= bound + HALF[a.dtype] * (b.abs() + bound) + least).all()
