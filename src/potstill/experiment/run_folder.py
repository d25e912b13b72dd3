"""The run folder: the only link between training and everything that reads results. No torch here.

``runs/<name>/`` holds recipe.yaml, environment.json, splits.csv, results.json and one folder for each stage.

recipe.yaml, environment.json and results.json carry their own SHA-256 (``potstill.sealed``); results.json, written
last, also that of every other file that is ever read again (``files``), but for models and checkpoints, which have
their own.

A folder has one writer. The system's lock on ``.lock`` ends with its holder, even by SIGKILL. Some file systems (of
networks, of containers) have no locks: there a file ``.lock-holder`` names the writer by process, machine and start
time. If that process is known to be gone, its file is taken over; for another machine's process a person has to
decide.
"""

import contextlib
import csv
import errno
import io
import itertools
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from potstill.errors import ArtifactError, StorageError, UsageError
from potstill.evaluation.classification import Array
from potstill.io import (
    PART,
    encode_json,
    encode_text,
    file_sha256,
    read_checksummed_json,
    read_checksummed_text,
    remove_partial_files,
    sha256_hex,
    verify_json_lines,
    write_bytes,
    write_checksummed_json,
    write_checksummed_text,
    write_chunks,
)

if TYPE_CHECKING:
    from potstill.evaluation.predictions import Predictions


LOCK_FILE, LOCK_HOLDER_FILE = ".lock", ".lock-holder"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
_MAX_HOLDER_BYTES = 1000  # bytes of a holder's file


class RunLock:
    """The lock of one folder, which must be there; held at most once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: BaseFileLock = FileLock(folder / LOCK_FILE, mode=0o644, fallback_to_soft=False)

    def acquire(self, way_out: str = "wait for it") -> None:
        """Become the one writer.

        Args:
            way_out: what the message tells to do.

        Raises:
            StorageError: another process writes there, or may.
            OSError: the lock's file cannot be made.
        """
        try:
            try:
                self._lock.acquire(timeout=0)
            except OSError as error:
                if isinstance(error, Timeout) or error.errno not in _NO_LOCKS:
                    raise
                self._lock = SoftFileLock(self.folder / LOCK_HOLDER_FILE, mode=0o644)
                self._lock.acquire(timeout=0)
        except Timeout:
            message = f"{self.folder} is being written by another process; {way_out}{self._doubt()}"
            raise StorageError(message) from None

    def release(self) -> None:
        """Let others write; may be called twice."""
        self._lock.release()

    def _doubt(self) -> str:
        """What a person can do who knows better, on a file system without locks."""
        path = self.folder / LOCK_HOLDER_FILE
        if not isinstance(self._lock, SoftFileLock):
            return ""
        try:
            with path.open("rb") as file:
                lines = file.read(_MAX_HOLDER_BYTES).decode("ascii", "replace").splitlines()
        except OSError:
            lines = []
        known = len(lines) >= 2 and lines[0].isdigit()
        who = f"process {lines[0]} on {lines[1]}" if known else "somebody who was interrupted while saying so"
        return f".\nThis file system has no locks; {path} was left by {who}: if that is gone, delete the file"


STAGES = ("teacher", "baseline", "distilled")
SPLITS = ("train", "val", "test")

_LOCKS = (LOCK_FILE, LOCK_HOLDER_FILE)
_FORMULA = re.compile(r"'*[=+\-@]")  # how a cell begins that a spreadsheet runs, or that was made harmless
_FILES_BEFORE_TRAINING = (
    *_LOCKS,
    "recipe.yaml",
    "environment.json",
    "splits.csv",
    "skipped.csv",
)  # all that a run has before it trains
_METRICS_FILE = "metrics.jsonl"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RunFolder:
    """One run's folder, locked for one writer.  Use as a context manager, or only to read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = RunLock(path)
        self._files: dict[str, str] = {}  # name below the folder -> SHA-256 of what was written there

    @classmethod
    def create(cls, output_dir: Path, name: str, *, resume: bool = False, overwrite: bool = False) -> "RunFolder":
        """A new folder ``output_dir/name``, or an existing one that may be gone on with or replaced; locked.

        Nothing is deleted here: call ``clear`` once it is certain that the new run can begin.

        Raises:
            UsageError: a name that is no plain file name; a folder that exists and neither flag; both flags.
            StorageError: it cannot be made, or another process is writing in it.
            ArtifactError: what is to be gone on with is damaged.
        """
        if not _NAME.fullmatch(name) or set(name) == {"."}:
            raise UsageError(f"a run's name is 1 to 64 of the characters A-Z a-z 0-9 . _ -, got {name!r}")
        if resume and overwrite:
            raise UsageError("--resume goes on with a run and --overwrite deletes it: give one of them")
        run = cls(output_dir / name)
        try:
            run._refuse_foreign()
            if resume and not run.path.is_dir():
                raise UsageError(f"nothing to resume: {run.path} does not exist")
            run.acquire()
            try:  # what stands there can only be judged now that nobody else changes it
                run._refuse_foreign()
                run._judge(resume=resume, overwrite=overwrite)
            except BaseException:
                run.__exit__(None, None, None)
                raise
        except OSError as error:
            raise StorageError(f"cannot write to {run.path}: {error.strerror or error}") from error
        return run

    def _refuse_foreign(self) -> None:
        if self.known or not self.path.is_dir():
            return
        names = (entry.name for entry in self.path.iterdir())
        if any(name not in _FILES_BEFORE_TRAINING and not name.endswith(PART) for name in names):
            raise UsageError(f"{self.path} exists and is no run folder; choose another --name or --output-dir")

    def _judge(self, *, resume: bool, overwrite: bool) -> None:
        if self.known and not (resume or overwrite):
            raise UsageError(
                f"{self.path} exists. Go on with it: --resume. Replace it: --overwrite. "
                f"Keep it: --name {self.path.name}-2"
            )
        if resume and not self.known:
            raise UsageError(f"nothing to resume: the run in {self.path} had not begun; start it without --resume")
        remove_partial_files(self.path)
        if resume:
            self.read_recipe()
            self.read_environment()

    def acquire(self) -> None:
        """Become the one writer.

        Raises:
            StorageError: it cannot be made, or another process is writing in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire("wait for it, or use --name")
        except OSError as error:
            raise StorageError(f"cannot write to {self.path}: {error.strerror or error}") from error

    @contextlib.contextmanager
    def held(self, *, writing: bool) -> Iterator[None]:
        """Keep writers out within the block; where there is no run, nothing is made.

        Args:
            writing: False: the folder is only read, so it may as well be one in which nobody may write.

        Raises:
            StorageError: another process is writing in it.
        """
        known = self.results.is_file() or any((self.path / name).exists() for name in _LOCKS)
        locked = False
        try:
            if known:
                try:
                    self._lock.acquire()
                    locked = True
                except OSError as error:
                    if writing:
                        raise StorageError(f"cannot write to {self.path}: {error.strerror or error}") from error
            yield
        finally:
            if locked:
                self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lock; a folder in which nothing was written goes too."""
        if self.path.is_dir() and all(entry.name in _LOCKS for entry in self.path.iterdir()):
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()

    @property
    def known(self) -> bool:
        """Whether there is a run to go on with, or to spare: it had written all that it is to be repeated from."""
        return self.recipe.exists() and self.environment.exists()

    # where things are

    @property
    def recipe(self) -> Path:
        """recipe.yaml, complete, with every default spelt out."""
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        """environment.json."""
        return self.path / "environment.json"

    @property
    def results(self) -> Path:
        """results.json; its schema is documented in docs/run-folder.md."""
        return self.path / "results.json"

    def stage(self, name: str) -> Path:
        """The folder of teacher, baseline or distilled."""
        return self.path / name

    def trained(self, name: str) -> bool:
        """Whether a stage's model has been written."""
        return (self.stage(name) / "model.json").exists()

    # what is written

    def write_recipe(self, text: str) -> None:
        """Keep the recipe, so that anybody can repeat the run."""
        write_checksummed_text(self.recipe, text)

    def read_recipe(self) -> str:
        """What ``write_recipe`` wrote.

        Raises:
            ArtifactError: missing or damaged.
        """
        return read_checksummed_text(self.recipe)

    def write_environment(self, facts: dict[str, Any]) -> None:
        """Keep what the result may depend on besides the recipe."""
        write_checksummed_json(self.environment, facts)

    def read_environment(self) -> dict[str, Any]:
        """What ``write_environment`` wrote.

        Raises:
            ArtifactError: missing or damaged.
        """
        return read_checksummed_json(self.environment)

    def add_to_environment(self, facts: dict[str, Any]) -> None:
        """What became known later."""
        self.write_environment(self.read_environment() | facts)

    def write_splits(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """Keep (split, name, class) of every image."""
        self._write("splits.csv", encode_text(as_csv(("split", "name", "class"), rows)))

    def write_skipped(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """Keep (path, kind, reason) of every file and class that was left out; no file where there is none."""
        listed = list(rows)
        if listed:
            self._write("skipped.csv", encode_text(as_csv(("path", "kind", "reason"), listed)))
        else:  # what was bad when the run began may be gone by now
            (self.path / "skipped.csv").unlink(missing_ok=True)

    def write_metrics(self, stage: str, metrics: dict[str, Any]) -> None:
        """Keep a stage's final figures on each split."""
        self._write(f"{stage}/metrics.json", encode_json(metrics))

    def check_epochs(self, stage: str, lines: Sequence[str] | None) -> None:
        """Compare a stage's metrics.jsonl with the digests of its lines that its model carries.

        Args:
            stage: its name.
            lines: as ``verify_json_lines`` takes them; None: the stage was not trained here.

        Raises:
            ArtifactError: the file is gone, or a line is not the one that training wrote; says which.
        """
        if lines is not None:
            self._files[f"{stage}/{_METRICS_FILE}"] = sha256_hex(
                verify_json_lines(self.stage(stage) / _METRICS_FILE, lines)
            )

    def write_examples(self, examples: dict[str, Any]) -> None:
        """Keep the test images that the report shows."""
        self._write("examples.json", encode_json(examples))

    def write_predictions(
        self, stage: str, split: str, names: Sequence[str], found: "Predictions", classes: Sequence[str]
    ) -> None:
        """Keep a stage's class probabilities on a split, in the order of its images: all of them, or, of more than
        ``predictions.MOST``, those of the most probable classes.
        """
        indices = zip(found.labels.tolist(), found.predicted.tolist(), strict=True)
        if found.array is not None:
            header = ["path", "label", "prediction", *(f"p:{name}" for name in classes)]
            shares = (row.tolist() for row in found.array)
            rows: Iterable[Sequence[Any]] = (
                (name, classes[label], classes[said], *(f"{p:.9g}" for p in row))
                for name, (label, said), row in zip(names, indices, shares, strict=True)
            )
        else:
            few = found.top.shape[1]
            others = [text for place in range(2, few + 1) for text in (f"class_{place}", f"p_{place}")]
            header = ["path", "label", "prediction", "label_index", "prediction_index", "p_1", *others]
            best = zip(map(_to_list, found.top), map(_to_list, found.top_probabilities), strict=True)
            rows = (
                (
                    *(name, classes[label], classes[said], label, said, f"{shares[0]:.6g}"),
                    *(t for i, p in zip(top[1:], shares[1:], strict=True) for t in (classes[i], f"{p:.6g}")),
                )
                for name, (label, said), (top, shares) in zip(names, indices, best, strict=True)
            )
        self._write_rows(f"{stage}/predictions_{split}.csv", header, rows)

    def write_confusion(self, stage: str, split: str, found: "Predictions", classes: Sequence[str]) -> None:
        """Keep the number of images of each pair of true and predicted class that has any."""
        header = ("true_index", "predicted_index", "images", "true", "predicted")
        pairs = zip(*map(_to_list, found.confusion()), strict=True)
        rows = ((true, said, images, classes[true], classes[said]) for true, said, images in pairs)
        self._write_rows(f"{stage}/confusion_{split}.csv", header, rows)

    def add_file(self, name: str) -> None:
        """Note the digest of a file that was written into the folder by others."""
        self._files[name] = file_sha256(self.path / name)

    def write_results(self, results: dict[str, Any]) -> None:
        """Keep the figures of all stages, and which files they go together with."""
        stages = (*results.get("stages", ()), *results.get("repeats", ()))
        epochs = {f"{stage}/{_METRICS_FILE}": self.stage(stage) / _METRICS_FILE for stage in stages}
        files = {name: file_sha256(path) for name, path in epochs.items() if path.exists()} | self._files
        write_checksummed_json(self.results, results | {"files": dict(sorted(files.items()))})

    def read_results(self) -> dict[str, Any]:
        """What ``write_results`` wrote.

        Raises:
            ArtifactError: missing or damaged.
        """
        results = read_checksummed_json(self.results)
        if results.get("schema") != 1:
            raise ArtifactError(f"{self.results} is not of schema 1, the one that this version reads")
        return results

    def _write_rows(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        self._files[name] = write_chunks(self.path / name, map(encode_text, csv_texts(header, rows)))

    def _write(self, name: str, content: bytes) -> None:
        write_bytes(self.path / name, content)
        self._files[name] = sha256_hex(content)

    def clear(self) -> None:
        """Delete what an earlier run left, all but the lock; whenever that is cut short, it can be done again.

        Raises:
            StorageError: something could not be deleted.
        """
        try:
            entries = [entry for entry in self.path.iterdir() if entry.name not in _LOCKS]
            for entry in sorted(
                entries, key=lambda entry: entry.name in _FILES_BEFORE_TRAINING
            ):  # they show whose folder it is
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        except OSError as error:
            raise StorageError(f"cannot empty {self.path}: {error.strerror or error}") from error


def as_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return comma-separated text.

    Control characters in names become visible escapes, so that a line stays a line.  Texts that a spreadsheet would run
    as formulas get a leading apostrophe, which ``unescape_cell`` takes off.
    """
    return "".join(csv_texts(header, rows))


def csv_texts(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """The same in parts of some thousand lines."""
    every = itertools.chain([header], rows)
    while some := list(itertools.islice(every, 4096)):
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([_escape_cell(cell) for cell in row] for row in some)
        yield out.getvalue()


def find_model(path: Path) -> Path:
    """The model folder that a user means: a run folder (distilled, else baseline, else teacher), or itself.

    Raises:
        ArtifactError: there is no model of ours at ``path``.
    """
    if path.is_file() and path.name in ("model.json", "model.safetensors"):
        return path.parent
    for folder in (path, *(path / stage for stage in reversed(STAGES))):
        if (folder / "model.json").is_file():
            return folder
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; give a run folder or a folder with model.json")
    raise ArtifactError(f"{path} holds no model: neither model.json nor a trained stage ({', '.join(STAGES)})")


def _to_list(values: Array) -> list[Any]:
    found: list[Any] = values.tolist()
    return found


def _escape_cell(cell: Any) -> str:
    text = str(cell)
    text = text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return f"'{text}" if isinstance(cell, str) and _FORMULA.match(text) else text


def unescape_cell(cell: str) -> str:
    """Return the text that ``as_csv`` wrote as ``cell``.

    Example:
        >>> unescape_cell("'=1+1.jpg"), unescape_cell("'cat'.jpg")
        ('=1+1.jpg', "'cat'.jpg")
    """
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
