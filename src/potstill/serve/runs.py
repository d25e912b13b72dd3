"""State and figures of the runs below one folder, also of those that are still training.

A run folder may come from anywhere: links inside it are not followed, and whatever its files hold, the figures here
are finite numbers and text.
"""

import json
import math
import re
import time
from pathlib import Path
from typing import Any

from potstill.config import repeat_index, sort_stages
from potstill.errors import ArtifactError
from potstill.experiment.run_folder import RunFolder
from potstill.io import read_checksummed_json

_FEDERATED_FILE = "federated.json"  # of a federated run, written anew after each algorithm
_SEARCH_FILES = ("sweep.json", "fit.json", "shrink.json")  # of a search, which has trials in place of stages
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LINK = re.compile(rb'href="(fold-\d+|shrink/[\w-]+)/(?:report|shrink)\.html"')
_MAX_RUNS = 500
_MAX_BYTES = 32_000_000  # of a file that is read
_IDLE_SECONDS = 120.0  # seconds without a new epoch after which a run counts as stopped, if its epochs are short


def list_runs(output_dir: Path, own: Path | None = None) -> dict[str, Path]:
    """Return the runs below ``output_dir`` and the one named, newest first, by id: all that requests look up."""
    found: dict[str, Path] = {}
    try:
        found = (
            {each.name: each for each in output_dir.iterdir() if not each.is_symlink()} if output_dir.is_dir() else {}
        )
    except OSError:  # the folder may not be listed; the named run is served nevertheless
        found = {}
    if own is not None:
        found[own.resolve().name] = own
    for name, folder in list(found.items()):
        found |= {f"{name}.{each.name}": each for each in _folds(folder)}
        found |= {f"{name}.shrink-{each.name}": each for each in _shrink_folders(folder)}
    dated = [(_start_time(folder), name, folder) for name, folder in found.items() if _ID.fullmatch(name)]
    newest = sorted((each for each in dated if each[0] is not None), key=lambda each: each[0] or 0.0, reverse=True)
    return {name: folder for _, name, folder in newest[:_MAX_RUNS]}


def _folds(folder: Path) -> list[Path]:
    try:
        found = (each.path for each in RunFolder(folder).folds)
        return [each for each in found if not each.is_symlink()]
    except OSError:
        return []


def _shrink_folders(folder: Path) -> list[Path]:
    try:
        return _folders(folder / "shrink")
    except OSError:
        return []


def _folders(folder: Path) -> list[Path]:
    """Return the folders in ``folder``, without links."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    return [each for each in folder.iterdir() if each.is_dir() and not each.is_symlink()]


def summary(run: str, folder: Path) -> dict[str, Any]:
    """Return state and figures of a run; a run that cannot be read has the state "damaged"."""
    try:
        return _summary(run, folder)
    except Exception:  # any content, or a folder that vanishes meanwhile: one run never breaks the list of all
        return {"id": run, "state": "damaged", "report": False, "stages": []}


def _damaged_summary(run: str) -> dict[str, Any]:
    return {"id": run, "state": "damaged", "report": False, "stages": []}


def _summary(run: str, folder: Path) -> dict[str, Any]:
    if _regular(folder / _FEDERATED_FILE):
        return _federated_summary(run, folder)
    if any(_regular(folder / name) for name in _SEARCH_FILES):
        return _search_summary(run, folder)
    stages, results = _stages(folder), _results(folder)
    finished = _regular(folder / "results.json")
    unlabeled = _mapping(results.get("without_labels")).get("test_labeled") is False  # then accuracies are unknown
    figures = {} if unlabeled else _mapping(results.get("stages"))
    return {
        "id": run,
        "state": ("finished" if results else "damaged") if finished else _state(folder, stages),
        "created": _text(results.get("created")),
        "method": _text(_mapping(results.get("method")).get("name")),
        "report": _regular(folder / "report.html"),
        "stages": [
            {"stage": each, "test_top1": _finite(_mapping(_mapping(figures.get(each)).get("test")).get("top1"))}
            for each in stages
        ],
    }


def _federated_summary(run: str, folder: Path) -> dict[str, Any]:
    """Return the summary of a federated run: the global model of each algorithm in place of the stages."""
    found = read_checksummed_json(folder / _FEDERATED_FILE)
    planned, trained = _mapping(found.get("options")).get("algorithms") or [], _mapping(found.get("trained"))
    return {
        "id": run,
        "state": "finished" if set(planned) <= trained.keys() else _state(folder, []),
        "created": None,
        "method": None,
        "report": False,
        "stages": [
            {"stage": str(each), "test_top1": _finite(_mapping(_mapping(trained.get(each)).get("test")).get("top1"))}
            for each in planned
            if str(each).isidentifier() and not (folder / str(each)).is_symlink()  # no path out of the folder
        ],
    }


def _search_summary(run: str, folder: Path) -> dict[str, Any]:
    """Return the summary of a sweep, ``fit`` or ``shrink``: finished with its report, which has the figures."""
    finished = _report_file(folder) is not None
    runs = (each for name in ("trials", "confirmation") for each in _folders(folder / name))
    is_training = not finished and any(_start_time(each) and _state(each, _stages(each)) == "training" for each in runs)
    state = "finished" if finished else "training" if is_training else "stopped"
    return {"id": run, "state": state, "created": None, "method": None, "report": finished, "stages": []}


def report(run: str, folder: Path) -> bytes | None:
    """Return the run's report.html, with links to reports of folds and ``shrink`` as served; None where it has none."""
    try:
        path = _report_file(folder)
        if path is None or path.stat().st_size > _MAX_BYTES:
            return None
        served = b'href="../%s.%s/report"'
        return _LINK.sub(lambda link: served % (run.encode(), link[1].replace(b"/", b"-")), path.read_bytes())
    except OSError:
        return None


def _report_file(folder: Path) -> Path | None:
    """Return the report of a run or of a search, or None where it has none yet."""
    names = ("report.html", "sweep.html", "shrink.html")
    return next((path for name in names if _regular(path := folder / name)), None)


def _regular(path: Path) -> bool:
    """Whether ``path`` is a file itself: a link in a run folder could show any file of this machine."""
    return path.is_file() and not path.is_symlink()


def _start_time(folder: Path) -> float | None:
    """When the run or search was started, in seconds; None for what is neither, or cannot be read."""
    try:
        files = (folder / name for name in ("recipe.yaml", *_SEARCH_FILES))
        return next((each.stat().st_mtime for each in files if _regular(each)), None)
    except OSError:
        return None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _finite(value: Any) -> float | None:
    """``value`` as a finite number, which JSON can carry; else None."""
    number = float(value) if isinstance(value, int | float) else math.nan
    return number if math.isfinite(number) else None


def _stages(folder: Path) -> list[str]:
    return [name for name in sort_stages(each.name for each in _folders(folder)) if not repeat_index(name)]


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    try:
        return _mapping(RunFolder(folder).read_results()) if _regular(path) else {}
    except ArtifactError:
        return {}


def _state(folder: Path, stages: list[str]) -> str:
    if any(_state(fold, _stages(fold)) == "training" for fold in _folds(folder)):
        return "training"
    files = [folder / "recipe.yaml", folder / "environment.json"]
    files += [folder / stage / name for stage in stages for name in ("metrics.jsonl", "checkpoints")]
    newest = max(path.lstat().st_mtime for path in files if path.exists())
    longest = max((_last_epoch_seconds(folder / stage / "metrics.jsonl") for stage in stages), default=0.0)
    return "training" if time.time() - newest < max(_IDLE_SECONDS, 5 * longest) else "stopped"


def _last_epoch_seconds(path: Path) -> float:
    """Return the length of the last epoch in metrics.jsonl; 0 if there is none.  A damaged line is passed over."""
    if not _regular(path) or path.stat().st_size > _MAX_BYTES:
        return 0.0
    for line in reversed(path.read_bytes().splitlines()):
        try:
            seconds = _finite(json.loads(line)["seconds"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if seconds is not None:
            return seconds
    return 0.0
