"""Scores a student, or a folder of pictures, with the metrics of the field.

    python -m senseflow.evaluate --student RUN --coco COCO_FOLDER --metrics fid-t patch-fid-t clip hpsv2 imagereward
    python -m senseflow.evaluate --pictures FOLDER --reference TEACHER_FOLDER --real FOLDER --metrics all
    python -m senseflow.evaluate --student RUN --write geneval=CLONE    # pictures for the benchmark's own evaluator
    python -m senseflow.evaluate --student RUN --read geneval=results.jsonl
    python -m senseflow.evaluate --student runs/tiny                    # the embedded table of a finished run
    python -m senseflow.evaluate --make-reference FOLDER                # the embedded teacher's samples and scores

A metric whose weights or inputs are missing is left out with its reason; the others are computed. The same command goes
on where it was stopped; under torchrun the processes share the work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from senseflow import sample
from senseflow.cli import status_of
from senseflow.config import UserError
from senseflow.scores import coco
from senseflow.scores.benchmarks import IMAGES, layout, read_results, write_dpg_grids
from senseflow.scores.pictures import FeatureStore, PictureSet, picture_folder
from senseflow.scores.registry import EXTRACTORS, METRICS, Metric, find_metrics
from senseflow.scores.report import left_out, print_report, versions
from senseflow.student import default_device

STUDENT_SEED, TEACHER_SEED = 1, 2  # independent noises, as everywhere


def build_parser() -> argparse.ArgumentParser:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m senseflow.evaluate", description=__doc__, formatter_class=text, allow_abbrev=False
    )
    add = parser.add_argument
    add("--student", type=Path, help="run, its student folder, an exported folder, or a checkpoint step-...")
    add(
        "--pictures",
        type=Path,
        help="folder of pictures instead; prompts: samples.jsonl, .txt beside each, or the flags",
    )
    add(
        "--teacher",
        default="",
        help="folder, hub id or `embedded`, sampled as the reference; default: the student's own",
    )
    add("--reference", type=Path, help="folder of the teacher's pictures of the same prompts, instead of sampling it")
    add("--real", type=Path, help="folder of real pictures; with --coco: COCO's")
    add("--prompts", nargs="+", help="one picture each, or --images")
    add("--prompts-file", type=Path, help="one prompt a line")
    add("--data", help="captions of a data set: whatever senseflow.train --data takes, but for a cache")
    add("--embedded", action="store_true", help="the captions of the embedded data set")
    add("--coco", type=Path, help="COCO folder (val2017/, annotations/): its pictures' captions of best CLIP score")
    add("--limit", type=int, default=0, help="the first so many prompts; 0: all")
    add("--images", type=int, default=0, help="pictures of each prompt; default 1, or as the benchmark's authors")
    add("--metrics", nargs="+", default=["all"], help=f"all, or some of: {', '.join(METRICS)}")
    add("--weights", action="append", default=[], metavar="NAME=PATH", help="path or hub id of a metric's network: "
        "inception, clip, hpsv2, hpsv2.1, pickscore, pickscore-processor, imagereward, bert, lpips")  # fmt: skip
    add("--write", action="append", metavar="NAME=CLONE",
        help=f"pictures for one of {', '.join(IMAGES)}; CLONE: of its repository")  # fmt: skip
    add("--read", action="append", default=[], metavar="NAME=PATH",
        help="a benchmark's own results, beside what OUT/results.json says of the same student already")  # fmt: skip
    add(
        "--published", choices=("auto", "sdxl", "sd35", "flux", "none"), default="auto", help="the paper's rows to show"
    )
    add("--steps", type=int, help="of the student; default as trained")
    add("--sampler", choices=sample.SAMPLERS, default="renoise", help="of the student")
    add("--teacher-steps", type=int, help="default: its preset's")
    add("--guidance", type=float, help="of the teacher; default: its preset's")
    add("--shift", type=float, help="of the teacher; default: its preset's")
    add("--side", type=int, help="pixels, of the teacher; default: the student's")
    add("--seed", type=int, default=STUDENT_SEED, help="of the student's noise; the teacher's has 1 more")
    add("--batch", type=int, default=8, help="pictures at a time")
    add("--dtype", choices=tuple(sample.DTYPES), default="", help="of the arithmetic; default: as trained")
    add("--out", type=Path, help="folder; default STUDENT/evaluation, or PICTURES-evaluation")
    add("--make-reference", type=Path, help="the embedded teacher's, into this folder; beside it --teacher alone")
    return parser


def pairs(words: list[str], flag: str, allowed: list[str]) -> dict[str, str]:
    """NAME=VALUE words as a dict. Raises UserError for another form or name."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not value or name not in allowed:
            raise UserError(f"{flag} {word!r}: allowed is NAME=PATH with a name of {', '.join(allowed)}")
        found[name] = value
    return found


class Run:
    """One command's settings and places. missing: metric -> why it was left out."""

    def __init__(self, args: argparse.Namespace):
        from senseflow.scores.weights import DEFAULTS

        self.args, self.device = args, default_device()
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if args.make_reference:
            raise UserError("--make-reference: allowed beside it is --teacher alone")
        for name, low in (("batch", 1), ("images", 0), ("limit", 0)):
            if getattr(args, name) < low:
                raise UserError(f"--{name} {getattr(args, name)}: allowed is {low} or more")
        for name, most in (("steps", 8), ("teacher_steps", 1000)):  # as senseflow.sample has it
            steps = getattr(args, name)
            if steps is not None and not 1 <= steps <= most:
                raise UserError(f"--{name.replace('_', '-')} {steps}: allowed is 1 to {most}")
        if args.student and args.pictures:
            raise UserError("--student and --pictures: allowed is one of them")
        base = args.student / "evaluation" if args.student else None
        if args.pictures:
            base = args.pictures.with_name(args.pictures.name + "-evaluation")
        self.out: Path = args.out or base or Path("evaluation")
        self.given = pairs(args.weights, "--weights", list(DEFAULTS))
        self.metrics = find_metrics(args.metrics)
        self.missing: dict[str, str] = {}
        self.nets: dict[str, Any] = {}
        self.abouts: dict[str, dict[str, Any]] = {}
        self.generation: dict[str, dict[str, Any]] = {}
        self.real: PictureSet | None = None

    def net(self, extractor: str) -> Any:
        """The loaded extractor, one at a time: they are large. Raises UserError where its weights are missing."""
        if extractor not in self.nets:
            self.nets.clear()
            self.nets = {extractor: EXTRACTORS[extractor](self.given, self.device)}
            self.abouts[extractor] = self.nets[extractor].about
        return self.nets[extractor]

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def read_prompts(run: Run) -> list[str] | None:
    """The prompts of the flags, in order, before --images; None where no flag gives any."""
    args = run.args
    if args.coco is not None:
        if args.prompts or args.prompts_file or args.data or args.embedded:
            raise UserError("prompts come from one of --coco, --prompts, --prompts-file, --data and --embedded")
        files, prompts = coco.best_captions(
            args.coco, run.net("clip"), run.out, args.limit,
            lambda k, n: run.say(f"captions of {k} of {n} pictures chosen") if k % 500 == 0 else None,
        )  # fmt: skip
        run.real = PictureSet("real", files, [])
        return prompts
    if not (args.prompts or args.prompts_file or args.data or args.embedded):
        return None
    return sample.read_prompts(args)


def sampler_args(run: Run, teacher: bool) -> argparse.Namespace:
    """The settings of senseflow.sample for the student, or for its teacher."""
    args = run.args
    words = ["--batch", str(args.batch), "--seed", str(args.seed + teacher * (TEACHER_SEED - STUDENT_SEED))]
    words += ["--dtype", args.dtype] if args.dtype else []
    if teacher:
        words += ["--teacher", teacher_source(run), "--sampler", "euler"]
        for flag in ("guidance", "shift", "side"):
            value = getattr(args, flag)
            if flag == "side" and value is None and args.student:
                value = sample.find_student(args.student).model.side
            words += [f"--{flag}", str(value)] if value is not None else []
        words += ["--steps", str(args.teacher_steps)] if args.teacher_steps else []
    else:
        words += ["--student", str(args.student), "--teacher", args.teacher, "--sampler", args.sampler]
        words += ["--steps", str(args.steps)] if args.steps else []
    found = sample.build_parser().parse_args(words)
    if not teacher:
        found.teacher = "" if args.teacher == "embedded" else args.teacher
    return found


def teacher_source(run: Run) -> str:
    """--teacher, or what the student was trained from; "embedded" for the embedded one."""
    if run.args.teacher:
        return run.args.teacher
    student = sample.find_student(run.args.student)
    return student.model.teacher or "embedded"


def generated(run: Run, name: str, prompts: list[str], images: int) -> PictureSet:
    """OUT/NAME: `images` pictures of each prompt, of the student or (name "teacher") of its teacher. Raises UserError
    where OUT holds pictures of other settings."""
    words = [prompt for prompt in prompts for _ in range(images)]
    folder = run.out / name
    files = [folder / f"{i:06d}.png" for i in range(len(words))]
    make(run, name, words, files, folder / "samples.jsonl", images)
    return PictureSet(name, files, words, images)


def make(run: Run, name: str, words: list[str], files: list[Path], record: Path, images: int) -> None:
    """Makes this process's part of the pictures that are missing, and their record."""
    source = sample.Source(sampler_args(run, name == "teacher"), run.device)
    source.args.batch = max(run.args.batch // images, 1) * images  # a prompt's pictures in one process
    about = dict(seed=source.args.seed, **source.about)
    run.generation[name] = about | dict(calls=source.calls)
    rows = [
        dict(file=str(file.relative_to(record.parent)), index=i, prompt=word, **about)
        for i, (file, word) in enumerate(zip(files, words, strict=True))
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if record.is_file() and record.read_text() != text:
        raise UserError(f"{record.parent} holds pictures of other settings or prompts: choose another --out")
    if not record.is_file():
        partial = record.with_name(f".{record.name}.{os.getpid()}")
        sample.write_rows(partial, rows)
        os.replace(partial, record)
    done = 0
    for count in sample.make_pictures(source, words, files, rows, run.rank, run.world, resume=True, enlarge=False):
        done += count
    if done:
        run.say(f"{name}: {done} pictures made here, {len(files)} in all, in {record.parent}")


def picture_sets(run: Run, prompts: list[str] | None) -> dict[str, PictureSet]:
    """What is scored ("student"), and what it is compared with ("teacher", "real") where there is one and it is
    asked."""
    args, images = run.args, run.args.images or 1
    asked = {m.against for m in run.metrics}
    sets: dict[str, PictureSet] = {}
    if args.pictures:
        repeated = [p for p in prompts for _ in range(images)] if prompts is not None else None
        sets["student"] = picture_folder("student", args.pictures, repeated)
    elif args.student:
        if prompts is None:
            raise UserError("prompts come from one of --coco, --prompts, --prompts-file, --data and --embedded")
        sets["student"] = generated(run, "student", prompts, images)
    else:
        raise UserError("nothing to score: give --student RUN or --pictures FOLDER")
    if args.reference:
        sets["teacher"] = picture_folder("teacher", args.reference)
    elif "teacher" in asked and prompts is not None and (args.student or args.teacher):
        sets["teacher"] = generated(run, "teacher", prompts, images)
    if args.real:
        sets["real"] = picture_folder("real", args.real)
    elif run.real is not None:
        sets["real"] = run.real
    return sets


def why_not(metric: Metric, sets: dict[str, PictureSet]) -> str:
    """What a metric lacks besides weights, or nothing."""
    student = sets["student"]
    if metric.against and metric.against not in sets:
        give = "--reference FOLDER, or prompts and a teacher" if metric.against == "teacher" else "--real FOLDER"
        return f"compares with {metric.against} pictures: give {give}"
    if metric.text and not student.prompts:
        return "needs the pictures' prompts"
    if metric.several and student.images < 2:
        return "needs 2 or more pictures of each prompt: --images"
    if metric.against and min(len(student.files), len(sets[metric.against].files)) < 2:
        return "needs 2 or more pictures on either side"
    return ""


def extract(run: Run, store: FeatureStore, sets: dict[str, PictureSet]) -> None:
    """Makes the features that the metrics need and that are not kept yet; notes in run.missing what cannot be."""
    for metric in run.metrics:
        if reason := why_not(metric, sets):
            run.missing[metric.name] = reason
    for extractor in dict.fromkeys(m.extractor for m in run.metrics if m.name not in run.missing):
        users = [m for m in run.metrics if m.extractor == extractor and m.name not in run.missing]
        names = {"student"} | {m.against for m in users if m.against}
        if any(m.text for m in users) and "teacher" in sets:
            names.add("teacher")
        try:
            net = run.net(extractor)
            for name in sorted(names):
                for _ in store.make(sets[name], extractor, net, users[0].whole, run.rank, run.world):
                    pass
        except UserError as error:
            run.missing |= {m.name: str(error) for m in users}
    for line in left_out(run.missing):
        run.say(line)


def reduced(run: Run, store: FeatureStore, sets: dict[str, PictureSet]) -> dict[str, dict[str, Any]] | None:
    """Set -> metric -> result, of the student and, for metrics of the pictures alone, of the teacher. None while
    another process is still at work."""
    found: dict[str, dict[str, Any]] = {"student": {}, "teacher": {}}
    for metric in run.metrics:
        if metric.name in run.missing:
            continue
        about = run.abouts[metric.extractor]
        for name in ("student", "teacher") if metric.text and "teacher" in sets else ("student",):
            rows = store.rows(sets[name], metric.extractor, about)
            other = store.rows(sets[metric.against], metric.extractor, about) if metric.against else None
            if rows is None or (metric.against and other is None):
                return None
            result = metric.reduce(rows, other, sets[name].images)
            found[name][metric.name] = asdict(result) | dict(against=metric.against, better=metric.better, **about)
    return found


def write_benchmark(run: Run) -> None:
    """--write: the pictures of a benchmark, its metadata, and the command that comes next."""
    if not run.args.student:
        raise UserError("--write needs --student RUN")
    if run.args.read or len(run.args.write) > 1:
        raise UserError("--write: allowed is one benchmark a command, without --read")
    ((name, clone),) = pairs(run.args.write, "--write", list(IMAGES)).items()
    out = run.out / name
    plan = layout(name, Path(clone), out, run.args.images, run.args.limit)
    make(run, "student", plan.prompts, plan.files, out / "samples.jsonl", run.args.images or IMAGES[name])
    for file, text in plan.texts.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    if not all(file.is_file() for file in plan.files):
        run.say(f"{name}: the last process ends it")
        return
    if name == "dpg":
        side = write_dpg_grids(plan.files, out)
        print(f"{name}: one picture of a grid has {side} pixels")
    print(f"{name}: {len(plan.files)} pictures in {out}; next, in {clone}: {plan.hint}", flush=True)


def earlier(file: Path, of: str) -> dict[str, Any]:
    """An earlier results.json of the same student or folder of pictures; empty where there is none."""
    try:
        record = json.loads(file.read_text())
        return record if record["of"] == of and isinstance(record["benchmarks"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def score(run: Run) -> None:
    """The metrics and the benchmarks' results, as OUT/results.json and a table."""
    read = {name: read_results(name, Path(path)) for name, path in pairs(run.args.read, "--read", list(IMAGES)).items()}
    scored: dict[str, dict[str, Any]] | None = {"student": {}, "teacher": {}}
    sets: dict[str, PictureSet] = {}
    prompts = None
    only_read = bool(read) and run.args.metrics == ["all"] and not run.args.pictures and run.args.coco is None
    if not (only_read and not (run.args.prompts or run.args.prompts_file or run.args.embedded)):
        prompts = read_prompts(run)
        sets = picture_sets(run, prompts)
        store = FeatureStore(run.out / "features", run.args.batch)
        extract(run, store, sets)
        scored = reduced(run, store, sets)
    if scored is None:
        print(f"process {run.rank}: done; the last one writes the results", flush=True)
        return
    family = sample.find_student(run.args.student).model.family if run.args.student else "none"
    words, of = sets["student"].prompts if sets else [], str(run.args.student or run.args.pictures or "")
    before = earlier(run.out / "results.json", of)
    record = dict(
        of=of, family=family, scores=scored, benchmarks=before.get("benchmarks", {}) | read,
        missing=run.missing, generation=run.generation, pictures={k: len(v.files) for k, v in sets.items()},
        images_of_a_prompt=sets["student"].images if sets else 0,
        prompts_sha256=hashlib.sha256("\n".join(words).encode()).hexdigest(), versions=versions(),
    )  # fmt: skip
    if not sets and before:  # no picture was scored now: what was, stays
        record = before | dict(benchmarks=record["benchmarks"])
    run.out.mkdir(parents=True, exist_ok=True)
    partial = run.out / f".results.{os.getpid()}"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, run.out / "results.json")
    print_report(record, family if run.args.published == "auto" else run.args.published, run.out)


def main(argv: list[str]) -> int:
    """Command line. Bad input is one line on stderr and exit status 2."""
    args = build_parser().parse_args(argv)

    def work() -> None:
        run = Run(args)
        if args.write:
            write_benchmark(run)
        else:
            score(run)

    return status_of("evaluate", work, "stopped; run the same command again, it goes on")
