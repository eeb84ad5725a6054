"""AdamW on DTensor shards: the bits of one process on any number of ranks; saved on 2 ranks, loaded on 1 and 4."""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from senseflow_kernels import AdamW, _ext, split_fp32

SHAPES = [(64, 256), (24, 192), (10, 7), (5,)]  # not all divide among 4 ranks; two have 8-bit moments
CASES = {
    "split": dict(precision="split", moments=torch.float32),
    "stochastic 8bit": dict(precision="stochastic", moments="8bit"),
    "fp32 8bit": dict(precision="fp32", moments="8bit"),
}  # fmt: skip


def values(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(dtype) for s in SHAPES]


def built(case, mesh):
    """(parameters, phi, ema, optimizer) with every tensor sharded on dim 0 of the mesh; plain ones where it is None."""
    from torch.distributed.tensor import Shard, distribute_tensor

    dtype = torch.float32 if case["precision"] == "fp32" else torch.bfloat16

    def place(t):
        return t if mesh is None else distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None)

    theta = [torch.nn.Parameter(place(t)) for t in values(0, dtype)]
    phi, low = [t.to(dtype) for t in values(1)], None
    if case["precision"] == "split":
        phi, low = zip(*map(split_fp32, values(1)), strict=True)
        low = [place(t) for t in low]
    phi, ema = [place(t) for t in phi], [place(t) for t in values(2)]
    optimizer = AdamW(theta, lr=1e-2, phi=phi, phi_low=low, ema=ema, seed=7, **case)
    return theta, phi, ema, optimizer, low or []


def steps(theta, optimizer, mesh, first, last):
    from torch.distributed.tensor import Shard, distribute_tensor

    for i in range(first, last):
        for p, g in zip(theta, values(10 + i, theta[0].dtype), strict=True):
            p.grad = g if mesh is None else distribute_tensor(g, mesh, [Shard(0)], src_data_rank=None)
        optimizer.step(lam=0.9, ema_decay=0.99, coefficient=torch.tensor(0.5))


def whole(t):
    t = t.int() if t.dtype == torch.int16 else t  # which gloo does not gather
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().float()


def named(theta, phi, ema, optimizer, low):
    """Everything, for a checkpoint: {name: tensor}."""
    found = {f"{k}{i}": t.detach() for k, ts in dict(theta=theta, phi=phi, ema=ema, low=low).items()
             for i, t in enumerate(ts)}  # fmt: skip
    for i, p in enumerate(theta):
        found |= {f"state{i}.{k}": t for k, t in optimizer.state[p].items()}
    return found


def worker(rank, world, port, folder, save_at, load, last):
    """Ranks of one run: from the start or a checkpoint to step `last`, saved there or at `save_at`."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import init_device_mesh

    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    _ext.INTERPRET = False
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (world,))
        for name, case in CASES.items():
            theta, *rest = built(case, mesh)
            optimizer, first = rest[2], 0
            path = folder / name.replace(" ", "-")
            if load:
                state = named(theta, *rest)
                dcp.load(state, checkpoint_id=path / "saved")
                for i, p in enumerate(theta):  # counts are shared: they come back through the optimizer's own load
                    optimizer.state[p]["step"] = state[f"state{i}.step"].clone()
                optimizer.load_state_dict(optimizer.state_dict())
                first = save_at
            steps(theta, optimizer, mesh, first, last)
            if last == save_at:
                dcp.save(named(theta, *rest), checkpoint_id=path / "saved")
            result = {k: whole(t) for k, t in named(theta, *rest).items()}
            if rank == 0:
                torch.save(result, path / f"end-{world}-{load}.pt")
            dist.barrier()
    finally:
        dist.destroy_process_group()


def launch(world, *args):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    sys.path[:0] = [str(Path(__file__).parent)]
    try:
        torch.multiprocessing.spawn(worker, (world, port, *args), nprocs=world)
    finally:
        sys.path.pop(0)


def check(folder, world, load, last):
    """The results of a run beside those of one process without DTensors."""
    _ext.INTERPRET, before = False, _ext.INTERPRET
    try:
        for name, case in CASES.items():
            theta, *rest = built(case, None)
            steps(theta, rest[2], None, 0, last)
            got = torch.load(folder / name.replace(" ", "-") / f"end-{world}-{load}.pt")
            for key, t in named(theta, *rest).items():
                assert torch.equal(got[key], whole(t)), (name, key)
    finally:
        _ext.INTERPRET = before


@pytest.fixture
def folder(tmp_path):
    for name in CASES:
        (tmp_path / name.replace(" ", "-")).mkdir()
    return tmp_path


def test_two_ranks_have_the_bits_of_one(folder):
    launch(2, folder, -1, False, 2)
    check(folder, 2, False, 2)


@pytest.mark.slow
def test_any_ranks_and_a_checkpoint_between_them(folder):
    """1, 2 and 4 ranks from the start; saved on 2 after 3 of 5 steps and gone on with on 1, 2 and 4: the same bits."""
    for world in (1, 4):
        launch(world, folder, -1, False, 3)
        check(folder, world, False, 3)
    launch(2, folder, 3, False, 3)
    check(folder, 2, False, 3)
    for world in (1, 2, 4):
        launch(world, folder, 3, True, 5)
        check(folder, world, True, 5)
