"""What does not go together with a curriculum."""

from collections.abc import Iterator
from typing import Any

from potstill.experiments.method_settings import as_mapping, describe, needs_teacher
from potstill.experiments.settings_errors import Finding


def curriculum_problems(value: dict[str, Any]) -> Iterator[Finding]:
    """Of a recipe with ``curriculum``: nobody whose word decides, or another rule on what is drawn."""
    if value.get("curriculum") is None:
        return
    found = value.get("data")
    data: dict[str, Any] = found if isinstance(found, dict) else {}
    if not needs_teacher(value.get("method")):
        yield (
            ("curriculum",),
            f"curriculum: the teacher says what is easy, and {describe(as_mapping(value.get('method')))} has none",
        )
    if data.get("balance") == "sampling":
        yield (
            ("data", "balance"),
            "data.balance: sampling and curriculum both say which images are drawn; use balance: weights",
        )
    if data.get("target") is not None:
        yield (
            ("curriculum",),
            "curriculum orders images by class, which those of data.target do not have: leave one of them out",
        )
