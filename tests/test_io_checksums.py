"""Files that carry their own digest: people read them as before, and whatever was changed is seen first."""

import hashlib
import json
import os
import random
import re

import pytest
import yaml

from potstill import io
from potstill.errors import ArtifactError

FACTS = {"schema": 1, "name": "né\ud800", "nested": {"a": [1, 2.5, None]}}
RECIPE = "name: tiny\nseed: 3\n"


def write_json(path):
    io.write_checksummed_json(path, FACTS)


def write_text(path):
    io.write_checksummed_text(path, RECIPE)


def write_bytes(path):
    io.write_checksummed(path, bytes(range(256)))


KINDS = [
    (write_json, io.read_checksummed_json, FACTS),
    (write_text, io.read_checksummed_text, RECIPE),
    (write_bytes, io.read_checksummed, bytes(range(256))),
]


@pytest.mark.parametrize(("write", "read", "value"), KINDS)
def test_what_was_written_comes_back(tmp_path, write, read, value):
    write(tmp_path / "x")
    found = read(tmp_path / "x")
    assert found == value or json.dumps(found) == json.dumps(value).replace("\\ud800", "\\\\ud800")


@pytest.mark.parametrize(("write", "read", "value"), KINDS)
def test_every_changed_byte_and_every_cut_is_seen(tmp_path, write, read, value):
    """Every bit of the digest and what stands around it; one bit of every byte of the content, another each time."""
    path = tmp_path / "x"
    write(path)
    whole = path.read_bytes()
    content = bytes(range(256)) if value == bytes(range(256)) else b""
    inside = range(at := whole.find(content), at + len(content))
    for position in range(len(whole)):
        for bit in (position % 8,) if position in inside else range(8):
            changed = bytearray(whole)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(ArtifactError, match=f"^{re.escape(str(path))} is damaged"):
                read(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match="is damaged"):
            read(path)
    path.write_bytes(whole + b"\n")
    with pytest.raises(ArtifactError, match="is damaged"):
        read(path)


def test_json_stays_json_and_its_checksum_is_that_of_the_file_without_it(tmp_path):
    io.write_checksummed_json(tmp_path / "x.json", {"a": 1})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {"a": 1, "checksum": hashlib.sha256(b'{\n  "a": 1\n}\n').hexdigest()}


def test_yaml_stays_yaml_and_sha256sum_can_check_it(tmp_path):
    io.write_checksummed_text(tmp_path / "x.yaml", RECIPE)
    first, _, rest = (tmp_path / "x.yaml").read_text().partition("\n")
    assert first == f"# SHA-256 of the lines below: {hashlib.sha256(rest.encode()).hexdigest()}"
    assert yaml.safe_load((tmp_path / "x.yaml").read_text()) == {"name": "tiny", "seed": 3}


@pytest.mark.parametrize(("text", "read"), [("{}\n", io.read_checksummed_json), (RECIPE, io.read_checksummed_text)])
def test_a_file_of_before_is_refused_in_one_sentence(tmp_path, text, read):
    (tmp_path / "x").write_text(text)
    with pytest.raises(ArtifactError, match=r"^\S+ is damaged, or was written before potstill 0\.1\.0: .*SHA-256$"):
        read(tmp_path / "x")


@pytest.mark.parametrize("body", ["[1\n}\n", "[" * 100_000 + "\n}\n", "{\n}\n x\n}\n", "\xff\n}\n"])
def test_nothing_but_an_object_comes_from_a_file_that_was_made_up_to_fit(tmp_path, body):
    data = body.encode("latin-1")
    checksum = f',\n  "checksum": "{hashlib.sha256(data).hexdigest()}"\n}}\n'.encode()
    (tmp_path / "x").write_bytes(data.removesuffix(b"\n}\n") + checksum)
    with pytest.raises(ArtifactError, match="holds no JSON object"):
        io.read_checksummed_json(tmp_path / "x")


def test_the_newest_intact_older_file_is_named(tmp_path):
    path = tmp_path / "last.checkpoint"
    for content in (b"one", b"two", b"three"):
        io.write_checksummed(path, content, keep_previous=True)
    previous = tmp_path / "last-previous.checkpoint"
    assert (io.read_checksummed(path), io.read_checksummed(previous)) == (b"three", b"two")
    assert sorted(os.listdir(tmp_path)) == ["last-previous.checkpoint", "last.checkpoint"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=rf"; {re.escape(str(previous))} is older and intact: rename it to last\."):
        io.read_checksummed(path)
    previous.write_bytes(b"")
    with pytest.raises(ArtifactError) as caught:
        io.read_checksummed(path)
    assert "previous" not in str(caught.value)


def test_of_several_older_files_the_newest_intact_one_counts(tmp_path):
    path = tmp_path / "last.checkpoint"
    path.write_bytes(b"")
    ages = {"a": 3, "b": 1, "c": 2}  # c is newer than b; a, the newest, is damaged
    for name, age in ages.items():
        older = tmp_path / f"last-{name}.checkpoint"
        io.write_checksummed(older, b"x")
        if name == "a":
            older.write_bytes(random.Random(0).randbytes(80))
        os.utime(older, (age, age))
    with pytest.raises(ArtifactError, match=r"last-c\.checkpoint is older and intact"):
        io.read_checksummed(path)


def test_one_value_a_line_and_which_line_was_changed(tmp_path):
    path = tmp_path / "log.jsonl"
    digests = io.write_json_lines(path, [{"epoch": 1, "name": "né\n"}, {"epoch": 2}, {"epoch": 3}])
    text = '{"epoch": 1, "name": "né\\n"}\n{"epoch": 2}\n{"epoch": 3}\n'
    assert path.read_text(encoding="utf-8") == text
    assert digests[1] == hashlib.sha256(b'{"epoch": 2}').hexdigest()[:16]
    assert io.verify_json_lines(path, digests) == text.encode()
    assert io.verify_json_lines(path, digests[:2], more=True) == text.encode()
    assert io.verify_json_lines(path, [], more=True) == text.encode()
    for changed, said in {
        text.replace('{"epoch": 2}', '{"epoch": 4}'): "line 2 is not the one that was written",
        text.replace("\n{", "\r\n{"): "line 1 is not the one",
        text[: text.index('{"epoch": 3')]: "line 3 of 3 is missing",
        text[:-1]: "line 3 of 3 is missing",
        "": "line 1 of 3 is missing",
        text + "{}\n": "more than the 3 lines",
        text + "{": "more than the 3 lines",
    }.items():
        path.write_text(changed, encoding="utf-8", newline="")
        with pytest.raises(ArtifactError, match=rf"log\.jsonl is damaged: .*{said}.*--resume writes it again"):
            io.verify_json_lines(path, digests)
    path.unlink()
    with pytest.raises(ArtifactError, match="cannot read"):
        io.verify_json_lines(path, digests)
