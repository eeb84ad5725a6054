"""A student for others to use: `python -m senseflow.export --student runs/sd35-large --to pipeline --out FOLDER`.

Every export is checked before it appears: the code of its model card, run as it stands, must give our sampler's
latents.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from senseflow import model_card, parity
from senseflow.cli import status_of
from senseflow.config import Config, UserError
from senseflow.flow import FlowSchedule
from senseflow.models.adapter import cast
from senseflow.models.families import DTYPES
from senseflow.models.loading import components, is_local, local_folder, quiet, read_config, variant_of
from senseflow.models.lora import save_lora
from senseflow.single_file import LAYOUTS, save_single_file
from senseflow.student import RECORD, Student, default_device, find_student

SAMPLER_NOTE = "stochastic re-noise at the anchors, no guidance; euler works too"
TARGETS = ("pipeline", "transformer", "single-file", "lora")
STORED = DTYPES | {"fp16": torch.float16}


def make_scheduler(schedule: Any) -> Any:
    """The diffusers scheduler of the re-noise sampler: stochastic flow matching at our shift (an exponential mu is the
    static factor e^mu), or LCM for SDXL: 8 original steps make its own 1, 2, 4 and 8 timesteps ours."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

    if isinstance(schedule, FlowSchedule):
        factor = math.exp(schedule.shift) if schedule.kind == "exponential" else schedule.shift
        return FlowMatchEulerDiscreteScheduler(shift=factor, stochastic_sampling=True)
    return LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", original_inference_steps=8,
        timestep_scaling=1e9,
    )  # fmt: skip


def _publish(partial: Path, folder: Path) -> None:
    """Swaps, so that a crash leaves the old or the new one whole."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def save_student(folder: Path, net: Any, anchors: list[float], cfg: Config, adapter: Any) -> None:
    """Writes the student beside the old one and swaps, so that a crash leaves one of the two whole.

    net: a diffusers network; anchors: descending sigmas.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    net.save_pretrained(partial / adapter.network)
    if cfg.model.family == "embedded" and adapter.vae is not None:
        shutil.copytree(adapter.folder / "vae", partial / "vae")  # its files: model.decode may have cast what is loaded
    make_scheduler(adapter.schedule).save_pretrained(partial / "scheduler")
    record = dict(
        anchors=anchors, shift=cfg.model.shift, shift_kind=cfg.model.shift_kind,
        family=cfg.model.family, preset=cfg.preset, sampler=SAMPLER_NOTE, model=asdict(cfg.model),
        lora=asdict(cfg.lora),
    )  # fmt: skip
    (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    _publish(partial, folder)


def copy_components(teacher: str, out: Path, without: tuple[str, ...]) -> None:
    """The teacher's parts but `without`, file by file as they are, and its model_index.json with our scheduler.
    Where plain weights lie beside variants the plain ones are taken."""
    parts = [name for name in components(teacher) if name not in without]
    folder = local_folder(teacher, ["model_index.json", *parts])
    for part in parts:
        if not (folder / part).is_dir():
            raise UserError(f"teacher folder {folder} lacks {part}")
        variant = variant_of(folder / part)
        drop = [f"*.{v}*" for v in ("fp16", "bf16", "non_ema") if v != variant]
        ignore = shutil.ignore_patterns("*.bin", "*.msgpack", "*.onnx*", "openvino*", "flax*", *drop)
        shutil.copytree(folder / part, out / part, ignore=ignore)
        if variant:
            _rename_variant(out / part, variant)


def _rename_variant(part: Path, variant: str) -> None:
    """A copied variant becomes the plain weights, so that the card needs no name for it."""
    for file in list(part.glob(f"*.{variant}*")):
        if file.name.endswith(".json"):
            file.write_text(file.read_text().replace(f".{variant}", ""))
        file.rename(file.with_name(file.name.replace(f".{variant}", "")))


def _write_index(teacher: str, out: Path, adapter: Any) -> None:
    folder = local_folder(teacher, ["model_index.json"])
    index = read_config(folder / "model_index.json")
    index["scheduler"] = ["diffusers", model_card.scheduler_class(adapter.schedule)]
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_weights(target: str, student: Student, adapter: Any, teacher: str, dtype: torch.dtype, out: Path) -> None:
    """Everything of an export but its card."""
    if target == "lora":  # on the CPU, where the adapter is
        net: Any = student.lora_network(adapter, DTYPES[student.model.dtype])
    else:
        net = student.network(adapter, dtype, torch.device("cpu"))
    out.mkdir(parents=True)
    if target == "lora":
        save_lora(net, out / "pytorch_lora_weights.safetensors")
    elif target == "single-file":
        about = {k: student.record[k] for k in ("anchors", "shift", "shift_kind", "preset") if k in student.record}
        state = net.state_dict()
        del net  # so that each tensor goes once it has been stacked
        save_single_file(out / model_card.SINGLE_FILE, student.model.family, state, about)
    else:
        net.save_pretrained(out / adapter.network)
    if target == "pipeline":
        copy_components(teacher, out, (adapter.network, "scheduler"))
        _write_index(teacher, out, adapter)
    elif student.model.family == "embedded" and adapter.vae is not None:
        adapter.vae.save_pretrained(out / "vae")
    make_scheduler(adapter.schedule).save_pretrained(out / "scheduler")
    (out / RECORD).write_text(json.dumps(student.record, indent=1) + "\n")


def teacher_variant(teacher: str, target: str, network: str) -> str:
    """What the card must ask for of a teacher that lacks plain weights of a part which the card's code reads."""
    if target == "pipeline":
        return ""  # its files have been copied as plain ones
    read = [p for p in components(teacher) if p.startswith(("text_encoder", "vae")) or (p, target) == (network, "lora")]
    folder = local_folder(teacher, ["model_index.json", *read])
    return max((variant_of(folder / part) for part in read), default="")


def make_card(args: argparse.Namespace, student: Student, adapter: Any, teacher: str, dtype: str) -> str:
    """README.md before the check."""
    model, anchors = student.model, student.record["anchors"]
    called = model.dtype if args.to == "lora" else dtype  # its teacher's
    name = str(STORED[called]).removeprefix("torch.")
    where = model_card.places(str(args.out), teacher, name, "cuda" if model.family != "embedded" else "cpu")
    if model.family == "embedded":
        blocks = model_card.embedded_blocks(adapter, anchors, where, args.prompts)
    else:
        family = model_card.family_of(model.family)
        guidance = student.record["lora"]["guidance"] if args.to == "lora" else None
        settings = model_card.call_settings(adapter, family, anchors, model.side, guidance)
        variant = teacher_variant(teacher, args.to, adapter.network)
        blocks = model_card.pipeline_blocks(args.to, family, adapter, settings, where, args.prompts, variant)
    weights = {"": "weights as shipped", "ema": "EMA weights", "raw": "raw weights"}[student.weights]
    about = f"{weights} in `{student.path.name}`, stored in {dtype}"
    return model_card.render(args.to, student.record, model, teacher, about, blocks)


def _rounded(student: Student, adapter: Any, stored: torch.dtype, check: torch.dtype) -> nn.Module:
    """The run's own network through the rounding of the export, computing in `check`."""
    return cast(student.network(adapter, stored), check)


def checked(
    card: str, partial: Path, teacher: str, dtype: str, ours: Callable[[], tuple[Any, nn.Module]], anchors: list[float]
) -> list[parity.Parity]:
    """Runs the card on the folder as it will be, prints the differences, keeps the first picture.

    Raises UserError when they are above the bound; the folder stays beside the place it would have had.
    """
    check = DTYPES[dtype]
    quiet()
    name = str(check).removeprefix("torch.")
    # A hub id is read from its cached snapshot, which the export has just used.
    source = str(teacher if not teacher or is_local(teacher) else local_folder(teacher, ["model_index.json"]))
    where = model_card.places(str(partial), source, name, str(default_device()))
    results, images = parity.check(card, where, ours, anchors, check)
    for result in results:
        print(f"parity in {dtype}, {result}")
    if not all(result.passed for result in results):
        raise UserError(f"parity failed, so nothing is exported; what was checked is left in {partial}")
    if images[0]:
        images[0][0].save(partial / "sample.png")
    return results


def _finish_card(partial: Path, card: str, results: list[parity.Parity], dtype: str) -> None:
    import diffusers

    lines = [f"Checked at export in {dtype}, with diffusers {diffusers.__version__} and torch {torch.__version__}: the",
             "code above, run as it stands, against senseflow's sampler from the same noise.", "",
             *(f"- {result}" for result in results), ""]  # fmt: skip
    if (partial / "sample.png").is_file():
        lines += ["![the first picture of the code above](sample.png)", ""]
    (partial / "README.md").write_text(card + "\n" + "\n".join(lines))


def export(args: argparse.Namespace) -> None:
    """Writes beside --out, checks, and swaps in."""
    student = find_student(args.student, args.weights)
    model, out = student.model, args.out
    if args.to != "transformer":
        model_card.family_of(model.family)
    if args.to == "single-file" and model.family not in LAYOUTS:
        raise UserError(f"--to single-file: family {model.family!r} has none, allowed are {', '.join(LAYOUTS)}")
    if args.to == "lora" and model.variant != "lora":
        raise UserError(f"--to lora: {student.path} has none, it was trained with model.variant = {model.variant!r}")
    if out.exists() and any(out.iterdir()) and not (out / RECORD).is_file():
        raise UserError(f"--out {out} exists and is no earlier export: choose another folder")
    taken = {student.path.resolve(), *([student.folder.resolve()] if student.folder else [])}
    if (out / "checkpoints").exists() or out.resolve() in taken:
        raise UserError(f"--out {out} is a run or the student itself: choose another folder")
    teacher = student.teacher(args.teacher)
    dtype = args.dtype or ("fp32" if model.variant == "lora" else model.dtype)
    adapter = student.adapter(args.teacher, "", torch.device("cpu"))
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_weights(args.to, student, adapter, teacher, STORED[dtype], partial)
    card = make_card(args, student, adapter, teacher, dtype)
    (partial / "README.md").write_text(card)
    del adapter

    def ours() -> tuple[Any, nn.Module]:
        again = student.adapter(args.teacher, args.check_dtype)
        check = DTYPES[args.check_dtype]
        if args.to == "lora":
            return again, student.lora_network(again, check)
        return again, _rounded(student, again, STORED[dtype], check)

    results = checked(card, partial, teacher, args.check_dtype, ours, student.record["anchors"])
    _finish_card(partial, card, results, args.check_dtype)
    _publish(partial, out)
    print(f"exported to {out}: how to call it is in {out / 'README.md'}")


def main(argv: list[str] | None = None) -> int:
    """Command line. Bad input and a failed check are one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m senseflow.export", description=__doc__)
    add = parser.add_argument
    add("--student", type=Path, required=True, help="run, its student folder, an exported folder, or step-... of a run")
    add("--to", choices=TARGETS, default="pipeline", help="a diffusers pipeline folder, the network and its scheduler, "
        "one file under the original tensor names, or a LoRA")  # fmt: skip
    add("--out", type=Path, required=True, help="folder to write")
    add("--teacher", default="", help="its folder or hub id, where it is not where it was in training")
    add("--weights", choices=("ema", "raw"), default="", help="of a run's newest checkpoint; default: as shipped")
    add("--dtype", choices=tuple(STORED), default="", help="of the stored weights; default: as it computed in "
        "training; fp32 for a LoRA, merged or not, whose changes bf16 would round away")  # fmt: skip
    add("--check-dtype", choices=tuple(DTYPES), default="fp32", help="of the parity check")
    add("--prompts", nargs="+", default=list(model_card.PROMPTS), help="of the card's example, and of the check")
    args = parser.parse_args(argv)
    return status_of("export", lambda: export(args))


if __name__ == "__main__":
    sys.exit(main())
