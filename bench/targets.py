"""What the ops are to reach, on a GPU and on a CPU, and whether a run did; ours and baseline are timed alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]


class Target(NamedTuple):
    """Rows of `ours` by op, start of case, mode and form; then at most us, or at least ratio over baseline rows."""

    text: str
    op: str
    case: str
    mode: str
    form: str = "ours"
    at_most_us: float | None = None
    copy_share: float | None = None  # at least, of the copy bandwidth of the same run
    baseline: str | tuple[str, ...] | None = None  # kinds or forms of the rows to beat; the fastest of them counts
    ratio: float = 1.0


SCORE, B1 = "score gradient fwd+bwd", "flow 16x128x128 bf16 b=1"
HEADS = "8 heads x 1370 b=8"
PARTS = ("fwd", "fwd+bwd")

TARGETS: tuple[Target, ...] = (
    Target("score gradient b=1: at most 8 us", SCORE, B1, "graph", at_most_us=8),
    Target("score gradient b=1: 8x the fastest eager form", SCORE, B1, "graph", baseline="eager", ratio=8),
    Target("score gradient b=1: 1.5x torch.compile", SCORE, B1, "graph", baseline="compile", ratio=1.5),
    Target("hinge D, 8 heads, b=8: 10x eager", "hinge D fwd+bwd", HEADS, "graph", baseline="eager", ratio=10),
    Target("hinge D, 8 heads, b=8: 2x torch.compile", "hinge D fwd+bwd", HEADS, "graph", baseline="compile", ratio=2),
    Target("hinge G, 8 heads, b=8: 10x eager", "hinge G fwd+bwd", HEADS, "graph", baseline="eager", ratio=10),
    Target("hinge G, 8 heads, b=8: 2x torch.compile", "hinge G fwd+bwd", HEADS, "graph", baseline="compile", ratio=2),
    Target("lerp fp32: 92 % of the copy bandwidth", "lerp fp32", "large", "call", copy_share=0.92),
    Target("lerp nearest: 92 % of the copy bandwidth", "lerp nearest", "large", "call", copy_share=0.92),
    Target("lerp split: within 10 % of its byte floor", "lerp split", "large", "call", copy_share=1 / 1.1),
    Target("lerp stochastic: within 10 % of its byte floor", "lerp stochastic", "large", "call", copy_share=1 / 1.1),
    Target("lerp nearest, large: no slower than _foreach_lerp_", "lerp nearest", "large", "call",
           baseline="_foreach_lerp_"),
    Target("lerp nearest, small: no slower than _foreach_lerp_", "lerp nearest", "small", "call",
           baseline="_foreach_lerp_"),
    *(Target(f"AdamW + IDA in one pass, {moments} moments: 90 % of the copy bandwidth", f"adamw {moments}", "", "call",
             copy_share=0.9) for moments in ("bf16", "8bit")),
    Target("AdamW + IDA in one pass: 1.10x the best separate sequence", "adamw bf16", "", "call", baseline="torch",
           ratio=1.1),
    Target("joint qkv forward: within 15 % of its byte floor", "joint qkv fwd", "", "flushed", copy_share=1 / 1.15),
    Target("joint qkv backward: within 25 % of its byte floor", "joint qkv bwd", "", "flushed", copy_share=1 / 1.25),
    *(Target(f"adaLN {op} {part}, {model}: {share:.0%} of the copy bandwidth".replace("%", " %"), f"adaLN {op} {part}",
             f"{model} 4x", "graph", copy_share=share)
      for model, ops in (("FLUX", ("modulate", "gate", "gate modulate")), ("SD3.5L", ("modulate", "gate modulate")),
                         ("SD3.5M", ("modulate2", "2 gates modulate")))
      for op in ops for part, share in (("fwd", 0.85), ("bwd", 0.80))),
    *(Target(f"attention {part}: within 3 % of the fastest backend", f"attention {part}", "", "call",
             baseline=("torch", "package"), ratio=0.97) for part in PARTS),
    *(Target(f"attention {part}: no slower than cuDNN, but for 1 % of noise", f"attention {part}", "", "call",
             baseline="cudnn", ratio=0.99) for part in PARTS),
    Target("MMDiT block fwd+bwd: 1.25x eager diffusers", "mmdit fwd+bwd", "", "call", baseline="eager", ratio=1.25),
    Target("MMDiT block fwd+bwd, compiled: 1.08x compiled diffusers", "mmdit fwd+bwd", "", "call", "ours, compile",
           baseline="compile", ratio=1.08),
    *(Target(f"MMDiT block {part}, compiled: no slower than compiled diffusers with cuDNN first", f"mmdit {part}", "",
             "call", "ours, compile", baseline="rival") for part in PARTS),
)  # fmt: skip

# csrc on a CPU, all cores. The one pass saves 1.18x of the bytes: 44 a parameter against 52.
CPU_TARGETS: tuple[Target, ...] = (
    Target("csrc lerp bf16: 1.3x _foreach_lerp_", "csrc lerp bf16", "", "call", baseline="_foreach_lerp_", ratio=1.3),
    Target("csrc lerp fp32: no slower than _foreach_lerp_", "csrc lerp fp32", "", "call", baseline="_foreach_lerp_"),
    Target("csrc AdamW + IDA + EMA: 1.1x the fused AdamW and two _foreach_lerp_", "csrc adamw", "", "call",
           baseline="torch", ratio=1.1),
)  # fmt: skip


def judge(rows: Sequence[Row], targets: Sequence[Target] = TARGETS) -> list[tuple[Target, str, str]]:
    """(target, what was measured, pass | fail | not measured), one per target and case that begins as it says."""
    copies = [r for r in rows if r["op"] == "copy"]
    copy = copies[0]["bytes"] / copies[0]["median_s"] if copies else None
    return [(target, *_verdict(target, rows, copy)) for target in targets]


def _verdict(target: Target, rows: Sequence[Row], copy: float | None) -> tuple[str, str]:
    here = [r for r in rows if (r["op"], r["mode"]) == (target.op, target.mode) and r["case"].startswith(target.case)]
    verdicts = []
    for ours in (r for r in here if r["form"] == target.form):
        us = ours["median_s"] * 1e6
        if target.at_most_us is not None:
            verdicts.append((f"{us:.2f} us", us <= target.at_most_us))
        elif target.copy_share is not None and (rate := ours.get("copy_rate", copy)):
            share = ours["bytes"] / ours["median_s"] / rate
            verdicts.append((f"{share:.1%} ({ours['case']})", share >= target.copy_share))
        elif target.baseline is not None:
            wanted = {target.baseline} if isinstance(target.baseline, str) else set(target.baseline)
            others = [r for r in here if r["case"] == ours["case"] and wanted & {r["kind"], r["form"]}]
            if others:
                best = min(others, key=lambda r: r["median_s"])
                ratio = best["median_s"] / ours["median_s"]
                verdicts.append((f"{ratio:.2f}x {best['form']} ({ours['case']})", ratio >= target.ratio))
    if not verdicts:
        return "", "not measured"
    return "; ".join(text for text, _ in verdicts), "pass" if all(ok for _, ok in verdicts) else "fail"
