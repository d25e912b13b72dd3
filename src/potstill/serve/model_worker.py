"""The worker process that decodes images and runs the models; its client replaces it if it crashes or hangs.

The processes exchange JSON and the image's bytes, never pickles, as a compromised decoder is not trusted.
"""

import base64
import contextlib
import io
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.errors import ArtifactError, DataError, PotstillError, WorkerError
from potstill.serve.middleware import ServerLimits

if TYPE_CHECKING:
    from potstill.data.image_io import Pixels
    from potstill.models.model_file import Classifier


_PREVIEW_PIXELS = 480  # longer side


def run_worker(pipe: Connection, folders: dict[str, str]) -> None:
    """Serve requests, JSON options and then an image's bytes, until the other end is closed; respond in JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    from potstill.console import silence_native_stderr

    with silence_native_stderr(), contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            models = _load_models(folders)
        except PotstillError as error:
            _send(pipe, {"fatal": str(error), "exit_code": error.exit_code})
            return
        _send(pipe, {"models": {stage: _summarize_model(model) for stage, model in models.items()}})
        while True:
            head, image = json.loads(pipe.recv_bytes()), pipe.recv_bytes()
            _send(pipe, _predict_all(models, head, image))


def _send(pipe: Connection, answer: dict[str, Any]) -> None:
    pipe.send_bytes(json.dumps(answer).encode())


def _load_models(folders: dict[str, str]) -> dict[str, "Classifier"]:
    import torch

    from potstill.export.loading import load_classifier

    models = {stage: load_classifier(folder)[0] for stage, folder in folders.items()}
    for model in models.values():  # the first pass of a network is slow
        model.predict(torch.zeros(1, 3, model.input.size, model.input.size))
    return models


def _summarize_model(model: "Classifier") -> dict[str, Any]:
    return {
        "architecture": model.architecture,
        "classes": list(model.class_names),
        "parameters": sum(each.numel() for each in model.module.parameters()),
        "size": model.input.size,
    }


def _predict_all(models: dict[str, "Classifier"], head: dict[str, Any], image: bytes) -> dict[str, Any]:
    from potstill.data.image_io import JPEG_START, decode_bytes
    from potstill.data.preprocessing import decoded_side

    try:
        # Decoded as for `predict`: with the range that a model was trained with, and for the size of its input.
        wanted = {(model.input.range, decoded_side(model.input)) for model in models.values()}
        full = {ends: decode_bytes(image, "image", ends) for ends in {ends for ends, _ in wanted}}
        decoded = {
            (ends, side): decode_bytes(image, "image", ends, side) if image.startswith(JPEG_START) else full[ends]
            for ends, side in wanted
        }
        pixels = next(iter(full.values()))
    except DataError as error:
        large = any(word in str(error) for word in ("megapixels", "beyond the limits"))
        return {"error": str(error), "status": 413 if large else 415}
    answers = [
        _answer(stage, model, decoded[model.input.range, decoded_side(model.input)], head)
        for stage, model in models.items()
    ]
    return {
        "width": pixels.shape[1],
        "height": pixels.shape[0],
        "preview": _preview(pixels),
        "models": answers,
        "agreement": _agreement(answers),
    }


def _answer(stage: str, model: "Classifier", pixels: "Pixels", head: dict[str, Any]) -> dict[str, Any]:
    from potstill.data.transforms import preprocess

    images = preprocess(pixels, model.input)[None]
    began = time.perf_counter()
    shares = model.predict(images)[0]
    seconds = time.perf_counter() - began
    best = shares.sort(descending=True, stable=True).indices[: head["top"]].tolist()
    answer: dict[str, Any] = {
        "stage": stage,
        "milliseconds": round(seconds * 1000, 3),
        "predictions": [{"class": model.class_names[i], "probability": float(shares[i])} for i in best],
    }
    if head["gradcam"]:
        answer["gradcam"] = _gradcam(model, images, best[0], pixels)
    return answer


def _gradcam(model: "Classifier", images: Any, wanted: int, pixels: "Pixels") -> dict[str, Any]:
    from potstill.evaluation.gradcam import grad_cam, visible_region

    try:
        cam = grad_cam(model.module, images, [wanted])[0]
    except PotstillError as error:
        return {"error": str(error)}
    rows = [[round(value, 3) for value in row] for row in cam.tolist()]
    height, width = pixels.shape[:2]
    return {"rows": rows, "region": visible_region(height, width, model.input)}


def _agreement(answers: list[dict[str, Any]]) -> bool | None:
    """Return whether student and teacher predict the same class; None if one of them is missing."""
    top_classes = {each["stage"]: each["predictions"][0]["class"] for each in answers}
    if "teacher" not in top_classes or "distilled" not in top_classes:
        return None
    return bool(top_classes["teacher"] == top_classes["distilled"])


def _preview(pixels: "Pixels") -> str:
    """A small JPEG as a data URL: browsers cannot show every format that is decoded here."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((_PREVIEW_PIXELS, _PREVIEW_PIXELS))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


_MAX_REPLY_BYTES = 4_000_000
_LOADING = "the models are being loaded; try again in a few seconds"


class WorkerUnavailable(Exception):
    """There is no response now, but another try may succeed."""


def _watch(worker: "BaseProcess", end: float, limit: float, done: threading.Event) -> None:
    """Kill a worker that is not ``done`` at ``end``, unless it computes and has had less than ``limit`` seconds of CPU
    time: on a busy machine it would never answer its first image, killed again and again.
    """
    wait = max(0.0, end - time.monotonic())
    before = last = _cpu_seconds(worker.pid)
    while not done.wait(wait):
        used = _cpu_seconds(worker.pid)
        if not (used - before < limit and used - last > 0.01 * wait):  # also of NaN, where it is unknown
            worker.kill()
            return
        last, wait = used, max(0.1, limit - (used - before))


def _cpu_seconds(pid: int | None) -> float:
    """Return the CPU time of a process; NaN where the system has no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return math.nan


class WorkerClient:
    """A worker process with the models, for one image at a time."""

    def __init__(self, folders: dict[str, Path], limits: ServerLimits) -> None:
        self.folders = {stage: str(folder) for stage, folder in folders.items()}
        self.limits = limits
        self.models: dict[str, Any] = {}  # summaries by stage, from the worker
        self._lock = threading.Lock()  # held while talking to the worker
        self._worker: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._closed = self._loading = False

    def start(self) -> None:
        """Start the worker and wait until it has loaded the models; WorkerError: it died, or took too long."""
        with self._lock:
            self._spawn()

    def predict(self, image: bytes, **head: Any) -> dict[str, Any]:
        """Return the worker's response, or its ``error`` and ``status``; WorkerUnavailable: busy, dead or too slow."""
        end = time.monotonic() + self.limits.answer_seconds
        # Half of the time for waiting, so that a late request does not get a healthy worker killed.
        if not self._lock.acquire(timeout=self.limits.answer_seconds / 2):
            busy = "other images are still being processed; try again in a moment"
            raise WorkerUnavailable(_LOADING if self._loading else busy)
        try:
            worker = self._worker
            alive = worker is not None and worker.is_alive()
            answer = self._exchange(image, head, end) if alive else None
        except BaseException:
            self._lock.release()
            raise
        if answer is not None:
            self._lock.release()
            return answer
        self._kill()
        self._loading = True
        threading.Thread(target=self._respawn, daemon=True).start()  # releases the lock once the models are loaded
        if alive:
            raise WorkerUnavailable("this image took too long, or crashed the worker process")
        raise WorkerUnavailable(_LOADING)

    def close(self) -> None:
        """Stop the worker."""
        self._closed = True
        self._kill()

    def _exchange(self, image: bytes, head: dict[str, Any], end: float) -> dict[str, Any] | None:
        worker, pipe = self._worker, self._pipe
        if worker is None or pipe is None:  # closed meanwhile
            return None
        done = threading.Event()  # in a thread: sending can hang as well
        threading.Thread(target=_watch, args=(worker, end, self.limits.answer_seconds, done), daemon=True).start()
        try:
            pipe.send_bytes(json.dumps(head).encode())
            pipe.send_bytes(image)
            answer: dict[str, Any] = json.loads(pipe.recv_bytes(_MAX_REPLY_BYTES))
            return answer
        except (OSError, EOFError, ValueError):
            return None
        finally:
            done.set()

    def _respawn(self) -> None:
        try:
            with contextlib.suppress(PotstillError):  # the next request tries again
                if not self._closed:
                    self._spawn()
        finally:
            self._loading = False
            self._lock.release()

    def _spawn(self) -> None:
        context = multiprocessing.get_context("spawn")
        pipe, other = context.Pipe()
        worker = context.Process(target=run_worker, args=(other, self.folders), daemon=True, name="potstill-worker")
        worker.start()
        other.close()
        self._pipe, self._worker = pipe, worker
        try:
            if self._closed:  # meanwhile, by another thread, which has seen no worker
                raise WorkerError("the server is closed")
            if not pipe.poll(self.limits.load_seconds):
                raise WorkerError(f"the models were not loaded within {self.limits.load_seconds:g} seconds")
            answer = json.loads(pipe.recv_bytes(_MAX_REPLY_BYTES))
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
        worker, pipe = self._worker, self._pipe  # ``close`` may kill while another thread starts one
        self._worker = self._pipe = None
        if worker is not None:
            worker.kill()
            worker.join(5)
        if pipe is not None:
            pipe.close()
