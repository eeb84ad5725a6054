"""fuse_mmdit against diffusers' own models: outputs and every gradient; what stays as it was."""

import copy
import logging
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock

from senseflow_kernels import _mmdit_blocks, fuse_mmdit, launches, mmdit, torch_path, unfuse_mmdit

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
    times = torch.linspace(0.2, 0.9, batch)
    if isinstance(model, SD3Transformer2DModel):
        return inputs | dict(hidden_states=normal(batch, 4, 2 * height, 2 * width), timestep=1000 * times)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).float()
    inputs |= dict(hidden_states=normal(batch, height * width, 8), timestep=times, img_ids=places)
    inputs |= dict(txt_ids=torch.zeros(text, 3))
    return inputs | (dict(guidance=torch.full((batch,), 3.5)) if model.config.guidance_embeds else {})


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
def test_kernels(name):
    model = build(name, **ONE_OF_EACH[name])
    truth = results(copy.deepcopy(model).double(), FP64, **TINY)
    assert_close(results(fuse_mmdit(model), FP32, kernels=True, **TINY), truth)


@pytest.mark.parametrize("name", MODELS)
def test_launches(name):
    """As many as the blocks' structure says: no form of a block leaves the kernels unnoticed."""
    model = fuse_mmdit(build(name))
    launches.clear()
    with torch.no_grad():
        model(**inputs_of(model, FP32, batch=1, text=1, height=1, width=1))
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


@pytest.mark.parametrize(("batch", "text", "height", "width"), [(1, 1, 1, 2), (3, 512, 7, 7), (2, 77, 8, 5)])
@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_on_the_torch_path(name, batch, text, height, width):
    model, sizes = build(name), dict(batch=batch, text=text, height=height, width=width)
    truth = results(copy.deepcopy(model).double(), FP64, **sizes)
    launches.clear()
    assert_close(results(fuse_mmdit(model), FP32, **sizes), truth)
    assert not launches.total()


def test_fp16_stays_in_range():
    """FLUX clips what leaves a block in fp16: else infinities from here on."""
    model = build("FLUX dev").half()
    with torch.no_grad():
        model.transformer_blocks[0].ff_context.net[2].bias.fill_(6e4)
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


def test_compiled_kernels():
    """Through the registered operations, not around them."""
    torch._dynamo.reset()
    model = build("FLUX dev", num_layers=0)
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


# -- what else the models take -------------------------------------------------------------------------------------


def controlnet(model):
    residual = torch.randn(2, 15, 32, generator=torch.Generator().manual_seed(4))
    if isinstance(model, SD3Transformer2DModel):
        return dict(block_controlnet_hidden_states=[residual.to(model.dtype)])
    residual = residual.to(model.dtype)
    return dict(controlnet_block_samples=[residual], controlnet_single_block_samples=[2 * residual])


@pytest.mark.parametrize("name", FAMILIES)
def test_controlnet_residuals(name):
    model = build(name)
    own = copy.deepcopy(model).double()
    plain, truth = results(own, FP64), results(own, FP64, controlnet(own))
    assert errors(plain, truth)["output"] > 0.01
    assert_close(results(fuse_mmdit(model), FP32, controlnet(model)), truth)


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(_mmdit_blocks, "_said", set())
    caplog.set_level(logging.WARNING, "senseflow_kernels")
    return lambda: [r.getMessage() for r in caplog.records if "its own forward" in r.getMessage()]


def test_attention_kwargs_run_the_blocks_own_forward(said):
    model = build("FLUX dev", FP64)
    mask = torch.rand(2, 1, 22, 22) > 0.3
    extra = dict(joint_attention_kwargs=dict(attention_mask=mask))
    truth = results(model, FP64, extra)
    assert_equal(results(fuse_mmdit(model), FP64, extra), truth)
    lines = [f"{block} runs its own forward, not the fused one: joint_attention_kwargs ['attention_mask']" for block in
             ("FluxTransformerBlock", "FluxSingleTransformerBlock")]  # fmt: skip
    assert said() == lines
    results(model, FP64, extra)
    assert said() == lines  # once
    assert errors(results(model, FP64), truth)["output"] > 0.01


def test_other_settings_run_the_blocks_own_forward(said):
    model = build("SD3", FP64)
    truth = results(model, FP64)
    fuse_mmdit(model)
    model.enable_forward_chunking(1, dim=0)
    assert errors(results(model, FP64), truth)["output"] < 1e-12
    model.disable_forward_chunking()

    class Other(type(model.transformer_blocks[0].attn.processor)):
        pass

    model.transformer_blocks[0].attn.set_processor(Other())
    assert errors(results(model, FP64), truth)["output"] < 1e-12
    calls = []
    model.transformer_blocks[1].norm2.register_forward_hook(lambda *_: calls.append(1))
    results(model, FP64)
    assert calls == [1]
    assert [line.split(": ")[1] for line in said()] == [
        "feed-forward chunking", "the attention processor Other", "hooks on its LayerNorm",
    ]  # fmt: skip


def test_packed_projections_of_sd3_run_the_blocks_own_forward(said):
    """Its processor there leaves out the QK norms."""
    model = build("SD3.5 Large", FP64)
    model.fuse_qkv_projections()
    truth = results(model, FP64)
    assert_equal(results(fuse_mmdit(model), FP64), truth)
    assert said()[0].endswith("the attention processor FusedJointAttnProcessor2_0")


def test_diffusers_own_backend_is_obeyed(said):
    model = fuse_mmdit(build("FLUX dev"))
    model.set_attention_backend("native")
    results(model, FP32)
    assert said()[0].endswith("the processor's attention_backend")


def test_attention_argument(caplog, monkeypatch):
    from senseflow_kernels import attention

    monkeypatch.setattr(attention, "_choices", {})
    caplog.set_level(logging.INFO, "senseflow_kernels")
    model = fuse_mmdit(build("SD3", FP64), attention="math")
    results(model, FP64)
    lines = [r.getMessage() for r in caplog.records if "attention runs on" in r.getMessage()]
    assert lines and all("runs on math" in line for line in lines)
    with pytest.raises(ValueError, match="attention backend 'fast' is unknown"):
        fuse_mmdit(model, attention="fast")
    assert "_senseflow" in model.transformer_blocks[0].__dict__  # still as it was


# -- what stays as it was ------------------------------------------------------------------------------------------


def state(model):
    """Every module's own attributes but its tensors, by identity; the state dict's keys."""
    own = [
        {k: id(v) for k, v in vars(m).items() if k not in ("_senseflow", "forward", "_compiled_call_impl")}
        for m in model.modules()
    ]
    return own, list(model.state_dict()), [name for name, _ in model.named_modules()]


@pytest.mark.parametrize("compile", [False, "aot_eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_unfuse_restores(name, compile):
    model = build(name)
    before, weights = state(model), copy.deepcopy(model.state_dict())
    attributes = [set(vars(block)) for _, _, block in mmdit._blocks(model)]
    own = results(model, FP32)
    assert fuse_mmdit(model, compile=compile) is model
    assert state(model) == before
    fuse_mmdit(model, compile=compile)  # again: as once
    assert unfuse_mmdit(model) is model and unfuse_mmdit(model) is model
    assert state(model) == before
    assert [set(vars(block)) for _, _, block in mmdit._blocks(model)] == attributes
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert_equal(results(model, FP32), own)


def test_keeps_a_compiled_block_compiled():
    model = build("SD3")
    model.transformer_blocks[0].compile(backend="eager")
    before = model.transformer_blocks[0]._compiled_call_impl
    unfuse_mmdit(fuse_mmdit(model, compile="aot_eager"))
    assert model.transformer_blocks[0]._compiled_call_impl is before
    assert "_compiled_call_impl" not in vars(model.transformer_blocks[1])


def test_copy_is_fused_and_its_own():
    model = fuse_mmdit(build("SD3", FP64))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    own = unfuse_mmdit(copy.deepcopy(twin))
    assert_close(results(twin, FP64), results(own, FP64), 1e-6)
    assert twin.transformer_blocks[0].forward.__self__ is twin.transformer_blocks[0]
    assert errors(results(model, FP64), results(twin, FP64))["output"] > 0.01


def test_saved_model_loads_into_diffusers(tmp_path):
    model = fuse_mmdit(build("FLUX dev"))
    model.save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


# -- refusals ------------------------------------------------------------------------------------------------------


def test_unknown_model():
    with pytest.raises(ValueError, match="diffusers' SD3Transformer2DModel and FluxTransformer2DModel, not Linear"):
        fuse_mmdit(nn.Linear(2, 2))


def changed_norm(block):
    block.norm2.eps = 1e-5


def changed_width(block):
    block.norm1_context.linear = nn.Linear(32, 64)


def changed_qk_norm(block):
    block.attn.norm_q = nn.LayerNorm(16)


def missing_part(block):
    del block.attn.add_v_proj


CHANGES = {
    changed_norm: r"transformer_blocks.1.norm2: class, eps, affine should be \('LayerNorm', 1e-06, False\), is .*1e-05",
    changed_width: "transformer_blocks.1.norm1_context.linear.out_features should be 192, is 64",
    changed_qk_norm: "transformer_blocks.1.attn.norm_q's class should be 'RMSNorm', is 'LayerNorm'",
    missing_part: "transformer_blocks.1 should be complete, is without 'add_v_proj'",
}


@pytest.mark.parametrize("change", CHANGES)
def test_unknown_diffusers_leaves_the_model_alone(change):
    model = sd3(qk_norm="rms_norm", num_layers=3)
    change(model.transformer_blocks[1])
    with pytest.raises(ValueError, match=r"does not know this diffusers \(.*\): " + CHANGES[change]):
        fuse_mmdit(model)
    assert not [block for block in model.transformer_blocks if "forward" in vars(block)]


def test_unknown_signature(monkeypatch):
    def forward(self, hidden_states, encoder_hidden_states, temb, mask=None):
        pass

    monkeypatch.setattr(JointTransformerBlock, "forward", forward)
    with pytest.raises(ValueError, match=r"forward's parameters of JointTransformerBlock should be .*'mask'\]"):
        fuse_mmdit(build("SD3"))


def test_replaced_forwards():
    model = build("SD3")
    block = model.transformer_blocks[0]
    block.forward = block.forward
    with pytest.raises(ValueError, match="transformer_blocks.0 has a forward of its own.*fuse_mmdit goes first"):
        fuse_mmdit(model)
    del block.forward
    fuse_mmdit(model)
    block.forward = lambda *a, **k: None
    with pytest.raises(ValueError, match=r"transformer_blocks.0.forward was replaced after fuse_mmdit"):
        unfuse_mmdit(model)


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
    assert rms[0] <= 1.1 * rms[1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_gpu_fp32(name):
    """TF32 stays off by default, so the bound is that of the CPU."""
    model = build(name, FP32, **WIDE[name])
    truth = results(copy.deepcopy(model).double(), FP64)
    assert_close(results(fuse_mmdit(model.to("cuda")), FP32, kernels=True), truth)
