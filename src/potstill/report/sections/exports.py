"""What `potstill export` has written, how near it is to the original, and how fast."""

from pathlib import Path
from typing import Any

from potstill.amounts import number, percent, scaled
from potstill.report.contents import Run
from potstill.sealed import read_sealed_json


def context(run: Run) -> dict[str, Any] | None:
    """A row for each exported file; None where there is none.

    Raises:
        ArtifactError: a description that is damaged.
    """
    found = [
        (path, read_sealed_json(path))
        for stage in run.stages.values()
        for path in sorted((stage.folder / "export").glob("*.json"))
    ]
    return {"rows": [_row(path, facts) for path, facts in found]} if found else None


def _row(path: Path, facts: dict[str, Any]) -> tuple[str, list[str]]:
    files = facts.get("files") or {}
    size = sum(int(number(each.get("bytes")) or 0) for each in files.values() if isinstance(each, dict))
    parity, accuracy = facts.get("parity") or {}, facts.get("accuracy") or {}
    largest = number(parity.get("max_difference"))
    cells = [
        str(facts.get("format")) + (", int8" if facts.get("int8") else ""),
        scaled(size, "B"),
        "not measured" if largest is None else f"{largest:.1e}",
        percent(parity.get("agreement") if not accuracy else accuracy.get("agreement")),
        "" if not accuracy else f"{percent(accuracy.get('before'))} → {percent(accuracy.get('after'))}",
        _delays(facts.get("latency_ms") or {}),
    ]
    return f"{path.parent.parent.name}: {', '.join(sorted(files)) or path.stem}", cells


def _delays(latency: dict[str, Any]) -> str:
    told = []
    for name, each in latency.items():
        p50, p95 = (number(each.get(key)) if isinstance(each, dict) else None for key in ("p50", "p95"))
        if p50 is not None and p95 is not None:
            told.append(f"{name} {p50:.2f} / {p95:.2f} ms")
    return ", ".join(told)
