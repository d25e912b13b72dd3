"""Stores are listed whatever state they are in, found by key, and removed as a whole."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from potstill.distillation.teacher_cache.cache import delete_leftovers, find_cache, list_caches, remove_cache
from potstill.errors import StorageError, UsageError
from potstill.io import write_checksummed_json


def two(known, root):
    one, other = known.store(root), known.store(root, name="b", split="val")
    known.fill(one, 0, range(10_000))
    known.fill(one, 1, range(2_500))
    known.fill(one, 3, range(5_000))
    for store in (one, other):
        store.close()
    os.utime(one.path / "manifest.json", (1_000, 1_000))
    os.utime(other.path / "manifest.json", (2_000, 2_000))
    return one.path, other.path


def test_size_views_share_and_last_use(known, tmp_path):
    one, other = two(known, tmp_path)
    first, second = list_caches(tmp_path)
    assert (first.key, second.key) == (other.name, one.name)  # the last used first
    assert (first.recorded, first.coverage, first.last_used) == ((), None, 2_000)
    assert second.recorded == (10_000, 2_500, 0, 5_000)
    assert second.coverage == 17_500 / 40_000
    assert 4 * 120_000 > second.size > 3 * 80_000  # view 2 is a hole
    assert second.manifest.facts["teacher"] == "vgg16"
    assert first.as_dict() == {
        "key": other.name,
        "path": str(other),
        "bytes": first.size,
        "last_use": 2_000,
        "samples": 10_000,
        "views": 0,
        "recorded": [],
        "record": {"kind": "float16", "bytes": 8, "classes": 4, "embedding": 0},
        "teacher": "vgg16",
        "folder": None,
        "data": "some",
        "split": "val",
        "error": None,
    }


def test_looking_at_stores_changes_nothing(known, tmp_path):
    one, _ = two(known, tmp_path)
    before = {each: (each.stat().st_mtime_ns, each.stat().st_size) for each in one.iterdir()}
    list_caches(tmp_path)
    assert {each: (each.stat().st_mtime_ns, each.stat().st_size) for each in one.iterdir()} == before


def test_no_folder_is_no_stores_and_other_things_are_left_alone(known, tmp_path):
    assert list_caches(tmp_path / "none") == []
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "0123456789abcdef").write_text("a file")
    (tmp_path / "fedcba9876543210").symlink_to("/")
    (tmp_path / "more").mkdir()
    assert list_caches(tmp_path) == []
    with pytest.raises(StorageError, match="cannot read"):
        list_caches(tmp_path / "notes.txt")


def test_damaged_and_foreign_stores_are_listed_and_can_be_removed(known, tmp_path):
    one, other = two(known, tmp_path)
    write_checksummed_json(one / "manifest.json", {"format": 4})
    os.utime(one / "manifest.json", (1_000, 1_000))
    (other / "done.bin").unlink()
    first, second = list_caches(tmp_path)
    assert "done.bin: No such file" in first.error or "No such file" in first.error
    assert "format 4" in second.error
    assert second.as_dict()["error"] == second.error
    for path in (one, other):
        assert remove_cache(path) > 0
    assert list(tmp_path.iterdir()) == []


def test_keys_are_found_by_their_beginning_and_unknown_ones_refused(known, tmp_path):
    one, _ = two(known, tmp_path)
    assert find_cache(tmp_path, one.name) == one
    assert find_cache(tmp_path, one.name[:4]) == one
    wrong = one.name[:-1] + ("0" if one.name[-1] != "0" else "1")
    with pytest.raises(UsageError, match=f"did you mean '{one.name}'"):
        find_cache(tmp_path, wrong)
    for key in ("", one.name[:3], "../" + one.name, "..", "/"):
        with pytest.raises(UsageError, match="no teacher cache"):
            find_cache(tmp_path, key)
    (tmp_path / (one.name[:5] + "00000000000")).mkdir()
    with pytest.raises(UsageError, match="several caches begin with"):
        find_cache(tmp_path, one.name[:5])
    with pytest.raises(UsageError, match="Known: none"):
        find_cache(tmp_path / "none", "abcd")


def test_a_store_in_use_is_not_removed(known, tmp_path):
    store = known.store(tmp_path)
    known.fill(store, 0, range(10))
    with pytest.raises(StorageError, match="is in use"):
        remove_cache(store.path)
    store.flush()
    assert known.check(store, 0) == (10, 0)
    store.close()
    assert remove_cache(store.path) > 0
    again = known.store(tmp_path)
    assert known.check(again, 0) == (0, 0)
    again.close()


def test_a_store_in_use_by_another_process_is_not_removed(known, tmp_path):
    text = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom conftest import Known\n"
        "store = Known.store(sys.argv[1]); print('ready', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", text, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"ready\n"
        path = next(tmp_path.iterdir())
        with pytest.raises(StorageError, match="is in use"):
            remove_cache(path)
    finally:
        other.kill()
        other.communicate()
    remove_cache(path)
    assert not path.exists()


def test_stores_are_opened_and_removed_at_the_same_time(script, tmp_path):
    """Whoever opens a store while it is removed gets a new, empty one."""
    opener = """
for turn in range(150):
    store = Known.store(sys.argv[1], samples=100)
    Known.fill(store, 0, range(100))
    assert Known.check(store, 0)[1] == 0
    store.close()
"""
    remover = """
import pathlib
from potstill.errors import StorageError
from potstill.distillation.teacher_cache.cache import list_caches, remove_cache
root, over, count, last = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), 0, False
while not last:
    last = over.exists()  # then once more
    for each in list_caches(root):
        try:
            count += remove_cache(each.path) > 0
        except StorageError as error:
            assert "in use" in str(error) or "No such file" in str(error), error
print(count)
"""
    stores, over = tmp_path / "stores", tmp_path / "over"
    with ThreadPoolExecutor(3) as pool:
        removing = pool.submit(script, remover, stores, over)
        opening = [pool.submit(script, opener, stores) for _ in range(2)]
        try:
            for each in opening:
                each.result()
        finally:
            over.touch()
        removed = int(removing.result())
    assert removed > 0


def test_what_an_interrupted_removal_left_is_swept(known, tmp_path):
    one, other = two(known, tmp_path)
    gone = tmp_path / f".{one.name}.removed"
    one.rename(gone)
    delete_leftovers(tmp_path)
    assert not gone.exists()
    assert other.exists()
