"""A trained student, from wherever it lies: a run, its `student` folder, an exported folder, one checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from senseflow import checkpoint
from senseflow.config import Model, UserError
from senseflow.fields import from_dict
from senseflow.flow import DiffusionSchedule, FlowSchedule
from senseflow.model_card import FAMILIES
from senseflow.models import lora
from senseflow.models.adapter import cast
from senseflow.models.embedded import EmbeddedAdapter, load_transformer, load_vae, teacher_folder
from senseflow.models.families import DTYPES, make_adapter
from senseflow.models.loading import load_component, local_folder, network_class

RECORD = "senseflow.json"
SHIPPED = ("updates/student", "updates/ema")  # the tensors of a checkpoint that are read here
Weights = Literal["", "ema", "raw"]  # "": what the run ships, the EMA where it keeps one


def default_device() -> torch.device:
    """This process's GPU (LOCAL_RANK under torchrun) where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@dataclass(frozen=True)
class Student:
    """Where a student lies and what it is.

    folder: its diffusers folder, None for a checkpoint alone; state: the checkpoint that its weights come from, None
    for the folder's own; record: anchors, preset, model and so on, as senseflow.json has them.
    """

    path: Path
    folder: Path | None
    state: Path | None
    record: dict[str, Any]
    weights: Weights = ""

    @property
    def model(self) -> Model:
        """The model section it was trained with; what older records lack has its default."""
        names = {f.name for f in dataclasses.fields(Model)}
        known = {k: v for k, v in self.record.get("model", {}).items() if k in names}
        return Model(**{"shift": self.record["shift"], "shift_kind": self.record["shift_kind"], **known})

    def teacher(self, source: str = "") -> str:
        """Where its VAE and text encoders are: `source`, itself if it is a whole pipeline, else as in training."""
        if source:
            return source
        whole = self.folder is not None and (self.folder / "model_index.json").is_file()
        return str(self.folder) if whole else self.model.teacher

    def adapter(self, source: str = "", dtype: str = "", device: torch.device | None = None) -> Any:
        """Its family's adapter, computing and decoding in dtype ("fp32", "bf16"; "": as in training)."""
        device, model = device or default_device(), self.model
        if model.family == "embedded":
            if dtype not in ("", "fp32"):
                raise UserError(f"dtype {dtype!r}: allowed is fp32, the embedded family computes in nothing else")
            home = self.folder or teacher_folder(self.teacher(source))
            return EmbeddedAdapter(model.shift, model.shift_kind, str(device), load_vae(home, device), home)
        if dtype:
            model = dataclasses.replace(model, dtype=dtype, decode=dtype)
        return make_adapter(model, device, self.teacher(source))

    def network(self, adapter: Any, dtype: torch.dtype | None = None, device: torch.device | None = None) -> nn.Module:
        """Its network, frozen, in `dtype` (default: the adapter's). Raises UserError when something is missing."""
        device = torch.device(device or adapter.device)
        dtype = dtype or getattr(adapter, "dtype", torch.float32)
        assert dtype is not None
        if self.state is not None and self.model.variant == "lora":
            net = lora.merged(self.lora_network(adapter, DTYPES[self.model.dtype]))
            return cast(net, dtype).to(device).eval().requires_grad_(False)
        if self.state is not None:
            net = _from_checkpoint(self.state, self.folder, adapter, self.model.family, self.weights)
            return cast(net, dtype).to(device).eval().requires_grad_(False)
        assert self.folder is not None
        if self.model.family == "embedded":
            return cast(load_transformer(self.folder, device), dtype)
        return load_component(network_class(self.folder / adapter.network), self.folder, adapter.network, dtype, device)

    def lora_network(self, adapter: Any, dtype: torch.dtype) -> nn.Module:
        """The teacher in dtype under the student's LoRA, of a checkpoint or of the run's newest one.

        Raises UserError for a student without.
        """
        path = self.state or newest_checkpoint(self.path) or newest_checkpoint(self.path.absolute().parent)
        if path is None:
            raise UserError(f"{self.path}: a LoRA is read from a run's checkpoints, and there are none")
        state = checkpoint.load(path, *SHIPPED)
        cfg, updates = from_dict(state["config"]), state["updates"]
        if cfg.model.variant != "lora":
            raise UserError(f"{self.path} has no LoRA: it was trained with model.variant = {cfg.model.variant!r}")
        net = lora.student_from(adapter, adapter.load_network(dtype), cfg.lora, updates["student"])
        _put_ema(path, [(n, p) for n, p in net.named_parameters() if p.requires_grad], updates, self.weights)
        return net


def newest_checkpoint(run: Path) -> Path | None:
    return max((run / "checkpoints").glob("step-*"), default=None)


def _put_ema(path: Path, named: list[tuple[str, nn.Parameter]], updates: dict[str, Any], weights: Weights) -> None:
    """Puts the EMA in the parameters' place, but for weights "raw". named: what trains, in the order of the tree."""
    if weights == "ema" and "ema" not in updates:
        raise UserError(f"--weights ema: {path} keeps no EMA, allowed is raw")
    if weights == "raw" or "ema" not in updates:
        return
    for (name, p), s in zip(named, updates["ema"]["shadow"], strict=True):
        if p.shape != s.shape:
            raise UserError(f"{path}: the EMA's {name} has shape {list(s.shape)}, the network's {list(p.shape)}")
        p.data = s


def _from_checkpoint(path: Path, folder: Path | None, adapter: Any, family: str, weights: Weights) -> nn.Module:
    """The student of a checkpoint, its tensors as saved. Its structure, without any weights, is that of `folder`, or
    else of the teacher. Raises UserError where that is another."""
    updates = checkpoint.load(path, *SHIPPED)["updates"]
    changes: dict[str, Any] = {}
    if folder is None:
        folder = local_folder(getattr(adapter, "source", None) or adapter.folder, [adapter.network])
        changes = FAMILIES[family].student if family in FAMILIES else {}
    cls = network_class(folder / adapter.network)
    with torch.device("meta"):
        net: Any = cls.from_config({**cls.load_config(folder / adapter.network), **changes})
    try:
        net.load_state_dict(updates["student"], assign=True)
    except RuntimeError as error:
        why = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path} is no student of {folder}: {why}") from None
    _put_ema(path, list(net.named_parameters()), updates, weights)
    return net


def find_student(path: Path, weights: Weights = "") -> Student:
    """The student at `path`: a run folder, its `student` folder, an exported folder, or a checkpoint `step-...`.

    weights "ema" or "raw" of a run means those of its newest checkpoint; "" its `student` folder.
    Raises UserError when there is none.
    """
    if checkpoint.is_checkpoint(path):
        return _of_checkpoint(path, weights)
    folder = path / "student" if (path / "student").is_dir() else path
    if weights:
        step = newest_checkpoint(path)
        if step is None:
            raise UserError(f"--weights {weights}: {path} has no checkpoints, give the folder of a run")
        return _of_checkpoint(step, weights)
    if not (folder / RECORD).is_file():
        raise UserError(f"{path} holds no student (no {RECORD}): give the folder of a run")
    if not any((folder / name).is_dir() for name in ("transformer", "unet")):
        raise UserError(
            f"{path} holds no network in diffusers' layout (a LoRA, a single file?): give the run, or what "
            "senseflow.export --to pipeline or transformer made"
        )
    return Student(path, folder, None, _read(folder / RECORD))


def _of_checkpoint(path: Path, weights: Weights) -> Student:
    """The checkpoint is read for its settings where no `student` folder stands beside it."""
    folder = path.absolute().parent.parent / "student"
    if (folder / RECORD).is_file():
        return Student(path, folder, path, _read(folder / RECORD), weights)
    cfg = from_dict(checkpoint.load(path, "config")["config"])
    m = cfg.model
    schedule = DiffusionSchedule() if m.family == "sdxl" else FlowSchedule(m.shift, m.shift_kind)
    record = dict(
        anchors=schedule.anchors(m.steps, m.anchors == "released"), shift=m.shift, shift_kind=m.shift_kind,
        family=m.family, preset=cfg.preset, model=dataclasses.asdict(m), lora=dataclasses.asdict(cfg.lora),
    )  # fmt: skip
    return Student(path, None, path, record, weights)


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is no record of a student: {error}") from None
    if absent := {"anchors", "shift", "shift_kind"} - set(record):
        raise UserError(f"{file} is no record of a student: it lacks {', '.join(sorted(absent))}")
    return record


def load_student(run: Path, source: str = "", weights: Weights = "") -> tuple[Any, nn.Module, dict[str, Any]]:
    """(adapter, network, record) of find_student(run, weights); text encoders and VAE come from the teacher that the
    record names, or from `source`. Raises UserError when something is missing."""
    student = find_student(run, weights)
    adapter = student.adapter(source)
    return adapter, student.network(adapter), student.record
