"""Nothing wrong is ever read, whatever ends the process, fills the disk or changes the files."""

import errno
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from potstill.distillation.teacher_cache import cache
from potstill.errors import ArtifactError, StorageError
from potstill.io import write_checksummed_json

SAMPLES = 600  # records of 8 bytes, so that a view's begin and end within a page


def flip(path, at, bit):
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ (1 << bit)]))


def full(known, root, samples=SAMPLES, views=2):
    store = known.store(root, samples=samples)
    for view in range(views):
        known.fill(store, view, range(samples))
    store.close()
    return store.path


@pytest.mark.parametrize("name", ["logits.bin", "done.bin"])
def test_each_of_400_changed_bits_is_found_and_its_record_written_anew(known, tmp_path, name):
    chance, path = random.Random(1), full(known, tmp_path)
    size = (path / name).stat().st_size
    for turn in range(400):
        at, bit = chance.randrange(size), chance.randrange(8)
        flip(path / name, at, bit)
        store = known.store(tmp_path, samples=SAMPLES)
        states = [known.check(store, view) for view in range(2)]
        assert sum(there for there, _ in states) < 2 * SAMPLES, (at, bit)  # the record is missed
        assert [wrong for _, wrong in states] == [0, 0], (at, bit)
        assert len(store.damaged()) == 1
        if turn % 40 == 0:
            for view in range(2):
                known.fill(store, view, range(SAMPLES))
            assert [known.check(store, view) for view in range(2)] == [(SAMPLES, 0)] * 2
            store.flush()
            assert store.damaged() == []
            store.close()
        else:
            store.close()
            flip(path / name, at, bit)
    again = known.store(tmp_path, samples=SAMPLES)
    assert [known.check(again, view) for view in range(2)] == [(SAMPLES, 0)] * 2
    again.close()


@pytest.mark.parametrize("name", ["logits.bin", "done.bin"])
@pytest.mark.parametrize("keep", [0, 1, 7, 600, 1201, 4099, 4801])
def test_a_file_that_was_cut_short_is_filled_again(known, tmp_path, name, keep):
    path = full(known, tmp_path)
    os.truncate(path / name, min(keep, (path / name).stat().st_size))
    store = known.store(tmp_path, samples=SAMPLES)
    for view in range(2):
        assert known.check(store, view)[1] == 0
        known.fill(store, view, range(SAMPLES))
        assert known.check(store, view) == (SAMPLES, 0)
    store.close()
    again = known.store(tmp_path, samples=SAMPLES)
    assert [known.check(again, view) for view in range(2)] == [(SAMPLES, 0)] * 2
    again.close()


@pytest.mark.parametrize("name", ["logits.bin", "done.bin"])
def test_a_file_that_is_gone_is_made_again(known, tmp_path, name):
    path = full(known, tmp_path)
    (path / name).unlink()
    store = known.store(tmp_path, samples=SAMPLES)
    assert known.check(store, 0) == (0, 0)
    known.fill(store, 0, range(SAMPLES))
    assert known.check(store, 0) == (SAMPLES, 0)
    store.close()


def test_records_that_never_reached_the_disk_are_not_believed(known, tmp_path):
    """After a cut of power a disk may hold the marks and zeros where the records should be."""
    path = full(known, tmp_path)
    with (path / "logits.bin").open("r+b") as file:
        file.seek(8 * 43)
        file.write(bytes(4096))
    store = known.store(tmp_path, samples=SAMPLES)
    assert known.check(store, 0) == (SAMPLES - 512, 0)
    assert known.check(store, 1) == (SAMPLES, 0)
    assert store.damaged() == [(0, sample) for sample in range(43, 555)]
    store.close()


def test_a_checksum_that_was_half_written_is_not_believed(known, tmp_path):
    store = known.store(tmp_path, samples=400)
    known.fill(store, 0, range(0, 400, 2))
    store.flush()
    before = (store.path / "done.bin").read_bytes().ljust(800, b"\0")
    known.fill(store, 0, range(1, 400, 2))
    store.close()
    after = (store.path / "done.bin").read_bytes()
    for cut in range(1, len(after), 7):
        (store.path / "done.bin").write_bytes(after[:cut] + before[cut:])
        again = known.store(tmp_path, samples=400)
        whole = 200 + cut // 2 // 2
        # Half of a checksum is the whole one if its other byte is 0.
        assert known.check(again, 0) in {(whole, 0), (whole + (after[cut] == 0), 0)}
        again.close()


def test_a_damaged_manifest_and_a_foreign_format_are_refused(known, tmp_path):
    path = full(known, tmp_path)
    flip(path / "manifest.json", 40, 0)
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged.*potstill cache rm"):
        known.store(tmp_path, samples=SAMPLES)
    write_checksummed_json(path / "manifest.json", {"format": 9})
    with pytest.raises(ArtifactError, match="format 9"):
        known.store(tmp_path, samples=SAMPLES)
    assert (path / "logits.bin").stat().st_size == 16 * SAMPLES  # nothing was touched


@pytest.mark.own_process
def test_a_full_disk_is_a_storage_error_once_and_nothing_is_harmed(known, mounted):
    disk = mounted("size=512k")
    store = known.store(disk, samples=10_000)  # 100 kB a view
    said = []
    for view in range(8):
        try:
            known.fill(store, view, range(10_000))
            store.flush()
        except StorageError as error:
            said.append(str(error))
    assert len(said) == 1
    assert said[0].startswith(f"cannot write {store.path}")
    assert "No space left on device" in said[0]
    store.close()
    again = known.store(disk, samples=10_000)
    whole = [known.check(again, view) for view in range(8)]
    again.close()
    assert whole[:3] == [(10_000, 0)] * 3
    assert all(wrong == 0 for _, wrong in whole)
    assert shutil.disk_usage(disk).free > 0  # what could not be reserved in full has been given back


@pytest.mark.own_process
def test_a_full_disk_when_marks_are_written(known, mounted):
    disk = mounted("size=512k")
    store = known.store(disk, samples=20_000)
    known.fill(store, 0, range(20_000))
    room = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(bytes(room))
    with pytest.raises(StorageError, match=r"done\.bin: No space left on device"):
        store.flush()
    store.flush()
    store.close()
    (disk / "ballast").unlink()
    again = known.store(disk, samples=20_000)
    there, wrong = known.check(again, 0)
    assert (there < 20_000, wrong) == (True, 0)
    known.fill(again, 0, range(20_000))
    again.close()


@pytest.mark.own_process
def test_no_room_for_the_folder_itself(known, mounted):
    disk = mounted("size=2m,nr_inodes=2")
    with pytest.raises(StorageError, match="No space left on device"):
        known.store(disk / "stores")


@pytest.mark.own_process
def test_a_read_only_store_is_read_and_refuses_to_be_written_once(known, mounted):
    disk = mounted("size=8m")
    full(known, disk, views=1)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    store = known.store(disk, samples=SAMPLES)
    assert known.check(store, 0) == (SAMPLES, 0)
    assert known.check(store, 1) == (0, 0)
    with pytest.raises(StorageError, match=r"cannot write .*it is read-only"):
        known.fill(store, 1, range(10))
    known.fill(store, 1, range(10))
    store.close()
    with pytest.raises(StorageError, match="Read-only file system"):
        known.store(disk, name="another")


@pytest.mark.parametrize("call", ["fsync", "pwrite", "posix_fallocate"])
@pytest.mark.parametrize("reason", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_an_error_of_the_disk_is_told_once_and_only_flushed_records_remain(known, tmp_path, monkeypatch, call, reason):
    path = full(known, tmp_path, views=1)
    store = known.store(tmp_path, samples=SAMPLES)

    def fail(*args):
        raise OSError(reason, os.strerror(reason))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StorageError, match=f"cannot write {path}.*{os.strerror(reason)}"):  # noqa: PT012
            known.fill(store, 1, range(SAMPLES))
            store.flush()
        known.fill(store, 1, range(SAMPLES))
        store.flush()
        store.close()
    again = known.store(tmp_path, samples=SAMPLES)
    assert [known.check(again, view) for view in range(2)] == [(SAMPLES, 0), (0, 0)]
    again.close()


def test_an_error_while_reading_is_told(known, tmp_path, monkeypatch):
    path = full(known, tmp_path)
    store = known.store(tmp_path, samples=SAMPLES)

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    for ask in (lambda: store.read(0, np.arange(3)), store.coverage, store.damaged):
        with pytest.raises(StorageError, match=f"cannot read {path}: Input/output error"):
            ask()
    monkeypatch.undo()
    store.close()


def test_where_nothing_can_be_reserved_zeros_are_written(known, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    store = known.store(tmp_path, samples=300_000)
    known.fill(store, 0, [0, 200_000, 299_999])  # more than 1 MB apart, which is read at once
    store.close()
    again = known.store(tmp_path, samples=300_000)
    assert known.check(again, 0) == (3, 0)
    again.close()
    assert (store.path / "logits.bin").stat().st_blocks * 512 >= 2_400_000
    monkeypatch.delattr(os, "posix_fallocate")
    full(known, tmp_path / "b")
    store = known.store(tmp_path / "b", samples=SAMPLES)
    assert known.check(store, 1) == (SAMPLES, 0)
    store.close()


def test_short_writes_are_continued(known, tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: pwrite(handle, data[: max(1, len(data) // 2)], at))
    full(known, tmp_path)
    store = known.store(tmp_path, samples=SAMPLES)
    assert known.check(store, 1) == (SAMPLES, 0)
    store.close()


def test_a_system_without_file_locks_has_no_stores(known, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "fcntl", None)
    with pytest.raises(StorageError, match="file locks"):
        known.store(tmp_path)


def test_a_file_system_without_locks_has_no_stores(known, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(cache.fcntl, "flock", fail)
    with pytest.raises(StorageError, match="No locks available"):
        known.store(tmp_path)


def test_a_place_that_is_no_folder(known, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        known.store(tmp_path / "file")


FILLER = """
import os, random, signal, time
import numpy as np
chance, root = random.Random(5), sys.argv[1]
SAMPLES, KILLS, flushed, seen = 2400, 100, set(), 0
for turn in range(KILLS):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        store = Known.store(root, samples=SAMPLES)
        order = np.random.default_rng(turn).permutation(SAMPLES)
        view = turn % 3
        for at, ids in enumerate(np.array_split(order, 120)):
            Known.fill(store, view, ids)
            if at % 8 == 7:
                store.flush()
                os.write(writer, b".")
        os._exit(0)
    os.close(writer)
    done = 0
    for _ in range(chance.randrange(4)):  # of 15 flushes
        done += len(os.read(reader, 1))
    time.sleep(chance.uniform(0.0, 0.01))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done += len(os.read(reader, 100))
    os.close(reader)
    order = np.random.default_rng(turn).permutation(SAMPLES)
    for ids in np.array_split(order, 120)[: done * 8]:
        flushed.update((turn % 3, i) for i in ids.tolist())
    store = Known.store(root, samples=SAMPLES)
    states = [Known.check(store, view) for view in range(3)]
    assert not any(wrong for _, wrong in states), (turn, states)
    assert store.damaged() == [], turn
    for view in range(3):
        ids = np.array([i for v, i in flushed if v == view], np.int64)
        assert store.read(view, ids)[1].all(), (turn, view)
    assert sum(there for there, _ in states) >= len(flushed)
    store.close()
    seen += bool(done)
    if turn % 10 == 9:
        import shutil
        shutil.rmtree(root); flushed.clear()
print(KILLS, seen)
"""


def test_100_kills_while_filling_harm_nothing_and_lose_nothing_that_was_flushed(script, tmp_path):
    kills, with_flushes = map(int, script(FILLER, tmp_path / "stores").split())
    assert kills == 100
    assert with_flushes > 50  # or the test would show nothing


RACER = """
import time
import numpy as np
root, seed = sys.argv[1], int(sys.argv[2])
store = Known.store(root, samples=6000)
asked = 0
for view in range(2):
    order = np.random.default_rng(seed + view).permutation(6000)
    for at, ids in enumerate(np.array_split(order, 100)):
        found, present = store.read(view, ids)
        assert (found[present] == Known.records(view, ids[present])).all()
        asked += int((~present).sum())
        Known.fill(store, view, ids[~present])
        if at % 10 == 9:
            store.flush()
        time.sleep(0.001)
store.close()
print(asked)
"""


def test_several_processes_use_one_store_at_once(known, script, tmp_path):
    with ThreadPoolExecutor(3) as pool:
        asked = list(pool.map(lambda seed: script(RACER, tmp_path, seed), (1, 2, 3)))
    store = known.store(tmp_path, samples=6000)
    # Whoever wrote has seen every sample.
    assert [known.check(store, view) for view in range(2)] == [(6000, 0)] * 2
    assert store.damaged() == []
    store.close()
    assert all(int(count) <= 12_000 for count in asked)
    assert sum(map(int, asked)) >= 12_000


HOLDER = """
store = Known.store(sys.argv[1])
Known.fill(store, 0, range(10))
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_store_that_another_process_writes_is_left_to_it_until_it_ends(known, tmp_path):
    head = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom conftest import Known\n"
    other = subprocess.Popen(
        [sys.executable, "-c", head + HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"ready\n"
        store = known.store(tmp_path)
        known.fill(store, 0, [20, 5000])  # quietly nothing
        assert known.check(store, 0) == (0, 0)
    finally:
        other.kill()
        other.communicate()
    known.fill(store, 0, [20, 5000])  # its locks have ended with it
    assert known.check(store, 0) == (2, 0)
    store.close()


def test_a_forked_process_writes_nothing_in_its_parents_name(script, tmp_path):
    text = """
import os
store = Known.store(sys.argv[1])
Known.fill(store, 0, range(10))
child = os.fork()
if not child:
    Known.fill(store, 0, range(10, 20))
    Known.fill(store, 1, range(20))
    store.close()
    own = Known.store(sys.argv[1])
    Known.fill(own, 0, range(30))
    os._exit(0 if Known.check(own, 0) == (0, 0) else 1)
assert os.waitpid(child, 0)[1] == 0
Known.fill(store, 0, range(40, 50))
store.close()
store = Known.store(sys.argv[1])
print([Known.check(store, view) for view in range(2)])
"""
    assert script(text, tmp_path).strip() == "[(20, 0), (0, 0)]"


def test_stores_have_nothing_to_do_with_torch(script, tmp_path):
    text = (
        "Known.store(sys.argv[1]).close()\nimport potstill.distillation.teacher_cache.cache\n"
        "print('torch' in sys.modules)"
    )
    assert script(text, tmp_path).strip() == "False"
