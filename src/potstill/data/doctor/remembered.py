"""What the doctor has read and found need not be read and found again when a run starts."""

from typing import Literal

from potstill.data.doctor.division import Division
from potstill.data.doctor.findings import KINDS, Finding
from potstill.data.doctor.kept import keep, shorten
from potstill.data.doctor.listing import Listing
from potstill.data.doctor.statistics import Table
from potstill.data.images import FileSet
from potstill.data.known_files import KnownFiles
from potstill.data.sources import fingerprint_of, parts_of
from potstill.data.value_range import Range


def remember_files(listing: Listing, table: Table) -> None:
    """Keep state and hash of the files that could be decoded, as the run's own check keeps them.

    Args:
        listing: of a folder or manifest.
        table: of as many looks as it has entries.
    """
    states = map(tuple, table.rows["state"][table.good].tolist())
    contents = _contents(listing, table)
    read = {
        name: (state if state[0] >= 0 else None, content)
        for (name, content), state in zip(contents.items(), states, strict=True)
    }
    KnownFiles.below(listing.root, decoded=True).keep(listing.root, read)


def remember_findings(
    listing: Listing, division: Division, table: Table, findings: list[Finding], wanted: Range | Literal["auto"]
) -> None:
    """Keep what was found in data that a run would take, by the fingerprint that the run will give it.

    Args:
        listing: what was examined.
        division: of its entries.
        table: of as many looks.
        findings: errors first.
        wanted: the setting ``data.range``.
    """
    if any(KINDS[each.kind].refused for each in findings):
        return
    fingerprint = listing.fingerprint
    if not fingerprint:
        images = FileSet(listing.root, [entry.name for entry in listing.entries], division.labels)
        parts = parts_of(images, division)
        fingerprint = fingerprint_of(parts, division.class_names, _contents(listing, table), wanted)
    keep(fingerprint, shorten(findings))


def _contents(listing: Listing, table: Table) -> dict[str, str]:
    """Of the files that could be decoded: name -> size, SHA-256 and span, as ``check.check_files`` has them."""
    rows = table.rows
    found = {}
    for i in table.good.tolist():
        word, span = f"{rows['bytes'][i]} {rows['content'][i].tobytes().hex()}", table.span(i)
        found[listing.entries[i].name] = word if span is None else f"{word} {span}"
    return found
