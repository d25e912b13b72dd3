"""Test images: confident mistakes, disagreements, what distillation repaired and broke, and where the networks look."""

import base64
import binascii
from collections.abc import Iterator
from typing import Any

from potstill.amounts import NONE, count, number, percent
from potstill.report.contents import Run
from potstill.report.figures.heat import heat_uri

_TITLES = {
    "mistakes": "The most confident mistakes of {student}",
    "disagreements": "Where {student} and {teacher} disagree",
    "repaired": "What distillation repaired",
    "broken": "What distillation broke",
}
_KINDS = {
    "mistakes": "wrong answers, the most confident first",
    "disagreements": "images of which they name different classes, those first of which both are most sure",
    "repaired": "images that baseline gets wrong and distilled right, the largest change first",
    "broken": "images that baseline gets right and distilled wrong, the largest change first",
}
_MOST = 4096.0  # sides of a picture that a heat map may stretch over: with black borders, more than the picture
_TYPES = ("png", "jpeg")


def context(run: Run) -> dict[str, Any] | None:
    """Groups of images with heat maps; None for runs that kept none."""
    examples = run.examples
    if examples is None or not isinstance(examples.get("groups"), dict):
        return None
    parts, images = examples.get("parts") or {}, examples.get("images") or {}
    groups = [_group(name, found, images, parts) for name, found in examples["groups"].items() if name in _TITLES]
    shown = [card for group in groups for card in group["cards"]]
    pictures = {card["key"]: card["picture"] for card in shown if card["picture"]}
    return {
        "split": str(examples.get("split")),
        "groups": groups,
        "pictures": pictures,
        "looking": any(look["heat"] for card in shown for look in card["looks"]),
        "notes": list(_notes(run, examples, shown)),
    }


def _group(name: str, found: dict[str, Any], images: dict[str, Any], parts: dict[str, str]) -> dict[str, Any]:
    keys = [str(key) for key in found.get("images") or []]
    return {
        "title": _TITLES[name].format(student=parts.get("student", "the student"), teacher=parts.get("teacher")),
        "kind": _KINDS[name],
        "count": count(found.get("count")),
        "none": not number(found.get("count")),
        "all": number(found.get("count")) == len(keys),
        "cards": [_card(key, images[key], parts) for key in keys if isinstance(images.get(key), dict)],
    }


def _card(key: str, image: dict[str, Any], parts: dict[str, str]) -> dict[str, Any]:
    said = image.get("said") or {}
    true = str(image.get("class"))
    answers = []
    for stage in dict.fromkeys(parts[part] for part in ("teacher", "baseline", "student") if part in parts):
        answer = said.get(stage) or {}
        named = str(answer.get("class", NONE))
        answers.append((stage, named, percent(answer.get("probability")), "right" if named == true else "wrong"))
    picture = _picture(image.get("thumbnail"))
    looks = image.get("looks") or {}
    return {
        "key": key,
        "name": str(image.get("name")),
        "class": true,
        "answers": answers,
        "picture": picture,
        "looks": [_look(stage, named, looks.get(stage)) for stage, named, _, _ in answers if stage in looks]
        if picture
        else [],
    }


def _picture(found: Any) -> dict[str, Any] | None:
    """``uri``, ``width``, ``height`` and whether it is to be enlarged without blur; None where there is no picture."""
    if not isinstance(found, dict) or found.get("type") not in _TYPES:
        return None
    width, height = (number(found.get(side)) for side in ("width", "height"))
    try:
        data = base64.b64encode(base64.b64decode(str(found.get("data")), validate=True)).decode()
    except binascii.Error:
        return None
    if not width or not height or not data:
        return None
    uri = f"data:image/{found['type']};base64,{data}"
    return {"uri": uri, "width": int(width), "height": int(height), "small": found["type"] == "png"}


def _look(stage: str, named: str, found: Any) -> dict[str, Any]:
    """Where ``stage`` looked for the class that it named: a heat map and the part of the picture that it covers."""
    try:
        rows = [bytes.fromhex(row) for row in found["rows"]]
        left, top, width, height = (100 * min(_MOST, max(-_MOST, float(share))) for share in found["region"])
    except (KeyError, TypeError, ValueError):
        rows, left, top, width, height = [], 0.0, 0.0, 100.0, 100.0
    whole = bool(rows and rows[0]) and len({len(row) for row in rows}) == 1
    return {
        "stage": stage,
        "named": named,
        "heat": heat_uri(rows) if whole and any(map(any, rows)) else None,
        "place": [f"{each:g}%" for each in (left, top, width, height)],
    }


def _notes(run: Run, examples: dict[str, Any], shown: list[dict[str, Any]]) -> Iterator[str]:
    for stage, reason in (examples.get("failed") or {}).items():
        yield f"No heat maps of {stage}: {reason}."
    missing = len({card["key"] for card in shown if not card["picture"]})
    if missing:
        yield (
            f"{'One image has' if missing == 1 else f'{missing} images have'} no picture: the file could no longer be "
            "read when the run ended."
        )
    if sum(stage.role == "teacher" for stage in run.stages.values()) > 1:
        yield "Of several teachers, the first is shown."
