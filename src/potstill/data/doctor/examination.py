"""The examination: list, divide, look at every image, compare."""

from collections.abc import Iterator

from potstill.data.cores import in_turn
from potstill.data.datasets import DATASETS, check_source
from potstill.data.doctor.division import Division, divide
from potstill.data.doctor.duplicates import Pictures, Repeats, find_repeats
from potstill.data.doctor.findings import Finding
from potstill.data.doctor.listing import Listing
from potstill.data.doctor.looks import TINY, Look, Looker, files_looker, images_looker, other_format
from potstill.data.doctor.ranges import examine_ranges
from potstill.data.doctor.ready_splits import list_splits
from potstill.data.doctor.remembered import remember_files, remember_findings
from potstill.data.doctor.report import Report, in_order
from potstill.data.doctor.similar import similar_classes, similar_files
from potstill.data.doctor.statistics import Table
from potstill.data.settings import DataSettings
from potstill.data.shards.source import from_shards
from potstill.data.shards.urls import is_shards
from potstill.data.sources import AUGMENT, leave_out, leave_out_classes, list_source, notes_of
from potstill.data.square import unseen
from potstill.data.watcher import Watcher

_SHOWN = 5  # names in a note
_PIECE = 16  # images handed to a thread at once


def examine(settings: DataSettings, watcher: Watcher | None = None) -> Report:
    """Everything that is wrong with the data of a recipe; every image is read and decoded.

    Args:
        settings: where from, and how it would be split.
        watcher: is told how much is done.

    Raises:
        UsageError: there is no such data set, folder or manifest.
        DataError: a bundled data set is damaged.
    """
    listing = _list(settings)
    return examine_listing(listing, settings, watcher)


def examine_listing(listing: Listing, settings: DataSettings, watcher: Watcher | None = None) -> Report:
    """As ``examine``, of what was listed before."""
    names = [entry.name for entry in listing.entries]
    table = Table(len(names))
    looker = files_looker(listing.root, names) if listing.images is None else images_looker(listing.images)
    bad, odd = list[Finding](), list[Finding]()
    for i, look in enumerate(_looks(looker, len(names), watcher)):
        if isinstance(look, Finding):
            bad.append(look)
        else:
            table.put(i, look)
            odd += _oddities(names[i], look)
    skipped = list[Finding]()
    if settings.skip_bad and not listing.ready:
        listing, skipped = leave_out(listing, bad)
        listing, small = leave_out_classes(listing, settings)
        skipped, bad = skipped + small, []
        kept = {entry.name for entry in listing.entries}
        table.keep([i for i, name in enumerate(names) if name in kept])
        odd = [each for each in odd if each.path in kept]
        names = [entry.name for entry in listing.entries]
    division, findings = divide(listing, settings)
    findings = [*listing.findings, *findings, *similar_classes(division.class_names), *bad, *odd]
    ends, ranges = examine_ranges(names, division, table, settings.range)
    findings += ranges
    repeats = _compare(names, division, table)
    if listing.images is None:
        findings += similar_files(names)
    found = in_order([*findings, *repeats.findings])
    if not listing.ready:
        remember_files(listing, table)
    remember_findings(listing, division, table, found, settings.range)
    return Report(
        source=settings.source,
        images=len(names),
        passed_over=listing.passed_over.total(),
        notes=[*_notes(listing, division), *unseen(table.rows["width"], table.rows["height"], settings.resize_mode)],
        skipped=in_order(skipped),
        division=division,
        figures=table.figures() | {"range": None if ends is None else list(ends)},
        repeats={k: v for k, v in vars(repeats).items() if k != "findings"},
        findings=found,
    )


def _list(settings: DataSettings) -> Listing:
    check_source(settings)
    if settings.source in DATASETS:
        return list_splits(DATASETS[settings.source](settings))
    if is_shards(settings.source):
        return list_splits(from_shards(settings, AUGMENT))
    return list_source(settings)


def _notes(listing: Listing, division: Division) -> Iterator[str]:
    yield from notes_of(listing)
    names = division.class_names
    if blanks := [name for name in names if name != name.strip() or name.endswith(".")]:
        yield f"class names that end in blanks or dots, which Windows drops: {', '.join(map(repr, blanks[:_SHOWN]))}"
    if not listing.ready and len(names) > 1 and all(name.isdecimal() for name in names):
        by_number = sorted(names, key=int)
        if by_number != list(names):
            at = next(i for i, pair in enumerate(zip(names, by_number, strict=True)) if pair[0] != pair[1])
            yield (
                f"class names are sorted as text, so that output {at} is {names[at]!r} and not {by_number[at]!r}; "
                "weights of other programs may have the order of the numbers"
            )


def _looks(looker: Looker, count: int, watcher: Watcher | None) -> Iterator[Look | Finding]:
    pieces = [range(start, min(start + _PIECE, count)) for start in range(0, count, _PIECE)]
    done = 0
    for piece in in_turn(lambda piece: [looker(i) for i in piece], pieces):
        yield from piece
        done += len(piece)
        if watcher is not None:
            watcher.wait("checking images", done, count)


def _oddities(name: str, look: Look) -> Iterator[Finding]:
    if reason := other_format(name, look.format):
        yield Finding("other-format", name, reason)
    if look.blank and look.width * look.height > 1:
        yield Finding("blank", name, "all pixels have the same colour")
    if min(look.width, look.height) < TINY:
        yield Finding("tiny", name, f"{look.width} x {look.height} pixels")


def _compare(names: list[str], division: Division, table: Table) -> Repeats:
    good = table.good
    rows = table.rows[good]
    return find_repeats(
        Pictures(
            names=[names[i] for i in good],
            class_names=division.class_names,
            labels=division.labels[good],
            splits=division.splits[good],
            content=rows["content"],
            pixels=rows["pixels"],
        )
    )
