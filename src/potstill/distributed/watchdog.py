"""Detect a lost process of a run, and end all of them by the first failure, which one process reports once.

A thread in every process writes a heartbeat with its progress to a store, twice a second, and checks the next rank.
The store is torchrun's own, and outlives the processes.  A rank counts as lost

- if it has written nothing for ``POTSTILL_TIMEOUT`` seconds (it is dead, stopped, or cut off), or
- if others wait for it while it neither makes progress nor computes, within a training step for that time, elsewhere
  (reading and writing files takes as long as it takes) for ten times that.

No collective has a time-out of its own that matters: a rank that is merely late is waited for.
"""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from potstill.distributed import heartbeat_timeout
from potstill.errors import PotstillError, RankLost, RemoteFailure, Stopped, WorkerError, exit_code_of

HEARTBEAT_SECONDS = 0.5
_SILENT_SECONDS = 3 * HEARTBEAT_SECONDS  # without a heartbeat after a connection broke, a rank is lost
_GRACE_SECONDS = 10.0  # for the main thread to end, after another process or the launcher has failed
_IDLE_CPU_SHARE = 0.05  # of a core; a process that uses less is idle
_TIMEOUT_FACTOR = 10.0  # of the time-out outside of training steps
_RESUME_HINT = "What was saved is intact: start all again, with --resume"
_CONNECTION_ERROR = re.compile(
    r"gloo|NCCL|[Cc]onnection (was )?(closed|reset|refused|aborted)|Broken pipe|Socket", re.ASCII
)


class Watchdog:
    """The thread that sends and checks heartbeats; ``end`` returns how this process ends.

    Args:
        store: that all processes of the run reach.
        rank, count: of this process, and how many there are.

    Attributes:
        place: how many exchanges have begun or ended; comparable between processes.
        moves: whatever else shows that this process gets on.
        steps: how many training steps it is within, 0 or 1.
    """

    def __init__(self, store: Store, rank: int, count: int) -> None:
        # Two connections, so that calls of the thread and the main thread do not wait for each other.
        self.store, self._own = store.clone(), store.clone()
        self.rank, self.count = rank, count
        self.place = self.moves = self.steps = self._beats = 0
        self._timeout, self._next = heartbeat_timeout(), (rank + 1) % count
        self._seen: _PeerState | None = None
        self._over = threading.Event()
        self._parent, self._failed_since, self._alone_since = os.getppid(), 0.0, 0.0
        self._thread = threading.Thread(target=self._watch, name="potstill-watching", daemon=True)
        self._beat()
        self._thread.start()

    def wait_for_all(self, seconds: float) -> bool:
        """Whether all processes begin within so many seconds; a signal is obeyed meanwhile."""
        until = time.monotonic() + seconds
        while not self.store.check([f"life/{rank}" for rank in range(self.count)]):
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True

    def end(self, error: BaseException | None) -> BaseException | None:
        """Report to the others how this process ends, and stop the thread.

        Returns:
            The exception to raise: ``error`` itself if it is the first failure of the run; ``RankLost`` if it follows
            from the loss of another process; ``RemoteFailure`` if it follows from, or is the same as, a failure that
            another process reports.
        """
        if error is not None and not isinstance(error, Stopped):
            _ignore_signals()  # torchrun sends SIGTERM when one process ends; the error must still be shown
        outcome: BaseException | None = error
        try:
            if error is None or isinstance(error, RemoteFailure):
                pass
            elif isinstance(error, Stopped):
                outcome = self._failure() or self._find_lost_peer(_SILENT_SECONDS) or error
            elif is_connection_error(error):
                outcome = self._find_cause(error)
            else:
                outcome = self._claim_failure(error, exit_code_of(error), str(error))
            self.store.set(f"ended/{self.rank}", str(getattr(outcome, "exit_code", 0)))
            return outcome
        except RuntimeError:  # the store's
            if error is None or not is_connection_error(error):
                return error
            return RankLost(f"the process or machine that started the run no longer answers.\n{_RESUME_HINT}")
        finally:
            self._over.set()

    # the first failure

    def _claim_failure(self, error: BaseException, code: int, text: str) -> BaseException:
        """Return ``error`` if it is the first failure, else ``RemoteFailure``, so that one process reports it."""
        claim = json.dumps({"rank": self.rank, "code": code, "text": text})
        first = self.store.compare_set("failure", "", claim).decode()
        return error if first == claim else RemoteFailure(json.loads(first)["code"])

    def _failure(self, store: Store | None = None) -> RemoteFailure | None:
        """Return the first failure of the run, if any."""
        store = store or self.store
        return RemoteFailure(json.loads(store.get("failure"))["code"]) if store.check(["failure"]) else None

    def _find_cause(self, error: BaseException) -> BaseException:
        """Return the failure that broke a connection."""
        for wait in (_SILENT_SECONDS, 2 * _SILENT_SECONDS):  # a failed process may be about to report it
            if (outcome := self._failure() or self._find_lost_peer(wait)) is not None:
                return outcome
        for rank in range(self.count):
            if rank != self.rank and self.store.check([f"ended/{rank}"]):
                return RemoteFailure(int(self.store.get(f"ended/{rank}")) or WorkerError.exit_code)
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        lost = RankLost(f"a connection between the processes of the run broke: {text}\n{_RESUME_HINT}")
        return self._claim_failure(lost, lost.exit_code, str(lost))

    def _find_lost_peer(self, seconds: float) -> BaseException | None:
        """Return the error for a process without heartbeat for so long that has not ended regularly."""
        before = self._is_alive()
        time.sleep(seconds)
        if (failure := self._failure()) is not None:
            return failure
        for rank, heartbeat in self._is_alive().items():
            if rank in before and heartbeat.beats == before[rank].beats and not self.store.check([f"ended/{rank}"]):
                lost = self._lost(rank, heartbeat, "has died, or is stopped")
                return self._claim_failure(lost, lost.exit_code, str(lost))
        return None

    def _is_alive(self) -> "dict[int, _Heartbeat]":
        others = [rank for rank in range(self.count) if rank != self.rank and self.store.check([f"life/{rank}"])]
        return {rank: _Heartbeat(**json.loads(self.store.get(f"life/{rank}"))) for rank in others}

    def _lost(self, rank: int, heartbeat: "_Heartbeat", problem: str) -> RankLost:
        process = f"rank {rank} of {self.count} (process {heartbeat.pid} on {heartbeat.host})"
        return RankLost(f"{process} does not answer: it {problem}.\n{_RESUME_HINT}")

    # the thread

    def _watch(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            try:
                self._beat()
                self._check_peer(time.monotonic())
            except RuntimeError:  # the store is gone with the launcher or its machine
                self._end_orphan(time.monotonic())

    def _beat(self) -> None:
        self._beats += 1
        heartbeat = _Heartbeat(self._beats, self.place, self.moves, self.steps, time.process_time(), os.getpid(), _HOST)
        self._own.set(f"life/{self.rank}", json.dumps(vars(heartbeat)))

    def _check_peer(self, now: float) -> None:
        if os.getppid() != self._parent:
            self._end_orphan(now)
        if (failure := self._failure(self._own)) is not None:
            # The main thread notices by itself, unless it is blocked.
            self._failed_since = self._failed_since or now
            if now - self._failed_since > _GRACE_SECONDS:
                os._exit(failure.exit_code)
        elif self._own.check([f"life/{self._next}"]) and not self._own.check([f"ended/{self._next}"]):
            heartbeat = _Heartbeat(**json.loads(self._own.get(f"life/{self._next}")))
            self._seen = self._seen or _PeerState(heartbeat, now)
            problem = self._seen.lost(heartbeat, now, self._timeout, waited_for=heartbeat.place < self.place)
            if problem:
                self._report_lost(heartbeat, problem)

    def _report_lost(self, heartbeat: "_Heartbeat", problem: str) -> None:
        lost = self._lost(self._next, heartbeat, problem)
        claim = json.dumps({"rank": self.rank, "code": lost.exit_code, "text": str(lost)})
        if self._own.compare_set("failure", "", claim).decode() == claim:
            sys.stderr.write(f"error: {lost}\n")
            sys.stderr.flush()
        # Its end breaks the connections, which wakes waiting processes.
        _kill_local_peer(heartbeat)

    def _end_orphan(self, now: float) -> None:
        """Make the main thread save and end; kill the process if that takes too long."""
        if not self._alone_since:
            self._alone_since = now
            os.kill(os.getpid(), signal.SIGTERM)
        elif now - self._alone_since > _GRACE_SECONDS:
            os._exit(128 + signal.SIGTERM)


@dataclass(frozen=True)
class _Heartbeat:
    beats: int
    place: int
    moves: int
    steps: int
    cpu: float  # seconds of CPU time of all its threads
    pid: int
    host: str


@dataclass
class _PeerState:
    """The state of another process, timed by the local clock, since clocks of machines differ."""

    heartbeat: _Heartbeat  # at its last progress
    since: float
    beats: int = 0
    beaten_at: float = 0.0  # when

    def lost(self, heartbeat: _Heartbeat, now: float, seconds: float, *, waited_for: bool) -> str:
        """Return the problem of the process, or ""."""
        if heartbeat.beats != self.beats:
            self.beats, self.beaten_at = heartbeat.beats, now
        elif now - self.beaten_at > seconds:
            return "has died, or is stopped"
        if (heartbeat.place, heartbeat.moves, heartbeat.steps) != (
            self.heartbeat.place,
            self.heartbeat.moves,
            self.heartbeat.steps,
        ):
            self.heartbeat, self.since = heartbeat, now
        idle = now - self.since
        if not waited_for or idle <= seconds * (1 if heartbeat.steps else _TIMEOUT_FACTOR):
            return ""
        if heartbeat.cpu - self.heartbeat.cpu > _IDLE_CPU_SHARE * idle:  # slow, but not idle
            self.heartbeat, self.since = heartbeat, now
            return ""
        return f"makes no progress after {heartbeat.place} exchanges with the others"


_HOST = socket.gethostname()


def is_connection_error(error: BaseException) -> bool:
    """Return whether an error may follow from the end of another process; gloo raises plain RuntimeErrors."""
    if isinstance(error, PotstillError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, DistError) or bool(_CONNECTION_ERROR.search(str(error)))


def _ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(number, signal.SIG_IGN)


def _kill_local_peer(heartbeat: _Heartbeat) -> None:
    """Kill a stalled process if the same launcher has started it on this machine."""
    if heartbeat.host != _HOST:
        return
    try:
        fields: Any = (
            Path(f"/proc/{heartbeat.pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        )
        if int(fields.split()[1]) == os.getppid():
            os.kill(heartbeat.pid, signal.SIGKILL)
    except (OSError, ValueError, IndexError):  # it is gone; or there is no /proc
        return
