"""bench.real on tiny configs: the trainer's own steps on random weights of a public class, and its file."""

import json
from pathlib import Path

import pytest
import torch

from bench import harness, real
from senseflow.profiling import Profiler

pytest.importorskip("diffusers")
TRANSFORMER = dict(num_layers=2, num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32)
TINY = {
    "sd35-medium": TRANSFORMER | dict(attention_head_dim=8, caption_projection_dim=16, dual_attention_layers=[0]),
    "flux-dev": TRANSFORMER | dict(num_single_layers=1, attention_head_dim=16, axes_dims_rope=[4, 6, 6]),
    "sdxl": dict(
        block_out_channels=[16, 32], layers_per_block=1, down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], attention_head_dim=[2, 4], cross_attention_dim=32,
        transformer_layers_per_block=[1, 1], addition_time_embed_dim=8, norm_num_groups=4,
        projection_class_embeddings_input_dim=64,
    ),
}  # fmt: skip
SMALL = ["--vae", '{"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1}']
SMALL += ["--backbone", "64", "3", "--iterations", "2"] + [f"--{setting}" for setting in (
    "disc.taps=-1,2", "disc.size=56", "disc.width=8", "disc.downsample=1", "model.side=64", "train.gen_every=2",
    "rollout.backward_prob=0", "disc.omega=one",
)]  # fmt: skip


@pytest.fixture(autouse=True)
def _results(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "environment", lambda: dict(time="2026-01-02T", commit="abc", dirty=False))


def run(preset, *more):
    length = [] if preset == "sdxl" else ["--model.text_length=16"]
    return real.main([preset, "--network", json.dumps(TINY[preset]), *SMALL, *length, *more])


@pytest.mark.parametrize("preset", TINY)
def test_a_training_at_any_size(preset, tmp_path, capsys):
    """Both kinds of iteration, all terms, nothing read from disk, no update skipped, each phase with its time."""
    assert run(preset) == 0
    (file,) = tmp_path.glob("*/real/*.json")
    assert file.name == f"2026-01-02-abc-{preset}.json"
    found = json.loads(file.read_text())
    phases = {p["phase"]: p for p in found["phases"]}
    for name in ("data", "student", "teacher", "fake", "decode", "VFM backbone", "D heads", "backward"):
        assert phases[name]["median_ms"] > 0 and phases[name]["peak_gb"] > 0, name
    assert phases["backward"]["calls"] == 2 + 2 + 1  # fake and D in both iterations, the student in one
    assert sum(p["sum_ms"] for p in found["phases"]) <= sum(found["iterations_ms"])
    assert found["fits"] and found["rung"] == [] and found["skipped"] == 0
    assert found["critic_ms"] > 0 and found["generator_ms"] > 0 and found["memory"]["peak_gb"] > 0
    assert {"dmd", "isg", "adv", "fake", "disc"} <= set(found["last"])
    assert all(v == v and abs(v) < 1e9 for v in found["last"].values())
    assert found["millions"]["student"] == pytest.approx(found["millions"]["fake"]) and found["millions"]["vfm"] > 0
    out = capsys.readouterr().out.strip().splitlines()
    assert out[-1].startswith(f"{preset}: critic iteration ") and out[-1].endswith("updates skipped 0")


def test_what_does_not_fit_goes_down_the_rungs(tmp_path, monkeypatch, capsys):
    seen = []

    def full(cfg, *_):
        t = cfg.train
        seen.append((cfg.model.checkpointing, t.precision, t.moments, cfg.optim.in_backward, cfg.data.batch))
        if len(seen) < 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. Of the allocated memory")
        return dict(iterations_ms=[1.0], phases=[], critic_ms=1.0, generator_ms=None, memory={}, skipped=0.0)

    monkeypatch.setattr(real, "run", full)
    assert real.main(["sd35-large"]) == 0
    assert seen == [
        ("none", "split", "fp32", False, 1), ("full", "split", "fp32", False, 1), ("full", "split", "8bit", True, 1),
        ("full", "stochastic", "8bit", True, 1),
    ]  # fmt: skip
    found = json.loads(next(tmp_path.glob("*/real/*.json")).read_text())
    assert found["rung"] == list(real.RUNGS[3])
    assert [t["rung"] for t in found["tried"]] == [[], list(real.RECOMPUTED), list(real.LEAN)]
    assert found["tried"][0]["error"] == "CUDA out of memory. Tried to allocate 9 GiB"
    seen.clear()
    monkeypatch.setattr(real, "RUNGS", real.RUNGS[:1])
    capsys.readouterr()
    assert real.main(["sd35-large"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("sd35-large does not fit on ")
    assert not json.loads(next(tmp_path.glob("*/real/*.json")).read_text())["fits"]


def test_only_timed_iterations_are_counted(monkeypatch):
    """Medians by kind: the last of each f is the generator's."""
    profiler = Profiler(True, Path(), 8, 4)
    for _ in range(4):
        with profiler.iteration():
            pass
    monkeypatch.setattr("senseflow.profiling._Span.seconds", lambda self: profiler.steps.index(self) + 1.0)
    found = real.timed(profiler, 2)
    assert found["iterations_ms"] == [1000, 2000, 3000, 4000]
    assert (found["critic_ms"], found["generator_ms"]) == (2000, 3000)


@pytest.mark.parametrize("argv, message", [
    (["tiny"], "preset 'tiny' has no public checkpoint: allowed are sd35-medium"),
    (["sdxl", "--network", "[1]"], "'[1]' is no JSON object"),
    (["sdxl", "--iterations", "0"], "--iterations 0: allowed is 1 or more"),
    (["sdxl", "--train.lr", "x"], "--train.lr 'x': allowed is a number"),
])  # fmt: skip
def test_bad_input_is_one_line(argv, message, capsys):
    assert real.main(argv) == 2
    assert message in capsys.readouterr().err
