import json
import os
import stat

import pytest

from potstill import artifacts
from potstill.errors import ArtifactError, StorageError


def test_a_file_is_written_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "er" / "value.bin"
    artifacts.write_bytes(path, b"one", b"two")
    assert path.read_bytes() == b"onetwo"
    assert os.listdir(path.parent) == ["value.bin"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask  # as open() would have made it


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_keeps_the_older_file_and_says_why(tmp_path, monkeypatch, call):
    path = tmp_path / "value.json"
    artifacts.write_json(path, {"a": 1})

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match=r"cannot write .*value\.json: No space left on device"):
        artifacts.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["value.json"]


def test_nan_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        artifacts.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert os.listdir(tmp_path) == []


def test_reading_compares_the_digest_before_anything_else(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    # SHA-256 of "abc", from FIPS 180-2 appendix B.1
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert artifacts.read_bytes(path, sha256=known) == b"abc"
    path.write_bytes(b"abd")
    with pytest.raises(ArtifactError, match="is damaged"):
        artifacts.read_bytes(path, sha256=known)
    with pytest.raises(ArtifactError, match="cannot read"):
        artifacts.read_bytes(tmp_path / "none")


def test_broken_json_is_an_artifact_error(tmp_path):
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(ArtifactError, match="it is no JSON"):
        artifacts.read_json(tmp_path / "x.json")


def test_one_value_a_line(tmp_path):
    artifacts.write_json_lines(tmp_path / "log.jsonl", [{"epoch": 1, "name": "né\n"}, {"epoch": 2}])
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8") == '{"epoch": 1, "name": "né\\n"}\n{"epoch": 2}\n'
