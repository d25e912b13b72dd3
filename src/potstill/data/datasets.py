"""Load data by name, path or from Python as three checked splits, and a target domain beside them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from potstill.data.builtin import cifar100 as _cifar100
from potstill.data.builtin import fashion_mnist as _fashion
from potstill.data.builtin import solar as _solar
from potstill.data.builtin.digits import DigitsOptions, digits
from potstill.data.concurrency import ProgressReporter
from potstill.data.entries import has_image_suffix
from potstill.data.file_datasets import (
    DEFAULT_AUGMENT,
    add_unlabeled,
    check_shards,
    check_unlabeled,
    load_files,
    load_shards,
)
from potstill.data.image_sets import ImageSet, RelabeledSet, Subset, TorchSet, file_paths, set_value_range
from potstill.data.scan import check_images
from potstill.data.settings import DataSettings, read_options
from potstill.data.shard_reader import is_shards
from potstill.data.sources import MANIFEST_SUFFIXES
from potstill.data.splits import SPLITS, DataSplits, check_splits, fingerprint, stratified_split
from potstill.errors import DataError, PotstillError, UsageError, did_you_mean
from potstill.formatting import format_names

_MAX_NAMES = 20  # class names of a domain that a message lists


def target_settings(settings: DataSettings) -> DataSettings:
    """Return settings that load the target as the source, split by the same shares and seed.

    Raises:
        UsageError: there is no target.
    """
    if settings.target is None:
        raise UsageError("data.target is not given: name a folder of class folders, a manifest or a data set")
    own = {"source": settings.target, "options": settings.target_options, "unlabeled": None}
    return settings.model_copy(update={**own, "target": None, "target_options": {}, "target_labels": 0.0})


def add_target(data: DataSplits, target: DataSplits) -> DataSplits:
    """Return the source's splits with the target, whose classes get the source's ids by name.

    Args:
        data: of the source.
        target: of the target, checked by itself.

    Raises:
        DataError: classes that differ, or files that are in both.
    """
    _check_same_classes(data, target)
    _check_disjoint(data, target)
    ids = np.array([data.class_names.index(name) for name in target.class_names], dtype=np.int64)
    train, val, test = (_with_source_ids(target.split(split), ids) for split in SPLITS)
    ends = data.range if data.range is not None else target.range  # the student works in both domains
    if ends is not None:
        for images in (data.train, data.val, data.test, train, val, test):
            set_value_range(images, ends)
    target = replace(target, class_names=data.class_names, train=train, val=val, test=test, range=ends)
    return replace(
        data,
        range=ends,
        target=target,
        origin=f"{data.origin}; target {target.source}: {target.origin}",
        fingerprint=combine_fingerprints(data.fingerprint, target.fingerprint),
    )


def combine_fingerprints(*parts: str) -> str:
    """Return the SHA-256 of several fingerprints, in order."""
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _with_source_ids(images: ImageSet, ids: np.ndarray[tuple[int], np.dtype[np.int64]]) -> ImageSet:
    return images if (ids == np.arange(len(ids))).all() else RelabeledSet(images, ids[images.labels])


def _check_same_classes(data: DataSplits, target: DataSplits) -> None:
    ours, theirs = data.class_names, target.class_names
    if set(ours) == set(theirs):
        return
    lines = [f"source {data.source} and target {target.source} must have the same classes, by name:"]
    for where, one, other in (("source", ours, theirs), ("target", theirs, ours)):
        lacking = [f"{name!r}{did_you_mean(name, one)}" for name in other if name not in one]
        lines.append(
            f"  {where}, {len(one)}: {format_names(one, _MAX_NAMES)}"
            + (f"; no {', '.join(lacking[:5])}" if lacking else "")
        )
    raise DataError("\n".join([*lines, "Rename the class folders of one of them, or leave classes out of the other"]))


def _check_disjoint(data: DataSplits, target: DataSplits) -> None:
    """Refuse files that are in both domains: one could be in train of one and in test of the other."""
    ours, theirs = (
        {path.resolve() for images in _all_sets(each) for path in file_paths(images)} for each in (data, target)
    )
    if shared := sorted(ours & theirs):
        raise DataError(
            f"source {data.source} and target {target.source} share {len(shared):,} files, for example {shared[0]}.\n"
            "The domains must have no images in common: one could be in train of the one and in test of the other"
        )


def _all_sets(data: DataSplits) -> list[ImageSet]:
    return [data.split(split) for split in SPLITS] + ([] if data.unlabeled is None else [data.unlabeled])


DATASETS: dict[str, Callable[[DataSettings], DataSplits]] = {
    "digits": digits,
    "solar": _solar.solar,
    "fashion-mnist": _fashion.fashion_mnist,
    "cifar100": _cifar100.cifar100,
}

# Cheap checks before loading: unknown options, a missing package or folder.
_CHECKS: dict[str, Callable[[DataSettings], object]] = {
    "digits": lambda settings: read_options(settings, DigitsOptions),
    "solar": _solar.check,
    "fashion-mnist": _fashion.check,
    "cifar100": _cifar100.check,
}


def load_data(
    settings: DataSettings, data: DataSplits | None = None, *, progress: ProgressReporter | None = None
) -> DataSplits:
    """Load, split and check the data of a recipe; every file that is new or has changed is read once.

    Args:
        settings: source and split.
        data: splits from Python, which are only checked.
        progress: receives the progress of checking files.

    Raises:
        UsageError: an unknown name or option.
        DataError: images, classes or splits that cannot be trained on.
    """
    check_unlabeled(settings)
    for each in (data, None if data is None else data.target):
        if each is not None:
            check_splits(each.class_names, {split: each.split(split) for split in SPLITS}, each.source)
    found = data if data is not None else _load_labeled(settings, progress)
    target = _load_target(settings, data, progress)
    if target is None:
        return add_unlabeled(settings, found, progress)
    # Unlabeled images belong to the target domain.
    return add_target(found, add_unlabeled(settings, target, progress))


def _load_target(
    settings: DataSettings, data: DataSplits | None, progress: ProgressReporter | None
) -> DataSplits | None:
    given = None if data is None else data.target
    if settings.target is None:
        return given
    if given is not None:
        raise UsageError("the target comes from data.target or with the data from Python, not from both")
    return _load_labeled(target_settings(settings), progress)


def _load_labeled(settings: DataSettings, progress: ProgressReporter | None) -> DataSplits:
    check_source(settings)
    if settings.source in DATASETS:
        return _load_by_name(settings)
    if is_shards(settings.source):
        return load_shards(settings, DEFAULT_AUGMENT, progress)
    return load_files(settings, progress)


def _load_by_name(settings: DataSettings) -> DataSplits:
    """Load a data set by its name; a folder of the same name in the working directory is mentioned."""
    name = settings.source
    hint = f"{name} is a known data set; for the images of the folder {name}, give ./{name}"
    try:
        found = DATASETS[name](settings)
    except PotstillError as error:
        if Path(name).is_dir():
            raise type(error)(f"{error}\n{hint}") from error
        raise
    return replace(found, notes=(*found.notes, hint)) if Path(name).is_dir() else found


def check_source(settings: DataSettings) -> None:
    """Check that the source exists, without reading an image or importing torch.

    Raises:
        UsageError: an unknown name, a missing path, or unknown options.
    """
    name = settings.source
    if name in DATASETS:
        if name in _CHECKS:
            _CHECKS[name](settings)
        return
    if not name.strip():
        raise UsageError("no data is named: give a folder, a .csv or .jsonl manifest, or a name")  # "" would be here
    if is_shards(name):
        check_shards(settings)
        return
    path = Path(name).expanduser()
    if not path.is_dir() and not (path.is_file() and path.suffix.lower() in MANIFEST_SUFFIXES):
        if path.exists():
            image = "; for an image, give the folder that holds the class folders" if has_image_suffix(name) else ""
            raise UsageError(f"data {name!r}: a file of data is a manifest, {' or '.join(MANIFEST_SUFFIXES)}{image}")
        raise UsageError(
            f"no data set, folder or manifest {name!r}{did_you_mean(name, DATASETS)}\n"
            f"Known names: {', '.join(DATASETS)}; or give a folder of class folders, a .csv or .jsonl manifest, or "
            ".tar shards"
        )
    if settings.options:
        raise UsageError(f"data {name!r}: folders and manifests take no options, got {', '.join(settings.options)}")
    if settings.val + settings.test >= 1:
        raise UsageError(f"val {settings.val:g} and test {settings.test:g} leave no images for train")


def check_target(settings: DataSettings) -> None:
    """Check that the target exists, if there is one.

    Raises:
        UsageError: as ``check_source``.
    """
    if settings.target is not None:
        check_source(target_settings(settings))


def from_torch(
    train: Any,
    test: Any = None,
    val: Any = None,
    *,
    class_names: Sequence[str] | None = None,
    settings: DataSettings | None = None,
) -> DataSplits:
    """Return splits from torch or torchvision data sets of (image, label).

    Images are PIL images, uint8 arrays or tensors, or float tensors in [0, 1], without random transforms and without
    normalisation; see ``potstill.data.image_sets.TorchSet``.

    Args:
        train: training images; val and test are split off from them if they are None.
        test: test images.
        val: images that select the best epoch.
        class_names: class id -> name; None: ``train.classes``, or "0", "1" and so on.
        settings: shares and seed of the split.

    Raises:
        DataError: images, classes or splits that cannot be used; every image is read once.
    """
    settings = settings or DataSettings()
    given = {"train": train, "val": val, "test": test}
    sets: dict[str, ImageSet] = {s: TorchSet(each, prefix=s) for s, each in given.items() if each is not None}
    names = _class_names(train, class_names, sets)
    shares = {s: share for s, share in (("val", settings.val), ("test", settings.test)) if s not in sets}
    origin = "data sets from Python"
    if shares:
        pool = sets["train"]
        if len(pool.labels) and pool.labels.max() >= len(names):
            check_splits(names, {"train": pool}, "data from Python")
        made = stratified_split(pool.names, pool.labels, shares, settings.split_seed, names)
        sets |= {split: Subset(pool, index) for split, index in made.items()}
        origin += f"; {' and '.join(shares)} split from train here, stratified, split seed {settings.split_seed}"
    check_splits(names, sets, "data from Python")
    contents = {split: check_images(images, f"data from Python, {split}") for split, images in sets.items()}
    return DataSplits(
        names, sets["train"], sets["val"], sets["test"], source="python", origin=origin,
        fingerprint=fingerprint(sets, names, contents), augment=DEFAULT_AUGMENT,
    )  # fmt: skip


def _class_names(train: Any, given: Sequence[str] | None, sets: dict[str, ImageSet]) -> tuple[str, ...]:
    known = given if given is not None else getattr(train, "classes", None)
    if known is None:
        largest = max(int(np.max(images.labels, initial=-1)) for images in sets.values())
        known = [str(i) for i in range(largest + 1)]
    names = tuple(str(name) for name in known)
    if len(set(names)) < len(names):
        raise DataError(f"class names must differ, got {', '.join(names[:20])}")
    return names
