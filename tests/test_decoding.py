"""Pictures to pixels: colour, orientation, resize against truths; Pillow and DALI agree; what is unusable."""

import io
import random

import numpy as np
import pytest
import torch
from data_sets import BAD_IMAGES, encoded, jpeg, picture
from PIL import Image, features

from senseflow.data.dali import DaliDecoder, make_decoder, plain_jpeg, why_not
from senseflow.data.pil import PilDecoder, fitted, opened, oriented_size, rgb, window
from senseflow.data.samples import BadSample

MIDDLE = (0.5, 0.5)
with_dali = pytest.mark.skipif(bool(why_not()), reason=f"no DALI: {why_not()}")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nvJPEG decodes there alone")


def exact(image: Image.Image) -> np.ndarray:
    """The pixels of a decoded picture."""
    return np.asarray(rgb(encoded(image, "PNG")))


def test_colours_of_every_mode():
    """Values from what each mode means, in fp64."""
    base = np.asarray(picture(0)).astype(np.float64)
    image = picture(0)
    assert np.array_equal(exact(image), base)
    grey = image.convert("L")
    assert np.array_equal(exact(grey), np.repeat(np.asarray(grey)[:, :, None], 3, 2))
    alpha = np.tile(np.linspace(0, 255, 48).round().astype(np.uint8), (40, 1))
    with_alpha = Image.fromarray(np.dstack([np.asarray(image), alpha]), "RGBA")
    a = alpha[..., None] / 255
    assert np.abs(exact(with_alpha) - (base * a + 255 * (1 - a))).max() <= 1  # 8-bit compositing rounds once
    la = Image.fromarray(np.dstack([np.asarray(grey), alpha]), "LA")
    assert np.abs(exact(la) - (np.asarray(grey)[..., None] * a + 255 * (1 - a))).max() <= 1
    palette = image.quantize(16)
    assert np.array_equal(exact(palette), np.asarray(palette.convert("RGB")))
    hole = np.asarray(palette) == 3
    clear = np.asarray(rgb(encoded(palette, "PNG", transparency=3)))
    assert hole.any() and (clear[hole] == 255).all()
    assert np.array_equal(clear[~hole], np.asarray(palette.convert("RGB"))[~hole])
    one = Image.fromarray((np.asarray(grey) > 127).astype(np.uint8) * 255).convert("1")
    assert np.array_equal(exact(one), np.asarray(one.convert("RGB")))


def test_sixteen_bits_keep_their_range():
    """65535 is white and 32896 the middle: Pillow's own conversion clips all above 255."""
    deep = np.linspace(0, 65535, 48 * 40).round().reshape(40, 48)
    got = exact(Image.fromarray(deep.astype(np.uint16)))
    assert np.array_equal(got, np.repeat((deep / 257).round().astype(np.uint8)[..., None], 3, 2))


def test_cmyk_jpegs_come_out_as_they_went_in():
    image = picture(0)
    got = np.asarray(rgb(encoded(image.convert("CMYK"), quality=98, subsampling=0))).astype(float)
    assert np.abs(got - np.asarray(image)).mean() < 2  # JPEG at 98 %; inverted it would be some 100 off


@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation_is_exifs(tag):
    turns = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
             5: lambda a: a.swapaxes(0, 1), 6: lambda a: a[::-1].swapaxes(0, 1),
             7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: a.swapaxes(0, 1)[::-1]}  # fmt: skip
    exif = Image.Exif()
    exif[274] = tag
    data = encoded(picture(1), "PNG", exif=exif)
    upright = turns[tag](np.asarray(picture(1)))
    assert np.array_equal(np.asarray(rgb(data)), upright)
    assert oriented_size(opened(data)) == upright.shape[1::-1]


def lanczos(row: np.ndarray, size: int, start: float, end: float) -> np.ndarray:
    """fp64 [size, ...]: the stretch start ... end of an axis of samples, Lanczos a = 3, widened where it shrinks."""
    scale = (end - start) / size
    wide = max(scale, 1.0)
    centres = start + (np.arange(size) + 0.5) * scale
    x = (np.arange(len(row)) + 0.5 - centres[:, None]) / wide
    w = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return np.tensordot(w / w.sum(1, keepdims=True), row, 1)


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (64, 32), (128, 200)])
@pytest.mark.parametrize("place", [MIDDLE, (0.0, 1.0), (0.3, 0.8)])
def test_resize_is_lanczos_of_the_window(size, place):
    """Against fp64 from the formula. Pillow rounds to 8 bits between its passes and at the end, its weights to 22 bits:
    half a level each, the first spread by weights whose absolute values sum to at most 1.4."""
    image = picture(2, 90, 60)
    left, top, right, bottom = window(image.size, size, place)
    assert (right - left) / (bottom - top) == pytest.approx(size[1] / size[0])
    assert left == pytest.approx(place[0] * (90 - (right - left))) and top == pytest.approx(
        place[1] * (60 - (bottom - top))
    )
    wide = lanczos(np.asarray(image).astype(np.float64).swapaxes(0, 1), size[1], left, right).swapaxes(0, 1)
    truth = lanczos(wide.clip(0, 255), size[0], top, bottom).clip(0, 255)
    got = fitted(image, size, place)
    assert got.shape == (*size, 3) and np.abs(got - truth).max() <= 0.5 + 0.5 * 1.4 + 0.05


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_pictures_have_their_reason(name):
    data, why = BAD_IMAGES[name]
    with pytest.raises(BadSample) as caught:
        PilDecoder().decode(data, (32, 32), MIDDLE)
    assert caught.value.reason == why


def test_a_cameras_jpeg_with_a_preview_behind_it_is_one_picture():
    out = io.BytesIO()
    picture(0, 64, 64).save(out, "MPO", save_all=True, append_images=[picture(1, 32, 32)])
    first = np.asarray(Image.open(io.BytesIO(out.getvalue())))
    assert np.array_equal(PilDecoder().decode(out.getvalue(), (64, 64), MIDDLE), first)


def test_spoiled_exif_loses_its_turn_alone():
    """Of a WebP, whose EXIF Pillow hands on unread; the picture is used, upright as it is stored."""
    exif = Image.Exif()
    exif[274] = 6
    data = encoded(picture(1), "WEBP", lossless=True, exif=exif)
    broken = data.replace(b"MM\0*", b"M;\0*")
    assert broken != data and oriented_size(opened(broken)) == (48, 40)
    assert np.array_equal(np.asarray(rgb(broken)), np.asarray(picture(1)))


@pytest.mark.filterwarnings("ignore")  # what Pillow says of them
@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "WEBP", "AVIF", "BMP", "JPEG"])
def test_spoiled_bytes_are_a_reason_whatever_they_are(kind):
    """Bytes changed, cut out or cut off at random: a picture, or BadSample. Anything else would end a run."""
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    r, bad = random.Random(0), 0
    several = [encoded(picture(0), kind)]
    if kind in ("PNG", "GIF"):
        several.append(encoded(picture(1).quantize(16), kind, save_all=True, append_images=[picture(2).quantize(16)]))
        several.append(encoded(picture(1).quantize(16), kind))
    for n in range(400):
        data = bytearray(several[n % len(several)])
        for _ in range(r.choice([1, 1, 2, 5, 20])):
            at = r.randrange(min(len(data), 300) if r.random() < 0.6 else len(data))
            if r.random() < 0.8:
                data[at] = r.randrange(256)
            else:
                data = data[: max(at, 2)] + data[at + r.randrange(8) :] if r.random() < 0.5 else data[: max(at, 2)]
        for use in (plain_jpeg, lambda d: oriented_size(opened(d)), lambda d: PilDecoder().decode(d, (16, 16), MIDDLE)):
            try:
                use(bytes(data))
            except BadSample:
                bad += 1
    assert bad > 100


def test_what_dali_gets():
    assert plain_jpeg(jpeg(0)) == (48, 40)
    assert plain_jpeg(encoded(picture(0).convert("L"))) == (48, 40)
    for data in (encoded(picture(0), "PNG"), encoded(picture(0), "WEBP"), encoded(picture(0).convert("CMYK")),
                 jpeg(0)[:-200]):  # fmt: skip
        assert plain_jpeg(data) is None
    with pytest.raises(BadSample, match="not an image"):
        plain_jpeg(b"nothing")


def test_the_choice_of_a_decoder_is_said(monkeypatch, capsys):
    from senseflow.config import UserError
    from senseflow.data import dali

    cpu = torch.device("cpu")
    assert make_decoder("auto", 2, cpu).name == "pil" and capsys.readouterr().out == ""
    monkeypatch.setattr(dali, "why_not", lambda: "DALI does not import (x): pip install -e '.[dali]'")
    with pytest.raises(UserError, match=r"data.decoder = 'dali': DALI does not import \(x\): pip install"):
        make_decoder("dali", 2, cpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert make_decoder("auto", 2, torch.device("cuda")).name == "pil"
    assert "decoded by Pillow: DALI does not import (x)" in capsys.readouterr().out


def photos() -> list[bytes]:
    """JPEGs of all kinds of sampling, quality, orientation and size; a PNG, a grey one, CMYK, progressive."""
    found = []
    for i, (w, h) in enumerate([(640, 480), (333, 777), (512, 512), (64, 80), (1200, 900)]):
        for quality, sampling in ((95, 0), (80, 1), (60, 2)):
            exif = Image.Exif()
            exif[274] = 1 + (3 * i + sampling) % 8
            found.append(jpeg(i, w, h, quality=quality, subsampling=sampling, exif=exif))
    found += [jpeg(7, 300, 200, progressive=True), encoded(picture(8, 200, 300).convert("L"))]
    return [*found, encoded(picture(9, 300, 300), "PNG"), encoded(picture(9, 300, 300).convert("CMYK"))]


@with_dali
@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=[pytest.mark.gpu, on_gpu])])
def test_dali_and_pillow_give_the_same_pictures(device):
    """Mean difference within 1.5 of 255 for every picture, at three sizes: down, up and another aspect. What is left on
    the CPU is rounding: DALI rounds once, Pillow between its two passes too; a file at its own size is equal."""
    dali, pil = DaliDecoder(2, None if device == "cpu" else 0), PilDecoder()
    jobs = [(data, (i / 20 % 1, 0.5)) for i, data in enumerate(photos())]
    for size in ((512, 512), (256, 384), (64, 64)):
        for (data, place), got in zip(jobs, dali.decode_batch(jobs, size), strict=True):
            assert not isinstance(got, BadSample)
            picture_ = got.cpu().numpy() if isinstance(got, torch.Tensor) else got
            assert picture_.shape == (*size, 3) and picture_.dtype == np.uint8
            gap = np.abs(picture_.astype(float) - pil.decode(data, size, place)).mean()
            assert gap <= (0.5 if device == "cpu" else 1.5)
    if device == "cpu":
        plain = [(jpeg(3, 512, 512, quality=q), MIDDLE) for q in (60, 95)]
        for (data, _), got in zip(plain, dali.decode_batch(plain, (512, 512)), strict=True):
            assert np.array_equal(got, np.asarray(Image.open(io.BytesIO(data))))


@with_dali
def test_a_picture_does_not_depend_on_its_neighbours(capsys):
    """Whatever is in a batch with it, a file DALI cannot decode too: so ranks and restarts see the same pixels."""
    broken = bytearray(jpeg(0, 300, 300))
    at = broken.index(b"\xff\xc4") + 4
    broken[at : at + 17] = b"\xff" * 17
    jobs = [(jpeg(i, 200 + 31 * i, 160), (0.1 * i, 0.5)) for i in range(5)]
    alone = [np.asarray(DaliDecoder(2).decode_batch([job], (96, 96))[0]) for job in jobs]
    jobs.insert(3, (bytes(broken), MIDDLE))
    together = DaliDecoder(2).decode_batch(jobs, (96, 96))
    assert isinstance(together.pop(3), BadSample)
    for a, b in zip(alone, together, strict=True):
        assert np.array_equal(a, b)
    assert capsys.readouterr().out == ""  # Pillow cannot decode it either


@with_dali
def test_what_dali_alone_cannot_decode_is_said_once(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no memory\nand a trace")

    monkeypatch.setattr(DaliDecoder, "_run", fail)
    dali, jobs = DaliDecoder(1), [(jpeg(i), MIDDLE) for i in range(3)]
    for found, (data, place) in zip(dali.decode_batch(jobs, (32, 32)), jobs, strict=True):
        assert np.array_equal(found, PilDecoder().decode(data, (32, 32), place))
    assert capsys.readouterr().out == "data: what DALI cannot decode, Pillow does (no memory)\n"


@with_dali
def test_dali_names_the_same_faults_and_goes_on():
    dali = DaliDecoder(2)
    broken = bytearray(jpeg(0, 300, 300))
    at = broken.index(b"\xff\xc4") + 4
    broken[at : at + 17] = b"\xff" * 17  # no Huffman table; header and end are whole: DALI itself meets it
    assert plain_jpeg(bytes(broken)) == (300, 300)
    jobs = [
        (jpeg(1), MIDDLE),
        *((data, MIDDLE) for data, _ in BAD_IMAGES.values()),
        (bytes(broken), MIDDLE),
        (jpeg(2), MIDDLE),
    ]
    for _ in range(2):  # the second time with the pipeline that was built anew
        found = dali.decode_batch(jobs, (32, 32))
        reasons = [f.reason for f in found if isinstance(f, BadSample)]
        assert reasons[: len(BAD_IMAGES)] == [why for _, why in BAD_IMAGES.values()]
        assert reasons[len(BAD_IMAGES) :] == ["corrupt image"]
        for i, seed in ((0, 1), (len(jobs) - 1, 2)):
            assert np.abs(np.asarray(found[i]).astype(float) - fitted(rgb(jpeg(seed)), (32, 32), MIDDLE)).mean() < 0.5
