"""The rows of the ablation by group: each a preset and the flags that make it."""

from __future__ import annotations

from dataclasses import dataclass

from senseflow.cli import parse
from senseflow.config import UserError
from senseflow.section import near


@dataclass(frozen=True)
class Row:
    """name: of its files; title: in the table; flags: of `python -m senseflow.train`, the preset first."""

    name: str
    title: str
    flags: tuple[str, ...]


IDA = ("--ida.lam", "0.97")
ISG = ("--isg.weight", "1")
FULL = Row("full", "full: +IDA +ISG +VFM discriminator", ("tiny",))
NO_IDA = Row("full-no-ida", "full without IDA", ("tiny", "--ida.lam", "1"))
# A fake that cannot follow: one rate for both (the released trainers'; tiny gives the fake 11 times the student's), one
# update of its own. At 10 times tiny's student rate the student itself burns out, with IDA and without (60 iterations
# of batch 8). Such an iteration is cheap: --updates 96.
HARSH = ("--train.lr", "1e-4", "--train.fake_lr", "1e-4", "--train.gen_every", "1")

GROUPS: dict[str, list[Row]] = {
    "core": [
        Row("dmd2", "DMD2", ("dmd2",)),
        Row("dmd2-ida", "DMD2 +IDA", ("dmd2", *IDA)),
        Row("dmd2-ida-isg", "DMD2 +IDA +ISG", ("dmd2", *IDA, *ISG)),
        FULL,
        NO_IDA,
    ],
    "removed": [  # the paper's own table: one part taken away, and both (paper.md 5)
        FULL,
        Row("full-no-isg", "full without ISG", ("tiny", "--isg.weight", "0")),
        NO_IDA,
        Row("full-no-ida-isg", "full without both", ("tiny", "--ida.lam", "1", "--isg.weight", "0")),
    ],
    "ttur": [
        FULL,
        Row("no-ida-ttur5", "without IDA, 5 fake updates", ("tiny", "--ida.lam", "1", "--train.gen_every", "5")),
        Row("no-ida-ttur10", "without IDA, 10 fake updates", ("tiny", "--ida.lam", "1", "--train.gen_every", "10")),
        Row("no-ida-ttur20", "without IDA, 20 fake updates", ("tiny", "--ida.lam", "1", "--train.gen_every", "20")),
    ],
    "lambda": [
        FULL,
        *(Row(f"lambda-{lam}", f"IDA lambda {lam}", ("tiny", "--ida.lam", lam)) for lam in ("0.9", "0.99", "0.999")),
        Row("lambda-adaptive", "IDA lambda adaptive", ("tiny", "--ida.mode", "adaptive")),
    ],
    "variants": [
        FULL,
        Row("isg-l2", "ISG loss: the paper's L2", ("tiny", "--isg.loss", "l2")),
        Row("omega-sd35", "omega: SD 3.5's released table", ("tiny", "--disc.omega", "released-sd35")),
        Row("omega-g-only", "omega on G alone (the paper's text)", ("tiny", "--disc.omega_on_d", "false")),
        Row("omega-one", "no omega", ("tiny", "--disc.omega", "one")),
        Row("as-paper", "the paper's text: L2, omega on G alone",
            ("tiny", "--isg.loss", "l2", "--disc.omega_on_d", "false")),
    ],
    "midpoint": [FULL, Row("midpoint-adaptive", "ISG midpoint by xi(t)", ("tiny", "--isg.midpoint", "adaptive"))],
    "steps": [
        FULL,
        *(Row(f"steps-{n}", f"{n} step{'s' * (n > 1)}", ("tiny", "--model.steps", str(n))) for n in (1, 2, 8)),
    ],
    "thrift": [  # what less memory costs (docs/memory.md)
        FULL,
        Row("moments-8bit", "all moments in 8 bits", ("tiny", "--train.moments", "8bit", "--disc.moments", "8bit")),
    ],
    "unstable": [
        Row("harsh-dmd2", "DMD2, equal rates, 1 fake update", ("dmd2", *HARSH)),
        Row("harsh-dmd2-ida", "the same +IDA", ("dmd2", *HARSH, *IDA)),
        Row("harsh-full", "full, equal rates, 1 fake update", ("tiny", *HARSH)),
        Row("harsh-full-no-ida", "the same without IDA", ("tiny", *HARSH, "--ida.lam", "1")),
    ],
}  # fmt: skip
# What one part does: (in words, the row with it, the same without). Two families of tests: tiny's rates, a slow fake.
PARTS = (
    ("IDA, added to DMD2", "dmd2-ida", "dmd2"),
    ("IDA, in the whole", "full", "full-no-ida"),
    ("ISG, added to DMD2 +IDA", "dmd2-ida-isg", "dmd2-ida"),
    ("ISG, in the whole", "full", "full-no-isg"),
    ("VFM discriminator for DMD2's classifier", "full", "dmd2-ida-isg"),
)
UNSTABLE_PARTS = (
    ("IDA, added to DMD2; unstable regime", "harsh-dmd2-ida", "harsh-dmd2"),
    ("IDA, in the whole; unstable regime", "harsh-full", "harsh-full-no-ida"),
)
BASES = {group: "full" for group in GROUPS} | {"unstable": "harsh-dmd2"}


def rows_of(groups: list[str]) -> list[Row]:
    """The rows of the groups, each once. Raises UserError for an unknown group."""
    for name in groups:
        if name not in GROUPS:
            raise UserError(f"unknown group {name!r}{near(name, GROUPS)}: allowed are all, {', '.join(GROUPS)}")
    return list({row.name: row for name in groups for row in GROUPS[name]}.values())


def command(row: Row, updates: int, evaluations: int, changes: list[str]) -> list[str]:
    """Words for senseflow.cli.parse: the row, then the user's changes, then what makes rows comparable: so many student
    updates, scored at the same ones, saved as often as scored."""
    words = [*row.flags, *changes]
    train = parse(words, "").config.train
    every = max(updates // evaluations, 1) * train.gen_every
    return [
        *words, "--train.iterations", str(train.fake_warmup + updates * train.gen_every), "--eval.every", str(every),
        "--train.checkpoint_every", str(every), "--train.keep_last", "1",
    ]  # fmt: skip
