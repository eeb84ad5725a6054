"""The model card of an exported student. Its code blocks are what the parity check executes: one source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from senseflow.config import UserError
from senseflow.flow import FlowSchedule
from senseflow.models.loading import dtype_argument

PROMPTS = ("a red apple on a wooden table", "a penguin in the snow")
FENCE = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
# The line of a card that names where things are; the check puts its own values there, and changes nothing else.
PLACES = re.compile(r"^folder, teacher, dtype, device = .*$", re.M)


@dataclass(frozen=True)
class Family:
    """What the diffusers pipeline of a family needs to be told.

    pipeline, network: class names; settings: fixed arguments of the call; own_sigmas: the pipeline passes its
    scheduler u = 1, ..., 1 / K by itself; student: config values of the network that differ from the teacher's.
    """

    pipeline: str
    network: str
    settings: dict[str, Any] = field(default_factory=dict)
    own_sigmas: bool = False
    student: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    # guidance_scale 1 is no guidance; SD 3.5's default is 7, SDXL's 5. A FLUX student has no guidance embedding.
    "sd35": Family("StableDiffusion3Pipeline", "SD3Transformer2DModel", {"guidance_scale": 1.0}),
    "flux": Family(
        "FluxPipeline", "FluxTransformer2DModel", own_sigmas=True, student={"guidance_embeds": False},
    ),
    "sdxl": Family("StableDiffusionXLPipeline", "UNet2DConditionModel", {"guidance_scale": 1.0}, own_sigmas=True),
    "flux2": Family("Flux2KleinPipeline", "Flux2Transformer2DModel", {"guidance_scale": 1.0}, own_sigmas=True),
}  # fmt: skip


def family_of(name: str) -> Family:
    """Raises UserError for a family without a diffusers pipeline."""
    if name not in FAMILIES:
        raise UserError(
            f"family {name!r} has no diffusers pipeline: allowed is --to transformer; pipelines have "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def unshifted(schedule: FlowSchedule, anchors: Sequence[float]) -> list[float]:
    """What a pipeline's `sigmas` must be for its scheduler to shift them to our anchors."""
    import torch

    return [round(u, 9) for u in schedule.unshift(torch.tensor(anchors, dtype=torch.float64)).tolist()]


def call_settings(
    adapter: Any, family: Family, anchors: Sequence[float], side: int, guidance: float | None = None
) -> dict[str, Any]:
    """The arguments of the pipeline's call beside the prompts. guidance: of a LoRA on a teacher that embeds it."""
    steps = len(anchors)
    settings: dict[str, Any] = {"num_inference_steps": steps}
    if isinstance(adapter.schedule, FlowSchedule):
        sigmas = unshifted(adapter.schedule, anchors)
        by_itself = [round(k / steps, 9) for k in range(steps, 0, -1)]
        if not family.own_sigmas or sigmas != by_itself:
            settings["sigmas"] = sigmas
    if guidance is not None and family.student:
        settings["guidance_scale"] = guidance
    settings |= family.settings | {"height": side, "width": side}
    if length := getattr(adapter, "text_length", None):
        settings["max_sequence_length"] = length
    return settings


def _setup(target: str, family: Family, network: str, variant: str) -> list[str]:
    """Lines that make `pipe` from what was exported. variant: of the teacher's files that lack plain ones."""
    dtype = f"{dtype_argument()}=dtype"
    teachers = f'variant="{variant}", {dtype}' if variant else dtype
    scheduler = 'scheduler = SCHEDULER.from_pretrained(folder, subfolder="scheduler")'
    extra = "".join(f", {k}={v!r}" for k, v in family.student.items())
    if target == "pipeline":
        return [f"pipe = {family.pipeline}.from_pretrained(folder, {dtype}).to(device)"]
    load = {
        "transformer": f'network = {family.network}.from_pretrained(folder, subfolder="{network}", {dtype})',
        "single-file": f"network = {family.network}.from_single_file(\n"
        f'    folder + "/{SINGLE_FILE}", config=teacher, subfolder="{network}"{extra}, {dtype}\n)',
    }
    if target == "lora":
        pipe = f"pipe = {family.pipeline}.from_pretrained(teacher, scheduler=scheduler, {teachers})"
        return [scheduler, pipe, "pipe.load_lora_weights(folder)", "pipe = pipe.to(device)"]
    pipe = f"pipe = {family.pipeline}.from_pretrained(teacher, {network}=network, scheduler=scheduler, {teachers})"
    return [load[target], scheduler, pipe, "pipe = pipe.to(device)"]


SINGLE_FILE = "senseflow.safetensors"


def _dict_lines(settings: dict[str, Any]) -> list[str]:
    return ["settings = dict(", *(f"    {k}={v!r}," for k, v in settings.items()), ")"]


def euler_line(schedule: Any, owner: str) -> tuple[str, str]:
    """(class, line) that puts the deterministic sampler in place of the stochastic one."""
    if isinstance(schedule, FlowSchedule):
        cls, change = "FlowMatchEulerDiscreteScheduler", "stochastic_sampling=False"
    else:
        cls, change = "DDIMScheduler", 'timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True'
    return cls, f"{owner}scheduler = {cls}.from_config(\n    {owner}scheduler.config, {change}\n)"


def scheduler_class(schedule: Any) -> str:
    return "FlowMatchEulerDiscreteScheduler" if isinstance(schedule, FlowSchedule) else "LCMScheduler"


def places(folder: str, teacher: str, dtype: str, device: str) -> str:
    """The line of a card that PLACES finds."""
    return f"folder, teacher, dtype, device = {folder!r}, {teacher!r}, torch.{dtype}, {device!r}"


def pipeline_blocks(
    target: str, family: Family, adapter: Any, settings: dict[str, Any], where: str, prompts: Sequence[str],
    variant: str = "",
) -> tuple[str, str]:  # fmt: skip
    """Two code blocks, re-noise and Euler: each ends in the call, `images = pipe(...).images`."""
    setup = "\n".join(_setup(target, family, adapter.network, variant))
    used = [family.pipeline, *([family.network] if "network =" in setup else [])]
    if "SCHEDULER" in setup:
        used.append(scheduler_class(adapter.schedule))
        setup = setup.replace("SCHEDULER", used[-1])
    call = "images = pipe(prompt=prompts, **settings).images"
    lines = [
        "import torch", f"from diffusers import {', '.join(sorted(used))}", "", where, setup,
        f"prompts = {list(prompts)!r}", *_dict_lines(settings), "torch.manual_seed(0)", call,
    ]  # fmt: skip
    cls, line = euler_line(adapter.schedule, "pipe.")
    return "\n".join(lines), "\n".join([f"from diffusers import {cls}", "", line, "torch.manual_seed(0)", call])


def embedded_blocks(adapter: Any, anchors: Sequence[float], where: str, prompts: Sequence[str]) -> tuple[str, str]:
    """The same for the embedded family, which has no pipeline: diffusers' network and scheduler in a loop."""
    cls, line = euler_line(adapter.schedule, "")
    call = "latents = generate(prompts)"
    first = f"""import torch
from diffusers import {cls}, SD3Transformer2DModel
from senseflow.models.text import embed_prompts

{where}
network = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer", {dtype_argument()}=dtype).to(device)
scheduler = {cls}.from_pretrained(folder, subfolder="scheduler")
prompts = {list(prompts)!r}


@torch.no_grad()
def generate(prompts):
    text = embed_prompts(prompts).to(device)
    latents = torch.randn(len(prompts), {", ".join(map(str, adapter.latent_shape))}).to(device)
    scheduler.set_timesteps(sigmas={unshifted(adapter.schedule, anchors)!r}, device=device)
    for t in scheduler.timesteps:
        velocity = network(latents, text.embeds, text.pooled, t.expand(len(prompts))).sample
        latents = scheduler.step(velocity, t, latents).prev_sample
    return latents  # {"pixels in [-1, 1]" if adapter.vae is None else "(z - shift) * scale of the VAE"}


torch.manual_seed(0)
{call}"""
    return first, "\n".join([line, "torch.manual_seed(0)", call])


COMFY = "KSampler: sampler `lcm` (re-noise) or `euler`, scheduler `simple`, cfg 1."
COMFY_SHIFT = {  # what ComfyUI's own shift is not, or may not be
    "sd35": "ModelSamplingSD3 with shift {shift:g} before it.",
    "flux": "A FLUX file without guidance embedding counts as schnell there, whose shift is 1: ModelSamplingFlux with "
    "base_shift = max_shift = {shift:g} before it.",
    "sdxl": "",
    "flux2": "ModelSamplingFlux with base_shift = max_shift = {shift:g} before it.",
}


def _code(block: str) -> list[str]:
    return ["", "```python", block, "```", ""]


def render(target: str, record: dict[str, Any], model: Any, teacher: str, about: str, blocks: tuple[str, str]) -> str:
    """README.md of the exported folder. The line about the check is added when it has passed."""
    anchors = [round(a, 6) for a in record["anchors"]]
    base = teacher if teacher and "/" in teacher and not teacher.startswith((".", "/", "~")) else ""
    head = ["---", "library_name: diffusers", "pipeline_tag: text-to-image", *([f"base_model: {base}"] if base else []),
            "tags: [senseflow, distillation]", "---", ""]  # fmt: skip
    steps = len(anchors)
    what = {
        "pipeline": "a whole diffusers pipeline",
        "transformer": "the network and its scheduler; everything else is the teacher's",
        "single-file": f"`{SINGLE_FILE}`, the network alone under its original tensor names, and its scheduler",
        "lora": "a LoRA on the teacher, and its scheduler",
    }[target]
    body = [
        f"# {steps}-step student of {base or Path(teacher or 'the embedded teacher').name}",
        "",
        f"Distilled with senseflow, preset `{record.get('preset', '?')}`; {about}: {what}.",
        f"{steps} network calls a picture, no guidance, {model.side}x{model.side} pixels; sigmas {anchors}.",
        "",
        "## Use",
        "",
        "As trained: after each step fresh noise, which the scheduler draws from torch's global generator.",
        *_code(blocks[0]),
        "The deterministic sampler, from the same noise to other pictures:",
        *_code(blocks[1]),
    ]
    if target == "single-file":
        body += ["In ComfyUI: `models/diffusion_models`, Load Diffusion Model, the teacher's VAE and text encoders.",
                 f"{COMFY} {COMFY_SHIFT[model.family].format(shift=model.shift)}".strip(), ""]  # fmt: skip
    body += ["The licence of the teacher's weights holds for the student's.", ""]
    return "\n".join([*head, *body])
