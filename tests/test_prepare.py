"""Caches: equal to the images they were made of, refused where they do not suit."""

import dataclasses
import json
import random
import shutil

import pytest
import torch
from data_sets import jpeg, write_bad_folder, write_folder
from tiny_pipelines import write_flux, write_klein, write_sd3, write_sdxl

from senseflow.cli import parse
from senseflow.config import UserError
from senseflow.data.cache import CHOICES, CacheReader, read_row
from senseflow.data.samples import BadSample
from senseflow.dist import World
from senseflow.encoding import Options
from senseflow.fields import to_dict
from senseflow.models.families import make_adapter
from senseflow.prepare import main as prepare
from senseflow.steps import encoded as with_latents
from senseflow.train import build, iterate, open_data
from senseflow.updates import Updates

pytest.importorskip("diffusers")
CPU = torch.device("cpu")
WRITE = {"sd35-medium": lambda f: write_sd3(f, medium=True), "sd35-large": write_sd3, "flux-dev": write_flux,
         "sdxl": write_sdxl, "flux2-klein": write_klein}  # fmt: skip
SMALL = [f"--{setting}" for setting in (
    "model.side=64", "model.text_length=16", "model.dtype=fp32", "train.precision=fp32", "data.batch=3",
    "data.workers=2", "train.gen_every=1", "isg.midpoint=uniform", "disc.taps=-1,2", "disc.size=28", "disc.width=8",
    "disc.downsample=1", "disc.backbone=",
)]  # fmt: skip
PREPARE = [s for s in SMALL if not s.startswith("--data.batch")]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SENSEFLOW_CACHE", str(tmp_path_factory.getbasetemp() / "senseflow-cache"))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """teachers(preset): its tiny pipeline, made once."""
    root, made = tmp_path_factory.mktemp("pipelines"), {}

    def teacher(preset: str) -> str:
        if preset not in made:
            made[preset] = str(WRITE[preset](root / preset))
        return made[preset]

    return teacher


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Nine pictures of three aspects, two with the same caption, one with two captions."""
    folder = write_folder(tmp_path_factory.mktemp("pictures"), 3, width=90, height=80)
    for i, (w, h) in enumerate([(120, 64), (64, 120), (128, 70), (66, 110), (70, 70), (90, 90)], 3):
        (folder / f"{i:04d}.jpg").write_bytes(jpeg(i, w, h))
        (folder / f"{i:04d}.txt").write_text("a red apple")
    (folder / "0008.json").write_text(json.dumps({"caption": ["a blue star", "a penguin"]}))
    return folder


def config(preset, teacher, data, *more):
    words = [preset, "--data", str(data), *SMALL, *more]
    return parse(words if preset == "tiny" else [*words, "--teacher", teacher], "").config


def batches(cfg, count=4):
    parts, data = build(cfg, CPU)
    found = [with_latents(parts, data.batch(i, cfg.data.batch), i) for i in range(count)]
    data.close()
    return found


SLOW = [pytest.param(preset, marks=pytest.mark.slow) for preset in ("sd35-medium", "sd35-large", "flux2-klein")]


@pytest.mark.parametrize("preset", [*SLOW, "flux-dev", "sdxl"])
def test_training_from_the_cache_is_training_from_the_images(preset, teachers, pictures, tmp_path):
    """The same batches (same order, captions, posterior noise), and the same losses and gradient norms over an epoch:
    the VAE and the encoders are run in other batches, which changes the last bits of their sums alone."""
    teacher, flags = teachers(preset), ["--data.buckets", "true"] if preset == "flux-dev" else []
    out = tmp_path / "cache"
    assert prepare([preset, "--teacher", teacher, "--data", str(pictures), "--out", str(out), *PREPARE, *flags]) == 0
    rows = []
    for source in (pictures, out):
        cfg = config(preset, teacher, source, *flags)
        parts, data = build(cfg, CPU)
        updates = Updates(cfg, parts)
        run = []
        for i in range(4):
            batch = with_latents(parts, data.batch(i, 3), i)
            metrics = iterate(cfg, parts, updates, batch, i)
            run.append((batch, {k: float(v) for k, v in metrics.items()}))
        data.close()
        rows.append(run)
    for (a, first), (b, second) in zip(*rows, strict=True):
        assert torch.equal(a.items, b.items) and torch.equal(a.pixels, b.pixels) and torch.equal(a.samples, b.samples)
        torch.testing.assert_close(b.latents, a.latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(b.cond.embeds, a.cond.embeds, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(b.cond.pooled, a.cond.pooled, rtol=1e-5, atol=1e-5)
        assert first == pytest.approx(second, rel=1e-3, abs=1e-5)
    assert len({tuple(batch.pixels.shape[2:]) for batch, _ in rows[0]}) == (3 if flags else 1)


def test_the_two_commands_of_the_docs_give_the_embedded_family_its_pictures(pictures, tmp_path):
    """`prepare --data pictures --out cache`, then `train --data cache`: the batches of `train --data pictures`."""
    out, found = tmp_path / "cache", []
    assert prepare(["--data", str(pictures), "--out", str(out)]) == 0
    for source in (pictures, out):
        cfg = parse(["--data", str(source)], "").config
        data = open_data(cfg, make_adapter(cfg.model, CPU), torch.nn.Identity(), World(device=CPU))
        found.append([data.batch(i, 4) for i in range(3)])
        data.close()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.pixels, b.pixels) and torch.equal(a.latents, b.latents) and torch.equal(a.items, b.items)
        assert a.pixels.shape == (4, 3, 32, 32)
        torch.testing.assert_close(b.cond.embeds, a.cond.embeds, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(b.cond.pooled, a.cond.pooled, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def sdxl_cache(teachers, pictures, tmp_path_factory):
    """(flags, folder) of a cache in shards of two."""
    out = tmp_path_factory.mktemp("caches") / "sdxl"
    flags = ["sdxl", "--teacher", teachers("sdxl"), "--data", str(pictures), *PREPARE, "--shard", "2", "--batch", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SENSEFLOW_CACHE", str(tmp_path_factory.getbasetemp() / "senseflow-cache"))
        assert prepare([*flags, "--out", str(out)]) == 0
    return flags, out


def test_what_a_cache_holds(sdxl_cache):
    """Each distinct caption once, at full length; mean and logvar of the VAE; the sample with two captions has both."""
    _, out = sdxl_cache
    record = json.loads((out / "index.json").read_text())
    assert (record["samples"], record["prompts"], record["tensors"]) == (9, 6, ["logvar", "mean", "pixels"])
    assert len(record["files"]) == 1 + 5 + 3
    reader = CacheReader(out)
    captions = [list(reader.prompts[reader.first[i] : reader.first[i + 1]]) for i in range(9)]
    assert captions == [[0], [1], [2], [3], [3], [3], [3], [3], [4, 5]]
    shapes = {k: tuple(v.shape) for k, v in reader.prompt(0).items()}
    assert shapes == {"embeds": (77, 32), "pooled": (16,)}
    found = read_row(str(out / "shards" / "images-00004.safetensors"), "mean.64x64", 0)
    assert found.shape == (4, 8, 8) and found.dtype == torch.float32 and found.abs().sum() > 0
    draws = {
        reader.load(type("T", (), dict(item=8, caption=u))())["pooled"].sum().item() for u in (0.0, 0.49, 0.5, 0.99)
    }
    assert len(draws) == 2


def test_a_cut_shard_is_a_reason(sdxl_cache, tmp_path):
    shard = tmp_path / "images-00000.safetensors"
    data = (sdxl_cache[1] / "shards" / shard.name).read_bytes()
    for size, why in ((4, "corrupt shard"), (100, "corrupt shard"), (len(data) - 30, "corrupt shard")):
        path = tmp_path / f"{size}.safetensors"
        path.write_bytes(data[:size])
        with pytest.raises(BadSample, match=why):
            read_row(str(path), "pixels.64x64", 1)
    with pytest.raises(BadSample, match="missing file"):
        read_row(str(tmp_path / "none"), "pixels.64x64", 1)


def test_spoiled_headers_are_a_reason_whatever_they_say(sdxl_cache, tmp_path):
    """A digit of the header changed at random: a row of the shape it should have, or BadSample; never another row."""
    shard = sdxl_cache[1] / "shards" / "images-00001.safetensors"
    data, r, bad = shard.read_bytes(), random.Random(0), 0
    length = int.from_bytes(data[:8], "little")
    good = read_row(str(shard), "mean.64x64", 1)
    for n in range(300):
        spoiled = bytearray(data)
        spoiled[8 + r.randrange(length)] = ord(r.choice('0123456789"[]{},:x'))
        path = tmp_path / f"{n}.safetensors"
        path.write_bytes(spoiled)
        try:
            found = read_row(str(path), "mean.64x64", 1)
        except BadSample as error:
            assert error.reason == "corrupt shard"
            bad += 1
        else:
            assert found.shape == good.shape and found.dtype == good.dtype
    assert bad > 100
    with pytest.raises(BadSample, match=r"mean\.64x64 has 2 rows, not 3"):
        read_row(str(shard), "mean.64x64", 2)


@pytest.mark.parametrize("name", ["settings.json", "index.json", "index.safetensors"])
def test_a_spoiled_cache_is_one_line(sdxl_cache, tmp_path, name):
    made, whole = sdxl_cache
    out = tmp_path / "cache"
    shutil.copytree(whole, out)
    (out / name).write_bytes((out / name).read_bytes()[:-20])
    with pytest.raises(UserError, match=f"{name} cannot be read .*: copy the cache again, or prepare another"):
        build(config("sdxl", made[2], out), CPU)


def test_a_cache_of_another_format_is_refused(sdxl_cache, tmp_path):
    made, whole = sdxl_cache
    out = tmp_path / "cache"
    shutil.copytree(whole, out)
    (out / "index.json").write_text((out / "index.json").read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="has format 2, allowed is 1"):
        build(config("sdxl", made[2], out), CPU)


def test_what_is_no_cache_is_not_written_into(sdxl_cache, pictures, capsys):
    flags = sdxl_cache[0]
    before = sorted(path.name for path in pictures.iterdir())
    assert prepare([*flags, "--out", str(pictures)]) == 2
    assert "is no cache, it holds 0000.jpg: give a folder of its own" in capsys.readouterr().err
    assert sorted(path.name for path in pictures.iterdir()) == before


REFUSED = [
    (["--model.dtype", "bf16"], "model.dtype is 'fp32' in the cache and 'bf16' here"),
    (["--model.side", "32"], "model.side is 64 in the cache and 32 here"),
    (["--data.min_side", "32"], "data.min_side is 0 in the cache and 32 here"),
    (["--data.captions", "text"], "data.captions is '' in the cache and 'text' here"),
    (["--data.crop", "random"], "data.crop is 'center' in the cache and 'random' here"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_a_cache_of_other_settings_is_refused_by_name(sdxl_cache, flags, message, capsys):
    made, out = sdxl_cache
    with pytest.raises(UserError) as caught:
        build(config("sdxl", made[2], out, *flags), CPU)
    assert message in str(caught.value)
    if "random" not in flags:
        assert prepare([*made, *flags, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err


def test_a_cache_of_other_weights_or_another_family_is_refused(sdxl_cache, teachers, pictures, tmp_path, capsys):
    made, out = sdxl_cache
    with pytest.raises(UserError, match=r"model.family is 'sdxl' in the cache and 'flux' here"):
        build(config("flux-dev", teachers("flux-dev"), out), CPU)
    other = tmp_path / "teacher"
    shutil.copytree(teachers("sdxl"), other)
    text = other / "text_encoder" / "config.json"
    text.write_text(text.read_text() + " ")
    with pytest.raises(UserError, match=r"weights.text is '[0-9a-f]{64}' in the cache"):
        build(config("sdxl", str(other), out), CPU)
    folder = write_folder(tmp_path / "pictures", 2)
    assert prepare([*made[:3], "--data", str(folder), *made[5:], "--out", str(out)]) == 2
    assert "source is" in capsys.readouterr().err
    assert set(CHOICES) <= set(to_dict(config("sdxl", made[2], out))["data"])


def test_options_of_what_is_kept(teachers, pictures, tmp_path, capsys):
    """The mean alone in half precision, small pixels, and the backbone's features, whose size is said first."""
    base = ["sdxl", "--teacher", teachers("sdxl"), "--data", str(pictures), *PREPARE]
    small, no_pixels = tmp_path / "small", tmp_path / "none"
    flags = ["--latents", "mean", "--latents-dtype", "fp16", "--pixels", "32", "--features", "--out", str(small)]
    assert prepare([*base, *flags]) == 0
    assert "features 0.00614 MB" in capsys.readouterr().out  # 2 taps x 384 x 2 x 2 patches x 2 bytes each
    cfg = config("sdxl", teachers("sdxl"), small)
    parts, data = build(cfg, CPU)
    batch = with_latents(parts, data.batch(0, 3), 0)
    (image,) = batches(config("sdxl", teachers("sdxl"), pictures), 1)
    assert batch.pixels.shape == (3, 3, 32, 32) and batch.logvar is None and batch.reference is not None
    mean = parts.adapter.vae.encode(image.pixels).latent_dist.mean * 0.13025
    torch.testing.assert_close(batch.latents, mean, rtol=2**-10, atol=2**-13)  # fp16 keeps 11 bits
    vfm = parts.vfm.features(image.pixels, (-1, 2), 28)
    for a, b in zip(batch.reference, vfm, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-8, atol=1e-6)  # bf16 keeps 8
    assert "dmd" in iterate(cfg, parts, Updates(cfg, parts), batch, 0)
    with pytest.raises(UserError, match=r"disc.taps is \[-1, 2\] in the cache and \[2\] here"):
        build(config("sdxl", teachers("sdxl"), small, "--disc.taps", "2"), CPU)
    assert prepare([*base, "--pixels", "0", "--out", str(no_pixels)]) == 0
    with pytest.raises(UserError, match=r"disc.kind = 'vfm': this cache holds no pixels"):
        build(config("sdxl", teachers("sdxl"), no_pixels), CPU)
    assert (
        batches(config("sdxl", teachers("sdxl"), no_pixels, "--disc.kind", "fake_features"), 1)[0].latents.shape[0] == 3
    )


def test_prompts_alone_and_the_teachers_own_samples(teachers, tmp_path, capsys):
    """Without images: one line says what to add. With --teacher-samples the cache is as one of images."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\na penguin\na red apple\na star\n")
    teacher, alone = teachers("flux-dev"), ["--rollout.backward_prob", "1", "--disc.kind", "none"]
    with pytest.raises(UserError, match=r"has no images: add --rollout.backward_prob 1 --disc.kind none"):
        build(config("flux-dev", teacher, prompts), CPU)
    base = ["flux-dev", "--teacher", teacher, "--data", str(prompts), *PREPARE]
    assert prepare([*base, "--out", str(tmp_path / "alone")]) == 0
    with pytest.raises(UserError, match="has no images"):
        build(config("flux-dev", teacher, tmp_path / "alone"), CPU)
    rows = []
    for source in (prompts, tmp_path / "alone"):
        cfg = config("flux-dev", teacher, source, *alone)
        parts, data = build(cfg, CPU)
        batch = with_latents(parts, data.batch(0, 3), 0)
        rows.append({k: float(v) for k, v in iterate(cfg, parts, Updates(cfg, parts), batch, 0).items()})
        data.close()
    assert rows[0] == pytest.approx(rows[1], rel=1e-3) and "dmd" in rows[0] and "adv" not in rows[0]
    assert prepare([*base, "--out", str(tmp_path / "own"), "--teacher-samples", "2"]) == 0
    cfg = config("flux-dev", teacher, tmp_path / "own")
    parts, data = build(cfg, CPU)
    batch = with_latents(parts, data.batch(0, 3), 0)
    shown = parts.adapter.decode(batch.latents).clamp(-1, 1)
    assert (shown - batch.pixels).abs().max() <= 0.51 / 127.5 and batch.pixels.std() > 0.05
    assert "adv" in iterate(cfg, parts, Updates(cfg, parts), batch, 0)
    data.close()
    folder = str(write_folder(tmp_path / "pictures", 1))
    assert prepare([*base[:3], "--data", folder, "--teacher-samples", "2", "--out", str(tmp_path / "x"), *PREPARE]) == 2
    assert "has images of its own" in capsys.readouterr().err


def test_bad_samples_are_left_out_and_listed(teachers, tmp_path, capsys):
    """The cache of a set with every bad case: exact counts by reason, the rest as if the bad were not there."""
    expected = write_bad_folder(tmp_path / "set", 300)
    out = tmp_path / "cache"
    flags = ["sdxl", "--teacher", teachers("sdxl"), *PREPARE, "--shard", "100", "--batch", "16"]
    assert prepare([*flags, "--data", str(tmp_path / "set"), "--out", str(out)]) == 0
    record = json.loads((out / "index.json").read_text())
    assert record["skipped"] == expected and record["samples"] == 302
    listed = [json.loads(line)["reason"] for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {why: listed.count(why) for why in set(listed)} == expected
    write_bad_folder(tmp_path / "worse", 30)
    assert prepare([*flags, "--data", str(tmp_path / "worse"), "--out", str(tmp_path / "c")]) == 2
    assert "samples cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "x"], "--out is missing"),
        (["--out", "x"], "--data is missing"),
        (["--out", "x", "--data", "y", "--latents", "median"], "--latents 'median': allowed is posterior | mean"),
        (["--out", "x", "--data", "y", "--shard", "0"], "--shard 0: allowed is 1 or more"),
        (["--out", "x", "--data", "y", "--shard", "many"], "--shard 'many': allowed is a whole number"),
        (["--out", "x", "--data", "/nowhere"], "does not exist"),
        (["--out", "x", "--data", "y", "--data.crop", "random"], "a cache holds one crop"),
        (["--out", "x", "--verify"], "--out x holds no cache: name the folder that senseflow.prepare made"),
        (["--out", "unfinished", "--verify"], "cache unfinished is not finished"),
        (["--out", "x", "--data", "unfinished"], "--data unfinished is a cache already: train with it"),
    ],
)
def test_bad_flags_are_one_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "settings.json").write_text("{}")
    assert prepare(flags) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_help_names_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        prepare(["--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "[default 256]" in printed and "[a switch]" in printed
    assert all(f"  --{field.name.replace('_', '-')} " in printed for field in dataclasses.fields(Options))
