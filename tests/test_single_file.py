"""Original tensor names against diffusers' own conversion, which reads them back: same tensors, none left over."""

import inspect
from functools import cache

import original_names as published
import pytest
import torch
from students import WRITE, make_run

from senseflow.config import UserError
from senseflow.models.public import CHECKPOINTS, build
from senseflow.single_file import original_names, save_single_file

diffusers = pytest.importorskip("diffusers")
from diffusers.loaders import single_file_model, single_file_utils  # noqa: E402

has_klein = pytest.mark.skipif(not hasattr(diffusers, "Flux2Transformer2DModel"), reason="diffusers without FLUX.2")
# Published checkpoints, and FLUX.1-dev as its student: without the guidance embedding.
TABLES = {
    "sd35-large": lambda: published.sd35(38, 0, 192), "sd35-medium": lambda: published.sd35(24, 13, 384),
    "flux-dev": published.flux, "sdxl": published.sdxl, "flux2-klein": published.klein,
    "flux-student": lambda: {k: v for k, v in published.flux().items() if "guidance_in" not in k},
}  # fmt: skip
NAMES = [pytest.param(name, marks=has_klein if name == "flux2-klein" else ()) for name in TABLES]
CONVERT = {
    "sd35": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "sdxl": single_file_utils.convert_ldm_unet_checkpoint,
    "flux2": getattr(single_file_utils, "convert_flux2_transformer_checkpoint_to_diffusers", None),
}


def family_of(name: str) -> str:
    return "sd35" if name.startswith("sd35") else name.partition("-")[0]


@cache
def network(name: str):
    """At true size, on the meta device."""
    cls, config = CHECKPOINTS["flux-dev" if name == "flux-student" else name].network
    return build((cls, config | {"guidance_embeds": False} if name == "flux-student" else config))


def thin(net) -> dict[str, torch.Tensor]:
    """A random tensor for each of a network's, of its true number of rows and one column: all that conversion cuts."""
    g = torch.Generator().manual_seed(0)
    return {k: torch.randn(t.shape[0], *[1] * (t.dim() - 1), generator=g) for k, t in net.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_the_releases(name):
    """Against tables written from the publishers' formats: every name, every shape, none more."""
    found = original_names(family_of(name), network(name).state_dict())
    assert {k: tuple(v.shape) for k, v in found.items()} == TABLES[name]()


@pytest.mark.parametrize("name", NAMES)
def test_published_sizes_come_back_whole(name):
    net, family = network(name), family_of(name)
    state = thin(net)
    given = dict(state)
    original = original_names(family, given)
    assert not given  # each tensor is let go, or two copies of a network would be in memory
    back = CONVERT[family](original, config=dict(net.config))
    assert set(back) == set(state)
    assert all(torch.equal(back[k], state[k]) for k in state)
    if family != "sdxl":  # a converter takes what it reads out of the dict; SDXL's reads one to one
        assert len(original) == 0


def test_what_does_not_fit_is_said():
    state = thin(network("sd35-large"))
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


@pytest.mark.parametrize("preset", ["sd35-medium", "flux-dev", "sdxl", pytest.param("flux2-klein", marks=has_klein)])
def test_from_single_file_gives_the_same_network(preset, tmp_path, monkeypatch):
    teacher = WRITE[preset](tmp_path / "teacher")
    net = make_run(preset, teacher, tmp_path / "run")[0]
    family = family_of(preset)
    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", flux_of_width(32))
    file = tmp_path / "student.safetensors"
    save_single_file(file, family, net.state_dict(), {"anchors": [1.0]})
    part = "unet" if family == "sdxl" else "transformer"
    more = {"guidance_embeds": False} if family == "flux" else {}
    again = type(net).from_single_file(str(file), config=str(teacher), subfolder=part, local_files_only=True, **more)
    mine, theirs = net.state_dict(), again.state_dict()
    assert set(mine) == set(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)
