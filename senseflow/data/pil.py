"""Image files to uint8 RGB of a given size, with Pillow: what every decoder has to agree with.

Orientation as EXIF says; alpha on white; palettes, CMYK and 16 bits to 8-bit RGB; colour profiles are not applied.
"""

from __future__ import annotations

import io
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
    except Exception as error:  # TypeError, RuntimeError, KeyError: plugins meet all in spoiled bytes
        raise BadSample("corrupt image", str(error)) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadSample("too many pixels", f"{width}x{height}")
    if min(width, height) < MIN_SIDE:
        raise BadSample("too small", f"{width}x{height}")
    if (frames := _frames(image)) > 1:
        raise BadSample("animated", f"{frames} frames")
    return image


def _frames(image: Any) -> int:
    """Pictures in the file; 1 for MPO, a camera's JPEG with a preview or a gain map behind it. Raises BadSample."""
    try:
        return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Exception as error:  # Pillow looks through the whole file for them
        raise BadSample("corrupt image", str(error)) from None


def orientation(image: Any) -> int:
    """EXIF's, 1 to 8; 1 where it does not parse.

    Of a PNG that is not yet loaded: 1 where its EXIF lies behind the pixels. Pillow would decode them to look there,
    and of a file's first bytes it cannot.
    """
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # spoiled EXIF is no reason to lose the picture
        return 1


def oriented_size(image: Any) -> tuple[int, int]:
    """(width, height) after EXIF's orientation."""
    width, height = image.size
    return (height, width) if orientation(image) in (5, 6, 7, 8) else (width, height)


def upright(image: Any) -> Any:
    """A loaded picture, turned as EXIF says."""
    from PIL.Image import Transpose as T

    turns = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_270,
             7: T.TRANSVERSE, 8: T.ROTATE_90}  # fmt: skip
    turn = turns.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def rgb(data: bytes) -> Any:
    """The whole picture, upright, as a PIL image in RGB. Raises BadSample, also "truncated", "corrupt image"."""
    from PIL import Image

    image = opened(data)
    try:
        image.load()
        image = upright(image)
        if image.mode.startswith("I") or image.mode == "F":  # 16 bits: Pillow's own conversion would clip at 255
            values = np.asarray(image, np.float64)
            top = 65535 if image.mode != "F" else max(float(values.max()), 1.0)
            return Image.fromarray((values * (255 / top)).round().clip(0, 255).astype(np.uint8)).convert("RGB")
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # as in `opened`
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
