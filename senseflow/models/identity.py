"""Which weights encode: hashes of a teacher's VAE and text encoders, for caches of what they made."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from senseflow.config import UserError
from senseflow.data.packages import file_digest
from senseflow.models import text
from senseflow.models.loading import components, local_folder


def _folder(source: str | Path, kinds: tuple[str, ...]) -> Path:
    """The local folder of a teacher; of a hub id the snapshot with all its parts of those kinds, downloaded where they
    are not there yet. Raises UserError where one stays missing: half of them would look like other weights."""
    parts = [name for name in components(source) if name.startswith(kinds)]
    folder = local_folder(source, parts)
    if missing := next((name for name in parts if not (folder / name).is_dir()), None):
        raise UserError(f"teacher folder {folder} lacks {missing}, which a cache's settings are compared with")
    return folder


def digest_of(folder: Path, parts: tuple[str, ...]) -> str:
    """sha256 over the names and contents of the files in those subfolders whose names begin with one of `parts`."""
    digest = hashlib.sha256()
    for part in sorted(p for p in folder.iterdir() if p.is_dir() and p.name.startswith(parts)):
        for file in sorted(f for f in part.rglob("*") if f.is_file() and not f.name.startswith(".")):
            digest.update(f"{file.relative_to(folder)} {file_digest(file)}\n".encode())
    return digest.hexdigest()


def identity(adapter: Any) -> dict[str, str]:
    """{"vae": ..., "text": ...}: hashes of what encodes pictures and prompts."""
    source = getattr(adapter, "source", None)
    if source is None:  # the embedded family
        vae = digest_of(adapter.folder, ("vae",)) if adapter.vae is not None else "identity"
        return {"vae": vae, "text": text.WEIGHTS_SHA256}
    vae, words = ("vae",), ("text_encoder", "tokenizer")
    folder = _folder(source, vae + words)
    return {"vae": digest_of(folder, vae), "text": digest_of(folder, words)}
