"""Data by name, folder, manifest or from Python: always three checked splits."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from potstill.data.bundled import cifar100 as _cifar100
from potstill.data.bundled import fashion_mnist as _fashion
from potstill.data.bundled import solar as _solar
from potstill.data.bundled.digits import DigitsOptions, digits
from potstill.data.bundled.options import read_options
from potstill.data.check import check_images
from potstill.data.doctor.manifest import SUFFIXES
from potstill.data.images import ImageSet, Subset, TorchSet
from potstill.data.listing import looks_like_image
from potstill.data.settings import DataSettings
from potstill.data.shards.source import check_shards, from_shards
from potstill.data.shards.urls import is_shards
from potstill.data.sources import AUGMENT, from_files
from potstill.data.splits import SPLITS, DataSplits, check_splits, fingerprint, stratified
from potstill.data.target import target_settings, with_target
from potstill.data.unlabeled import check_unlabeled, with_unlabeled
from potstill.data.watcher import Watcher
from potstill.errors import DataError, UsageError, nearest

DATASETS: dict[str, Callable[[DataSettings], DataSplits]] = {
    "digits": digits,
    "solar": _solar.solar,
    "fashion-mnist": _fashion.fashion_mnist,
    "cifar100": _cifar100.cifar100,
}

# Only where a cheap look beforehand can spare the user a wait: unknown options, a missing package or folder.
_CHECKS: dict[str, Callable[[DataSettings], object]] = {
    "digits": lambda settings: read_options(settings, DigitsOptions),
    "solar": _solar.check,
    "fashion-mnist": _fashion.check,
    "cifar100": _cifar100.check,
}


def load_data(settings: DataSettings, data: DataSplits | None = None, *, progress: Watcher | None = None) -> DataSplits:
    """Find, split and check the data of a recipe; every file that is new or has changed is read once.

    Args:
        settings: where from, and how to split.
        data: splits from Python, which are only checked.
        progress: is told how far the check of the files is.

    Raises:
        UsageError: an unknown name or option.
        DataError: images, classes or splits that cannot be trained on.
    """
    check_unlabeled(settings)
    for each in (data, None if data is None else data.target):
        if each is not None:
            check_splits(each.class_names, {split: each.split(split) for split in SPLITS}, each.source)
    found = data if data is not None else _labeled(settings, progress)
    target = _target(settings, data, progress)
    if target is None:
        return with_unlabeled(settings, found, progress)
    # Images without labels are more of what the student is to work on.
    return with_target(found, with_unlabeled(settings, target, progress))


def _target(settings: DataSettings, data: DataSplits | None, progress: Watcher | None) -> DataSplits | None:
    given = None if data is None else data.target
    if settings.target is None:
        return given
    if given is not None:
        raise UsageError("the target comes from data.target or with the data from Python, not from both")
    return _labeled(target_settings(settings), progress)


def _labeled(settings: DataSettings, progress: Watcher | None) -> DataSplits:
    check_source(settings)
    if settings.source in DATASETS:
        return DATASETS[settings.source](settings)
    if is_shards(settings.source):
        return from_shards(settings, AUGMENT, progress)
    return from_files(settings, progress)


def check_source(settings: DataSettings) -> None:
    """Whether the source is there, without reading an image or importing torch.

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
    if not path.is_dir() and not (path.is_file() and path.suffix.lower() in SUFFIXES):
        if path.exists():
            image = "; for an image, give the folder that holds the class folders" if looks_like_image(name) else ""
            raise UsageError(f"data {name!r}: a file of data is a manifest, {' or '.join(SUFFIXES)}{image}")
        raise UsageError(
            f"no data set, folder or manifest {name!r}{nearest(name, DATASETS)}\n"
            f"Known names: {', '.join(DATASETS)}; or give a folder of class folders, a .csv or .jsonl manifest, or "
            ".tar shards"
        )
    if settings.options:
        raise UsageError(f"data {name!r}: folders and manifests take no options, got {', '.join(settings.options)}")
    if settings.val + settings.test >= 1:
        raise UsageError(f"val {settings.val:g} and test {settings.test:g} leave no images for train")


def check_target(settings: DataSettings) -> None:
    """Likewise of the target; nothing where there is none.

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
    """Splits from any torch or torchvision data sets of (image, label); see ``images.TorchSet`` for the images.

    Args:
        train: training images; val and test are split from them where they are not given.
        test: test images.
        val: images that pick the best epoch.
        class_names: class id -> name; None: ``train.classes``, or "0", "1" and so on.
        settings: shares and seed of the split.

    Raises:
        DataError: images, classes or splits that cannot be trained on; every image is read once.
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
        made = stratified(pool.names, pool.labels, shares, settings.split_seed, names)
        sets |= {split: Subset(pool, index) for split, index in made.items()}
        origin += f"; {' and '.join(shares)} split from train here, stratified, split seed {settings.split_seed}"
    check_splits(names, sets, "data from Python")
    contents = {split: check_images(images, f"data from Python, {split}") for split, images in sets.items()}
    return DataSplits(
        names, sets["train"], sets["val"], sets["test"], source="python", origin=origin,
        fingerprint=fingerprint(sets, names, contents), augment=AUGMENT,
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
