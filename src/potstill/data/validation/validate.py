"""Validate a data set: list, split, scan every image, compare; a quick form for ``potstill run``.

The quick form compares content hashes that exist anyway.  Findings are cached by the fingerprint of the data (other
content, labels or splits, another fingerprint), and file states in ``scan.FileIndex``, so that a run does not repeat
what ``potstill check`` did.
"""

import contextlib
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from potstill.data.concurrency import ProgressReporter, threaded_map
from potstill.data.datasets import check_source, is_dataset, load_known_dataset
from potstill.data.entries import FINDING_KINDS, Entry, Finding, Listing
from potstill.data.file_datasets import (
    DEFAULT_AUGMENT,
    drop_bad_entries,
    drop_small_classes,
    fingerprint_by_name,
    is_shards,
    list_source,
    listing_notes,
    load_shards,
    split_sets,
)
from potstill.data.image_io import ValueRange, decoder_version
from potstill.data.image_sets import ConcatenatedSet, FileSet, ImageSet, Subset, file_digests, is_array_based
from potstill.data.preprocessing import crop_notes
from potstill.data.scan import MIN_SIDE, FileIndex, ImageScan, Scanner, file_scanner, format_mismatch, image_set_scanner
from potstill.data.settings import DataSettings
from potstill.data.sources import walk_images
from potstill.data.splits import SPLITS, DataSplits, SplitAssignment, assign_splits, keep_copies_together
from potstill.data.validation import (
    Duplicates,
    HashedImages,
    ScanTable,
    ValidationReport,
    check_ranges,
    find_duplicates,
    narrow_band,
    similar_classes,
    similar_files,
    sort_findings,
)
from potstill.errors import ArtifactError, StorageError
from potstill.io import cache_folder, read_checksummed, sha256_hex, write_checksummed

FORMAT = 4
_WARNED = ("low-contrast", "similar-names")  # findings of severity "warning" that a run warns of


@dataclass(frozen=True)
class FindingSummary:
    """Number and example of the findings of a kind."""

    kind: str  # of FINDING_KINDS
    count: int
    example: str  # the first of them


def summarize_findings(findings: Sequence[Finding]) -> tuple[FindingSummary, ...]:
    """Summarise findings by kind, in the order of FINDING_KINDS."""
    first: dict[str, Finding] = {}
    for each in findings:
        first.setdefault(each.kind, each)
    counts = Counter(each.kind for each in findings)
    return tuple(FindingSummary(kind, counts[kind], _sentence(first[kind])) for kind in FINDING_KINDS if kind in first)


def save_summary(fingerprint: str, found: Sequence[FindingSummary]) -> None:
    """Cache the summary of findings; errors of writing are ignored."""
    content = json.dumps([[each.kind, each.count, each.example] for each in found]).encode()
    with contextlib.suppress(StorageError):
        write_checksummed(_summary_path(fingerprint), content)


def load_summary(fingerprint: str) -> tuple[FindingSummary, ...] | None:
    """Return the cached summary; None if it is missing, damaged, or of another version."""
    try:
        content = read_checksummed(_summary_path(fingerprint))
    except ArtifactError:
        return None
    return tuple(FindingSummary(kind, count, example) for kind, count, example in json.loads(content))


def _sentence(each: Finding) -> str:
    return each.reason if each.path == "." else f"{each.path}: {each.reason}"


def _summary_path(fingerprint: str) -> Path:
    subject = json.dumps([FORMAT, fingerprint, decoder_version(), list(FINDING_KINDS)])
    return cache_folder("checks", f"{sha256_hex(subject.encode())[:32]}.json")


UNUSED_KINDS = ("beside-classes", "hidden")  # kinds of images that a run does not use


def quick_findings(data: DataSplits) -> tuple[FindingSummary, ...]:
    """Return summaries of what ``potstill check`` found on this data, else of what is known from a few images."""
    found = load_summary(data.fingerprint)
    if found is None:
        names = similar_classes(data.class_names)
        found = summarize_findings([*find_repeated_files(data), *names, *find_low_contrast(data.train)])
        save_summary(data.fingerprint, found)
    # Unused images are not part of the fingerprint, and may have changed.
    return (*(each for each in found if each.kind not in UNUSED_KINDS), *summarize_findings(data.doubts))


def find_repeated_files(data: DataSplits) -> list[Finding]:
    """Return findings on images of equal content within and across splits and labels, of files and arrays alone."""
    sets = [data.split(split) for split in SPLITS]
    digests = [_digests(images) for images in sets]
    whole = [each for each in digests if each is not None]
    if len(whole) < len(digests) or len({each.shape[1] for each in whole}) > 1:
        return []
    content = np.concatenate(whole)
    pictures = HashedImages(
        names=[name for images in sets for name in images.names],
        class_names=("",) if data.teacher_labels else data.class_names,
        labels=np.concatenate([images.labels for images in sets])
        if not data.teacher_labels
        else np.zeros(len(content), np.int64),
        splits=np.repeat(np.arange(len(SPLITS), dtype=np.int8), [len(images) for images in sets]),
        content=content if not is_array_based(sets[0]) else np.zeros((len(content), 32), np.uint8),
        pixels=content,
    )
    return sort_findings(find_duplicates(pictures).findings)


def find_low_contrast(images: ImageSet) -> list[Finding]:
    """Return a finding if nearly all images of a sample, as networks see them, use a small part of 0 to 255."""
    sample = np.linspace(0, len(images) - 1, min(len(images), _SAMPLE)).astype(int).tolist()
    lows, highs, wide = list[int](), list[int](), 0
    for i in sample:
        pixels = images.pixels(i)
        lows.append(int(pixels.min()))
        highs.append(int(pixels.max()))
        wide += narrow_band(lows[-1:], highs[-1:], (0, 255)) is None
        if wide > 2 * (len(sample) // 20):  # one of them is not among the images that the band leaves out
            return []
    if (band := narrow_band(lows, highs, (0, 255))) is None:
        return []
    reason = f"the values of nearly all of {len(sample)} images lie between {band[0]:.0f} and {band[1]:.0f} of 0 to 255"
    return [Finding("low-contrast", ".", reason)]


def summary_messages(found: Sequence[FindingSummary], source: str) -> tuple[list[str], list[str]]:
    """Return messages: a warning for each kind of error and of ``_WARNED``, and a note for all other findings."""
    command = f"`potstill check {shlex.quote(source)}`"
    warnings = [
        f"{source}: {each.count:,} x {FINDING_KINDS[each.kind].what} ({FINDING_KINDS[each.kind].why}), such as "
        f"{each.example}; {command} shows all"
        for each in found
        if FINDING_KINDS[each.kind].severity == "error"
    ]
    warnings += [
        f"{source}: {FINDING_KINDS[each.kind].why}: {each.example}; details: {command}"
        for each in found
        if each.kind in _WARNED
    ]
    others = [
        f"{each.count:,} x {FINDING_KINDS[each.kind].what}"
        + (f" ({each.example})" if each.kind in UNUSED_KINDS else "")
        for each in found
        if FINDING_KINDS[each.kind].severity == "warning" and each.kind not in _WARNED
    ]
    return warnings, [f"{source}: {', '.join(others)}; {command} lists them"] if others else []


def _digests(images: ImageSet) -> NDArray[np.uint8] | None:
    if not is_array_based(images):
        return file_digests(images)
    scan = image_set_scanner(images)
    found = [each.pixels for each in map(scan, range(len(images))) if isinstance(each, ImageScan)]
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, 16)


def list_splits(data: DataSplits) -> Listing:
    """Return a listing of the three splits; of files if they are files of one folder."""
    sets = [data.split(split) for split in SPLITS]
    entries = [
        Entry(name, data.class_names[label], split)
        for split, images in zip(SPLITS, sets, strict=True)
        for name, label in zip(images.names, images.labels.tolist(), strict=True)
    ]
    root, *others = [_common_root(images) for images in sets]
    if root is None or any(other != root for other in others):
        return Listing(Path(), data.origin, True, data.fingerprint, entries, images=ConcatenatedSet(*sets))
    return Listing(root, data.origin, True, data.fingerprint, entries)


def _common_root(images: ImageSet) -> Path | None:
    """Return the folder of a set's files; None if it does not consist of files."""
    while isinstance(images, Subset):
        images = images.images
    return images.root if isinstance(images, FileSet) else None


def cache_file_states(listing: Listing, table: ScanTable) -> None:
    """Cache state and hash of the files that could be decoded, for the check of a run."""
    states = map(tuple, table.rows["state"][table.good].tolist())
    contents = _contents(listing, table)
    read = {
        name: (state if state[0] >= 0 else None, content)
        for (name, content), state in zip(contents.items(), states, strict=True)
    }
    FileIndex.load(listing.root, decoded=True).update(listing.root, read)


def cache_findings(
    listing: Listing,
    division: SplitAssignment,
    table: ScanTable,
    findings: list[Finding],
    range_setting: ValueRange | Literal["auto"],
) -> None:
    """Cache the findings on data that a run accepts, by the fingerprint that the run will compute."""
    if any(FINDING_KINDS[each.kind].refused for each in findings):
        return
    fingerprint = listing.fingerprint
    if not fingerprint:
        images = FileSet(listing.root, [entry.name for entry in listing.entries], division.labels)
        parts = split_sets(images, division)
        fingerprint = fingerprint_by_name(parts, division.class_names, _contents(listing, table), range_setting)
    save_summary(fingerprint, summarize_findings(findings))


def _contents(listing: Listing, table: ScanTable) -> dict[str, str]:
    rows = table.rows
    found = {}
    for i in table.good.tolist():
        word, span = f"{rows['bytes'][i]} {rows['content'][i].tobytes().hex()}", table.span(i)
        found[listing.entries[i].name] = word if span is None else f"{word} {span}"
    return found


_MAX_NAMES = 5  # names in a note
_PIECE = 16  # images handed to a thread at once
_SAMPLE = 39  # images whose contrast a run looks at, until three of them have enough


def validate_data(settings: DataSettings, progress: ProgressReporter | None = None) -> ValidationReport:
    """Return everything that is wrong with the data of a recipe; every image is read and decoded.

    Args:
        settings: source and split, as ``data`` in a recipe.
        progress: receives the progress.

    Raises:
        UsageError: there is no such data set, folder or manifest.
        DataError: a built-in data set is damaged.
    """
    listing = _list_data(settings)
    return validate_listing(listing, settings, progress)


def validate_listing(
    listing: Listing, settings: DataSettings, progress: ProgressReporter | None = None
) -> ValidationReport:
    """Validate the data of a listing, as ``validate_data``."""
    names = [entry.name for entry in listing.entries]
    table = ScanTable(len(names))
    scan_image = file_scanner(listing.root, names) if listing.images is None else image_set_scanner(listing.images)
    bad, odd = list[Finding](), list[Finding]()
    division, findings = assign_splits(listing, settings)
    # A folder too high or too low is reported at once; decoding all that lies below it may take hours.
    one_class = any(each.kind == "one-class" for each in findings)
    for i, scan in enumerate(() if one_class else _scan_images(scan_image, len(names), progress)):
        if isinstance(scan, Finding):
            bad.append(scan)
        else:
            table.add(i, scan)
            odd += _image_findings(names[i], scan)
    skipped = list[Finding]()
    if settings.skip_bad and not listing.ready:
        listing, skipped = drop_bad_entries(listing, bad)
        listing, small = drop_small_classes(listing, settings)
        skipped, bad = skipped + small, []
        kept = {entry.name for entry in listing.entries}
        table.keep([i for i, name in enumerate(names) if name in kept])
        odd = [each for each in odd if each.path in kept]
        names = [entry.name for entry in listing.entries]
        division, findings = assign_splits(listing, settings)
    if not listing.ready:
        division = keep_copies_together(division, listing, _contents(listing, table))
    findings = [*listing.findings, *findings, *similar_classes(division.class_names), *bad, *odd]
    ends, ranges = check_ranges(names, division, table, settings.range)
    findings += ranges
    repeats = _compare_images(names, division, table)
    if listing.images is None:
        findings += similar_files(names)
    found = sort_findings([*findings, *repeats.findings])
    if not listing.ready:
        cache_file_states(listing, table)
    cache_findings(listing, division, table, found, settings.range)
    return ValidationReport(
        source=settings.source,
        images=len(names),
        passed_over=listing.passed_over.total(),
        notes=[
            *(["no image was read: another folder may be meant"] if one_class and names else []),
            *_notes(listing, division),
            *_notes_on_other_data(settings),
            *crop_notes(table.rows["width"], table.rows["height"], settings.resize_mode),
        ],
        skipped=sort_findings(skipped),
        division=division,
        figures=table.figures() | {"range": None if ends is None else list(ends)},
        repeats={k: v for k, v in vars(repeats).items() if k != "findings"},
        findings=found,
    )


def _list_data(settings: DataSettings) -> Listing:
    check_source(settings)
    if not settings.labeled:
        return walk_images(Path(settings.source).expanduser(), follow_links=settings.follow_links)
    if is_dataset(settings.source):
        return list_splits(load_known_dataset(settings))
    if is_shards(settings.source):
        return list_splits(load_shards(settings, DEFAULT_AUGMENT))
    return list_source(settings)


def _notes(listing: Listing, division: SplitAssignment) -> Iterator[str]:
    yield from listing_notes(listing)
    names = division.class_names
    if blanks := [name for name in names if name != name.strip() or name.endswith(".")]:
        shown = ", ".join(map(repr, blanks[:_MAX_NAMES]))
        yield f"class names that end in blanks or dots, which Windows drops: {shown}"
    if not listing.ready and len(names) > 1 and all(name.isdecimal() for name in names):
        by_number = sorted(names, key=int)
        if by_number != list(names):
            at = next(i for i, pair in enumerate(zip(names, by_number, strict=True)) if pair[0] != pair[1])
            yield (
                f"class names are sorted as text, so that output {at} is {names[at]!r} and not {by_number[at]!r}; "
                "weights of other programs may have the order of the numbers"
            )


def _notes_on_other_data(settings: DataSettings) -> Iterator[str]:
    """Yield a note for each setting that names further images, with the command that checks these."""
    for key, unlabeled in (("unlabeled", True), ("target", False), ("labeled_test", False)):
        if (source := getattr(settings, key)) is not None:
            command = shlex.join(["potstill", "check", source, *(["--no-labels"] if unlabeled else [])])
            yield f"the images of data.{key} are not checked here; `{command}` checks them"


def _scan_images(scan_image: Scanner, count: int, progress: ProgressReporter | None) -> Iterator[ImageScan | Finding]:
    pieces = [range(start, min(start + _PIECE, count)) for start in range(0, count, _PIECE)]
    done = 0
    for piece in threaded_map(lambda piece: [scan_image(i) for i in piece], pieces):
        yield from piece
        done += len(piece)
        if progress is not None:
            progress.wait("checking images", done, count)


def _image_findings(name: str, scan: ImageScan) -> Iterator[Finding]:
    if reason := format_mismatch(name, scan.format):
        yield Finding("other-format", name, reason)
    if scan.blank and scan.width * scan.height > 1:
        yield Finding("blank", name, "all pixels have the same colour")
    if min(scan.width, scan.height) < MIN_SIDE:
        yield Finding("tiny", name, f"{scan.width} x {scan.height} pixels")


def _compare_images(names: list[str], division: SplitAssignment, table: ScanTable) -> Duplicates:
    good = table.good
    rows = table.rows[good]
    return find_duplicates(
        HashedImages(
            names=[names[i] for i in good],
            class_names=division.class_names,
            labels=division.labels[good],
            splits=division.splits[good],
            content=rows["content"],
            pixels=rows["pixels"],
        )
    )
