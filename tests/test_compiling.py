"""Regional torch.compile: no graph break, nothing compiled after the warm-up, the same numbers, the same names."""

import copy
import dataclasses

import pytest
import torch
from test_families import SMALL, WRITE
from tiny_pipelines import embedded_teacher, few_pictures

from senseflow import train
from senseflow.cli import parse
from senseflow.compiling import VARIANTS, compile_parts, regions, uncompiled
from senseflow.config import UserError
from senseflow.models.lora import shared_copy
from senseflow.steps import encoded
from senseflow.train import build, iterate
from senseflow.updates import Updates

dynamo = pytest.importorskip("torch._dynamo")
counters = dynamo.utils.counters
CASES = {"embedded": [], "flux-dev": []}
SLOW = {
    "sd35-medium": [], "sd35-large": [], "sdxl": [], "flux2-klein": [], "embedded, dmd2": [],
    "embedded, lora": ["--model.variant", "lora", "--lora.rank", "4"],
    "sd35-medium, bf16": ["--model.dtype", "bf16", "--train.precision", "split"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "load_variants", few_pictures)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    dynamo.reset()
    counters.clear()
    yield
    dynamo.reset()


def built(case, root):
    """(config, parts, data) with kernels.compile blocks, nothing compiled yet."""
    family = case.partition(",")[0]
    preset = "dmd2" if case.endswith("dmd2") else "tiny" if family == "embedded" else family
    folder = embedded_teacher(root) if family == "embedded" else WRITE[family](root)
    flags = [
        preset,
        "--teacher",
        str(folder),
        "--data.images",
        "pictures",
        *SMALL,
        "--train.gen_every",
        "2",
        *(CASES | SLOW)[case],
    ]
    flags = [f for f in flags if family != "embedded" or not f.startswith("--model.side")]
    cfg = parse([*flags, "--compile", "blocks"], "").config
    return cfg, *build(cfg, torch.device("cpu"))


def one_of_each(cfg, parts):
    """The first iterations of both networks' turns, by rollout and by forward noising."""
    found = {}
    for i in range(64):
        found.setdefault((i % 2, parts.draws.coin(i, cfg.rollout.backward_prob)), i)
    assert len(found) == 4
    return sorted(found.values())


def weights(parts):
    nets = [parts.student, parts.fake, *([parts.disc] if parts.disc is not None else [])]
    return [p.detach().clone() for net in nets for p in net.parameters()]


def trained(cfg, parts, data, iterations):
    updates = Updates(cfg, parts)
    for i in iterations:
        iterate(cfg, parts, updates, encoded(parts, data.batch(i, cfg.data.batch), i), i)
    return updates


def check_compiled(case, root, backend, close):
    """Two rounds of every kind of iteration, compiled beside plain; the second compiles nothing."""
    cfg, parts, data = built(case, root)
    plain = copy.copy(parts)
    for name in ("student", "fake", "disc"):
        setattr(plain, name, copy.deepcopy(getattr(parts, name)))
    wanted = one_of_each(cfg, parts)
    names = list(parts.student.state_dict())
    count = compile_parts(parts, cfg, backend)
    assert count == len(regions(parts, cfg)) >= 3 and list(parts.student.state_dict()) == names
    updates = trained(cfg, parts, data, wanted)
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= VARIANTS
    with dynamo.config.patch(error_on_recompile=True):
        for i in wanted:
            batch = encoded(parts, data.batch(i, cfg.data.batch), i)
            iterate(cfg, parts, updates, batch, i)
    assert (
        counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"] and not counters["unimplemented"]
    )
    with uncompiled():
        trained(cfg, plain, data, [*wanted, *wanted])
    for a, b in zip(weights(parts), weights(plain), strict=True):
        close(a, b)
    return parts


def same(a, b):
    assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_compiled_once_and_whole(case, tmp_path):
    """backend eager: what torch.compile takes of the code, run operator by operator, so to the bit."""
    parts = check_compiled(case, tmp_path / "teacher", "eager", same)
    for net in (
        copy.deepcopy(parts.student),
        shared_copy(parts.student),
    ):  # what is evaluated and saved is not compiled
        assert all(m._compiled_call_impl is None for m in net.modules())
        assert list(net.state_dict()) == list(parts.teacher.state_dict()) or case == "flux-dev"


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_compiled_once_and_whole_all_families(case, tmp_path):
    check_compiled(case, tmp_path / "teacher", "eager", same)


@pytest.mark.slow
def test_inductor_gives_the_same_to_rounding(tmp_path):
    """8 iterations; train.eps of the preset, so signs of rounding become steps of lr: of a weight's whole way 1 %."""
    gaps, sizes = [], []

    def close(a, b):
        gaps.append((a - b).double().square().sum())
        sizes.append(b.double().square().sum())

    check_compiled("embedded", tmp_path / "teacher", "inductor", close)
    assert torch.stack(gaps).sum().sqrt() < 1e-3 * torch.stack(sizes).sum().sqrt()


def test_off_compiles_nothing_and_buckets_are_refused(tmp_path):
    cfg, parts, _ = built("embedded", tmp_path / "teacher")
    off = dataclasses.replace(cfg, kernels=dataclasses.replace(cfg.kernels, compile="off"))
    assert compile_parts(parts, off) == 0
    assert all(m._compiled_call_impl is None for m in parts.student.modules())
    buckets = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, buckets=True))
    with pytest.raises(UserError, match=r"kernels.compile = 'blocks': allowed is off with data.buckets = True"):
        compile_parts(parts, buckets)
    selective = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, checkpointing="selective"))
    with pytest.raises(UserError, match=r"allowed is off with model.checkpointing = 'selective'"):
        compile_parts(parts, selective)
    blocks = len(regions(parts, cfg))
    kept = dataclasses.replace(cfg, disc=dataclasses.replace(cfg.disc, checkpointing=True))
    assert len(regions(parts, kept)) == blocks - (max(cfg.disc.taps) + 1)
