"""Everything that the doctor has to say, for JSON and for text."""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from potstill.data.doctor.division import Division
from potstill.data.doctor.findings import KINDS, Finding, Severity

FORMAT = 1

_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Report:
    """What was found in a data set."""

    source: str  # as it was asked for
    images: int  # that are listed
    passed_over: int  # hidden and system files and folders
    division: Division
    figures: dict[str, Any]  # of ``statistics.Table``
    repeats: dict[str, Any]  # counts of ``duplicates.Repeats``
    findings: list[Finding]  # errors first, by kind, by path
    skipped: list[Finding] = field(default_factory=list)  # left out by data.skip_bad
    notes: list[str] = field(default_factory=list)  # what is not wrong, and worth knowing

    def count(self, severity: Severity) -> int:
        """Findings that are so bad."""
        return sum(each.severity == severity for each in self.findings)

    def kinds(self) -> dict[str, int]:
        """Kind -> findings, in the order of KINDS."""
        counted = Counter(each.kind for each in self.findings)
        return {kind: counted[kind] for kind in KINDS if kind in counted}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = self.division.class_names
        counts = {s: dict(zip(names, c.tolist(), strict=True)) for s, c in self.division.counts().items()}
        return {
            "format": FORMAT,
            "source": self.source,
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "kinds": self.kinds(),
            "images": self.images,
            "passed_over": self.passed_over,
            "origin": self.division.origin,
            "classes": list(names),
            "counts": counts,
            "figures": self.figures,
            "repeats": self.repeats,
            "notes": self.notes,
            "skipped": [each.as_dict() for each in self.skipped],
            "findings": [each.as_dict() for each in self.findings],
        }


def in_order(findings: list[Finding]) -> list[Finding]:
    """Errors first, then by kind as in KINDS, then by path and by reason, line 9 before line 10; each once."""
    at = {kind: i for i, kind in enumerate(KINDS)}

    def place(each: Finding) -> tuple[bool, int, str, str]:
        return each.severity == "warning", at[each.kind], each.path, _DIGITS.sub(_padded, each.reason)

    return sorted(set(findings), key=place)


def _padded(digits: re.Match[str]) -> str:
    return digits[0].zfill(12)
