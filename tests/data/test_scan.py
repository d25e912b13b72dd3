"""Files that stayed as they were are not read again; changed ones are."""

import hashlib
import itertools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from potstill.data import scan
from potstill.data.datasets import load_data
from potstill.data.scan import FileIndex, check_files, file_state, stable_state
from potstill.data.settings import DataSettings
from potstill.errors import DataError

TICK = 50_000_000  # nanoseconds, instead of two seconds
NAMES = [f"{i}.png" for i in range(5)]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read, in any order."""
    found: list[str] = []
    read = scan.read_file

    def counting(path: Path) -> bytes:
        found.append(Path(path).name)
        return read(path)

    monkeypatch.setattr(scan, "read_file", counting)
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five images, old enough to be trusted."""
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scan, "RACY", TICK)
    root = tmp_path / "images"
    root.mkdir()
    for name in NAMES:
        paint(root / name, int(name[0]))
    time.sleep(2 * TICK / 1e9)
    return root


def paint(path: Path, value: int) -> None:
    # Uncompressed: any two have the same size.
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(path, "BMP")


@pytest.mark.parametrize(("side", "threads"), [(4, False), (64, True)])
def test_small_files_are_read_by_one_thread(
    side: int, threads: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, read = set[bool](), scan.read_file
    monkeypatch.setattr("potstill.data.concurrency.thread_count", lambda: 2)

    def noting(path: Path) -> bytes:
        found.add(threading.current_thread() is not threading.main_thread())
        return read(path)

    monkeypatch.setattr(scan, "read_file", noting)
    for name in NAMES:
        Image.fromarray(np.full((side, side, 3), int(name[0]), np.uint8)).save(folder / name, "BMP")
    check_files(folder, NAMES, "test")
    assert found == {threads}


def test_the_reason_of_a_bad_file_has_no_path_also_in_the_current_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "3.png").write_bytes(b"BM")
    monkeypatch.chdir(folder)
    bad: dict[str, str] = {}
    check_files(Path(), NAMES, "test", bad=bad)
    assert list(bad) == ["3.png"]
    assert "3.png" not in bad["3.png"]


def test_a_second_look_reads_nothing_and_finds_the_same(folder: Path, reads: list[str]) -> None:
    first = check_files(folder, NAMES, "test")
    assert sorted(reads) == NAMES
    content = (folder / "3.png").read_bytes()
    assert first["3.png"] == f"{len(content)} {hashlib.sha256(content).hexdigest()}"
    reads.clear()
    assert check_files(folder, NAMES, "test") == first
    assert check_files(folder, list(reversed(NAMES))[:2], "test") == {name: first[name] for name in ("4.png", "3.png")}
    assert reads == []


def test_of_two_that_come_at_once_one_reads_and_the_other_waits(
    folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found nothing known before either begins to read."""
    both, below, looks = threading.Barrier(2), FileIndex.load, itertools.count()

    def look(root: Path, *, decoded: bool) -> FileIndex:
        found = below(root, decoded=decoded)
        if next(looks) < 2:
            both.wait(60)
        return found

    monkeypatch.setattr(FileIndex, "load", look)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: check_files(folder, NAMES, "test"), range(2))
    assert first == second
    assert sorted(first) == NAMES
    assert sorted(reads) == NAMES


@pytest.mark.parametrize("restored", [False, True])
def test_an_edited_file_of_the_same_size_is_read_again(folder: Path, reads: list[str], restored: bool) -> None:
    first = check_files(folder, NAMES, "test")
    before = (folder / "2.png").stat()
    reads.clear()
    paint(folder / "2.png", 200)
    if restored:  # its times as they were, which touch -r or rsync may do; the time of the inode tells
        os.utime(folder / "2.png", ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (folder / "2.png").stat().st_mtime_ns == before.st_mtime_ns
    assert (folder / "2.png").stat().st_size == before.st_size
    second = check_files(folder, NAMES, "test")
    assert reads == ["2.png"]
    assert {name for name in NAMES if first[name] != second[name]} == {"2.png"}


def test_a_file_that_took_the_place_of_another_is_read(folder: Path, reads: list[str]) -> None:
    first = check_files(folder, NAMES, "test")
    reads.clear()
    os.replace(folder / "0.png", folder / "1.png")  # renamed: as old and as large
    second = check_files(folder, NAMES[1:], "test")
    assert reads == ["1.png"]
    assert second["1.png"] == first["0.png"]


def test_what_has_just_changed_is_not_trusted(folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "RACY", 3600 * 10**9)
    check_files(folder, NAMES, "test")
    check_files(folder, NAMES, "test")
    assert len(reads) == 10


def test_when_a_state_is_trusted() -> None:
    old, read_at = (7, 10**9, 10**9, 1), 3 * 10**9
    assert stable_state(old, old, read_at) == old
    assert stable_state(old, old, read_at - 1) is None  # less than two seconds
    assert stable_state((7, 10**9, 10**9 + 1, 1), (7, 10**9, 10**9 + 1, 1), read_at) is None  # the inode changed
    assert stable_state((7, 4 * 10**9, 0, 1), (7, 4 * 10**9, 0, 1), read_at) is None  # from the future
    assert stable_state(old, (8, *old[1:]), read_at) is None  # changed while it was read
    assert stable_state(file_state("/nowhere/at/all"), file_state("/nowhere/at/all"), read_at) is None


def test_bad_files_are_never_kept_and_good_ones_beside_them_are(folder: Path, reads: list[str]) -> None:
    (folder / "3.png").write_bytes(b"no image")
    time.sleep(2 * TICK / 1e9)
    for count in (5, 1):
        reads.clear()
        with pytest.raises(DataError, match=r"1 unreadable image\n.*3\.png: no image"):
            check_files(folder, NAMES, "test")
        assert len(reads) == count
    (folder / "3.png").unlink()
    with pytest.raises(DataError, match=r"3\.png: No such file"):
        check_files(folder, NAMES, "test")


def test_a_file_that_was_only_read_is_decoded_when_that_is_asked_for(folder: Path, reads: list[str]) -> None:
    (folder / "3.png").write_bytes(b"no image")
    time.sleep(2 * TICK / 1e9)
    check_files(folder, NAMES, "test", decode=False)
    reads.clear()
    check_files(folder, NAMES, "test", decode=False)
    assert reads == []
    with pytest.raises(DataError, match="unreadable"):
        check_files(folder, NAMES, "test")


def test_another_decoder_reads_everything_again(
    folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = check_files(folder, NAMES, "test")
    monkeypatch.setattr(scan, "decoder_version", lambda: "Pillow 99")
    assert check_files(folder, NAMES, "test") == first
    assert len(reads) == 10


def test_what_is_kept_grows_and_shrinks_with_the_folder(folder: Path, reads: list[str]) -> None:
    check_files(folder, NAMES[:3], "test")
    check_files(folder, NAMES[3:], "test")
    assert sorted(reads) == NAMES
    (folder / "0.png").unlink()
    paint(folder / "1.png", 99)
    time.sleep(2 * TICK / 1e9)
    check_files(folder, NAMES[1:2], "test")
    assert sorted(FileIndex.load(folder, decoded=True).names) == NAMES[1:]


def test_each_of_400_changed_bits_is_found(folder: Path, reads: list[str]) -> None:
    first = check_files(folder, NAMES, "test")
    (path,) = (folder.parent / "cache" / "known-files").iterdir()
    data, chance = path.read_bytes(), np.random.default_rng(1)
    for bit in chance.integers(0, 8 * len(data), 400).tolist():
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert len(FileIndex.load(folder, decoded=True).names) == 0, bit
    for wrong in (b"", data[:-1], data[:20], data + b"x"):
        path.write_bytes(wrong)
        reads.clear()
        assert check_files(folder, NAMES, "test") == first
        assert sorted(reads) == NAMES


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.parent / "file").touch()
    monkeypatch.setenv("POTSTILL_CACHE", str(folder.parent / "file" / "cache"))
    first = check_files(folder, NAMES, "test")
    assert check_files(folder, NAMES, "test") == first
    assert len(reads) == 10


def test_odd_names(folder: Path, reads: list[str]) -> None:
    names = ["a b.png", "ä.png", os.fsdecode(b"\xff.png"), "line\nbreak.png"]
    for name in names:
        paint(folder / name, 1)
    time.sleep(2 * TICK / 1e9)
    first = check_files(folder, names, "test")
    reads.clear()
    assert check_files(folder, names, "test") == first
    assert reads == []


def test_the_fingerprint_does_not_depend_on_what_is_known(
    make_folder, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "RACY", TICK)
    settings = DataSettings(source=str(make_folder({"a": 6, "b": 6})))
    time.sleep(2 * TICK / 1e9)
    found = []
    for cache in ("one", "one", "two"):
        monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / cache))
        reads.clear()
        found.append((load_data(settings).fingerprint, len(reads)))
    assert [count for _, count in found] == [12, 0, 12]
    assert len({fingerprint for fingerprint, _ in found}) == 1


def test_how_far_the_check_is(folder: Path) -> None:
    class Heard:
        def __init__(self) -> None:
            self.calls: list[tuple[str, int, int]] = []

        def wait(self, what: str, done: int, total: int) -> None:
            self.calls.append((what, done, total))

        def note(self, message: str) -> None: ...

        def warn(self, message: str) -> None: ...

    heard = Heard()
    check_files(folder, NAMES, "test", progress=heard)
    check_files(folder, NAMES, "test", progress=heard)
    assert heard.calls == [("checking images", 5, 5)]
