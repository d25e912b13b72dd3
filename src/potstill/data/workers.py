"""Worker processes that decode images if these do not fit into memory.

They only decode and resize; augmentation is done in the main process, so that results do not depend on their number.

Each process has a pipe, over which it receives sample ids and returns None or an error, and slots for its next batches
in shared memory, which is allocated before it starts.  There is no queue thread and no signal handler: the death of a
process is noticed when its batch is fetched.
"""

import math
import multiprocessing
import os
import pickle  # nosec B403: between this process and its own children
import shutil
import signal
import threading
import time
import traceback
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import Tensor

from potstill.data.image_sets import ImageSet, read_square
from potstill.data.preprocessing import square_shape
from potstill.distributed import TIMEOUT_VARIABLE, heartbeat_timeout
from potstill.errors import StorageError, UsageError, WorkerError
from potstill.formatting import format_names, format_scaled

_AHEAD = 2  # batches that a process decodes ahead
_LISTED = 3  # images that a message names
_SHM = Path("/dev/shm")  # nosec B108: where Linux keeps shared memory; containers limit it to 64 MB


class DecodeWorkers:
    """``squares(batches)`` gives the batches' pixels in order, one epoch at a time; the processes end with this object,
    or with the main process, even if that is killed.

    Shared memory for a ``batch`` is allocated at once (None: at the first use); ``warn`` is called if it suffices only
    for fewer processes.  ``count`` is their number; 0 only if ``batch`` is given.
    """

    def __init__(
        self,
        images: ImageSet,
        side: int,
        resize_mode: str,
        processes: int,
        *,
        batch: int | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._images, self._side, self._resize_mode, self._warn = images, side, resize_mode, warn
        self._shape = square_shape(side, resize_mode)
        self._timeout = heartbeat_timeout()
        self._wanted = self.count = processes
        self._members: list[_WorkerProcess] = []
        self._pixels = self._decoded = torch.empty(0)
        self._epoch = 0
        if batch is not None:
            self._reserve(batch)

    def squares(self, batches: list[list[int]]) -> Iterator[Tensor]:
        """Yield uint8 [B, *square_shape] for each batch of sample ids; WorkerError if a process has died, or has
        decoded nothing for ``POTSTILL_TIMEOUT`` seconds; StorageError without shared memory for one.
        """
        self._start(max(map(len, batches), default=1))
        self._epoch += 1
        epoch, ahead = self._epoch, self.count * _AHEAD
        for position in range(min(ahead, len(batches))):
            self._submit(position, batches)
        for position, ids in enumerate(batches):
            if epoch != self._epoch:
                raise UsageError("a loader runs one epoch at a time: a second one was started before the first ended")
            member = self._members[position % self.count]
            self._fetch(member)
            found = self._pixels[position % self.count, self._slot(position), : len(ids)].clone()
            if position + ahead < len(batches):
                self._submit(position + ahead, batches)
            yield found

    def close(self) -> None:
        """End the processes."""
        for member in self._members:
            member.end()
        self._members = []

    # shared memory

    def _reserve(self, batch: int) -> None:
        """Allocate shared memory for as many processes as it suffices for."""
        each = _AHEAD * batch * math.prod(self._shape)
        self._pixels = self._decoded = torch.empty(0)  # frees it first
        self.count, free = 0, _free()
        most = self._wanted if free is None else min(self._wanted, free // each)
        for count in range(most, 0, -1):
            try:
                self._pixels = _shared((count, _AHEAD, batch, *self._shape), torch.uint8)
                self._decoded = _shared((count,), torch.int64)
                self.count = count
                break
            except (RuntimeError, OSError):  # other processes have taken it meanwhile
                self._pixels = torch.empty(0)
        if self.count < self._wanted and self._warn is not None:
            there = "" if free is None else f" has {free:,} bytes free;"
            need, used = self._wanted * each, f"{self.count} of them" if self.count else "the main process alone"
            self._warn(
                f"shared memory ({_SHM}){there} {self._wanted} processes that decode need {need:,} "
                f"({format_scaled(need, 'B')}"
                f"): {used} will decode. For more, enlarge it (docker run --shm-size 1g), lower training.batch_size, "
                "or set data.workers"
            )

    # processes

    def _start(self, batch: int) -> None:
        """Make sure that idle processes for batches of this size are running."""
        if self._members and batch <= self._pixels.shape[2]:
            for member in self._members:  # batches of an epoch that was not finished
                while member.pending:
                    self._fetch(member, drop=True)
            return
        self.close()
        if self._pixels.numel() == 0 or batch > self._pixels.shape[2]:
            self._reserve(batch)
        if self.count == 0:
            need = _AHEAD * batch * math.prod(self._shape)
            raise StorageError(
                f"shared memory ({_SHM}) has {_free() or 0:,} bytes free, and a process that decodes needs "
                f"{need:,}: enlarge it (docker run --shm-size 1g), or set data.workers=0"
            )
        context = multiprocessing.get_context()
        self._decoded.zero_()
        for number in range(self.count):
            own, theirs = context.Pipe()
            what = (
                theirs,
                self._images,
                self._side,
                self._resize_mode,
                self._pixels[number],
                self._decoded[number : number + 1],
            )
            process = context.Process(target=_work, args=what, name=f"potstill-decode-{number}", daemon=True)
            with warnings.catch_warnings():
                # Python 3.12 and later, on fork: the child needs no lock that another thread may hold.
                warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
                process.start()
            theirs.close()
            self._members.append(_WorkerProcess(process, own))
        weakref.finalize(self, _end_all, os.getpid(), list(self._members))

    def _slot(self, position: int) -> int:
        return position // self.count % _AHEAD

    def _submit(self, position: int, batches: list[list[int]]) -> None:
        member, ids = self._members[position % self.count], batches[position]
        member.pending.append(ids)
        try:
            member.connection.send((self._slot(position), ids))
        except OSError:  # it is dead, which fetching its batch reports
            return

    def _fetch(self, member: "_WorkerProcess", *, drop: bool = False) -> None:
        number = self._members.index(member)
        decoded, since = -1, time.monotonic()
        while True:
            ready = wait([member.connection, *(each.process.sentinel for each in self._members)], self._timeout / 10)
            if member.connection in ready:
                try:
                    error = member.connection.recv()
                except (EOFError, OSError):
                    raise self._died(member) from None
                member.pending.popleft()
                if error is not None and not drop:
                    self.close()  # a traceback would keep this object, and with it the processes, alive
                    raise error
                return
            if ready:
                raise self._died(next(each for each in self._members if each.process.sentinel in ready))
            if (now := int(self._decoded[number])) != decoded:  # slow, but it makes progress
                decoded, since = now, time.monotonic()
            elif time.monotonic() - since >= self._timeout:
                raise self._stalled(member)

    def _died(self, member: "_WorkerProcess") -> WorkerError:
        member.process.join(1)
        code, next_images = member.process.exitcode, self._next_images(member)
        self.close()
        ended = "" if code is None or code >= 0 else f", ended by {_signal_name(-code)}"
        return WorkerError(
            f"a process that decodes images has died; {next_images}\n"
            f"It may have been killed for lack of memory{ended}; try data.workers=0, or a smaller batch_size"
        )

    def _stalled(self, member: "_WorkerProcess") -> WorkerError:
        next_images = self._next_images(member)
        self.close()
        return WorkerError(
            f"a process that decodes images has not answered for {self._timeout:g} seconds; {next_images}\n"
            f"Storage that is only slow needs another {TIMEOUT_VARIABLE} (seconds, in the environment)"
        )

    def _next_images(self, member: "_WorkerProcess") -> str:
        if not member.pending:
            return "it had nothing to do"
        names = [self._images.names[i] for i in member.pending[0]]
        return f"the next images were {format_names(names, _LISTED)}"


@dataclass
class _WorkerProcess:
    process: BaseProcess
    connection: Connection
    pending: deque[list[int]] = field(default_factory=deque)  # batches in progress

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _end_all(owner: int, members: list[_WorkerProcess]) -> None:
    if os.getpid() == owner:  # not in a child that inherited the object
        for member in members:
            member.end()


def _shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor in shared memory; RuntimeError if there is too little."""
    tensor = torch.empty(shape, dtype=dtype)
    tensor.share_memory_()  # type: ignore[no-untyped-call]
    return tensor


def _free() -> int | None:
    """Return the free bytes of shared memory; None if unknown."""
    try:
        return shutil.disk_usage(_SHM).free
    except OSError:
        return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# in the process


def _work(
    connection: Connection, images: ImageSet, side: int, resize_mode: str, pixels: Tensor, decoded: Tensor
) -> None:
    """Decode batches until the main process ends this one."""
    # Ctrl-C at a terminal reaches every process: the main one finishes its step first, and needs the others for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the main process's handler
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    target, count = pixels.numpy(), decoded.numpy()
    while True:
        slot, ids = connection.recv()
        failure: BaseException | None = None
        try:
            for position, i in enumerate(ids):
                target[slot, position] = read_square(images, i, side, resize_mode)
                count += 1
        except BaseException as error:
            failure = _picklable(error)
        connection.send(failure)


def _picklable(error: BaseException) -> BaseException:
    """Return the error with its traceback as a note; if it cannot be pickled, a RuntimeError with its message."""
    where = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))  # nosec B301: what was just dumped
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"in a process that decodes images:\n{where}")
    return error


def _end_with_parent() -> None:
    parent, before = multiprocessing.parent_process(), os.getppid()
    assert parent is not None
    # A sibling may hold the pipe open of which the sentinel is the end; with a fork server the parent is another.
    while not wait([parent.sentinel], 1) and os.getppid() == before:
        pass
    os._exit(1)
