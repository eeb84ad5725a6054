"""fuse_mmdit against diffusers' own models: outputs and every gradient."""

import copy

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")
from mmdit_truth import (
    BF16,
    FAMILIES,
    FP32,
    FP64,
    LAUNCHES,
    MODELS,
    assert_close,
    assert_equal,
    build,
    errors,
    inputs_of,
    results,
)

from senseflow_kernels import fuse_mmdit, launches, mmdit, torch_path, unfuse_mmdit

# -- the same results ----------------------------------------------------------------------------------------------

SIZES = {"SD3": (1, 1), "SD3.5 Large": (4, 2), "FLUX schnell": (3, 1)}  # batch, text tokens; else 2 and 7


@pytest.mark.parametrize("name", MODELS)
def test_fp32(name):
    """Against diffusers in fp64. Sums of at most 128 products, a few layers deep, 2^-24 each: 1e-6; 1e-5 leaves room
    for layers that amplify."""
    batch, text = SIZES.get(name, (2, 7))
    model = build(name)
    truth = results(copy.deepcopy(model).double(), FP64, batch=batch, text=text)
    assert_close(results(fuse_mmdit(model), FP32, batch=batch, text=text), truth)
    assert truth["output"].norm() > 1  # and not a comparison of zeros


ONE_OF_EACH = {"SD3.5 Medium": dict(num_layers=2, dual_attention_layers=(0,)), "FLUX dev": {}}
TINY = dict(batch=2, text=2, height=1, width=3)  # for the interpreter, which takes a token at a time


@pytest.mark.parametrize("name", FAMILIES)
def test_kernels(name, device):
    model = build(name, **ONE_OF_EACH[name])
    truth = results(copy.deepcopy(model).double(), FP64, **TINY)
    assert_close(results(fuse_mmdit(model.to(device)), FP32, kernels=True, **TINY), truth)


@pytest.mark.parametrize("name", MODELS)
def test_launches(name, device):
    """As many as the blocks' structure says: no form of a block leaves the kernels unnoticed."""
    model = fuse_mmdit(build(name)).to(device)
    inputs = inputs_of(model, FP32, batch=1, text=1, height=1, width=1)
    launches.clear()
    with torch.no_grad():
        model(**{name: t.to(device) for name, t in inputs.items()})
    assert launches == dict(zip(("modulate", "joint_qkv"), LAUNCHES[name], strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_is_no_worse_than_unfused(name):
    """Root mean square over all tensors' relative errors, three draws of weights: at most 1.1 of diffusers' own in
    bf16. Of ~100 tensors a draw the two means scatter by a few percent."""
    own, fused = [], []
    for seed in range(3):
        model = build(name, BF16, seed)
        truth = results(copy.deepcopy(model).double(), FP64)
        own += errors(results(model, BF16), truth).values()
        fused += errors(results(fuse_mmdit(model), BF16), truth).values()
    rms = [torch.tensor(e).square().mean().sqrt().item() for e in (fused, own)]
    assert rms[0] <= 1.1 * rms[1] and rms[1] > 1e-3
    assert max(own) < 0.1  # roundings alone: no gap of another kind drowns them


@pytest.mark.parametrize(("batch", "text", "height", "width"), [(1, 1, 1, 2), (3, 512, 7, 7), (2, 77, 8, 5)])
@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_on_the_torch_path(name, batch, text, height, width):
    model, sizes = build(name), dict(batch=batch, text=text, height=height, width=width)
    truth = results(copy.deepcopy(model).double(), FP64, **sizes)
    launches.clear()
    assert_close(results(fuse_mmdit(model), FP32, **sizes), truth)
    assert not launches.total()


@pytest.mark.parametrize("kind", ["double", "single"])
def test_fp16_stays_in_range(kind):
    """FLUX clips what leaves a block in fp16: else infinities from here on."""
    model = build("FLUX dev").half()
    with torch.no_grad():
        if kind == "double":
            model.transformer_blocks[0].ff_context.net[2].bias.fill_(6e4)
        else:
            block = model.single_transformer_blocks[0]
            block.proj_out.bias[::2] = 6e4
            block.norm.linear.bias[-32:] = 4  # of the gate: the product is beyond fp16
        inputs = inputs_of(model, torch.float16)
        own = model(**inputs, return_dict=False)[0]
        with torch_path():
            out = fuse_mmdit(model)(**inputs, return_dict=False)[0]
    assert own.isfinite().all() and out.isfinite().all()
    assert (out - own).float().norm() <= 0.05 * own.float().norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing(name):
    model = fuse_mmdit(build(name))
    plain = results(model, FP32)
    model.enable_gradient_checkpointing()
    assert_equal(results(model, FP32), plain)


@pytest.mark.parametrize("name", ["dual attention in the last block", "FLUX dev"])
def test_compiled_blocks(name):
    """Every block in one graph (fullgraph), inside checkpointing, and none of it changes the results."""
    torch._dynamo.reset()
    model = build(name)
    plain = results(fuse_mmdit(model), FP32)
    fuse_mmdit(model, compile="aot_eager")
    assert all(block._compiled_call_impl for _, _, block in mmdit._blocks(model))
    model.enable_gradient_checkpointing()
    assert_close(results(model, FP32), plain, 1e-6)


def test_compiled_kernels(device):
    """Through the registered operations, not around them."""
    torch._dynamo.reset()
    model = build("FLUX dev", num_layers=0).to(device)
    plain = results(model, FP32, **TINY)
    launches.clear()
    assert_close(results(fuse_mmdit(model, compile="aot_eager"), FP32, kernels=True, **TINY), plain)
    assert (launches["modulate"], launches["joint_qkv"]) == (2, 1)


@pytest.mark.parametrize("fuse_first", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_lora(name, fuse_first):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_v_proj", "norm1.linear", "proj_mlp", "net.2"]
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=targets)
    model = build(name)
    if fuse_first:
        fuse_mmdit(model)
    torch.manual_seed(3)
    model.add_adapter(config)
    own = copy.deepcopy(model).double()
    unfuse_mmdit(own)
    scaled = dict(extra={"joint_attention_kwargs": {"scale": 0.5}})
    fuse_mmdit(model)
    truth = results(own, FP64)
    assert sum("lora_A" in n for n in truth) == sum("lora_B" in n for n in truth) >= 10
    assert_close(results(model, FP32), truth)
    assert_close(results(model, FP32, **scaled), results(own, FP64, **scaled))


def test_packed_projections():
    """diffusers' fuse_qkv_projections: one GEMM for q, k, v."""
    model = build("FLUX dev")
    model.fuse_qkv_projections()
    own = copy.deepcopy(model).double()
    truth, found = results(own, FP64), results(fuse_mmdit(model), FP32)
    assert any("to_qkv" in name for name in truth)
    assert_close(found, truth)


# -- on a GPU ------------------------------------------------------------------------------------------------------


WIDE = {
    "SD3.5 Medium": dict(attention_head_dim=64, caption_projection_dim=128),
    "FLUX dev": dict(attention_head_dim=128, axes_dims_rope=(16, 56, 56)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_gpu_bf16_is_no_worse_than_unfused(name, compile):
    """As above, with the kernels, the automatic attention and torch.compile; the published head sizes."""
    torch._dynamo.reset()
    own, fused = [], []
    for seed in range(5):
        model = build(name, BF16, seed, **WIDE[name])
        sizes = dict(batch=2, text=77, height=9, width=11)
        truth = results(copy.deepcopy(model).double(), FP64, **sizes)
        model.to("cuda")
        own += errors(results(model, BF16, **sizes), truth).values()
        launches.clear()
        fuse_mmdit(model, compile=compile)
        fused += errors(results(model, BF16, kernels=True, **sizes), truth).values()
        assert (launches["modulate"], launches["joint_qkv"]) == LAUNCHES[name]
    rms = [torch.tensor(e).square().mean().sqrt().item() for e in (fused, own)]
    assert rms[0] <= 1.1 * rms[1] and max(own) < 0.2


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_gpu_fp32(name):
    """TF32 stays off by default, so the bound is that of the CPU."""
    model = build(name, FP32, **WIDE[name])
    truth = results(copy.deepcopy(model).double(), FP64)
    assert_close(results(fuse_mmdit(model.to("cuda")), FP32, kernels=True), truth)
