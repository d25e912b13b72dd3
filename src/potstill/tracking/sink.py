"""What every tracker can be told."""

from pathlib import Path
from typing import Any, Protocol

Figures = dict[str, float]


class Sink(Protocol):
    """One run at one tracker.  Whatever it raises ends this tracker, never the run."""

    def epoch(self, stage: str, epoch: int, figures: Figures) -> None:
        """Figures of a stage's epoch, from 1, by a name such as ``val/top1``."""

    def final(self, figures: Figures, verdict: str) -> None:
        """Figures on test, by a name such as ``distilled/test/top1``, and the sentence on whether it helped."""

    def files(self, paths: list[Path]) -> None:
        """Files to be kept beside the figures; a tracker without room for files does nothing."""

    def close(self, finished: bool) -> None:
        """Nothing follows; ``finished``: False where the run was interrupted or has failed."""


def flat(value: Any, prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """Leaves of nested mappings and lists by their dotted path.

    Example:
        >>> flat({"method": {"name": "kd", "alpha": 0.5}, "marks": [3, 5]})
        {'method.name': 'kd', 'method.alpha': 0.5, 'marks.0': 3, 'marks.1': 5}
    """
    pairs: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in pairs:
        found |= flat(inner, f"{prefix}{separator}{key}" if prefix else str(key), separator)
    return found


def figures(record: dict[str, Any]) -> Figures:
    """The numbers of a nested record by their path; texts, switches and gaps are left out.

    Example:
        >>> figures({"epoch": 1, "best": True, "val": {"top1": 0.5, "auc_macro": None, "terms": {"kd": 2}}})
        {'epoch': 1.0, 'val/top1': 0.5, 'val/terms/kd': 2.0}
    """
    return {
        name: float(value)
        for name, value in flat(record, separator="/").items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
