"""Distils a teacher into a few-step student: `python -m senseflow.train [PRESET] [--any.field VALUE]`.

The run is one function, `train`, that reads from top to bottom; the algorithm's own steps are in steps.py.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import senseflow_kernels
from senseflow import checkpoint, fitting, planning
from senseflow.algo.discriminator import FakeFeatureDiscriminator, VFMDiscriminator
from senseflow.algo.isg import ErrorCurve, measure_error_curve
from senseflow.cli import Arguments, parse
from senseflow.compiling import compile_parts, uncompiled
from senseflow.config import Config, UserError, from_dict, to_dict
from senseflow.data.batches import Batch, EmbeddedData
from senseflow.data.cache import is_cache, open_cache
from senseflow.data.emoji import load_variants
from senseflow.data.stream import open_stream
from senseflow.draws import Draws
from senseflow.evaluate import Look, make_evaluator, teacher_pictures
from senseflow.export import save_student
from senseflow.graphs import advance
from senseflow.logs import MetricRing, Monitors, RunLog, print_table
from senseflow.models.adapter import Condition
from senseflow.models.embedded import teacher_folder
from senseflow.models.families import DTYPES, make_adapter, make_networks
from senseflow.models.identity import identity
from senseflow.models.lora import is_lora, merged, save_lora, shared_copy, trainable
from senseflow.models.recompute import recompute_decoder, recomputed
from senseflow.models.vfm import find_dinov2
from senseflow.profiling import Profiler
from senseflow.steps import (
    Parts,
    discriminator_loss,
    encoded,
    fake_loss,
    generator_losses,
    phased,
    reference_features,
    saturation,
    student_forward,
    text_vector,
)
from senseflow.updates import Updates

# how fast batches come, where they lie and what is computed twice may change on the way
FREE_FIELDS = {
    "data": ("path", "workers", "prefetch", "timeout"), "model": ("checkpointing",), "disc": ("checkpointing",),
}  # fmt: skip
CURVE_POINTS = 32  # sigmas at which xi(t) is measured for isg.midpoint = adaptive


def build_discriminator(cfg: Config, adapter: Any, fake: nn.Module, cond: Condition, device: torch.device):
    """(heads, frozen backbone): by disc.kind; (None, None) without a discriminator. cond: any one prompt."""
    if cfg.disc.kind == "none":
        return None, None
    if cfg.disc.kind == "fake_features":
        with torch.no_grad():
            x = torch.zeros(1, *adapter.latent_shape, device=device)
            width = adapter.features(fake, x, torch.ones(1, device=device), cond).shape[2]
        return FakeFeatureDiscriminator(width).to(device), None
    vfm = find_dinov2(cfg.disc.backbone, device)
    if cfg.disc.checkpointing:
        recomputed(vfm.blocks)
        recompute_decoder(adapter.vae)
    deepest, depth = max(cfg.disc.taps), len(vfm.blocks)
    if deepest >= depth:
        raise UserError(
            f"disc.taps = {cfg.disc.taps!r}: this backbone has {depth} blocks, allowed is -1 to {depth - 1}"
        )
    dims, text_dim = [vfm.dims[0]] * len(cfg.disc.taps), text_vector(adapter, cfg.disc.text, cond).shape[1]
    heads = VFMDiscriminator(dims, text_dim, cmap=cfg.disc.cmap, width=cfg.disc.width, downsample=cfg.disc.downsample)
    return heads.to(device), vfm


def open_data(cfg: Config, adapter: Any, teacher: nn.Module, device: torch.device) -> Any:
    """The batches of data.path: a cache, a source, or the embedded emoji. Raises UserError for what is not there."""
    if is_cache(cfg.data.path):
        return open_cache(cfg, adapter, Draws(cfg.seed), device, identity(adapter))
    if cfg.data.path:
        return open_stream(cfg, adapter, Draws(cfg.seed), device)
    if cfg.data.images == "teacher":
        images = teacher_pictures(cfg, adapter, teacher, teacher_folder(cfg.model.teacher))
    else:
        images = load_variants(canvas=cfg.model.side)
    return EmbeddedData(images, adapter.encode_prompts(images.captions), cfg.seed, device)


def build(cfg: Config, device: torch.device) -> tuple[Parts, Any]:
    """Every network and the data of a run. Raises UserError for a family or a file that is not there."""
    if cfg.data.images == "teacher" and cfg.model.family != "embedded":
        raise UserError("data.images = 'teacher' needs model.family = 'embedded': allowed is 'pictures'")
    why_not = senseflow_kernels.reason_against(device)
    if cfg.kernels.strict and why_not:
        raise UserError(f"kernels.strict = True, and the fused kernels cannot run: {why_not}")
    adapter = make_adapter(cfg.model, device)
    teacher, student, fake = make_networks(cfg, adapter, device)
    data = open_data(cfg, adapter, teacher, device)
    torch.manual_seed(cfg.seed)  # the heads' initial weights, the only numbers not from Draws
    disc, vfm = build_discriminator(cfg, adapter, fake, data.example(), device)
    anchors = adapter.schedule.anchors(cfg.model.steps, cfg.model.anchors == "released")
    parts = Parts(adapter, student, fake, teacher, disc, vfm, anchors, Draws(cfg.seed))
    if cfg.isg.midpoint == "adaptive":
        batch = encoded(parts, data.batch(0, cfg.data.batch), 0)
        noise = parts.draws.normal(0, batch.samples, "curve", tuple(batch.latents.shape[1:]))
        sigmas = torch.linspace(1 / CURVE_POINTS, 1, CURVE_POINTS)
        parts.curve = measure_error_curve(adapter, teacher, batch.latents, batch.cond, noise, sigmas)
    return parts, data


def iterate(cfg: Config, parts: Parts, updates: Updates, batch: Batch, iteration: int) -> dict[str, Tensor]:
    """One iteration of Algorithm 1: student forward, its step and IDA on every f-th, then fake, then D."""
    turn = iteration - cfg.train.fake_warmup
    is_gen = turn >= 0 and (turn + 1) % cfg.train.gen_every == 0
    updates.ready("student")
    step = student_forward(parts, cfg, batch, iteration, with_grad=is_gen)
    updates.ready("fake", "disc")
    reference = reference_features(parts, cfg, step)
    if is_gen:
        loss = generator_losses(parts, cfg, step, reference)
        step.metrics |= updates.step(loss, iteration, "student", lam=updates.lam(step.metrics), x0=step.x0)
        step.x0 = step.x0.detach()
        updates.ready("fake")  # which IDA has moved
    loss = fake_loss(parts, cfg, step)
    step.metrics["fake"] = loss.detach()
    if cfg.disc.kind == "fake_features":  # DMD2: the classifier and the features it reads learn together
        adversarial = discriminator_loss(parts, cfg, step, reference)
        step.metrics["disc"] = adversarial.detach()
        step.metrics |= updates.step(loss + cfg.disc.d_weight * adversarial, iteration, "fake", "disc")
    else:
        step.metrics |= updates.step(loss, iteration, "fake")
    if cfg.disc.kind == "vfm":
        if step.silent and cfg.disc.omega_on_d:
            step.metrics |= updates.coast(iteration, "disc")
        else:
            loss = discriminator_loss(parts, cfg, step, reference)
            step.metrics["disc"] = loss.detach()
            step.metrics |= updates.step(loss, iteration, "disc")
        parts.disc.update_spectral_norm()  # type: ignore[operator]
    step.metrics["saturation"] = saturation(step.x0)
    return step.metrics


def drift(updates: Updates) -> Tensor:
    """IDA drift: || phi - theta || / || theta || over what trains, a device scalar. With LoRA that is the distance of
    the effective weights over what the student has learned, as A's rows are orthonormal; 0 before any update."""
    gap, size = [], []
    for phi, theta in zip(updates.exact("fake"), updates.exact("student"), strict=True):  # no second copy of a network
        gap.append(torch._foreach_norm([phi.float() - theta.float()])[0])
        size.append(torch._foreach_norm([theta.float()])[0])
    whole = torch.linalg.vector_norm(torch.stack(size))
    return torch.linalg.vector_norm(torch.stack(gap)) / whole.clamp_min(1e-12)


def student_for_use(parts: Parts, updates: Updates) -> nn.Module:
    """The network to look at and to ship: the EMA where there is one, else the student itself."""
    updates.ready()
    if updates.ema is None:
        return parts.student
    net = shared_copy(parts.student)
    updates.ema.copy_to(trainable(net))
    return net


def save_curve(curve: ErrorCurve, anchors: list[float], out: Path) -> None:
    """xi(sigma), the teacher's measured reconstruction error, as xi.json and xi.png with the anchors marked."""
    from matplotlib.figure import Figure

    points = {"sigma": curve.sigmas.tolist(), "xi": curve.xi.tolist()}
    (out / "xi.json").write_text(json.dumps(points) + "\n")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="sigma", ylabel="mean (x0_hat - x0)^2")
    axes.plot(points["sigma"], points["xi"])
    for anchor in anchors:
        axes.axvline(anchor, linewidth=0.5, color="grey")
    figure.savefig(out / "xi.png")


class Stop:
    """Ctrl-C asks the run to end after the iteration in progress; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self.before: Any = None

    def __enter__(self) -> Stop:
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def plan(cfg: Config) -> int:
    """Prints what the run would hold in memory, and where that does not fit, the flags with which it does. Returns the
    exit status: 1 where nothing fits."""
    planner = planning.Planner(cfg, planning.target_of(cfg), iterate, build_discriminator)
    first = planner.plan(cfg)
    print_table(*fitting.report(first))
    if first.fits:
        return 0
    found = fitting.smallest(planner, cfg)
    if found is None:
        print("It does not fit, with no set of switches: more devices, a smaller data.batch, or --model.variant lora")
        return 1
    print(f"It does not fit. The smallest set of switches with which it does:\n\n  {fitting.flags(found[0])}\n")
    print_table(*fitting.report(found[1]))
    return 0


def resume(cfg: Config, updates: Updates, folder: Path, wanted: bool, fingerprint: str) -> int:
    """The iteration to go on from. Raises UserError when there is nothing to resume, or a run to overwrite, and for
    other settings or other data (fingerprint: of the data) than before."""
    found = checkpoint.load_latest(folder / "checkpoints")
    if not wanted:
        if found:
            raise UserError(f"{folder} holds a run at iteration {found[0]}: add --resume, or choose another --out")
        return 0
    if not found:
        raise UserError(f"--resume: no checkpoint in {folder / 'checkpoints'}")
    iteration, state = found
    saved, now = to_dict(from_dict(state["config"])), to_dict(cfg)  # a field of a later version: its default
    for part, names in FREE_FIELDS.items():
        for name in names:
            saved[part].pop(name, None)
            now[part].pop(name, None)
    if state.get("data", fingerprint) != fingerprint:
        raise UserError(f"--resume: data.path = {cfg.data.path!r} holds other samples than it did in the checkpoint")
    for part in ("model", "lora", "data", "dmd", "fake", "isg", "ida", "disc", "rollout", "ema", "seed"):
        if saved[part] != now[part]:
            raise UserError(f"--resume: {part} was {saved[part]} in the checkpoint and is {now[part]} now")
    for part, name in (("train", "precision"), ("train", "moments"), ("optim", "name"), ("optim", "in_backward")):
        was, is_now = saved[part][name], now[part][name]
        if was != is_now:
            raise UserError(f"--resume: {part}.{name} was {was!r} in the checkpoint and is {is_now!r} now")
    updates.load(state["updates"])
    return iteration


def train(args: Arguments) -> int:
    """The run. Returns the exit status: 0 done, 130 interrupted (and saved)."""
    cfg, out = args.config, Path(args.config.out)
    started = time.monotonic()
    if cfg.train.threads > 0:
        torch.set_num_threads(cfg.train.threads)
    if args.dry_run:
        return plan(cfg)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts, data = build(cfg, device)
    updates = Updates(cfg, parts)
    total = cfg.train.iterations
    if args.profile:
        total = cfg.train.fake_warmup + 4 * cfg.train.gen_every  # warm-up, FLOPs, times, trace
    first = resume(cfg, updates, out, args.resume, data.fingerprint)
    log = RunLog(out, cfg.log.tensorboard, cfg.log.progress, total, resume_at=first)
    data.begin(out, first)
    (out / "config.json").write_text(json.dumps(to_dict(cfg), indent=1) + "\n")
    if parts.curve is not None:
        save_curve(parts.curve, parts.anchors, out)
    compile_parts(parts, cfg)
    evaluator = make_evaluator(cfg, parts.adapter, parts.teacher)
    if not data.encodes_text:
        parts.adapter.free_text()
    monitors = Monitors(cfg.train.max_nonfinite)
    ring = MetricRing()
    profiler = Profiler(args.profile, out, total, cfg.train.gen_every, DTYPES[cfg.model.dtype])
    if args.profile:
        phased(parts, profiler)
    step = advance(cfg, parts, updates, iterate, args.profile)

    def save(iteration: int) -> None:
        state = {"config": to_dict(cfg), "updates": updates.state(), "data": data.fingerprint}
        monitors.last_good = checkpoint.save(out / "checkpoints", iteration, state, cfg.train.keep_last)
        net = student_for_use(parts, updates)
        if is_lora(net):
            save_lora(net, out / "lora" / "pytorch_lora_weights.safetensors")
            net = merged(net)
        save_student(out / "student", net, parts.anchors, cfg, parts.adapter)

    def look(iteration: int) -> Look:
        with uncompiled():
            result = evaluator.measure(student_for_use(parts, updates), parts.anchors)
        picture = out / "grids" / f"{iteration:06d}.png"
        log.evaluation(iteration, result.row(), result.grid(evaluator), picture)
        return result

    def drain() -> None:
        rows = ring.drain()
        log.metrics(rows)
        for warning in monitors.check(rows):
            log.warn(warning)

    done = first
    with Stop() as stop, log, closing(data), senseflow_kernels.strict(cfg.kernels.strict):
        if first == 0 and not args.profile:
            look(0)
        for iteration in range(first, total):
            with profiler.iteration():
                with parts.phase("data"):  # waiting for it; a source's prompts are encoded here too
                    batch = data.batch(iteration, cfg.data.batch)
                with parts.phase("encode"):
                    batch = encoded(parts, batch, iteration)
                metrics = step(batch, iteration)
            done = iteration + 1
            if done % cfg.log.every == 0:
                metrics["ida_drift"] = drift(updates)
            ring.put(done, metrics)
            if done % cfg.log.every == 0 or done == total:
                drain()
            late = 0 < cfg.train.minutes * 60 <= time.monotonic() - started
            ending = stop.asked or late or done == total
            if not args.profile:
                if done % cfg.eval.every == 0 and not ending:
                    look(done)
                if done % cfg.train.checkpoint_every == 0 or ending:
                    save(done)
            if ending:
                break
        drain()
        if stop.asked:
            log.say(f"stopped at iteration {done} and saved: go on with --resume --out {out}")
            return 130
        if args.profile:
            profiler.report()
            return 0
        last = look(done)
    final_table(log, evaluator, parts, updates, out, last)
    return 0


def final_table(log: RunLog, evaluator: Any, parts: Parts, updates: Updates, out: Path, last: Look) -> None:
    """Teacher few-step and many-step beside the student, both samplers; printed and written to results.json."""
    with uncompiled():
        columns, rows = evaluator.table(student_for_use(parts, updates), parts.anchors, last)
    print_table("lower KID and FD are better", columns, rows)
    results = [dict(zip(columns, row, strict=True)) for row in rows]
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    log.say(
        f"student: {out / 'student'}; pictures: {out / 'grids'}; try\n"
        f'  python -m senseflow.sample --student {out} --prompts "red apple" --steps 4'
    )


def main(argv: list[str] | None = None) -> int:
    """Parses, runs, and turns bad input into one line on stderr and exit status 2."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv, __doc__ or "")
        return train(args)
    except torch.OutOfMemoryError as error:
        print(
            f"senseflow.train: {str(error).partition('. ')[0]}: --dry-run prints what holds the memory, and the flags "
            "with which it fits", file=sys.stderr,
        )  # fmt: skip
        return 2
    except (UserError, senseflow_kernels.Unavailable) as error:
        print(f"senseflow.train: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
