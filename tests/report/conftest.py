"""Made-up run folders, written file by file as the pipeline writes them."""

import base64
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from potstill.io import write_checksummed_json, write_checksummed_text
from potstill.report.render import render_page
from potstill.report.run_reader import read_run

from ..conftest import blank_pictures

SKILL = {"teacher": 0.92, "baseline": 0.80, "distilled": 0.86}
ARCHITECTURE = {"teacher": "cifar/vgg8", "baseline": "cifar/resnet8", "distilled": "cifar/resnet8"}
MODEL = {
    "teacher": {"parameters": 3_965_028, "flops": 193_000_000, "file_bytes": 15_900_000},
    "baseline": {"parameters": 78_042, "flops": 25_000_000, "file_bytes": 330_000},
    "distilled": {"parameters": 78_042, "flops": 25_000_000, "file_bytes": 330_000},
}
LATENCY = {"teacher": 4.2, "baseline": 1.4, "distilled": 1.4}


def like(stage: str) -> str:
    """Which of the three above a stage of another name is made like."""
    role = stage.partition("-")[0]
    return {"assistant": "teacher", "generation": "distilled"}.get(role, role)


def listed(folder: Path) -> dict[str, str]:
    """``files`` of results.json."""
    names = ("metrics.json", "metrics.jsonl", "predictions_*.csv", "confusion_*.csv")
    found = sorted([path for name in names for path in folder.glob(f"*/{name}")] + list(folder.glob("examples.json")))
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


class RunBuilder:
    """Writes one run folder; counts and accuracies follow from labels and probabilities that it draws."""

    def __init__(self, folder: Path, class_names: Sequence[str], *, epochs: int = 10, test_images: int = 27) -> None:
        self.folder, self.class_names, self.epochs = folder, list(class_names), epochs
        self.images = {"train": 4 * test_images, "val": test_images, "test": test_images}  # of each class
        self.seed = 0
        self.skill = dict(SKILL)
        self.stages: tuple[str, ...] = ("teacher", "baseline", "distilled")
        self.ready_teacher = False
        self.changes: dict[str, Any] = {}  # laid over results.json
        self.calibration: dict[str, Any] | None = None  # of every stage
        self.examples: dict[str, Any] | None = None  # examples.json, where there is to be one

    def write(self) -> Path:
        self.folder.mkdir(parents=True)
        self.random = np.random.default_rng(self.seed)
        self.labels = {s: np.repeat(np.arange(len(self.class_names)), n) for s, n in self.images.items()}
        self.right: dict[str, np.ndarray[Any, Any]] = {}
        stages = {name: self._stage(name) for name in self.stages}
        results = self._results(stages) | self.changes
        recipe = (
            f"name: quickstart\nseed: {self.seed}\ndata:\n  source: digits\nmethod: {{name: kd, temperature: 2.0}}\n"
        )
        write_checksummed_text(self.folder / "recipe.yaml", recipe)
        write_checksummed_json(self.folder / "environment.json", {"python": "3.11.9", "torch": "2.15.0"})
        if self.examples is not None:
            (self.folder / "examples.json").write_text(json.dumps(self.examples), encoding="utf-8")
        write_checksummed_json(self.folder / "results.json", results | {"files": listed(self.folder)})
        return self.folder

    def _stage(self, name: str) -> dict[str, Any]:
        folder = self.folder / name
        folder.mkdir()
        metrics = {split: self._split(folder, name, split) for split in self.images}
        (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
        ready = name == "teacher" and self.ready_teacher
        if not ready:
            self._epochs(folder, name)
        training = {"epochs": self.epochs, "best_epoch": max(1, self.epochs - 2), "seconds": 83.0}
        training |= {"images_per_second": 321.0, "selection_metric": "top1"}
        latency = {
            "p50": LATENCY[like(name)],
            "p95": 1.2 * LATENCY[like(name)],
            "batch": 1,
            "threads": 2,
            "device": "cpu",
        }
        flat = {s: {k: v for k, v in m.items() if k not in _DETAILS} for s, m in metrics.items()}
        return {
            "model": {"architecture": ARCHITECTURE[like(name)], "size": 32, **MODEL[like(name)]},
            "training": None if ready else training,
            "latency_ms": latency,
            **({} if self.calibration is None else {"calibration": self.calibration}),
            **flat,
        }

    def _split(self, folder: Path, stage: str, split: str) -> dict[str, Any]:
        labels, classes = self.labels[split], len(self.class_names)
        probabilities = self._probabilities(
            labels, min(0.99, self.skill[like(stage)] + (0.06 if split == "train" else 0))
        )
        predicted = probabilities.argmax(1)
        if split == "test":
            self.right[stage] = predicted == labels
        with (folder / f"predictions_{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", "label", "prediction", *(f"p:{name}" for name in self.class_names)])
            for i, (label, said) in enumerate(zip(labels, predicted, strict=True)):
                numbers = [f"{p:.9g}" for p in probabilities[i]]
                writer.writerow([f"{split}/{i:05d}.png", self.class_names[label], self.class_names[said], *numbers])
        confusion = np.zeros((classes, classes), dtype=int)
        np.add.at(confusion, (labels, predicted), 1)
        pairs = [f"{i},{j},{confusion[i, j]}" for i, j in np.argwhere(confusion)]
        (folder / f"confusion_{split}.csv").write_text("\n".join(["true_index,predicted_index,images", *pairs, ""]))
        return metrics(self.class_names, confusion, distilled=stage == "distilled" and split == "test")

    def _probabilities(self, labels: np.ndarray[Any, Any], skill: float) -> np.ndarray[Any, Any]:
        classes = len(self.class_names)
        # A mistake usually falls on the class beside the true one, as confusions of real data have a pattern.
        near = (labels + self.random.choice([1, 1, 1, 2], len(labels))) % classes
        said = np.where(self.random.random(len(labels)) < skill, labels, near)
        logits = self.random.normal(0, 0.5, (len(labels), classes))
        logits[np.arange(len(labels)), said] += 5
        exp = np.exp(logits)
        return exp / exp.sum(1, keepdims=True)

    def _epochs(self, folder: Path, stage: str) -> None:
        best = max(1, self.epochs - 2)
        for epoch in range(1, self.epochs + 1):
            done = 1 - np.exp(-4 * epoch / self.epochs)
            record: dict[str, Any] = {"epoch": epoch, "seconds": 8.3, "lr": 1e-3, "images_per_second": 321.0}
            record["best"] = epoch <= best
            for split, extra in (("train", 0.05), ("val", 0.0)):
                top1 = min(0.999, done * (self.skill[like(stage)] + extra) + 0.01 * self.random.random())
                ce = 0.05 + 2.2 * (1 - top1)
                terms = {"ce": ce / 2, "kd": ce / 3} if stage == "distilled" and split == "train" else {"ce": ce}
                record[split] = {"loss": sum(terms.values()), "terms": terms, "top1": top1, "top3": (1 + top1) / 2}
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")

    def _results(self, stages: dict[str, Any]) -> dict[str, Any]:
        counts = {split: dict.fromkeys(self.class_names, n) for split, n in self.images.items()}
        data = {"source": "digits", "origin": "made here: stratified 70/15/15, split seed 0", "fingerprint": "f" * 64}
        data |= {"class_names": self.class_names, "counts": counts, "size": 32}
        return {
            "schema": 1,
            "name": self.folder.name,
            "recipe": "quickstart",
            "created": "2026-11-22T10:00:00Z",
            "potstill": "0.1.0",
            "seconds": 3725.0,
            "seed": self.seed,
            "data": data,
            "method": {"name": "kd", "temperature": 2.0, "alpha": 0.5},
            "stages": stages,
            "comparison": self._comparison(stages) if len(stages) == 3 else None,
            "warnings": [],
        }

    def _comparison(self, stages: dict[str, Any]) -> dict[str, Any]:
        a, b = self.right["baseline"], self.right["distilled"]
        difference = b.astype(float) - a.astype(float)
        gain, reach = difference.mean(), 1.96 * difference.std() / np.sqrt(len(a))
        gap = stages["teacher"]["test"]["top1"] - stages["baseline"]["test"]["top1"]
        return {
            "top1_gain": gain,
            "top1_gain_low": gain - reach,
            "top1_gain_high": gain + reach,
            "mcnemar_p": 0.012,
            "fixed": int((b & ~a).sum()),
            "broken": int((a & ~b).sum()),
            "f1_macro_gain": gain,
            "auc_macro_gain": 0.004,
            "gap": gap,
            "gap_closed": gain / gap if gap > 0 else None,
            "parameter_ratio": 50.8,
            "file_ratio": 48.2,
            "latency_ratio": 3.0,
            "test_images": len(a),
            "verdict": "as the pipeline said",
        }


_DETAILS = ("per_class", "auc_skipped")


def metrics(class_names: Sequence[str], confusion: np.ndarray[Any, Any], *, distilled: bool) -> dict[str, Any]:
    """final_metrics as the evaluation gives it; AUC, ECE and NLL are made up."""
    right, rows, columns = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    precision, recall = right / np.maximum(columns, 1), right / np.maximum(rows, 1)
    f1 = 2 * right / np.maximum(rows + columns, 1)
    top1 = float(right.sum() / confusion.sum())
    found: dict[str, Any] = {"top1": top1, "top3": 1.0 if len(class_names) < 4 else (1 + top1) / 2}
    for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
        found |= {f"{name}_micro": top1, f"{name}_macro": float(values.mean())}
        found[f"{name}_weighted"] = float((values * rows).sum() / rows.sum())
    found |= {"auc_micro": 0.991, "auc_macro": 0.987, "auc_weighted": None, "ece": 0.034, "nll": 0.41, "loss": 0.43}
    found["count"] = int(confusion.sum())
    if distilled:
        found |= {"agreement": 0.913, "kl_to_teacher": 0.21}
    found["per_class"] = [
        {"class": c, "precision": float(p), "recall": float(r), "f1": float(f), "auc": 0.99, "support": int(n)}
        for c, p, r, f, n in zip(class_names, precision, recall, f1, rows, strict=True)
    ]
    return found | {"auc_skipped": []}


GROUPS = ("mistakes", "disagreements", "repaired", "broken")


def examples(class_names: Sequence[str], images: int = 24, side: int = 120) -> dict[str, Any]:
    """examples.json at its heaviest: every image in one group only, its pixels noise."""
    random = np.random.default_rng(0)

    def shot(i: int) -> dict[str, Any]:
        file = io.BytesIO()
        noise = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file, "JPEG", quality=25)
        said = class_names[(i + 1) % len(class_names)]
        return {
            "name": f"test/{class_names[i % len(class_names)]}/{i:05d}.png",
            "class": class_names[i % len(class_names)],
            "predictions": {name: {"class": said, "probability": 0.75} for name in SKILL},
            "thumbnail": {
                "type": "jpeg",
                "width": side,
                "height": side,
                "data": base64.b64encode(file.getvalue()).decode(),
            },
        }

    each = images // len(GROUPS)
    return {
        "schema": 1,
        "split": "test",
        "parts": {"student": "distilled", "teacher": "teacher", "baseline": "baseline"},
        "groups": {
            name: {"count": 10 * each, "images": [str(at * each + i) for i in range(each)]}
            for at, name in enumerate(GROUPS)
        },
        "images": {str(i): shot(i) for i in range(images)},
    }


@pytest.fixture
def drawn() -> None:
    """The test's pages have their pictures."""


@pytest.fixture(autouse=True)
def _pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Blank ones, but for tests that ask for ``drawn`` or are in a module that says DRAWS = True."""
    if "drawn" in request.fixturenames or getattr(request.module, "DRAWS", False):
        yield
    else:
        with blank_pictures():
            yield


@pytest.fixture(scope="session")
def run_builder() -> type[RunBuilder]:
    return RunBuilder


@pytest.fixture
def build_run(tmp_path: Path) -> Callable[..., RunBuilder]:
    def build(class_names: Sequence[str] | int = 4, *, name: str = "quickstart", **options: Any) -> RunBuilder:
        if isinstance(class_names, int):
            class_names = [f"class {i}" for i in range(class_names)]
        return RunBuilder(tmp_path / "runs" / name, class_names, **options)

    return build


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of a run with everything that a page can show, of so many classes; made once."""
    made: dict[int, Path] = {}

    def build(classes: int) -> Path:
        if classes not in made:
            names = [f"a class with quite a long name, number {i}" for i in range(classes)]
            images = 10 if classes > 10 else 60
            builder = RunBuilder(tmp_path_factory.mktemp("full") / "run", names, epochs=30, test_images=images)
            bins = [[10, 0.45, 0.4], [30, 0.75, 0.7], [60, 0.97, 0.95]]
            figures = {"ece": 0.03, "nll": 0.4, "bins": bins}
            builder.calibration = {"temperature": 1.4, "before": figures, "after": figures}
            builder.examples, builder.changes = examples(names), {"warnings": ["The teacher is weak."]}
            made[classes] = builder.write()
        return made[classes]

    return build


@pytest.fixture(scope="session")
def full_page(full: Callable[[int], Path]) -> Callable[[int], str]:
    """The page of that run, with its pictures; made once."""
    made: dict[int, str] = {}

    def render(classes: int) -> str:
        if classes not in made:
            made[classes] = render_page(read_run(full(classes)))
        return made[classes]

    return render
