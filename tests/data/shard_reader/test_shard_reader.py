"""Shards that were damaged, made by odd programs, or made to do harm; and names with dots."""

import bz2
import gzip
import io
import json
import lzma
import tarfile

import pytest
from PIL import Image

from potstill.data.file_datasets import DEFAULT_AUGMENT, load_shards
from potstill.data.settings import DataSettings
from potstill.data.shard_reader import read_shard
from potstill.errors import DataError

BLOCK = 512


def png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (colour % 256, 7 * colour % 256, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(*members: tuple[str, bytes], **options: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


GOOD = tar(*((f"{c}/{i}.png", png(20 * i + c)) for c in range(2) for i in range(4)))
END = bytes(2 * BLOCK)


def header(name: str, size: int, kind: bytes = b"0", *, raw_size: bytes | None = None) -> bytes:
    block = bytearray(BLOCK)
    block[: len(name)] = name.encode()
    block[100:108] = b"0000644\0"
    block[124:136] = b"%011o\0" % size if raw_size is None else raw_size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    content = b"".join(records)
    return header("pax", len(content), kind) + padded(content)


def record(text: bytes) -> bytes:
    length = next(n for n in range(len(text) + 3, len(text) + 9) if n == len(text) + 2 + len(str(n)))
    return b"%d %s\n" % (length, text)


HARMFUL = {
    "base-256 size": header("a/x.png", 0, raw_size=b"\x80" + b"\x7f" * 11),
    "negative size": header("a/x.png", 0, raw_size=b"\xff" * 11 + b"\xf0"),
    "size beyond the end": header("a/x.png", 8**10) + padded(png(1)),
    "negative size of a pax header": header("pax", 0, b"x", raw_size=b"\xff" * 11 + b"\xf0"),
    "endless pax header": header("pax", 8**11 - 1, b"x"),
    "huge pax header": header("pax", 2**21, b"x") + bytes(2**21) + header("a/x.png", 0),
    "huge long name": header("././@LongLink", 2**21, b"L") + b"n" * 2**21 + header("a/x.png", 0),
    "pax size that is none": pax(record(b"size=many")) + header("a/x.png", len(png(1))) + padded(png(1)),
    "pax size of 5,000 digits": pax(record(b"size=" + b"9" * 5000)) + header("a/x.png", 0),
    "negative pax size": pax(record(b"size=-512")) + header("a/x.png", 512) + bytes(512),
    "long names without end": b"".join(header("././@LongLink", 4, b"L") + padded(b"abc\0") for _ in range(3000)),
    "header with a wrong sum": bytes(100) + header("a/x.png", 0)[100:],
    "text": b"x" * BLOCK,
    "sparse map without end": pax(
        record(b"GNU.sparse.major=1"), record(b"GNU.sparse.minor=0"), record(b"GNU.sparse.name=a/x.png")
    )
    + header("a/x.png", 512)
    + b"99999\n"
    + bytes(506),
    "sparse image": header("a/x.png", 0, b"S"),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMFUL)
def test_members_that_cannot_be_are_refused_in_one_message(tmp_path, harm):
    content = GOOD.rstrip(b"\0")
    content += bytes(-len(content) % BLOCK) + HARMFUL[harm] + END
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_shards(DataSettings(source=str(tmp_path / "s.tar")), DEFAULT_AUGMENT)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/s.tar: ")
    assert len(message.splitlines()) <= 2
    assert len(message) < 600


def test_names_that_are_no_utf8_are_refused_with_their_reason(tmp_path):
    content = GOOD.rstrip(b"\0")
    odd = pax(record(b"path=a/\xff\xfe.png")) + header("a/y.png", len(png(9))) + padded(png(9))
    (tmp_path / "s.tar").write_bytes(content + bytes(-len(content) % BLOCK) + odd + END)
    with pytest.raises(DataError, match="UTF-8"):
        load_shards(DataSettings(source=str(tmp_path / "s.tar")), DEFAULT_AUGMENT)


def test_archives_that_were_joined_lose_nothing_unseen(tmp_path):
    (tmp_path / "s.tar").write_bytes(GOOD + GOOD)
    with pytest.raises(DataError, match=r"behind the archive's end.*--concatenate"):
        read_shard(str(tmp_path / "s.tar"))


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (("x.cls", b"9" * 5000), "a class of 5,000 characters"),
        (("x.json", b'{"label": ' + b"9" * 5000 + b"}"), "neither text nor JSON"),
        (("x.json", b"[" * 100_000), "neither text nor JSON"),
        (("x.json", b'{"a":' * 100_000), "neither text nor JSON"),
        (("x.json", json.dumps({"label": "n" * 300}).encode()), "a class of 300 characters"),
        (("x.json", b'{"label": 1, "label": 0}'), "a key is given twice"),
        (("x.json", b'{"label": 1.5, "class": "0"}'), "a class is a name or a whole number, got 1.5"),
        (("x.json", b'{"label": NaN}'), "got nan"),
        (("x.json", b'{"label": true}'), "got True"),
        (("x.json", b'{"class": ["0"]}'), "got \\['0'\\]"),
    ],
)
def test_labels_that_cannot_be_read(tmp_path, label, said):
    members = [member for i in range(8) for member in ((f"{i}.png", png(i)), (f"{i}.cls", b"%d" % (i % 2)))]
    (tmp_path / "s.tar").write_bytes(tar(*members, ("x.png", png(99)), label))
    with pytest.raises(DataError, match=rf"s\.tar: \d problem(.|\n)*{said}"):
        load_shards(DataSettings(source=str(tmp_path / "s.tar")), DEFAULT_AUGMENT)


def test_a_label_that_is_null_leaves_the_class(tmp_path):
    members = [m for i in range(12) for m in ((f"x/{i}.png", png(i)), (f"x/{i}.json", JSON % (b"ab"[i % 2 :][:1])))]
    (tmp_path / "s.tar").write_bytes(tar(*members))
    assert load_shards(DataSettings(source=str(tmp_path / "s.tar")), DEFAULT_AUGMENT).class_names == ("a", "b")


def test_images_without_any_class_are_said_to_have_none(tmp_path):
    (tmp_path / "s.tar").write_bytes(tar(*((f"{i}.png", png(i)) for i in range(12))))
    with pytest.raises(DataError, match=r"no image has a class: give each a member KEY\.cls"):
        load_shards(DataSettings(source=str(tmp_path / "s.tar")), DEFAULT_AUGMENT)


JSON = b'{"label": null, "class": "%s"}'


def test_dots_in_names_lose_no_image(tmp_path):
    names = [f"data/{c}/IMG_{i:03}{'.v2' if i >= 12 else ''}.jpg" for c in "abc" for i in range(20)]
    (tmp_path / "s.tar").write_bytes(tar(*((name, png(i)) for i, name in enumerate(names))))
    data = load_shards(DataSettings(source=str(tmp_path / "s.tar")), DEFAULT_AUGMENT)
    found = [name for split in (data.train, data.val, data.test) for name in split.names]
    assert sorted(found) == sorted(f"s.tar/{name}" for name in names)
    assert data.class_names == ("a", "b", "c")


def test_what_is_left_alone_is_counted_and_named(tmp_path):
    members = [("a/0.seg.png", png(1)), ("a/0.jpg", png(2)), ("a/1.jpg", png(3)), ("a/1.mask.png", png(4)),
               ("a/1.txt", b"a caption"), ("a/2.json", b"{}"), ("b/3.1.png", png(5)),
               ("b/._4.png", b"\0\5\26\7")]  # fmt: skip
    (tmp_path / "s.tar").write_bytes(tar(*members))
    shard = read_shard(str(tmp_path / "s.tar"))
    assert [sample.name for sample in shard.samples[:3]] == ["a/0.jpg", "a/1.jpg", "b/3.1.png"]
    assert {why.split(",")[0]: names for why, names in shard.left.items()} == {
        "further images of a sample": ["a/0.seg.png", "a/1.mask.png"],
        "members that are neither image nor label": ["a/1.txt"],
        "labels without an image": ["a/2.json"],
    }
    assert shard.problems == [shard.problems[0]]
    assert "AppleDouble" in shard.problems[0]


def test_an_image_without_the_suffix_of_one_is_not_lost(tmp_path):
    members = [("a/0", png(1)), ("a/1.bin", png(2)), ("a/2.png", png(3)), ("a/2.thumb", png(4)), ("a/README", b"text")]
    (tmp_path / "s.tar").write_bytes(tar(*members))
    for _ in range(2):  # read, and from the cached index
        problems = read_shard(str(tmp_path / "s.tar")).problems
        assert [each.split(": ")[0][-7:] for each in problems] == ["tar/a/0", "a/1.bin"]
        assert all("an image whose name does not end in .jpg" in each for each in problems)


def test_an_image_of_a_format_that_is_not_read_is_not_lost(tmp_path):
    ppm, jp2 = b"P6 1 1 255\nabc", b"\0\0\0\x0cjP  \r\n\x87\n"
    members = [("a/0.ppm", ppm), ("a/1.jp2", jp2), ("a/1.cls", b"a"), ("a/2.png", png(3)), ("a/2.dng", b"raw data"),
               ("a/3.png", png(4)), ("a/3.npy", b"an array"), ("a/4.txt", b"a caption")]  # fmt: skip
    (tmp_path / "s.tar").write_bytes(tar(*members))
    for _ in range(2):  # read, and from the cached index
        ppm_problem, jp2_problem = read_shard(str(tmp_path / "s.tar")).problems
        assert "s.tar/a/0.ppm: no image of the formats JPEG, PNG" in ppm_problem
        assert jp2_problem.endswith("but a JPEG 2000 image; convert it")


def test_a_hidden_image_makes_no_class_of_its_own(tmp_path):
    hidden = [(f"{c}/.thumb.png", png(200 + i)) for i, c in enumerate("abc")]
    (tmp_path / "s.tar").write_bytes(
        tar(*((f"{c}/{i}.jfif", png(i + 9 * ord(c))) for c in "abc" for i in range(4)), *hidden)
    )
    shard = read_shard(str(tmp_path / "s.tar"))
    assert [each.split(": ")[0][-12:] for each in shard.problems] == [f"{c}/.thumb.png" for c in "abc"]
    assert sum(sample.name.endswith(".jfif") for sample in shard.samples) == 12  # a suffix of JPEG


def test_two_images_of_one_key_are_an_error(tmp_path):
    (tmp_path / "s.tar").write_bytes(tar(("a/0.v1.png", png(1)), ("a/0.v2.png", png(2))))
    assert "a second image under the key 'a/0'" in read_shard(str(tmp_path / "s.tar")).problems[0]


@pytest.mark.parametrize(
    ("compress", "program"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")]
)
def test_a_compressed_tar_file_is_named_as_such(tmp_path, compress, program):
    (tmp_path / "s.tar").write_bytes(compress(tar(("a/0.png", png(1)))))
    with pytest.raises(DataError, match=f"compressed by {program}.*unpack it first"):
        read_shard(str(tmp_path / "s.tar"))
