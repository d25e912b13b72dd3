"""A second domain: images of the same classes, taken otherwise, in which the student is to work."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from potstill.data.image_files import read_by
from potstill.data.images import ImageSet
from potstill.data.relabelled import Relabelled
from potstill.data.settings import DataSettings
from potstill.data.splits import SPLITS, DataSplits
from potstill.data.unlabeled import paths_of
from potstill.errors import DataError, UsageError, nearest

_SHOWN = 20  # class names of a domain that a message lists


def target_settings(settings: DataSettings) -> DataSettings:
    """Settings that load the target as if it were the source: split by the same shares and seed.

    Raises:
        UsageError: there is no target.
    """
    if settings.target is None:
        raise UsageError("data.target is not given: name a folder of class folders, a manifest or a data set")
    own = {"source": settings.target, "options": settings.target_options, "unlabeled": None}
    return settings.model_copy(update={**own, "target": None, "target_options": {}, "target_labels": 0.0})


def with_target(data: DataSplits, target: DataSplits) -> DataSplits:
    """The source's splits with the target beside them; its classes get the source's ids, by name.

    Args:
        data: of the source.
        target: of the target, checked by itself.

    Raises:
        DataError: classes that differ, or files that are in both.
    """
    _refuse_other_classes(data, target)
    _refuse_shared(data, target)
    ids = np.array([data.class_names.index(name) for name in target.class_names], dtype=np.int64)
    train, val, test = (_renamed(target.split(split), ids) for split in SPLITS)
    ends = data.range if data.range is not None else target.range  # the student works in both domains
    if ends is not None:
        for images in (data.train, data.val, data.test, train, val, test):
            read_by(images, ends)
    target = replace(target, class_names=data.class_names, train=train, val=val, test=test, range=ends)
    return replace(
        data,
        range=ends,
        target=target,
        origin=f"{data.origin}; target {target.source}: {target.origin}",
        fingerprint=joint_fingerprint(data.fingerprint, target.fingerprint),
    )


def joint_fingerprint(*parts: str) -> str:
    """SHA-256 over several words, in their order."""
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _renamed(images: ImageSet, ids: np.ndarray[tuple[int], np.dtype[np.int64]]) -> ImageSet:
    return images if (ids == np.arange(len(ids))).all() else Relabelled(images, ids[images.labels])


def _refuse_other_classes(data: DataSplits, target: DataSplits) -> None:
    ours, theirs = data.class_names, target.class_names
    if set(ours) == set(theirs):
        return
    lines = [f"source {data.source} and target {target.source} must have the same classes, by name:"]
    for where, one, other in (("source", ours, theirs), ("target", theirs, ours)):
        lacking = [f"{name!r}{nearest(name, one)}" for name in other if name not in one]
        lines.append(f"  {where}, {len(one)}: {_list(one)}" + (f"; no {', '.join(lacking[:5])}" if lacking else ""))
    raise DataError("\n".join([*lines, "Rename the class folders of one of them, or leave classes out of the other"]))


def _refuse_shared(data: DataSplits, target: DataSplits) -> None:
    """A file in both domains may be trained on in one and measured in the other."""
    ours, theirs = ({path.resolve() for images in _all(each) for path in paths_of(images)} for each in (data, target))
    if shared := sorted(ours & theirs):
        raise DataError(
            f"source {data.source} and target {target.source} share {len(shared):,} files, for example {shared[0]}.\n"
            "Two domains are two sets of images: what is trained on in one must not be measured in the other"
        )


def _all(data: DataSplits) -> list[ImageSet]:
    return [data.split(split) for split in SPLITS] + ([] if data.unlabeled is None else [data.unlabeled])


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
