"""What a run folder holds: a stage or file that was never made is absent, a damaged one is an error."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.artifacts import read_bytes, read_json
from potstill.errors import ArtifactError
from potstill.experiments.method_settings import describe
from potstill.experiments.stage_names import in_order, role

SCHEMA = 1
STAGES = ("teacher", "baseline", "distilled")  # of a plain run, and what runs are compared by
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Stage:
    """One trained (or ready-made) network of a run."""

    name: str
    folder: Path
    facts: dict[str, Any]  # its entry in results.json
    epochs: list[dict[str, Any]] = field(default_factory=list)  # metrics.jsonl, by epoch
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)  # split -> final metrics

    @property
    def role(self) -> str:
        """teacher, baseline, assistant, generation or distilled."""
        return role(self.name)

    @property
    def model(self) -> dict[str, Any]:
        """Architecture, parameters, FLOPs, file_bytes, size."""
        return self.facts.get("model") or {}

    @property
    def training(self) -> dict[str, Any]:
        """Epochs, best_epoch, seconds, images_per_second; empty for a ready-made teacher."""
        return self.facts.get("training") or {}

    @property
    def teaching(self) -> dict[str, Any]:
        """Whom it learns from (``by``), and what their answers cost in each step; empty for teachers and baseline."""
        return self.facts.get("teaching") or {}

    @property
    def latency(self) -> dict[str, Any]:
        """Milliseconds ``p50`` and ``p95``, and how they were measured."""
        return self.facts.get("latency_ms") or {}

    @property
    def best_epoch(self) -> int | None:
        """The epoch whose weights were kept."""
        picked = [record["epoch"] for record in self.epochs if record.get("best")]
        best = self.training.get("best_epoch", picked[-1] if picked else None)
        return best if isinstance(best, int) else None

    def confusion(self, split: str, classes: int) -> list[list[int]] | None:
        """K rows (true classes) of K counts, or None where there is none.

        Raises:
            ArtifactError: the matrix is not of ``classes`` rows and columns.
        """
        matrix = self.metrics.get(split, {}).get("confusion")
        if matrix is None:
            return None
        if len(matrix) != classes or any(len(row) != classes for row in matrix):
            raise ArtifactError(
                f"{self.folder / 'metrics.json'}: the confusion matrix of {split} is not for {classes} classes"
            )
        return [[int(count) for count in row] for row in matrix]


@dataclass(frozen=True)
class Run:
    """A run folder, read."""

    folder: Path
    results: dict[str, Any]
    stages: dict[str, Stage]  # teachers, baseline, assistants, generations, distilled
    recipe: str | None = None  # recipe.yaml
    environment: str | None = None  # environment.json

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
    def together(self) -> dict[str, dict[str, Any]]:
        """What several teachers, or several generations, say as one: ``of`` and the figures of each split."""
        found = self.results.get("together") or {}
        return {name: found[name] for name in ("teachers", "generations") if isinstance(found.get(name), dict)}

    @property
    def method(self) -> str:
        """The method in a few words; "" where results.json names none."""
        return describe(self.results.get("method"))

    @property
    def best_k(self) -> int:
        """The k that is written as top-3: no more than there are classes."""
        return min(3, len(self.class_names) or 3)


def read_run(folder: Path) -> Run:
    """Read all small files of a run folder (predictions are read where they are needed).

    Raises:
        ArtifactError: no run folder, a damaged file, or results of a newer potstill.
    """
    if not (folder / "results.json").is_file():
        raise ArtifactError(f"{folder} is no finished run: it has no results.json; a run folder looks like runs/NAME")
    results = read_json(folder / "results.json")
    if not isinstance(results, dict) or not isinstance(results.get("stages"), dict):
        raise ArtifactError(f"{folder / 'results.json'} is damaged: it should hold an object with 'stages'")
    if results.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{folder / 'results.json'} has schema {results.get('schema')!r}; this potstill reads schema {SCHEMA}"
        )
    # Only known names: a stage's name becomes a folder that is written to.
    known = {name: results["stages"][name] for name in in_order(results["stages"])}
    stages = {name: _stage(folder / name, facts) for name, facts in known.items() if isinstance(facts, dict)}
    return Run(folder, results, stages, _text(folder / "recipe.yaml"), _text(folder / "environment.json"))


def _stage(folder: Path, facts: dict[str, Any]) -> Stage:
    # results.json has the flat figures of each split, metrics.json also those per class and the confusion matrix.
    metrics = {split: dict(facts[split]) for split in SPLITS if isinstance(facts.get(split), dict)}
    if (folder / "metrics.json").is_file():
        detailed = read_json(folder / "metrics.json")
        for split in SPLITS:
            if isinstance(detailed, dict) and isinstance(detailed.get(split), dict):
                metrics[split] = metrics.get(split, {}) | detailed[split]
    ordered = {split: metrics[split] for split in SPLITS if split in metrics}
    return Stage(folder.name, folder, facts, _epochs(folder / "metrics.jsonl"), ordered)


def _epochs(path: Path) -> list[dict[str, Any]]:
    """Records by epoch; a resumed run may have written an epoch twice (the later counts)."""
    if not path.is_file():
        return []
    return [record for _, record in sorted({record["epoch"]: record for record in _records(path)}.items())]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    lines = read_bytes(path).split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # the line that a killed run was writing: it has no line end
                return
            raise ArtifactError(f"{path} is damaged in line {number}: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("epoch"), int):
            raise ArtifactError(f"{path} is damaged in line {number}: it should be an object with a whole 'epoch'")
        yield record


def _text(path: Path) -> str | None:
    return read_bytes(path).decode("utf-8", errors="replace") if path.is_file() else None
