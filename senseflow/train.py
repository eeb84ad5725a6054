"""Distils a teacher into a few-step student: `python -m senseflow.train [PRESET] [--any.field VALUE]`.

`build` makes the networks and the data, `Training` is the run; an iteration is iteration.py, its steps steps.py.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

import senseflow_kernels
from senseflow import checkpoint, dist, fitting, planning
from senseflow.algo.discriminator import FakeFeatureDiscriminator, VFMDiscriminator
from senseflow.algo.isg import ErrorCurve, measure_error_curve
from senseflow.cli import Arguments, extra_named, parse
from senseflow.compiling import compile_parts, uncompiled
from senseflow.config import Config, UserError
from senseflow.data.batches import EmbeddedData
from senseflow.data.cache import is_cache, open_cache
from senseflow.data.emoji import load_variants
from senseflow.data.stream import open_stream
from senseflow.dist import World
from senseflow.draws import Draws
from senseflow.evaluate import Look, grid_captions, make_evaluator, teacher_pictures
from senseflow.fields import to_dict
from senseflow.graphs import advance
from senseflow.iteration import iterate
from senseflow.logs import Diverged, MetricRing, Monitors, NoLog, RunLog, print_table
from senseflow.models.adapter import Condition
from senseflow.models.embedded import teacher_folder
from senseflow.models.families import DTYPES, make_adapter, make_networks
from senseflow.models.identity import identity
from senseflow.models.recompute import recompute_decoder, recomputed
from senseflow.models.vfm import cast_once, find_dinov2
from senseflow.profiling import Profiler
from senseflow.resuming import check_config, is_best, read_state, resumed, roll_back
from senseflow.saving import Saver
from senseflow.shipping import looking, save_curve, ship, skeleton_of
from senseflow.steps import Parts, encoded, keep_reference, phased, text_vector
from senseflow.updates import Updates, drift
from senseflow.watch import INTERRUPTED, Stop, Watchdog, say_alone

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
    cast_once(vfm, DTYPES[cfg.model.dtype])
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


def open_data(cfg: Config, adapter: Any, teacher: nn.Module | None, world: World) -> Any:
    """This rank's batches of data.path: a cache, a source, or the embedded emoji, which data.images = teacher has from
    `teacher`. Raises UserError for what is not there."""
    device, rank, size = world.device, world.rank, world.size
    if is_cache(cfg.data.path):
        return open_cache(cfg, adapter, Draws(cfg.seed), device, identity(adapter), rank, size)
    if cfg.data.path:
        return open_stream(cfg, adapter, Draws(cfg.seed), device, rank, size)
    if cfg.data.images == "teacher":
        assert teacher is not None
        images = teacher_pictures(cfg, adapter, teacher, teacher_folder(cfg.model.teacher))
    else:
        images = load_variants(canvas=cfg.model.side)
    return EmbeddedData(images, adapter.encode_prompts(images.captions), cfg.seed, device, rank, size)


def build(cfg: Config, device: torch.device, world: World | None = None) -> tuple[Parts, Any]:
    """Every network and this rank's data; student and fake are sharded where the world is, the teacher not yet. Raises
    UserError for a family or a file that is not there."""
    world = world or World(device=device)
    if cfg.data.images == "teacher" and cfg.model.family != "embedded":
        raise UserError("data.images = 'teacher' needs model.family = 'embedded': allowed is 'pictures'")
    why_not = senseflow_kernels.reason_against(device)
    if cfg.kernels.strict and why_not:
        raise UserError(f"kernels.strict = True, and the fused kernels cannot run: {why_not}")
    adapter = make_adapter(cfg.model, device)
    skeletons: list[nn.Module] = []

    def place(net: nn.Module) -> None:
        if world.sharded and world.main and not skeletons:
            skeletons.append(skeleton_of(net))
        world.shard(net, adapter.blocks(net))

    shown = data = None
    if cfg.model.family != "embedded":  # whose text encoders, large ones, come and go before there is a network
        data = world.in_turn(lambda: open_data(cfg, adapter, None, world))
        shown = adapter.encode_prompts(grid_captions(cfg))
        if not data.encodes_text:
            adapter.free_text()
    teacher, student, fake = make_networks(cfg, adapter, device, place)
    data = data or world.in_turn(lambda: open_data(cfg, adapter, teacher, world))
    torch.manual_seed(cfg.seed)  # the heads' initial weights, the only numbers not from Draws
    disc, vfm = build_discriminator(cfg, adapter, fake, data.example(), device)
    anchors = adapter.schedule.anchors(cfg.model.steps, cfg.model.anchors == "released")
    parts = Parts(adapter, student, fake, teacher, disc, vfm, anchors, Draws(cfg.seed), world=world)
    parts.skeleton, parts.shown = skeletons[0] if skeletons else None, shown
    trained = [p for net in (student, fake) if not world.sharded for p in net.parameters() if p.requires_grad]
    world.align([*trained, *([] if disc is None else [*disc.parameters(), *disc.buffers()])])
    if cfg.isg.midpoint == "adaptive":
        batch = encoded(parts, data.batch(0, cfg.data.batch), 0)
        noise = parts.draws.normal(0, batch.samples, "curve", tuple(batch.latents.shape[1:]))
        sigmas = torch.linspace(1 / CURVE_POINTS, 1, CURVE_POINTS)
        parts.curve = measure_error_curve(adapter, teacher, batch.latents, batch.cond, noise, sigmas)
        parts.curve = ErrorCurve(parts.curve.sigmas, world.mean(parts.curve.xi))
    keep_reference(parts, cfg, data)
    return parts, data


def plan(cfg: Config, ranks: int = 1) -> int:
    """Prints what each of the ranks would hold in memory, and where that does not fit, the flags with which it does.
    Returns the exit status: 1 where nothing fits."""
    planner = planning.Planner(cfg, planning.target_of(cfg, ranks), iterate, build_discriminator)
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


def resume(cfg: Config, updates: Updates, folder: Path, wanted: bool, fingerprint: str) -> tuple[int, dict[str, Any]]:
    """(the iteration to go on from, what else the checkpoint holds). Raises UserError when there is nothing to resume,
    or a run to overwrite, and for other settings or other data (fingerprint: of the data) than before."""
    world = updates.world
    path, problem = world.attempt(lambda: checkpoint.newest(folder / "checkpoints"))
    if problem:
        raise UserError(problem)
    if not wanted:
        if path:
            number = checkpoint.iteration_of(path)
            raise UserError(f"{folder} holds a run at iteration {number}: add --resume, or choose another --out")
        return 0, {}
    if not path:
        raise UserError(f"--resume: no checkpoint in {folder / 'checkpoints'}")
    plain = checkpoint.read_plain(path)
    check_config(plain["config"], cfg)
    if plain.get("data", fingerprint) != fingerprint:
        raise UserError(f"--resume: data.path = {cfg.data.path!r} holds other samples than it did in the checkpoint")
    state = read_state(path, updates)
    updates.load(state.pop("updates"))
    return checkpoint.iteration_of(path), state | {"path": path}


def train(args: Arguments) -> int:
    """The run. Returns the exit status: 0 done, 130 interrupted and 75 preempted (both saved)."""
    cfg = args.config
    if cfg.train.threads > 0:
        torch.set_num_threads(cfg.train.threads)
    if args.dry_run:
        rank, size, _ = dist.place() or (0, 1, 0)
        return plan(cfg, size) if rank == 0 else 0
    status = Training(args, dist.start(cfg)).run()
    dist.stop()  # not after an error, in which the other ranks may still wait
    return status


class Training:
    """A run on one of the ranks: its networks and data, what it writes, and the loop."""

    def __init__(self, args: Arguments, world: World):
        """Builds everything, and takes up a checkpoint. Raises UserError as `build` and `resume` do."""
        cfg, out, t = args.config, Path(args.config.out), args.config.train
        self.started, self.args, self.cfg, self.world, self.out = time.monotonic(), args, cfg, world, out
        self.parts, self.data = build(cfg, world.device, world)
        self.updates = Updates(cfg, self.parts)
        # profiling is a cycle for warm-up, FLOPs, times, trace
        self.total = t.fake_warmup + 4 * t.gen_every if args.profile else t.iterations
        self.first, before = resume(cfg, self.updates, out, args.resume, self.data.fingerprint)
        self.log: Any = NoLog()
        if world.main:
            self.log = RunLog(out, cfg.log.tensorboard, cfg.log.progress, self.total, resume_at=self.first)
        self.data.begin(out, self.first)
        if world.main:
            (out / "config.json").write_text(json.dumps(to_dict(cfg), indent=1) + "\n")
            if self.parts.curve is not None:
                save_curve(self.parts.curve, self.parts.anchors, out)
        compile_parts(self.parts, cfg)
        self.shown = world.sharded or world.main  # this rank takes part in evaluations
        self.evaluator: Any = world.in_turn(lambda: make_evaluator(cfg, self.parts) if self.shown else None)
        world.shard(self.parts.teacher, self.parts.adapter.blocks(self.parts.teacher))
        if not self.data.encodes_text:
            self.parts.adapter.free_text()
        self.monitors = self._monitors(before)
        if before:
            self.log.say(resumed(before["path"], world, before["config"], cfg))
        self.ring = MetricRing()
        self.profiler = Profiler(args.profile and world.main, out, self.total, t.gen_every, DTYPES[cfg.model.dtype])
        if args.profile:
            phased(self.parts, self.profiler)
        self.advance = advance(cfg, self.parts, self.updates, iterate, args.profile)
        self.saver = Saver(out / "checkpoints", world, t.keep_last, t.keep_best, t.checkpoint_async)
        self.scores: dict[int, float] = {}  # KID by iteration
        self.rollbacks, self.resumed = cfg.health.rollbacks, bool(before)

    def _monitors(self, state: dict[str, Any]) -> Monitors:
        found = Monitors(self.cfg.train.max_nonfinite, strict=self.cfg.health.on_divergence != "warn")
        found.load_state_dict(state.get("monitors", {}))
        return found

    def save(self, iteration: int) -> None:
        disc = self.parts.disc
        if disc is not None:
            self.world.check_in_step("the discriminator", [*disc.parameters(), *disc.buffers()])
        state = dict(config=to_dict(self.cfg), updates=self.updates.state(), data=self.data.fingerprint)
        state |= dict(monitors=self.monitors.state_dict())
        self.saver.save(iteration, state, score=self.scores.get(iteration))
        ship(self.cfg, self.parts, self.updates, self.out)

    def look(self, iteration: int) -> Look | None:
        """Scores and pictures of the student as it is; None on a rank that takes no part."""
        if not self.shown:
            return None
        with uncompiled(), looking(self.parts, self.updates) as net:
            result = self.evaluator.measure(net, self.parts.anchors)
        if result.scores is not None:
            self.scores[iteration] = result.scores.kid
        if self.world.main:
            file = self.out / "grids" / f"{iteration:06d}.png"
            self.log.evaluation(iteration, result.row(), result.grid(self.evaluator), file)
        return result

    def drain(self) -> None:
        """Metrics from the device to the log, past the monitors. Raises Diverged."""
        rows = self.ring.drain(self.world.mean)
        self.log.metrics(rows)
        self.monitors.last_good = self.saver.settled
        for warning in self.monitors.check(rows):
            self.log.warn(warning)

    def iteration(self, iteration: int, dog: Watchdog) -> None:
        dog.beat(f"data of iteration {iteration + 1}")
        with self.profiler.iteration():
            with self.parts.phase("data"):  # waiting for it; a source's prompts are encoded here too
                batch = self.data.batch(iteration, self.cfg.data.batch)
            dog.beat(f"iteration {iteration + 1}")
            with self.parts.phase("encode"):
                batch = encoded(self.parts, batch, iteration)
            metrics = self.advance(batch, iteration)
        if (iteration + 1) % self.cfg.log.every == 0:
            metrics["ida_drift"] = drift(self.updates)
        self.ring.put(iteration + 1, metrics)

    def back(self, error: Diverged) -> int:
        """The iteration of the last good checkpoint, which is loaded. Raises Diverged where health says to stop."""
        if self.cfg.health.on_divergence != "rollback":
            raise error
        self.saver.wait()
        iteration, state = roll_back(
            self.saver.folder, self.updates, error, self.cfg.health.slower, self.rollbacks
        )  # fmt: skip
        self.rollbacks -= 1
        self.monitors = self._monitors(state)
        self.log.warn(f"{error}; went back to iteration {iteration}, rates times {self.updates.rate:g}")
        return iteration

    def keep(self, done: int, ending: bool) -> None:
        """An evaluation and a checkpoint, where they are due after so many iterations."""
        best, t = False, self.cfg.train
        if done % self.cfg.eval.every == 0 and not ending:
            self.look(done)
            best = t.keep_best > 0 and self.world.tell(is_best(self.scores, done, t.keep_best))
        if done % t.checkpoint_every == 0 or ending or best:
            self.save(done)

    def loop(self, stop: Stop, dog: Watchdog) -> tuple[int, int]:
        """(iterations done, exit status: not 0 where a signal ended them)."""
        cfg, t = self.cfg, self.cfg.train
        iteration = done = self.first  # a run that was saved at its end has only its table left
        while iteration < self.total:
            self.iteration(iteration, dog)
            done = iteration + 1
            late = 0 < t.minutes * 60 <= time.monotonic() - self.started
            status, late, failed = self.world.most(stop.status, late, self.saver.failed)  # ranks end at one iteration
            if failed:
                self.saver.wait()
            ending = bool(status or late or done == self.total)
            if ending or any(done % n == 0 for n in (cfg.log.every, cfg.eval.every, t.checkpoint_every)):
                try:
                    self.drain()
                except Diverged as error:
                    iteration = self.back(error)
                    continue
            dog.beat(f"evaluation or checkpoint after iteration {done}")
            if not self.args.profile:
                self.keep(done, ending)
            if ending:
                return done, int(status)
            iteration = done
        return done, 0

    def run(self) -> int:
        """Returns the exit status."""
        cfg, world = self.cfg, self.world
        with (
            Stop(world.main) as stop, self.log, closing(self.data), senseflow_kernels.strict(cfg.kernels.strict),
            Watchdog(world, cfg.dist.stuck, say_alone) as dog,
        ):  # fmt: skip
            if self.first == 0 and not self.args.profile:
                self.look(0)
            if self.resumed and self.first >= self.total:  # it may have ended before the student's files were there
                ship(cfg, self.parts, self.updates, self.out)
            done, status = self.loop(stop, dog)
            dog.beat("the last checkpoint")
            self.saver.wait()
            world.barrier()  # a rank that has ended makes torchrun or Slurm end the others, which may not be done
            if status:
                self.log.say(f"stopped at iteration {done} and saved: go on with the same command and --resume")
                return status
            if self.args.profile:
                if world.main:
                    self.profiler.report()
                return 0
            last = self.look(done)
            if self.shown:
                final_table(self.log, self.evaluator, self.parts, self.updates, self.out, last)
        world.barrier()
        return 0


def final_table(log: Any, evaluator: Any, parts: Parts, updates: Updates, out: Path, last: Look | None) -> None:
    """Teacher few-step and many-step beside the student, both samplers; printed and written to results.json."""
    with uncompiled(), looking(parts, updates) as net:
        columns, rows = evaluator.table(net, parts.anchors, last)
    if not parts.world.main:
        return
    if rows:  # none for a teacher that the score networks do not know
        print_table("lower KID and FD are better", columns, rows)
        results = [dict(zip(columns, row, strict=True)) for row in rows]
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    log.say(
        f"student: {out / 'student'}; pictures: {out / 'grids'}; try\n"
        f'  python -m senseflow.sample --student {out} --prompts "red apple" --steps {len(parts.anchors)}'
    )


def main(argv: list[str] | None = None) -> int:
    """Parses, runs, and turns bad input into one line on stderr and exit status 2."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv, __doc__ or "")
        with extra_named():
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
    except KeyboardInterrupt:
        say_alone("ended at once; --resume goes on from the last checkpoint, if there is one")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
