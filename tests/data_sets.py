"""Small image-text sets written to disk for tests: good ones, and every kind of bad sample."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """A smooth coloured picture with some grain, another for every seed."""
    r = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = sum(
        np.sin(x * r.normal(0, 0.2) + y * r.normal(0, 0.2) + r.uniform(0, 6))[..., None] * r.normal(0, 1, 3)
        for _ in range(6)
    )
    values = waves + r.normal(0, 0.1, (height, width, 3))
    values = (values - values.min()) / (values.max() - values.min()) * 255
    return Image.fromarray(values.astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def jpeg(seed: int, width: int = 48, height: int = 40, **options) -> bytes:
    return encoded(picture(seed, width, height), **options)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises a picture that its few bytes do not hold: a decompression bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def spoiled_png() -> bytes:
    """A PNG with noise for its compressed pixels, checksums right."""
    data = encoded(picture(1), "PNG")
    at = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[at - 4 : at])
    noise = np.random.default_rng(0).integers(0, 256, length, np.uint8).tobytes()
    return data[: at + 4] + noise + struct.pack(">I", zlib.crc32(b"IDAT" + noise)) + data[at + 8 + length :]


# name -> (file, why it is not used): each in one sample of a set with a caption
BAD_IMAGES = {
    "spoiled": (spoiled_png(), "corrupt image"),
    "cut": (jpeg(2)[:-300], "truncated"),
    "cutpng": (encoded(picture(3), "PNG")[:-400], "truncated"),
    "empty": (b"", "empty file"),
    "text": (b"this is no picture, whatever its name says", "not an image"),
    "bomb": (png_of_size(60_000, 60_000), "too many pixels"),
    "bigger": (png_of_size(16_000, 16_000), "too many pixels"),  # under Pillow's own limit
    "pixel": (encoded(Image.new("RGB", (1, 1)), "PNG"), "too small"),
    "moving": (encoded(picture(4), "GIF", save_all=True, append_images=[picture(5)]), "animated"),
}


def caption(i: int) -> str:
    return f"a photo of star {chr(97 + i % 26)}{chr(97 + i // 26 % 26)}"


def write_folder(folder: Path, count: int, **size) -> Path:
    """count JPEGs with .txt captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:04d}.jpg").write_bytes(jpeg(i, **size))
        (folder / f"{i:04d}.txt").write_text(caption(i))
    return folder


def write_bad_folder(folder: Path, good: int) -> dict[str, int]:
    """A folder with `good` usable pictures and one of each bad kind; returns the expected counts by reason."""
    write_folder(folder, good)
    expected: dict[str, int] = {}

    def bad(why: str) -> None:
        expected[why] = expected.get(why, 0) + 1

    for name, (data, why) in BAD_IMAGES.items():
        (folder / f"bad-{name}.jpg").write_bytes(data)
        (folder / f"bad-{name}.txt").write_text("a caption")
        bad(why)
    (folder / "other.jpg").write_bytes(encoded(picture(6), "PNG"))  # a wrong extension alone does no harm
    (folder / "other.txt").write_text("a caption")
    (folder / "nocaption.jpg").write_bytes(jpeg(7))
    bad("no caption")
    for name, text, why in (
        ("blank", b" \n", "no caption"),
        ("latin", "caf\xe9".encode("latin-1"), "caption is not UTF-8"),
    ):
        (folder / f"{name}.jpg").write_bytes(jpeg(8))
        (folder / f"{name}.txt").write_bytes(text)
        bad(why)
    more = folder / "more"
    more.mkdir()
    (more / "a.jpg").write_bytes(jpeg(9))
    rows = [{"file_name": "a.jpg", "text": "one"}, {"file_name": "a.jpg", "text": "two"}, {"file_name": "b.jpg"}]
    (more / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"file_name": "c.jpg", "te\n')
    for why in ("duplicate key", "missing file", "JSON does not parse"):
        bad(why)
    return expected


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    """samples: (key, extension -> content), in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for ext, data in members.items():
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_tars(folder: Path, shards: int, each: int, **size) -> Path:
    """shards tars of `each` samples: .jpg, .txt and .json with width, height, aesthetic, punsafe."""
    for s in range(shards):
        samples = []
        for i in range(s * each, (s + 1) * each):
            image = picture(i, **size)
            meta = dict(caption=caption(i), width=image.width, height=image.height, aesthetic=4 + i % 4 * 0.5,
                        punsafe=i % 10 / 10, alt=[f"first {i}", f"second {i}"])  # fmt: skip
            members = {"jpg": encoded(image), "txt": caption(i).encode(), "json": json.dumps(meta).encode()}
            samples.append((f"{i:06d}", members))
        write_tar(folder / f"{s:05d}.tar", samples)
    return folder
