"""What the tests of fuse_mmdit share: tiny diffusers models with random weights, their results, their comparison."""

import math
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

from senseflow_kernels import torch_path

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def sd3(**options):
    sizes = dict(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=32, pooled_projection_dim=10,
        pos_embed_max_size=16,
    )  # fmt: skip
    return SD3Transformer2DModel(**{**sizes, **options})


def flux(**options):
    sizes = dict(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return FluxTransformer2DModel(**{**sizes, **options})


MODELS = {
    "SD3": (sd3, dict(qk_norm=None)),
    "SD3.5 Medium": (sd3, dict(qk_norm="rms_norm", num_layers=3, dual_attention_layers=(0, 1))),
    "SD3.5 Large": (sd3, dict(qk_norm="rms_norm")),
    "dual attention in the last block": (sd3, dict(qk_norm=None, num_layers=1, dual_attention_layers=(0,))),
    "FLUX dev": (flux, dict(guidance_embeds=True)),
    "FLUX schnell": (flux, dict(guidance_embeds=False)),
}
FAMILIES = ["SD3.5 Medium", "FLUX dev"]  # every kind of block
# of the fused model's forward: launches of the adaLN kernel, of the joint one. A plain block has 6: two norms, two
# gated norms, two gates; the last text stream ends after its norm: 4; a single block has 2; dual attention adds none.
LAUNCHES = {
    "SD3": (6 + 4, 2), "SD3.5 Medium": (6 + 6 + 4, 5), "SD3.5 Large": (6 + 4, 2),
    "dual attention in the last block": (4, 2), "FLUX dev": (6 + 2, 2), "FLUX schnell": (6 + 2, 2),
}  # fmt: skip


def build(name, dtype=FP32, seed=0, **options):
    """Matrices of size 1 / sqrt(fan-in), vectors of 0.2 around 0, or around 1 in norms: nothing is 0 or 1."""
    torch.manual_seed(seed)
    make, of_its_own = MODELS[name]
    model = make(**(of_its_own | options))
    with torch.no_grad():
        for path, p in model.named_parameters():
            norm = path.split(".")[-2] in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
            p.normal_(float(norm), 1 / math.sqrt(p[0].numel()) if p.dim() > 1 else 0.2)
    return model.to(dtype)


def inputs_of(model, dtype, batch=2, text=7, height=3, width=5, seed=1):
    """Of a picture of height x width tokens. Differentiable where the model is."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=FP64).to(model.device, dtype).requires_grad_()

    inputs = dict(encoder_hidden_states=normal(batch, text, 12), pooled_projections=normal(batch, 10))
    # FLUX takes 1000 t and 1000 guidance in the model's dtype. These are exact in bf16: else the truth would see other
    # times, and that gap, of 1 in most gradients, would hide every rounding.
    times = torch.tensor([0.25, 1.0, 0.125, 0.5])[:batch]
    if isinstance(model, SD3Transformer2DModel):
        return inputs | dict(hidden_states=normal(batch, 4, 2 * height, 2 * width), timestep=1000 * times)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).float()
    inputs |= dict(hidden_states=normal(batch, height * width, 8), timestep=times, img_ids=places)
    inputs |= dict(txt_ids=torch.zeros(text, 3))
    return inputs | (dict(guidance=torch.full((batch,), 4.0)) if model.config.guidance_embeds else {})


def results(model, dtype, extra=None, kernels=False, **sizes):
    """{"output": ..., every input's and parameter's name: its gradient} of a random sum over the output, in fp64.

    kernels: Triton's, so the interpreter's where there is no GPU: tiny sizes; else the torch path.
    """
    with nullcontext() if kernels else torch_path():
        return _results(model, dtype, extra, **sizes)


def _results(model, dtype, extra, **sizes):
    inputs = inputs_of(model, dtype, **sizes)
    model.zero_grad(set_to_none=True)
    inputs = {name: t.to(model.device) for name, t in inputs.items()}
    out = model(**inputs, **(extra or {}), return_dict=False)[0]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=FP64)
    out.backward(weight.to(out.device, out.dtype))
    found = {"output": out.detach()}
    found |= {name: t.grad for name, t in inputs.items() if t.requires_grad}
    found |= {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: t.cpu().double() for name, t in found.items() if t is not None}


def errors(found, truth):
    """Relative error in the 2-norm of every tensor; of a key's bias relative to its weight's gradient: softmax does not
    see what is added to every key, so that gradient is what a sum of cancelling terms leaves."""
    assert found.keys() == truth.keys()
    keys = {
        name: name.removesuffix("bias") + "weight" for name in truth if name.endswith(("to_k.bias", "add_k_proj.bias"))
    }
    sizes = {name: truth[keys.get(name, name)].norm() for name in truth}
    gaps = {name: (found[name] - truth[name]).norm() for name in truth}
    # what nothing depends on, as the queries of the last text stream, has a gradient of exactly 0
    return {name: (gap / sizes[name]).item() if sizes[name] else gap.item() for name, gap in gaps.items()}


def assert_close(found, truth, tolerance=1e-5):
    off = {n: e for n, e in errors(found, truth).items() if not e <= tolerance}
    assert not off


def assert_equal(found, truth):
    assert found.keys() == truth.keys()
    assert not [name for name in truth if not torch.equal(found[name], truth[name])]
