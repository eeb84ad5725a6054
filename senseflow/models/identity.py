"""Which weights encode: hashes of a teacher's VAE and text encoders, for caches of what they made."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from senseflow.config import UserError
from senseflow.data.packages import file_digest
from senseflow.models import text
from senseflow.models.loading import is_local


def _folder(source: str | Path) -> Path:
    """The local folder of a teacher; a hub id's is the snapshot that was loaded. Raises UserError."""
    if is_local(source):
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), local_files_only=True))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(f"{source} is not in the hub's local cache: {error}") from None


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
    folder = _folder(source)
    return {"vae": digest_of(folder, ("vae",)), "text": digest_of(folder, ("text_encoder", "tokenizer"))}
