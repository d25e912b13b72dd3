"""Names that people, or other file systems, take for the same."""

import unicodedata
from collections.abc import Iterable

from potstill.data.doctor.findings import Finding


def similar_classes(class_names: Iterable[str]) -> list[Finding]:
    """Classes like "Cat", "cat" and "cat "."""
    return [
        Finding("similar-names", group[0], f"classes {', '.join(map(repr, group))}; rename or join them")
        for group in _groups(class_names)
    ]


def similar_files(names: Iterable[str]) -> list[Finding]:
    """Files like "a.JPG" and "a.jpg" in the same folder."""
    return [
        Finding("similar-names", group[0], "where case does not count, one overwrites the other", tuple(group[1:]))
        for group in _groups(names)
    ]


def _groups(names: Iterable[str]) -> list[list[str]]:
    first: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for name in names:
        folder, slash, own = name.rpartition("/")
        key = folder + slash + unicodedata.normalize("NFC", own.strip()).casefold()
        if key in first:
            found.setdefault(key, [first[key]]).append(name)
        else:
            first[key] = name
    return list(found.values())
