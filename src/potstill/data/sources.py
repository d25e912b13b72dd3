"""Folders and manifests: from their listing to three checked splits."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from potstill.data.check import check_files
from potstill.data.doctor.division import Division, divide, small_classes
from potstill.data.doctor.findings import KINDS, Finding, hints, said
from potstill.data.doctor.folder import passed_over_text, walk_folder, walk_images
from potstill.data.doctor.listing import Listing
from potstill.data.doctor.looks import kind_of
from potstill.data.doctor.manifest import read_manifest
from potstill.data.images import FileSet, ImageSet, Subset
from potstill.data.listing import Skipped, refuse
from potstill.data.settings import AugmentSettings, DataSettings
from potstill.data.splits import SPLITS, DataSplits, check_splits, fingerprint
from potstill.data.value_range import Range, range_of, ranged
from potstill.data.watcher import Watcher

AUGMENT = AugmentSettings(pad_crop=0.1, hflip=True)  # things look alike in a mirror more often than not


def list_source(settings: DataSettings) -> Listing:
    """What a folder or a manifest lists; see ``doctor.folder`` and ``doctor.manifest`` for their forms."""
    path = Path(settings.source).expanduser()
    read = walk_folder if path.is_dir() else read_manifest
    return read(path, follow_links=settings.follow_links)


def from_files(settings: DataSettings, progress: Watcher | None = None) -> DataSplits:
    """The images of a folder or a manifest, in three splits.  ``progress`` is told how far the check of the files is.

    Raises:
        DataError: a listing or files that cannot be trained on, with all that is wrong in it; with
            ``settings.skip_bad`` only where too little is left.
    """
    listing, skipped, contents = read_files(list_source(settings), settings, progress)
    if settings.skip_bad:
        listing, more = leave_out_classes(listing, settings)
        skipped += more
    division, findings = divide(listing, settings)
    refuse_findings(settings, [*listing.findings, *findings], listing.root)
    images = FileSet(listing.root, [entry.name for entry in listing.entries], division.labels)
    if not contents:
        contents = check_files(
            listing.root, images.names, settings.source, progress=progress, hints=hints([_UNREADABLE])
        )
    images.expect(contents)
    parts = parts_of(images, division)
    images.range = range_of(parts["train"].names, contents, settings.range)
    check_splits(division.class_names, parts, settings.source)
    return DataSplits(
        division.class_names, parts["train"], parts["val"], parts["test"], source=settings.source,
        origin=division.origin, augment=AUGMENT, range=images.range,
        fingerprint=fingerprint_of(parts, division.class_names, contents, settings.range),
        skipped=as_skipped(skipped), doubts=warnings_of(listing), notes=notes_of(listing),
    )  # fmt: skip


_UNREADABLE = Finding("unreadable", ".", "")


def read_files(
    listing: Listing, settings: DataSettings, progress: Watcher | None = None
) -> tuple[Listing, list[Finding], dict[str, str]]:
    """With ``settings.skip_bad``: the listing without what cannot be read, what was left out, and name -> content of
    the files that are left.  Else the listing as it is, and nothing read.
    """
    if not settings.skip_bad:
        return listing, [], {}
    listing, skipped = leave_out(listing, [])
    bad: dict[str, str] = {}
    names = [entry.name for entry in listing.entries]
    contents = check_files(listing.root, names, settings.source, progress=progress, bad=bad)
    listing, more = leave_out(listing, bad_files(listing.root, bad))
    return listing, skipped + more, contents


def bad_files(root: Path, bad: Mapping[str, str]) -> list[Finding]:
    """What ``check.check_files`` said of files that cannot be decoded, as findings."""

    def kind(name: str, reason: str) -> str:
        readable = os.path.isfile(root / name) and os.access(root / name, os.R_OK)
        return kind_of(reason, "damaged" if readable else "unreadable")

    return [Finding(kind(name, reason), name, reason) for name, reason in bad.items()]


def leave_out(listing: Listing, bad: Sequence[Finding]) -> tuple[Listing, list[Finding]]:
    """The listing without the files and folders that ``bad`` and its own findings are about, where these can be left
    out; and these findings.
    """
    skipped = [each for each in (*listing.findings, *bad) if KINDS[each.kind].skippable]
    names = {entry.name for entry in listing.entries}
    dropped = {each.path for each in skipped if each.kind not in ("listed-twice", "manifest-row")}
    contradictory = (each for each in skipped if each.kind == "listed-twice" and "under the labels" in each.reason)
    dropped |= {name for each in contradictory for name in each.others}
    folders = tuple(f"{each.path}/" for each in skipped if each.kind == "name" and each.path not in names)
    kept = [each for each in listing.entries if not (each.name in dropped or each.name.startswith(folders))]
    rest = [each for each in listing.findings if not KINDS[each.kind].skippable]
    # Classes that are missing in a split are named by ``leave_out_classes``.
    return replace(listing, entries=kept, findings=rest), [each for each in skipped if each.kind != "missing-class"]


def leave_out_classes(listing: Listing, settings: DataSettings) -> tuple[Listing, list[Finding]]:
    """The listing without the classes that are too small for the splits, and what is said of each of these."""
    small = small_classes(listing, settings)
    names = {each.path for each in small}
    return replace(listing, entries=[each for each in listing.entries if each.label not in names]), small


def list_images(root: Path, settings: DataSettings) -> tuple[list[str], list[Finding]]:
    """Paths of all images below a folder, at any depth and of no class, relative to it and sorted; and what was left
    out of them.

    Raises:
        DataError: none, or forbidden links or names; all of them in one message.
    """
    listing, skipped = walk_images(root, follow_links=settings.follow_links), list[Finding]()
    if settings.skip_bad and listing.entries:
        listing, skipped = leave_out(listing, [])
    refuse_findings(settings.model_copy(update={"source": str(root)}), listing.findings, root)
    return [entry.name for entry in listing.entries], skipped


def refuse_findings(settings: DataSettings, findings: list[Finding], root: Path) -> None:
    """One error for all findings that a run refuses.

    Raises:
        DataError: there are any.
    """
    refused = [each for each in findings if KINDS[each.kind].refused]
    refuse(settings.source, said(refused, root), hints=hints(refused, skip_bad=settings.skip_bad))


def as_skipped(findings: Sequence[Finding]) -> tuple[Skipped, ...]:
    """What ``skipped.csv`` lists, each once."""
    return tuple(dict.fromkeys(Skipped(each.path, each.kind, each.reason) for each in findings))


def warnings_of(listing: Listing) -> tuple[Finding, ...]:
    """What a listing shows of images that are not used."""
    return tuple(each for each in listing.findings if not KINDS[each.kind].refused)


def notes_of(listing: Listing) -> tuple[str, ...]:
    """Sentences on what a listing does not use, though nothing is wrong with it."""
    passed_over = [passed_over_text(listing.passed_over)] if listing.passed_over else []
    return (*listing.notes, *passed_over)


def parts_of(images: ImageSet, division: Division) -> dict[str, ImageSet]:
    """Split -> its images."""
    return {split: Subset(images, np.flatnonzero(division.splits == i)) for i, split in enumerate(SPLITS)}


def fingerprint_of(
    parts: Mapping[str, ImageSet],
    class_names: Sequence[str],
    contents: Mapping[str, str],
    wanted: Range | Literal["auto"],
) -> str:
    """``splits.fingerprint``, where ``contents`` are by name; the range counts."""
    words = {split: [contents[name] for name in part.names] for split, part in parts.items()}
    return ranged(fingerprint(parts, class_names, words), range_of(parts["train"].names, contents, wanted))
