"""What the runs below one folder have come to, also those that are still training."""

import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

from potstill.errors import ArtifactError
from potstill.experiments.run_folder import RunFolder
from potstill.experiments.stage_names import in_order, repeated, role

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MOST_RUNS = 500
_MOST_BYTES = 32_000_000  # of a file that is read
_MOST_POINTS = 400  # of a curve
_QUIET = 120.0  # seconds without a new epoch after which a run counts as stopped, if its epochs are short


def known_runs(root: Path, own: Path | None = None) -> dict[str, Path]:
    """The runs below ``root`` and the one that was named, by id, the newest first.

    Requests are looked up here: none of their text becomes part of a path.
    """
    found = {}
    if root.is_dir():
        folders = (each for each in root.iterdir() if _ID.fullmatch(each.name) and not each.is_symlink())
        found = {each.name: each for each in folders if (each / "recipe.yaml").is_file()}
    if own is not None and (own / "recipe.yaml").is_file() and _ID.fullmatch(own.resolve().name):
        found[own.resolve().name] = own
    newest = sorted(found.items(), key=lambda each: (each[1] / "recipe.yaml").stat().st_mtime, reverse=True)
    return dict(newest[:_MOST_RUNS])


def summary(run: str, folder: Path) -> dict[str, Any]:
    """State and figures of a run, without its curves."""
    stages, results = _stages(folder), _results(folder)
    finished = (folder / "results.json").is_file()
    figures = results.get("stages", {})
    return {
        "id": run,
        "state": ("finished" if results else "damaged") if finished else _state(folder, stages),
        "created": results.get("created"),
        "method": (results.get("method") or {}).get("name"),
        "report": (folder / "report.html").is_file(),
        "stages": [{"stage": each, "test_top1": _top1(figures.get(each))} for each in stages],
    }


def progress(run: str, folder: Path) -> dict[str, Any]:
    """``summary``, the verdict, the curves of each stage, and how long the present one still takes."""
    about, results = summary(run, folder), _results(folder)
    planned = _planned(folder)
    stages: list[dict[str, Any]] = []
    for each in about["stages"]:
        epochs = _epochs(folder / each["stage"] / "metrics.jsonl")
        total = planned.get("teacher" if role(each["stage"]) == "teacher" else "student")
        done = (folder / each["stage"] / "model.json").is_file()
        stages.append({**each, "done": done, "planned": total, "epochs": _thin(epochs), "eta_seconds": None})
        if about["state"] == "training" and not done and total and epochs:
            pace = statistics.median(point["seconds"] for point in epochs)
            stages[-1]["eta_seconds"] = round(max(0, total - epochs[-1]["epoch"]) * pace, 1)
    verdict = (results.get("comparison") or {}).get("verdict")
    return {**about, "stages": stages, "verdict": str(verdict) if verdict else None}


def report(folder: Path) -> bytes | None:
    """The run's report.html, if it has one."""
    path = folder / "report.html"
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return None
    return path.read_bytes()


def _stages(folder: Path) -> list[str]:
    names = (each.name for each in folder.iterdir() if each.is_dir() and not each.is_symlink())
    return [name for name in in_order(names) if not repeated(name)]


def _results(folder: Path) -> dict[str, Any]:
    try:
        return RunFolder(folder).read_results() if (folder / "results.json").is_file() else {}
    except ArtifactError:
        return {}


def _top1(figures: Any) -> float | None:
    value = ((figures or {}).get("test") or {}).get("top1")
    return float(value) if isinstance(value, int | float) else None


def _state(folder: Path, stages: list[str]) -> str:
    files = [folder / "recipe.yaml", folder / "environment.json"]
    files += [folder / stage / name for stage in stages for name in ("metrics.jsonl", "checkpoints")]
    newest = max(path.stat().st_mtime for path in files if path.exists())
    last = [_epochs(folder / stage / "metrics.jsonl")[-1:] for stage in stages]
    longest = max([each[0]["seconds"] for each in last if each], default=0.0)
    return "training" if time.time() - newest < max(_QUIET, 5 * longest) else "stopped"


def _planned(folder: Path) -> dict[str, int]:
    """Epochs of the teacher and of the student, by the recipe."""
    import yaml

    try:
        recipe = yaml.safe_load(RunFolder(folder).read_recipe())
        common = recipe["training"]["epochs"]
        own = {each: ((recipe.get(each) or {}).get("training") or {}).get("epochs") for each in ("teacher", "student")}
        return {each: int(value or common) for each, value in own.items()}
    except (ArtifactError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        return {}


def _epochs(path: Path) -> list[dict[str, Any]]:
    """The points of a metrics.jsonl; a line that is just being written, or damaged, is left out."""
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return []
    points = []
    for line in path.read_bytes().splitlines():
        try:
            points.append(_point(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return points


def _point(record: dict[str, Any]) -> dict[str, Any]:
    point: dict[str, Any] = {"epoch": int(record["epoch"]), "seconds": float(record["seconds"])}
    for split in ("train", "val"):
        for figure in ("loss", "top1"):
            value = record[split].get(figure)
            point[f"{split}_{figure}"] = None if value is None else float(value)
    return point


def _thin(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    step = -(-len(points) // _MOST_POINTS) or 1
    return points[::-step][::-1]
