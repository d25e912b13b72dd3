"""Read a run folder: results, metrics, confusion matrices, and the predictions of a stage on a split.

Missing stages and files are left out; a damaged file is an error.
"""

import contextlib
import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from potstill.config import sort_stages, stage_role
from potstill.errors import ArtifactError
from potstill.evaluation import Array
from potstill.experiment.run_folder import search_hint
from potstill.formatting import format_number
from potstill.io import (
    check_exists,
    encode_json,
    read_bytes,
    read_checksummed_json,
    read_checksummed_text,
    unescape_cell,
)
from potstill.methods import describe_method

SCHEMA = 1
SPLITS = ("train", "val", "test")
_RUN_FOLDER = "a run folder, such as runs/NAME"


@dataclass(frozen=True)
class StageResult:
    """One trained or pretrained network of a run."""

    name: str
    folder: Path
    facts: dict[str, Any]  # its entry in results.json
    epochs: list[dict[str, Any]] = field(default_factory=list)  # metrics.jsonl, by epoch
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)  # split -> final metrics
    files: dict[str, str] = field(default_factory=dict)  # name -> SHA-256 in results.json
    parsed_files: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # cache

    def read(self, name: str) -> bytes | None:
        """Return the content of one of its files; None if it does not exist."""
        return _read_verified(self.folder / name, self.files.get(name))

    @property
    def role(self) -> str:
        """teacher, baseline, assistant, generation or distilled."""
        return stage_role(self.name)

    @property
    def model(self) -> dict[str, Any]:
        """Architecture, parameters, FLOPs, file_bytes, size."""
        return self.facts.get("model") or {}

    @property
    def training(self) -> dict[str, Any]:
        """Epochs, best_epoch, seconds, images_per_second; empty for a pretrained teacher."""
        return self.facts.get("training") or {}

    @property
    def teaching(self) -> dict[str, Any]:
        """Its teachers (``by``) and their cost per step; empty for teachers and baseline."""
        return self.facts.get("teaching") or {}

    @property
    def latency(self) -> dict[str, Any]:
        """Milliseconds ``p50`` and ``p95``, and how they were measured."""
        return self.facts.get("latency_ms") or {}

    @property
    def memory(self) -> dict[str, Any]:
        """Bytes of ``weights`` and ``activations``; empty if not measured."""
        return self.facts.get("memory") or {}

    def interval(self, key: str) -> tuple[float | None, float | None]:
        """Return the 95 % interval of a metric on test; None if unknown."""
        found = (self.facts.get("test_intervals") or {}).get(key)
        if not isinstance(found, list) or len(found) != 2:
            return None, None
        return format_number(found[0]), format_number(found[1])

    @property
    def is_probe(self) -> bool:
        """Whether no epoch of a fine-tuning was better than the probe that it started from."""
        head = self.facts.get("head")
        return isinstance(head, dict) and head.get("taken") == "probe"

    @property
    def best_epoch(self) -> int | None:
        """The epoch whose weights were kept; None if there are none, or the probe that it started from was kept."""
        if self.is_probe:
            return None
        marked = [record["epoch"] for record in self.epochs if record.get("best")]
        best = self.training.get("best_epoch", marked[-1] if marked else None)
        return best if isinstance(best, int) else None

    def confusion(self, split: str, classes: int) -> Array | None:
        """Return the confusion matrix [K, K] int64 with a row per true class; None if there is none."""
        name = f"confusion_{split}.csv"
        if name not in self.parsed_files:
            content = self.read(name)
            self.parsed_files[name] = (
                None if content is None else _parse_confusion(self.folder / name, content, classes)
            )
        found: Array | None = self.parsed_files[name]
        return found


@dataclass(frozen=True)
class Run:
    """The contents of a run folder."""

    folder: Path
    results: dict[str, Any]
    stages: dict[str, StageResult]  # teachers, baseline, assistants, generations, distilled
    recipe: str | None = None  # recipe.yaml
    environment: str | None = None  # environment.json
    repeats: dict[str, StageResult] = field(default_factory=dict)  # baseline and distilled of further seeds
    examples: dict[str, Any] | None = None  # examples.json

    @property
    def name(self) -> str:
        return str(self.results.get("name") or self.folder.resolve().name)

    @property
    def data(self) -> dict[str, Any]:
        return self.results.get("data") or {}

    @property
    def class_names(self) -> list[str]:
        return [str(name) for name in self.data.get("class_names") or []]

    @property
    def comparison(self) -> dict[str, Any] | None:
        return self.results.get("comparison") or None

    @property
    def without_labels(self) -> dict[str, Any]:
        """What is known of a student that was trained without labels; empty for other runs."""
        found = self.results.get("without_labels")
        return found if isinstance(found, dict) else {}

    @property
    def cosine_teachers(self) -> list[str]:
        """The teachers whose embeddings those of a student without classes are compared with; [] for other runs."""
        student = self.stages.get("distilled")
        found = (student.metrics.get("test") or {}).get("cosine") if student is not None else None
        return list(found) if isinstance(found, dict) else []

    @property
    def shown_path(self) -> str:
        """``runs/NAME``, or of a fold ``runs/NAME/fold-2``; the full path is private."""
        parts = self.folder.resolve().parts
        return "/".join(
            parts[-3:] if (self.comparison or {}).get("fold") and parts[-1].startswith("fold-") else parts[-2:]
        )

    @property
    def folds(self) -> list[dict[str, Any]]:
        """A row for each fold of a cross-validation; empty for other runs."""
        found = self.results.get("folds")
        return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []

    @property
    def teachers_without_classes(self) -> list[str]:
        """A sentence on each teacher that has embeddings only and is not evaluated."""
        found = self.results.get("teachers_without_classes")
        entries = list(found.values()) if isinstance(found, dict) else []
        return [str(each.get("sentence")) for each in entries if isinstance(each, dict)]

    @property
    def together(self) -> dict[str, dict[str, Any]]:
        """Ensembles of several teachers or generations: members ``of`` and the metrics of each split."""
        found = self.results.get("together") or {}
        return {name: found[name] for name in ("teachers", "generations") if isinstance(found.get(name), dict)}

    @property
    def method(self) -> str:
        """Description of the method; "" if results.json names none."""
        return describe_method(self.results.get("method"))

    @property
    def best_k(self) -> int:
        """The k of the metric "top3", at most the number of classes."""
        return min(3, len(self.class_names) or 3)


def read_run(folder: Path) -> Run:
    """Read all small files of a run folder; predictions are read on demand."""
    path = folder / "results.json"
    check_exists(folder, _RUN_FOLDER)
    if not path.is_file():
        reason = search_hint(folder) or f"it has no results.json; give {_RUN_FOLDER}"
        raise ArtifactError(f"{folder} is no finished run: {reason}")
    results = read_checksummed_json(path)
    if results.get("schema") != SCHEMA:
        raise ArtifactError(f"{path} has schema {results.get('schema')!r}; this potstill reads schema {SCHEMA}")
    if not all(isinstance(results.get(key), dict) for key in ("stages", "files")) or not isinstance(
        results.get("repeats", {}), dict
    ):
        raise ArtifactError(f"{path} is damaged: it should hold an object with 'stages' and 'files'")
    # Only known names, as a stage's name becomes a folder that is written to.
    stages, repeats = (_read_stages(folder, results.get(key, {}), results["files"]) for key in ("stages", "repeats"))
    recipe, environment = folder / "recipe.yaml", folder / "environment.json"
    return Run(
        folder,
        results,
        stages,
        read_checksummed_text(recipe) if recipe.is_file() else None,
        encode_json(read_checksummed_json(environment)).decode() if environment.is_file() else None,
        repeats,
        _read_examples(folder / "examples.json", results["files"]),
    )


def _read_examples(path: Path, files: dict[str, Any]) -> dict[str, Any] | None:
    """Read examples.json; None if it does not exist: copies of a run may go without."""
    if path.name not in files or not path.is_file():
        return None
    return _parse_object(path, read_bytes(path, sha256=str(files[path.name])))


def _read_stages(folder: Path, entries: dict[str, Any], files: dict[str, Any]) -> dict[str, StageResult]:
    known = {name: entries[name] for name in sort_stages(entries)}
    return {name: _read_stage(folder / name, facts, files) for name, facts in known.items() if isinstance(facts, dict)}


def _read_stage(folder: Path, facts: dict[str, Any], files: dict[str, Any]) -> StageResult:
    start = f"{folder.name}/"
    own = {name.removeprefix(start): str(sha256) for name, sha256 in files.items() if name.startswith(start)}
    # results.json has the flat metrics of each split, metrics.json also those of each class.
    metrics = {split: dict(facts[split]) for split in SPLITS if isinstance(facts.get(split), dict)}
    path, lines = folder / "metrics.json", folder / "metrics.jsonl"
    content = _read_verified(path, own.get(path.name))
    if content is not None:
        detailed = _parse_object(path, content)
        for split in SPLITS:
            if isinstance(detailed.get(split), dict):
                metrics[split] = metrics.get(split, {}) | detailed[split]
    ordered = {split: metrics[split] for split in SPLITS if split in metrics}
    epochs = _parse_epochs(lines, _read_verified(lines, own.get(lines.name)) or b"")
    return StageResult(folder.name, folder, facts, epochs, ordered, own)


def _parse_epochs(path: Path, content: bytes) -> list[dict[str, Any]]:
    records = [_parse_object(path, line) for line in content.splitlines()]
    if not all(isinstance(record.get("epoch"), int) for record in records):
        raise ArtifactError(f"{path} is damaged: each line should be an object with a whole 'epoch'")
    return records


def _parse_confusion(path: Path, content: bytes, classes: int) -> Array:
    """Parse rows of true class, predicted class and number of images, one for each non-empty cell."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    rows = csv.reader(io.StringIO(content.decode("utf-8", "replace"), newline=""))
    try:
        next(rows)
        found = np.array([[int(cell) for cell in row[:3]] for row in rows], dtype=np.int64).reshape(-1, 3)
    except (StopIteration, ValueError, OverflowError, csv.Error) as error:
        raise ArtifactError(f"{path} is damaged in line {rows.line_num}: {error or 'it is empty'}") from error
    if len(found) and not (found.min() >= 0 and found[:, :2].max() < classes):
        raise ArtifactError(f"{path}: the confusion matrix is not for {classes} classes")
    np.add.at(matrix, (found[:, 0], found[:, 1]), found[:, 2])
    return matrix


def _read_verified(path: Path, sha256: str | None) -> bytes | None:
    if not path.is_file():
        return None
    if sha256 is None:
        raise ArtifactError(f"{path} is none of the files that results.json lists: it is not of this run")
    return read_bytes(path, sha256=sha256)


def _parse_object(path: Path, content: bytes) -> dict[str, Any]:
    found: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(content)
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} is damaged: it holds no JSON objects")
    return found


PROBABILITY_PREFIX = "p:"
INDEX_COLUMNS = ["label_index", "prediction_index"]  # of a file with only the most probable classes


@dataclass(frozen=True)
class PredictedClasses:
    """Labels and predictions of the images of a split."""

    class_names: list[str]  # "" for a class that the file does not mention
    paths: list[str]
    labels: Array  # [N] int64
    predicted: Array  # [N] int64

    def same_images(self, other: "PredictedClasses") -> bool:
        """Return whether both have the same images and labels in the same order."""
        return self.paths == other.paths and np.array_equal(self.labels, other.labels)


def read_predictions(stage: StageResult, split: str) -> PredictedClasses | None:
    """Read predictions_{split}.csv; None if it does not exist."""
    path = stage.folder / f"predictions_{split}.csv"
    content = stage.read(path.name)
    if content is None:
        return None
    try:
        return _parse_predictions(path, content.decode("utf-8"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"cannot read {path}: {error}") from error


def _parse_predictions(path: Path, text: str) -> PredictedClasses:
    rows = csv.reader(io.StringIO(text, newline=""))
    header = next(rows, [])
    if header[:3] != ["path", "label", "prediction"]:
        raise ArtifactError(f"{path} is damaged: its first line should begin with path,label,prediction")
    paths: list[str] = []
    numbers: list[tuple[int, int]] = []
    names = [column.removeprefix(PROBABILITY_PREFIX) for column in header[3:]]
    index = {name: i for i, name in enumerate(names)}
    has_indices = header[3:5] == INDEX_COLUMNS
    if has_indices:
        index = {}
    for cells in rows:
        row = [*map(unescape_cell, cells[:3]), *cells[3:]]
        try:
            if len(row) != len(header):
                raise ValueError
            pair = (int(row[3]), int(row[4])) if has_indices else (index[row[1]], index[row[2]])
            if has_indices and not (index.setdefault(row[1], pair[0]), index.setdefault(row[2], pair[1])) == pair:
                raise ValueError
        except (ValueError, KeyError) as error:
            raise ArtifactError(
                f"{path} is damaged in line {rows.line_num}: cells or class names do not fit its header"
            ) from error
        paths.append(row[0])
        numbers.append(pair)
    if has_indices:
        names = [""] * (1 + max(index.values(), default=-1))
        for name, number in index.items():
            names[number] = name
    labels, predicted = np.array(numbers, dtype=np.int64).reshape(-1, 2).T
    return PredictedClasses(names, paths, labels, predicted)
