"""Presets against paper.md's table, and the checks of every field."""

import dataclasses
import json

import pytest

from senseflow.cli import parse
from senseflow.config import Config, UserError, from_dict, replace, settings, to_dict
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
        if kind in (int, float) and name not in ("fake.logit_mean",):
            with pytest.raises(UserError, match=name.rpartition(".")[2]):
                replace(Config(), {name: kind(-1)})


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
    assert all(f"--{name} " in printed for name in settings(Config()))
