"""Manifests as a run takes them; ``doctor.manifest`` says what one looks like, and reads it."""

from pathlib import Path

from potstill.data.doctor.findings import said
from potstill.data.doctor.manifest import SUFFIXES, read_manifest
from potstill.data.listing import Entry, refuse

__all__ = ["SUFFIXES", "list_manifest"]


def list_manifest(path: Path) -> list[Entry]:
    """All images of a manifest, sorted by name.

    Raises:
        DataError: unreadable, unknown columns, rows without path or label, paths out of the manifest's folder or
            listed twice, unknown splits, a split in some rows only; all of them in one message.
    """
    listing = read_manifest(path)
    refuse(str(path), said(listing.findings, listing.root))
    return listing.entries
