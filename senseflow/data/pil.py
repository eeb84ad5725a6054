"""Image files to uint8 RGB of a given size, with Pillow: what every decoder has to agree with.

Orientation as EXIF says; alpha on white; palettes, CMYK and 16 bits to 8-bit RGB; colour profiles are not applied.
"""

from __future__ import annotations

import io
import struct
import warnings
from functools import lru_cache
from typing import Any

import numpy as np

from senseflow.data.samples import BadSample

MIN_SIDE = 16  # pixels: below, there is nothing to see
MAX_PIXELS = 2 * 10**8  # a 14,000-pixel square; decoded it takes 600 MB
ORIENTATION = 274  # EXIF tag; 5 to 8 swap width and height


@lru_cache
def _our_limit() -> None:
    """Pillow's warning at half its own limit is noise: MAX_PIXELS decides. Once: filters are the whole process's."""
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def opened(data: bytes) -> Any:
    """A PIL image, its header alone read. Raises BadSample: "empty file", "not an image", "too many pixels",
    "too small", "animated"."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise BadSample("empty file")
    _our_limit()
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise BadSample("not an image") from None
    except Image.DecompressionBombError as error:
        raise BadSample("too many pixels", str(error)) from None
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise BadSample("corrupt image", str(error)) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadSample("too many pixels", f"{width}x{height}")
    if min(width, height) < MIN_SIDE:
        raise BadSample("too small", f"{width}x{height}")
    if getattr(image, "n_frames", 1) > 1:
        raise BadSample("animated", f"{getattr(image, 'n_frames', 0)} frames")
    return image


def oriented_size(image: Any) -> tuple[int, int]:
    """(width, height) after EXIF's orientation."""
    width, height = image.size
    return (height, width) if image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8) else (width, height)


def rgb(data: bytes) -> Any:
    """The whole picture, upright, as a PIL image in RGB. Raises BadSample, also "truncated", "corrupt image"."""
    import zlib

    from PIL import Image, ImageOps

    image = opened(data)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":  # 16 bits: Pillow's own conversion would clip at 255
            values = np.asarray(image, np.float64)
            top = 65535 if image.mode != "F" else max(float(values.max()), 1.0)
            return Image.fromarray((values * (255 / top)).round().clip(0, 255).astype(np.uint8)).convert("RGB")
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, SyntaxError, ValueError, IndexError, EOFError, struct.error, zlib.error) as error:
        cut = "truncated" in str(error).lower() or isinstance(error, EOFError)
        raise BadSample("truncated" if cut else "corrupt image", str(error)) from None


def window(there: tuple[int, int], size: tuple[int, int], place: tuple[float, float]) -> tuple[float, ...]:
    """(left, top, right, bottom) of the largest part of a picture, `there` = (width, height) pixels, that has the
    aspect of size (height, width).

    place: where it lies in what is left over, (across, down) in [0, 1]; (.5, .5) is the middle.
    """
    width, height = there
    scale = max(size[1] / width, size[0] / height)
    w, h = min(size[1] / scale, width), min(size[0] / scale, height)
    left, top = (width - w) * place[0], (height - h) * place[1]
    return left, top, left + w, top + h


def fitted(image: Any, size: tuple[int, int], place: tuple[float, float]) -> np.ndarray:
    """uint8 [height, width, 3]: that window of an RGB image, resized with Lanczos (a = 3, antialiased)."""
    from PIL import Image

    box = window(image.size, size, place)
    resized = image.resize((size[1], size[0]), Image.Resampling.LANCZOS, box=box)
    return np.asarray(resized)


class PilDecoder:
    """Decodes one picture at a time, in whatever thread asks: Pillow lets go of the interpreter meanwhile."""

    name = "pil"
    batched = False

    def decode(self, data: bytes, size: tuple[int, int], place: tuple[float, float]) -> np.ndarray:
        """uint8 [height, width, 3]. Raises BadSample."""
        return fitted(rgb(data), size, place)
