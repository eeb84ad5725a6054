"""model.variant lora: student and fake as LoRA on the teacher's own tensors, against plain algebra and diffusers."""

import copy
import json

import pytest
import torch
from tiny_pipelines import few_pictures, write_flux, write_klein, write_sd3, write_sdxl

from senseflow import checkpoint, train
from senseflow.algo.ida import ida_update
from senseflow.cli import parse
from senseflow.config import Lora, UserError
from senseflow.fields import from_dict
from senseflow.models.flux import FluxAdapter, pack, unpack
from senseflow.models.flux2 import Flux2Adapter
from senseflow.models.lora import (
    NAME,
    layers,
    lora_pair,
    lora_state_dict,
    merged,
    shared_copy,
    student_from,
    target_names,
    trainable,
    trained_state,
)
from senseflow.models.sd3 import SD3Adapter
from senseflow.models.sdxl import SDXLAdapter
from senseflow.sample import load_student
from senseflow.shipping import student_for_use
from senseflow.steps import encoded
from senseflow.train import build, iterate, main
from senseflow.updates import Updates

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
SIDE, PROMPTS = 64, ["a red apple", "penguin"]
LORA = Lora(rank=4, alpha=6.0)
WRITE = {"sd35-medium": lambda f: write_sd3(f, medium=True), "flux-dev": write_flux, "sdxl": write_sdxl,
         "flux2-klein": write_klein}  # fmt: skip
ADAPTER = {"sd35-medium": SD3Adapter, "flux-dev": FluxAdapter, "sdxl": SDXLAdapter,
           "flux2-klein": Flux2Adapter}  # fmt: skip
SMALL = [f"--{setting}" for setting in (
    "model.side=64", "model.text_length=16", "model.dtype=fp32", "train.precision=fp32", "data.batch=2",
    "train.gen_every=1", "log.every=1",
    "log.tensorboard=false", "log.progress=false", "eval.grid=2", "eval.teacher_steps=1", "eval.every=100",
    "disc.kind=fake_features", "train.lr=1e-2", "train.fake_lr=1e-2", "ema.decay=0.5", "train.iterations=2",
    "model.variant=lora", "lora.rank=4", "lora.alpha=6", "train.keep_last=9",
)]  # fmt: skip
DEAD = "attn.add_q_proj", "norm1_context"  # of SD 3's last block, which drops its text


@pytest.fixture(autouse=True)
def _pictures(monkeypatch):
    monkeypatch.setattr(train, "load_variants", few_pictures, raising=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {preset: write(root / preset) for preset, write in WRITE.items()}


def adapter_of(preset, folders, dtype=torch.float32):
    more = {} if preset == "sdxl" else dict(text_length=32)
    return ADAPTER[preset](folders[preset], SIDE, dtype=dtype, **more)


def normal(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shake(*nets):
    """Every B at random, so that an adapter does something."""
    for seed, net in enumerate(nets):
        for i, p in enumerate(trainable(net)):
            with torch.no_grad():
                p.copy_(0.1 * normal(p.shape, 1000 * seed + i))


def inputs(adapter):
    return normal((2, *adapter.latent_shape)), torch.tensor([0.5, 0.9]), adapter.encode_prompts(PROMPTS)


def close(a, b, what):
    """fp32 rounding through a network: relative to the whole tensor, 1e-5."""
    assert (a.double() - b.double()).norm() <= 1e-5 * b.double().norm(), what


def pointers(net):
    return {t.data_ptr(): t.numel() * t.element_size() for t in [*net.parameters(), *net.buffers()] if t.numel()}


@pytest.mark.parametrize("preset", WRITE)
def test_the_base_exists_once(preset, folders):
    """The three networks together hold the teacher's bytes, A once, B twice; FLUX one bias more for each."""
    adapter = adapter_of(preset, folders)
    teacher = adapter.load_network(torch.float32)
    student, fake = lora_pair(adapter, teacher, LORA, 0)
    base, both = pointers(teacher), pointers(student) | pointers(fake)
    a = sum(4 * (layer.in_features * 4) for _, layer in layers(student))
    b = sum(4 * (layer.out_features * 4) for _, layer in layers(student))
    bias = 32 * 4 if preset == "flux-dev" else 0
    assert sum((base | both).values()) == sum(base.values()) + a + 2 * b + 2 * bias
    assert not set(pointers(fake)) & {p.data_ptr() for p in trainable(student)}
    for (_, mine), (_, other) in zip(layers(student), layers(fake), strict=True):
        assert mine.lora_A[NAME].weight is other.lora_A[NAME].weight and not mine.lora_A[NAME].weight.requires_grad
        rows = mine.lora_A[NAME].weight.double()
        torch.testing.assert_close(rows @ rows.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)
    assert len(trainable(student)) == len(list(layers(student))) >= 20
    copied = shared_copy(student)  # what the student's EMA is put into
    assert not set(pointers(copied)) & {p.data_ptr() for p in trainable(student)}
    assert len(set(pointers(copied)) - set(pointers(student))) == len(trainable(student))


@pytest.mark.parametrize("preset", WRITE)
def test_the_teacher_is_untouched_and_the_start_is_the_teacher(preset, folders):
    adapter = adapter_of(preset, folders)
    teacher, alone = adapter.load_network(torch.float32), adapter.load_network(torch.float32)
    student, fake = lora_pair(adapter, teacher, LORA, 0)
    x, sigma, cond = inputs(adapter)
    w = torch.full((2,), 3.5)
    with torch.no_grad():
        want = adapter.predict(alone, x, sigma, cond, w)
        first = adapter.predict(student, x, sigma, cond)
        if preset == "flux-dev":
            close(first, want, "start")  # one addition in another order
        else:
            assert torch.equal(first, want)
        shake(student, fake)
        assert torch.equal(adapter.predict(teacher, x, sigma, cond, w), want)
        one, two = adapter.predict(student, x, sigma, cond), adapter.predict(fake, x, sigma, cond)
    assert min((one - want).norm(), (two - want).norm(), (one - two).norm()) > 0.01 * want.norm()
    assert teacher.state_dict().keys() == alone.state_dict().keys()
    assert all(torch.equal(t, alone.state_dict()[k]) for k, t in teacher.state_dict().items())


def effective(net):
    """W + s B A of every adapted layer, fp64."""
    return {
        name: m.base_layer.weight.double()
        + m.scaling[NAME] * m.lora_B[NAME].weight.double() @ m.lora_A[NAME].weight.double()
        for name, m in layers(net)
    }


def test_ida_acts_on_effective_weights(folders):
    """W after = lam W_phi + (1 - lam) W_theta, in fp64 but for the rounding of B to fp32; nothing else moves."""
    adapter = adapter_of("sd35-medium", folders)
    student, fake = lora_pair(adapter, adapter.load_network(torch.float32), LORA, 0)
    shake(student, fake)
    theta, phi, before = effective(student), effective(fake), copy.deepcopy(student.state_dict())
    ida_update(trainable(fake), trainable(student), 0.97)
    for name, w in effective(fake).items():
        want = 0.97 * phi[name] + 0.03 * theta[name]
        # B's entries below 1 are rounded by 2^-25; a row of A has norm 1, and there are four, times s = 1.5
        assert (w - want).abs().max() <= 4 * 1.5 * 2**-24, name
        assert (w - phi[name]).abs().max() > 1e-4
    assert all(torch.equal(t, before[k]) for k, t in student.state_dict().items())


def trained(preset, folders, *flags, iterations=2, look=lambda *_: None):
    cfg = parse([preset, "--teacher", str(folders[preset]), *SMALL, *flags], "").config
    parts, data = build(cfg, torch.device("cpu"))
    updates, rows = Updates(cfg, parts), []
    for i in range(iterations):
        metrics = iterate(cfg, parts, updates, encoded(parts, data.batch(i, cfg.data.batch), i), i)
        look(parts, updates)
        rows.append({k: metrics[k].item() for k in ("fake", "disc", "dmd", "isg", "adv", "ida_drift") if k in metrics})
    return cfg, parts, updates, rows


@pytest.mark.parametrize("preset", ["sd35-medium", "flux-dev"])
def test_training_moves_the_right_adapter(preset, folders):
    """Generator and fake step, fused and not: the same losses; B of both moves, A and the base do not, and no gradient
    is left or was ever made elsewhere."""
    fused = trained(preset, folders, "--kernels.fuse", "true")
    cfg, parts, updates, rows = trained(preset, folders)
    for a, b in zip(rows, fused[3], strict=True):
        assert b == pytest.approx(a, rel=1e-4)  # as in test_fuse.py
    adapter = adapter_of(preset, folders)
    alone = adapter.load_network(torch.float32)
    start, _ = lora_pair(adapter, alone, LORA, cfg.seed)
    assert all(torch.equal(t, alone.state_dict()[k]) for k, t in parts.teacher.state_dict().items())
    for net in (parts.student, parts.fake):
        for name, t in net.state_dict().items():
            same = torch.equal(t, start.state_dict()[name])
            dead = any(f"2.{part}" in name for part in DEAD)
            assert dead or same == ("lora_B" not in name), name
    assert not torch.equal(trainable(parts.student)[0], trainable(parts.fake)[0])
    assert {len(p) for n, p in updates.params.items() if n != "disc"} == {len(list(layers(start)))}
    ema = student_for_use(parts, updates)
    assert set(pointers(parts.teacher)) & set(pointers(ema))
    assert not torch.equal(trainable(ema)[0], trainable(parts.student)[0])


def test_gradients_with_activation_checkpointing(folders):
    """What the backward recomputes is the student's own tree, whatever ran in between."""
    adapter = adapter_of("sd35-medium", folders)
    student, fake = lora_pair(adapter, adapter.load_network(torch.float32), LORA, 0)
    shake(student, fake)
    x, sigma, cond = inputs(adapter)
    grads = []
    for wanted in (False, True):
        if wanted:
            student.train().enable_gradient_checkpointing()
        loss = adapter.predict(student, x, sigma, cond).square().mean()
        adapter.predict(fake, x, sigma, cond)
        grads.append(torch.autograd.grad(loss, trainable(student), allow_unused=True))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True) if a is not None)
    assert sum(g is not None for g in grads[0]) > 0.8 * len(grads[0])


@pytest.mark.parametrize("preset", WRITE)
def test_diffusers_loads_the_lora(preset, folders):
    """pipe.load_lora_weights of `lora_state_dict` in the teacher's own pipeline: our student's prediction, and that of
    the merged network. FLUX.1-dev at the guidance the student stands on."""
    adapter = adapter_of(preset, folders)
    student, _ = lora_pair(adapter, adapter.load_network(torch.float32), LORA, 0)
    shake(student)
    x, sigma, cond = inputs(adapter)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders[preset], local_files_only=True)
    net = pipe.unet if preset == "sdxl" else pipe.transformer
    pipe.load_lora_weights(lora_state_dict(student))
    with torch.no_grad():
        want = adapter.predict(student, x, sigma, cond)
        close(adapter.predict(net, x, sigma, cond, torch.full((2,), 3.5)), want, "loaded")
        close(adapter.predict(merged(student), x, sigma, cond), want, "merged")
        pipe.unload_lora_weights()
        bare = adapter.predict(net, x, sigma, cond, torch.full((2,), 3.5))
    assert (bare - want).norm() > 0.01 * want.norm()


def test_flux_lora_in_the_pipelines_own_call(folders):
    """FluxPipeline(guidance_scale=3.5) with the LoRA, four steps, is our Euler sampler on the student."""
    from senseflow.algo.rollout import sample_euler

    adapter = adapter_of("flux-dev", folders)
    student, _ = lora_pair(adapter, adapter.load_network(torch.float32), LORA, 0)
    shake(student)
    noise = normal((2, *adapter.latent_shape))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=float(torch.tensor(1.15).exp()))
    pipe = diffusers.FluxPipeline.from_pretrained(folders["flux-dev"], local_files_only=True, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(lora_state_dict(student))
    want = pipe(
        PROMPTS, height=SIDE, width=SIDE, latents=pack(noise), num_inference_steps=4, sigmas=[1, 0.75, 0.5, 0.25],
        guidance_scale=3.5, max_sequence_length=32, output_type="latent",
    ).images  # fmt: skip
    got = sample_euler(adapter, student, noise, [*adapter.schedule.anchors(4), 0.0], adapter.encode_prompts(PROMPTS))
    close(got, unpack(want, *noise.shape[2:]), "latents")


@pytest.mark.parametrize("preset", ["sd35-medium", pytest.param("flux-dev", marks=pytest.mark.slow)])
def test_resume_is_bit_for_bit(preset, folders, tmp_path):
    """Three iterations, and two then one: the same student, EMA and LoRA file; a checkpoint holds no base weight."""

    def run(out, *more):
        command = [preset, "--teacher", str(folders[preset]), "--out", str(tmp_path / out), *SMALL, *more]
        return main([*command, "--kernels.fuse", "true"])

    assert run("whole", "--train.iterations", "3") == 0
    assert run("parts") == 0 and run("parts", "--train.iterations", "3", "--resume") == 0
    files = [tmp_path / out / "lora" / "pytorch_lora_weights.safetensors" for out in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    adapter, net, record = load_student(tmp_path / "whole")
    other = load_student(tmp_path / "parts")[1]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert record["model"]["variant"] == "lora" and not any("lora" in name for name in net.state_dict())
    state = checkpoint.load(tmp_path / "whole" / "checkpoints" / "step-00000003")
    names = state["updates"]["student"]
    assert names and all(".lora_" in name for name in names)
    cfg = from_dict(state["config"])
    again = student_from(adapter, adapter.load_network(torch.float32), cfg.lora, names)
    for p, ema in zip(trainable(again), state["updates"]["ema"]["shadow"], strict=True):
        p.data.copy_(ema)
    assert all(torch.equal(a, b) for a, b in zip(merged(again).parameters(), net.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="size mismatch"):
        student_from(adapter, adapter.load_network(torch.float32), Lora(rank=2), names)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    drifts = [row["ida_drift"] for row in rows if "ida_drift" in row]
    assert len(drifts) == 3 and all(0 < d < 1.5 for d in drifts)
    flags = ["--lora.rank", "2", "--resume"]
    assert run("parts", *flags) == 2


def test_bf16_base_trains_in_fp32(folders):
    """B, A and their updates stay fp32 over a bf16 teacher, which stays bit for bit, whatever precision the preset
    keeps whole networks in."""
    split = ["--model.dtype", "bf16", "--train.precision", "split"]
    _, parts, updates, rows = trained("sd35-medium", folders, *split, iterations=1)
    assert updates.one_pass and all(p.dtype == torch.float32 for p in updates.exact("fake"))
    alone = adapter_of("sd35-medium", folders).load_network(torch.bfloat16)
    assert all(torch.equal(t, alone.state_dict()[k]) for k, t in parts.teacher.state_dict().items())
    assert {p.dtype for p in trainable(parts.student)} == {torch.float32} and parts.student.dtype == torch.bfloat16
    exact = trained("sd35-medium", folders, iterations=1)[3]
    assert rows[0] != exact[0] and rows[0]["fake"] == pytest.approx(exact[0]["fake"], rel=0.02)  # as test_families.py
    assert merged(parts.student).dtype == torch.float32


def test_targets(folders):
    adapter = adapter_of("flux-dev", folders)
    net = adapter.load_network(torch.float32)
    names = target_names(net, adapter.blocks(net), "attention")
    assert "transformer_blocks.0.attn.to_out.0" in names and "single_transformer_blocks.1.attn.to_q" in names
    assert not any("ff" in n or "norm" in n or "proj_mlp" in n for n in names)
    some = target_names(net, adapter.blocks(net), "proj_mlp, to_out.0")
    assert len(some) == 4 and set(names) < set(target_names(net, adapter.blocks(net), "all"))
    with pytest.raises(UserError, match=r"blocks ends in to_x; allowed are all, attention, or .*proj_mlp"):
        target_names(net, adapter.blocks(net), "to_q,to_x")
    with pytest.raises(UserError, match=r"lora\.targets = ','"):
        target_names(net, adapter.blocks(net), ",")
    with pytest.raises(UserError, match=r"lora\.rank = 33: layer .* has 32 inputs, allowed is up to that"):
        lora_pair(adapter, net, Lora(rank=33), 0)


def test_what_is_refused(folders, monkeypatch):
    adapter = adapter_of("sd35-medium", folders)
    full = adapter.student_of(adapter.load_network(torch.float32))
    for refuse in (lora_state_dict, merged):
        with pytest.raises(UserError, match="this student has no LoRA"):
            refuse(full)
    assert trained_state(full).keys() == full.state_dict().keys()
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"model\.variant = 'lora' needs the package peft"):
        lora_pair(adapter, adapter.load_network(torch.float32), LORA, 0)


def test_the_plan_counts_the_base_once(folders, capsys):
    assert main(["sd35-medium", "--teacher", str(folders["sd35-medium"]), *SMALL, "--dry-run"]) == 0
    rows = {cells[1].strip(): float(cells[3]) for line in capsys.readouterr().out.splitlines()
            if "weights, float32" in line and (cells := line.split("│"))}  # fmt: skip
    assert rows["teacher"] > rows["student"] >= rows["fake"] > 0  # the student's row has A
