"""A client's own folder: ``DIR/<class>/*``, with some of the server's classes, all of it for training."""

import logging
from pathlib import Path

from potstill.data.check import check_files
from potstill.data.doctor.folder import walk_folder
from potstill.data.images import FileSet
from potstill.data.settings import DataSettings
from potstill.data.sources import read_files, refuse_findings
from potstill.errors import DataError, nearest
from potstill.federated.partition import FEWEST

_LOG = logging.getLogger("potstill")


def own_images(
    root: Path, class_names: tuple[str, ...], *, follow_links: bool = False, skip_bad: bool = False
) -> FileSet:
    """A client's training images; of a folder with train, val and test those of train.

    Args:
        root: of class folders; classes may be missing.
        class_names: the server's, class id -> name.
        follow_links: read links to files and folders elsewhere too.
        skip_bad: leave out files that cannot be read.

    Raises:
        DataError: no folder, fewer than two images, unreadable ones, or classes that the server does not know.
    """
    if not root.is_dir():
        raise DataError(f"a client's images: no folder {root}; name one with a folder for each class")
    settings = DataSettings(source=str(root), follow_links=follow_links, skip_bad=skip_bad)
    listing, skipped, contents = read_files(walk_folder(root, follow_links=follow_links), settings)
    if skipped:
        _LOG.warning("%s: %d files are left out, such as %s", root, len(skipped), skipped[0].path)
    entries = [entry for entry in listing.entries if entry.split in (None, "train")]
    if len(entries) < FEWEST:
        raise DataError(
            f"{root}: this client has {len(entries)} training images, and needs at least {FEWEST}: put them into "
            f"folders named after their classes ({_list(class_names)}), or leave the client out"
        )
    refuse_findings(settings, listing.findings, root)
    known = {name: label for label, name in enumerate(class_names)}
    strange = sorted({entry.label for entry in entries} - set(known))
    if strange:
        near = "".join(nearest(name, known) for name in strange[:1])
        raise DataError(
            f"{root}: the server does not know the class{'es' if len(strange) > 1 else ''} {_list(strange)}{near}\n"
            f"It knows {_list(class_names)}: rename the folder, or move it away"
        )
    images = FileSet(root, [entry.name for entry in entries], [known[entry.label] for entry in entries])
    images.expect(contents or check_files(root, images.names, str(root)))
    return images


def _list(names: tuple[str, ...] | list[str], most: int = 12) -> str:
    shown = ", ".join(map(repr, names[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
