"""No host sync between logs: nothing in an iteration waits for the device, or copies to it from unpinned memory."""

from contextlib import nullcontext

import pytest
import torch
from on_meta import META, HostSync, NoSync, parts_on_meta, to_meta
from test_families import SMALL, WRITE
from tiny_pipelines import embedded_teacher, few_pictures

from senseflow import train
from senseflow.cli import parse
from senseflow.logs import MetricRing
from senseflow.steps import encoded, is_silent
from senseflow.train import build, drift, iterate
from senseflow.updates import Updates
from senseflow_kernels import AdamW, adamw

CASES = {
    "embedded": [], "embedded, adaptive": ["--isg.midpoint", "adaptive", "--ida.mode", "adaptive"],
    "embedded, dmd2": [], "embedded, lora": ["--model.variant", "lora", "--lora.rank", "4"],
    "embedded, in backward": ["--optim.in_backward", "true"], **{preset: [] for preset in WRITE},
}  # fmt: skip
FAST = ["embedded", "sd35-medium", "flux-dev", "sdxl"]
BF16 = ["--model.dtype", "bf16", "--train.precision", "split"]
ON_GPU = CASES | {"embedded, torch": ["--optim.name", "torch"], "sd35-large, split": BF16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, selected):
    root = tmp_path_factory.mktemp("pipelines")
    made = {"embedded": embedded_teacher(root / "embedded")}
    families = {case.partition(",")[0] for case in selected("case")}
    return made | {family: WRITE[family](root / family) for family in families if family in WRITE}


def settings(case, folders):
    family = case.partition(",")[0]
    preset = "dmd2" if case.endswith("dmd2") else "tiny" if family == "embedded" else family
    flags = [
        preset,
        "--teacher",
        str(folders[family]),
        "--data.images",
        "pictures",
        *SMALL,
        "--train.gen_every",
        "2",
        *ON_GPU[case],
    ]
    return parse([f for f in flags if family != "embedded" or not f.startswith("--model.side")], "").config


def one_of_each(cfg, parts):
    """The first iterations that are (generator's or not, by rollout or not), then a silent one."""
    found = {}
    for i in range(64):
        found.setdefault((i % 2, parts.draws.coin(i, cfg.rollout.backward_prob)), i)
        if is_silent(parts, cfg, i):
            found.setdefault("silent", i)
    assert len(found) >= 4
    return sorted(set(found.values()))


def watched(case, folders, monkeypatch, some):
    """Iterations of `some` (of those of one_of_each), each after one that does not count: constants are copied once."""
    monkeypatch.setattr(train, "load_variants", few_pictures)
    monkeypatch.setattr(adamw, "adamw_reference", lambda *_: None)  # below, as it takes meta tensors seconds
    cfg = settings(case, folders)
    parts, data = build(cfg, torch.device("cpu"))
    parts_on_meta(parts)
    updates, ring = Updates(cfg, parts), MetricRing()
    wanted = some(one_of_each(cfg, parts))
    for iteration in [wanted[0], *wanted]:
        batch = to_meta(data.batch(iteration, cfg.data.batch))
        with nullcontext() if ring.buffer is None else NoSync() as watch:
            batch = encoded(parts, batch, iteration)
            metrics = iterate(cfg, parts, updates, batch, iteration)
            metrics["ida_drift"] = drift(updates)
            ring.put(iteration, metrics)
        assert metrics["fake"].device == META and (watch is None or watch.seen > 100)


@pytest.mark.parametrize("case", FAST)
def test_an_iteration_never_waits_for_the_device(case, folders, monkeypatch):
    """A generator's and a critic's iteration, and what is kept of them until the log."""
    watched(case, folders, monkeypatch, lambda all: [next(i for i in all if i % 2), next(i for i in all if not i % 2)])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_kind_of_iteration_waits_for_the_device(case, folders, monkeypatch):
    """By rollout and by forward noising, silent ones, all families and variants."""
    watched(case, folders, monkeypatch, lambda all: all)


@pytest.mark.parametrize("precision, moments", [("split", torch.float32), ("stochastic", torch.bfloat16),
                                                ("stochastic", "8bit")])  # fmt: skip
def test_a_step_of_adamw_in_torch_never_waits(precision, moments):
    """As on a GPU where csrc was not built."""
    theta, phi = (torch.zeros(256, 64, dtype=torch.bfloat16, device=META, requires_grad=True) for _ in range(2))
    low = torch.zeros(256, 64, dtype=torch.int16, device=META) if precision == "split" else None
    opt = AdamW(
        [theta], precision=precision, moments=moments, phi=[phi.detach()], phi_low=None if low is None else [low]
    )
    for lam in (0.9, torch.full((), 0.9, device=META)):
        theta.grad = torch.zeros_like(theta)
        with NoSync() as watch:
            opt.step(lam=lam, coefficient=torch.ones((), device=META))
        assert watch.seen > 10


@pytest.mark.parametrize("what", [
    lambda x: x.sum().item(), lambda x: float(x.sum()), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.cpu(),
    lambda x: torch.equal(x, x), lambda x: bool((x > 0).all()), lambda x: torch.tensor([1.0], device=x.device),
    lambda x: torch.ones(3).to(x.device), lambda x: x.copy_(torch.ones(3)), lambda x: torch.as_tensor(2, device=META),
    lambda x: x.tolist(), lambda x: x + torch.ones(3), lambda x: torch.tensor(1.0).to(x),
])  # fmt: skip
def test_what_waits_is_seen(what):
    with NoSync(), pytest.raises((HostSync, NotImplementedError, RuntimeError)):
        what(torch.ones(3, device=META))


def test_what_does_not_wait_is_let_through():
    with NoSync():
        x = torch.ones(3, device=META)
        y = torch.where(x > 0, x, 0.0) + torch.full((), 2.0, device=META) + torch.arange(3, device=META)
        (x * torch.tensor(2.0)).sum()  # a 0-d host tensor goes with the launch
        torch.ones(3).sum().item()  # the host's own
        y.to(torch.bfloat16).masked_fill(x > 0, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU)
def test_no_sync_on_a_gpu(case, folders, monkeypatch):
    """The same, said by CUDA itself, once each kind of iteration has compiled its kernels and built its tables."""
    monkeypatch.setattr(train, "load_variants", few_pictures)
    cfg = settings(case, folders)
    parts, data = build(cfg, torch.device("cuda"))
    updates, ring = Updates(cfg, parts), MetricRing()
    wanted = one_of_each(cfg, parts)
    for number, iteration in enumerate([*wanted, *wanted]):
        batch = data.batch(iteration, cfg.data.batch)
        try:
            torch.cuda.set_sync_debug_mode("error" if number >= len(wanted) else "default")
            ring.put(iteration, iterate(cfg, parts, updates, encoded(parts, batch, iteration), iteration))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(ring.drain()) == 2 * len(wanted)
