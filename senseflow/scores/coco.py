"""COCO-5K as the paper has it: the 5000 pictures of val2017, each with the one caption of highest CLIP score."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from senseflow.config import UserError
from senseflow.scores.pictures import read_picture


def read_captions(folder: Path, limit: int = 0) -> list[tuple[Path, list[str]]]:
    """(picture, its captions) in the order of picture ids. folder: COCO's own, with val2017/ and
    annotations/captions_val2017.json. limit: the first so many; 0: all. Raises UserError for what is not there."""
    file = folder / "annotations" / "captions_val2017.json"
    if not file.is_file():
        raise UserError(f"{folder} is no COCO folder: it lacks annotations/captions_val2017.json")
    try:
        record = json.loads(file.read_text())
        names = {image["id"]: image["file_name"] for image in record["images"]}
        captions: dict[int, list[str]] = {}
        for row in sorted(record["annotations"], key=lambda row: row["id"]):
            captions.setdefault(row["image_id"], []).append(" ".join(row["caption"].split()))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not COCO's captions: {error!r}") from None
    found = [(folder / "val2017" / names[i], captions[i]) for i in sorted(captions)]
    found = found[: limit or len(found)]
    if absent := [path for path, _ in found if not path.is_file()]:
        raise UserError(f"{folder} lacks val2017/{absent[0].name}, and {len(absent) - 1} more")
    return found


def best_captions(folder: Path, clip: Any, out: Path, limit: int = 0, say: Any = None) -> tuple[list[Path], list[str]]:
    """(pictures, for each its caption of highest CLIP score, the first of equals). clip: the CLIP extractor. Kept in
    out/coco-5k.jsonl, a line a picture, so that a stopped selection goes on."""
    found = read_captions(folder, limit)
    all_captions = [[path.name, captions] for path, captions in found]
    key = hashlib.sha256(json.dumps([clip.about, all_captions]).encode()).hexdigest()
    file = out / "coco-5k.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    if not lines or json.loads(lines[0]).get("key") != key:
        lines = [json.dumps({"key": key, "clip": clip.about})]
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(lines[0] + "\n")
    if file.read_text()[-1:] != "\n":  # a line that a crash cut off
        lines = lines[:-1]
        file.write_text("\n".join(lines) + "\n")
    with file.open("a") as log:
        for path, captions in found[len(lines) - 1 :]:
            scores = clip([read_picture(path)] * len(captions), captions)[:, -1]
            row = dict(file=path.name, caption=captions[int(scores.argmax())], score=float(scores.max()))
            lines.append(json.dumps(row))
            log.write(lines[-1] + "\n")
            log.flush()
            if say:
                say(len(lines) - 1, len(found))
    return [path for path, _ in found], [json.loads(line)["caption"] for line in lines[1:]]
