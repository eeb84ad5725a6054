"""Complete configs by name. Values of the big teachers are the released ones unless a comment says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from senseflow.config import Config, Data, Disc, Dmd, Ema, Fake, Ida, Isg, Model, Rollout, Train

RELEASED_TAPS = (-1, 2, 5, 8, 10, 14, 19, 23)  # DINOv2 ViT-L blocks; -1 is the patch embedding


def tiny() -> Config:
    """The embedded teacher on emoji: ends within 10 minutes on 2 cores."""
    return Config()


def dmd2(base: Config) -> Config:
    """The DMD2 baseline of a preset: IDA off, ISG off, its own classifier (G weight 5e-3, D weight 1e-2)."""
    name = "dmd2" if base.preset == "tiny" else base.preset + "-dmd2"
    return replace(
        base, preset=name, out=f"runs/{name}", ida=replace(base.ida, lam=1.0), isg=replace(base.isg, weight=0.0),
        disc=replace(base.disc, kind="fake_features", weight=5e-3, d_weight=1e-2),
    )  # fmt: skip


def _released(name: str, **parts) -> Config:
    """8 images an iteration on 8 GPUs, AdamW .9/.999, clip 1, no student EMA (paper.md 4)."""
    return Config(
        preset=name, out=f"runs/{name}", data=Data(batch=8), ema=Ema(decay=0.0),
        rollout=Rollout(backward_prob=0.5), **parts,
    )  # fmt: skip


def sd35_large() -> Config:
    """SD 3.5 Large (trainer_sd35_large_senseflow.py as read in paper.md 1.7; 27k iterations from paper.md 4)."""
    return _released(
        "sd35-large",
        model=Model(family="sd35", shift=3.0),
        train=Train(iterations=27_000, gen_every=5, lr=1e-6, fake_lr=1e-6, disc_lr=1e-6, warmup=500),
        dmd=Dmd(t_law="uniform", guidance_min=3.0, guidance_max=10.0),
        isg=Isg(weight=1.0, margin=50, guidance_min=5.0, guidance_max=5.0),
        ida=Ida(lam=0.97),
        disc=Disc(weight=0.1, omega="released-sd35", taps=RELEASED_TAPS, size=1022, width=0, downsample=3),
    )  # fmt: skip


def sd35_medium() -> Config:
    """SD 3.5 Medium (trainer_sd35_senseflow.py): not in the paper's tables; iterations as Large."""
    return _released(
        "sd35-medium",
        model=Model(family="sd35", shift=3.0),
        train=Train(iterations=27_000, gen_every=10, lr=1e-6, fake_lr=1e-6, disc_lr=1e-6, warmup=500),
        dmd=Dmd(t_law="uniform", guidance_min=2.0, guidance_max=8.0),
        isg=Isg(weight=0.5, margin=50, guidance_min=2.0, guidance_max=4.0),
        ida=Ida(lam=0.98),
        disc=Disc(weight=0.1, omega="released-sd35", taps=RELEASED_TAPS, size=1022, width=0, downsample=3),
    )  # fmt: skip


def flux_dev() -> Config:
    """FLUX.1-dev (trainer_flux_senseflow.py): embedded guidance U(1, 8), logit-normal t; lr of the paper's text."""
    return _released(
        "flux-dev",
        model=Model(family="flux", shift=1.15, shift_kind="exponential"),
        train=Train(iterations=12_000, gen_every=5, lr=1e-5, fake_lr=1e-5, disc_lr=1e-5, warmup=500),
        dmd=Dmd(t_law="logit-normal", guidance_min=1.0, guidance_max=8.0),
        isg=Isg(weight=1.0, margin=20, guidance_min=1.0, guidance_max=8.0),
        ida=Ida(lam=0.97),
        disc=Disc(weight=2.0, omega="paper", taps=RELEASED_TAPS, size=1022, width=0, downsample=3),
    )  # fmt: skip


def sdxl() -> Config:
    """SDXL (trainer_sdxl_senseflow.py): IDA off as released, uniform t for the fake, guidance 8 as DMD2."""
    return _released(
        "sdxl",
        model=Model(family="sdxl", shift=1.0),
        train=Train(iterations=18_000, gen_every=5, lr=1e-6, fake_lr=1e-6, disc_lr=1e-6, warmup=500),
        dmd=Dmd(t_law="uniform", guidance_min=8.0, guidance_max=8.0),
        fake=Fake(t_law="uniform"),
        isg=Isg(weight=0.2, margin=20, guidance_min=3.0, guidance_max=15.0),
        ida=Ida(lam=1.0),
        disc=Disc(weight=0.5, omega="released-sdxl", taps=RELEASED_TAPS, size=1022, width=0, downsample=3),
    )  # fmt: skip


PRESETS: dict[str, Callable[[], Config]] = {
    "tiny": tiny,
    "dmd2": lambda: dmd2(tiny()),
    "sd35-large": sd35_large,
    "sd35-medium": sd35_medium,
    "flux-dev": flux_dev,
    "sdxl": sdxl,
    "sd35-large-dmd2": lambda: dmd2(sd35_large()),
    "sd35-medium-dmd2": lambda: dmd2(sd35_medium()),
    "flux-dev-dmd2": lambda: dmd2(flux_dev()),
    "sdxl-dmd2": lambda: dmd2(sdxl()),
}
