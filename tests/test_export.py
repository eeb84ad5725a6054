"""Exports opened by diffusers' own classes: the same latents as our samplers', the same tensors, and a check that
fails where they would not be."""

import json
import shutil
import sys
from functools import wraps

import pytest
import torch
from students import WRITE, make_lora_run, make_run
from test_single_file import flux_of_width, has_klein

from senseflow import export as export_module
from senseflow import model_card
from senseflow.algo.rollout import sample_euler, sample_renoise
from senseflow.export import main
from senseflow.models import lora
from senseflow.models.flux import pack, unpack
from senseflow.student import find_student, load_student

diffusers = pytest.importorskip("diffusers")
PRESETS = ["sd35-medium", "flux-dev", "sdxl", pytest.param("flux2-klein", marks=has_klein)]
PIPELINES = {"sd35-medium": "StableDiffusion3Pipeline", "flux-dev": "FluxPipeline",
             "sdxl": "StableDiffusionXLPipeline", "flux2-klein": "Flux2KleinPipeline"}  # fmt: skip
PROMPTS = ["a red apple", "penguin"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Preset -> (teacher folder, run folder, its shipped, raw and EMA networks), each made once."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def run(preset):
        if preset not in made:
            teacher = WRITE[preset](root / preset / "teacher")
            nets = make_run(preset, teacher, root / preset / "run", ema=preset == "sdxl")
            made[preset] = (teacher, root / preset / "run", nets)
        return made[preset]

    return run


@pytest.fixture(autouse=True)
def _tiny_flux(monkeypatch):
    """diffusers' converter of FLUX files knows one width; the tests' is 32."""
    entry = diffusers.loaders.single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", flux_of_width(32))


def run_export(run, out, *more):
    return main(["--student", str(run), "--out", str(out), "--prompts", *PROMPTS, *more])


def last_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    return [line for line in lines if line.startswith("senseflow.export: ")][-1]


def close(a, b):
    """fp32 rounding through a network and four steps of it, relative to the whole tensor."""
    assert (a.double() - b.double()).norm() <= 1e-5 * b.double().norm()


def from_pipeline(pipe, preset, noises, monkeypatch, **kwargs):
    """Latents that a diffusers pipeline makes of noises[0], its scheduler drawing noises[1:]."""
    fresh = iter(noises[1:])
    for name in ("scheduling_flow_match_euler_discrete", "scheduling_lcm"):
        module = f"diffusers.schedulers.{name}"
        if hasattr(sys.modules[module], "randn_tensor"):  # before 0.42 torch.randn_like
            monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: next(fresh))
        else:
            monkeypatch.setattr(torch, "randn_like", lambda _: next(fresh))
    tokens = {"flux-dev": pack, "flux2-klein": lambda n: n.flatten(2).mT}.get(preset, lambda n: n)
    fresh = iter([tokens(n) for n in noises[1:]])
    pipe.set_progress_bar_config(disable=True)
    first = pack(noises[0]) if preset == "flux-dev" else noises[0]
    seen = []
    step = pipe.scheduler.step  # klein's pipeline undoes the VAE's normalisation: its last step's result counts
    monkeypatch.setattr(pipe.scheduler, "step", wraps(step)(lambda *a, **k: seen.append(out := step(*a, **k)) or out))
    pipe(prompt=PROMPTS, latents=first, output_type="latent", **kwargs)
    monkeypatch.undo()
    last = seen[-1][0]
    shape = noises[0].shape[2:]
    return {"flux-dev": lambda: unpack(last, *shape), "flux2-klein": lambda: last.mT.unflatten(2, shape)}.get(
        preset, lambda: last
    )()


@pytest.mark.parametrize("preset", PRESETS)
def test_pipeline_folder_gives_our_latents(preset, runs, tmp_path, monkeypatch, capsys):
    """Opened with from_pretrained alone, both samplers, called as the issue says."""
    _, run, nets = runs(preset)
    assert run_export(run, tmp_path / "out") == 0
    assert "renoise: max abs latent difference" in capsys.readouterr().out
    pipe = getattr(diffusers, PIPELINES[preset]).from_pretrained(tmp_path / "out", local_files_only=True)
    network = getattr(pipe, "unet" if preset == "sdxl" else "transformer")
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), nets[0].parameters(), strict=True))
    adapter, net, record = load_student(run)
    noises = [torch.randn(2, *adapter.latent_shape, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    cond, anchors = adapter.encode_prompts(PROMPTS), record["anchors"]
    kwargs = dict(num_inference_steps=4, height=64, width=64)
    if preset == "sd35-medium":
        kwargs |= dict(sigmas=[1, 0.75, 0.5, 0.25], guidance_scale=1.0, max_sequence_length=16)
    elif preset == "sdxl":
        kwargs |= dict(guidance_scale=1.0)
    elif preset == "flux2-klein":
        kwargs |= dict(guidance_scale=1.0, max_sequence_length=16)
    else:
        kwargs |= dict(max_sequence_length=16)
    got = from_pipeline(pipe, preset, list(noises), monkeypatch, **kwargs)
    close(got, sample_renoise(adapter, net, noises[:4], anchors, cond))
    if preset == "sdxl":
        assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]
        pipe.scheduler = diffusers.DDIMScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
        )
    else:
        assert pipe.scheduler.sigmas.tolist() == pytest.approx([*anchors, 0.0], abs=1e-6)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, stochastic_sampling=False)
    got = from_pipeline(pipe, preset, list(noises), monkeypatch, **kwargs)
    close(got, sample_euler(adapter, net, noises[0], [*anchors, 0.0], cond))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_has_our_timesteps_by_itself(steps):
    from senseflow.flow import DiffusionSchedule

    schedule = DiffusionSchedule()
    scheduler = export_module.make_scheduler(schedule)
    scheduler.set_timesteps(steps)
    ours = schedule.timestep(torch.tensor(schedule.anchors(steps)))
    assert scheduler.timesteps.tolist() == ours.tolist()


@pytest.mark.parametrize("preset, target", [
    ("sd35-medium", "single-file"), ("flux-dev", "transformer"), ("flux-dev", "single-file"), ("sdxl", "transformer"),
    pytest.param("sdxl", "single-file", marks=pytest.mark.slow),
    pytest.param("sd35-medium", "transformer", marks=pytest.mark.slow),
])  # fmt: skip
def test_parts_give_our_latents_inside_the_teacher(preset, target, runs, tmp_path, capsys):
    _, run, _ = runs(preset)
    assert run_export(run, tmp_path / "out", "--to", target) == 0
    printed = capsys.readouterr().out
    assert printed.count("within 0.0001") == 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert len(model_card.FENCE.findall(card)) == 2 and "max abs latent difference" in card
    assert (tmp_path / "out" / "sample.png").is_file()
    names = {p.name for p in (tmp_path / "out").iterdir()}
    network = "unet" if preset == "sdxl" else "transformer"
    assert names == {"README.md", "sample.png", "scheduler", "senseflow.json",
                     network if target == "transformer" else model_card.SINGLE_FILE}  # fmt: skip


def test_an_export_is_a_student_again(runs, tmp_path):
    """Whole by itself: sampled and exported again without the teacher."""
    from senseflow.sample import main as sample

    _, run, nets = runs("sd35-medium")
    assert run_export(run, tmp_path / "a") == 0
    record = json.loads((tmp_path / "a" / "senseflow.json").read_text())
    record["model"]["teacher"] = "/nowhere"
    (tmp_path / "a" / "senseflow.json").write_text(json.dumps(record))
    assert sample(["--student", str(tmp_path / "a"), "--prompts", "penguin"]) == 0
    assert run_export(tmp_path / "a", tmp_path / "b", "--to", "transformer") == 0
    net = load_student(tmp_path / "b", str(tmp_path / "a"))[1]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), nets[0].parameters(), strict=True))


@pytest.mark.parametrize("change, what", [
    (lambda patch: patch.setattr(export_module, "make_scheduler", lambda schedule: (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=2.9, stochastic_sampling=True))), "shift"),
    (lambda patch: patch.setitem(model_card.FAMILIES, "sd35", model_card.Family(
        "StableDiffusion3Pipeline", "SD3Transformer2DModel", {"guidance_scale": 1.5})), "guidance"),
    (lambda patch: patch.setattr(model_card, "unshifted", lambda *_: [1.0, 0.75, 0.5, 0.26]), "sigmas"),
])  # fmt: skip
def test_a_call_that_differs_fails_the_check(change, what, runs, tmp_path, monkeypatch, capsys):
    """Near misses of shift, guidance and sigmas: exit 2, and nothing stands at --out."""
    _, run, _ = runs("sd35-medium")
    change(monkeypatch)
    assert run_export(run, tmp_path / "out", "--to", "transformer") == 2, what
    assert "parity failed, so nothing is exported" in last_line(capsys)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "README.md").is_file()


def test_a_card_that_does_not_run_fails_the_check(runs, tmp_path, monkeypatch, capsys):
    _, run, _ = runs("sd35-medium")
    family = model_card.Family("StableDiffusion3Pipeline", "SD3Transformer2DModel", {"guidance": 1.0})
    monkeypatch.setitem(model_card.FAMILIES, "sd35", family)
    assert run_export(run, tmp_path / "out", "--to", "transformer") == 2
    assert "the model card's code fails" in (line := last_line(capsys)) and "unexpected keyword" in line


def test_from_a_checkpoint_ema_and_raw(runs, tmp_path):
    _, run, (shipped, raw, ema) = runs("sdxl")
    step = run / "checkpoints" / "step-00000007"
    for i, (source, flags, want) in enumerate([
        (run, [], shipped), (run, ["--weights", "ema"], ema), (run, ["--weights", "raw"], raw), (step, [], ema),
        (step, ["--weights", "raw"], raw), (run / "student", [], shipped),
    ]):  # fmt: skip
        net = find_student(source, flags[1] if flags else "").network(load_student(run)[0])
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), want.parameters(), strict=True)), i
    assert run_export(step, tmp_path / "out", "--to", "transformer") == 0
    net = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), ema.parameters(), strict=True))
    assert "step-00000007" in (tmp_path / "out" / "README.md").read_text()


def test_a_checkpoint_alone(tmp_path, capsys):
    """No student folder beside it: structure and settings from the teacher and the checkpoint's own config."""
    teacher = WRITE["flux-dev"](tmp_path / "teacher")
    raw = make_run("flux-dev", teacher, tmp_path / "run", "--model.anchors", "released", student=False)[1]
    step = tmp_path / "run" / "checkpoints" / "step-00000007"
    student = find_student(step)
    assert student.record["anchors"] == [1.0, 0.904, 0.759, 0.512]
    net = student.network(student.adapter())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), raw.parameters(), strict=True))
    assert run_export(step, tmp_path / "out") == 0  # released anchors are off the grid: the card passes them
    assert "sigmas=[1.0, 0.7488" in (tmp_path / "out" / "README.md").read_text()
    capsys.readouterr()
    assert run_export(step, tmp_path / "out", "--weights", "ema") == 2
    assert "keeps no EMA, allowed is raw" in last_line(capsys)
    (step / "state.pt").write_bytes((step / "state.pt").read_bytes()[:-9])
    assert run_export(step, tmp_path / "out") == 2
    assert "is no whole checkpoint: its checksum differs" in last_line(capsys)


def test_a_checkpoint_alone_reads_no_weights_of_the_teacher(runs, tmp_path, monkeypatch, capsys):
    """Its structure is the teacher's config: at true size the weights would be 64 GB in fp32, for nothing."""
    teacher = runs("flux-dev")[0]
    raw = make_run("flux-dev", teacher, tmp_path / "run", student=False)[1]
    student = find_student(tmp_path / "run" / "checkpoints" / "step-00000007")
    adapter = student.adapter()
    monkeypatch.setattr(adapter, "load_network", None)
    net = student.network(adapter)
    assert not net.config.guidance_embeds
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), raw.parameters(), strict=True))
    assert not any(t.is_meta for t in net.state_dict().values())
    shutil.copytree(teacher, tmp_path / "other")
    config = tmp_path / "other" / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 1}))
    assert run_export(student.path, tmp_path / "out", "--teacher", str(tmp_path / "other")) == 2
    assert "is no student of" in last_line(capsys)


def test_stored_in_bf16(runs, tmp_path, capsys):
    """Half the bytes; the check in fp32 compares with the run's weights rounded alike, the one in bf16 is looser."""
    from safetensors.torch import load_file

    _, run, nets = runs("sd35-medium")
    assert run_export(run, tmp_path / "out", "--dtype", "bf16") == 0
    stored = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    mine = nets[0].state_dict()
    assert all(torch.equal(stored[k], mine[k].bfloat16()) for k in mine)
    assert run_export(run, tmp_path / "out", "--dtype", "bf16", "--check-dtype", "bf16") == 0
    assert "parity in bf16" in capsys.readouterr().out
    assert "torch.bfloat16" in (tmp_path / "out" / "README.md").read_text()


def test_t5_length_as_released_is_in_the_call(runs, tmp_path):
    teacher = runs("sd35-medium")[0]
    make_run("sd35-medium", teacher, tmp_path / "run", "--model.text_length", "77")
    assert run_export(tmp_path / "run", tmp_path / "out", "--to", "transformer") == 0
    assert "max_sequence_length=77" in (tmp_path / "out" / "README.md").read_text()


def test_a_variant_of_the_teacher_becomes_plain(runs, tmp_path):
    """A teacher that has only fp16 files: the exported folder opens without being told."""
    _, run, _ = runs("sdxl")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(runs("sdxl")[0])
    pipe.save_pretrained(tmp_path / "teacher", variant="fp16")
    with pytest.warns(UserWarning, match="its variant fp16 is read"):
        assert run_export(run, tmp_path / "out", "--teacher", str(tmp_path / "teacher")) == 0
    files = {p.name for p in (tmp_path / "out").rglob("*.safetensors")}
    assert files == {"model.safetensors", "diffusion_pytorch_model.safetensors"}
    teacher = ["--teacher", str(tmp_path / "teacher")]
    assert run_export(run, tmp_path / "net", "--to", "transformer", *teacher) == 0  # its card reads the teacher's files
    assert 'scheduler=scheduler, variant="fp16", ' in (tmp_path / "net" / "README.md").read_text()


@pytest.mark.parametrize("preset", [
    "flux-dev", pytest.param("sd35-medium", marks=pytest.mark.slow), pytest.param("sdxl", marks=pytest.mark.slow),
])  # fmt: skip
def test_lora(preset, runs, tmp_path, monkeypatch, capsys):
    """As a LoRA inside the teacher's own pipeline (FLUX at the guidance it was trained on), and merged; EMA and raw."""
    pytest.importorskip("peft")
    from safetensors.torch import load_file

    run = tmp_path / "run"
    student = make_lora_run(preset, runs(preset)[0], run)
    assert run_export(run, tmp_path / "out", "--to", "lora") == 0
    state, mine = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors"), lora.lora_state_dict(student)
    assert set(state) == set(mine) and all(torch.equal(state[k], mine[k]) for k in mine)
    assert ("guidance_scale=2.5" in (tmp_path / "out" / "README.md").read_text()) == (preset == "flux-dev")
    assert run_export(run / "checkpoints" / "step-00000007", tmp_path / "merged", "--to", "transformer") == 0
    merged = load_file(next((tmp_path / "merged").glob("*/*.safetensors")))
    assert all(torch.equal(merged[k], v) for k, v in lora.merged(student).state_dict().items())
    assert capsys.readouterr().out.count("within 0.0001") == 4

    def save_other(net, file):
        lora.layers(net).__next__()[1].lora_B["default"].weight.data.mul_(1.1)
        lora.save_lora(net, file)

    monkeypatch.setattr(export_module, "save_lora", save_other)
    assert run_export(run, tmp_path / "other", "--to", "lora") == 2
    assert "parity failed" in last_line(capsys)


def test_what_cannot_be_exported_is_one_line(runs, tmp_path, capsys):
    _, run, _ = runs("sd35-medium")
    assert run_export(run, tmp_path / "out", "--to", "lora") == 2
    assert "has none, it was trained with model.variant = 'full'" in last_line(capsys)
    assert run_export(tmp_path / "none", tmp_path / "out") == 2
    assert "holds no student" in last_line(capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert run_export(run, tmp_path / "full") == 2
    assert "exists and is no earlier export" in last_line(capsys)
    assert run_export(run, run / "student") == 2
    assert "is a run or the student itself" in last_line(capsys)
    assert run_export(run, tmp_path / "out", "--teacher", str(tmp_path / "none")) == 2
    assert "does not exist" in last_line(capsys)
    (tmp_path / "bare" / "transformer").mkdir(parents=True)
    (tmp_path / "bare" / "senseflow.json").write_text('{"anchors": [1.0]}')
    assert run_export(tmp_path / "bare", tmp_path / "out") == 2
    assert "lacks shift, shift_kind" in last_line(capsys)


def test_the_embedded_family_is_transformer_and_scheduler(tmp_path, capsys):
    """It has no pipeline; its card is a loop over diffusers' network and scheduler, checked the same way."""
    from senseflow.models.embedded import EmbeddedAdapter
    from senseflow.presets import tiny

    adapter = EmbeddedAdapter()
    net = adapter.student_of(adapter.load_network())
    export_module.save_student(tmp_path / "run" / "student", net, adapter.schedule.anchors(4), tiny(), adapter)
    assert run_export(tmp_path / "run", tmp_path / "out") == 2
    assert "family 'embedded' has no diffusers pipeline: allowed is --to transformer" in last_line(capsys)
    assert run_export(tmp_path / "run", tmp_path / "out", "--to", "transformer") == 0
    assert capsys.readouterr().out.count("within 0.0001") == 2
