"""What fuse_mmdit leaves to diffusers, what stays as it was, what it refuses."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from mmdit_truth import (
    FAMILIES,
    FP32,
    FP64,
    assert_close,
    assert_equal,
    build,
    errors,
    results,
    sd3,
)

from senseflow_kernels import _mmdit_blocks, fuse_mmdit, mmdit, unfuse_mmdit

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


@pytest.mark.parametrize("part", ["attn.norm_q", "attn.norm_added_k", "attn2.norm_k", "norm1.norm", "norm1_context"])
def test_hooks_on_parts_run_the_blocks_own_forward(said, part):
    """Each of these modules is bypassed: a fused forward would pass by the hook in silence."""
    model = fuse_mmdit(build("SD3.5 Medium"))
    calls = []
    model.transformer_blocks[0].get_submodule(part).register_forward_hook(lambda *_: calls.append(1))
    results(model, FP32)
    assert calls == [1] and "hooks on its" in said()[0]


def test_replaced_forward_of_attention_runs(said):
    """As diffusers' caches (pyramid attention broadcast) and accelerate's offload replace it."""
    model, calls = fuse_mmdit(build("FLUX dev")), []
    attn = model.single_transformer_blocks[0].attn
    own = attn.forward
    attn.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    results(model, FP32)
    assert calls == [1] and said()[0].endswith("another forward on its FluxAttention")


def test_processors_with_weights_run_the_blocks_own_forward(said):
    """IP-Adapter's is a module: it does not lie where other processors do."""
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    model = build("SD3", FP64)
    for block in model.transformer_blocks:
        sizes = dict(hidden_size=32, ip_hidden_states_dim=12, head_dim=16, timesteps_emb_dim=8)
        block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(**sizes).double())
    prompt = dict(ip_hidden_states=torch.randn(2, 3, 12, dtype=FP64), temb=torch.randn(2, 8, dtype=FP64))
    for extra in (None, dict(joint_attention_kwargs=prompt)):
        truth = results(unfuse_mmdit(model), FP64, extra)
        assert_equal(results(fuse_mmdit(model), FP64, extra), truth)
    assert "the attention processor SD3IPAdapterJointAttnProcessor2_0" in said()[0]
    assert "joint_attention_kwargs ['ip_hidden_states', 'temb']" in said()[1]


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


def test_keeps_what_was_compiled_since():
    model = fuse_mmdit(build("SD3"))
    model.transformer_blocks[0].compile(backend="eager")
    mine = model.transformer_blocks[0]._compiled_call_impl
    assert unfuse_mmdit(model).transformer_blocks[0]._compiled_call_impl is mine
    fuse_mmdit(model, compile="aot_eager").transformer_blocks[1].compile(backend="eager")
    mine = model.transformer_blocks[1]._compiled_call_impl
    assert unfuse_mmdit(model).transformer_blocks[1]._compiled_call_impl is mine


@pytest.mark.parametrize("compile", [False, "aot_eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_pickled_model_is_fused(name, compile):
    """torch.save of a whole module, and what a process is handed."""
    model = fuse_mmdit(build(name), attention="math", compile=compile)
    loaded = pickle.loads(pickle.dumps(model))
    for _, kind, block in mmdit._blocks(loaded):
        assert block.forward.func is kind.forward and block.forward.args == (block,)
        assert block._senseflow == mmdit.Fused("math")
    assert_equal(results(loaded, FP32), results(fuse_mmdit(model, attention="math"), FP32))


def test_copy_is_fused_and_its_own():
    model = fuse_mmdit(build("SD3", FP64))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    own = unfuse_mmdit(copy.deepcopy(twin))
    assert_close(results(twin, FP64), results(own, FP64), 1e-6)
    assert twin.transformer_blocks[0].forward.args[0] is twin.transformer_blocks[0]
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
    with pytest.raises(ValueError, match=r"transformer_blocks.0 has a forward of its own.*fuse_mmdit goes first"):
        fuse_mmdit(model)
    del block.forward
    fuse_mmdit(model)
    block.forward = lambda *a, **k: None
    with pytest.raises(ValueError, match=r"transformer_blocks.0.forward was replaced after fuse_mmdit"):
        unfuse_mmdit(model)
