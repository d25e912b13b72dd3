"""Load folders, manifests and tar shards as three checked splits, and unlabeled images beside them."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

import numpy as np

from potstill.data.concurrency import ProgressReporter, interprocess_lock
from potstill.data.entries import (
    FINDING_KINDS,
    SPLIT_WORDS,
    Finding,
    Listing,
    SkippedFile,
    format_refused,
    name_problem,
    raise_problems,
    suggest_fixes,
)
from potstill.data.image_io import ValueRange, fingerprint_with_range, resolve_range
from potstill.data.image_sets import (
    FileSet,
    ImageSet,
    ShardSet,
    Subset,
    UnlabeledFileSet,
    file_digests,
    file_paths,
    sample_name,
)
from potstill.data.parquet_tables import read_tables
from potstill.data.scan import check_files, finding_kind
from potstill.data.settings import AugmentSettings, DataSettings, Options, read_options
from potstill.data.shard_reader import COMPRESSED_SUFFIX, Shard, ShardSample, expand_shards, read_shard
from potstill.data.sources import ignored_files_note, is_table, read_manifest, regroup, walk_folder, walk_images
from potstill.data.splits import (
    NO_CLASSES,
    SPLITS,
    DataSplits,
    SplitAssignment,
    assign_splits,
    check_splits,
    find_small_classes,
    fingerprint,
    keep_copies_together,
    stratified_split,
)
from potstill.errors import DataError, UsageError, did_you_mean
from potstill.formatting import format_names
from potstill.hub import HUB_DATA
from potstill.io import cache_folder, nearest_name, sha256_hex

if TYPE_CHECKING:
    from potstill.data.decoded_cache import StagedSquares


def check_output_outside(settings: DataSettings, output: Path) -> None:
    """Check that no file of an output folder would be taken for an image of the data."""
    for source in (settings.source, settings.target, settings.unlabeled, settings.labeled_test):
        root = Path(source or "").expanduser()
        if not source or not root.is_dir() or is_table(source):
            continue
        inside = os.path.relpath(output.resolve(), root.resolve()).split(os.sep)
        if inside[0] in (os.curdir, os.pardir) or os.path.isabs(inside[0]):  # the data itself, which is no run folder
            continue
        has_splits = source != settings.unlabeled and settings.labeled and _has_train_folder(root)
        if has_splits and inside[0].lower() not in SPLIT_WORDS:
            continue  # beside the folders of splits, where nothing is read
        raise UsageError(
            f"{output} lies in the data folder {source}: its files would be taken for images or for a class; give "
            "another --output-dir, outside of the data"
        )


def _has_train_folder(root: Path) -> bool:
    return any(SPLIT_WORDS.get(each.name.lower()) == "train" and each.is_dir() for each in root.iterdir())


def check_unlabeled(settings: DataSettings) -> None:
    """Check that the folder of unlabeled images exists, without reading an image."""
    if settings.unlabeled is not None and not (path := Path(settings.unlabeled).expanduser()).is_dir():
        near = "" if path.exists() else nearest_name(path)
        raise UsageError(f"data.unlabeled: no folder {settings.unlabeled!r}{near}\nName one with images, at any depth")


def add_unlabeled(
    settings: DataSettings,
    data: DataSplits,
    progress: ProgressReporter | None = None,
    staged: "StagedSquares | None" = None,
) -> DataSplits:
    """Return the data with the images of ``settings.unlabeled``, if any, but copies of those of val and test."""
    if settings.unlabeled is None:
        return data
    if data.unlabeled is not None:
        raise UsageError("unlabeled images come from data.unlabeled or with the data from Python, not from both")
    check_unlabeled(settings)
    root = Path(settings.unlabeled).expanduser()
    names, skipped = list_images(root, settings)
    bad: dict[str, str] | None = {} if settings.skip_bad else None
    _check_unseen(UnlabeledFileSet(root, names), data)
    if staged is not None:
        staged.expect(names, ["train"] * len(names))
    hints = suggest_fixes([_UNREADABLE])
    contents = check_files(root, names, str(root), progress=progress, bad=bad, hints=hints, staged=staged)
    if bad:
        names = [name for name in names if name not in bad]
        skipped += unreadable_findings(root, bad)
    copies = _copies_of_held_out(contents, names, data.val, data.test)
    names = [name for name in names if name not in copies]
    if not names:
        reasons = [f"{len(skipped):,} files cannot be read"] if skipped else []
        reasons += [f"{len(copies):,} have the content of images of val or test"] if copies else []
        raise DataError(f"{root}: no unlabeled image is left: {' and '.join(reasons)}; name another folder")
    found = UnlabeledFileSet(root, names)
    found.expect(contents, staged)
    found.range = data.range
    left_out = _describe_copies(copies)
    return replace(
        data,
        unlabeled=found,
        notes=(*data.notes, *([f"{len(found):,} unlabeled images are used{left_out}"] if copies else [])),
        origin=f"{data.origin}; {len(found):,} unlabeled from {settings.unlabeled}{left_out}",
        fingerprint=_fingerprint_with_unlabeled(data.fingerprint, {name: contents[name] for name in names}),
        skipped=(*data.skipped, *to_skipped([replace(each, path=str(root / each.path)) for each in skipped])),
    )


def _check_unseen(found: UnlabeledFileSet, data: DataSplits) -> None:
    """Refuse images of val and test: the student would be trained on teacher outputs for its own test images."""
    unlabeled = {path.resolve() for path in file_paths(found)}
    for split in ("val", "test"):
        if seen := sorted(unlabeled.intersection(path.resolve() for path in file_paths(data.split(split)))):
            raise DataError(
                f"{found.root}: {len(seen)} of the unlabeled images are images of {split}, for example {seen[0]}.\n"
                "Metrics on images used for training are meaningless; name a folder without them"
            )


def _copies_of_held_out(contents: Mapping[str, str], names: Sequence[str], *sets: ImageSet) -> dict[str, str]:
    """Return the unlabeled images with the content of an image of val or test, and that image: they would leak."""
    held_out: dict[str, str] = {}
    for images in sets:
        if (digests := file_digests(images)) is not None:
            held_out |= dict(zip((each.tobytes().hex() for each in digests), images.names, strict=True))
    own = {name: contents[name].split()[1] for name in names}
    return {name: held_out[digest] for name, digest in own.items() if digest in held_out}


def _describe_copies(copies: Mapping[str, str]) -> str:
    if not copies:
        return ""
    name, original = next(iter(copies.items()))
    return f" without {len(copies):,} copies of images of val or test, for example {name}, a copy of {original}"


def _fingerprint_with_unlabeled(labeled: str, contents: dict[str, str]) -> str:
    lines = [labeled, *sorted(f"{name}\0{content}" for name, content in contents.items())]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def load_without_labels(
    settings: DataSettings, progress: ProgressReporter | None = None, staged: "StagedSquares | None" = None
) -> DataSplits:
    """Return the images of a folder, at any depth, in three splits without labels; ``val`` and ``test`` are shares of
    all.

    With ``settings.labeled_test``, test has these images and their labels, and copies of them are left out of the
    others. The classes are ``settings.classes``, or ``NO_CLASSES``.
    """
    root, class_names = Path(settings.source).expanduser(), tuple(settings.classes or NO_CLASSES)
    names, skipped = list_images(root, settings)
    bad: dict[str, str] | None = {} if settings.skip_bad else None
    if staged is not None:
        staged.expect(names, None)
    hints = suggest_fixes([_UNREADABLE])
    contents = check_files(root, names, settings.source, progress=progress, bad=bad, hints=hints, staged=staged)
    if bad:
        names, skipped = [name for name in names if name not in bad], skipped + unreadable_findings(root, bad)
    tests, test_contents, origin = _labeled_test(settings, class_names, progress)
    copies = {} if tests is None else _copies_of_held_out(contents, names, tests)
    names = [name for name in names if name not in copies]
    shares = {"val": settings.val} if tests is not None else {"val": settings.val, "test": settings.test}
    if len(names) <= len(shares):
        raise DataError(
            f"{settings.source}: {len(names)} images are too few for a split into train, {', '.join(shares)}"
            f"{_describe_copies(copies)}; give a folder with more"
        )
    images = UnlabeledFileSet(root, names)
    images.expect(contents, staged)
    labels, groups = np.zeros(len(names), np.int64), [contents[name].split()[1] for name in names]
    found = stratified_split(names, labels, shares, settings.split_seed, ["the images"], groups)
    parts: dict[str, ImageSet] = {split: Subset(images, index) for split, index in found.items()}
    known = {split: [contents[name] for name in part.names] for split, part in parts.items()}
    if tests is not None:
        parts["test"], known["test"] = tests, [test_contents[name] for name in tests.names]
    ends = resolve_range(parts["train"].names, {name: contents[name] for name in names}, settings.range)
    images.range = ends
    if isinstance(tests, FileSet):
        tests.range = ends
    percent = "/".join(f"{100 * share:g}" for share in (1 - sum(shares.values()), *shares.values()))
    return DataSplits(
        class_names, parts["train"], parts["val"], parts["test"], source=settings.source,
        origin=f"no labels; split here {percent}, split seed {settings.split_seed}{_describe_copies(copies)}{origin}",
        fingerprint=fingerprint_with_range(fingerprint(parts, class_names, known), ends), augment=DEFAULT_AUGMENT,
        teacher_labels=SPLITS if tests is None else ("train", "val"), range=ends,
        skipped=to_skipped([replace(each, path=str(root / each.path)) for each in skipped]),
    )  # fmt: skip


def check_without_labels(settings: DataSettings) -> None:
    """Check that the folders exist, without reading an image."""
    if not Path(settings.source).expanduser().is_dir():
        raise UsageError(
            f"data {settings.source!r}: images without labels (--no-labels) are files in a folder, at any depth, and "
            "there is no such folder"
        )
    test = settings.labeled_test
    if test is not None and not test.startswith(HUB_DATA) and not Path(test).expanduser().exists():
        raise UsageError(f"data.labeled_test: no folder, manifest or table {test!r}; name one with class folders")


def _labeled_test(
    settings: DataSettings, class_names: tuple[str, ...], progress: ProgressReporter | None
) -> tuple[FileSet | None, dict[str, str], str]:
    """Return the labeled test images, name -> content of each, and a sentence on them."""
    if settings.labeled_test is None:
        return None, {}, ""
    own = settings.model_copy(update={"source": settings.labeled_test})
    listing, _, contents = read_files(list_source(own), own, progress)
    raise_refused(own, listing.findings, listing.root)
    entries = listing.entries
    if any(entry.split for entry in entries):
        entries = [entry for entry in entries if entry.split == "test"]
    if not entries:
        raise DataError(f"{settings.labeled_test}: no test images; give a folder with one folder of images per class")
    if unknown := sorted({entry.label for entry in entries} - set(class_names)):
        raise DataError(
            f"{settings.labeled_test}: the teacher has no class {unknown[0]!r}{did_you_mean(unknown[0], class_names)}"
            f"\nIts {len(class_names)} classes: {format_names(class_names, 20)}; rename the folders, or remove others"
        )
    ids = {name: at for at, name in enumerate(class_names)}
    images = FileSet(listing.root, [entry.name for entry in entries], [ids[entry.label] for entry in entries])
    if not contents:
        contents = check_files(listing.root, images.names, settings.labeled_test, progress=progress)
    images.expect(contents)
    known = {name: contents[name] for name in images.names}
    return images, known, f"; {len(images):,} labeled test images from {settings.labeled_test}"


DEFAULT_AUGMENT = AugmentSettings(pad_crop=0.1, hflip=True)  # most objects may be mirrored
_FEW_FILES = 1_000  # so many are decoded in seconds


def list_source(settings: DataSettings, progress: ProgressReporter | None = None) -> Listing:
    """Return the listing of a folder or a manifest (see ``data.sources``), or of Parquet files."""
    if is_table(settings.source):
        return regroup(read_tables(settings, progress), settings)
    path = Path(settings.source).expanduser()
    read = walk_folder if path.is_dir() else read_manifest
    return regroup(read(path, follow_links=settings.follow_links), settings)


def load_files(
    settings: DataSettings, progress: ProgressReporter | None = None, staged: "StagedSquares | None" = None
) -> DataSplits:
    """Return the images of a folder or a manifest in three splits; one error names all problems."""
    listing, skipped, contents = read_files(list_source(settings, progress), settings, progress, staged)
    if settings.skip_bad:
        listing, more = drop_small_classes(listing, settings)
        skipped += more
    division, findings = assign_splits(listing, settings)
    findings = [*listing.findings, *findings]
    refused = [each for each in findings if FINDING_KINDS[each.kind].refused]
    skippable = all(FINDING_KINDS[each.kind].skippable for each in refused)
    if refused and skippable and not contents and len(listing.entries) <= _FEW_FILES:
        bad: dict[str, str] = {}  # so that one message names them, too; many files would take minutes
        check_files(
            listing.root, [entry.name for entry in listing.entries], settings.source, progress=progress, bad=bad
        )
        findings += unreadable_findings(listing.root, bad)
    raise_refused(settings, findings, listing.shown_root, skipped)
    images = FileSet(listing.root, [entry.name for entry in listing.entries], division.labels)
    if not contents:
        _expect_squares(staged, images.names, division)
        contents = check_files(
            listing.root,
            images.names,
            settings.source,
            progress=progress,
            hints=suggest_fixes([_UNREADABLE]),
            place=listing.place,
            staged=staged,
        )
    images.expect(contents, staged)
    division = keep_copies_together(division, listing, contents)
    parts = split_sets(images, division)
    images.range = resolve_range(parts["train"].names, contents, settings.range)
    check_splits(division.class_names, parts, settings.source)
    return DataSplits(
        division.class_names, parts["train"], parts["val"], parts["test"], source=settings.source,
        origin=division.origin, augment=DEFAULT_AUGMENT, range=images.range,
        fingerprint=fingerprint_by_name(parts, division.class_names, contents, settings.range),
        skipped=to_skipped(skipped), notes=listing_notes(listing),
        doubts=tuple(each for each in listing.findings if not FINDING_KINDS[each.kind].refused),
    )  # fmt: skip


_UNREADABLE = Finding("unreadable", ".", "")


def _expect_squares(staged: "StagedSquares | None", names: Sequence[str], division: SplitAssignment) -> None:
    if staged is not None:
        staged.expect(names, [SPLITS[i] if i >= 0 else "" for i in division.splits.tolist()])


def read_files(
    listing: Listing,
    settings: DataSettings,
    progress: ProgressReporter | None = None,
    staged: "StagedSquares | None" = None,
) -> tuple[Listing, list[Finding], dict[str, str]]:
    """Return the listing without unreadable files, findings on these, and name -> content of the others; without
    ``settings.skip_bad`` no file is read.
    """
    if not settings.skip_bad:
        return listing, [], {}
    listing, skipped = drop_bad_entries(listing, [])
    bad: dict[str, str] = {}
    names = [entry.name for entry in listing.entries]
    # Files that will be left out may change a few splits; the squares that are then missing are decoded later.
    _expect_squares(staged, names, assign_splits(listing, settings)[0])
    contents = check_files(listing.root, names, settings.source, progress=progress, bad=bad, staged=staged)
    listing, more = drop_bad_entries(listing, unreadable_findings(listing.root, bad))
    return listing, skipped + more, contents


def unreadable_findings(root: Path, bad: Mapping[str, str]) -> list[Finding]:
    """Return the problems of undecodable files, as reported by ``scan.check_files``, as findings."""

    def kind(name: str, reason: str) -> str:
        readable = os.path.isfile(root / name) and os.access(root / name, os.R_OK)
        return finding_kind(reason, "damaged" if readable else "unreadable")

    return [Finding(kind(name, reason), name, reason) for name, reason in bad.items()]


def drop_bad_entries(listing: Listing, bad: Sequence[Finding]) -> tuple[Listing, list[Finding]]:
    """Return the listing without the files and folders of skippable findings (``bad`` and its own), and these."""
    skipped = [each for each in (*listing.findings, *bad) if FINDING_KINDS[each.kind].skippable]
    names = {entry.name for entry in listing.entries}
    dropped = {each.path for each in skipped if each.kind not in ("listed-twice", "manifest-row", "table-row")}
    contradictory = (each for each in skipped if each.kind == "listed-twice" and "under the labels" in each.reason)
    dropped |= {name for each in contradictory for name in each.others}
    folders = tuple(f"{each.path}/" for each in skipped if each.kind == "name" and each.path not in names)
    kept = [each for each in listing.entries if not (each.name in dropped or each.name.startswith(folders))]
    rest = [each for each in listing.findings if not FINDING_KINDS[each.kind].skippable]
    counts = Counter(each.label for each in listing.entries if each.label)
    empty = [
        Finding("empty-class", name, f"none of the {counts[name]:,} files of class {name!r} can be used")
        for name in sorted(counts.keys() - {each.label for each in kept})
    ]
    # Classes that are missing in a split are reported by ``drop_small_classes``.
    skipped = [each for each in skipped if each.kind != "missing-class"]
    return replace(listing, entries=kept, findings=rest), skipped + empty


def drop_small_classes(listing: Listing, settings: DataSettings) -> tuple[Listing, list[Finding]]:
    """Return the listing without classes that are too small for the splits, and a finding for each of these."""
    small = find_small_classes(listing, settings)
    names = {each.path for each in small}
    return replace(listing, entries=[each for each in listing.entries if each.label not in names]), small


def list_images(root: Path, settings: DataSettings) -> tuple[list[str], list[Finding]]:
    """Return the sorted relative paths of all images below a folder, at any depth; and findings on files left out."""
    listing, skipped = walk_images(root, follow_links=settings.follow_links), list[Finding]()
    if settings.skip_bad and listing.entries:
        listing, skipped = drop_bad_entries(listing, [])
    raise_refused(settings.model_copy(update={"source": str(root)}), listing.findings, root)
    return [entry.name for entry in listing.entries], skipped


def raise_refused(settings: DataSettings, findings: list[Finding], root: Path, skipped: Sequence[Finding] = ()) -> None:
    """Raise one error for all findings that a run refuses, if there are any."""
    refused = [each for each in findings if FINDING_KINDS[each.kind].refused]
    hints = list(suggest_fixes(refused, skip_bad=settings.skip_bad))
    if skipped:
        first = skipped[0]
        hints.append(f"--skip-bad left out {len(skipped):,} files and classes, such as {first.path}: {first.reason}")
    raise_problems(settings.source, format_refused(refused, root), hints=hints)


def to_skipped(findings: Sequence[Finding]) -> tuple[SkippedFile, ...]:
    """Return the rows of ``skipped.csv``, without repetitions."""
    return tuple(dict.fromkeys(SkippedFile(each.path, each.kind, each.reason) for each in findings))


def listing_notes(listing: Listing) -> tuple[str, ...]:
    """Return remarks on unused files that are no findings."""
    passed_over = [ignored_files_note(listing.passed_over)] if listing.passed_over else []
    return (*listing.notes, *passed_over)


def split_sets(images: ImageSet, division: SplitAssignment) -> dict[str, ImageSet]:
    """Return split -> images."""
    return {split: Subset(images, np.flatnonzero(division.splits == i)) for i, split in enumerate(SPLITS)}


def fingerprint_by_name(
    parts: Mapping[str, ImageSet],
    class_names: Sequence[str],
    contents: Mapping[str, str],
    wanted: ValueRange | Literal["auto"],
) -> str:
    """Return ``splits.fingerprint``, given contents by name, combined with the value range."""
    words = {split: [contents[name] for name in part.names] for split, part in parts.items()}
    return fingerprint_with_range(
        fingerprint(parts, class_names, words), resolve_range(parts["train"].names, contents, wanted)
    )


def split_from_train(parts: dict[str, ImageSet], class_names: Sequence[str], settings: DataSettings) -> str:
    """Split val and test, whichever is missing, from train, in place; return a clause on it, or ""."""
    shares = {s: share for s, share in (("val", settings.val), ("test", settings.test)) if s not in parts}
    if not shares:
        return ""
    pool = parts["train"]
    digests = file_digests(pool)
    groups = None if digests is None else [each.tobytes().hex() for each in digests]
    made = stratified_split(pool.names, pool.labels, shares, settings.split_seed, class_names, groups)
    parts |= {split: Subset(pool, index) for split, index in made.items()}
    return f"; {' and '.join(shares)} split from train here, stratified, split seed {settings.split_seed}"


class ShardOptions(Options):
    """Options of shards."""

    classes: str | list[str] | None = None  # class names by id, or a text file with one a line
    val: str | None = None  # further shards; None: split off from train
    test: str | None = None


def is_shards(source: str) -> bool:
    """Return whether a source names tar files, including compressed ones (which are refused later)."""
    return source.lower().endswith(".tar") or COMPRESSED_SUFFIX.search(source) is not None


def check_shards(settings: DataSettings) -> None:
    """Check names and options before a shard is opened."""
    options = read_options(settings, ShardOptions)
    if settings.skip_bad:
        raise UsageError(
            f"data {settings.source!r}: --skip-bad (data.skip_bad) takes folders and manifests; write the shards "
            "without the members that `potstill check` names"
        )
    for source in filter(None, (settings.source, options.val, options.test)):
        for url in expand_shards(source):
            if "://" not in url and not Path(url).expanduser().is_file():
                raise UsageError(f"data {source!r}: there is no shard {url}")
    if isinstance(options.classes, str) and not Path(options.classes).expanduser().is_file():
        raise UsageError(f"option classes: no file {options.classes!r}; give one class name a line, or a list of names")


def load_shards(
    settings: DataSettings, augment: AugmentSettings, progress: ProgressReporter | None = None
) -> DataSplits:
    """Read every shard once, and check every image."""
    names, sets, origin = read_shards(settings, progress)
    parts: dict[str, ImageSet] = dict(sets)
    origin += split_from_train(parts, names, settings)
    check_splits(names, parts, settings.source)
    words = {name: word for images in sets.values() for name, word in images.contents.items()}
    contents = {split: [words[name].split()[1] for name in images.names] for split, images in parts.items()}
    ends = resolve_range(parts["train"].names, words, settings.range)
    for images in sets.values():
        images.range = ends
    return DataSplits(
        names, parts["train"], parts["val"], parts["test"], source=settings.source, origin=origin,
        fingerprint=fingerprint_with_range(fingerprint(parts, names, contents), ends), augment=augment, range=ends,
    )  # fmt: skip


def read_shards(
    settings: DataSettings, progress: ProgressReporter | None = None
) -> tuple[tuple[str, ...], dict[str, ShardSet], str]:
    """Return class names, the images of each split that has shards, and a sentence on the shards."""
    options = read_options(settings, ShardOptions)
    sources = {"train": settings.source, "val": options.val, "test": options.test}
    shards = {split: _read_shards(source, progress) for split, source in sources.items() if source is not None}
    every = [shard for found in shards.values() for shard in found]
    raise_problems(settings.source, [problem for shard in every for problem in shard.problems])
    names, sets = _label_samples(settings.source, shards, _class_names(options))
    return names, sets, f"{len(every)} tar shard{'s' if len(every) != 1 else ''}{_ignored_members(every)}"


def _ignored_members(shards: Sequence[Shard]) -> str:
    text = ""
    for why in dict.fromkeys(why for shard in shards for why in shard.left):
        names = [name for shard in shards for name in shard.left.get(why, [])]
        examples = ", ".join(name if name.isprintable() else repr(name) for name in names[:3])
        text += f"; {len(names):,} {why} are not used ({examples}{', ...' if len(names) > 3 else ''})"
    return text


def _read_shards(source: str, progress: ProgressReporter | None) -> list[Shard]:
    urls, found = expand_shards(source), []
    lock = cache_folder("locks", f"{sha256_hex(source.encode('utf-8', 'surrogateescape'))[:16]}.lock")
    with interprocess_lock(lock, "reads these shards", progress):
        for at, url in enumerate(urls):
            found.append(read_shard(url))
            if progress is not None:
                progress.wait("reading shards", at + 1, len(urls))
    return found


def _label_samples(
    source: str, shards: dict[str, list[Shard]], given: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, ShardSet]]:
    """Return class names and a set for each split; the class is given by .cls or .json, or else by the directory."""
    places = {
        split: [(shard.url, each) for shard in found for each in shard.samples] for split, found in shards.items()
    }
    everything = [place for found in places.values() for place in found]
    if not everything:
        raise DataError(f"{source}: no image in any shard; a sample is KEY.jpg (or png, ...) with KEY.cls beside it")
    labeled = [each.label is not None for _, each in everything]
    if any(labeled) and not all(labeled):
        without = sample_name(*everything[labeled.index(False)])
        raise DataError(
            f"{source}: {labeled.count(False)} of {len(labeled)} images have no class, for example {without}"
        )
    if not any(labeled) and all(_directory(each) == "." for _, each in everything):
        raise DataError(
            f"{source}: no image has a class: give each a member KEY.cls, or KEY.json with the key label or class, "
            "that follows or precedes it, or put the images of each class into a folder"
        )
    texts = {split: [each.label or _directory(each) for _, each in found] for split, found in places.items()}
    used = {text for found in texts.values() for text in found}
    names = tuple(given) if given is not None else _names_of(used, source)
    ids = {name: at for at, name in enumerate(names)}
    if all(map(_is_id, used)) and not used <= set(names):
        ids = {str(at): at for at in range(len(names))}
    strange = sorted(used - set(ids))
    raise_problems(source, [f"class {text!r} is not one of the {len(names)} names" for text in strange])
    raise_problems(source, _name_problems(everything, names))
    return names, {split: ShardSet(found, [ids[text] for text in texts[split]]) for split, found in places.items()}


def _is_id(text: str) -> bool:
    """Return whether a class is given by its number; with zeros before it ("00012"), it is a name."""
    return text.isdecimal() and str(int(text)) == text


def _names_of(used: set[str], source: str) -> tuple[str, ...]:
    if not all(map(_is_id, used)):
        return tuple(sorted(used))
    most = max(map(int, used))
    if most >= 10 * len(used) + 1000:
        raise DataError(
            f"{source}: the largest class is {most}, of {len(used)} that are used: name them by options.classes"
        )
    return tuple(str(at) for at in range(most + 1))


def _class_names(options: ShardOptions) -> list[str] | None:
    if not isinstance(options.classes, str):
        return options.classes
    try:
        lines = Path(options.classes).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"option classes: {options.classes} cannot be read: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _name_problems(places: Sequence[tuple[str, ShardSample]], class_names: Sequence[str]) -> list[str]:
    problems = [f"class {name!r}: {why}" for name in class_names if (why := name_problem(name))]
    seen: set[str] = set()
    for url, sample in places:
        name = sample_name(url, sample)
        if why := name_problem(name):
            problems.append(f"{name!r}: {why}")
        elif name in seen:
            problems.append(f"{name}: there twice")
        seen.add(name)
    return problems


def _directory(sample: ShardSample) -> str:
    return PurePosixPath(sample.key).parent.name or "."
