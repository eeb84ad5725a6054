"""Original tensor names against diffusers' own conversion, which reads them back: same tensors, none left over."""

import inspect

import pytest
import torch
from students import WRITE, make_run

from senseflow.config import UserError
from senseflow.single_file import original_names, save_single_file

diffusers = pytest.importorskip("diffusers")
from diffusers.loaders import single_file_model, single_file_utils  # noqa: E402

SD3 = dict(sample_size=128, attention_head_dim=64, joint_attention_dim=4096, pooled_projection_dim=2048,
           out_channels=16, qk_norm="rms_norm")  # fmt: skip
SDXL = dict(
    sample_size=128, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(320, 640, 1280),
    transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
    use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)  # fmt: skip
# Published configs: family, class, config, number of tensors in the original file.
PUBLISHED = {
    "sd35-large": ("sd35", "SD3Transformer2DModel", SD3 | dict(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192)),
    "sd35-medium": ("sd35", "SD3Transformer2DModel", SD3 | dict(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)))),
    "flux-student": ("flux", "FluxTransformer2DModel", dict(guidance_embeds=False)),
    "flux-dev": ("flux", "FluxTransformer2DModel", dict(guidance_embeds=True)),
    "sdxl": ("sdxl", "UNet2DConditionModel", SDXL),
}  # fmt: skip
CONVERT = {
    "sd35": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "sdxl": single_file_utils.convert_ldm_unet_checkpoint,
}


def thin(net) -> dict[str, torch.Tensor]:
    """A random tensor for each of a network's, of its true number of rows and one column: all that conversion cuts."""
    g = torch.Generator().manual_seed(0)
    return {k: torch.randn(t.shape[0], *[1] * (t.dim() - 1), generator=g) for k, t in net.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_come_back_whole(name):
    family, cls, config = PUBLISHED[name]
    with torch.device("meta"):
        net = getattr(diffusers, cls)(**config)
    state = thin(net)
    original = original_names(family, state)
    count = len(original)
    back = CONVERT[family](original, config=dict(net.config))
    assert set(back) == set(state)
    assert all(torch.equal(back[k], state[k]) for k in state)
    if family == "sdxl":  # one to one; the other two converters take what they read out of the dict
        assert count == len(state) == 1680
    else:
        assert len(original) == 0
    if name == "flux-dev":
        assert count == 780  # tensors of the published flux1-dev.safetensors


def test_names_are_the_releases():
    """A few names that everyone's readers look for."""
    with torch.device("meta"):
        sd3 = diffusers.SD3Transformer2DModel(num_layers=2, qk_norm="rms_norm", dual_attention_layers=(0,))
        xl = diffusers.UNet2DConditionModel(**SDXL)
    names = original_names("sd35", thin(sd3))
    for name in ("joint_blocks.0.context_block.attn.qkv.weight", "joint_blocks.0.x_block.attn2.ln_k.weight",
                 "pos_embed", "final_layer.adaLN_modulation.1.weight"):  # fmt: skip
        assert "model.diffusion_model." + name in names
    assert "model.diffusion_model.joint_blocks.1.context_block.mlp.fc1.weight" not in names
    names = original_names("sdxl", thin(xl))
    for name in ("input_blocks.3.0.op.weight", "input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight",
                 "middle_block.2.out_layers.3.bias", "output_blocks.5.2.conv.bias", "label_emb.0.2.weight",
                 "output_blocks.8.0.skip_connection.weight"):  # fmt: skip
        assert "model.diffusion_model." + name in names


def test_what_does_not_fit_is_said():
    with torch.device("meta"):
        net = diffusers.SD3Transformer2DModel(num_layers=2, qk_norm="rms_norm")
    state = thin(net)
    with pytest.raises(UserError, match=r"no place for transformer_blocks\.0\.extra \(1 in all\)"):
        original_names("sd35", state | {"transformer_blocks.0.extra": torch.zeros(1)})
    del state["proj_out.bias"]
    with pytest.raises(UserError, match=r"a place without tensor: proj_out\.bias"):
        original_names("sd35", state)
    with pytest.raises(UserError, match="family 'embedded' has no single-file layout"):
        original_names("embedded", state)


def flux_of_width(width: int):
    """diffusers' own converter, with the one number in it that is FLUX.1's width."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    space = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), space)
    return space["convert_flux_transformer_checkpoint_to_diffusers"]


@pytest.mark.parametrize("preset", ["sd35-medium", "flux-dev", "sdxl"])
def test_from_single_file_gives_the_same_network(preset, tmp_path, monkeypatch):
    teacher = WRITE[preset](tmp_path / "teacher")
    net = make_run(preset, teacher, tmp_path / "run")[0]
    family = {"sd35-medium": "sd35", "flux-dev": "flux", "sdxl": "sdxl"}[preset]
    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", flux_of_width(32))
    file = tmp_path / "student.safetensors"
    save_single_file(file, family, net.state_dict(), {"anchors": [1.0]})
    part = "unet" if family == "sdxl" else "transformer"
    more = {"guidance_embeds": False} if family == "flux" else {}
    again = type(net).from_single_file(str(file), config=str(teacher), subfolder=part, local_files_only=True, **more)
    mine, theirs = net.state_dict(), again.state_dict()
    assert set(mine) == set(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)
