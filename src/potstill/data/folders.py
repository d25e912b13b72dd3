"""Image folders as a run takes them; ``doctor.folder`` says what they look like, and walks through them."""

from pathlib import Path

from potstill.data.doctor.findings import said
from potstill.data.doctor.folder import walk_folder, walk_images
from potstill.data.listing import Entry, refuse


def list_folder(root: Path) -> list[Entry]:
    """All images of a folder, sorted by name.

    Raises:
        DataError: no class folders, a class without images, class folders that differ between splits, forbidden links
            or names; all of them in one message.
    """
    listing = walk_folder(root)
    refuse(str(root), said(listing.findings, root))
    return listing.entries


def list_images(root: Path) -> list[str]:
    """Paths of all images below a folder, at any depth and of no class, relative to it and sorted.

    Raises:
        DataError: none, or forbidden links or names; all of them in one message.
    """
    listing = walk_images(root)
    refuse(str(root), said(listing.findings, root))
    return [entry.name for entry in listing.entries]
