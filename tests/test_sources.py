"""Every form of source: what is found, in which order, with which captions; random access; indices; filters."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from data_sets import BAD_IMAGES, caption, encoded, jpeg, picture, write_bad_folder, write_folder, write_tar, write_tars
from PIL import Image

from senseflow.config import Data, UserError
from senseflow.data import tars
from senseflow.data.filters import HEAD, select
from senseflow.data.samples import BadSample, captions_of
from senseflow.data.sources import open_source
from senseflow.data.tars import TarSource, index_tar, text_members


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SENSEFLOW_CACHE", str(tmp_path / "cache"))


def reasons(source):
    found = {}
    for skip in source.dropped:
        found[skip.reason] = found.get(skip.reason, 0) + skip.samples
    return found


def read_all(source):
    """(key -> image bytes, captions), the reasons of what does not read."""
    good, bad = {}, {}
    for i in range(len(source)):
        try:
            record = source.read(i)
            good[record.key] = (record.image, record.captions)
        except BadSample as error:
            bad[source.key(i)] = error.reason
    return good, bad


def test_a_folder_with_three_kinds_of_captions(tmp_path):
    write_folder(tmp_path / "set", 3)
    sub = tmp_path / "set" / "sub"
    sub.mkdir()
    (sub / "x.png").write_bytes(encoded(picture(5), "PNG"))
    (sub / "x.json").write_text(json.dumps({"caption": ["one", " two ", ""], "long": "a long one"}))
    (sub / "y.webp").write_bytes(encoded(picture(6), "WEBP"))
    (sub / "metadata.jsonl").write_text(json.dumps({"file_name": "y.webp", "text": "why"}) + "\n")
    (sub / "notes.doc").write_text("passed over")
    (sub / ".hidden.jpg").write_bytes(b"")
    source = open_source(str(tmp_path / "set"))
    good, bad = read_all(source)
    assert bad == {} and source.dropped == []
    assert list(good) == ["0000.jpg", "0001.jpg", "0002.jpg", "sub/x.png", "sub/y.webp"]
    assert good["0001.jpg"] == (jpeg(1), (caption(1),))
    assert good["sub/x.png"][1] == ("one", "two") and good["sub/y.webp"][1] == ("why",)
    named = open_source(str(tmp_path / "set" / "sub"), ["long", "text"])
    assert read_all(named)[0]["x.png"][1] == ("a long one",)
    assert named.fingerprint != source.fingerprint
    before = source.fingerprint
    text = (tmp_path / "set" / "0001.txt").read_text()
    (tmp_path / "set" / "0001.txt").write_text("another caption altogether")
    assert open_source(str(tmp_path / "set")).fingerprint != before
    (tmp_path / "set" / "0001.txt").write_text(text)
    os.rename(tmp_path / "set", tmp_path / "moved")
    assert open_source(str(tmp_path / "moved")).fingerprint == before
    (tmp_path / "moved" / "0003.jpg").write_bytes(jpeg(3))
    (tmp_path / "moved" / "0003.txt").write_text("new")
    assert open_source(str(tmp_path / "moved")).fingerprint != before


def test_a_metadata_file_for_the_folders_below_it(tmp_path):
    """As Hugging Face's image folders have it: one at the top, file_name with the subfolder."""
    folder = write_folder(tmp_path / "set" / "train", 3)
    (folder / "0001.txt").unlink()
    names = ["train/0000.jpg", "./train/0001.jpg", "train/0001.jpg", "train/gone.jpg", "../set/train/0002.jpg"]
    lines = [json.dumps({"file_name": name, "text": f"row {i}"}) for i, name in enumerate(names)]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(lines))
    source = open_source(str(tmp_path / "set"))
    captions = {key: texts for key, (_, texts) in read_all(source)[0].items()}
    assert captions == {"train/0000.jpg": ("row 0",), "train/0001.jpg": ("row 1",), "train/0002.jpg": (caption(2),)}
    assert reasons(source) == {"duplicate key": 1, "missing file": 2}


def test_names_that_are_not_utf8_and_links_to_nowhere(tmp_path):
    folder = write_folder(tmp_path / "set", 2)
    for ext in (b".jpg", b".txt"):
        os.rename(os.fsencode(folder / "0000") + ext, os.fsencode(folder) + b"/caf\xe9" + ext)
    (folder / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "link.txt").write_text("a link")
    source = open_source(str(folder))
    assert [captions for _, captions in read_all(source)[0].values()] == [(caption(1),), (caption(0),)]
    assert reasons(source) == {"missing file": 1}
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("caf\udce9", "two\nlines"):
            for ext, data in (("jpg", jpeg(0)), ("txt", name.encode(errors="replace"))):
                info = tarfile.TarInfo(f"{name}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    for _ in range(2):  # from the tar, then from its index
        found = open_source(str(path))
        assert list(read_all(found)[0]) == [f"{path}/caf\udce9", f"{path}/two\nlines"]


def test_what_is_in_a_folder_but_no_file(tmp_path, monkeypatch):
    """A pipe (reading it would never end), a metadata.jsonl that links to nowhere, a folder that cannot be listed."""
    folder = write_folder(tmp_path / "set", 2)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "pipe.txt").write_text("a pipe")
    write_folder(folder / "sub", 1)
    (folder / "sub" / "metadata.jsonl").symlink_to(tmp_path / "nowhere")
    write_folder(folder / "closed", 1)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    source = open_source(str(folder))
    assert list(read_all(source)[0]) == ["0000.jpg", "0001.jpg", "sub/0000.jpg"]
    found = {skip.key: skip.reason for skip in source.dropped}
    assert found == {
        "pipe.jpg": "unreadable file", "sub/metadata.jsonl": "missing file", "closed": "unreadable folder",
    }  # fmt: skip


def test_linked_folders_are_read_and_a_ring_ends(tmp_path):
    write_folder(tmp_path / "elsewhere", 2)
    folder = write_folder(tmp_path / "set", 1)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "ring").symlink_to(folder)
    source = open_source(str(folder))
    assert list(read_all(source)[0]) == ["0000.jpg", "linked/0000.jpg", "linked/0001.jpg"] and reasons(source) == {}


def test_a_folder_with_everything_bad_gives_the_exact_counts(tmp_path):
    expected = write_bad_folder(tmp_path / "set", 10)
    source = open_source(str(tmp_path / "set"))
    counts = reasons(source)
    from senseflow.data.pil import PilDecoder

    usable = 0
    for i in range(len(source)):
        try:
            PilDecoder().decode(source.read(i).image, (16, 16), (0.5, 0.5))
            usable += 1
        except BadSample as error:
            counts[error.reason] = counts.get(error.reason, 0) + 1
    assert counts == expected and usable == 12  # ten, the PNG called .jpg, and more/a.jpg


def test_tars_give_what_went_in_and_are_indexed_once(tmp_path, monkeypatch):
    write_tars(tmp_path / "set", 3, 4)
    source = open_source(str(tmp_path / "set"))
    good, bad = read_all(source)
    assert bad == {} and len(good) == 12
    for i, (key, (image, captions)) in enumerate(good.items()):
        assert key == f"{tmp_path}/set/{i // 4:05d}.tar/{i:06d}"
        assert (image, captions) == (encoded(picture(i)), (caption(i),))
    assert source.read(5, head=10).image == encoded(picture(5))[:10]
    monkeypatch.setattr(tars, "index_tar", lambda *_: pytest.fail("the index was there"))
    again = open_source(str(tmp_path / "set" / "{00000..00002}.tar"))
    assert read_all(again)[0] == good and again.fingerprint == source.fingerprint
    assert len(open_source(str(tmp_path / "set" / "0000[12].tar"))) == 8
    monkeypatch.undo()
    monkeypatch.setenv("SENSEFLOW_CACHE", str(tmp_path / "cache"))
    write_tar(tmp_path / "set" / "00001.tar", [("new", {"jpg": jpeg(1), "txt": b"new"})])
    assert len(open_source(str(tmp_path / "set"))) == 9  # changed, so looked through again


def test_captions_of_tars_by_name(tmp_path):
    path = write_tar(tmp_path / "a.tar", [
        ("a/one", {"jpg": jpeg(0), "txt": b"plain", "long.txt": b"long", "json": b'{"alt": ["x", "y"]}'}),
        ("a/two", {"png": encoded(picture(1), "PNG"), "txt": b"\xef\xbb\xbfplain too"}),
    ])  # fmt: skip
    assert [c for _, c in read_all(open_source(str(path)))[0].values()] == [("plain",), ("plain too",)]
    named = open_source(str(path), ["long", "alt"])
    good, bad = read_all(named)
    assert good[f"{path}/a/one"][1] == ("long", "x", "y") and bad == {f"{path}/a/two": "no caption"}


def test_tars_with_everything_bad(tmp_path):
    good = {"jpg": jpeg(0), "txt": b"fine"}
    samples = [("a", good), ("b", {"jpg": jpeg(1)}), ("c", {"txt": b"no image"}), ("a", good), ("d", good),
               ("e", {"jpg": jpeg(2), "jpeg": jpeg(2), "txt": b"twice"}), ("f", good)]  # fmt: skip
    folder = tmp_path / "set"
    whole = write_tar(folder / "0.tar", samples)
    source = TarSource([str(whole)])
    assert [source.key(i).rpartition("/")[2] for i in range(len(source))] == ["a", "d", "f"]
    assert reasons(source) == {"no caption": 1, "no image": 1, "duplicate key": 2}
    dotted = {"v2.jpg": jpeg(3), "v2.txt": b"webdataset's key is `photo`, and its member v2.jpg is no picture"}
    source = TarSource([str(write_tar(folder / "dots" / "0.tar", [("f", good), ("photo", dotted), ("._f", good)]))])
    assert len(source) == 1 and [(s.key.rpartition("/")[2], s.reason, s.detail) for s in source.dropped] == [
        ("photo", "no image", "photo.v2.jpg: a name ends at its first dot")]  # fmt: skip
    data = write_tar(folder / "1.tar", [(f"{i}", good) for i in range(5)]).read_bytes()
    one = index_tar(str(folder / "1.tar"), text_members(())).members
    inside = int(one[3, 0, 0]) + 100  # in the fourth picture
    (folder / "1.tar").write_bytes(data[:inside])
    (folder / "2.tar").write_bytes(data[: int(one[2, 0, 0]) - 512])  # between two samples, without an end
    (folder / "3.tar").write_bytes(b"\x1f\x8b" + bytes(range(256)) * 40)
    (folder / "4.tar").write_bytes(b"")
    source = open_source(str(folder))
    assert len(source) == 3 + 3 + 2
    counts = reasons(source)
    assert counts["half tar"] == 2 and counts["unreadable tar"] == 2 * 3  # 8 samples in 3 readable tars
    assert reasons(open_source(str(folder))) == counts  # as the index recorded it
    with pytest.raises(UserError, match=r"no sample can be used: .*3.tar: unreadable tar"):
        open_source(str(folder / "3.tar"))


def test_a_shard_that_shrinks_or_vanishes_is_a_reason_and_no_crash(tmp_path):
    write_tars(tmp_path / "set", 2, 3)
    source = open_source(str(tmp_path / "set"))
    path = tmp_path / "set" / "00001.tar"
    path.write_bytes(path.read_bytes()[:2000])
    path.with_name("00000.tar").unlink()
    assert set(read_all(source)[1].values()) == {"missing file", "half tar"}


def test_img2dataset_output(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_tars(tmp_path / "set", 2, 3)
    for s in range(2):
        keys = [f"{i:06d}" for i in range(s * 3, s * 3 + 3)]
        rows = [dict(key=k, caption=f"from the table {k}", recaption=f"better {k}", width=48, height=40, aesthetic=5.5,
                     status="success") for k in keys[::-1]]  # fmt: skip
        pq.write_table(
            pa.Table.from_pylist([*rows, dict(rows[0], key="failed")]), tmp_path / "set" / f"{s:05d}.parquet"
        )
    source = open_source(str(tmp_path / "set"))
    good, bad = read_all(source)
    assert bad == {}
    assert [c for _, c in good.values()] == [(f"from the table {i:06d}",) for i in range(6)]
    assert source.read(4).meta["aesthetic"] == 5.5 and source.read(4).image == encoded(picture(4))
    both = open_source(str(tmp_path / "set"), ["recaption", "caption"])
    assert both.read(1).captions == ("better 000001", "from the table 000001")
    with pytest.raises(UserError, match=r"data.captions: .*00000.parquet has no column 'prose': it has key, caption"):
        open_source(str(tmp_path / "set"), ["prose"])
    (tmp_path / "set" / "00001.parquet").write_bytes(b"PAR1 and no more")
    assert reasons(open_source(str(tmp_path / "set"))) == {"unreadable parquet": 3}


def test_a_table_beside_a_tar_is_part_of_the_source(tmp_path):
    """Other captions or scores are other data, though the tar is the same; text that is no UTF-8 is a reason."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_tars(tmp_path / "set", 1, 3)

    def opened(captions, aesthetic):
        texts = pa.array(captions, pa.binary()).view(pa.string())
        table = pa.table({"key": [f"{i:06d}" for i in range(3)], "caption": texts, "aesthetic": aesthetic})
        pq.write_table(table, tmp_path / "set" / "00000.parquet")
        return open_source(str(tmp_path / "set"))

    first = opened([b"one", b"two", b"three"], [4.0, 5.0, 6.0])
    assert select(first, Data(min_aesthetic=5.0)).keep.tolist() == [1, 2]
    second = opened([b"one", b"two", b"three"], [6.0, 5.0, 4.0])
    assert select(second, Data(min_aesthetic=5.0)).keep.tolist() == [0, 1]
    third = opened([b"one", b"caf\xe9", b"three"], [6.0, 5.0, 4.0])
    assert len({first.fingerprint, second.fingerprint, third.fingerprint}) == 3
    good, bad = read_all(third)
    assert [captions for _, captions in good.values()] == [("one",), ("three",)]
    assert list(bad.values()) == ["caption is not UTF-8"]
    prompts = open_source(str(tmp_path / "set" / "00000.parquet"))
    assert [prompts.read(i).captions for i in range(len(prompts))] == [("one",), ("three",)]
    assert reasons(prompts) == {"caption is not UTF-8": 1}


def test_the_released_json_list(tmp_path):
    write_folder(tmp_path / "images", 3)
    paths = ["images/0000.jpg", str(tmp_path / "images/0001.jpg"), "images/0000.jpg", "gone.jpg"]
    lists = dict(keys=["k0", "k1", "k0", "k2"], prompts=["p0", "p1", "again", "p2"], image_paths=paths)
    (tmp_path / "list.json").write_text(json.dumps(lists))
    source = open_source(str(tmp_path / "list.json"))
    good, bad = read_all(source)
    assert good == {"k0": (jpeg(0), ("p0",)), "k1": (jpeg(1), ("p1",))}
    assert bad == {"k2": "missing file"} and reasons(source) == {"duplicate key": 1}
    (tmp_path / "list.json").write_text(json.dumps(dict(lists, prompts=["p0"])))
    with pytest.raises(UserError, match=r"'prompts' must be a list as long as 'image_paths' \(4\)"):
        open_source(str(tmp_path / "list.json"))


def test_prompts_alone(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "p.txt").write_bytes(b"one\n\n two \n\xff\xfe\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": ["two", "three"]}\n{"other": 1}\nnot json\n')
    (tmp_path / "p.json").write_text('["one", {"caption": "two"}, 5, null]')
    pq.write_table(pa.table({"caption": ["one", None, "three"], "n": [1, 2, 3]}), tmp_path / "p.parquet")
    found = {}
    for kind in ("txt", "jsonl", "json", "parquet"):
        source = open_source(str(tmp_path / f"p.{kind}"))
        assert not source.has_images and source.read(0).image is None
        found[kind] = [source.read(i).captions for i in range(len(source))], reasons(source)
    assert found["txt"] == ([("one",), ("two",)], {"caption is not UTF-8": 1})
    assert found["jsonl"] == ([("one",), ("two", "three")], {"no caption": 1, "JSON does not parse": 1})
    assert found["json"] == ([("one",), ("two",)], {"no caption": 2})
    assert found["parquet"] == ([("one",), ("three",)], {"no caption": 1})


def test_tars_behind_a_url(tmp_path):
    """fsspec's memory file system: patterns, sizes, ranges, and a shard that goes away."""
    import fsspec

    write_tars(tmp_path / "set", 2, 3)
    fs = fsspec.filesystem("memory")
    for s in range(2):
        fs.pipe(f"/bucket/{s:05d}.tar", (tmp_path / "set" / f"{s:05d}.tar").read_bytes())
    local, _ = read_all(open_source(str(tmp_path / "set")))
    for path in ("memory://bucket", "memory://bucket/*.tar", "memory://bucket/{00000..00001}.tar"):
        good, bad = read_all(open_source(path))
        assert list(good.values()) == list(local.values()) and bad == {}
    source = open_source("memory://bucket")
    fs.rm("/bucket/00001.tar")
    assert set(read_all(source)[1].values()) == {"missing file"}
    with pytest.raises(UserError, match="no file has such a name"):
        open_source("memory://nothing")


def test_a_remote_file_systems_own_errors_are_reasons(tmp_path, monkeypatch):
    """aiohttp's and botocore's are no OSErrors. A read is tried three times."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class PayloadError(Exception):
        pass

    def fail(*_, **__):
        calls.append(1)
        raise PayloadError("the connection broke")

    write_tars(tmp_path / "set", 2, 3)
    fs, calls = fsspec.filesystem("memory"), []
    for s in range(2):
        fs.pipe(f"/errors/{s:05d}.tar", (tmp_path / "set" / f"{s:05d}.tar").read_bytes())
    source = open_source("memory://errors")
    monkeypatch.setattr("senseflow.data.files.time.sleep", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cat_file", fail)
        with pytest.raises(BadSample, match=r"unreadable file: .*PayloadError: the connection broke"):
            source.read(0)
        assert len(calls) == 3
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "glob", fail)
        with pytest.raises(UserError, match=r"cannot be listed: PayloadError: the connection broke"):
            open_source("memory://errors")
    monkeypatch.setenv("SENSEFLOW_CACHE", str(tmp_path / "none"))
    for method in ("info", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, method, fail)
            with pytest.raises(UserError, match="unreadable tar PayloadError"):
                open_source("memory://errors/{00000..00001}.tar")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "does not exist"),
        ("a.tar.gz", "a compressed tar cannot be read at random"),
        ("{a.tar", "its braces do not match"),
        ("*.tar", "no file has such a name"),
        ("x.doc", "allowed is a folder, .tar, .json, .txt, .jsonl, .parquet or a pattern"),
        ("bad.json", "does not parse"),
        ("num.json", "allowed is {'keys', 'image_paths', 'prompts'} or a list of prompts"),
        ("empty", "no picture with a caption is in this folder"),
        ("blank.txt", "no prompt can be used"),
    ],
)
def test_what_is_no_source_is_one_line(tmp_path, name, message):
    for file, text in (("x.doc", ""), ("bad.json", "{"), ("num.json", "3"), ("blank.txt", "\n")):
        (tmp_path / file).write_text(text)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path / name))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(BadSample, match="caption is not UTF-8"):
        captions_of(json.loads('{"caption": "\\ud800"}'), ())


def test_filters_keep_what_they_say_and_count_the_rest(tmp_path, monkeypatch):
    """Of 12 samples: aesthetic 4, 4.5, 5, 5.5 in turn; NSFW 0 to .9; sides 48 and 40."""
    write_tars(tmp_path / "set", 2, 6)
    source = open_source(str(tmp_path / "set"))

    def kept(**fields):
        found = select(source, Data(**fields))
        return found.keep.tolist(), dict(found.left_out)

    assert kept() == (list(range(12)), {})
    assert kept(min_aesthetic=5.0) == ([2, 3, 6, 7, 10, 11], {"aesthetic score": 6})
    assert kept(max_nsfw=0.5) == ([0, 1, 2, 3, 4, 5, 10, 11], {"punsafe score": 4})
    assert kept(min_aesthetic=5.0, max_nsfw=0.5) == ([2, 3, 10, 11], {"aesthetic score": 6, "punsafe score": 2})
    assert kept(min_side=40, max_aspect=1.2)[0] == list(range(12))
    assert kept(caption_min=5, caption_max=500)[0] == list(range(12))
    for fields, message in (
        (dict(min_side=41), "no sample passes the filters: {'short side under 41': 12}"),
        (dict(max_aspect=1.1), "aspect over 1.1"),
        (dict(caption_max=3), "caption length"),
        (dict(min_aesthetic=5.0, aesthetic="beauty"), "no sample has a column 'beauty'"),
    ):
        with pytest.raises(UserError) as caught:
            kept(**fields)
        assert message in str(caught.value)
    monkeypatch.setattr(TarSource, "read", lambda *_: pytest.fail("looked through twice"))
    assert kept(min_aesthetic=5.0)[0] == [2, 3, 6, 7, 10, 11]


def test_sizes_are_read_from_pictures_without_metadata(tmp_path):
    """Upright sizes, and what does not open is kept for the reader to count."""
    folder = write_folder(tmp_path / "set", 2)
    (folder / "tall.jpg").write_bytes(
        jpeg(3, 64, 32, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    )
    (folder / "tall.txt").write_text("tall")
    (folder / "bad.jpg").write_bytes(BAD_IMAGES["text"][0])
    (folder / "bad.txt").write_text("bad")
    grain = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    (folder / "long.png").write_bytes(encoded(Image.fromarray(grain), "PNG"))  # more than is read for its size
    (folder / "long.txt").write_text("long")
    assert (folder / "long.png").stat().st_size > HEAD
    source = open_source(str(folder))
    found = select(source, Data(buckets=True))
    sizes = {
        source.key(int(i)): (int(w), int(h)) for i, w, h in zip(found.keep, found.width, found.height, strict=True)
    }
    assert sizes == {"0000.jpg": (48, 40), "0001.jpg": (48, 40), "bad.jpg": (1, 1), "long.png": (300, 200),
                     "tall.jpg": (32, 64)}  # fmt: skip
    assert "bad.jpg" in [source.key(int(i)) for i in select(source, Data(min_side=33)).keep]
    shutil.rmtree(folder)
