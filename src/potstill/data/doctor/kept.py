"""What was found in data, kept in the cache by the data's fingerprint: other content, labels or splits, another one."""

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from potstill.artifacts import digest, read_bytes, write_bytes
from potstill.cache import cache_folder
from potstill.data.decode import decoder
from potstill.data.doctor.findings import KINDS, Finding
from potstill.errors import ArtifactError, StorageError

FORMAT = 1


@dataclass(frozen=True)
class Short:
    """All findings of a kind."""

    kind: str  # of KINDS
    count: int
    example: str  # the first of them


def shorten(findings: Sequence[Finding]) -> tuple[Short, ...]:
    """By kind, in the order of KINDS.

    Example:
        >>> shorten([Finding("tiny", "a.png", "2 x 2 pixels"), Finding("tiny", "b.png", "3 x 3 pixels")])
        (Short(kind='tiny', count=2, example='a.png: 2 x 2 pixels'),)
    """
    first: dict[str, Finding] = {}
    for each in findings:
        first.setdefault(each.kind, each)
    counts = Counter(each.kind for each in findings)
    return tuple(Short(kind, counts[kind], _sentence(first[kind])) for kind in KINDS if kind in first)


def keep(fingerprint: str, found: Sequence[Short]) -> None:
    """Keep what was found; where nothing can be written, nothing is kept.

    Args:
        fingerprint: of the data.
        found: in it.
    """
    content = json.dumps([[each.kind, each.count, each.example] for each in found]).encode()
    with contextlib.suppress(StorageError):
        write_bytes(_path(fingerprint), digest(content).encode(), content)


def kept(fingerprint: str) -> tuple[Short, ...] | None:
    """What was found before; None where that is not known, damaged, or of another version."""
    try:
        stored = read_bytes(_path(fingerprint))
    except ArtifactError:
        return None
    checksum, content = stored[:64], stored[64:]
    if digest(content).encode() != checksum:
        return None
    try:
        return tuple(Short(kind, count, example) for kind, count, example in json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return None


def _sentence(each: Finding) -> str:
    return each.reason if each.path == "." else f"{each.path}: {each.reason}"


def _path(fingerprint: str) -> Path:
    subject = json.dumps([FORMAT, fingerprint, decoder(), list(KINDS)])
    return cache_folder("checks", f"{digest(subject.encode())[:32]}.json")
