"""Every real family through the whole run on a tiny random pipeline: train, resume, sample, reopen in diffusers."""

import gc
import json
import weakref
from typing import Any

import pytest
import torch
from tiny_pipelines import few_pictures, write_flux, write_klein, write_sd3, write_sdxl

from senseflow import train
from senseflow.cli import parse
from senseflow.config import UserError
from senseflow.export import main as export_main
from senseflow.models import loading
from senseflow.presets import PRESETS
from senseflow.sample import load_student
from senseflow.sample import main as sample_main
from senseflow.train import main

diffusers = pytest.importorskip("diffusers")
WRITE = {"sd35-medium": lambda f: write_sd3(f, medium=True), "sd35-large": write_sd3, "flux-dev": write_flux,
         "sdxl": write_sdxl, "flux2-klein": write_klein}  # fmt: skip
SMALL = [f"--{setting}" for setting in (
    "model.side=64", "model.text_length=16", "model.dtype=fp32", "data.batch=2", "train.gen_every=1", "log.every=1",
    "log.tensorboard=false", "log.progress=false", "eval.grid=2", "eval.teacher_steps=2", "eval.every=100",
    "train.precision=fp32",
    "disc.taps=-1,2", "disc.size=28", "disc.width=8", "disc.downsample=1", "disc.backbone=", "train.keep_last=9",
)]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {preset: write(root / preset) for preset, write in WRITE.items()}


@pytest.fixture(autouse=True)
def _pictures(monkeypatch):
    monkeypatch.setattr(train, "load_variants", few_pictures, raising=False)


def run(preset, folders, out, *more):
    return main([preset, "--teacher", str(folders[preset]), "--out", str(out), *SMALL, *more])


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("preset", WRITE)
def test_train_resume_sample(preset, folders, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    lr = ["--train.lr", "1e-4", "--train.fake_lr", "1e-4"]
    assert run(preset, folders, whole, "--train.iterations", "3", *lr) == 0
    assert run(preset, folders, parts, "--train.iterations", "2", *lr) == 0
    assert run(preset, folders, parts, "--train.iterations", "3", *lr, "--resume") == 0
    adapter, net, record = load_student(whole)
    _, again, _ = load_student(parts)
    for (name, a), b in zip(net.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name  # constant rates: a stop and a resume change nothing
    teacher = adapter.load_network(torch.float32)
    moved = [not torch.equal(p, dict(teacher.named_parameters())[n]) for n, p in net.named_parameters()]
    assert sum(moved) > 0.9 * len(moved)
    assert record["anchors"] == adapter.schedule.anchors(4)
    rows = [row for row in metrics(whole) if "fake" in row]
    assert len(rows) == 3 and all(row["student_skipped"] == 0 and row["fake"] > 0 for row in rows)
    assert "adv" in rows[0] and "isg" in rows[0] and rows[0]["dmd"] > 0
    assert len(list((whole / "grids").glob("*.png"))) == 2  # before and after
    assert not (whole / "results.json").exists()  # nothing is scored, so no empty table
    for sampler in ("renoise", "euler"):
        assert sample_main(["--student", str(whole), "--prompts", "a red apple", "--sampler", sampler]) == 0
    assert (whole / "samples" / "sheet.png").is_file()
    out = tmp_path / "export"  # checked there: the pipeline, opened by diffusers, gives both samplers' latents
    assert export_main(["--student", str(whole), "--to", "pipeline", "--out", str(out)]) == 0
    pipe = diffusers.DiffusionPipeline.from_pretrained(out, local_files_only=True)
    assert type(pipe).__name__ == json.loads((folders[preset] / "model_index.json").read_text())["_class_name"]
    network = pipe.unet if adapter.network == "unet" else pipe.transformer
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), net.parameters(), strict=True))


@pytest.mark.parametrize("preset", ["sd35-large", "flux-dev", "sdxl"])
def test_the_student_opens_in_diffusers(preset, folders, tmp_path):
    """Its network in the teacher's own pipeline: a class diffusers knows, weights under its own names."""
    assert run(preset, folders, tmp_path / "run", "--train.iterations", "1") == 0
    student = tmp_path / "run" / "student"
    adapter, net, _ = load_student(tmp_path / "run")
    cls = type(net)
    assert cls.__module__.startswith("diffusers.")
    reopened = cls.from_pretrained(student / adapter.network, low_cpu_mem_usage=False)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), reopened.parameters(), strict=True))
    if preset == "flux-dev":
        assert not reopened.config.guidance_embeds


@pytest.mark.parametrize("preset", ["sd35-large", "flux-dev", "sdxl", "flux2-klein"])
def test_what_is_in_memory_once_a_run_is_built(preset, folders, monkeypatch):
    """Text encoders are gone, and freed without a collection, before a network is loaded: what is still needed of them
    has been encoded. The backbone's matrices are in the arithmetic's dtype, its norms in fp32."""
    encoders, before, load, make = [], [], loading.load_component, train.make_networks

    def loaded(cls, source, part, *args, **kwargs):
        found = load(cls, source, part, *args, **kwargs)
        if part.startswith("text_encoder"):
            encoders.append(weakref.ref(found))
        return found

    def made(*args, **kwargs):
        before.extend(encoder() for encoder in encoders)
        return make(*args, **kwargs)

    monkeypatch.setattr(loading, "load_component", loaded)
    monkeypatch.setattr(train, "make_networks", made)
    flags = ["--teacher", str(folders[preset]), *SMALL, "--model.dtype", "bf16"]
    gc.collect()
    gc.disable()
    try:
        parts: Any = train.build(parse([preset, *flags], "").config, torch.device("cpu"))[0]
    finally:
        gc.enable()
    assert before and not any(before) and "text" not in vars(parts.adapter)
    parts.adapter.uncond(2)
    assert len(parts.shown) == 2 and "text" not in vars(parts.adapter)
    block = parts.vfm.blocks[0]
    linear = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 4 and {m.weight.dtype for m in linear} == {torch.bfloat16}
    assert block.norm1.weight.dtype == torch.float32


def test_dmd2_baseline_of_a_real_family(folders, tmp_path):
    assert main(["sdxl-dmd2", "--teacher", str(folders["sdxl"]), "--out", str(tmp_path / "run"), *SMALL,
                 "--train.iterations", "1"]) == 0  # fmt: skip
    assert "disc" in metrics(tmp_path / "run")[-1] or any("disc" in row for row in metrics(tmp_path / "run"))


def test_bf16_stays_near_fp32(folders, tmp_path):
    """model.dtype bf16: weights of the student stay fp32, its losses stay within bf16's rounding of fp32's."""
    losses = []
    for dtype in ("fp32", "bf16"):
        out = tmp_path / dtype
        assert run("sd35-large", folders, out, "--train.iterations", "1", "--model.dtype", dtype) == 0
        losses.append(next(row["fake"] for row in metrics(out) if "fake" in row))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # 2^-8 a layer, some ten layers deep, averaged over pixels
    assert load_student(tmp_path / "bf16")[1].dtype == torch.bfloat16


def test_what_is_missing_is_said(folders, tmp_path):
    from senseflow.train import build

    with pytest.raises(UserError, match="family 'flux' needs a diffusers folder or a hub id: --teacher PATH"):
        build(PRESETS["flux-dev"](), torch.device("cpu"))
    arguments = parse(["sdxl", "--teacher", str(folders["flux-dev"])], "")
    with pytest.raises(UserError, match=r"text_encoder_2 is a T5EncoderModel by model_index\.json, expected CLIP"):
        build(arguments.config, torch.device("cpu"))
    arguments = parse(["sd35-large", "--teacher", str(folders["sd35-large"]), *SMALL, "--disc.taps", "12"], "")
    with pytest.raises(UserError, match="this backbone has 12 blocks, allowed is -1 to 11"):
        build(arguments.config, torch.device("cpu"))
