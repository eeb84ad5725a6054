"""Any number of ranks trains what one process does: gradients, weights, metrics; the phase trap; refusals.

Bounds, fp32. A mean over 4 samples taken as means of 2, or by another order of summation, rounds differently: each sum
of n numbers by up to about sqrt(n) 2^-24 of its size, and the backward's products pass that on. GRADIENT, 2e-5 of a
network's gradient norm, is some 300 roundings; measured 1e-7 to 6e-6. Adam divides by the gradient's own size, so in
its first steps an element whose gradient is no more than rounding may move by a whole rate either way: over 3 steps the
mean distance of weights stays within 1 % of a rate, and none is further than 6 rates.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import Run, config, launch, main, start
from safetensors.torch import load_file, save_file
from tiny_pipelines import embedded_teacher

from senseflow import checkpoint
from senseflow.config import UserError
from senseflow.dist import World, buckets, check

GRADIENT, RATE = 2e-5, 1e-4
SPLIT = ("--model.dtype", "bf16", "--train.precision", "split")
DMD2 = ("--disc.kind", "fake_features", "--isg.weight", "0", "--ida.lam", "1")
FAST = {
    "fsdp": (),
    "ddp": ("--dist.mode", "ddp"),
    "fsdp accumulate recompute": ("--train.accumulate", "2", "--model.checkpointing", "full"),
    "dmd2": DMD2,
    "adaptive in_backward": ("--ida.mode", "adaptive", "--optim.in_backward", "true"),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return embedded_teacher(tmp_path_factory.mktemp("teacher"))


def alone(flags) -> tuple[str, ...]:
    """The flags of the same training in one process: no modes of several ranks, one part."""
    kept, skip = [], False
    for word in flags:
        skip = skip or word in ("--dist.mode", "--dist.shard", "--train.accumulate")
        if not skip:
            kept.append(word)
        skip = skip and word.startswith("--")
    return tuple(kept)


def train_all(world: World, teacher: Path, out: Path, cases: dict, preset: str = "tiny") -> None:
    for name, flags in cases.items():
        run = Run(teacher, *flags, world=world, preset=preset).go(0, 3)
        result = run.grads, run.weights(), run.rows
        if world.main:
            torch.save(result, out / f"{name}.pt")


def apart(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """|a - b| / |b| over all tensors."""
    gap = sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))
    return (gap / sum(float(y.double().square().sum()) for y in b)) ** 0.5


def compare(teacher: Path, out: Path, cases: dict, bf16: dict | None = None, preset: str = "tiny") -> None:
    """Files of `train_all` beside one process. bf16: of bf16 arithmetic, the gradients that fp32 gives the same
    weights; without it everything is fp32."""
    for name, flags in cases.items():
        truth = Run(teacher, *alone(flags), preset=preset).go(0, 3)
        grads, weights, rows = torch.load(out / f"{name}.pt")
        assert grads.keys() == truth.grads.keys() and (grads or "in_backward" in name)
        for net in grads:
            assert sum(g.square().sum() for g in truth.grads[net]) > 0
            own = apart(truth.grads[net], bf16[net]) if bf16 else 0.0
            assert apart(grads[net], truth.grads[net]) <= max(GRADIENT, own), (name, net)
            assert not bf16 or apart(grads[net], bf16[net]) <= 1.2 * own, (name, net)
        for net, whole in truth.weights().items():
            far = torch.cat([(a.float() - b.float()).abs().flatten() for a, b in zip(weights[net], whole, strict=True)])
            mean, most = (0.1, 26) if bf16 else (0.01, 6)  # an ulp of a bf16 weight of 0.25 is 10 rates
            assert far.mean() <= mean * RATE and far.max() <= most * RATE, (name, net)
        for mine, theirs in zip(rows, truth.rows, strict=True):
            assert mine.keys() == theirs.keys()
            for key in ("dmd", "fake", "student_grad_norm", "fake_grad_norm"):
                assert mine[key] == pytest.approx(theirs[key], rel=0.05 if bf16 else 1e-3), (name, key)


def rounded(teacher: Path, folder: Path) -> Path:
    """A copy of a teacher whose weights are rounded to bf16, and kept as fp32."""
    shutil.copytree(teacher, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({k: v.bfloat16().float() for k, v in load_file(file).items()}, file, {"format": "pt"})
    return folder


def test_two_ranks_train_what_one_process_does(teacher, tmp_path):
    """FSDP2, DDP, parts of a batch, DMD2's classifier on a sharded network, steps in the backward, adaptive lambda."""
    launch(2, train_all, teacher, tmp_path, FAST)
    compare(teacher, tmp_path, FAST)


FOUR = {"fsdp": (), "hsdp": ("--dist.shard", "2"), "ddp": ("--dist.mode", "ddp")}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_one_two_and_four_ranks(world, teacher, tmp_path):
    """FSDP2, HSDP 2x2 and DDP; bf16 weights in two halves too. There a gradient is rounded to bf16 once in one process,
    and here once a rank before their sum in fp32. What bf16 arithmetic does to it by itself is more (of the student
    4.6 %, measured): ranks are no further from one process than that is from fp32, and from fp32 1.2 times as far."""
    cases = {"fsdp": ("--dist.mode", "fsdp")} if world == 1 else {k: FOUR[k] for k in FOUR if k != "hsdp" or world == 4}
    halves = {f"{name} split": (*flags, *SPLIT) for name, flags in cases.items()}
    launch(world, train_all, teacher, tmp_path, cases | halves)
    compare(teacher, tmp_path, cases)
    compare(teacher, tmp_path, halves, Run(rounded(teacher, tmp_path / "rounded")).go(0, 1).grads)


def test_parts_of_a_batch_are_one_batch(teacher):
    """Accumulation 1x4 = 2x2 = 4x1 in one process: each network steps once an iteration, on the same gradients."""
    whole = Run(teacher).go(0, 3)
    for parts in ("2", "4"):
        split = Run(teacher, "--train.accumulate", parts).go(0, 3)
        for net in whole.grads:
            assert apart(split.grads[net], whole.grads[net]) <= GRADIENT, net
        counts = [o.state_dict()["state"][0]["step"].item() for o in split.updates.optimizers.values()]
        assert counts == [3, 3, 3]
        assert [row.keys() for row in split.rows] == [row.keys() for row in whole.rows]


def test_two_ranks_write_the_run_that_one_process_writes(teacher, tmp_path):
    """`train.main` from end to end: student folder (the EMA, gathered), metrics (means over ranks), one checkpoint."""
    both, alone = tmp_path / "both", tmp_path / "alone"
    ranks = start(2, teacher, both)
    assert main(teacher, alone) == 0
    for process in ranks:
        process.join()
    assert [p.exitcode for p in ranks] == [0, 0]
    names = [sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.suffix != ".distcp") for out in (both, alone)]
    assert names[0] == names[1]
    a, b = (load_file(out / "student/transformer/diffusion_pytorch_model.safetensors") for out in (both, alone))
    assert a.keys() == b.keys() and all(a[k].dtype == b[k].dtype for k in a)
    assert all((a[k] - b[k]).abs().mean() <= 0.05 * RATE for k in a)
    rows = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (both, alone)]
    rows = [[row for row in some if "fake" in row] for some in rows]  # evaluations have rows of their own
    assert len(rows[0]) == len(rows[1]) == 8
    for mine, theirs in zip(*rows, strict=True):
        assert mine.keys() == theirs.keys() and mine["iteration"] == theirs["iteration"]
        assert mine["fake"] == pytest.approx(theirs["fake"], rel=1e-3)
    newest = checkpoint.newest(both / "checkpoints")
    assert newest is not None and checkpoint.manifest(newest)["ranks"] == 2
    assert len(list(newest.glob("*.distcp"))) == 2


# -- checkpoints across numbers of ranks -------------------------------------------------------------------------------


def save_and_go_on(world: World, teacher: Path, out: Path, cases: dict) -> None:
    from senseflow.saving import Saver

    for name, flags in cases.items():
        run = Run(teacher, *flags, world=world).go(0, 2)
        saver = Saver(out / name / "checkpoints", world, 1)
        saver.save(2, dict(updates=run.updates.state(), data="emoji"))
        before = run.tensors()
        run.go(2, 3)  # while it is written
        saver.wait()
        after = run.tensors()
        if world.main:
            torch.save((before, after), out / name / "saved.pt")


def go_on(world: World, teacher: Path, out: Path, cases: dict) -> None:
    for name, flags in cases.items():
        run = resumed(teacher, out / name, flags, world)
        before, after = run.tensors(), run.go(2, 3).tensors()
        if world.main:
            torch.save((before, after), out / name / f"resumed-{world.size}.pt")


def resumed(teacher: Path, out: Path, flags: tuple, world: World | None = None) -> Run:
    from senseflow.resuming import read_state

    run = Run(teacher, *flags, world=world)
    path = checkpoint.newest(out / "checkpoints")
    assert path is not None
    run.updates.load(read_state(path, run.updates)["updates"])
    return run


def check_resumed(out: Path, before: dict, after: dict) -> None:
    """All bits come back; the next step is the same within the rounding of the reductions."""
    saved, later = torch.load(out / "saved.pt")
    assert saved.keys() == before.keys() and [k for k in saved if not torch.equal(saved[k], before[k])] == []
    moved = [k for k in saved if not torch.equal(saved[k], later[k])]
    assert len(moved) > 0.5 * len(saved)
    for net in ("student/", "fake/"):
        names = [k for k in later if k.startswith(net)]
        far = torch.cat([(later[k].float() - after[k].float()).abs().flatten() for k in names])
        few = later[names[0]].dtype == torch.bfloat16  # elements go to the next bf16, some 5 rates away
        assert far.mean() <= (0.1 if few else 0.05) * RATE, net


def test_a_checkpoint_of_two_ranks_is_resumed_by_one(teacher, tmp_path):
    flags = ("--ida.mode", "adaptive")
    launch(2, save_and_go_on, teacher, tmp_path, {"adaptive": flags})
    run = resumed(teacher, tmp_path / "adaptive", flags)
    check_resumed(tmp_path / "adaptive", run.tensors(), run.go(2, 3).tensors())


@pytest.mark.slow
@pytest.mark.parametrize("first", [2, 4])
def test_a_checkpoint_is_resumed_by_any_number_of_ranks(first, teacher, tmp_path):
    """Of 2 ranks and of 4 (HSDP 2x2), by 1, 2 and 4: bit for bit where the number is the same."""
    kinds = {"fp32": (), "split 8bit": (*SPLIT, "--train.moments", "8bit")}
    cases = {name: (*flags, "--dist.shard", "2") for name, flags in kinds.items()}
    launch(first, save_and_go_on, teacher, tmp_path, cases)
    for world in (2, 4):
        launch(world, go_on, teacher, tmp_path, cases)
    for name, flags in kinds.items():
        out = tmp_path / name
        for world in (2, 4):
            before, after = torch.load(out / f"resumed-{world}.pt")
            check_resumed(out, before, after)
            if world == first:
                later = torch.load(out / "saved.pt")[1]
                assert [k for k in later if not torch.equal(later[k], after[k])] == []
        run = resumed(teacher, out, flags)
        check_resumed(out, run.tensors(), run.go(2, 3).tensors())


# -- the phase trap ----------------------------------------------------------------------------------------------------


def groups_of(net) -> list:
    """FSDP2's parameter groups of a sharded network."""
    found = []
    for module in net.modules():
        if hasattr(module, "_get_fsdp_state"):
            state = module._get_fsdp_state()
            found += getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return found


def phases(world: World, teacher: Path) -> None:
    """The fake's first forward is the generator's, without gradients; its reductions must be fp32 all the same."""
    run = Run(teacher, *SPLIT, world=world).go(0, 1)
    for name in ("student", "fake"):
        groups = groups_of(getattr(run.parts, name))
        assert len(groups) == 3 and {(g._orig_dtype, g._reduce_dtype) for g in groups} == {
            (torch.bfloat16, torch.float32)
        }, name
    wrong = Run(teacher, *SPLIT, world=world)
    wrong.parts.fake.requires_grad_(False)  # what other trainers do in the generator's phase
    with pytest.raises(RuntimeError, match=r"requires_grad of fake was toggled.*186998"):
        wrong.go(0, 1)
    frozen = {p.requires_grad for p in run.parts.teacher.parameters()}
    assert frozen == {False} and all(p.grad is None for p in run.parts.student.parameters())


def test_no_phase_toggles_requires_grad_and_one_that_does_is_caught(teacher):
    """pytorch#186998: FSDP2 takes the dtypes of its reductions from what trains at the first forward."""
    launch(2, phases, teacher)
    alone = Run(teacher)
    alone.parts.fake.requires_grad_(False)
    with pytest.raises(RuntimeError, match="requires_grad of fake was toggled"):
        alone.go(0, 1)


# -- small things ------------------------------------------------------------------------------------------------------


def test_rows_and_buckets():
    assert [World(r, 4).rows(8) for r in range(4)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    sizes = [3, 5, 9, 1, 1]
    found = [[len(t) for t in b] for b in buckets([torch.zeros(n) for n in sizes], limit=32)]
    assert found == [[3, 5], [9], [1, 1]]
    assert buckets([]) == []


def differing_discriminators(world: World) -> None:
    t = torch.full((5,), 1.0)
    world.check_in_step("D", [t])
    t[2] += 2.0**-23 * world.rank
    with pytest.raises(RuntimeError, match="D is no longer the same on all ranks"):
        world.check_in_step("D", [t])
    world.align([t])
    world.check_in_step("D", [t])
    assert world.most(world.rank, -world.rank) == [1.0, 0.0]
    assert world.attempt(lambda: 1 / 0 if world.rank else 5) == (5, "")
    grads = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    grads[0].grad = torch.full((3,), 1.0 + world.rank)
    world.reduce_gradients(grads)
    assert torch.equal(grads[0].grad, torch.full((3,), 1.5)) and grads[1].grad is None


def test_replicas_that_differ_by_a_bit_are_noticed():
    launch(2, differing_discriminators)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--data.batch", "6"), "data.batch = 6: allowed are multiples of 4, 4 ranks times train.accumulate = 1"),
        (("--train.accumulate", "2"), "data.batch = 4: allowed are multiples of 8"),
        (("--dist.shard", "3"), "dist.shard = 3: allowed is 0 or what divides the 4 ranks"),
        (("--optim.host", "true"), "optim.host = True: allowed is false where networks are sharded"),
        (("--optim.name", "torch"), "optim.name = 'torch': allowed is senseflow where sharded"),
        (("--dist.mode", "ddp", "--optim.in_backward", "true"), "optim.in_backward = True: allowed is false with"),
        (("--dmd.normaliser", "batch"), "dmd.normaliser = 'batch': allowed is sample where a batch is split"),
        (("--model.variant", "lora", "--dist.mode", "fsdp"), "dist.mode = 'fsdp': allowed are auto and ddp"),
    ],
)
def test_settings_that_ranks_do_not_allow_are_one_line(flags, line):
    with pytest.raises(UserError) as e:
        check(config(Path("t"), *flags), World(0, 4, host=object()))
    assert line in str(e.value) and "\n" not in str(e.value)
    check(config(Path("t")), World(0, 4, host=object()))


def test_sharding_needs_several_ranks():
    with pytest.raises(UserError, match=r"dist.mode = 'fsdp': allowed is auto for one process"):
        check(config(Path("t"), "--dist.mode", "fsdp"), World())
