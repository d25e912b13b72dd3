"""The processes of one run: the rank of this one, and the collectives between them.

All processes call every collective in the same order.  With a single process, each returns its input, so that callers
need no branch.  ``process_group`` creates the group from the environment that torchrun sets.

A lost process is detected by ``Watchdog``, which ends all of them by the first failure; one process reports it, once.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from potstill.distributed import heartbeat_timeout, is_torchrun_launched, ranks_and_counts, restart_count
from potstill.errors import (
    PotstillError,
    RankLost,
    RemoteFailure,
    Stopped,
    UsageError,
    WorkerError,
    exit_code_of,
    first_line,
)

HEARTBEAT_SECONDS = 0.5
_SILENT_SECONDS = 3 * HEARTBEAT_SECONDS  # without a heartbeat after a connection broke, a rank is lost
_GRACE_SECONDS = 10.0  # for the main thread to end, after another process or the launcher has failed
_JOIN_SECONDS = 5.0  # for a call of the store to return
_IDLE_CPU_SHARE = 0.05  # of a core; a process that uses less is idle
_TIMEOUT_FACTOR = 10.0  # of the time-out outside of training steps
_RESUME_HINT = "What was saved is intact: start all again, with --resume"
_CONNECTION_ERROR = re.compile(
    r"gloo|NCCL|[Cc]onnection (was )?(closed|reset|refused|aborted)|Broken pipe|Socket", re.ASCII
)


class Watchdog:
    """The thread that sends and checks heartbeats; ``end`` returns how this process ends."""

    def __init__(self, store: Store, rank: int, count: int) -> None:
        # Two connections, so that calls of the thread and the main thread do not wait for each other.
        self.store, self._own = store.clone(), store.clone()
        self.rank, self.count = rank, count
        self.place = 0  # how many exchanges have begun or ended; comparable between processes
        self.moves = 0  # whatever else shows that this process gets on
        self.steps = self._beats = 0  # training steps it is within, 0 or 1
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
        """Report to the others how this process ends, and stop the thread; return the exception to raise.

        ``error`` itself if it is the first failure of the run; else ``RankLost`` or ``RemoteFailure``, from which it
        follows.
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
            # A thread within a call of the store when the interpreter ends would abort the process (SIGABRT).
            self._thread.join(_JOIN_SECONDS)

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
        text = first_line(error)
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


Value = TypeVar("Value")


@dataclass(frozen=True)
class ProcessGroup:
    """One of ``count`` processes."""

    rank: int = 0  # of this process, from 0
    count: int = 1  # number of processes on all machines
    local_rank: int = 0  # on this machine
    local_count: int = 1
    watch: Watchdog | None = None  # counts the progress of this process; None for a single process

    @property
    def first(self) -> bool:
        """Whether this process writes the run folder and the output."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are several processes."""
        return self.count > 1

    def share(self, value: Value) -> Value:
        """Return the first process's value."""
        if not self.several:
            return value
        values: list[Any] = [value]
        with self.together():
            dist.broadcast_object_list(values, src=0)
        found: Value = values[0]
        return found

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all processes, by rank."""
        if not self.several:
            return [value]
        found: list[Any] = [None] * self.count
        with self.together():
            dist.all_gather_object(found, value)
        return found

    def collect(self, value: Value) -> list[Value] | None:
        """Return the values of all processes, by rank, in the first process; None in the others."""
        if not self.several:
            return [value]
        found: list[Any] | None = [None] * self.count if self.first else None
        with self.together():
            dist.gather_object(value, found, dst=0)
        return found

    def run_on_first(self, work: Callable[[], Value]) -> Value | None:
        """Return what a function returns in the first process, which alone calls it; raise its error in all."""
        if not self.several:
            return work()
        found, problem = None, None
        if self.first:
            try:
                found = work()
            except PotstillError as error:
                problem = type(error), str(error)
        problem = self.share(problem)
        if problem is not None:
            kind, text = problem
            raise kind(text)
        return found

    def highest(self, *values: int) -> tuple[int, ...]:
        """Return the maximum of each number over all processes."""
        if not self.several:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        with self.together():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tuple(tensor.tolist())

    def add(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums over all processes of tensors of equal shapes."""
        if not self.several:
            return dict(tensors)
        found = {}
        with self.together():
            for name in sorted(tensors):
                found[name] = tensors[name].clone()
                dist.all_reduce(found[name])
        return found

    def add_on_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As ``add``, but only the first process gets the sums; the others get something undefined."""
        if not self.several:
            return dict(tensors)
        found = {name: tensor.clone() for name, tensor in tensors.items()}
        with self.together():
            for name in sorted(found):
                dist.reduce(found[name], dst=0)
        return found

    @torch.no_grad()
    def share_tensors(self, tensors: list[Tensor]) -> None:
        """Copy the first process's tensors into these, in place."""
        if not self.several or not tensors:
            return
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        with self.together():
            for group in groups.values():  # one broadcast per dtype and device: there may be hundreds of small tensors
                flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
                dist.broadcast(flat, src=0)
                sizes = [tensor.numel() for tensor in group]
                for tensor, part in zip(group, torch.split(flat, sizes), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def share_state(self, module: nn.Module) -> None:
        """Copy the first process's parameters and buffers into a module."""
        self.share_tensors(list(module.state_dict(keep_vars=True).values()))

    def progress(self) -> None:
        """Count progress of this process."""
        if self.watch is not None:
            self.watch.moves += 1

    def mark(self) -> None:
        """Count a point that all processes pass in the same order."""
        if self.watch is not None:
            self.watch.place += 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """Enter around code that waits for other processes."""
        self.mark()
        yield
        self.mark()

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Enter around a training step: without progress for ``POTSTILL_TIMEOUT`` seconds there, a process is lost."""
        if self.watch is None:
            yield
            return
        self.watch.steps += 1
        try:
            yield
        finally:
            self.watch.steps -= 1
            self.watch.moves += 1


SINGLE_PROCESS = ProcessGroup()


_START_SECONDS = 600.0  # until all processes have started
_COLLECTIVE_TIMEOUT = timedelta(days=30)  # of a collective; ``Watchdog`` detects lost processes


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Join the process group that torchrun has started; without torchrun, yield ``SINGLE_PROCESS``.

    After an error, SIGTERM and SIGINT are ignored, so that the message can be shown.  WorkerError: other processes
    cannot be reached, or one is lost (``RankLost``).  RemoteFailure: another process has failed and reported why.
    """
    if not is_torchrun_launched():
        yield SINGLE_PROCESS
        return
    rank, count, local_rank, local_count = ranks_and_counts()
    start_timeout = max(heartbeat_timeout(), _START_SECONDS)
    _choose_gpu(local_rank, local_count)
    try:
        store, _, _ = next(rendezvous("env://", rank, count, timeout=timedelta(seconds=start_timeout)))
        store = PrefixStore(f"potstill {restart_count()}", store)  # without keys of earlier starts
        watchdog = Watchdog(PrefixStore("watching", store), rank, count)
    except (RuntimeError, ValueError) as error:
        raise WorkerError(f"the other processes of the run cannot be reached: {first_line(error)}") from error
    group = ProcessGroup(rank, count, local_rank, local_count, watchdog)
    failure: BaseException | None = None
    try:
        if not watchdog.wait_for_all(start_timeout):
            raise WorkerError(f"not all of the {count} processes have begun within {start_timeout:g} seconds")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_COLLECTIVE_TIMEOUT)
        if torch.cuda.is_available():
            properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
            check_distinct_gpus(group.gather(f"{_HOST} {properties.uuid}"))
        yield group
        group.highest(0)  # wait for all before leaving
    except BaseException as error:
        failure = error
    end = watchdog.end(failure)
    if end is not None and end is not failure:
        raise end from failure
    if end is not None:
        raise end
    dist.destroy_process_group()


def _choose_gpu(local_rank: int, local_count: int) -> None:
    """Use one GPU: that of the local rank, or the only one that it sees, as by SLURM's masks."""
    if not torch.cuda.is_available():
        return
    count = torch.cuda.device_count()
    if 1 < count < local_count:
        raise UsageError(
            f"{local_count} processes on a machine with {count} GPUs: "
            "start one per GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES= to compute on the CPU"
        )
    torch.cuda.set_device(0 if count == 1 else local_rank)


def check_distinct_gpus(gpus: Sequence[str]) -> None:
    """Raise UsageError if two processes share a GPU; ``gpus`` are those of all processes, by rank."""
    for rank, gpu in enumerate(gpus):
        if (first := gpus.index(gpu)) != rank:
            raise UsageError(
                f"the processes {first} and {rank} of {len(gpus)} see the same GPU: start one process per GPU, give "
                "each its own (CUDA_VISIBLE_DEVICES), or hide the GPUs with CUDA_VISIBLE_DEVICES= to compute on the CPU"
            )
