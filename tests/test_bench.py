"""The benchmark's formulas equal ours, its clock is the device's, its report says what a file holds."""

import json

import pytest
import torch
from bench_rows import ROWS, result, row

from bench import (
    harness,
    peers,
    precision,
    report,
    targets,
    test_adamw,
    test_attention,
    test_hinge,
    test_lerp,
    test_mmdit,
    test_modulate,
    test_qk_norm_rope,
    test_score,
)
from bench.test_hinge import LOSSES
from bench.test_hinge import errors as hinge_errors
from bench.test_lerp import LAM, pieces
from bench.test_qk_norm_rope import FORMS as JOINT_FORMS
from bench.test_qk_norm_rope import Case, Inputs
from bench.test_qk_norm_rope import error as joint_error
from bench.test_qk_norm_rope import tolerance as joint_tolerance
from bench.test_score import errors, ours
from senseflow_kernels import Lerp

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epsilon", [False, True], ids=["flow", "epsilon"])
@pytest.mark.parametrize("form", ["ours", "plain", *peers.SCORE_FORMS])
def test_score_forms(form: str, epsilon: bool, dtype: torch.dtype, device) -> None:
    s = peers.score_inputs((3, 4, 24, 24), dtype, epsilon, device)
    s.x.requires_grad_()
    loss = {"ours": ours, "plain": peers.plain_score, **peers.SCORE_FORMS}[form]
    assert max(errors(loss, s)) <= peers.score_tolerance(form, dtype, form == "ours")


def test_modelopt_form(device) -> None:
    pytest.importorskip("modelopt.torch.fastgen.losses", reason="nvidia-modelopt is not installed")
    s = peers.score_inputs((2, 4, 16, 16), torch.float32, False, device)
    s.x.requires_grad_()
    assert max(errors(peers.modelopt_score(), s)) <= peers.score_tolerance("nvidia-modelopt", torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("side", "form"), list(LOSSES))
def test_hinge_forms(side: str, form: str, dtype: torch.dtype, device) -> None:
    heads = [torch.randn(4, 200, device=device).to(dtype).requires_grad_() for _ in range(6)]
    weight = torch.linspace(0.1, 1, 4, device=device)
    found = hinge_errors(LOSSES[side, form], side, heads[:3], heads[3:], weight)
    assert max(found) <= peers.hinge_tolerance(dtype, form == "ours")


@pytest.mark.parametrize("dtypes", [(d, t) for d in DTYPES for t in DTYPES if d.itemsize >= t.itemsize], ids=str)
@pytest.mark.parametrize("form", list(peers.LERP_FORMS))
def test_lerp_forms(form: str, dtypes: tuple[torch.dtype, torch.dtype], device) -> None:
    phi, theta = (torch.randn(5000, device=device).to(d) for d in dtypes)
    same = phi.clone()
    terms = LAM * phi.double().abs() + (1 - LAM) * theta.double().abs()  # they cancel: their difference is no measure
    Lerp([same], [theta], "fp32" if dtypes[0] == torch.float32 else "nearest").step(LAM)
    peers.LERP_FORMS[form](pieces(phi, 16), pieces(theta, 16), LAM)
    # mul_ then add_ rounds twice, ours once; half an eps each
    assert ((phi.double() - same.double()).abs() <= 2 * torch.finfo(dtypes[0]).eps * terms).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rope"), [((8, 24), True), ((32,), True), ((24, 8), False)], ids=str)
@pytest.mark.parametrize("form", list(JOINT_FORMS))
def test_joint_qkv_forms(form: str, tokens: tuple[int, ...], rope: bool, dtype: torch.dtype, device) -> None:
    x = Inputs(Case("", tokens, 3, 32, rope, dtype), device)
    assert joint_error(JOINT_FORMS[form], x) <= joint_tolerance(form, dtype)


def test_pieces_are_all_of_it() -> None:
    flat = torch.arange(10_000)
    assert torch.equal(torch.cat(pieces(flat, 16)), flat) and len(pieces(flat, 16)) > 16


def test_a_round_moves_the_clock_by_one_call() -> None:
    calls = []
    a_round, calls_a_round = harness.a_round(lambda: calls.append(None), "call")
    before, done = harness.clock(), len(calls)
    a_round()
    assert len(calls) - done == calls_a_round
    assert 0 < harness.clock() - before < 1


def test_report(tmp_path, capsys) -> None:
    path = tmp_path / "2026-01-02-0123456789.json"
    path.write_text(json.dumps(result("cuda", ROWS)))
    assert report.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "Some device" in out and "0123456789" in out
    # 3.1 MB in 5 us, of a copy at 2 TB/s; the baselines take 20, 12 and 1.2 times as long
    assert "| 5.00 us | 0.10 us | 629.1 | 31% | 3 (2 fused) | 1.0e-07 | 20.00x | 12.00x | 1.20x |" in out
    assert "| score gradient b=1: at most 8 us | 5.00 us | pass |" in out
    assert "| score gradient b=1: 8x the fastest eager form | 12.00x rcm (flow 16x128x128 bf16 b=1) | pass |" in out
    assert "| score gradient b=1: 1.5x torch.compile | 1.20x compile (flow 16x128x128 bf16 b=1) | fail |" in out
    assert "| lerp fp32: 92 % of the copy bandwidth |  | not measured |" in out
    path.write_text(json.dumps(result("cpu", ROWS)))
    assert report.main([str(path), "--all"]) == 0
    out = capsys.readouterr().out
    assert "CPU" in out and "target" not in out and "| DMD2 | 100.00 us |" in out


def test_every_target_of_a_gpu_finds_its_rows() -> None:
    """By the names that the cases of a GPU give them: one misspelt would be "not measured" for ever."""
    names = [(f"score gradient {part}", test_score.name_of(c)) for part in ("fwd", "fwd+bwd") for c in test_score.FLOW]
    names += [(f"hinge {side} fwd+bwd", test_hinge.name_of(case)) for side in "DG" for case in test_hinge.GPU]
    names += [(f"lerp {kind[0]}", f"{size}: ...") for size in ("large", "small") for kind in test_lerp.KINDS]
    names += [(f"adamw {moments}", "8e+09 parameters ...") for moments in test_adamw.MOMENTS]
    names += [(f"joint qkv {what}", case.name) for what in ("fwd", "bwd") for case in test_qk_norm_rope.LARGE]
    adaln = test_modulate.FLUX + test_modulate.LARGE + test_modulate.MEDIUM
    names += [(f"adaLN {case.op} {part}", case.name) for part in ("fwd", "bwd", "fwd+bwd") for case in adaln]
    names += [(f"attention {part}", case.name) for part in test_attention.PARTS for case in test_attention.CASES]
    names += [(f"mmdit {part}", case.name) for part in test_attention.PARTS for case in test_mmdit.CASES]
    forms = [("ours", "ours"), ("DMD2", "eager"), ("_foreach_lerp_", "torch")]
    forms += [(form, test_mmdit.KINDS.get(form, "ours")) for form in test_mmdit.FORMS]
    forms += [(form, "torch") for form in test_attention.FORMS if form != "ours"]
    rows = [row(form, kind, 5, op=op, case=case, mode=mode) for op, case in names for form, kind in forms
            for mode in ("call", "graph", "flushed")]  # fmt: skip
    assert [t.text for t, _, verdict in targets.judge([ROWS[0], *rows]) if verdict == "not measured"] == []


def test_lerp_targets() -> None:
    case = "large: 8e+09 parameters in 10, phi bf16, theta bf16"

    def lerp(form: str, kind: str, us: float) -> dict:
        return row(form, kind, us, op="lerp nearest", case=case, mode="call", bytes=1_000_000_000)

    found = {t.text: v for t, _, v in targets.judge([ROWS[0], lerp("ours", "ours", 530),
                                                     lerp("_foreach_lerp_", "torch", 520)])}  # fmt: skip
    assert found["lerp nearest: 92 % of the copy bandwidth"] == "pass"  # 1 / 0.53 of 2 TB/s: 94 %
    assert found["lerp nearest, large: no slower than _foreach_lerp_"] == "fail"
    assert found["lerp split: within 10 % of its byte floor"] == "not measured"


def test_attention_and_block_targets() -> None:
    """Against the fastest of torch's and the packages' backends; the compiled form against the compiled rivals."""

    def attention(form: str, kind: str, us: float) -> dict:
        return row(form, kind, us, op="attention fwd+bwd", case="FLUX", mode="call")

    def block(form: str, kind: str, us: float, case: str = "FLUX single block") -> dict:
        return row(form, kind, us, op="mmdit fwd+bwd", case=case, mode="call")

    rows = [attention("ours", "ours", 102), attention("cudnn", "torch", 102), attention("fa3", "package", 100)]
    rows += [attention("math", "torch", 900), block("ours", "ours", 100), block("diffusers", "eager", 126)]
    rows += [block("ours, compile", "ours", 90), block("compile", "compile", 95), block("compile, cuDNN", "rival", 91)]
    verdicts = {t.text: (measured, verdict) for t, measured, verdict in targets.judge(rows)}
    assert verdicts["attention fwd+bwd: within 3 % of the fastest backend"] == ("0.98x fa3 (FLUX)", "pass")
    assert verdicts["attention fwd+bwd: no slower than cuDNN, but for 1 % of noise"] == ("1.00x cudnn (FLUX)", "pass")
    assert verdicts["attention fwd: within 3 % of the fastest backend"][1] == "not measured"
    assert verdicts["MMDiT block fwd+bwd: 1.25x eager diffusers"][1] == "pass"
    compiled = verdicts["MMDiT block fwd+bwd, compiled: 1.08x compiled diffusers"]
    assert compiled == ("1.06x compile (FLUX single block)", "fail")
    rival = "MMDiT block fwd+bwd, compiled: no slower than compiled diffusers with cuDNN first"
    assert verdicts[rival] == ("1.01x compile, cuDNN (FLUX single block)", "pass")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"), (json.dumps(result("cuda", ROWS))[:200], "not JSON"), ("[]", "not a result"),
        ('{"format": 1}', "missing"), (json.dumps(result("cuda", [{}])), "row 0 has no op"),
        (json.dumps(result("cuda", [row("ours", "ours", 0)])), "row 0 has median_s = 0"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line(text: str, says: str, tmp_path, capsys) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    assert report.main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and str(path) in err and says in err


def test_newest_takes_whole_runs_first(tmp_path, monkeypatch) -> None:
    path = harness.save(ROWS, [], folder=tmp_path)
    again = harness.save(ROWS, [], stopped=True, folder=tmp_path)
    assert path.parent == again.parent == tmp_path / harness.device_slug() and path != again
    assert report.load(path)["environment"]["torch"] == torch.__version__
    assert report.newest(tmp_path) == [path]
    assert report.newest(tmp_path / "nothing") == []


def test_precision_demonstration():
    """What docs/precision.md says, over 40 steps: to nearest the move is lost, `split` and `fp32` make all of it and
    `stochastic` all but chance: per element a standard error below an ulp, so 1 / sqrt(n) of that in its share."""
    rows = {row["form"]: row for row in precision.measure(40)}
    for name in ("theta", "phi"):
        assert rows["released two-op"][f"{name} share"] < 0.1 and rows["nearest"][f"{name} share"] < 0.1
        for exact in ("split", "fp32"):
            assert abs(rows[exact][f"{name} share"] - 1) < 1e-3
            assert rows[exact][f"{name} cosine"] > 0.999
    assert rows["split"] == rows["fp32"] | dict(form="split")
    ulp, move = 2**-12, 40e-6  # of weights up to 0.1; of theta, whose elements move least
    assert abs(rows["stochastic"]["theta share"] - 1) < 5 * 2**-9 * ulp / move


def test_the_table_in_the_data_docs_is_that_of_its_raw_file():
    from bench.data import table

    raw = json.loads((harness.ROOT / "bench/results/data-cpu-intel-r-xeon-r-processor-2-80ghz.json").read_text())
    assert table(raw) in (harness.ROOT / "docs/data.md").read_text()


def test_the_mixtures_score_and_optimizer_are_what_they_say():
    """bench.mixture: the velocity is that of the density's own gradient; its Adam is torch's on clipped gradients."""
    from bench import mixture

    torch.manual_seed(0)
    x, sigma = torch.randn(20, 2).double().requires_grad_(), torch.linspace(0.05, 1, 20).double()[:, None]
    modes, var = (1 - sigma[:, None]) * mixture.MODES, ((1 - sigma) * mixture.STD) ** 2 + sigma**2
    density = torch.logsumexp(-(x[:, None] - modes).square().sum(-1) / (2 * var), 1)
    (score,) = torch.autograd.grad(density.sum(), x)
    x0 = (x + sigma**2 * score) / (1 - sigma).clamp_min(1e-9)  # Tweedie
    found = mixture.exact_velocity(x.detach(), sigma)
    torch.testing.assert_close((x - sigma * found)[:-1], x0[:-1], rtol=1e-9, atol=1e-9)
    nets = [[torch.randn(2, i, o) for i, o in ((3, 4), (1, 4), (4, 4), (1, 4), (4, 2), (1, 2))] for _ in range(2)]
    mine, theirs = ([p.clone().requires_grad_() for p in nets[0]] for _ in range(2))
    points, t = torch.randn(2, 5, 2), torch.rand(5, 1)
    adam = mixture.Adam(mine, torch.tensor([1e-2, 1e-3]))
    ours = [torch.optim.Adam([p], 1e-2) for p in theirs]  # the first network's rate
    for _ in range(3):
        adam.step(mixture.predict(mine, points, t).square().sum())
        loss = mixture.predict(theirs, points, t).square().sum()
        grads = torch.autograd.grad(loss, theirs)
        norm = torch.stack([g[0].square().sum() for g in grads]).sum().sqrt()
        assert norm > 1
        for optimizer, p, g in zip(ours, theirs, grads, strict=True):
            p.grad = g / norm
            optimizer.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p[0], q[0], rtol=1e-5, atol=1e-6)


def test_the_mixtures_table(tmp_path):
    """Means over seeds of the last share and of the lowest after the first quarter."""
    from bench import mixture

    paths = {0: [0.9, 0.1, 0.4, 0.8], 1: [0.9, 0.3, 0.2, 0.6]}
    rows = [dict(seed=s, steps=4, fake_updates=2, ratio=1.0, lam=lam, inside=p, gap=1.0)
            for s, p in paths.items() for lam in mixture.LAMBDAS]  # fmt: skip
    assert mixture.lines(dict(rows=rows))[1] == [["4", "2", "1", "70 (15)", "70 (15)", "70 (15)"]]
