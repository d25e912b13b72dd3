import errno
import json
import os
import stat

import pytest

from potstill import io
from potstill.errors import ArtifactError, StorageError


def test_a_file_is_written_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "er" / "value.bin"
    io.write_bytes(path, b"one", b"two")
    assert path.read_bytes() == b"onetwo"
    assert os.listdir(path.parent) == ["value.bin"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask  # as open() would have made it


def test_what_the_system_writes_in_parts_is_whole_nevertheless(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, bytes(data)[:3]))
    io.write_bytes(tmp_path / "x", b"0123456789", b"", b"ab")
    assert (tmp_path / "x").read_bytes() == b"0123456789ab"


def test_the_order_that_survives_a_power_cut(tmp_path, monkeypatch):
    """Content synced before the rename, the folder after it; and each new folder within its parent."""
    calls = []

    def noted(name, call, path_of):
        def wrapped(*arguments, **options):
            calls.append((name, path_of(*arguments)))
            return call(*arguments, **options)

        return wrapped

    monkeypatch.setattr(os, "fsync", noted("fsync", os.fsync, lambda handle: os.readlink(f"/proc/self/fd/{handle}")))
    monkeypatch.setattr(os, "replace", noted("replace", os.replace, lambda a, b: str(a)))
    io.write_bytes(tmp_path / "new" / "x", b"1")
    temporary = calls[2][1]
    assert temporary.startswith(f"{tmp_path}/new/.x.")
    assert calls == [
        ("fsync", str(tmp_path)), ("fsync", temporary), ("replace", temporary), ("fsync", f"{tmp_path}/new")
    ]  # fmt: skip


@pytest.mark.parametrize("call", ["open", "write", "fsync", "close", "replace", "link"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_failed_write_keeps_the_older_file_and_says_why(tmp_path, monkeypatch, call, number):
    path, previous = tmp_path / "value.json", tmp_path / "value-previous.json"
    io.write_bytes(path, b"older")

    def fail(*arguments):
        if call == "close":
            close(*arguments)
        raise OSError(number, os.strerror(number))

    close = os.close
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match=rf"cannot write .*value\.json: {os.strerror(number)}"):
        io.write_bytes(path, b"newer", previous=previous)
    monkeypatch.undo()
    assert path.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["value.json"]


def test_the_older_file_may_stay_under_a_second_name(tmp_path):
    path, previous = tmp_path / "x", tmp_path / "x-previous"
    for content in (b"1", b"2", b"3"):
        io.write_bytes(path, content, previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"3", b"2")
    previous.unlink()
    os.link(path, previous)  # as a process leaves it that is killed between the two renames
    io.write_bytes(path, b"4", previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"4", b"3")
    assert sorted(os.listdir(tmp_path)) == ["x", "x-previous"]


def test_where_files_have_one_name_only_the_older_one_is_copied(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")  # what FAT answers

    monkeypatch.setattr(os, "link", link)
    for content in (b"1", b"2", b"3"):
        io.write_bytes(tmp_path / "x", content, previous=tmp_path / "p")
    assert ((tmp_path / "x").read_bytes(), (tmp_path / "p").read_bytes()) == (b"3", b"2")


def test_a_link_stays_one_and_what_is_no_file_stays_what_it_is(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "x")
    io.write_bytes(tmp_path / "link", b"1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "x").read_bytes() == b"1"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "real"):
        with pytest.raises(StorageError, match=r"cannot write .*: it is there, and no regular file"):
            io.write_bytes(path, b"1")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_file_systems_folders_need_not_be_able_to_sync(tmp_path, monkeypatch):
    sync = os.fsync

    def only_files(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    io.write_bytes(tmp_path / "x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"


def test_moving_takes_the_others_place(tmp_path, monkeypatch):
    io.write_bytes(tmp_path / "a", b"1")
    io.write_bytes(tmp_path / "b", b"2")
    io.replace_file(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path) == ["b"]
    assert (tmp_path / "b").read_bytes() == b"1"
    with pytest.raises(StorageError, match=r"cannot write .*b: No such file"):
        io.replace_file(tmp_path / "a", tmp_path / "b")


def test_leftovers_of_killed_processes_go_and_nothing_else(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in (".x.0123.part", "deep/.y.0123.part", "deep/mine.part", ".z"):
        (tmp_path / name).touch()
    io.remove_partial_files(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [".z", "deep", "deep/mine.part"]


def test_nan_is_no_json():
    with pytest.raises(ValueError, match="Out of range float"):
        io.encode_json({"a": float("nan")})
    assert json.loads(io.encode_json({"é": [1, None]})) == {"é": [1, None]}


def test_reading_compares_the_digest_before_anything_else(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    # SHA-256 of "abc", from FIPS 180-2 appendix B.1
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert io.read_bytes(path, sha256=known) == b"abc"
    assert io.file_sha256(path) == io.sha256_hex(b"abc") == known
    path.write_bytes(b"abd")
    with pytest.raises(ArtifactError, match="is damaged"):
        io.read_bytes(path, sha256=known)
    for read in (io.read_bytes, io.file_sha256):
        with pytest.raises(ArtifactError, match="cannot read"):
            read(tmp_path / "none")


def test_names_that_were_read_in_another_locale_are_written_as_they_are() -> None:
    name = "猫/é.png".encode().decode("ascii", "surrogateescape")  # as with LC_ALL=C and PYTHONUTF8=0
    odd = b"\xff.png".decode("ascii", "surrogateescape")  # no UTF-8 at all
    assert io.as_csv(["path"], [[name], [odd], ["\ud800"]]) == "path\n猫/é.png\n\\udcff.png\n\\ud800\n"
