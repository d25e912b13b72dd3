"""The run folder: the only link between training and everything that looks at results.  No torch here.

``runs/<name>/`` holds recipe.yaml, environment.json, splits.csv, results.json and one folder for each stage.
"""

import csv
import io
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from potstill.artifacts import read_bytes, read_json, write_json, write_text
from potstill.errors import ArtifactError, StorageError, UsageError

STAGES = ("teacher", "baseline", "distilled")
SPLITS = ("train", "val", "test")

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RunFolder:
    """One run's folder, locked for one writer.  Use as a context manager, or only to read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / ".lock", mode=0o644)

    @classmethod
    def create(cls, root: Path, name: str, *, resume: bool = False, overwrite: bool = False) -> "RunFolder":
        """A new folder ``root/name``, or an existing one that may be gone on with or replaced; locked.

        Nothing is deleted here: call ``clear`` once it is certain that the new run can begin.

        Raises:
            UsageError: a name that is no plain file name; a folder that exists and neither flag; both flags.
            StorageError: it cannot be made, or another process is writing in it.
        """
        if not _NAME.fullmatch(name) or set(name) == {"."}:
            raise UsageError(f"a run's name is 1 to 64 of the characters A-Z a-z 0-9 . _ -, got {name!r}")
        if resume and overwrite:
            raise UsageError("--resume goes on with a run and --overwrite deletes it: give one of them")
        run = cls(root / name)
        known = run.recipe.exists()
        if run.path.is_dir() and not known and any(entry.name != ".lock" for entry in run.path.iterdir()):
            raise UsageError(f"{run.path} exists and is no run folder; choose another --name or --root")
        if known and not (resume or overwrite):
            raise UsageError(
                f"{run.path} exists. Go on with it: --resume. Replace it: --overwrite. Keep it: --name {name}-2"
            )
        if resume and not known:
            raise UsageError(f"nothing to resume: {run.path} does not exist")
        run.acquire()
        return run

    def acquire(self) -> None:
        """Become the one writer.

        Raises:
            StorageError: it cannot be made, or another process is writing in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise StorageError(f"{self.path} is being written by another process; wait for it, or use --name") from None
        except OSError as error:
            raise StorageError(f"cannot write to {self.path}: {error.strerror or error}") from error

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lock; a folder in which nothing was written goes too."""
        if self.path.is_dir() and [entry.name for entry in self.path.iterdir()] == [".lock"]:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()

    # where things are

    @property
    def recipe(self) -> Path:
        """recipe.yaml, complete, with every default spelt out."""
        return self.path / "recipe.yaml"

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
        write_text(self.recipe, text)

    def write_environment(self, facts: dict[str, Any]) -> None:
        """Keep what the result may depend on besides the recipe."""
        write_json(self.path / "environment.json", facts)

    def read_environment(self) -> dict[str, Any]:
        """What ``write_environment`` wrote.

        Raises:
            ArtifactError: missing or damaged.
        """
        facts = read_json(self.path / "environment.json")
        if not isinstance(facts, dict):
            raise ArtifactError(f"{self.path / 'environment.json'} is damaged: it holds no facts")
        return facts

    def add_to_environment(self, facts: dict[str, Any]) -> None:
        """What became known later."""
        self.write_environment(self.read_environment() | facts)

    def write_splits(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """Keep (split, name, class) of every image."""
        write_text(self.path / "splits.csv", as_csv(("split", "name", "class"), rows))

    def write_predictions(
        self,
        stage: str,
        split: str,
        names: Sequence[str],
        labels: Sequence[int],
        probabilities: Sequence[Sequence[float]],
        classes: Sequence[str],
    ) -> None:
        """Keep a stage's class probabilities on a split, in the order of its images."""
        header = ("path", "label", "prediction", *(f"p:{name}" for name in classes))
        rows = (
            (name, classes[label], classes[max(range(len(row)), key=row.__getitem__)], *(f"{p:.9g}" for p in row))
            for name, label, row in zip(names, labels, probabilities, strict=True)
        )
        write_text(self.stage(stage) / f"predictions_{split}.csv", as_csv(header, rows))

    def write_results(self, results: dict[str, Any]) -> None:
        """Keep the figures of all stages."""
        write_json(self.results, results)

    def read_results(self) -> dict[str, Any]:
        """What ``write_results`` wrote.

        Raises:
            ArtifactError: missing or damaged.
        """
        results = read_json(self.results)
        if not isinstance(results, dict) or results.get("schema") != 1:
            raise ArtifactError(f"{self.results} is not of schema 1, the one that this version reads")
        return results

    def clear(self) -> None:
        """Delete what an earlier run left, all but the lock.

        Raises:
            StorageError: something could not be deleted.
        """
        try:
            for entry in self.path.iterdir():
                if entry.name == ".lock":
                    continue
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        except OSError as error:
            raise StorageError(f"cannot empty {self.path}: {error.strerror or error}") from error


def as_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Comma-separated text; control characters in names become visible escapes, so that a line stays a line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_visible(cell) for cell in header])
    writer.writerows([_visible(cell) for cell in row] for row in rows)
    return out.getvalue()


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


def read_text(path: Path) -> str:
    """A file of a run as text.

    Raises:
        ArtifactError: missing, or no UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is damaged: it is no UTF-8 text") from error


def _visible(cell: Any) -> str:
    text = str(cell)
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
