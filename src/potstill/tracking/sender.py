"""The training's side of a tracker: messages are queued and never waited for."""

import contextlib
import json
import queue
import subprocess  # nosec B404 # starts our own module, with no word of a user
import sys
import threading
from collections.abc import Sequence
from typing import Any

WAIT = 60.0  # seconds at the end of a run, until a tracker that has not finished is given up
SHORT_WAIT = 10.0  # where the run was stopped, perhaps by somebody who will kill it soon
COMMAND = (sys.executable, "-P", "-m", "potstill.tracking.child")


class Sender:
    """A process that talks to one tracker.

    Args:
        name: of the tracker, for messages.
        command: what is started.
    """

    def __init__(self, name: str, first: dict[str, Any], command: Sequence[str] = COMMAND) -> None:
        self.name = name
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._said: list[str] = []
        self._told = False
        self.process = subprocess.Popen(  # nosec B603 # COMMAND, or what a test gives
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the training
        )
        self._threads = [threading.Thread(target=call, daemon=True) for call in (self._feed, self._hear)]
        for thread in self._threads:
            thread.start()
        self.send(first)

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message; costs microseconds, whatever the tracker does."""
        self._queue.put(json.dumps(message))

    @property
    def problem(self) -> str | None:
        """Why the tracker gets nothing any more: said once."""
        failed = self._said or self.process.poll() not in (None, 0)
        if self._told or not failed:
            return None
        self._told = True
        return self._warning(self._said[0] if self._said else "its process has ended")

    def close(self, wait: float = WAIT) -> str | None:
        """Wait until all is sent, at most so many seconds; returns a problem that nobody has been told yet."""
        self._queue.put(None)
        try:
            self.process.wait(wait)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            if not self._said:
                self._said.append(f"it has not answered for {wait:g} seconds")
        for thread in self._threads:
            thread.join(1.0)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError, ValueError):
                if pipe is not None:
                    pipe.close()
        return self.problem

    def _warning(self, why: str) -> str:
        return f"tracker {self.name} gets no more of this run, which goes on without it: {why}"

    def _feed(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended: `_hear` knows why
            while (line := self._queue.get()) is not None:
                self.process.stdin.write(line + "\n")
                self.process.stdin.flush()
            self.process.stdin.close()

    def _hear(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            for line in self.process.stdout:
                self._said.append(line.strip())
