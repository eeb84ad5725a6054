"""CUDA graphs of iterations: the same weights bit for bit, on a CPU by a graph that is played."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from on_meta import NoSync, parts_on_meta, to_meta
from ranks import Run, launch
from tiny_pipelines import embedded_teacher, few_pictures

from senseflow import train
from senseflow.cli import parse
from senseflow.config import UserError
from senseflow.dist import World
from senseflow.draws import Draws
from senseflow.graphs import Captured, Replayed, advance, reason_against, too_much
from senseflow.steps import encoded
from senseflow.train import build, iterate
from senseflow.updates import Updates
from senseflow_kernels import adamw

FLAGS = [
    "--data.images", "pictures", "--data.batch", "2", "--train.gen_every", "2", "--disc.taps", "-1,2",
    "--disc.width", "8",
    "--disc.size", "28",
    "--dmd.guidance_max", "3", "--isg.guidance_max", "2", "--train.iterations", "40", "--train.warmup", "5",
]  # fmt: skip


class Played(Replayed):
    """A graph's stand-in: each replay is the captured call, with the host's values of the time of the capture."""

    captures = 0

    def _captured(self, batch, iteration):
        self.captures += 1
        found = {}

        def replay():
            draws = self.parts.draws
            draws.clock = self.clock
            found.update(self.iterate(self.cfg, self.parts, self.updates, batch, iteration))
            draws.clock = None

        return Captured(SimpleNamespace(replay=replay), found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return embedded_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def made(folder, monkeypatch):
    """made(device, *flags): config, parts, data."""
    monkeypatch.setattr(train, "load_variants", few_pictures)

    def make(device, *flags):
        cfg = parse(["--teacher", str(folder), *FLAGS, *flags], "").config
        return cfg, *build(cfg, torch.device(device))

    return make


def own(parts):
    nets = {name: copy.deepcopy(getattr(parts, name)) for name in ("student", "fake", "disc")}
    return dataclasses.replace(parts, **nets, draws=Draws(parts.draws.seed))


def after(cfg, parts, data, form, iterations):
    """(weights and moments, metrics) after iterations by `form`: parts, updates -> what runs one."""
    mine = own(parts)
    updates = Updates(cfg, mine)
    run, rows = form(mine, updates), []
    for i in range(iterations):
        batch = encoded(mine, data.batch(i, cfg.data.batch), i)
        rows.append({k: v.clone() for k, v in run(batch, i).items()})
    tensors = [p.detach() for name in ("student", "fake", "disc") for p in getattr(mine, name).parameters()]
    tensors += updates.ema.shadow if updates.ema is not None else []
    tensors += [t for o in updates.optimizers.values() for s in o.state_dict()["state"].values() for t in s.values()]
    return tensors, rows, run


def check_equal(a, b):
    assert len(a[0]) == len(b[0]) and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
    for i, (one, other) in enumerate(zip(a[1], b[1], strict=True)):
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one), i


def test_static_memory_and_replays_change_no_bit(made):
    """24 iterations: kinds that come once are run, those that come again are captured, later ones replayed with the
    host's numbers of back then. The rates change all the while: warm-up and cooldown."""
    cfg, parts, data = made("cpu")
    plain = after(cfg, parts, data, lambda p, u: lambda b, i: iterate(cfg, p, u, b, i), 24)
    fixed = after(cfg, parts, data, lambda p, u: Replayed(cfg, p, u, iterate, capture=False), 24)
    check_equal(plain, fixed)
    played = after(cfg, parts, data, lambda p, u: Played(cfg, p, u, iterate), 24)
    check_equal(plain, played)
    kinds = played[2].kinds
    assert played[2].captures == sum(known is not None for known in kinds.values()) >= 4
    assert {silent for _, _, silent in kinds} == {True, False} and any(length is None for _, length, _ in kinds)


def test_a_checkpoint_is_loaded_between_replays(made):
    """Its counts lie in other memory, so what was captured is dropped; and what it hands out is the caller's."""
    cfg, parts, data = made("cpu", "--rollout.backward_prob", "0", "--disc.skip_silent", "false")
    mine = own(parts)
    updates = Updates(cfg, mine)
    run = Played(cfg, mine, updates, iterate)
    for i in (0, 2, 4):
        run(data.batch(i, 2), i)["ida_drift"] = torch.zeros(())
    (known,) = run.kinds.values()
    assert known is not None and "ida_drift" not in known.metrics
    updates.load(copy.deepcopy(updates.state()))
    run(data.batch(6, 2), 6)
    assert list(run.kinds.values()) == [None]


def test_what_was_not_captured_runs_on(made, caplog):
    """auto: said once, and the same weights; on: an error."""
    cfg, parts, data = made("cpu")

    class Fails(Played):
        def _captured(self, batch, iteration):
            for p in self.updates.params["student"]:
                p.grad = torch.full_like(p, torch.nan)
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    plain = after(cfg, parts, data, lambda p, u: lambda b, i: iterate(cfg, p, u, b, i), 12)
    check_equal(plain, after(cfg, parts, data, lambda p, u: Fails(cfg, p, u, iterate), 12))
    assert [r.getMessage() for r in caplog.records if "not permitted" in r.getMessage()] == [
        r.getMessage() for r in caplog.records if "without CUDA graphs from" in r.getMessage()
    ]
    assert sum("without CUDA graphs from" in r.getMessage() for r in caplog.records) == 1
    strict = dataclasses.replace(cfg, kernels=dataclasses.replace(cfg.kernels, graphs="on"))
    with pytest.raises(UserError, match="cannot be captured: operation not permitted"):
        after(strict, parts, data, lambda p, u: Fails(strict, p, u, iterate), 12)


def test_nothing_in_a_capture_waits_or_copies_from_the_host(made, monkeypatch):
    """What CUDA forbids while it captures, on the meta device: the iteration, its rates and clock on the device."""
    cfg, parts, data = made("cpu")
    parts_on_meta(parts)
    monkeypatch.setattr(adamw, "adamw_reference", lambda *_: None)  # test_no_sync has it
    run = Replayed(cfg, parts, Updates(cfg, parts), iterate, capture=False)
    batches = [to_meta(data.batch(i, 2)) for i in range(6)]
    run(encoded(parts, batches[0], 0), 0)
    for i, batch in enumerate(batches[1:], 1):
        batch = encoded(parts, batch, i)
        with NoSync() as watch:
            run(batch, i)
        assert watch.seen > 100


def test_draws_by_the_clock_are_draws_by_the_iteration():
    draws, samples = Draws(7), torch.arange(5)
    for iteration in (0, 1, 12345, 2**40):
        want = draws.uniform(iteration, samples, "a", (3,)), draws.normal(iteration, samples, "b", (7,))
        draws.clock = torch.tensor(iteration)
        got = draws.uniform(99, samples, "a", (3,)), draws.normal(99, samples, "b", (7,))
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
        assert not torch.equal(draws.on_host().uniform(99, samples, "a", (3,)), got[0])
        draws.clock = None


def test_where_graphs_cannot_be_is_said(made, monkeypatch):
    cfg, parts, _ = made("cpu")
    updates = Updates(cfg, parts)
    assert not isinstance(advance(cfg, parts, updates, iterate), Replayed)
    on = dataclasses.replace(cfg, kernels=dataclasses.replace(cfg.kernels, graphs="on"))
    with pytest.raises(UserError, match=r"kernels.graphs = 'on': there are none on cpu; allowed is auto or off"):
        advance(on, parts, updates, iterate)
    gpu = torch.device("cuda")
    assert reason_against(cfg, gpu) is None and "--profile" in reason_against(cfg, gpu, profile=True)
    assert "dist.mode ddp" in reason_against(cfg, gpu, sharded=True)
    size = sum(p.numel() * p.element_size() for some in updates.params.values() for p in some)
    assert too_much(updates, 50 * size) is None and "GB; --graphs on" in (too_much(updates, 49 * size) or "")
    for flag in ("--optim.host=true", "--optim.in_backward=true", "--optim.name=torch", "--ida.mode=adaptive"):
        reason = reason_against(parse([flag], "").config, gpu)
        assert reason is not None and flag[2:].partition("=")[0] in reason


def test_another_form_of_batch_is_refused(made):
    cfg, parts, data = made("cpu")
    run = Replayed(cfg, parts, Updates(cfg, parts), iterate, capture=False)
    run(data.batch(0, 2), 0)
    with pytest.raises(UserError, match=r"a batch of \[3, 3, 32, 32\] torch.float32 after one of \[2, 3, 32, 32\]"):
        run(data.batch(1, 3), 1)


class FailsOnOne(Played):
    """Whose second capture is not to be had on rank 1."""

    def _captured(self, batch, iteration):
        if self.captures and self.parts.world.rank:
            raise RuntimeError("no memory")
        return super()._captured(batch, iteration)


def train_on_ranks(world, teacher, out):
    """12 iterations of DDP in each form: what a checkpoint has, the metrics, whether there are still graphs."""
    forms = {"eager": None, "static": Replayed, "played": Played, "failing": FailsOnOne}
    for name, form in forms.items():
        run = Run(teacher, "--dist.mode", "ddp", "--train.gen_every", "2", world=world)
        step = run.step
        if form is not None:
            more = {"capture": False} if name == "static" else {}
            step = form(run.cfg, run.parts, run.updates, iterate, **more)
        rows = []
        for i in range(12):
            batch = encoded(run.parts, run.data.batch(i, 4), i)
            rows.append({k: float(v) for k, v in step(batch, i).items()})
        capture = form is not None and step.capture
        torch.save((run.tensors(), rows, capture), out / f"{name}{world.rank}.pt")


def test_two_ranks_that_hold_networks_whole(folder, tmp_path):
    """DDP by graphs that are played, sums over ranks and all: the bits of the run without; one rank that cannot capture
    has both go on without, on those bits too. The ranks' weights are the same, their losses are not."""
    launch(2, train_on_ranks, folder, tmp_path)
    found = {file.stem: torch.load(file) for file in sorted(tmp_path.glob("*[01].pt"))}
    assert len(found) == 8
    truth = found["eager0"][0]
    for name, (tensors, rows, _) in found.items():
        assert tensors.keys() == truth.keys() and all(torch.equal(t, truth[k]) for k, t in tensors.items()), name
        assert rows == found[f"eager{name[-1]}"][1], name
    assert found["eager0"][1] != found["eager1"][1]
    assert [found[name][2] for name in ("played0", "played1", "failing0", "failing1")] == [True, True, False, False]


@pytest.mark.gpu
def test_a_graph_holds_nccls_sums(made, tmp_path):
    """NCCL's all-reduces, of a group of one rank that takes itself for two: captured and replayed, bit for bit. Sums
    are halved then, with graphs and without."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        cfg, parts, data = made("cuda")
        parts.world = World(0, 2, torch.device("cuda"), host=torch.distributed.new_group(backend="gloo"))
        plain = after(cfg, parts, data, lambda p, u: lambda b, i: iterate(cfg, p, u, b, i), 24)
        graphs = after(cfg, parts, data, lambda p, u: Replayed(cfg, p, u, iterate), 24)
        check_equal(plain, graphs)
        assert sum(known is not None for known in graphs[2].kinds.values()) >= 4
    finally:
        torch.use_deterministic_algorithms(False)
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [[], ["--compile", "blocks"]], ids=["eager", "compiled"])
def test_ten_replayed_iterations_and_ten_eager_ones(made, flags):
    """On a GPU, after 24 iterations, so that every graph has been replayed: bit for bit."""
    from senseflow.compiling import compile_parts

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        cfg, parts, data = made("cuda", *flags)

        def form(by_graphs):
            def make(p, u):
                compile_parts(p, cfg)
                return Replayed(cfg, p, u, iterate) if by_graphs else lambda b, i: iterate(cfg, p, u, b, i)

            return make

        plain, graphs = (after(cfg, parts, data, form(by_graphs), 24) for by_graphs in (False, True))
        check_equal(plain, graphs)
        assert sum(known is not None for known in graphs[2].kinds.values()) >= 4
    finally:
        torch.use_deterministic_algorithms(False)
