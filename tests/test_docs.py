"""What README and docs say is what the committed files and the code say; the drop-in page's code runs."""

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F

from bench import docs, peers, site_links, tables
from senseflow.ablation.rows import GROUPS


def test_numbers_links_and_names_of_the_docs():
    assert docs.problems() == []
    assert list(tables.GROUPS) == list(GROUPS)


def test_a_changed_number_a_dead_link_and_a_gone_name_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setitem(docs.NUMBERS, "two", lambda: tables.table(["a", "b"], [["x", "2"]]))
    (tmp_path / "code.py").write_text("def here(): ...\n")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    good = "# A `b` c\n<!-- numbers two -->\n| a | b |\n|:--|---|\n| x | 2 |\n<!-- /numbers -->\n[t](#a-b-c) [u](https://x)\n"
    page.write_text(good + "`docs/../code.py: here`\n```\n[no](link)\n```\n")
    assert docs.check_numbers(page, False) + docs.check_links(page) + docs.check_names(page) == []
    page.write_text(good.replace("| x | 2", "| x | 3") + "[v](none.md) [w](page.md#other) `docs/../code.py: gone`\n")
    (wrong,) = docs.check_numbers(page, False)
    assert "two differs" in wrong and "-| x | 3 |" in wrong and "+| x | 2 |" in wrong
    assert [line.split(": ")[1] for line in docs.check_links(page)] == [
        "none.md is not there", "page.md#other has no such heading"]  # fmt: skip
    assert docs.check_names(page) == ["docs/page.md: docs/../code.py has no gone"]
    assert docs.check_numbers(page, True) == [] and "| x | 2 |" in page.read_text()


def test_a_report_of_other_records_is_found(tmp_path, monkeypatch):
    from senseflow.ablation import report

    folder = tmp_path / "docs" / "ablation"
    (folder / "runs").mkdir(parents=True)
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    assert docs.check_report() == []
    for row, kid in (("dmd2", 3.0), ("dmd2-ida", 2.0)):
        record = dict(row=row, seed=0, status="done", final={"eval/kid": kid}, best={}, curves={"eval/kid": [[0, kid]]})
        (folder / "runs" / f"{row}.json").write_text(json.dumps(record))
    assert [line.split()[1] for line in docs.check_report()] == ["core", "parts"]
    report.write_report(folder, [])
    assert docs.check_report() == []
    (folder / "runs" / "dmd2.json").write_text((folder / "runs" / "dmd2.json").read_text().replace("3.0", "4.0"))
    assert [line.split()[1] for line in docs.check_report()] == ["core", "parts"]


@pytest.mark.parametrize(("value", "digits", "text"), [(0.868, 3, ".868"), (-0.25, 2, "-.25"), (-10.2, 0, "-10")])
def test_short_numbers(value, digits, text):
    assert tables.short(value, digits) == text


def test_links_out_of_the_site_become_names():
    text = "[b](b.md#x) ![p](../p.png) [code](../senseflow/a.py) [`a.py`](../../senseflow/a.py) "
    text += "[w](https://x/y) `[z](../z)`\n"
    text += "```\n[z](../z)\n```\n"
    assert site_links.inside(text, "evidence/README.md") == (
        "[b](b.md#x) ![p](../p.png) [code](../senseflow/a.py) `senseflow/a.py` [w](https://x/y) `[z](../z)`\n"
        "```\n[z](../z)\n```\n"
    )
    assert site_links.inside("[code](../senseflow/a.py)", "data.md") == "code (`senseflow/a.py`)"


def dropin_blocks() -> list[str]:
    """The page's Python that stands there by itself; the rest is the example's, which test_example.py runs."""
    text = docs.BLOCK.sub("", (docs.ROOT / "docs" / "dropin.md").read_text())
    return re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)


@pytest.fixture
def project(monkeypatch):
    """What a DMD project has at hand, under the names of the page."""
    from examples.dmd2_dropin import Velocity

    monkeypatch.setenv("SENSEFLOW_KERNELS", "torch")
    torch.manual_seed(0)
    flow, ddpm = (peers.score_inputs((2, 4, 8, 8), torch.float32, e, torch.device("cpu")) for e in (False, True))
    student = Velocity()
    heads = [[torch.randn(2, n) for n in (3, 5)] for _ in range(2)]
    tiny = dict(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
                num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8,
                pos_embed_max_size=8)  # fmt: skip
    inputs = dict(hidden_states=torch.randn(2, 4, 8, 8), encoder_hidden_states=torch.randn(2, 5, 16),
                  pooled_projections=torch.randn(2, 8), timestep=torch.tensor([500.0, 20.0]))  # fmt: skip
    return flow, ddpm, dict(
        x=flow.x, x_t=flow.x_t, fake=flow.fake, cond=flow.cond, uncond=flow.uncond, sigma=flow.sigma,
        w=torch.full((2,), flow.guidance), x_t_ddpm=ddpm.x_t, alpha=ddpm.alpha, real_heads=heads[0],
        fake_heads=heads[1], weight=torch.rand(2), student=student, ema=copy.deepcopy(student),
        fake_net=Velocity(), condition=torch.randn(2, 4), tiny=tiny, inputs=inputs,
    )  # fmt: skip


def test_the_code_of_the_dropin_page_is_what_projects_compute(project):
    """Each block runs, and its results are those of the project's form in plain torch."""
    flow, ddpm, names = project
    blocks = dropin_blocks()
    assert len(blocks) == 6
    before = {k: [p.detach().clone() for p in names[k].parameters()] for k in ("student", "ema", "fake_net")}
    for block in blocks[:3]:
        exec(block, names)
    close = lambda a, b: torch.testing.assert_close(a.float(), b.float(), rtol=1e-5, atol=1e-6)  # noqa: E731
    close(names["loss_flow"], peers.senseflow(flow))
    close(names["loss_eps"], peers.fastgen(flow))
    close(names["loss_embedded"], peers.senseflow(flow._replace(guidance=1.0)))
    close(names["loss_epsilon"], peers.dmd2(flow._replace(x_t=ddpm.x_t, alpha=ddpm.alpha)))
    real, fake = (torch.cat(names[k], 1) for k in ("real_heads", "fake_heads"))
    expected = ((F.relu(1 - real).mean(1) + F.relu(1 + fake).mean(1)) * names["weight"]).mean()
    close(names["d"].loss, expected)
    close(names["g"], -(fake.mean(1) * names["weight"]).mean())
    for slow, lam in (("ema", 0.999), ("fake_net", 0.97)):
        for p, was, theta in zip(names[slow].parameters(), before[slow], before["student"], strict=True):
            close(p, lam * was + (1 - lam) * theta)


def test_the_rest_of_the_dropin_page_runs(project):
    """The one-pass optimizer is torch's AdamW with two moving averages after it; a fused model is diffusers' own."""
    from diffusers import SD3Transformer2DModel

    _, _, names = project
    twin, phi = copy.deepcopy(names["student"]), copy.deepcopy(names["fake_net"])
    ema = [p.detach().clone() for p in twin.parameters()]
    blocks = dropin_blocks()
    exec(blocks[3], names)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0)
    twin(names["x"], names["sigma"], names["condition"]).square().mean().backward()
    optimizer.step()
    for p, q, a, b, e, f in zip(twin.parameters(), names["student"].parameters(), phi.parameters(), names["fake_list"],
                                ema, names["ema_list"], strict=True):  # fmt: skip
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(b, 0.97 * a + 0.03 * p, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(f, 0.999 * e + 0.001 * p, rtol=1e-6, atol=1e-7)
    exec(blocks[4], names)
    assert isinstance(names["transformer"], SD3Transformer2DModel)
    torch.testing.assert_close(names["fused"], names["transformer"](**names["inputs"]).sample, rtol=1e-5, atol=1e-5)
    exec(blocks[5], names)
