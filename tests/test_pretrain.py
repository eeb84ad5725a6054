"""Training the embedded teacher: its loss, its draws, its rates, and a stop in the middle."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_pipelines import few_pictures

from senseflow import pretrain
from senseflow.models.adapter import Condition
from senseflow.models.embedded import load_transformer

pytest.importorskip("diffusers")
SMALL = dict(
    num_layers=1, num_attention_heads=1, joint_attention_dim=8, caption_projection_dim=32, pooled_projection_dim=8
)


def test_the_loss_is_flow_matching():
    """E (v(x_t, 1000 sigma, c) - (eps - x0))^2 at x_t = (1 - sigma) x0 + sigma eps."""
    x0, noise = torch.randn(2, 3, 3, 4, 4, dtype=torch.float64).unbind(0)
    sigma, seen = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64), SimpleNamespace()

    def net(hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict):
        seen.x, seen.t, seen.text = hidden_states, timestep, (encoder_hidden_states, pooled_projections)
        return (noise - x0 + torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1),)

    loss = pretrain.flow_matching_loss(net, x0, noise, sigma, "embeds", "pooled")
    assert loss.item() == pytest.approx((0 + 1 + 4) / 3)
    torch.testing.assert_close(seen.x[1], (x0[1] + noise[1]) / 2)
    torch.testing.assert_close(seen.x[2], noise[2])
    assert seen.t.tolist() == [100, 500, 1000] and seen.text == ("embeds", "pooled")


def test_draws_are_a_function_of_the_iteration_with_the_laws_they_claim():
    a, b = (pretrain.draw_batch(3, 7, 64, 50, (3, 2, 2)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[2], pretrain.draw_batch(3, 8, 64, 50, (3, 2, 2))[2])
    index = torch.cat([pretrain.draw_batch(3, i, 10, 50, (1,))[0] for i in range(10)])
    assert all(sorted(part.tolist()) == list(range(50)) for part in index.split(50))  # each epoch a permutation
    # logit-normal, stratified: one value in each 64th of the law (fp32, and the ends are clamped by 1e-4)
    u = torch.special.ndtr(torch.logit(a[1].double()))
    assert sorted((u * 64 - 1e-3).ceil().clamp(1, 64).int().tolist()) == list(range(1, 65))


def test_rates_warm_up_stay_and_fall_to_nothing():
    rate = [pretrain.learning_rate(i, 100, 2.0, 10, 0.25) for i in range(101)]
    assert rate[0] == pytest.approx(0.2) and rate[9] == rate[75] == 2.0 and set(rate[9:76]) == {2.0}
    assert rate[84] == pytest.approx(2 * (1 - 0.6)) and rate[100] == 0  # 1 - sqrt(9 / 25)


@pytest.fixture
def run(monkeypatch):
    """run(out, iterations, *flags): a network of one narrow block on four pictures, text of eight numbers."""
    pictures, seen = few_pictures(), []
    monkeypatch.setattr(pretrain, "ARCHITECTURE", pretrain.ARCHITECTURE | SMALL)
    monkeypatch.setattr(pretrain, "load_variants", lambda: pictures)
    count = len(pictures) + 1
    text = Condition(
        torch.arange(count * 2 * 8.0).view(count, 2, 8) / 50, torch.arange(count * 8.0).view(count, 8) / 50
    )

    def embedded(prompts):
        assert prompts == [*pictures.captions, ""]
        return text

    whole = pretrain.flow_matching_loss

    def watched(net, x0, noise, sigma, embeds, pooled):
        seen.append((pooled == text.pooled[-1]).all(1))
        return whole(net, x0, noise, sigma, embeds, pooled)

    monkeypatch.setattr(pretrain, "embed_prompts", embedded)
    monkeypatch.setattr(pretrain, "flow_matching_loss", watched)

    def start(out, iterations, *flags):
        words = ["--out", str(out), "--iterations", str(iterations), "--batch", "4", "--warmup", "2", "--cooldown", "0"]
        return pretrain.main([*words, "--checkpoint-every", "3", *flags])

    start.without_caption = seen
    return start


def test_a_stopped_training_goes_on_to_the_same_bits(run, tmp_path):
    assert run(tmp_path / "whole", 6) == 0
    assert run(tmp_path / "parts", 3) == 0 and run(tmp_path / "parts", 6) == 0
    nets = [load_transformer(tmp_path / name / "teacher") for name in ("whole", "parts")]
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    assert json.loads((tmp_path / "parts" / "teacher" / "training.json").read_text())["iterations"] == 6
    torch.manual_seed(0)
    from diffusers import SD3Transformer2DModel

    start = SD3Transformer2DModel(**pretrain.ARCHITECTURE)
    assert any(
        not torch.equal(a.half().float(), b) for a, b in zip(start.parameters(), nets[0].parameters(), strict=True)
    )


def test_captions_are_dropped_at_the_rate_asked_for(run, tmp_path):
    assert run(tmp_path / "none", 2, "--dropout", "0") == 0 and not torch.cat(run.without_caption).any()
    run.without_caption.clear()
    assert run(tmp_path / "all", 2, "--dropout", "1.01") == 0 and torch.cat(run.without_caption).all()


def test_bad_input_is_one_line(run, tmp_path, capsys):
    assert run(tmp_path / "run", 1, "--init", str(tmp_path / "nowhere")) == 2
    assert capsys.readouterr().err == (
        f"senseflow.pretrain: teacher folder {tmp_path / 'nowhere'} does not exist: give a diffusers folder\n"
    )
