"""The public checkpoints at true size on the meta device: counts, memory, blocks, names of their single files."""

from functools import cache

import original_names as original
import pytest
import torch

from senseflow.config import UserError
from senseflow.models.flux import FluxAdapter
from senseflow.models.public import CHECKPOINTS, build, count, gigabytes
from senseflow.models.sd3 import SD3Adapter
from senseflow.models.sdxl import SDXLAdapter
from senseflow.presets import PRESETS

diffusers = pytest.importorskip("diffusers")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
network = cache(lambda name: build(CHECKPOINTS[name].network))
has_klein = pytest.mark.skipif(not hasattr(diffusers, "Flux2Transformer2DModel"), reason="diffusers without FLUX.2")

# what the model cards round to 2.5 (226 M of positions counted), 8.1, 12, 2.6 and 4 billion
COUNTS = {
    "sd35-medium": 2_243_171_520, "sd35-large": 8_056_627_520, "flux-dev": 11_901_408_320, "sdxl": 2_567_463_684,
    "flux2-klein": 3_875_544_576,
}  # fmt: skip
NAMES = [pytest.param(name, marks=has_klein if name == "flux2-klein" else ()) for name in COUNTS]


def shapes(net):
    return {k: tuple(v.shape) for k, v in net.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_by_arithmetic(name):
    """Against the sum over the publisher's own names, which knows nothing of diffusers' classes."""
    table = {
        "sd35-medium": lambda: original.sd35(24, 13, 384), "sd35-large": lambda: original.sd35(38, 0, 192),
        "flux-dev": original.flux, "sdxl": original.sdxl, "flux2-klein": original.klein,
    }[name]()  # fmt: skip
    positions = [s for k, s in table.items() if k.endswith("pos_embed")]
    whole = sum(torch.Size(s).numel() for s in table.values())
    net = network(name)
    assert whole - sum(torch.Size(s).numel() for s in positions) == COUNTS[name]
    assert sum(p.numel() for p in net.parameters()) == COUNTS[name] and count(net) == whole
    assert all(p.is_meta for p in net.parameters())


@pytest.mark.parametrize(("name", "adapter", "numbers"), [
    ("sd35-medium", SD3Adapter, [24]), ("sd35-large", SD3Adapter, [38]), ("flux-dev", FluxAdapter, [19, 38]),
    ("sdxl", SDXLAdapter, [3, 1, 3]),
])  # fmt: skip
def test_blocks_hold_nearly_all(name, adapter, numbers):
    """What is sharded, compiled or checkpointed by itself: in number and order as published, with > 95 % of the
    weights, each parameter in one block."""
    net = network(name)
    blocks = adapter.blocks(None, net)
    kinds = [type(b).__name__ for b in blocks]
    runs = [len([k for k in kinds if k == kind]) for kind in dict.fromkeys(kinds)]
    assert sum(numbers) == len(blocks) and (name == "sdxl" or runs == numbers)
    inside = [id(p) for b in blocks for p in b.parameters()]
    assert len(inside) == len(set(inside))
    share = sum(p.numel() for b in blocks for p in b.parameters()) / COUNTS[name]
    assert 0.95 < share < 1


@pytest.mark.parametrize(("name", "want"), [
    ("sd35-medium", dict(network=4.94, vae=0.168, text=11.16)),
    ("sd35-large", dict(network=16.29, vae=0.168, text=11.16)),
    ("flux-dev", dict(network=23.80, vae=0.168, text=9.77)), ("sdxl", dict(network=5.13, vae=0.167, text=1.64)),
])  # fmt: skip
def test_memory_of_each_part(name, want):
    """bf16 GB: 2 bytes x (count above; VAE 83.8 M; CLIP-L 123 M, CLIP-G 695 M, T5-XXL 4762 M)."""
    assert gigabytes(name) == pytest.approx(want, abs=5e-3)


def test_weights_in_memory_full_and_lora():
    """The table of docs/lora.md, FLUX.1-dev: fp32 student and fake with gradients and moments over a bf16 teacher,
    against rank 64 on every Linear of the blocks. GB; activations come on top."""
    net = network("flux-dev")
    linears = [m for b in FluxAdapter.blocks(None, net) for m in b.modules() if isinstance(m, torch.nn.Linear)]
    a, b = (64 * sum(getattr(m, side) for m in linears) for side in ("in_features", "out_features"))
    full = COUNTS["flux-dev"] * (2 + 2 * 16) / 1e9
    lora = (COUNTS["flux-dev"] * 2 + a * 4 + 2 * b * 16) / 1e9
    assert (round(full, 1), round(lora, 1)) == (404.6, 30.6)


CONVERT = {
    "sd35-medium": (lambda: original.sd35(24, 13, 384), "convert_sd3_transformer_checkpoint_to_diffusers"),
    "sd35-large": (lambda: original.sd35(38, 0, 192), "convert_sd3_transformer_checkpoint_to_diffusers"),
    "flux-dev": (original.flux, "convert_flux_transformer_checkpoint_to_diffusers"),
    "sdxl": (original.sdxl, "convert_ldm_unet_checkpoint"),
    "flux2-klein": (original.klein, "convert_flux2_transformer_checkpoint_to_diffusers"),
}


@pytest.mark.parametrize("name", NAMES)
def test_single_file_names_map_without_leftovers(name):
    """The publisher's names through diffusers' own conversion: every name and shape of the network, nothing over."""
    table, convert = CONVERT[name]
    file = {k: torch.empty(shape, device="meta") for k, shape in table().items()}
    tensors, more = list(file.values()), {} if name != "sdxl" else {"config": CHECKPOINTS["sdxl"].network[1]}
    converted = getattr(single_file, convert)(file, **more)
    assert {k: tuple(v.shape) for k, v in converted.items()} == shapes(network(name))
    if name == "sdxl":  # that conversion copies, the others take away
        assert {id(t) for t in tensors} == {id(t) for t in converted.values()}
    else:
        assert not file


@pytest.mark.parametrize(
    ("name", "channels", "quant"), [("sd35-large", 16, False), ("flux-dev", 16, False), ("sdxl", 4, True)]
)
def test_vae_names_map_without_leftovers(name, channels, quant):
    net = build(CHECKPOINTS[name].vae)
    file = {k: torch.empty(shape, device="meta") for k, shape in original.vae(channels, quant).items()}
    number = sum(t.numel() for t in file.values())
    converted = single_file.convert_ldm_vae_checkpoint(file, net.config)
    assert {k: tuple(v.shape) for k, v in converted.items()} == shapes(net)
    assert sum(t.numel() for t in converted.values()) == number
    if quant:
        assert net.config.scaling_factor == 0.13025


def test_presets_are_of_these():
    assert {name.removesuffix("-dmd2") for name in PRESETS} - {"tiny", "dmd2"} <= set(CHECKPOINTS)
    with pytest.raises(UserError, match="has no Flux9Transformer: install a newer one"):
        build(("Flux9Transformer", {}))
