"""Small trainings on several gloo ranks: a random two-block SD3 transformer with random pictures and prompts, or a tiny
pipeline of a real family with its own text encoders and VAE."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

TEST_MODULES = [
    "diffusers.models.transformers.transformer_sd3", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "senseflow.train",
]  # fmt: skip
SMALL = [f"--{setting}" for setting in (
    "data.batch=4", "data.images=pictures", "train.gen_every=1", "disc.taps=0,1", "disc.width=8", "disc.size=32",
    "disc.downsample=1",
    "disc.cmap=8", "rollout.backward_prob=0.5", "train.lr=1e-4", "train.fake_lr=1e-4", "train.clip=0.5",
    "train.cooldown=0", "seed=1",
)]  # fmt: skip


# Beside these, of a real family: an adapter of its own in fp32, as tests/tiny_pipelines.py writes it.
FAMILY = [f"--{setting}" for setting in (
    "model.side=64", "model.text_length=16", "model.dtype=fp32", "model.decode=fp32", "train.precision=fp32",
    "disc.backbone=",
)]  # fmt: skip


class TinyVFM(nn.Module):
    """A frozen backbone of two taps on patches of 8x8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.dims = [16, 16]
        self.blocks = nn.ModuleList([nn.Conv2d(3, 16, 8, 8), nn.Conv2d(16, 16, 1)])
        g = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
        self.requires_grad_(False)

    def features(self, pixels: torch.Tensor, taps: Any, size: int) -> list[torch.Tensor]:
        out, x = [], nn.functional.interpolate(pixels, (size, size), mode="bilinear")
        for block in self.blocks:
            x = block(x).tanh()
            out.append(x)
        return [out[t] for t in taps]


def encoded_prompts(prompts: Any) -> Any:
    """Random embeddings that belong to each text."""
    from zlib import crc32

    from senseflow.models.adapter import Condition

    rows = [torch.randn(17, 384, generator=torch.Generator().manual_seed(crc32(t.encode()))) for t in prompts]
    both = torch.stack(rows)
    return Condition(both[:, :16], both[:, 16])


def in_own_dtype(predict: Callable[..., Any]) -> Callable[..., Any]:
    """The embedded family's predict, which knows fp32 alone, in the arithmetic of bf16 networks too."""
    from senseflow.models.adapter import Condition, in_dtype

    def run(net: Any, x: torch.Tensor, sigma: torch.Tensor, cond: Any, guidance: Any = None) -> torch.Tensor:
        dtype = next(net.parameters()).dtype
        with in_dtype(x, dtype):
            inner = Condition(cond.embeds.to(dtype), cond.pooled.to(dtype))
            return predict(net, x.to(dtype), sigma, inner, guidance).to(x.dtype)

    return run


@contextmanager
def small_parts(preset: str = "tiny"):
    """`train.build` with a small backbone; pictures and prompts of the embedded family are random, of others a few of
    the real ones."""
    from tiny_pipelines import few_pictures

    from senseflow import train
    from senseflow.data.batches import EmbeddedData
    from senseflow.data.emoji import EmojiSet

    def data(cfg: Any, adapter: Any, teacher: Any, world: Any) -> EmbeddedData:
        adapter.encode_prompts = encoded_prompts
        adapter.predict = in_own_dtype(adapter.predict)
        g = torch.Generator().manual_seed(3)
        images = torch.randint(0, 256, (6, 2, 3, 32, 32), generator=g, dtype=torch.uint8)
        names = [f"picture {i}" for i in range(6)]
        cond = adapter.encode_prompts(names)
        return EmbeddedData(EmojiSet(images, names), cond, cfg.seed, world.device, world.rank, world.size)

    kept = train.open_data, train.find_dinov2, train.load_variants
    train.find_dinov2, train.load_variants = lambda *_: TinyVFM(), few_pictures
    if preset == "tiny":
        train.open_data = data
    try:
        yield
    finally:
        train.open_data, train.find_dinov2, train.load_variants = kept


class NoEvaluator:
    """Looks at nothing, for runs of `train.main` whose weights alone are asked for."""

    def __init__(self) -> None:
        self.shown = torch.arange(1)
        self.few_pictures = self.many_pictures = torch.zeros(1, 3, 32, 32)

    def measure(self, net: Any, anchors: Any, sampler: str = "renoise") -> Any:
        from senseflow.evaluate import Look

        assert next(net.parameters()).isfinite().all()
        return Look(None, torch.zeros(1, 3, 32, 32))

    def table(self, net: Any, anchors: Any, renoise: Any = None) -> Any:
        return ["generator"], []


FILES = [f"--{setting}" for setting in (
    "eval.every=1000", "log.every=2", "log.tensorboard=false", "log.progress=false", "train.iterations=8",
    "train.checkpoint_every=2", "train.gen_every=2", "train.threads=1",
)]  # fmt: skip


def main(teacher: Path, out: Path, *flags: str) -> int:
    """`train.main` of a small run that writes into `out`; its exit status."""
    from senseflow import train

    kept, train.make_evaluator = train.make_evaluator, lambda *_: NoEvaluator()
    try:
        with small_parts():
            return train.main(["tiny", "--teacher", str(teacher), "--out", str(out), *SMALL, *FILES, *flags])
    finally:
        train.make_evaluator = kept


def _main(rank: int, world: int, port: int, args: tuple) -> None:
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
        os.environ |= dict(LOCAL_RANK=str(rank))
    os._exit(main(*args))  # as a rank that is done, whatever threads are left


def start(world: int, *args: Any) -> list[Any]:
    """The processes of `main(*args)` on `world` ranks."""
    import multiprocessing

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    multiprocessing.set_forkserver_preload(TEST_MODULES)
    context: Any = multiprocessing.get_context(START)
    ranks = [context.Process(target=_main, args=(rank, world, port, args)) for rank in range(world)]
    for process in ranks:
        process.start()
    return ranks


def config(teacher: Path, *flags: str, preset: str = "tiny") -> Any:
    from senseflow.cli import parse

    small = SMALL if preset == "tiny" else [*SMALL, *FAMILY]
    return parse([preset, "--teacher", str(teacher), *small, *flags], "").config


class Run:
    """A training without files, on one rank or on all of the process group."""

    def __init__(self, teacher: Path, *flags: str, world: Any = None, preset: str = "tiny"):
        from senseflow import dist, train
        from senseflow.updates import Updates

        self.cfg = config(teacher, *flags, preset=preset)
        self.world = world or dist.World()
        dist.check(self.cfg, self.world)
        self.world.mesh = dist.make_mesh(self.cfg, self.world) if world else None
        with small_parts(preset):
            self.parts, self.data = train.build(self.cfg, self.world.device, self.world)
        self.world.shard(self.parts.teacher, self.parts.adapter.blocks(self.parts.teacher))
        self.updates = Updates(self.cfg, self.parts)
        self.grads: dict[str, list[torch.Tensor]] = {}
        self.rows: list[dict[str, float]] = []
        self._apply = self.updates._apply
        self.updates._apply = self.spy

    def spy(self, loss: Any, iteration: int, *names: str, **how: Any) -> Any:
        """Keeps the first gradients, whole."""
        from senseflow.dist import whole

        for name in names:
            if name not in self.grads:
                grads = [p.grad for p in self.updates.params[name]]
                self.grads[name] = [torch.zeros(()) if g is None else whole(g.detach()).float().clone() for g in grads]
        return self._apply(loss, iteration, *names, **how)

    def step(self, batch: Any, i: int) -> dict[str, torch.Tensor]:
        from senseflow.train import iterate

        return iterate(self.cfg, self.parts, self.updates, batch, i)

    def go(self, first: int, last: int) -> Run:
        from senseflow.steps import encoded

        for i in range(first, last):
            metrics = self.step(encoded(self.parts, self.data.batch(i, self.cfg.data.batch), i), i)
            self.rows.append({k: float(self.world.mean(v)) for k, v in metrics.items()})
        return self

    def weights(self) -> dict[str, list[torch.Tensor]]:
        from senseflow.dist import whole

        return {name: [whole(p.detach()).clone() for p in ps] for name, ps in self.updates.params.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint has, whole: weights, halves, moments, counts, EMA, spectral norms."""
        from senseflow import checkpoint
        from senseflow.dist import whole

        found, _ = checkpoint.split(self.updates.state())
        return {name: whole(t).clone() for name, t in found.items()}


def _start(rank: int, work: Callable[..., Any], world: int, port: int, args: tuple) -> None:
    import torch.distributed as td

    from senseflow.dist import World

    torch.set_num_threads(1)
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    td.init_process_group("gloo", rank=rank, world_size=world)
    work(World(rank, world, host=td.new_group(backend="gloo")), *args)
    td.barrier()
    td.destroy_process_group()


def launch(world: int, work: Callable[..., Any], *args: Any) -> None:
    """work(World, *args) on `world` ranks. They are forked from a server that has imported everything once."""
    import multiprocessing

    import torch.multiprocessing as mp

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    multiprocessing.set_forkserver_preload(TEST_MODULES)
    mp.start_processes(_start, (work, world, port, args), nprocs=world, start_method=START)


START = "forkserver"
