"""Comparing bit for bit, and whether torch rounds here as csrc does."""

import torch

# Whether torch.lerp rounds its multiply and add once, as csrc does: -a + (1 + e)^2 / 4 with a its fp32 value.
_d, _p = 1 + 2**-12, -0.25 * (1 + 2**-11)
FUSED = torch.lerp(*torch.tensor([[_p], [_d + _p]]), 0.25 * _d).item() == 2**-26
# The same of torch.addcmul, which AdamW's second moment is made with: (1 + e)^2 - (1 + 2 e) = e^2.
FUSED &= torch.addcmul(torch.full((64,), -(1 + 2**-11)), torch.tensor(_d), torch.tensor(_d))[0].item() == 2**-24


def same(a, b):
    """Equal bit for bit; any NaN is like any other."""
    views = {4: torch.int32, 2: torch.int16}
    return all(
        (x.dtype == y.dtype and torch.equal(torch.isnan(x), torch.isnan(y)))
        and torch.equal(x.view(views[x.element_size()])[~x.isnan()], y.view(views[y.element_size()])[~y.isnan()])
        for x, y in zip(a, b, strict=True)
    )
