"""What is written is read, by whom and when; a cache has one writer."""

import gc
import os
import tracemalloc

import numpy as np
import pytest

from potstill.distillation.teacher_cache.cache import TeacherCache, copy_from_wider
from potstill.distillation.teacher_cache.record_format import RecordFormat
from potstill.errors import ArtifactError, UsageError


def test_records_are_read_at_once_and_last(known, tmp_path):
    store = known.store(tmp_path)
    assert store.views == 0
    order = np.random.default_rng(0).permutation(store.samples)
    for view in (0, 2):
        for ids in np.array_split(order, 30):
            assert not store.read(view, ids)[1].any()
            known.fill(store, view, ids)
            found, present = store.read(view, ids)
            assert present.all()
            assert (found == known.records(view, ids)).all()
    store.close()
    again = known.store(tmp_path)
    assert again.path == store.path
    assert [known.check(again, view) for view in range(4)] == [(10_000, 0), (0, 0), (10_000, 0), (0, 0)]
    assert again.views == 3
    assert again.coverage() == [10_000, 0, 10_000]
    assert again.coverage(2) == [10_000, 0]
    assert again.damaged() == []
    assert (again.samples, again.record, again.identity["name"]) == (10_000, known.record, "a")
    assert again.facts == {"teacher": "vgg16", "data": "some"}
    again.close()


def test_what_read_returns_may_be_changed(known, tmp_path):
    store = known.store(tmp_path, samples=10)
    known.fill(store, 0, range(5))
    for ids in (np.arange(5), np.arange(10)):
        store.read(0, ids)[0][:] = 255
    assert known.check(store, 0) == (5, 0)
    store.close()


def test_some_records_of_a_batch_are_there(known, tmp_path):
    store = known.store(tmp_path)
    known.fill(store, 1, [5000, 3, 4])
    ids = np.array([4, 5, 5000, 4, 0])
    found, present = store.read(1, ids)
    assert present.tolist() == [True, False, True, True, False]
    assert (found[present] == known.records(1, ids[present])).all()
    assert not found[~present].any()
    assert not store.read(0, ids)[1].any()  # another view of the same samples
    store.close()


def test_what_is_there_stays_and_equal_ids_of_a_batch_are_one(known, tmp_path):
    store = known.store(tmp_path, samples=10)
    known.fill(store, 0, [3, 4])
    other = np.full((4, 8), 60, np.uint8)
    store.write(0, np.array([4, 5, 5, 3]), other)
    found, present = store.read(0, np.array([3, 4, 5]))
    assert present.all()
    assert (found[:2] == known.records(0, [3, 4])).all()
    assert (found[2] == 60).all()
    store.close()
    again = known.store(tmp_path, samples=10)
    assert (again.read(0, np.array([3, 4, 5]))[0] == found).all()
    assert again.damaged() == []
    again.close()


def test_answers_that_are_not_finite_are_not_kept(known, tmp_path):
    store = known.store(tmp_path, samples=10)
    logits = known.answer(0, [1, 2])
    logits[0, 2] = np.nan
    store.write(0, np.array([1, 2]), known.record.encode(logits))
    assert store.read(0, np.array([1, 2]))[1].tolist() == [False, True]
    store.close()


def test_another_identity_record_or_number_of_samples_is_another_store(known, tmp_path):
    store = known.store(tmp_path)
    known.fill(store, 0, range(100))
    store.close()
    others = [
        known.store(tmp_path, name="b"),
        known.store(tmp_path, more=1),
        known.store(tmp_path, samples=9_999),
        TeacherCache.open(tmp_path, {"name": "a"}, RecordFormat("float32", 4), 10_000, {}),
        TeacherCache.open(tmp_path, {"name": "a"}, RecordFormat("float16", 5), 10_000, {}),
    ]
    for other in others:
        assert not other.read(0, np.arange(100))[1].any()
        other.close()
    assert len({store.path, *(other.path for other in others)}) == 6


def test_files_of_another_store_are_not_believed(known, tmp_path):
    one, other = known.store(tmp_path), known.store(tmp_path, name="b")
    known.fill(one, 0, range(10_000))
    one.close()
    other.close()
    for name in ("logits.bin", "done.bin"):
        (other.path / name).write_bytes((one.path / name).read_bytes())
    again = known.store(tmp_path, name="b")
    assert known.check(again, 0) == (0, 0)
    assert again.damaged() == [(0, sample) for sample in range(10_000)]
    again.close()


def test_a_record_takes_its_bytes_and_four(known, tmp_path):
    for samples, views in ((2_000, 8), (60_000, 1)):
        store = known.store(tmp_path, samples=samples)
        for view in range(views):
            known.fill(store, view, range(samples))
        store.close()
        size = sum(each.stat().st_size for each in store.path.iterdir())
        assert size / (samples * views) < 12.5  # and the manifest


def test_one_of_two_stores_in_one_process_writes_until_it_is_closed(known, tmp_path):
    one, other = known.store(tmp_path), known.store(tmp_path)
    known.fill(one, 0, range(100))
    known.fill(other, 0, range(4000, 8192))  # quietly nothing
    assert known.check(other, 0) == (0, 0)
    one.flush()
    assert known.check(other, 0) == (100, 0)
    one.close()
    known.fill(other, 0, range(4096))
    assert known.check(other, 0) == (4096, 0)
    other.close()
    again = known.store(tmp_path)
    assert known.check(again, 0) == (4096, 0)
    again.close()


def test_a_store_is_taken_over_with_what_its_former_writer_flushed(known, tmp_path):
    one, other = known.store(tmp_path), known.store(tmp_path)
    assert known.check(other, 0) == (0, 0)
    known.fill(one, 0, range(50))
    one.close()
    known.fill(other, 0, range(40, 90))  # without having looked before
    other.close()
    again = known.store(tmp_path)
    assert known.check(again, 0) == (90, 0)
    again.close()


def test_a_store_that_is_forgotten_holds_nothing(known, tmp_path):
    gc.collect()
    before = _handles()
    store = known.store(tmp_path)
    known.fill(store, 0, range(10))
    store = None
    gc.collect()
    again = known.store(tmp_path)
    known.fill(again, 0, range(20))
    assert known.check(again, 0) == (20, 0)
    again.close()
    again.close()  # twice is well
    assert _handles() == before


def _handles():
    """How many files this process has open, where the system says so."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_the_order_of_writing_is_records_then_marks_each_on_the_disk(known, tmp_path, monkeypatch):
    """A cut of power between any two of them leaves marks that fit their records, or none."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("this system does not say which file a handle is of")
    store = known.store(tmp_path)
    calls = []
    pwrite, fsync = os.pwrite, os.fsync

    def name(handle):
        return os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))

    monkeypatch.setattr(os, "pwrite", lambda *a: (calls.append(f"write {name(a[0])}"), pwrite(*a))[1])
    monkeypatch.setattr(os, "fsync", lambda *a: (calls.append(f"sync {name(a[0])}"), fsync(*a))[1])
    known.fill(store, 0, [1, 2, 5000])
    store.flush()
    marks = ["write done.bin"] * 2
    folder = f"sync {store.path.name}"
    assert calls == [*["write logits.bin"] * 2, "sync logits.bin", *marks, "sync done.bin", folder]
    calls.clear()
    store.flush()
    store.close()
    assert calls == []  # nothing is new


def test_the_room_for_a_view_is_reserved_before_the_first_record(known, tmp_path):
    store = known.store(tmp_path)
    known.fill(store, 1, [9_999])
    status = (store.path / "logits.bin").stat()
    assert status.st_size == 2 * 80_000
    assert status.st_blocks * 512 >= 80_000  # of view 1; view 0 may be a hole
    store.close()


def test_memory_does_not_grow_with_the_samples(known, tmp_path):
    samples = 2_000_000
    store = known.store(tmp_path, samples=samples)
    known.fill(store, 0, range(0, samples, 20_000))
    store.close()
    tracemalloc.start()
    try:
        again = known.store(tmp_path, samples=samples)
        assert again.read(0, np.arange(0, samples, 20_000))[1].all()
        # A byte for each, and while they are read their checksums, twice; not the records.
        assert tracemalloc.get_traced_memory()[1] < samples * 12
        again.close()
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("view", "ids"), [(-1, [0]), (0, [-1]), (0, [10])])
def test_what_cannot_be_asked(known, tmp_path, view, ids):
    store = known.store(tmp_path, samples=10)
    with pytest.raises(IndexError, match="in a cache of 10 samples"):
        store.read(view, np.array(ids))
    store.close()


def test_existing_stores_alone_are_opened_by_their_folder(known, tmp_path):
    store = known.store(tmp_path)
    known.fill(store, 0, range(10))
    store.close()
    again = TeacherCache.open_existing(store.path)
    assert known.check(again, 0) == (10, 0)
    again.close()
    with pytest.raises(ArtifactError, match="cannot read"):
        TeacherCache.open_existing(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_an_identity_that_is_no_json_is_refused(tmp_path):
    with pytest.raises(UsageError, match="must be JSON values"):
        TeacherCache.open(tmp_path, {"a": object()}, RecordFormat("float16", 4), 10, {})


def test_logits_are_copied_from_a_cache_with_embeddings(tmp_path):
    random = np.random.default_rng(0)
    samples, size = 9000, 12
    logits = random.normal(size=(2, samples, 3)).astype(np.float32)
    embeddings = random.normal(size=(samples, size)).astype(np.float32)
    plain, wide = RecordFormat("float16", 3), RecordFormat("float16", 3, size)

    def open_cache(record, name="a", count=samples):
        return TeacherCache.open(tmp_path, {"name": name}, record, count, {})

    wider = open_cache(wide)
    here = [np.arange(samples), np.arange(100, 8500, 3)]
    for view, ids in enumerate(here):
        wider.write(view, ids, wide.encode(logits[view, ids], embeddings[ids]))
    wider.close()

    cache = open_cache(plain)
    own = np.arange(50)
    cache.write(0, own, plain.encode(logits[0, own] + 1))  # what is there stays
    cache.flush()
    cache.close()
    cache = open_cache(plain)
    assert copy_from_wider(cache) == sum(map(len, here)) - len(own)
    records, present = cache.read(0, here[0])
    assert present.all()
    assert (records[50:] == plain.encode(logits[0, 50:])).all()
    assert (records[:50] == plain.encode(logits[0, :50] + 1)).all()
    records, present = cache.read(1, np.arange(samples))
    assert np.flatnonzero(present).tolist() == here[1].tolist()
    assert (records[present] == plain.encode(logits[1, here[1]])).all()
    assert copy_from_wider(cache) == 0
    cache.write(1, np.arange(9), plain.encode(logits[1, :9]))  # its blocks are free
    assert cache.read(1, np.arange(9))[1].all()
    cache.close()

    for other in (open_cache(plain, name="b"), open_cache(plain, count=10), open_cache(RecordFormat("float32", 3))):
        assert copy_from_wider(other) == 0  # other outputs, or of another precision
        other.close()
    wider = open_cache(wide)
    assert copy_from_wider(wider) == 0
    wider.close()
