"""The plan against what is: persistent tensors exactly, activations by other instruments than the plan's own."""

import gc
import itertools
import json
from contextlib import contextmanager
from dataclasses import replace as replaced

import pytest
import torch
from plans import HAS_KLEIN, REAL, SMALL, WRITE, Folders, by_part, config_of, planner_of
from tiny_pipelines import few_pictures
from torch import nn
from torch.nn import functional as F

from senseflow import meta, planning, train
from senseflow.cli import parse
from senseflow.config import UserError
from senseflow.fields import replace
from senseflow.fitting import flags, report, smallest, thriftier
from senseflow.iteration import iterate
from senseflow.memory import GB, Ledger, Row, nbytes
from senseflow.models.families import make_adapter, make_networks
from senseflow.models.vfm import find_dinov2
from senseflow.steps import encoded
from senseflow.train import build, main
from senseflow.updates import Updates

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp)


@pytest.fixture(autouse=True)
def _pictures(monkeypatch):
    monkeypatch.setattr(train, "load_variants", few_pictures)


def own_bytes(net, seen):
    tensors = [t for t in itertools.chain(net.parameters(), net.buffers()) if id(t) not in seen]
    seen |= {id(t) for t in tensors}
    return sum(t.numel() * t.element_size() for t in tensors)


# -- the ledger ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_ledger_counts_by_arithmetic(device):
    """Storages, not tensors: a view is nobody's, what is freed is gone, a phase owns what it made."""
    before = torch.empty(1000, device=device)
    with Ledger() as ledger:
        ledger.known([before])
        before.add_(1)
        with ledger.phase("a"):
            a = torch.empty(250, device=device)
            b = a.view(5, 50)[1:]
            with ledger.phase("b"):
                c = a + 1
        assert ledger.live == {"a": 1000, "b": 1000}
        del a
        assert ledger.total == 2000  # b holds it
        del b
        assert ledger.total == 1000 and ledger.top == 2000
        ledger.as_gradient(c)
        assert (ledger.total, ledger.gradients) == (0, 1000)
        d = torch.empty(50, device=device)
        del c
        assert (ledger.total, ledger.gradients) == (200, 0)
    peak = ledger.peak()
    assert (peak.total, peak.gradients, peak.parts) == (2000, 0, {"a": 1000, "b": 1000})
    del d
    with Ledger(512) as ledger:
        kept = [torch.empty(n, dtype=torch.uint8, device=device) for n in (1, 512, 513)]
    assert ledger.total == 512 + 512 + 1024 and len(kept) == 3


def test_gradients_held_stepped_on_and_split():
    """Three Linear layers without activations to speak of: all gradients at the end, or one, or an Nth of all."""
    net = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(3)))
    x = torch.zeros(1, 256)
    size = 256 * 256 * 4
    with Ledger() as ledger:
        ledger.known(net.parameters())
        hooks = [p.register_post_accumulate_grad_hook(lambda p: ledger.as_gradient(p.grad)) for p in net.parameters()]
        net(x).sum().backward()
    held, stepped, split = (ledger.peak(share).total / size for share in (1, 0, 1 / 4))
    assert held == pytest.approx(3, abs=0.05) and stepped == pytest.approx(1, abs=0.05)
    assert split == pytest.approx(1.5, abs=0.05)  # the last one whole, before its reduction, and two quarters
    del hooks


def test_bytes_of_the_fullest_rank():
    tensors = [torch.empty(10, 3), torch.empty(7), torch.empty(())]
    assert nbytes(tensors) == 4 * (30 + 7 + 1)
    assert nbytes([tensors[0], tensors[0][2:]]) == 120
    assert nbytes(tensors, 4) == 4 * (3 * 3 + 2 + 1)  # as torch.chunk: 3, 3, 3, 1 rows and 2, 2, 2, 1


# -- what stays ----------------------------------------------------------------------------------------------------

STORAGE = {
    "fp32": [], "split": ["--model.dtype=bf16", "--train.precision=split"],
    "8bit": ["--model.dtype=bf16", "--train.precision=stochastic", "--train.moments=8bit", "--disc.moments=8bit"],
    "lora": ["--model.variant=lora", "--lora.rank=4"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "storage"),
    [("tiny", "fp32"), ("sd35-medium", "split"), ("sd35-medium", "8bit"), ("flux-dev", "split"), ("flux-dev", "lora"),
     ("sdxl", "fp32"), pytest.param("flux2-klein", "8bit", marks=HAS_KLEIN)],
)  # fmt: skip
def test_persistent_tensors_to_the_byte(preset, storage, folders):
    cfg = config_of(preset, folders, *STORAGE[storage])
    found = by_part(planner_of(cfg).stays(cfg))
    parts, _ = build(cfg, CPU)
    updates, seen = Updates(cfg, parts), set()
    for name, net in (("teacher", parts.teacher), ("student", parts.student), ("fake", parts.fake),
                      ("disc", parts.disc), ("backbone", parts.vfm)):  # fmt: skip
        assert found[name]["weights"] == own_bytes(net, seen), name
    if parts.adapter.vae is not None:
        assert found["VAE"]["weights"] == own_bytes(parts.adapter.vae, seen)
    for name, optimizer in updates.optimizers.items():
        state = [t for s in optimizer.state.values() for key, t in s.items() if key != "step"]
        size = sum(t.numel() * t.element_size() for t in state)
        assert found[name]["moments"] + found[name].get("other half of the weights", 0) == size, name
        assert any("exponent" in key for s in optimizer.state.values() for key in s) == (storage == "8bit"), name
    assert found["student"]["EMA"] == sum(t.numel() * 4 for t in updates.ema.shadow)


def test_host_states_leave_the_device(folders):
    preset = "sd35-medium"
    cfg = config_of(preset, folders, *STORAGE["split"], "--optim.host=true")
    parts, _ = build(cfg, CPU)
    updates = Updates(cfg, parts)
    host = updates.optimizers["student"]
    size = sum(t.numel() * t.element_size() for s in host.inner.state.values() for k, t in s.items() if k != "step")
    size += 2 * sum(m.numel() * m.element_size() for m in host.masters)  # and as much for its gradients
    rows = [r for r in planner_of(cfg).stays(cfg) if r.part == "student" and not r.what.startswith("weights,")]
    assert sum(r.device for r in rows) == 0
    assert sum(r.host for r in rows) == size + 4 * sum(p.numel() for p in parts.student.parameters())  # the EMA


# -- what comes and goes -------------------------------------------------------------------------------------------


CONVOLUTIONS = ("aten::convolution", "aten::convolution_backward")


def allocator_bytes(run) -> list[int]:
    """Bytes above the start before and after each event of the CPU's allocator in run(). Not those inside a
    convolution, which reorders or unfolds its input while it runs: no part of a plan, so there the end alone counts.
    Nothing older is freed meanwhile: what an earlier call left in a cycle would count as less."""
    gc.collect()
    gc.disable()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
    finally:
        gc.enable()
    total, until, found = 0, 0, []
    for e in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if e.name() in CONVOLUTIONS:
            until = max(until, e.end_ns())
        elif e.name() == "[memory]":
            outside, before = e.start_ns() >= until, total
            total += e.nbytes()
            found += [before, total] if outside else []
    return [*found, total]


PEAKS = [
    *(pytest.param(name, how, "vfm", marks=HAS_KLEIN if name == "flux2-klein" else ())
      for name in ("tiny", *WRITE) for how in ("none", "full")),
    ("flux-dev", "full", "fake_features"),  # the VAE's encoder is the fullest moment of so small a network
]  # fmt: skip


@pytest.mark.parametrize(("preset", "checkpointing", "disc"), PEAKS)
def test_peak_of_an_iteration(preset, checkpointing, disc, folders):
    """A whole student iteration, encoder, forward and backward of every network, on the CPU, by the allocator, to a
    thousandth; the plan made it from shapes, of diffusers' own blocks or, for `tiny`, fused ones. Without the
    optimizers, whose torch form on a CPU has temporaries that no kernel has, and without features of the embedded data,
    which lie there before."""
    both = [
        "--disc.keep_reference=false",
        f"--model.checkpointing={checkpointing}",
        f"--disc.checkpointing={str(checkpointing == 'full').lower()}",
    ]
    cfg = config_of(preset, folders, *both, f"--disc.kind={disc}")
    predicted = planner_of(cfg).ledger(cfg).peak()
    parts, data = build(cfg, CPU)
    number = planning.busy_iteration(cfg, parts)
    batch = data.batch(number, cfg.data.batch)
    given = nbytes([batch.pixels, batch.latents, batch.cond.embeds, batch.cond.pooled, batch.samples])

    def once():
        fresh = encoded(parts, replaced(batch, encoded=parts.adapter.vae is None), number)
        iterate(cfg, parts, planning.Backward(parts, Ledger()), fresh, number)

    once()  # the prompts' cache
    assert predicted.total == pytest.approx(given + max(allocator_bytes(once)), rel=1e-3)
    assert (max(predicted.parts, key=predicted.parts.__getitem__) == "encode") == (disc == "fake_features")


@pytest.mark.parametrize("what", ["network", "decoder", "backbone"])
@pytest.mark.parametrize("preset", ["sd35-medium", "flux-dev", "sdxl"])
def test_what_a_forward_keeps_to_the_byte(preset, what, folders):
    """On the CPU by autograd's own hooks, each storage once and the result with them; of the plan's way by its ledger
    on shapes. What the network keeps beside is not saved for the backward: a fraction of a percent."""
    cfg, found = config_of(preset, folders), []
    for device in (CPU, planning.META):
        adapter = make_adapter(cfg.model, device)
        net = {"network": lambda a=adapter: make_networks(cfg, a, a.device)[1], "decoder": lambda a=adapter: a.vae,
               "backbone": lambda d=device: find_dinov2("", d)}[what]()  # fmt: skip
        side = adapter.latent_shape if what != "backbone" else (3, 56, 56)
        x = torch.randn(2, *side, device=device).requires_grad_(what != "network")
        run = {"network": lambda: forward_of(adapter, net, x), "decoder": lambda: adapter.decode(x),  # noqa: B023
               "backbone": lambda: net.features(x, (1, 2), 56)}[what]  # fmt: skip  # noqa: B023
        old = [x, *net.parameters(), *net.buffers()]
        with meta.StandsFor("cpu"), Ledger() as ledger, hooked(old) as kept:
            ledger.known(old)
            out = run()
            kept.extend([out] if isinstance(out, torch.Tensor) else out)
        found.append(nbytes(kept) if device == CPU else ledger.total)
        del out
    assert found[0] == (pytest.approx(found[1], rel=0.01) if what == "network" else found[1])


@contextmanager
def hooked(old):
    """What autograd saves inside, without the storages of `old`."""
    known, kept = {t.untyped_storage()._cdata for t in old}, []

    def pack(t):
        if t.untyped_storage()._cdata not in known:
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


def forward_of(adapter, net, x):
    tokens, width, pooled = adapter.text_shape(net)
    shapes, device = [(len(x), tokens, width), (len(x), pooled)], x.device
    cond = planning.Condition(*(torch.zeros(shape, device=device) for shape in shapes))
    return adapter.predict(net, x, torch.full((len(x),), 0.5, device=device), cond)


@pytest.mark.parametrize("preset", ["tiny", *REAL])
def test_checkpointing_keeps_the_gradients_and_less(preset, folders):
    """Bit for bit in fp32 on a CPU; kept: full < selective < none."""
    grads, kept = {}, {}
    for how in ("none", "selective", "full"):
        cfg = config_of(preset, folders, f"--model.checkpointing={how}")
        adapter = make_adapter(cfg.model, CPU)
        _, student, _ = make_networks(cfg, adapter, CPU)
        torch.manual_seed(0)
        held, x = [], torch.randn(2, *adapter.latent_shape)
        kept[how] = allocator_bytes(lambda: held.append(forward_of(adapter, student, x)))[-1]  # noqa: B023
        held[0].square().sum().backward()
        grads[how] = [p.grad for p in student.parameters()]
    assert kept["full"] < kept["selective"] < kept["none"]
    for how in ("selective", "full"):
        for mine, plain in zip(grads[how], grads["none"], strict=True):
            assert (mine is None) == (plain is None) and (mine is None or torch.equal(mine, plain)), how


def test_the_discriminators_view_checkpointed_is_the_same(folders):
    """The student's gradients through decoder and backbone, bit for bit."""
    preset, found = "sd35-medium", []
    for checkpointing in ("false", "true"):
        cfg = config_of(preset, folders, f"--disc.checkpointing={checkpointing}")
        parts, data = build(cfg, CPU)
        x0 = encoded(parts, data.batch(0, 2), 0).latents.clone().requires_grad_()
        taps = parts.vfm.features(parts.adapter.decode(x0), cfg.disc.taps, cfg.disc.size)
        sum(t.square().sum() for t in taps).backward()
        found.append(x0.grad)
    assert torch.equal(*found) and found[0].abs().max() > 0


# -- the command ---------------------------------------------------------------------------------------------------


def test_dry_run_needs_no_weights(folders, tmp_path, capsys, monkeypatch):
    preset = "flux-dev"
    for file in folders[preset].glob("*/config.json"):
        if file.parent.name in ("transformer", "vae") or file.parent.name.startswith("text_encoder"):
            (tmp_path / file.parent.name).mkdir()
            (tmp_path / file.parent.name / "config.json").write_text(file.read_text())
    monkeypatch.setattr(train, "build", None)  # nothing is loaded
    assert main([preset, "--teacher", str(tmp_path), *SMALL, "--dry-run"]) == 0
    assert "memory plan: flux-dev on 1 machine without a GPU, batch 2" in capsys.readouterr().out
    assert main([preset, "--teacher", "no/such", *SMALL, "--dry-run", "--preset-is-not-asked=1"]) == 2


def test_the_smallest_set_is_found_and_said(folders, capsys):
    """A device a little smaller than the run: one switch. Its flags, typed, make a plan that fits. Nothing helps where
    weights alone are more."""
    preset = "sd35-medium"
    cfg = config_of(preset, folders)
    whole = planner_of(cfg).plan(cfg)
    planner = planner_of(cfg, bytes=0.98 * whole.total)
    changed, plan = smallest(planner, cfg)
    assert len(changed) == 1 and plan.fits and not planner.plan(cfg).fits
    tried = [planner.plan(c) for some, c in thriftier(cfg) if len(some) < 2]
    assert all(planner.least(p.config) <= p.total for p in tried)  # what was not run would not have fitted
    assert planner.plan(
        parse([preset, "--teacher", str(folders[preset]), *SMALL, *flags(changed).split()], "").config
    ).fits
    assert smallest(planner_of(cfg, bytes=1e5), cfg) is None
    size = (0.98 * whole.total + 3 * GB) / GB  # of a GPU 3 GB are kept free
    words = [preset, "--teacher", str(folders[preset]), *SMALL, "--dry-run", f"--memory.device_gb={size}"]
    main(words)
    assert "It does not fit. The smallest set of switches" in capsys.readouterr().out


def test_thriftier_starts_with_nothing_and_stays_allowed():
    cfg = parse(["sd35-large"], "").config
    sets = [changed for changed, _ in thriftier(cfg)]
    assert sets[0] == {} and sorted(len(s) for s in sets) == [len(s) for s in sets]
    assert not any({"optim.host", "optim.in_backward"} <= set(s) for s in sets)
    assert any(s.get("train.precision") == "stochastic" for s in sets)
    fp32 = replace(cfg, {"model.dtype": "fp32", "train.precision": "fp32"})
    assert not any("train.precision" in s for s, _ in thriftier(fp32))


def test_the_report_adds_up(folders):
    preset = "sdxl"
    cfg = config_of(preset, folders)
    plan = planner_of(cfg, type="cuda", bytes=80e9, ranks=2).plan(cfg)
    title, _, rows = report(plan)
    assert title == "memory plan: sdxl on each of 2 GPUs, batch 1 each"
    sums = {row[0]: float(row[2]) for row in rows}
    assert sums["sum"] == pytest.approx(sum(float(r[2]) for r in rows[:-2]), abs=1e-3 * len(rows))
    assert sums["device"] == 80 and sum(r.device for r in plan.rows) + 3e9 <= plan.total
    assert all(isinstance(r, Row) for r in plan.rows)


def test_unknown_teacher_is_refused():
    cfg = replace(parse(["sd35-large"], "").config, {"model.teacher": "some/body", "preset": "mine"})
    with pytest.raises(UserError, match="a plan needs a local folder"):
        planner_of(cfg)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["sd35-medium", "sdxl"])
def test_max_memory_allocated_within_5_percent(preset):
    """Published sizes with random weights, full, on this GPU: bench.memory, which bench.gpu runs for Large too."""
    from bench.memory import measure

    row = measure(preset, [])
    assert row["predicted_gb"] == pytest.approx(row["max_memory_allocated_gb"], rel=0.05), json.dumps(row)


# -- what stands for a GPU's tensors -------------------------------------------------------------------------------

AUTOCAST = {
    "linear": lambda a, b: F.linear(a, b), "matmul": lambda a, b: a @ b.mT, "conv2d": lambda a, b: F.conv2d(
        a[None, None], b[None, None]), "layer_norm": lambda a, b: F.layer_norm(a, (8,)),
    "group_norm": lambda a, b: F.group_norm(a[None], 4), "rms_norm": lambda a, b: F.rms_norm(a, (8,)),
    "softmax": lambda a, b: a.softmax(-1), "F.softmax": lambda a, b: F.softmax(a, -1), "pow": lambda a, b: a.pow(2),
    "**": lambda a, b: a**2, "rsqrt": lambda a, b: torch.rsqrt(a), "exp": lambda a, b: a.exp(),
    "sum": lambda a, b: a.sum(), "mean": lambda a, b: a.mean(), "mse_loss": lambda a, b: F.mse_loss(a, b),
    "cat": lambda a, b: torch.cat([a, b]), "stack": lambda a, b: torch.stack([a, b]), "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b, "addcmul": lambda a, b: torch.addcmul(b, a, a), "gelu": lambda a, b: F.gelu(a),
    "silu": lambda a, b: F.silu(a),
}  # fmt: skip


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_of_shapes_is_cudas(name):
    """Dtypes of results, against torch's own CUDA autocast on fake tensors, for every mix of fp32 and bf16."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    dtypes = (torch.float32, torch.bfloat16)
    found, truth = [], []
    for a, b in itertools.product(dtypes, dtypes):
        with meta.Autocast(torch.bfloat16):
            shapes = [torch.empty(4, 8, dtype=t, device="meta") for t in (a, b)]
            found.append(AUTOCAST[name](*shapes).dtype)
        with FakeTensorMode():
            fakes = [torch.empty(4, 8, dtype=t, device="cuda") for t in (a, b)]
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            torch.set_autocast_enabled("cuda", True)
            try:
                truth.append(AUTOCAST[name](*fakes).dtype)
            finally:
                torch.set_autocast_enabled("cuda", False)
    assert found == truth


def test_attention_of_shapes_keeps_no_matrix():
    """Output and one fp32 a row and head: what memory-saving kernels keep, and no [N, N]; however it is called."""
    q = torch.zeros(2, 3, 500, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with meta.StandsFor("cuda"), Ledger() as ledger:
        ledger.known([q])
        out, named = F.scaled_dot_product_attention(q, q, q), F.scaled_dot_product_attention(query=q, key=q, value=q)
    assert out.shape == named.shape == q.shape and 0 <= ledger.total / 2 - (q.numel() * 2 + 2 * 3 * 500 * 4) < 64
