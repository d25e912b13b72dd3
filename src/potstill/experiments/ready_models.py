"""Weights that are a model of ours know their architecture: a recipe need not repeat it."""

from pathlib import Path
from typing import Any

from potstill.errors import ArtifactError, PotstillError, UsageError
from potstill.experiments.recipe_checks import networks
from potstill.experiments.recipe_yaml import KeyPath
from potstill.experiments.settings_errors import dotted
from potstill.sealed import read_sealed_json

_MOST_BYTES = 10_000_000  # of a file of class names
# Of a whole run, a teacher starts from the teacher; a student from the best student there is.
_PREFERENCE = {"teacher": ("teacher", "distilled", "baseline"), "student": ("distilled", "baseline", "teacher")}


def fill_architectures(value: dict[str, Any]) -> list[tuple[KeyPath, PotstillError]]:
    """Complete ``model`` of each network from its ``weights`` and name the exact model folder of a run.

    Changes ``value`` in place; returns which key has weights that cannot be used, and why.
    """
    failures: list[tuple[KeyPath, PotstillError]] = []
    for path, section in networks(value):
        name = dotted(path)
        if isinstance(section.get("classes"), str):
            try:
                section["classes"] = _lines(section["classes"], f"{name}.classes")
            except PotstillError as error:
                failures.append(((*path, "classes"), error))
                section["classes"] = None
        if not isinstance(section.get("weights"), str):
            if section.get("classes") is not None:
                failures.append(
                    ((*path, "classes"), UsageError(f"{name}.classes is for ready weights; none are given"))
                )
            continue
        try:
            _fill(section, name)
        except PotstillError as error:
            failures.append(((*path, "weights"), type(error)(f"{name}.weights: {error}")))
            section.setdefault("model", None)
            section["model"] = section["model"] or "?"  # one message about these weights is enough
    return failures


def model_card(path: Path, stage: str = "student") -> Path | None:
    """The model.json of a model file, a model folder or a run folder; None where ``path`` is none of ours.

    ``stage``: for which key of a recipe, which decides what is taken of a whole run.
    """
    if path.is_file():
        card = path if path.suffix == ".json" else path.with_suffix(".json")
        return card if card.is_file() and path.stem == "model" else None
    folders = [path, *(path / name for name in _PREFERENCE["teacher" if stage.startswith("teacher") else "student"])]
    return next((folder / "model.json" for folder in folders if (folder / "model.json").is_file()), None)


def _lines(file: str, key: str) -> list[str]:
    """The class names in a text file, one a line."""
    path = Path(file).expanduser()
    try:
        text = path.read_bytes()[:_MOST_BYTES].decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UsageError(f"{key}: {file} cannot be read as class names, one a line: {reason}") from error
    names = [line.strip() for line in text.splitlines()]
    return [name for name in names if name]


def _fill(section: dict[str, Any], stage: str) -> None:
    """``stage`` is the section's key: "student", "teacher[1]"."""
    weights = section["weights"]
    if weights == "pretrained":
        return
    path = Path(weights).expanduser()
    if not path.exists():
        raise UsageError(f"no such file or folder: {weights}")
    card = model_card(path, stage)
    if card is None:
        if path.is_dir():
            raise UsageError(f"{weights} is neither a run folder with a finished model nor a model folder")
        if not section.get("model"):
            raise UsageError(f"{weights} holds weights alone; name their architecture as ARCHITECTURE@{weights}")
        return
    architecture = read_sealed_json(card).get("architecture")
    if not isinstance(architecture, str):
        raise ArtifactError(f"{card} is damaged: it names no architecture")
    if section.get("model") not in (None, architecture):
        raise UsageError(f"{weights} is a {architecture}, but {stage}.model is {section['model']}")
    section["model"] = architecture
    section["weights"] = str(card.parent)
