"""The real families' adapters against diffusers' own pipelines, on tiny random checkpoints of the same classes."""

import json
import sys

import pytest
import torch
from tiny_pipelines import write_flux, write_klein, write_sd3, write_sdxl

from senseflow.algo.dmd import dmd_term
from senseflow.algo.rollout import sample_euler, sample_renoise
from senseflow.config import UserError
from senseflow.models import vae as autoencoder
from senseflow.models.adapter import Condition
from senseflow.models.flux import FluxAdapter, pack, unpack
from senseflow.models.flux2 import Flux2Adapter, patchify, unpatchify
from senseflow.models.sd3 import SD3Adapter
from senseflow.models.sdxl import SDXLAdapter
from senseflow.presets import PRESETS
from senseflow.steps import text_vector

diffusers = pytest.importorskip("diffusers")
PROMPTS = ["a red apple", "penguin"]
SIDE = 64
FAMILIES = ["sd3", "sd3-medium", "flux", "sdxl", "flux2"]
KLEIN_MU = 1.94522  # what Flux2KleinPipeline gives 16 tokens in 4 steps


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    medium = write_sd3(root / "sd3-medium", medium=True)
    return {
        "sd3": write_sd3(root / "sd3"), "sd3-medium": medium, "flux": write_flux(root / "flux"),
        "sdxl": write_sdxl(root / "sdxl"), "flux2": write_klein(root / "flux2"),
    }  # fmt: skip


def adapter_of(family: str, folders):
    if family == "flux":
        return FluxAdapter(folders[family], SIDE, text_length=32)
    if family == "flux2":
        return Flux2Adapter(folders[family], SIDE, KLEIN_MU, text_length=32)
    if family == "sdxl":
        return SDXLAdapter(folders[family], SIDE)
    return SD3Adapter(folders[family], SIDE, text_length=32)


def pipeline_of(family: str, folders):
    cls = {"flux": "FluxPipeline", "sdxl": "StableDiffusionXLPipeline", "flux2": "Flux2KleinPipeline"}
    cls = getattr(diffusers, cls.get(family, "StableDiffusion3Pipeline"))
    pipe = cls.from_pretrained(folders[family], local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def normal(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, what: str):
    """fp32 rounding through a network: relative to the whole tensor, 1e-5."""
    assert (a.double() - b.double()).norm() <= 1e-5 * b.double().norm(), what


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_encoded_as_the_pipeline_does(family, folders):
    adapter, pipe = adapter_of(family, folders), pipeline_of(family, folders)
    cond = adapter.encode_prompts(PROMPTS)
    if family == "flux":
        embeds, pooled, _ = pipe.encode_prompt(PROMPTS, None, max_sequence_length=32)
        assert adapter.uncond(2) is None
    elif family == "flux2":
        embeds, _ = pipe.encode_prompt(PROMPTS, max_sequence_length=32)
        close(adapter.uncond(2).embeds, pipe.encode_prompt(["", ""], max_sequence_length=32)[0], "empty prompt")
        last = embeds[[0, 1], [19 + 11 - 1, 19 + 7 - 1]]  # of 19 tokens of template and the prompt's letters
        pooled = (last - last.mean(1, keepdim=True)) / (last.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    elif family == "sdxl":
        embeds, no_embeds, pooled, no_pooled = pipe.encode_prompt(PROMPTS)
        empty = adapter.uncond(2)
        assert torch.equal(empty.embeds, no_embeds) and torch.equal(empty.pooled, no_pooled)
        assert no_embeds.abs().sum() == 0
    else:
        embeds, no_embeds, pooled, no_pooled = pipe.encode_prompt(PROMPTS, None, None, max_sequence_length=32)
        empty = adapter.uncond(2)
        close(empty.embeds, no_embeds, "empty prompt")
        close(empty.pooled, no_pooled, "empty prompt")
    close(cond.embeds, embeds, "embeds")
    close(cond.pooled, pooled, "pooled")
    assert (cond.embeds[0] - cond.embeds[1]).abs().max() > 1e-3  # prompts do make a difference


def pipeline_latents(family, folders, noise, steps, guidance, sigmas=None):
    """What the diffusers pipeline makes of `noise` [B, C, H, W], as latents, and the sigmas it went through."""
    pipe = pipeline_of(family, folders)
    kwargs = dict(prompt=PROMPTS, height=SIDE, width=SIDE, output_type="latent", guidance_scale=guidance)
    if family == "sdxl":
        pipe.scheduler = diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
            clip_sample=False, set_alpha_to_one=True,
        )  # fmt: skip
        out = pipe(latents=noise, num_inference_steps=steps, **kwargs).images
        alphas = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps]
        return out, [*(1 - alphas.double()).sqrt().tolist(), 0.0]
    if family == "flux2":  # it hands out the VAE's latents
        out = pipe(latents=noise, num_inference_steps=steps, sigmas=sigmas, max_sequence_length=32, **kwargs).images
        bn = pipe.vae.bn
        mean, std = bn.running_mean.view(1, -1, 1, 1), (bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()
        return (patchify(out) - mean) / std.view(1, -1, 1, 1), pipe.scheduler.sigmas.tolist()
    latents = pack(noise) if family == "flux" else noise
    out = pipe(latents=latents, num_inference_steps=steps, sigmas=sigmas, max_sequence_length=32, **kwargs).images
    if family == "flux":
        out = unpack(out, *noise.shape[2:])
    return out, pipe.scheduler.sigmas.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_sampling_is_the_pipelines(family, folders):
    """Every denoising call, guidance included: the latents after 4 steps agree."""
    adapter = adapter_of(family, folders)
    net = adapter.load_network(torch.float32)
    noise = normal((2, *adapter.latent_shape))
    want, sigmas = pipeline_latents(family, folders, noise, 4, 3.5)
    cond, w = adapter.encode_prompts(PROMPTS), torch.full((2,), 3.5)
    got = sample_euler(adapter, net, noise, sigmas, cond, w, adapter.uncond(2))
    close(got, want, "latents")
    other = sample_euler(adapter, net, noise, sigmas, cond, w + 1, adapter.uncond(2))
    assert (other - got).norm() > 1e-3 * got.norm()  # guidance does act


@pytest.mark.parametrize("family", ["sd3", "flux", "flux2"])
def test_student_in_four_steps_is_the_pipelines(family, folders):
    """Euler at the training anchors: SD 3.5 with sigmas=[1, .75, .5, .25] and guidance 1 under its shift 3; FLUX.2
    [klein] with 4 steps and guidance 1, nothing more."""
    adapter = adapter_of(family, folders)
    net = adapter.load_network(torch.float32)
    noise, cond = normal((2, *adapter.latent_shape)), adapter.encode_prompts(PROMPTS)
    if family == "sd3":
        want, sigmas = pipeline_latents(family, folders, noise, 4, 1.0, [1, 0.75, 0.5, 0.25])
        assert sigmas[:4] == pytest.approx(adapter.schedule.anchors(4), abs=1e-7)
        got = sample_euler(adapter, net, noise, [*adapter.schedule.anchors(4), 0.0], cond)
    elif family == "flux2":
        want, sigmas = pipeline_latents(family, folders, noise, 4, 1.0)
        assert sigmas[:4] == pytest.approx(adapter.schedule.anchors(4), abs=1e-5)  # mu is given to five digits
        got = sample_euler(adapter, net, noise, sigmas, cond)
    else:
        student = adapter.student_of(net)
        pipe = pipeline_of(family, folders)
        pipe.transformer = student
        ratio = float(torch.tensor(1.15).exp())
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=ratio, use_dynamic_shifting=False)
        want = pipe(
            PROMPTS, height=SIDE, width=SIDE, latents=pack(noise), num_inference_steps=4, sigmas=[1, 0.75, 0.5, 0.25],
            max_sequence_length=32, output_type="latent",
        ).images  # fmt: skip
        want = unpack(want, *noise.shape[2:])
        assert pipe.scheduler.sigmas[:4].tolist() == pytest.approx(adapter.schedule.anchors(4), abs=1e-6)
        got = sample_euler(adapter, student, noise, [*adapter.schedule.anchors(4), 0.0], cond)
    close(got, want, "latents")


def test_renoise_is_the_stochastic_scheduler(folders, monkeypatch):
    """diffusers' stochastic_sampling=True with the same fresh noises."""
    adapter = adapter_of("sd3", folders)
    net, pipe = adapter.load_network(torch.float32), pipeline_of("sd3", folders)
    noises = [normal((2, *adapter.latent_shape), i) for i in range(5)]
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    fresh = iter(noises[1:])
    module = "diffusers.schedulers.scheduling_flow_match_euler_discrete"
    if hasattr(sys.modules[module], "randn_tensor"):  # before 0.42 torch.randn_like
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: next(fresh))
    else:
        monkeypatch.setattr(torch, "randn_like", lambda _: next(fresh))
    want = pipe(
        PROMPTS, height=SIDE, width=SIDE, latents=noises[0], sigmas=[1, 0.75, 0.5, 0.25], num_inference_steps=4,
        guidance_scale=1.0, max_sequence_length=32, output_type="latent",
    ).images  # fmt: skip
    monkeypatch.undo()
    got = sample_renoise(adapter, net, noises[:4], adapter.schedule.anchors(4), adapter.encode_prompts(PROMPTS))
    close(got, want, "latents")


def test_flux_student_has_no_guidance_embedding(folders):
    """It is the teacher where the guidance embedding adds nothing, and its state dict lacks those four tensors."""
    adapter = adapter_of("flux", folders)
    teacher = adapter.load_network(torch.float32)
    student = adapter.student_of(teacher)
    missing = set(teacher.state_dict()) - set(student.state_dict())
    assert len(missing) == 4 and all("guidance_embedder" in name for name in missing)
    assert not set(student.state_dict()) - set(teacher.state_dict())
    x, sigma, cond = normal((2, *adapter.latent_shape)), torch.tensor([0.3, 0.9]), adapter.encode_prompts(PROMPTS)
    with pytest.raises(ValueError, match="embeds its guidance"):
        adapter.predict(teacher, x, sigma, cond)
    last = teacher.time_text_embed.guidance_embedder.linear_2
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
        close(adapter.predict(student, x, sigma, cond), adapter.predict(teacher, x, sigma, cond, sigma), "velocity")


def test_disc_text_is_clip_l_alone(folders):
    """disc.text clip-l: the first encoder's own vector, by transformers. The other families have none, and say so."""
    for family, encode in (
        ("sd3", lambda pipe, ids: pipe.text_encoder(ids).text_embeds),
        ("flux", lambda pipe, ids: pipe.text_encoder(ids).pooler_output),
    ):
        adapter, pipe = adapter_of(family, folders), pipeline_of(family, folders)
        cond = adapter.encode_prompts(PROMPTS)
        ids = pipe.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            close(text_vector(adapter, "clip-l", cond), encode(pipe, ids), family)
        assert text_vector(adapter, "pooled", cond) is cond.pooled
    assert cond.pooled.shape[1] == 16 and adapter_of("sd3", folders).encode_prompts(PROMPTS).pooled.shape[1] == 32
    fresh = adapter_of("sd3", folders)  # with a cache, whose prompts come without the encoder
    assert text_vector(fresh, "clip-l", Condition(torch.zeros(1, 1, 32), torch.ones(1, 32))).shape == (1, 16)
    assert "text" not in vars(fresh)
    with pytest.raises(UserError, match=r"disc\.text = 'clip-l': this family's conditioning has no CLIP"):
        text_vector(adapter_of("sdxl", folders), "clip-l", cond)


def test_klein_preset_has_the_pipelines_own_shifts():
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    preset = PRESETS["flux2-klein"]()
    assert preset.model.shift == pytest.approx(compute_empirical_mu(4096, 4), abs=1e-5)
    assert preset.eval.teacher_shift == pytest.approx(compute_empirical_mu(4096, 50), abs=1e-5)
    assert pytest.approx(compute_empirical_mu(16, 4), abs=1e-4) == KLEIN_MU


def test_what_is_no_klein_teacher(tmp_path, folders):
    distilled = Flux2Adapter(write_klein(tmp_path / "distilled", distilled=True), SIDE, text_length=32)
    with pytest.raises(UserError, match=r"distilled checkpoint: allowed are FLUX\.2 \[klein\] base"):
        distilled.encode_prompts(PROMPTS)
    folder = tmp_path / "distilled" / "transformer"
    net = diffusers.Flux2Transformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False)
    diffusers.Flux2Transformer2DModel.from_config({**net.config, "guidance_embeds": True}).save_pretrained(folder)
    with pytest.raises(UserError, match="embeds its guidance"):
        distilled.load_network(torch.float32)


def test_packing_is_the_pipelines():
    x = normal((2, 16, 6, 10))
    want = diffusers.FluxPipeline._pack_latents(x, 2, 16, 6, 10)
    assert torch.equal(pack(x), want)
    assert torch.equal(unpack(want, 6, 10), x)
    want = diffusers.Flux2KleinPipeline._patchify_latents(x)
    assert torch.equal(patchify(x), want) and torch.equal(unpatchify(want), x)


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_and_pixels(family, folders):
    """(z - shift) scale both ways, as the pipelines' VAE calls; gradients reach the latents and stop at the VAE."""
    adapter, pipe = adapter_of(family, folders), pipeline_of(family, folders)
    pixels, noise = normal((2, 3, SIDE, SIDE)).tanh(), normal((2, *adapter.latent_shape), 1)
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    config = pipe.vae.config
    if family == "flux2":
        z = posterior.mean + posterior.std * unpatchify(noise)
        bn = pipe.vae.bn.eval()  # in inference it normalises by the statistics it holds
        want = bn(pipe._patchify_latents(z))
    else:
        z = posterior.mean + posterior.std * noise
        want = (z - (config.shift_factor or 0)) * config.scaling_factor
    latents = adapter.encode(pixels, noise)
    close(latents, want, "encode")
    latents.requires_grad_()
    decoded = adapter.decode(latents)
    with torch.no_grad():
        close(decoded, pipe.vae.decode(z, return_dict=False)[0], "decode")
    decoded.sum().backward()
    assert latents.grad is not None and latents.grad.abs().max() > 0
    assert all(p.grad is None for p in adapter.vae.parameters())
    assert autoencoder.downsampling(adapter.vae) == (16 if family == "flux2" else 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_student_alone(family, folders):
    """One DMD term: the student's parameters get gradients; teacher and fake get none."""
    adapter = adapter_of(family, folders)
    teacher = adapter.load_network(torch.float32)
    student, fake = adapter.student_of(teacher), adapter.student_of(teacher)
    x, noise = normal((2, *adapter.latent_shape)), normal((2, *adapter.latent_shape), 1)
    cond, sigma = adapter.encode_prompts(PROMPTS), torch.tensor([0.5, 0.9])
    guidance = torch.tensor([2.0, 5.0])
    x0 = x - 0.5 * adapter.predict(student, x, sigma, cond)
    dmd_term(adapter, x0, noise, sigma, cond, fake, teacher, guidance, adapter.uncond(2)).loss.backward()
    assert all(p.grad is None for net in (teacher, fake) for p in net.parameters())
    # the last SD 3 block drops its text side, and SDXL never reads an unused key bias: a few may stay without
    assert sum(p.grad is not None for p in student.parameters()) > 0.9 * len(list(student.parameters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_middle_blocks(family, folders):
    adapter = adapter_of(family, folders)
    net = adapter.load_network(torch.float32)
    x, sigma, cond = normal((2, *adapter.latent_shape)), torch.tensor([0.3, 0.9]), adapter.encode_prompts(PROMPTS)
    if family == "flux":  # the student's form, which needs no guidance
        net = adapter.student_of(net)
    tokens = adapter.features(net, x, sigma, cond)
    assert tokens.shape[:2] == (2, 16) and tokens.std() > 0
    assert not torch.equal(tokens[0], tokens[1])
    assert len(adapter.blocks(net)) >= 3


@pytest.mark.parametrize("break_it, message", [
    (lambda f: (f / "transformer" / "config.json").unlink(), "lacks transformer/config.json"),
    (lambda f: (f / "transformer" / "diffusion_pytorch_model.safetensors").unlink(),
     "lacks transformer/diffusion_pytorch_model.safetensors"),
    (lambda f: (f / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x08\0\0\0"),
     "is truncated or corrupt"),
    (lambda f: _edit(f / "transformer" / "config.json", _class_name="FluxTransformer2DModel"),
     "holds a FluxTransformer2DModel, expected SD3Transformer2DModel"),
    (lambda f: _edit(f / "transformer" / "config.json", num_layers=4), "transformer"),
    (lambda f: _edit(f / "transformer" / "config.json", caption_projection_dim=64), "does not load"),
])  # fmt: skip
def test_a_broken_folder_is_named(break_it, message, tmp_path):
    folder = write_sd3(tmp_path / "sd3")
    adapter = SD3Adapter(folder, SIDE, text_length=32)
    break_it(folder)
    with pytest.raises(UserError, match=message):
        adapter.load_network(torch.float32)


@pytest.mark.parametrize("family, side, message", [
    ("sd3", 72, "model.side = 72: allowed is a multiple of 16"),
    ("flux", 72, "model.side = 72: allowed is a multiple of 16"),
    ("flux2", 72, "model.side = 72: allowed is a multiple of 16"),
    ("sdxl", 60, "model.side = 60: allowed is a multiple of 8"),
    ("sd3", 272, "model.side is out of range: .* allows up to 256 pixels"),  # a table of 16 x 16 patches
])  # fmt: skip
def test_a_side_that_does_not_fit(family, side, message, folders, monkeypatch):
    """One line, not an error of a reshape, nor pictures of another size."""
    monkeypatch.setitem(globals(), "SIDE", side)
    with pytest.raises(UserError, match=message):
        adapter_of(family, folders).load_network(torch.float32)


def _edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_not_a_number_in_the_weights(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_sd3(tmp_path / "sd3")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["pos_embed.proj.bias"][3] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"NaN or an infinity in pos_embed\.proj\.bias"):
        SD3Adapter(folder, SIDE).load_network(torch.float32)
    with pytest.raises(UserError, match="does not exist"):
        SD3Adapter(tmp_path / "no" / "such" / "folder", SIDE)


def test_dtype_and_text_length(folders):
    adapter = SD3Adapter(folders["sd3"], SIDE, text_length=77)
    assert adapter.load_network(torch.bfloat16).dtype == torch.bfloat16
    cond = adapter.encode_prompts(PROMPTS)
    assert cond.embeds.shape == (2, 77 + 77, 32) and cond.pooled.shape == (2, 32)
    adapter.free_text()
    assert "text" not in vars(adapter) and adapter.uncond(3).embeds.shape == (3, 154, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_in_bf16_is_near_fp32(family, folders):
    """Pictures and their gradient, both fp32, within bf16's rounding (2^-9) of some ten layers; and not the same. What
    is kept for the backward is half as large, and the encoder's latents are the same bits."""
    adapter, found = adapter_of(family, folders), []
    pixels, noise = normal((2, 3, SIDE, SIDE)).tanh(), normal((2, *adapter.latent_shape), 1)
    for dtype in (torch.float32, torch.bfloat16):
        autoencoder.decode_in(adapter.vae, dtype)
        latents, kept = normal((2, *adapter.latent_shape)).requires_grad_(), {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.setdefault(t.data_ptr(), t), lambda t: t):
            out = adapter.decode(latents)
        assert out.dtype == torch.float32
        size = sum(t.nbytes for t in kept.values())
        found.append((out.detach(), torch.autograd.grad(out.square().mean(), latents)[0], size))
        found[-1] += (adapter.encode(pixels, noise),)
    for exact, near in zip(*(f[:2] for f in found), strict=True):
        gap = (near - exact).double().norm() / exact.double().norm()
        assert 0 < gap < 0.05
    assert found[1][2] < 0.6 * found[0][2] and torch.equal(found[0][3], found[1][3])
