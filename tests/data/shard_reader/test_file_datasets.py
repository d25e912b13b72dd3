"""From shards to three splits: the same images as in a folder, wherever they lie, and every damage is named."""

import gc
import http.server
import tarfile
import threading

import numpy as np
import pytest

from potstill.data import shard_reader
from potstill.data.datasets import load_data
from potstill.data.image_sets import file_digests, is_file_based
from potstill.data.settings import DataSettings
from potstill.data.validation.validate import validate_data
from potstill.errors import DataError, UsageError


def load(source, **options):
    return load_data(DataSettings(source=str(source), options=options))


def test_two_shards_become_three_splits(shards):
    data = load(f"{shards}/train-{{00..01}}.tar")
    assert data.class_names == ("0", "1")
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [28, 6, 6]
    for split in ("train", "val", "test"):
        images = data.split(split)
        for i, name in enumerate(images.names):
            shard, _, member = name.partition("/")
            number = int(member.removesuffix(".png"))
            assert shard == f"train-{number // 20:02d}.tar"
            assert images.labels[i] == number % 2
    assert data.origin.startswith("2 tar shards; val and test split from train here")


def test_pixels_are_those_of_the_files(shards, tools, tmp_path):
    from potstill.data.image_io import decode

    images = load(f"{shards}/train-{{00..01}}.tar").train
    for i in range(0, len(images), 5):
        number = int(images.names[i].partition("/")[2].removesuffix(".png"))
        file = tmp_path / "one.png"
        file.write_bytes(tools.picture(number))
        np.testing.assert_array_equal(images.pixels(i), decode(file))
    assert is_file_based(images)
    assert file_digests(images).shape == (len(images), 32)


def test_val_and_test_may_have_shards_of_their_own(shards, tools):
    tools.write_tar(shards / "test.tar", tools.samples(100, 110))
    data = load(f"{shards}/train-{{00..01}}.tar", test=str(shards / "test.tar"))
    assert len(data.test) == 10
    assert {name.partition("/")[0] for name in data.test.names} == {"test.tar"}
    assert len(data.train) + len(data.val) == 40


@pytest.mark.parametrize(
    ("label", "names"),
    [
        (lambda i: ("cls", b"red\n" if i % 2 else b"blue"), ("blue", "red")),
        (lambda i: ("json", b'{"label": %d, "caption": "x"}' % (i % 2)), ("0", "1")),
        (lambda i: ("json", b'{"class": "red"}' if i % 2 else b'{"class": "blue"}'), ("blue", "red")),
    ],
)
def test_classes_come_from_cls_or_json(tmp_path, tools, label, names):
    tools.write_tar(tmp_path / "a.tar", tools.samples(0, 20, label))
    data = load(tmp_path / "a.tar")
    assert data.class_names == names
    assert data.counts()["train"] == {names[0]: 6, names[1]: 6}  # 15 % of 10 are rounded to 2, twice


def test_or_else_from_directories(tmp_path, tools):
    tools.write_tar(tmp_path / "a.tar", [(f"./x/{['cat', 'dog'][i % 2]}/{i}.png", tools.picture(i)) for i in range(20)])
    data = load(tmp_path / "a.tar")
    assert data.class_names == ("cat", "dog")
    assert all(("cat" in name) == (label == 0) for name, label in zip(data.val.names, data.val.labels, strict=True))


def test_numbers_with_zeros_before_them_are_names(tmp_path, tools):
    tools.write_tar(tmp_path / "a.tar", [(f"{i % 2:05d}/{i}.png", tools.picture(i)) for i in range(20)])
    assert load(tmp_path / "a.tar").class_names == ("00000", "00001")


def test_numbers_get_names(shards, tmp_path):
    (tmp_path / "names.txt").write_text("red\nblue\n")
    for classes in (str(tmp_path / "names.txt"), ["red", "blue"]):
        assert load(shards / "train-00.tar", classes=classes).class_names == ("red", "blue")
    with pytest.raises(DataError, match="class '1' is not one of the 1 names"):
        load(shards / "train-00.tar", classes=["red"])
    with pytest.raises(UsageError, match=r"no file 'nowhere\.txt'"):
        load(shards / "train-00.tar", classes="nowhere.txt")


def test_a_shard_is_read_again_only_when_it_has_changed(shards, tools, monkeypatch):
    before = load(shards / "train-00.tar")
    decoded = []
    real = shard_reader.read_image
    monkeypatch.setattr(shard_reader, "read_image", lambda content, name: decoded.append(name) or real(content, name))
    assert load(shards / "train-00.tar").fingerprint == before.fingerprint
    assert decoded == []
    tools.write_tar(shards / "train-00.tar", tools.samples(1, 21))
    after = load(shards / "train-00.tar")
    assert len(decoded) == 20
    assert after.fingerprint != before.fingerprint


def test_a_shard_that_changes_while_it_is_used_is_noticed(shards, tools):
    data = load(shards / "train-00.tar")
    content = bytearray((shards / "train-00.tar").read_bytes())
    place = data.train.images.locations[int(data.train.index[0])]
    content[place[1] + place[2] - 20] ^= 1
    (shards / "train-00.tar").write_bytes(content)
    with pytest.raises(DataError, match="has changed since it was checked; start again"):
        data.train.pixels(0)


def test_from_a_memory_store_and_over_http(shards):
    import fsspec

    here = load(f"{shards}/train-{{00..01}}.tar")
    system = fsspec.filesystem("memory")
    for at in range(2):
        system.pipe(f"/bucket/train-{at:02d}.tar", (shards / f"train-{at:02d}.tar").read_bytes())
    there = load("memory://bucket/train-{00..01}.tar")
    assert there.fingerprint == here.fingerprint
    np.testing.assert_array_equal(there.train.pixels(3), here.train.pixels(3))
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp")
    with served(shards) as address:
        far = load(f"{address}/train-{{00..01}}.tar")
        assert far.fingerprint == here.fingerprint
        np.testing.assert_array_equal(far.train.pixels(3), here.train.pixels(3))


class served:
    """A server on loopback that knows ranges."""

    def __init__(self, folder):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, *, body):
                content = (folder / self.path.lstrip("/")).read_bytes()
                asked = self.headers.get("Range")
                if asked:
                    first, last = asked.removeprefix("bytes=").split("-")
                    part = content[int(first) : int(last) + 1 if last else None]
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
                    content = part
                else:
                    self.send_response(200)
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *words):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.filterwarnings("ignore")  # it leaves the file open
def test_the_package_webdataset_sees_the_same(shards):
    webdataset = pytest.importorskip("webdataset", reason="only compared with where it is installed")
    data = load(shards / "train-00.tar")
    ours = {
        name.partition("/")[2].removesuffix(".png"): label
        for split in ("train", "val", "test")
        for name, label in zip(data.split(split).names, data.split(split).labels, strict=True)
    }
    theirs = webdataset.WebDataset(str(shards / "train-00.tar"), shardshuffle=False)
    assert ours == {each["__key__"]: int(each["cls"]) for each in theirs}
    gc.collect()


def test_the_data_doctor_looks_into_shards(shards, tools):
    tools.write_tar(shards / "test.tar", [("copy.png", tools.picture(3)), ("copy.cls", b"0"), *tools.samples(60, 68)])
    settings = DataSettings(source=f"{shards}/train-{{00..01}}.tar", options={"test": str(shards / "test.tar")})
    report = validate_data(settings)
    assert report.count("error") == 1  # the same picture twice, under two labels
    assert any("copy.png" in str(finding) for finding in report.findings)


# what is damaged or hostile


def test_every_broken_image_is_named(tmp_path, tools):
    members = [
        *tools.samples(0, 10),
        ("00010.png", b"no image"),
        ("00010.cls", b"0"),
        ("00011.jpg", b""),
        ("00011.cls", b"1"),
    ]
    tools.write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError) as caught:
        load(tmp_path / "a.tar")
    assert "2 problems" in str(caught.value)
    assert "a.tar/00010.png: no image of the formats" in str(caught.value)
    assert "a.tar/00011.jpg: empty file" in str(caught.value)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([], "no image in any shard"),
        ([("00099.png", None)], "1 of 11 images have no class, for example a.tar/00099.png"),
        ([("00009.png", None), ("00009.cls", b"0")], "a second image under the key '00009'"),
        ([("00003.png", None), ("00003.cls", b"1")], r"a\.tar/00003\.png: there twice"),
        ([("00099.png", None), ("00099.cls", b"123456")], "the largest class is 123456, of 3 that are used"),
        ([("00099.png", None), ("00099.json", b"{")], "neither text nor JSON"),
        ([("00099.png", None), ("00099.cls", b"a\x1b[31mb")], "class "),
    ],
)
def test_what_is_wrong_with_samples_is_said(tmp_path, tools, members, said):
    before = list(tools.samples(0, 10)) if members else []
    tools.write_tar(tmp_path / "a.tar", before + [(name, content or tools.picture(99)) for name, content in members])
    with pytest.raises(DataError, match=said):
        load(tmp_path / "a.tar")


def test_damaged_missing_and_strange_files(tmp_path, shards, tools):
    whole = (shards / "train-00.tar").read_bytes()
    for name, content in (("cut", whole[:7000]), ("noise", b"\xff" * 4096), ("empty", b"")):
        (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.tar|no image"):
            load(tmp_path / f"{name}.tar")
    with pytest.raises(UsageError, match=r"there is no shard .*train-02\.tar"):
        load(f"{shards}/train-{{00..02}}.tar")
    with pytest.raises(DataError, match=r"memory://bucket/none\.tar: there is no such shard"):
        load("memory://bucket/none.tar")
    with pytest.raises(UsageError, match=r"unknown option 'tests'.*did you mean 'test'"):
        load(shards / "train-00.tar", tests="x.tar")


def test_a_size_that_lies_and_links_do_no_harm(tmp_path, tools):
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    above = [("../../above.png", tools.picture(40)), ("../../above.cls", b"0")]
    tools.write_tar(tmp_path / "a.tar", [*tools.samples(0, 19), link, *above])
    data = load(tmp_path / "a.tar")
    assert "1 links and devices" in data.origin
    assert any("above.png" in name for split in ("train", "val", "test") for name in data.split(split).names)
    assert not list(tmp_path.parent.rglob("above.png"))  # nothing is ever extracted

    info = tarfile.TarInfo("00050.png")
    info.size = 2 * 2**30
    (tmp_path / "b.tar").write_bytes(info.tobuf() + tools.picture(1) + bytes(2048))
    with pytest.raises(DataError, match=r"b\.tar"):
        load(tmp_path / "b.tar")


def test_an_image_that_is_too_large_is_not_read(shards, monkeypatch):
    monkeypatch.setattr(shard_reader, "_MAX_IMAGE_BYTES", 300)
    with pytest.raises(DataError, match=r"00000\.png: \d+ bytes; at most 300 are read"):
        load(shards / "train-00.tar")
