"""kernels.fuse and kernels.attention: what the run puts on the fused operations, and that nothing else notices."""

from functools import cache
from typing import Any, get_args, get_type_hints

import pytest
import torch
from tiny_pipelines import write_flux, write_sd3

from senseflow import train
from senseflow.cli import parse
from senseflow.config import Kernels, UserError
from senseflow.export import save_student
from senseflow.models import families
from senseflow.shipping import student_for_use
from senseflow.steps import encoded
from senseflow.train import build, iterate, main
from senseflow.updates import Updates
from senseflow_kernels import _mmdit_blocks, attention, mmdit

pytest.importorskip("diffusers", reason="diffusers is not installed")
WRITE = {"sd35-medium": lambda folder: write_sd3(folder, medium=True), "flux-dev": write_flux}
SMALL = [f"--{setting}" for setting in (
    "model.side=64", "model.text_length=16", "model.dtype=fp32", "data.batch=2", "train.gen_every=2", "log.every=1",
    "log.tensorboard=false", "log.progress=false", "eval.grid=2", "eval.teacher_steps=1", "eval.every=100",
    "train.precision=fp32",
    "disc.kind=fake_features", "train.lr=1e-4", "train.fake_lr=1e-4", "ema.decay=0.5", "train.iterations=2",
)]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {preset: write(root / preset) for preset, write in WRITE.items()}


cached_variants = cache(train.load_variants)


@pytest.fixture(autouse=True)
def _pictures(monkeypatch):
    """Read once for all tests."""
    monkeypatch.setattr(train, "load_variants", cached_variants)


@pytest.fixture
def calls(monkeypatch):
    """The shapes that reach the operation at the start of every fused block."""
    seen = []
    known = _mmdit_blocks.layer_norm_modulate
    monkeypatch.setattr(_mmdit_blocks, "layer_norm_modulate", lambda *a: seen.append(a[0].shape) or known(*a))
    return seen


def config_of(preset, folders, *more):
    return parse([preset, "--teacher", str(folders[preset]), *SMALL, *more], "").config


def trained(cfg, iterations=2):
    """(parts, EMA's copy of the student, the losses of each iteration)."""
    parts, data = build(cfg, torch.device("cpu"))
    updates, rows = Updates(cfg, parts), []
    for i in range(iterations):
        metrics = iterate(cfg, parts, updates, encoded(parts, data.batch(i, cfg.data.batch), i), i)
        rows.append({name: metrics[name].item() for name in ("fake", "disc", "dmd", "isg", "adv") if name in metrics})
    return parts, student_for_use(parts, updates), rows


def fused(net):
    """How many of its blocks are, and whether that is all or none."""
    marks = ["forward" in vars(block) for _, _, block in mmdit._blocks(net)]
    assert len(set(marks)) == 1
    return marks[0]


@pytest.mark.parametrize("preset", WRITE)
def test_training_fused_is_training(preset, folders, tmp_path, calls):
    """Two iterations, the second with a student step: the same losses to fp32 rounding and the same names of weights.
    fake_features reads through a hook on a block; the EMA's student is a deep copy, and what is saved is diffusers'."""
    own, own_student, expected = trained(config_of(preset, folders))  # auto: no kernels on this device
    assert not calls and not any(map(fused, (own.student, own.fake, own.teacher)))
    cfg = config_of(preset, folders, "--kernels.fuse", "true")
    parts, student, found = trained(cfg)
    assert calls and all(map(fused, (parts.student, parts.fake, parts.teacher, student)))
    assert len(found[1]) == 5 and found[0].keys() == expected[0].keys()
    for a, b in zip(expected, found, strict=True):
        # 2^-24 a rounding, some hundred in a row, in losses of gaps between like networks (a factor of 10)
        assert b == pytest.approx(a, rel=1e-4)
    assert list(student.state_dict()) == list(own_student.state_dict())
    for (name, a), b in zip(own_student.named_parameters(), student.parameters(), strict=True):
        # Adam's first step is the gradient's sign, and that of a rounding may differ: 2 lr (1 - decay)
        assert (a - b).abs().max() <= 1.01e-4, name
    save_student(tmp_path / "student", student, parts.anchors, cfg, parts.adapter)
    cls: Any = type(student)
    opened = cls.from_pretrained(tmp_path / "student" / "transformer", low_cpu_mem_usage=False)
    assert not fused(opened)
    assert all(torch.equal(t, opened.state_dict()[name]) for name, t in student.state_dict().items())


def test_resume_may_change_it(folders, tmp_path, calls):
    command = ["flux-dev", "--teacher", str(folders["flux-dev"]), "--out", str(tmp_path), *SMALL]
    assert main([*command, "--kernels.fuse", "true", "--train.iterations", "1"]) == 0
    assert calls
    calls.clear()
    assert main([*command, "--kernels.fuse", "false", "--resume"]) == 0
    assert not calls


def test_bf16_stays_near_fp32(folders, calls):
    """Under autocast, with fp32 weights, as on a GPU."""
    cfg = config_of("sd35-medium", folders, "--kernels.fuse", "true", "--model.dtype", "bf16")
    _, _, [bf16] = trained(cfg, 1)
    _, _, [fp32] = trained(config_of("sd35-medium", folders), 1)
    assert calls and bf16 != fp32 and bf16 == pytest.approx(fp32, rel=0.02)  # as unfused: test_families.py


def test_auto_follows_the_kernels(monkeypatch):
    fused = []
    monkeypatch.setattr(families, "fuse_mmdit", lambda net, attention: fused.append((net, attention)))
    net, cuda = torch.nn.Identity(), torch.device("cuda")
    monkeypatch.setattr(families.senseflow_kernels, "is_available", lambda device: device.type == "cuda")
    assert families.fuse_networks(Kernels(), "flux", cuda, net)
    assert families.fuse_networks(Kernels(attention="cudnn"), "embedded", cuda, net)
    assert not families.fuse_networks(Kernels(), "flux", torch.device("cpu"), net)
    assert families.fuse_networks(Kernels(), "embedded", torch.device("cpu"), net)
    assert families.fuse_networks(Kernels(), "embedded", torch.device("meta"), net)  # the plan of that run
    assert not families.fuse_networks(Kernels(), "flux", torch.device("meta"), net)
    assert not families.fuse_networks(Kernels(fuse="false"), "flux", cuda, net)
    assert not families.fuse_networks(Kernels(fuse="false"), "embedded", torch.device("cpu"), net)
    assert not families.fuse_networks(Kernels(fuse="true"), "sdxl", cuda, net)
    assert fused == [(net, None), (net, "cudnn"), (net, None), (net, None)]


def test_attention_reaches_the_dispatcher(folders, tmp_path, monkeypatch, capsys):
    chosen = []
    known = attention._run
    monkeypatch.setattr(attention, "_run", lambda name, *a: chosen.append(name) or known(name, *a))
    flags = ["--kernels.fuse", "true", "--kernels.attention"]
    trained(config_of("flux-dev", folders, *flags, "math"), 1)
    assert set(chosen) == {"math"}
    command = ["flux-dev", "--teacher", str(folders["flux-dev"]), "--out", str(tmp_path), *SMALL]
    assert main([*command, *flags, "cudnn"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]  # before it: progress bars of loading
    # on a CPU for want of CUDA, on a GPU because the run is in fp32
    assert said.startswith("senseflow.train: attention backend 'cudnn' cannot run for ") and "float32, head" in said
    assert "; can: " in said


def test_bad_settings_are_one_line(capsys):
    assert main(["tiny", "--kernels.fuse", "maybe"]) == 2
    assert capsys.readouterr().err.endswith("--kernels.fuse 'maybe': allowed is auto | true | false\n")
    assert main(["tiny", "--kernels.attention", "fa4"]) == 2
    assert "allowed is auto | fa3 | cudnn | flash" in capsys.readouterr().err
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"'math': fused blocks alone heed it, and family 'sdxl' has none"):
        families.fuse_networks(Kernels(attention="math"), "sdxl", cpu)
    with pytest.raises(UserError, match=r"and kernels.fuse = 'false' on cpu has none; allowed is auto"):
        families.fuse_networks(Kernels(fuse="false", attention="math"), "flux", cpu)
    with pytest.raises(UserError, match=r"not Identity; --kernels.fuse false runs it unfused"):
        families.fuse_networks(Kernels(fuse="true"), "flux", cpu, torch.nn.Identity())


def test_every_backend_can_be_named():
    assert get_args(get_type_hints(Kernels)["attention"]) == ("auto", *attention.BACKENDS)
