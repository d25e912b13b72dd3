"""Sends requests to the model worker, and replaces it when it dies or takes too long."""

import contextlib
import json
import multiprocessing
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from potstill.errors import ArtifactError, PotstillError, WorkerError
from potstill.serve.middleware import ServerLimits
from potstill.serve.model_worker import run_worker

_MAX_REPLY_BYTES = 4_000_000


class WorkerUnavailable(Exception):
    """There is no response now, but another try may succeed."""


class WorkerClient:
    """A worker process with the models, for one image at a time.

    Args:
        folders: model folders by stage.
        limits: time-outs.
    """

    def __init__(self, folders: dict[str, Path], limits: ServerLimits) -> None:
        self.folders = {stage: str(folder) for stage, folder in folders.items()}
        self.limits = limits
        self.models: dict[str, Any] = {}  # summaries by stage, from the worker
        self._lock = threading.Lock()  # held while talking to the worker
        self._worker: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._closed = False

    def start(self) -> None:
        """Start the worker and wait until it has loaded the models.

        Raises:
            ArtifactError: a model is damaged.
            WorkerError: the worker died, or took too long.
        """
        with self._lock:
            self._spawn()

    def predict(self, image: bytes, **head: Any) -> dict[str, Any]:
        """Return the worker's response, or its ``error`` and ``status``.

        Raises:
            WorkerUnavailable: other images are in the queue, or the worker died or took too long.
        """
        end = time.monotonic() + self.limits.answer_seconds
        # Half of the time for waiting, so that a late request does not get a healthy worker killed.
        if not self._lock.acquire(timeout=self.limits.answer_seconds / 2):
            raise WorkerUnavailable("other images are still being processed; try again in a moment")
        try:
            alive = self._worker is not None and self._worker.is_alive()
            answer = self._exchange(image, head, end) if alive else None
        except BaseException:
            self._lock.release()
            raise
        if answer is not None:
            self._lock.release()
            return answer
        self._kill()
        threading.Thread(target=self._respawn, daemon=True).start()  # releases the lock once the models are loaded
        if alive:
            raise WorkerUnavailable("this image took too long, or crashed the worker process")
        raise WorkerUnavailable("the models are being loaded; try again in a few seconds")

    def close(self) -> None:
        """Stop the worker."""
        self._closed = True
        self._kill()

    def _exchange(self, image: bytes, head: dict[str, Any], end: float) -> dict[str, Any] | None:
        assert self._pipe is not None
        assert self._worker is not None
        watch = threading.Timer(max(0.0, end - time.monotonic()), self._worker.kill)  # sending can hang as well
        watch.daemon = True
        watch.start()
        try:
            self._pipe.send_bytes(json.dumps(head).encode())
            self._pipe.send_bytes(image)
            answer: dict[str, Any] = json.loads(self._pipe.recv_bytes(_MAX_REPLY_BYTES))
            return answer
        except (OSError, EOFError, ValueError):
            return None
        finally:
            watch.cancel()

    def _respawn(self) -> None:
        try:
            with contextlib.suppress(PotstillError):  # the next request tries again
                if not self._closed:
                    self._spawn()
        finally:
            self._lock.release()

    def _spawn(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._worker = context.Process(
            target=run_worker, args=(other, self.folders), daemon=True, name="potstill-worker"
        )
        self._worker.start()
        other.close()
        try:
            if not self._pipe.poll(self.limits.load_seconds):
                raise WorkerError(f"the models were not loaded within {self.limits.load_seconds:g} seconds")
            answer = json.loads(self._pipe.recv_bytes(_MAX_REPLY_BYTES))
        except (OSError, EOFError, ValueError) as error:
            self._kill()
            raise WorkerError("the process that loads the models died") from error
        except WorkerError:
            self._kill()
            raise
        if "fatal" in answer:
            self._kill()
            raise ArtifactError(answer["fatal"])
        self.models = answer["models"]

    def _kill(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.join(5)
            self._worker = None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
