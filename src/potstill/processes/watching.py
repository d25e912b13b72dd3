"""Which process of a run has died or stands still; nobody is waited for in vain, and nobody is left behind.

Every process tells a store, twice a second, that it lives and how far it has come.  The store is torchrun's own, and
outlives the processes.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import Store

from potstill.errors import Elsewhere, PotstillError, Stopped, WorkerError

BEAT = 0.5  # seconds
_GRACE = 5.0  # that a process has, after another has failed, to notice it by itself
_ORPHANED = 12.0  # that it has to save and end, after what started it is gone
_GO_ON = "What was saved is intact: start all again, with --resume"


class _Lost(WorkerError):
    """Another process is gone, as this one has found out."""


class Watching:
    """The thread that tells and listens; ``end`` says how this process ends.

    Args:
        store: that all processes of the run reach.
        rank, count: of this process, and how many there are.
    """

    def __init__(self, store: Store, rank: int, count: int) -> None:
        # Two connections: the thread's and the main thread's calls must not wait for each other.
        self.store, self._own = store.clone(), store.clone()
        self.rank, self.count = rank, count
        self.steps = self.beats = 0
        self._over = threading.Event()
        self._parent, self._alone_since, self._failed_since = os.getppid(), 0.0, 0.0
        self._thread = threading.Thread(target=self._watch, name="potstill-watching", daemon=True)
        self._beat()
        self._thread.start()

    def progress(self) -> None:
        """Note that this process has come a step further."""
        self.steps += 1

    def lost(self) -> BaseException:
        """What ends this process, as the others no longer answer.

        Returns:
            ``Elsewhere`` where another process has said why it ended; else a ``WorkerError`` that names the process.
        """
        for number in (signal.SIGTERM, signal.SIGINT):  # torchrun ends all others as soon as one is dead
            with contextlib.suppress(ValueError):
                signal.signal(number, signal.SIG_IGN)
        try:
            time.sleep(2 * BEAT)  # whoever failed may be about to say so
            if (said := self._said()) is not None:
                return said
            before = self._lives()
            time.sleep(3 * BEAT)
            if (said := self._said()) is not None:
                return said
            return self._name(before, self._lives())
        except RuntimeError:  # the store's
            return _Lost(f"the process or machine that started the run no longer answers.\n{_GO_ON}")

    def end(self, error: BaseException | None) -> BaseException | None:
        """Tell the others how this process ends, and the thread to stop.

        Returns:
            What is to be raised in place of ``error``: a process told to stop because another is dead says so; of an
            error that all have, only the first process speaks.
        """
        try:
            if isinstance(error, Stopped):
                dead = self._dead_besides(error)
                self._post({"code": dead.exit_code, "text": ""})
                return dead
            if isinstance(error, Elsewhere | _Lost):
                return error
            if isinstance(error, PotstillError):
                self._post({"code": error.exit_code, "text": str(error)})
                return error if self.rank == 0 else self._unless_said(error)
            if error is not None:
                self._post({"code": WorkerError.exit_code, "text": f"{type(error).__name__}: {error}", "bug": True})
            else:
                self._post({"code": 0, "text": ""})
            return error
        except RuntimeError:  # there is no store left to tell
            return error
        finally:
            self._over.set()

    # what is in the store

    def _post(self, how: dict[str, Any]) -> None:
        self.store.set(f"end/{self.rank}", json.dumps(how))

    def _ends(self, store: Store) -> dict[int, dict[str, Any]]:
        """How processes have ended, by rank; those that have."""
        found = {}
        for rank in range(self.count):
            if rank != self.rank and store.check([f"end/{rank}"]):
                found[rank] = json.loads(store.get(f"end/{rank}"))
        return found

    def _lives(self) -> dict[int, dict[str, Any]]:
        return {
            rank: json.loads(self.store.get(f"life/{rank}"))
            for rank in range(self.count)
            if rank != self.rank and self.store.check([f"life/{rank}"])
        }

    def _beat(self) -> None:
        self.beats += 1
        life = {"beats": self.beats, "steps": self.steps, "pid": os.getpid(), "host": socket.gethostname()}
        self._own.set(f"life/{self.rank}", json.dumps(life))

    # what follows from it

    def _said(self) -> WorkerError | Elsewhere | None:
        for rank, how in sorted(self._ends(self.store).items()):
            if how.get("bug"):
                return WorkerError(f"rank {rank} of {self.count} has ended with an error: {how['text']}")
            if how["code"]:
                return Elsewhere(how["code"])
        return None

    def _name(self, before: dict[int, Any], after: dict[int, Any]) -> "_Lost | Elsewhere":
        dead = [rank for rank in after if after[rank]["beats"] == before.get(rank, after[rank])["beats"]]
        absent = [rank for rank in range(self.count) if rank != self.rank and rank not in after]
        least = min(after, key=lambda rank: after[rank]["steps"], default=None)
        if dead:
            rank, what = dead[0], "has died, or is stopped"
        elif absent:
            rank, what = absent[0], "has never begun"
        else:
            assert least is not None
            rank, what = least, f"stands still after {after[least]['steps']} steps"
        life = after.get(rank)
        who = f"rank {rank} of {self.count}" + (f" (process {life['pid']} on {life['host']})" if life else "")
        if life is not None:
            _end_sibling(life)
        lost = _Lost(f"{who} does not answer: it {what}.\n{_GO_ON}")
        return self._unless_lower(lost)

    def _unless_lower(self, lost: "_Lost") -> "_Lost | Elsewhere":
        """All that are left know which one is lost: the first of them says it."""
        self.store.set(f"lost/{self.rank}", str(lost))
        time.sleep(2 * BEAT)
        lower = [f"lost/{rank}" for rank in range(self.rank)]
        return Elsewhere(lost.exit_code) if any(self.store.check([key]) for key in lower) else lost

    def _dead_besides(self, stopped: Stopped) -> "Stopped | _Lost | Elsewhere":
        """A signal may come from torchrun, that has seen another process die."""
        before = self._lives()
        time.sleep(3 * BEAT)
        after, ended = self._lives(), self._ends(self.store)
        silent = {rank: life for rank, life in after.items() if rank not in ended}
        dead = [rank for rank, life in silent.items() if rank in before and before[rank]["beats"] == life["beats"]]
        return self._name(before, {rank: after[rank] for rank in dead}) if dead else stopped

    def _unless_said(self, error: PotstillError) -> PotstillError | Elsewhere:
        """All processes meet the same mistake of a user: the first one says it."""
        for _ in range(4):
            time.sleep(BEAT / 2)
            if self._ends(self.store).get(0, {}).get("text") == str(error):
                return Elsewhere(error.exit_code)
        return type(error)(f"rank {self.rank} of {self.count}: {error}")

    # the thread

    def _watch(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self._beat()
                self._notice(time.monotonic())
            except RuntimeError:  # the store is gone, with what started the run or on its machine
                self._orphaned(time.monotonic())

    def _notice(self, now: float) -> None:
        if os.getppid() != self._parent:
            self._orphaned(now)
        bad = [rank for rank, how in self._ends(self._own).items() if how["code"]]
        if not bad:
            return
        self._failed_since = self._failed_since or now
        if now - self._failed_since > _GRACE:  # busy with something that does not end
            sys.stderr.write(f"error: rank {bad[0]} of {self.count} has failed; rank {self.rank} ends too\n")
            os._exit(WorkerError.exit_code)

    def _orphaned(self, now: float) -> None:
        """Ask the main thread to save and end; end it where that takes too long."""
        if not self._alone_since:
            self._alone_since = now
            os.kill(os.getpid(), signal.SIGTERM)
        elif now - self._alone_since > _ORPHANED:
            os._exit(128 + signal.SIGTERM)


def _end_sibling(life: dict[str, Any]) -> None:
    """Kill a process that does not answer, where the same launcher has started it on this machine; else leave it."""
    if life["host"] != socket.gethostname():
        return
    try:
        fields = Path(f"/proc/{life['pid']}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        if int(fields.split()[1]) == os.getppid():
            os.kill(life["pid"], signal.SIGKILL)
    except (OSError, ValueError, IndexError):  # it is gone; or there is no /proc
        return
