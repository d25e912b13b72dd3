import contextlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from potstill.data import concurrency
from potstill.data.concurrency import raise_if_cancelled, threaded_map, usable_cores, worker_count


@pytest.mark.parametrize("threads", [1, 3, None])
def test_results_come_in_the_order_of_the_items(threads: int | None) -> None:
    assert list(threaded_map(lambda i: i * i, range(50), threads=threads)) == [i * i for i in range(50)]
    assert list(threaded_map(lambda i: i, [], threads=threads)) == []


def test_only_a_few_are_begun_ahead() -> None:
    begun: list[int] = []
    results = threaded_map(lambda i: begun.append(i), range(10_000), threads=2)
    next(results)
    assert len(begun) <= 10
    results.close()  # whoever stops does not wait for the rest
    assert len(begun) <= 10


def test_the_caller_does_it_all_where_one_is_enough() -> None:
    assert set(threaded_map(lambda _: threading.get_ident(), range(5), threads=1)) == {threading.get_ident()}


def test_an_error_comes_in_its_turn_and_ends_the_rest() -> None:
    begun: list[int] = []

    def work(i: int) -> int:
        begun.append(i)
        if i == 5:
            raise ValueError("five")
        return i

    before = threading.enumerate()  # those of another test may still be about to end
    results = threaded_map(work, range(1000), threads=2)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(results)
    assert len(begun) < 20
    assert not [thread for thread in threading.enumerate() if thread not in before]


def test_work_that_nobody_wants_any_more_stops_before_its_next_image() -> None:
    begun, done = threading.Event(), []

    def work(piece: list[int]) -> list[int]:
        for i in piece:
            raise_if_cancelled()
            begun.set()
            with contextlib.suppress(CancelledError):  # this image takes until a signal has come
                while True:
                    raise_if_cancelled()
                    time.sleep(0.001)
            done.append(i)
        return piece

    def interrupted() -> Iterator[list[int]]:
        yield [1, 2, 3]
        begun.wait(60)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(threaded_map(work, interrupted(), threads=2))
    assert done == [1]  # not 2 and 3
    raise_if_cancelled()  # here it is wanted


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", 2), ("100000 100000", 1), ("50000 100000", 1), ("800000 100000", 2), ("?", 2)]
)
def test_a_containers_share_counts(monkeypatch, tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text + "\n")
    monkeypatch.setattr(concurrency, "_CPU_QUOTA_FILE", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert usable_cores() == cores


@pytest.mark.parametrize(
    ("cores", "processes", "on_gpu", "workers"),
    [(2, 1, False, 1), (64, 1, False, 32), (64, 1, True, 63), (96, 8, True, 11), (96, 8, False, 6), (1, 4, True, 1)],
)
def test_workers_follow_cores_and_processes_without_a_cap(monkeypatch, cores, processes, on_gpu, workers):
    monkeypatch.setattr(concurrency, "usable_cores", lambda: cores)
    assert worker_count(processes, on_gpu=on_gpu) == workers
