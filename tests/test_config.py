"""Presets against paper.md's table, and the checks of every field."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from senseflow.cli import TRAIN_EXTRA, extra_named, parse
from senseflow.config import Config, UserError
from senseflow.fields import from_dict, replace, settings, to_dict
from senseflow.presets import PRESETS


@pytest.mark.parametrize(
    ("preset", "adv", "isg", "lam", "f", "dmd_w", "isg_w", "margin"),
    [
        ("sdxl", 0.5, 0.2, 1.0, 5, (8, 8), (3, 15), 20),
        ("sd35-medium", 0.1, 0.5, 0.98, 10, (2, 8), (2, 4), 50),
        ("sd35-large", 0.1, 1.0, 0.97, 5, (3, 10), (5, 5), 50),
        ("flux-dev", 2.0, 1.0, 0.97, 5, (1, 8), (1, 8), 20),
    ],
)
def test_released_values(preset, adv, isg, lam, f, dmd_w, isg_w, margin):
    c = PRESETS[preset]()
    assert (c.disc.weight, c.isg.weight, c.ida.lam, c.train.gen_every) == (adv, isg, lam, f)
    assert (c.dmd.guidance_min, c.dmd.guidance_max) == dmd_w
    assert (c.isg.guidance_min, c.isg.guidance_max, c.isg.margin) == (*isg_w, margin)


@pytest.mark.parametrize(
    ("preset", "lr", "iterations", "omega", "dmd_law", "fake_law", "shift"),
    [  # paper.md 4, 1.6, 1.1, 1.2, 3
        ("sdxl", 1e-6, 18_000, "released-sdxl", "uniform", "uniform", 1.0),
        ("sd35-large", 1e-6, 27_000, "released-sd35", "uniform", "logit-normal", 3.0),
        ("flux-dev", 1e-5, 12_000, "paper", "logit-normal", "logit-normal", 1.15),
    ],
)
def test_training_setup(preset, lr, iterations, omega, dmd_law, fake_law, shift):
    c = PRESETS[preset]()
    t = c.train
    assert (t.lr, t.fake_lr, t.disc_lr, t.iterations) == (lr, lr, lr, iterations)
    assert (t.beta1, t.beta2, t.eps, t.weight_decay, t.clip, t.warmup) == (0.9, 0.999, 1e-8, 0, 1, 0)
    assert (t.cooldown, c.fake.t_shift) == (0, preset != "flux-dev")
    assert (c.disc.omega, c.dmd.t_law, c.fake.t_law, c.model.shift) == (omega, dmd_law, fake_law, shift)
    ends = {"sd35-large": (0.021, 0.981), "sdxl": (0.02, 0.981)}  # indices 20 to 980, both drawn
    assert preset == "flux-dev" or (c.dmd.t_min, c.dmd.t_max) == ends[preset]
    assert (c.dmd.eps, c.isg.loss, c.disc.omega_on_d) == (0, "charbonnier", True)
    assert c.disc.taps == (-1, 2, 5, 8, 10, 14, 19, 23) and c.disc.backbone == "facebook/dinov2-large"
    assert c.disc.text == ("pooled" if preset == "sdxl" else "clip-l")
    assert (c.data.batch, c.rollout.backward_prob, c.ema.decay) == (8, 0.5, 0)
    assert (c.model.side, c.model.dtype, c.model.decode) == (1024, "bf16", "bf16")


@pytest.mark.parametrize("base", ["tiny", "sd35-large", "sd35-medium", "flux-dev", "sdxl", "flux2-klein"])
def test_a_baseline_differs_in_the_method_alone(base):
    one = to_dict(PRESETS[base]())
    two = to_dict(PRESETS["dmd2" if base == "tiny" else f"{base}-dmd2"]())
    assert {k for k in one if one[k] != two[k]} <= {"preset", "out", "ida", "isg", "disc"}
    assert two["isg"]["weight"] == 0 and two["ida"]["lam"] == 1 and two["disc"]["kind"] == "fake_features"


def test_dmd2_is_the_baseline():
    c = PRESETS["dmd2"]()
    assert (c.ida.lam, c.isg.weight, c.disc.kind) == (1.0, 0.0, "fake_features")
    assert (c.disc.weight, c.disc.d_weight) == (5e-3, 1e-2)


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    config = PRESETS[name]()
    assert config.preset == name
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_every_numeric_field_has_a_range_and_every_field_a_doc():
    for name, (kind, _value, doc) in settings(Config()).items():
        assert doc, name
        if kind not in (int, float):
            continue
        bad = [-1000.0, float("nan"), float("inf")] if kind is float else [-1, True, 1.5]
        for value in bad:
            with pytest.raises(UserError, match=name) as caught:
                replace(Config(), {name: value})
            assert repr(value) in str(caught.value) and "allowed" in str(caught.value)
        section, _, leaf = name.rpartition(".")
        low, high = (getattr(Config(), section) if section else Config()).RANGES[leaf]
        if high < float("inf"):
            with pytest.raises(UserError, match=name):
                replace(Config(), {name: kind(high * 2)})
        assert low > float("-inf")


def test_every_choice_is_closed():
    for name, (kind, _value, _doc) in settings(Config()).items():
        if get_origin(kind) is Literal:
            with pytest.raises(UserError, match=name) as caught:
                replace(Config(), {name: "nothing"})
            assert all(str(choice) in str(caught.value) for choice in get_args(kind))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": {"lr": "x"}}, "train.lr = 'x': allowed is a number"),
        ({"train": {"iterations": 2.5}}, "train.iterations = 2.5: allowed is a whole number"),
        ({"train": {"itertions": 2}}, "unknown field 'train.itertions', did you mean 'train.iterations'?: see --help"),
        ({"train": 5}, "train = 5: allowed is a section: {field: value}"),
        ({"foo": {"bar": 1}}, "unknown field 'foo'"),
        ({"seed": {"a": 1}}, "seed"),
        ({"model": {"steps": True}}, "model.steps = True: allowed is 1 | 2 | 4 | 8"),
        ({"log": {"progress": "no"}}, "log.progress = 'no': allowed is true or false"),
        ({"disc": {"taps": []}}, "disc.taps = (): allowed is one or more different blocks, -1 to 39"),
        ({"disc": {"taps": [2, 2]}}, "disc.taps = (2, 2): allowed is one or more different blocks, -1 to 39"),
        ({"out": ""}, "out = '': allowed is the name of a folder"),
        ({"eval": {"prompts": 1}}, "eval.prompts = 1: allowed is 0, all of them, or 2 or more"),
        ({"model": {"shift": 0}}, "model.shift = 0: allowed is above 0 with model.shift_kind = 'linear'"),
        ([], "config = []"),
    ],
)
def test_json_of_the_wrong_kind(data, message):
    with pytest.raises(UserError) as caught:
        from_dict(data)
    assert str(caught.value).startswith(message)


def test_a_shift_of_zero_is_the_identity_in_exponential_form():
    assert from_dict({"model": {"shift": 0, "shift_kind": "exponential"}}).model.shift == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.lr", "2"], "train.lr = 2.0 is out of range: allowed is 0 to 1"),
        (["--train.lr", "fast"], "--train.lr 'fast': allowed is a number"),
        (["--train.wramup", "7"], "unknown flag --train.wramup, did you mean 'train.warmup'?: see --help"),
        (["--lr", "1"], "unknown flag --lr, did you mean 'train.lr'?: see --help"),
        (["--weight", "1"], "did you mean 'dmd.weight' or 'isg.weight' or 'disc.weight'?"),
        (["--resum"], "unknown flag --resum, did you mean 'resume'?: see --help"),
        (["--resume=yes"], "--resume 'yes': a switch, it takes no value"),
        (["--out", "--resume"], "--out needs a value: text"),
        (["--model.steps", "3"], "--model.steps '3': allowed is 1 | 2 | 4 | 8"),
        (["--train.precision", "nearest"], "--train.precision 'nearest': allowed is fp32 | split | stochastic"),
        (["--train.precision", "split"], "train.precision = 'split': allowed is fp32 with model.dtype = 'fp32'"),
        (["--optim.name", "torch", "--train.moments", "8bit"], "allowed is fp32 with optim.name = 'torch'"),
        (["--optim.name", "torch", "--optim.host", "true"], "optim.host = True: allowed is false with optim.name = "),
        (["--optim.host", "true", "--optim.in_backward", "true"], "allowed is false with optim.host = True"),
        (["--preset", "dmd2"], "--preset is no flag: the preset is the first word, allowed are tiny, dmd2"),
        (["tinny"], "unknown preset 'tinny', did you mean 'tiny'?: allowed are tiny, dmd2"),
        (["tiny", "dmd2"], "unexpected 'dmd2'"),
        (["--a\nb", "1"], "unknown flag '--a\\nb'"),
        (["--out", ""], "out = ''"),
    ],
)
def test_a_bad_command_line_is_one_line(argv, message):
    with pytest.raises(UserError) as caught:
        parse(argv, "x")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_later_flags_win_and_negative_values_are_values():
    config = parse(["sdxl", "--seed", "1", "--seed=2", "--fake.logit_mean", "-0.5", "--data", "d"], "x").config
    assert (config.seed, config.fake.logit_mean, config.data.path, config.preset) == (2, -0.5, "d", "sdxl")
    assert config.isg == PRESETS["sdxl"]().isg and config.train == PRESETS["sdxl"]().train
    args = parse(["--profile", "--dry-run"], "x")
    assert (args.profile, args.dry_run, args.resume, args.config) == (True, True, False, PRESETS["tiny"]())


def test_config_and_cli_need_the_standard_library_alone():
    code = "import sys; before = set(sys.modules); import senseflow.cli; print(*(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in result.stdout.split()} - {"senseflow"}
    assert loaded <= sys.stdlib_module_names | {"_distutils_hack"}, loaded - sys.stdlib_module_names


def test_the_extra_named_is_that_of_pyproject():
    """A package of the extra `train` that is missing is one line; another import that fails is not hidden."""
    lines = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    names = [re.split("[<>=]", line)[0] for line in lines["project"]["optional-dependencies"]["train"]]
    assert [{"Pillow": "PIL"}.get(n, n.replace("-", "_")) for n in names] == list(TRAIN_EXTRA)
    with (
        pytest.raises(UserError, match=r"package 'diffusers' is missing: run pip install -e '\.\[train\]'"),
        extra_named(),
    ):
        raise ModuleNotFoundError("No module named 'diffusers.models'", name="diffusers.models")
    with pytest.raises(ModuleNotFoundError, match="senseflow"), extra_named():
        raise ModuleNotFoundError("No module named 'senseflow.x'", name="senseflow.x")


def test_flags():
    args = parse(
        ["dmd2", "--train.lr", "3e-5", "--disc.taps", "2,5", "--resume", "--log.tensorboard=false", "--teacher", "t"],
        "x",
    )
    assert args.resume and not args.profile
    assert args.config.train.lr == 3e-5 and args.config.disc.taps == (2, 5)
    assert args.config.log.tensorboard is False and args.config.model.teacher == "t"
    with pytest.raises(UserError, match="is above"):
        parse(["--dmd.guidance_min", "9"], "x")
    with pytest.raises(UserError, match="needs a value"):
        parse(["--seed"], "x")
    with pytest.raises(UserError, match=r"unknown field 'train\.foo'"):
        from_dict({"train": {"foo": 1}})
    assert dataclasses.is_dataclass(args.config)


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], "what it does")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"  --{name} " in printed and doc in printed for name, (_, _, doc) in settings(Config()).items()
               if name != "preset")  # fmt: skip
    assert "learning rate of the student [a number, 0 to 1; default '3.6e-05']" in printed


def test_help_after_a_preset_shows_its_values(capsys):
    with pytest.raises(SystemExit):
        parse(["flux-dev", "--help"], "what it does")
    assert "learning rate of the student [a number, 0 to 1; default '1e-05']" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "work", "argv"),
    [("sample", "run", ["--student", "x"]), ("evaluate", "embedded_table", ["--student", "x"]),
     ("evaluate", "scoring.Run", ["--student", "x", "--metrics", "kid"]), ("pretrain", "train", ["--out", "x"]),
     ("export", "export", ["--student", "x", "--out", "y"])],
)  # fmt: skip
def test_ctrl_c_is_one_line_and_130(module, work, argv, monkeypatch, capsys):
    command = importlib.import_module(f"senseflow.{module}")
    where = f"senseflow.{work}" if "." in work else f"senseflow.{module}.{work}"

    def stopped(*_):
        raise KeyboardInterrupt  # as Python does; a background job's SIGINT may be ignored

    monkeypatch.setattr(where, stopped)
    assert command.main(argv) == 130
    err = capsys.readouterr().err
    assert err.startswith(f"senseflow.{module}: stopped") and err.count("\n") == 1
