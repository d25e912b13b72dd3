"""The run folder, which training writes and reports, export and serve read.  No torch here.

``runs/<name>/`` holds recipe.yaml, environment.json, splits.csv, results.json and one folder for each stage.

recipe.yaml, environment.json and results.json contain their own SHA-256 (see ``potstill.io``); results.json, written
last, also that of every other file that is read again (``files``), except models and checkpoints, which have their own.

A folder has one writer. The system releases its lock on ``.lock`` when the process ends, even by SIGKILL. Some network
and container file systems have no locks: there a file ``.lock-holder`` names the writer by process, machine and start
time. If that process has ended on this machine, its file is replaced; on another machine, the user has to delete it.
"""

import contextlib
import csv
import errno
import io
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from potstill.config import STAGES
from potstill.errors import ArtifactError, StorageError, UsageError, storing
from potstill.evaluation import Array
from potstill.io import (
    PART,
    as_csv,
    check_exists,
    csv_texts,
    encode_json,
    encode_text,
    file_sha256,
    read_bytes,
    read_checksummed_json,
    read_checksummed_text,
    remove_partial_files,
    sha256_hex,
    unescape_cell,
    verify_json_lines,
    write_bytes,
    write_checksummed_json,
    write_checksummed_text,
    write_chunks,
)

if TYPE_CHECKING:
    from potstill.data.entries import SkippedFile
    from potstill.data.splits import SplitRow
    from potstill.distributed.group import ProcessGroup
    from potstill.evaluation.predictions import Predictions


LOCK_FILE, LOCK_HOLDER_FILE = ".lock", ".lock-holder"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
_MAX_HOLDER_BYTES = 1000  # of .lock-holder


class RunLock:
    """The lock of an existing folder, held inside a ``with`` block; not reentrant.  ``wait``: in place of an error."""

    def __init__(self, folder: Path, *, wait: bool = False) -> None:
        self.folder = folder
        self._timeout = -1 if wait else 0
        self._lock: BaseFileLock = FileLock(folder / LOCK_FILE, mode=0o644, fallback_to_soft=False)

    def acquire(self, advice: str = "wait for it") -> None:
        """Acquire the lock; StorageError: another process has it, or may have it."""
        try:
            try:
                self._lock.acquire(timeout=self._timeout)
            except OSError as error:
                if isinstance(error, Timeout) or error.errno not in _NO_LOCKS:
                    raise
                self._lock = SoftFileLock(self.folder / LOCK_HOLDER_FILE, mode=0o644)
                self._lock.acquire(timeout=self._timeout)
        except Timeout:
            message = f"{self.folder} is being written by another process; {advice}{self._stale_lock_hint()}"
            raise StorageError(message) from None

    def release(self) -> None:
        """Release the lock; may be called twice."""
        self._lock.release()

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _stale_lock_hint(self) -> str:
        path = self.folder / LOCK_HOLDER_FILE
        if not isinstance(self._lock, SoftFileLock):
            return ""
        try:
            with path.open("rb") as file:
                lines = file.read(_MAX_HOLDER_BYTES).decode("ascii", "replace").splitlines()
        except OSError:
            lines = []
        complete = len(lines) >= 2 and lines[0].isdigit()
        holder = f"process {lines[0]} on {lines[1]}" if complete else "an unknown process"
        return f".\nThis file system has no locks; {path} was written by {holder}: if it has ended, delete the file"


SPLITS = ("train", "val", "test")
SPLITS_FILE = "splits.csv"
SPLITS_HEADER = ("split", "name", "class", "sha256")

_LOCKS = (LOCK_FILE, LOCK_HOLDER_FILE)
_FILES_BEFORE_TRAINING = (  # files of a run that has not trained
    *_LOCKS,
    "recipe.yaml",
    "environment.json",
    SPLITS_FILE,
    "skipped.csv",
)
_VISIBLE_TIMEOUT = 10.0  # seconds until a network file system shows another machine's folder
_METRICS_FILE = "metrics.jsonl"
_FOLD = "fold-"  # and its number: the run of a fold
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RunFolder:
    """One run's folder, locked for writing by ``create`` until its ``with`` block ends; reading needs no lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = RunLock(path)
        self._files: dict[str, str] = {}  # path in the folder -> SHA-256 of the written content

    @classmethod
    def create(cls, output_dir: Path, name: str, *, resume: bool = False, overwrite: bool = False) -> "RunFolder":
        """Lock and return ``output_dir/name``: a new folder, or an existing one to resume or replace.

        Nothing is deleted: call ``clear`` when all checks have passed.
        """
        if not _NAME.fullmatch(name) or set(name) == {"."}:
            raise UsageError(f"--name must be 1 to 64 of the characters A-Z a-z 0-9 . _ -, got {name!r}")
        if resume and overwrite:
            raise UsageError("--resume continues a run and --overwrite deletes it: give one of them")
        run = cls(output_dir / name)
        with storing(f"write to {run.path}"):
            run._check_is_run_folder()
            if resume and not run.path.is_dir():
                raise UsageError(f"nothing to resume: {run.path} does not exist")
            run.acquire()
            try:  # again, now that no other process can change it
                run._check_is_run_folder()
                run._check_flags(resume=resume, overwrite=overwrite)
            except BaseException:
                run.__exit__(None, None, None)
                raise
        return run

    def _check_is_run_folder(self) -> None:
        if self.known or not self.path.is_dir():
            return
        names = (entry.name for entry in self.path.iterdir())
        if any(name not in _FILES_BEFORE_TRAINING and not name.endswith(PART) for name in names):
            raise UsageError(f"{self.path} exists and is not a run folder; choose another --name or --output-dir")

    def _check_flags(self, *, resume: bool, overwrite: bool) -> None:
        if self.known and not (resume or overwrite):
            raise UsageError(
                f"{self.path} exists. To continue it: --resume. To replace it: --overwrite. "
                f"To keep it: --name {self.path.name}-2"
            )
        if resume and not self.known:
            raise UsageError(f"nothing to resume: the run in {self.path} has not started; run it without --resume")
        remove_partial_files(self.path)
        if resume:
            self.read_recipe()
            self.read_environment()

    def acquire(self) -> None:
        """Create the folder if it is missing, and lock it."""
        with storing(f"write to {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire("wait for it, or use --name")

    @contextlib.contextmanager
    def held(self, *, writing: bool) -> Iterator[None]:
        """Lock an existing run, if there is one, inside the block; if it only reads, a read-only folder is no error."""
        exists = self.results.is_file() or any((self.path / name).exists() for name in _LOCKS)
        locked = False
        try:
            if exists:
                with storing(f"write to {self.path}") if writing else contextlib.suppress(OSError):
                    self._lock.acquire()
                    locked = True
            yield
        finally:
            if locked:
                self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        """Release the lock; delete the folder if nothing was written."""
        if self.path.is_dir() and all(entry.name in _LOCKS for entry in self.path.iterdir()):
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()

    @property
    def known(self) -> bool:
        """Whether the folder holds a run: recipe.yaml and environment.json exist."""
        return self.recipe.exists() and self.environment.exists()

    @property
    def recipe(self) -> Path:
        """recipe.yaml, with all defaults."""
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        """environment.json."""
        return self.path / "environment.json"

    @property
    def results(self) -> Path:
        """results.json; docs/run-folder.md describes its schema."""
        return self.path / "results.json"

    def stage(self, name: str) -> Path:
        """Return the folder of a stage."""
        return self.path / name

    def fold(self, number: int) -> "RunFolder":
        """Return the run folder of a fold of this cross-validation."""
        return RunFolder(self.path / f"{_FOLD}{number}")

    @property
    def folds(self) -> list["RunFolder"]:
        """The runs of a cross-validation that have begun, by number; empty for other runs."""
        named = [each.name.removeprefix(_FOLD) for each in self.path.glob(f"{_FOLD}*")]
        found = [self.fold(number) for number in sorted(int(name) for name in named if name.isdecimal())]
        return [each for each in found if each.recipe.is_file()]

    def trained(self, name: str) -> bool:
        """Return whether a stage's model has been written."""
        return (self.stage(name) / "model.json").exists()

    def write_recipe(self, text: str) -> None:
        """Write recipe.yaml."""
        write_checksummed_text(self.recipe, text)

    def read_recipe(self) -> str:
        """Return the text of recipe.yaml."""
        return read_checksummed_text(self.recipe)

    def write_environment(self, facts: dict[str, Any]) -> None:
        """Write environment.json: what the result may depend on besides the recipe."""
        write_checksummed_json(self.environment, facts)

    def read_environment(self) -> dict[str, Any]:
        """Return the content of environment.json."""
        return read_checksummed_json(self.environment)

    def add_to_environment(self, facts: dict[str, Any]) -> None:
        """Add entries to environment.json."""
        self.write_environment(self.read_environment() | facts)

    def write_splits(self, rows: "Iterable[SplitRow]") -> None:
        """Write splits.csv: (split, name, class, sha256) of each image."""
        self._write(SPLITS_FILE, encode_text(as_csv(SPLITS_HEADER, rows)))

    def write_skipped(self, skipped: "Iterable[SkippedFile]") -> None:
        """Write skipped.csv: path, kind and reason of each file and class that was left out, if any."""
        listed = [(each.path, each.kind, each.reason) for each in skipped]
        if listed:
            self._write("skipped.csv", encode_text(as_csv(("path", "kind", "reason"), listed)))
        else:  # a resumed run may have none any more
            (self.path / "skipped.csv").unlink(missing_ok=True)

    def write_metrics(self, stage: str, metrics: dict[str, Any]) -> None:
        """Write metrics.json of a stage: its final metrics on each split."""
        self._write(f"{stage}/metrics.json", encode_json(metrics))

    def check_epochs(self, stage: str, lines: Sequence[str] | None) -> None:
        """Compare a stage's metrics.jsonl with the digests of its lines in the model file."""
        if lines is not None:
            self._files[f"{stage}/{_METRICS_FILE}"] = sha256_hex(
                verify_json_lines(self.stage(stage) / _METRICS_FILE, lines)
            )

    def write_examples(self, examples: dict[str, Any]) -> None:
        """Write examples.json: the test images that the report shows."""
        self._write("examples.json", encode_json(examples))

    def write_predictions(
        self, stage: str, split: str, names: Sequence[str], found: "Predictions", classes: Sequence[str]
    ) -> None:
        """Write predictions_<split>.csv, a row for each image: all probabilities, or of many the largest."""
        indices = zip(found.labels.tolist(), found.predicted.tolist(), strict=True)
        if found.array is not None:
            header = ["path", "label", "prediction", *(f"p:{name}" for name in classes)]
            shares = (row.tolist() for row in found.array)
            rows: Iterable[Sequence[Any]] = (
                (name, classes[label], classes[predicted], *(f"{p:.9g}" for p in row))
                for name, (label, predicted), row in zip(names, indices, shares, strict=True)
            )
        else:
            count = found.top.shape[1]
            others = [text for rank in range(2, count + 1) for text in (f"class_{rank}", f"p_{rank}")]
            header = ["path", "label", "prediction", "label_index", "prediction_index", "p_1", *others]
            best = zip(map(_to_list, found.top), map(_to_list, found.top_probabilities), strict=True)
            rows = (
                (
                    *(name, classes[label], classes[predicted], label, predicted, f"{shares[0]:.6g}"),
                    *(t for i, p in zip(top[1:], shares[1:], strict=True) for t in (classes[i], f"{p:.6g}")),
                )
                for name, (label, predicted), (top, shares) in zip(names, indices, best, strict=True)
            )
        self._write_rows(f"{stage}/predictions_{split}.csv", header, rows)

    def read_probabilities(self, stage: str, split: str, sha256: str, classes: Sequence[str]) -> dict[str, Array]:
        """Return the probabilities [K] of each image of predictions_<split>.csv, by name, in the order of the split."""
        path = self.path / stage / f"predictions_{split}.csv"
        rows = csv.reader(io.StringIO(read_bytes(path, sha256=sha256).decode("utf-8"), newline=""))
        if next(rows, [])[3:] != [f"p:{name}" for name in classes]:
            raise ArtifactError(f"{path} does not hold the probabilities of the {len(classes)} classes of this run")
        return {unescape_cell(row[0]): np.array(row[3:], dtype=np.float64) for row in rows}

    def write_confusion(self, stage: str, split: str, found: "Predictions", classes: Sequence[str]) -> None:
        """Write confusion_<split>.csv of a stage: the number of images by true and predicted class, without zeros."""
        header = ("true_index", "predicted_index", "images", "true", "predicted")
        pairs = zip(*map(_to_list, found.confusion()), strict=True)
        rows = ((true, predicted, images, classes[true], classes[predicted]) for true, predicted, images in pairs)
        self._write_rows(f"{stage}/confusion_{split}.csv", header, rows)

    def add_file(self, name: str) -> None:
        """Record the digest of a file that was written by other code."""
        self._files[name] = file_sha256(self.path / name)

    def write_results(self, results: dict[str, Any]) -> None:
        """Write results.json, with the digests of the other files."""
        stages = (*results.get("stages", ()), *results.get("repeats", ()))
        epochs = {f"{stage}/{_METRICS_FILE}": self.stage(stage) / _METRICS_FILE for stage in stages}
        files = {name: file_sha256(path) for name, path in epochs.items() if path.exists()} | self._files
        write_checksummed_json(self.results, results | {"files": dict(sorted(files.items()))})

    def read_results(self) -> dict[str, Any]:
        """Return the content of results.json."""
        results = read_checksummed_json(self.results)
        if results.get("schema") != 1:
            raise ArtifactError(f"{self.results} has another schema than 1, which this version reads")
        return results

    def _write_rows(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        self._files[name] = write_chunks(self.path / name, map(encode_text, csv_texts(header, rows)))

    def _write(self, name: str, content: bytes) -> None:
        write_bytes(self.path / name, content)
        self._files[name] = sha256_hex(content)

    def clear(self) -> None:
        """Delete an earlier run, except the lock; if this is interrupted, it can be repeated."""
        with storing(f"empty {self.path}"):
            entries = [entry for entry in self.path.iterdir() if entry.name not in _LOCKS]
            for entry in sorted(
                entries, key=lambda entry: entry.name in _FILES_BEFORE_TRAINING
            ):  # last the files that show that this is a run
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()


def search_hint(path: Path) -> str:
    """Return what to give instead of the folder of a sweep or fit, for messages; "" for other folders."""
    if not (path / "sweep.json").is_file():
        return ""
    again = path / "confirmation" / "distilled"
    ready = f"; the run of its winner is {again}" if (again / "results.json").is_file() else ""
    return f"it is a search, whose report is {path / 'sweep.html'}{ready}"


def find_model(path: Path) -> Path:
    """Return the model folder at a path: that of a run (distilled, else baseline, else teacher), or the path itself."""
    if path.is_file() and path.name in ("model.json", "model.safetensors"):
        return path.parent
    for folder in (path, *(path / stage for stage in reversed(STAGES))):
        if (folder / "model.json").is_file():
            return folder
    check_exists(path)
    if folds := RunFolder(path).folds:
        raise ArtifactError(
            f"{path} is a cross-validation and has a model in each fold: give the folder of a fold, such as "
            f"{folds[0].path}, or train one on all images: potstill run {path}/recipe.yaml --set data.fold=all --name "
            f"{path.resolve().name[:60]}-all"
        )
    if hint := search_hint(path):
        raise ArtifactError(f"{path} has no model of its own: {hint}")
    if RunFolder(path).recipe.is_file():
        raise ArtifactError(
            f"{path} has no model yet: no stage of this run was finished; the command that began it, with --resume, "
            "continues it"
        )
    if runs := sorted(each.parent for each in path.glob("*/recipe.yaml")):
        raise ArtifactError(f"{path} has no model: it is a folder of runs; name one of them, such as {runs[0]}")
    raise ArtifactError(f"{path} has no model: neither model.json nor a trained stage ({', '.join(STAGES)})")


def _to_list(values: Array) -> list[Any]:
    found: list[Any] = values.tolist()
    return found


@contextlib.contextmanager
def open_run_folder(
    output_dir: Path, name: str, processes: "ProcessGroup", *, resume: bool, overwrite: bool
) -> Iterator[RunFolder]:
    """Open the folder of a new or resumed run; it is locked inside the block."""
    if processes.first:
        with RunFolder.create(output_dir, name, resume=resume, overwrite=overwrite) as folder:
            processes.share(None)
            yield folder
        return
    processes.share(None)
    path = output_dir / name
    deadline = time.monotonic() + _VISIBLE_TIMEOUT
    while not path.is_dir():
        if time.monotonic() > deadline:
            raise StorageError(
                f"rank {processes.rank} does not see {path}, which the first process has created: "
                "give an --output-dir that all machines share"
            )
        time.sleep(0.1)
    yield RunFolder(path)
