"""Complete configs by name. Values of the big teachers are the released ones unless a comment says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from senseflow.config import Config, Data, Disc, Dmd, Ema, Eval, Fake, Ida, Isg, Model, Rollout, Train

# 1024 px, bf16 arithmetic (paper.md 4). Decoding in bf16 is ours; in fp32, as released: --model.decode fp32
REAL: Any = dict(side=1024, dtype="bf16", decode="bf16")
# the weights of timm's vit_large_patch14_dinov2.lvd142m (paper.md 1.5); the paper's ablation prefers ViT-B for FID:
# --disc.backbone facebook/dinov2-base --disc.taps=-1,2,5,8,10,11
VIT_L = "facebook/dinov2-large"
SD35_T: Any = dict(t_min=0.021, t_max=0.981)  # entries 20 to 980 of a table that starts at .001 (paper.md 1.1)
RELEASED_TAPS = (-1, 2, 5, 8, 10, 14, 19, 23)  # DINOv2 ViT-L blocks; -1 is the patch embedding


def tiny() -> Config:
    """The embedded teacher on emoji: ends within 10 minutes on 2 cores.

    The discriminator's real side is the teacher's own many-step samples: the emoji themselves are cleaner than
    anything that this teacher draws, and would pull away from it.
    """
    return Config(data=Data(images="teacher"), disc=Disc(weight=0.3))


def dmd2(base: Config) -> Config:
    """The DMD2 baseline of a preset: IDA off, ISG off, its own classifier (G weight 5e-3, D weight 1e-2)."""
    name = "dmd2" if base.preset == "tiny" else base.preset + "-dmd2"
    return replace(
        base, preset=name, out=f"runs/{name}", ida=replace(base.ida, lam=1.0), isg=replace(base.isg, weight=0.0),
        disc=replace(base.disc, kind="fake_features", weight=5e-3, d_weight=1e-2),
    )  # fmt: skip


def _released(name: str, **parts) -> Config:
    """What the four released trainers share; the rest of Train's and Fake's values are the defaults of config.py.

    Batch 8 on 8 GPUs, AdamW .9/.999, eps 1e-8, no weight decay (paper.md 4); clip 1, no student EMA, a coin of
    one half (paper.md 2); DMD weight 1, no eps in the normaliser (paper.md 1.1); Charbonnier,
    uniform t_mid (paper.md 1.4); omega on D too (paper.md 1.6). Ours, not stated there: how often a run saves and
    evaluates, and on how many prompts; bf16 weights kept exactly, in two halves.

    What each teacher has of its own, below: lambda_G, lambda_ISG, lambda of IDA, f, guidance and margin from paper.md
    1.7; laws of t from 1.1 and 1.2; omega from 1.6; shift and anchors from 3; rate and iterations from 4. Where the
    paper's text says otherwise than its code: --isg.loss l2 (Eq. 12), --disc.omega paper --disc.omega_on_d false.
    Released too: --model.anchors released (FLUX's rounded sigmas), --model.text_length 77 (SD 3.5's T5).
    """
    return Config(
        preset=name, out=f"runs/{name}", data=Data(batch=8), ema=Ema(decay=0.0),
        rollout=Rollout(backward_prob=0.5), **parts,
    )  # fmt: skip


def _vit_large(weight: float, omega: Any, text: Any = "clip-l") -> Disc:
    """The released discriminator (paper.md 1.5): DINOv2 ViT-L on whole images, its heads at full width, CLIP ViT-L/14's
    text vector. weight: lambda_G (paper.md 1.7); omega as its trainer has it (paper.md 1.6)."""
    return Disc(
        weight=weight, omega=omega, text=text, backbone=VIT_L, taps=RELEASED_TAPS, size=1022, width=0, downsample=3,
    )  # fmt: skip


def _train(iterations: int, gen_every: int, lr: float) -> Train:
    """One constant rate for all three networks: the released warm-up of 500 starts at its own end (paper.md 4)."""
    return Train(
        iterations=iterations, gen_every=gen_every, lr=lr, fake_lr=lr, disc_lr=lr, warmup=0, cooldown=0.0,
        checkpoint_every=500, precision="split",
    )  # fmt: skip


def _eval(steps: int, guidance: float, shift: float) -> Eval:
    """Teacher steps are half its NFE where CFG doubles the batch (100 SD 3.5, 80 SDXL, 50 FLUX: paper.md 3).

    Its guidance is not stated anywhere (paper.md 8): the default of the family's diffusers pipeline.
    """
    return Eval(
        every=1000, prompts=64, grid=8, teacher_steps=steps, teacher_guidance=guidance, teacher_shift=shift,
    )  # fmt: skip


def sd35_large() -> Config:
    """SD 3.5 Large (trainer_sd35_large_senseflow.py as read in paper.md 1.7; 27k iterations from paper.md 4)."""
    return _released(
        "sd35-large",
        model=Model(family="sd35", shift=3.0, **REAL),
        train=_train(27_000, 5, 1e-6),
        dmd=Dmd(t_law="uniform", **SD35_T, guidance_min=3.0, guidance_max=10.0),
        fake=Fake(t_law="logit-normal", t_shift=True),
        isg=Isg(weight=1.0, margin=50, guidance_min=5.0, guidance_max=5.0),
        ida=Ida(lam=0.97),
        disc=_vit_large(0.1, "released-sd35"),
        eval=_eval(50, 7.0, 3.0),
    )  # fmt: skip


def sd35_medium() -> Config:
    """SD 3.5 Medium (trainer_sd35_senseflow.py): not in the paper's tables; iterations as Large."""
    return _released(
        "sd35-medium",
        model=Model(family="sd35", shift=3.0, **REAL),
        train=_train(27_000, 10, 1e-6),
        dmd=Dmd(t_law="uniform", **SD35_T, guidance_min=2.0, guidance_max=8.0),
        fake=Fake(t_law="logit-normal", t_shift=True),
        isg=Isg(weight=0.5, margin=50, guidance_min=2.0, guidance_max=4.0),
        ida=Ida(lam=0.98),
        disc=_vit_large(0.1, "released-sd35"),
        eval=_eval(50, 7.0, 3.0),
    )  # fmt: skip


def flux_dev() -> Config:
    """FLUX.1-dev (trainer_flux_senseflow.py): embedded guidance, logit-normal unshifted t; lr of the paper's text.

    On one GPU: --train.precision stochastic --train.moments 8bit --optim.in_backward true (docs/precision.md).
    """
    return _released(
        "flux-dev",
        model=Model(family="flux", shift=1.15, shift_kind="exponential", **REAL),
        train=_train(12_000, 5, 1e-5),
        dmd=Dmd(t_law="logit-normal", t_shift=False, guidance_min=1.0, guidance_max=8.0),
        fake=Fake(t_law="logit-normal", t_shift=False),
        isg=Isg(weight=1.0, margin=20, margin_space="sigma", guidance_min=1.0, guidance_max=8.0),
        ida=Ida(lam=0.97),
        disc=_vit_large(2.0, "paper"),
        eval=_eval(50, 3.5, 1.15),
    )  # fmt: skip


def sdxl() -> Config:
    """SDXL (trainer_sdxl_senseflow.py): IDA off as released, uniform t for the fake, guidance 8 as DMD2."""
    return _released(
        "sdxl",
        model=Model(family="sdxl", shift=1.0, **REAL),
        train=_train(18_000, 5, 1e-6),
        dmd=Dmd(t_law="uniform", t_max=0.981, guidance_min=8.0, guidance_max=8.0),  # indices 20 to 980
        fake=Fake(t_law="uniform", t_shift=True),
        isg=Isg(weight=0.2, margin=20, guidance_min=3.0, guidance_max=15.0),
        ida=Ida(lam=1.0),
        disc=_vit_large(0.5, "released-sdxl", text="pooled"),  # CLIP-G's: SDXL pools no other
        eval=_eval(40, 5.0, 1.0),
    )  # fmt: skip


def flux2_klein() -> Config:
    """FLUX.2 [klein] base 4B, a CFG teacher. Nobody has published a run of this method on it: every value is ours,
    untried at full size, and taken from the teacher it is nearest to."""
    return _released(
        "flux2-klein",
        # Flux2KleinPipeline's mu of 4096 tokens in 4 steps: the student's anchors are those of its plain 4-step call
        model=Model(family="flux2", shift=2.29118, shift_kind="exponential", **REAL),
        train=_train(27_000, 5, 1e-6),  # as SD 3.5 Large, like the weights and laws below
        dmd=Dmd(t_law="uniform", guidance_min=2.0, guidance_max=8.0),  # as SD 3.5 Medium: the pipeline's 4 lies within
        fake=Fake(t_law="logit-normal", t_shift=True),
        isg=Isg(weight=1.0, margin=50, guidance_min=4.0, guidance_max=4.0),  # the pipeline's
        ida=Ida(lam=0.97),
        disc=_vit_large(0.1, "paper", text="pooled"),  # no CLIP here: Qwen3's
        eval=_eval(50, 4.0, 2.02335),  # the pipeline's 50 steps, guidance, and mu of 50 steps
    )  # fmt: skip


PRESETS: dict[str, Callable[[], Config]] = {
    "tiny": tiny,
    "dmd2": lambda: dmd2(tiny()),
    "sd35-large": sd35_large,
    "sd35-medium": sd35_medium,
    "flux-dev": flux_dev,
    "sdxl": sdxl,
    "flux2-klein": flux2_klein,
    "sd35-large-dmd2": lambda: dmd2(sd35_large()),
    "sd35-medium-dmd2": lambda: dmd2(sd35_medium()),
    "flux-dev-dmd2": lambda: dmd2(flux_dev()),
    "sdxl-dmd2": lambda: dmd2(sdxl()),
    "flux2-klein-dmd2": lambda: dmd2(flux2_klein()),
}
