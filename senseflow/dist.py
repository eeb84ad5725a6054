"""Ranks: where this process stands among them, its rows of a batch, networks sharded or replicated, sums over all.

Every rank runs the same program on its own rows of the global batch. Losses are means over rows, so gradients are means
over ranks: FSDP2 reduces them where a network is sharded (over all ranks, or over `dist.shard` of them with replicas
of each shard: HSDP), `reduce_gradients` where every rank holds it whole (DDP). One process alone goes the same way, and
every sum here is then the value itself, bit for bit.

requires_grad is never toggled between the student's, the fake's and the discriminator's phase: a network whose first
FSDP2 forward happens frozen keeps the wrong dtypes for its reductions ever after (pytorch#186998). What a backward
fills is said by `Leaves` instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn

from senseflow.config import Config, UserError

BUCKET = 32 << 20  # bytes of gradients that travel together
# Of torchrun, and of Slurm's srun with a task for each rank.
NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


@dataclass
class World:
    """The ranks of a run. `size` 1 without a process group is one process alone."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: Any = None  # of the sharded networks, [shard] or [replicate, shard]; None where none is sharded
    host: Any = None  # a gloo group, for what the hosts tell each other

    @property
    def main(self) -> bool:
        """Whether this rank writes the run's files."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.mesh is not None

    # -- sums over ranks -------------------------------------------------------------------------------------------

    def mean(self, t: Tensor) -> Tensor:
        """The mean of a tensor over all ranks, the same bits on each; t itself for one."""
        if self.size == 1:
            return t
        out = t.detach().clone()
        td.all_reduce(out)
        return out / self.size

    def norm(self, part: Tensor, sharded: bool = True) -> Tensor:
        """The norm of a sharded vector from the norms of its shards, 0-d; `part` itself where nothing is sharded."""
        if not (sharded and self.sharded):
            return part
        square = part.float().square()
        td.all_reduce(square, group=self.mesh.get_group(self.mesh.ndim - 1))
        return square.sqrt()

    def most(self, *values: float) -> list[float]:
        """The largest of each value over all ranks; between the hosts alone, devices do not wait."""
        if self.size == 1:
            return list(values)
        t = torch.tensor(values, dtype=torch.float64)
        td.all_reduce(t, td.ReduceOp.MAX, group=self.host)
        return t.tolist()

    def tell(self, value: Any) -> Any:
        """Rank 0's value, any plain one, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        td.broadcast_object_list(box, 0, group=self.host)
        return box[0]

    def attempt(self, make: Callable[[], Any]) -> tuple[Any, str]:
        """(rank 0's make(), "") on every rank, or (None, its UserError's line)."""
        out: tuple[Any, str] = (None, "")
        if self.main:
            try:
                out = make(), ""
            except UserError as error:
                out = None, str(error)
        return self.tell(out)

    def in_turn(self, make: Callable[[], Any]) -> Any:
        """make() on rank 0, then on the others: what the first one leaves in a cache the others find."""
        out = make() if self.main else None
        self.barrier()
        return out if self.main else make()

    def barrier(self) -> None:
        if self.size > 1:
            td.barrier(group=self.host)

    # -- what every rank holds whole ---------------------------------------------------------------------------------

    @torch.no_grad()
    def reduce_gradients(self, params: Sequence[nn.Parameter]) -> None:
        """The gradients of replicated parameters become their means over all ranks, in fp32, in buckets that travel
        while the next ones are filled. Those of sharded ones are means already. A gradient must be there on all ranks
        or on none."""
        grads = [p.grad for p in params if p.grad is not None]
        if self.size == 1 or not grads or is_sharded(grads[0]):
            return
        moving = []
        for bucket in buckets(grads):
            flat = torch.cat([g.detach().reshape(-1).float() for g in bucket])
            moving.append((bucket, flat, td.all_reduce(flat, async_op=True)))
        for bucket, flat, work in moving:
            work.wait()
            flat /= self.size
            parts = flat.split([g.numel() for g in bucket])
            torch._foreach_copy_(bucket, [f.view(g.shape) for f, g in zip(parts, bucket, strict=True)])

    @torch.no_grad()
    def align(self, tensors: Iterable[Tensor]) -> None:
        """Rank 0's values of replicated tensors on every rank: weights drawn at the start, on whatever machine."""
        if self.size > 1:
            for t in tensors:
                td.broadcast(t.detach(), 0)

    @torch.no_grad()
    def check_in_step(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Raises RuntimeError where a replicated network's bits are not the same on all ranks."""
        if self.size == 1:
            return
        bits = [t.detach().contiguous().view(torch.uint8).long().sum() for t in tensors if t.numel()]
        ends = torch.stack([torch.stack(bits), -torch.stack(bits)])
        td.all_reduce(ends, td.ReduceOp.MAX)
        if not torch.equal(ends[0], -ends[1]):
            raise RuntimeError(f"{name} is no longer the same on all ranks")

    # -- rows --------------------------------------------------------------------------------------------------------

    def rows(self, batch: int) -> slice:
        """This rank's rows of a global batch."""
        return slice(self.rank * batch // self.size, (self.rank + 1) * batch // self.size)

    def shard(self, net: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """FSDP2 in place: each block by itself, then the rest; reductions in fp32. Nothing where none is sharded.

        All parameters of `net` become DTensors, split on dim 0. After every forward the gathered weights are freed, the
        root's too: kept ones would miss what IDA and the optimizer write.
        """
        if not self.sharded:
            return
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # Parameters travel as they are stored, and autocast does the rest: so a rank computes what one process would.
        how: dict[str, Any] = dict(
            mesh=self.mesh, reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
        )  # fmt: skip
        for block in blocks:
            fully_shard(block, **how)
        fully_shard(net, **how)


def is_sharded(t: Any) -> bool:
    return hasattr(t, "to_local") and hasattr(t, "placements")


def local(t: Any) -> Any:
    """This rank's part of a sharded tensor; any other itself."""
    return t.to_local() if is_sharded(t) else t


def whole(t: Any) -> Any:
    """All of a sharded tensor, on every rank (all must ask); any other itself."""
    if not is_sharded(t):
        return t
    return t.int().full_tensor().to(t.dtype) if t.dtype == torch.int16 else t.full_tensor()  # gloo gathers no int16


def buckets(tensors: Sequence[Tensor], limit: int = BUCKET) -> list[list[Tensor]]:
    """Tensors in their order, together up to `limit` bytes as fp32."""
    found: list[list[Tensor]] = []
    size = limit
    for t in tensors:
        if size + 4 * t.numel() > limit:
            found.append([])
            size = 0
        found[-1].append(t)
        size += 4 * t.numel()
    return found


class Leaves:
    """What a backward fills: the parameters of some networks, and nothing else, without toggling requires_grad.

    A sharded network computes on gathered parameters, which are what autograd knows; they are noted as each forward
    with gradients passes. FSDP2 then reduces what they got into the gradients of the shards. A network whose
    requires_grad is another than at the start raises RuntimeError, at its forward where it is sharded.
    """

    def __init__(self, nets: dict[str, nn.Module], params: dict[str, list[nn.Parameter]]):
        self.nets, self.params = nets, params
        self.seen: dict[str, dict[int, Tensor]] = {name: {} for name in nets}
        for name, net in nets.items():
            for module in net.modules():
                if is_fsdp(module):
                    # Before FSDP2's own hook, where a first frozen forward would already have settled the dtypes.
                    own = _own(module)
                    trains = [getattr(m, key).requires_grad for m, key in own]
                    module.register_forward_pre_hook(self._guard(name, own, trains), prepend=True)
                    module.register_forward_pre_hook(self._hook(name, own))

    def _guard(self, name: str, own: list[tuple[nn.Module, str]], trains: list[bool]) -> Any:
        def check(*_: Any) -> None:
            if [getattr(module, key).requires_grad for module, key in own] != trains:
                raise RuntimeError(toggled(name))

        return check

    def _hook(self, name: str, own: list[tuple[nn.Module, str]]) -> Any:
        def note(*_: Any) -> None:
            if torch.is_grad_enabled():
                found = (getattr(module, key) for module, key in own)
                self.seen[name].update((id(p), p) for p in found if p.requires_grad)

        return note

    def backward(self, loss: Tensor, *names: str) -> None:
        """Adds the gradients of loss to the named networks' parameters."""
        inputs: list[Tensor] = []
        for name, net in self.nets.items():
            if self.seen[name]:  # the weights outside of blocks: where features left the network midway, none of the
                net.unshard()  # pyright: ignore[reportCallIssue] # outputs whose gradient would gather them is used
        for name in names:
            net = self.nets[name]
            if is_fsdp(net):
                inputs += self.seen[name].values()
            elif not all(p.requires_grad for p in self.params[name]):
                raise RuntimeError(toggled(name))
            else:
                inputs += self.params[name]
        loss.backward(inputs=inputs)

    def clear(self) -> None:
        for seen in self.seen.values():
            seen.clear()


def toggled(name: str) -> str:
    return f"requires_grad of {name} was toggled: a sharded network would keep wrong dtypes (pytorch#186998)"


def is_fsdp(module: nn.Module) -> bool:
    return hasattr(module, "unshard") and hasattr(module, "set_requires_gradient_sync")


def _own(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """(module, name) of the parameters in an FSDP2 module's own group: below it, but not below another."""
    found, stack = [], [module]
    while stack:
        m = stack.pop()
        found += [(m, name) for name, p in m.named_parameters(recurse=False) if p is not None]
        stack += [child for child in m.children() if not is_fsdp(child)]
    return found


# -- starting ----------------------------------------------------------------------------------------------------------


def place() -> tuple[int, int, int] | None:
    """(rank, ranks, rank on this machine) by torchrun's variables or Slurm's; None for one process alone."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        names = list(NAMES)
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ:
        names = list(NAMES.values())
    else:
        return None
    rank, size, here = (int(os.environ.get(name, "0")) for name in names)
    return rank, size, here


def start(cfg: Config) -> World:
    """This process's World, with a process group where it is one of several (gloo between hosts, NCCL between GPUs).

    Raises UserError for settings that this number of ranks does not allow; `stop` ends the group.
    """
    found = place()
    cuda = torch.cuda.is_available()
    if found is None:
        world = World(device=torch.device("cuda" if cuda else "cpu"))
        check(cfg, world)
        return world
    rank, size, here = found
    device = torch.device("cuda", here) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    patience = timedelta(seconds=cfg.dist.timeout)
    td.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=patience, rank=rank, world_size=size)
    world = World(rank, size, device, host=td.new_group(backend="gloo", timeout=patience))
    check(cfg, world)
    world.mesh = make_mesh(cfg, world)
    return world


def make_mesh(cfg: Config, world: World) -> Any:
    """[shard], or [replicate, shard] where dist.shard is a part of the ranks; None where networks are not sharded."""
    mode = cfg.dist.mode
    if mode == "ddp" or (mode == "auto" and (world.size == 1 or cfg.model.variant == "lora")):
        return None
    from torch.distributed.device_mesh import init_device_mesh

    kind, ways = world.device.type, cfg.dist.shard or world.size
    if ways == world.size:
        return init_device_mesh(kind, (ways,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (world.size // ways, ways), mesh_dim_names=("replicate", "shard"))


def check(cfg: Config, world: World) -> None:
    """Raises UserError for settings that this number of ranks does not allow."""
    size, ways, parts = world.size, cfg.dist.shard or world.size, cfg.train.accumulate
    if cfg.data.batch % (size * parts):
        raise UserError(
            f"data.batch = {cfg.data.batch}: allowed are multiples of {size * parts}, "
            f"{size} ranks times train.accumulate = {parts}"
        )
    if size % ways:
        raise UserError(f"dist.shard = {ways}: allowed is 0 or what divides the {size} ranks")
    sharded = cfg.dist.mode == "fsdp" or (cfg.dist.mode == "auto" and size > 1 and cfg.model.variant == "full")
    if sharded and world.host is None:
        raise UserError("dist.mode = 'fsdp': allowed is auto for one process, start ranks with torchrun")
    if sharded and cfg.model.variant == "lora":
        raise UserError("dist.mode = 'fsdp': allowed are auto and ddp with model.variant = 'lora'")
    many = size * parts > 1
    for wrong, name, allowed in (
        (sharded and cfg.optim.name != "senseflow", f"optim.name = {cfg.optim.name!r}", "senseflow where sharded"),
        (sharded and cfg.optim.host, "optim.host = True", "false where networks are sharded"),
        (
            cfg.optim.in_backward and ((not sharded and size > 1) or parts > 1),
            "optim.in_backward = True",
            "false with train.accumulate, and with ranks that are not sharded",
        ),
        (
            sharded and cfg.optim.in_backward and cfg.disc.kind == "fake_features",
            "optim.in_backward = True",
            "false with disc.kind = 'fake_features' where networks are sharded",
        ),
        (many and cfg.dmd.normaliser == "batch", "dmd.normaliser = 'batch'", "sample where a batch is split"),
    ):
        if wrong:
            raise UserError(f"{name}: allowed is {allowed}")


def stop() -> None:
    """Ends the process group, where there is one."""
    if td.is_available() and td.is_initialized():
        td.destroy_process_group()
