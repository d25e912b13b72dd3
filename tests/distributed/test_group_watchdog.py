"""Who counts as lost, by hand; and what each process shows when one fails, with the processes' ends in one store."""

import contextlib
import itertools
import json
import signal
import threading
import time

import pytest
import torch
from torch.distributed import DistBackendError, TCPStore
from torch.distributed.distributed_c10d import PrefixStore

from potstill.distributed import group as module
from potstill.distributed.group import ProcessGroup, Watchdog, _Heartbeat, _PeerState, is_connection_error
from potstill.errors import DataError, RankLost, RemoteFailure, Stopped, StorageError, UsageError, WorkerError

pytestmark = pytest.mark.own_process

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:30153"


def life(beats, place=0, moves=0, steps=0, cpu=0.0):
    return _Heartbeat(beats, place, moves, steps, cpu, 4711, "node7")


def first_lost(lives, waited_for=True):
    """The second in which a process is lost that is seen once a second, with a time-out of 5 s, and why."""
    seen = None
    for now, each in enumerate(lives):
        seen = seen or _PeerState(each, 0.0)
        if what := seen.lost(each, float(now), 5.0, waited_for=waited_for):
            return now, what
    return None


BEATING = range(100)


def test_a_process_that_beats_and_gets_on_is_never_lost():
    for gets_on in ("place", "moves"):
        assert first_lost(life(beat, steps=1, **{gets_on: beat // 4}) for beat in BEATING) is None


def test_a_process_without_a_beat_is_lost_after_the_time_out():
    """The last new beat is seen at 9 s."""
    assert first_lost((life(min(beat, 9)) for beat in BEATING), waited_for=False) == (15, "has died, or is stopped")


def test_a_process_that_stands_still_in_a_step_is_lost_after_the_time_out():
    found = first_lost(life(beat, place=min(beat, 7), steps=1) for beat in BEATING)
    assert found == (13, "makes no progress after 7 exchanges with the others")


def test_reading_and_writing_files_may_take_longer():
    """Outside of a step ten time-outs: from 7 s to beyond 57 s."""
    found = first_lost(life(beat, place=min(beat, 7)) for beat in BEATING)
    assert found == (58, "makes no progress after 7 exchanges with the others")


def test_a_process_that_computes_is_slow_not_lost():
    """A tenth of a core; a hundredth, that beats and nothing else, is not enough."""
    assert first_lost(life(beat, steps=1, cpu=0.1 * beat) for beat in BEATING) is None
    assert first_lost(life(beat, steps=1, cpu=0.01 * beat) for beat in BEATING) == (
        6,
        "makes no progress after 0 exchanges with the others",
    )


def test_a_process_that_waits_for_others_is_not_lost():
    assert first_lost((life(beat, steps=1) for beat in BEATING), waited_for=False) is None


def test_which_errors_may_follow_from_the_end_of_another_process():
    assert is_connection_error(RuntimeError(GLOO))
    assert is_connection_error(DistBackendError("NCCL communicator was aborted"))
    for own in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("Expected all tensors to be on the same device"),
        ValueError("gloo"),
        WorkerError("Connection closed by peer"),
    ):
        assert not is_connection_error(own), own


# several ranks in one process


@pytest.fixture
def ranks(monkeypatch):
    """A function that gives so many ``Watchdog``, which beat every 20 ms."""
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(
        module, "_SILENT_SECONDS", 1.0
    )  # a busy machine may leave a thread unscheduled for half a second
    monkeypatch.setattr(module, "_GRACE_SECONDS", 1e9)  # else a thread would end the tests
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    store, made = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), []
    games = itertools.count()

    def make(count):
        own = PrefixStore(f"run {next(games)}", store)
        made.extend(Watchdog(own, rank, count) for rank in range(count))
        return made[-count:]

    yield make
    for each in made:
        die(each)
    for number, handler in before.items():
        signal.signal(number, handler)


def die(rank):
    """Beat no more, and leave no word."""
    rank._over.set()
    rank._thread.join()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("Expected all tensors to be on the same device"),
        DataError("photographs/cat.png can no longer be read"),
        ZeroDivisionError("one by nothing"),
    ],
)
def test_an_error_is_shown_by_its_rank_and_the_others_end_with_its_code(ranks, error):
    first, second, third = ranks(3)
    code = {"OutOfMemoryError": 5, "DataError": 3}.get(type(error).__name__, 1)
    assert second.end(error) is error
    for other in (first, third):
        found = other.end(RuntimeError(GLOO))
        assert isinstance(found, RemoteFailure)
        assert found.exit_code == code


def test_no_thread_is_within_a_call_of_the_store_when_the_process_ends(ranks, monkeypatch):
    (rank,) = ranks(1)
    calling = threading.Event()

    def slow(now):
        calling.set()
        time.sleep(0.3)

    monkeypatch.setattr(rank, "_check_peer", slow)
    assert calling.wait(10)
    assert rank.end(None) is None
    assert not rank._thread.is_alive()


def test_a_mistake_of_all_is_shown_once(ranks):
    errors = [UsageError("unknown method 'kid'") for _ in range(3)]
    found = [rank.end(error) for rank, error in zip(ranks(3), errors, strict=True)]
    assert found[0] is errors[0]
    assert [(type(each), each.exit_code) for each in found[1:]] == [(RemoteFailure, 2)] * 2


def test_a_dead_process_is_named_once(ranks):
    first, second, third = ranks(3)
    die(second)
    found = first.end(RuntimeError(GLOO))
    assert isinstance(found, RankLost)
    assert str(found).startswith("rank 1 of 3 (process ")
    assert "does not answer: it has died, or is stopped.\nWhat was saved is intact" in str(found)
    after = third.end(Stopped(signal.SIGTERM))  # torchrun ends who is left
    assert (type(after), after.exit_code) == (RemoteFailure, 7)


def test_a_signal_that_torchrun_sends_for_a_dead_process_names_it(ranks):
    first, second = ranks(2)
    die(second)
    assert "rank 1 of 2" in str(first.end(Stopped(signal.SIGTERM)))


def test_a_signal_to_all_is_a_signal(ranks):
    stops = [Stopped(signal.SIGTERM) for _ in range(2)]
    assert [rank.end(stop) for rank, stop in zip(ranks(2), stops, strict=True)] == stops


def test_who_waits_for_a_process_that_was_stopped_is_stopped_too(ranks):
    first, second = ranks(2)
    second.end(Stopped(signal.SIGTERM))
    assert first.end(RuntimeError(GLOO)).exit_code == 143


def test_a_connection_that_broke_between_processes_that_live(ranks):
    found = ranks(2)[0].end(RuntimeError(GLOO))
    assert isinstance(found, RankLost)
    assert str(found).startswith("a connection between the processes of the run broke: [/pytorch/third_party/gloo")


def test_nothing_is_said_of_a_run_that_ends_well(ranks):
    assert [rank.end(None) for rank in ranks(2)] == [None, None]


def test_a_rank_that_hangs_is_named_by_the_one_before_it_and_by_no_other(ranks, monkeypatch, capsys):
    """Rank 2 is within a step, and the others wait for it; every second by hand, with a time-out of 5 s."""
    monkeypatch.setenv("POTSTILL_TIMEOUT", "5")
    monkeypatch.setattr(module, "_IDLE_CPU_SHARE", 1000.0)  # this process computes
    three, ended = ranks(3), []
    monkeypatch.setattr(module, "_kill_local_peer", lambda life: ended.append(life.pid))
    for each in three:
        die(each)
        each.steps, each.place = 1, 4 if each.rank < 2 else 3
    for now in range(7):
        assert not ended
        for each in three:
            each._beat()
        for each in three:
            each._check_peer(float(now))
    assert len(ended) == 1
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 1
    assert errors.startswith("error: rank 2 of 3 (process ")
    assert "it makes no progress after 3 exchanges with the others.\n" in errors
    found = three[0].end(RuntimeError(GLOO))
    assert (type(found), found.exit_code) == (RemoteFailure, 7)


def test_what_the_others_see_of_a_process(ranks):
    (rank, _) = ranks(2)
    processes = ProcessGroup(0, 2, watch=rank)
    with processes.stepping():
        inside = rank.steps
        with processes.together():
            processes.mark()
        processes.progress()
    assert (inside, rank.steps, rank.place, rank.moves) == (1, 0, 3, 2)
    with contextlib.suppress(KeyError), processes.stepping():
        raise KeyError
    assert rank.steps == 0


def test_a_store_that_is_gone_is_the_launcher_that_is_gone(ranks, monkeypatch):
    first, _ = ranks(2)
    die(first)

    class Gone:
        def __getattr__(self, name):
            raise RuntimeError("Broken pipe")

    monkeypatch.setattr(first, "store", Gone())
    assert "that started the run no longer answers" in str(first.end(RuntimeError(GLOO)))
    own = StorageError("no space left")
    assert first.end(own) is own


def test_the_failure_in_the_store_can_be_read_by_people(ranks):
    first, _ = ranks(2)
    first.end(DataError("bad"))
    assert json.loads(first.store.get("failure")) == {"rank": 0, "code": 3, "text": "bad"}
