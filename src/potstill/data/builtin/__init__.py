"""Data sets known by name: one file each, with the options that it takes; see ``data.datasets``."""

import hashlib
from collections.abc import Mapping

from potstill.data.image_sets import ArraySet, ImageSet, Subset
from potstill.data.settings import AugmentSettings, DataSettings
from potstill.data.splits import DataSplits, fingerprint, stratified_split, stratified_subset


def split_published(
    settings: DataSettings,
    class_names: tuple[str, ...],
    pool: ArraySet,
    test: ArraySet,
    *,
    limit: int | None,
    augment: AugmentSettings,
) -> DataSplits:
    """Return train and val from ``limit`` published training images, stratified, and the published test images."""
    if limit is not None:
        chosen = stratified_subset(pool.names, pool.labels, limit, settings.split_seed)
        pool = ArraySet(pool.images[chosen], pool.labels[chosen], [pool.names[i] for i in chosen])
    parts = stratified_split(pool.names, pool.labels, {"val": settings.val}, settings.split_seed, class_names)
    splits: dict[str, ImageSet] = {
        "train": Subset(pool, parts["train"]),
        "val": Subset(pool, parts["val"]),
        "test": test,
    }
    contents = digest_pixels(splits, slice(None) if pool.images.ndim == 4 else 0)  # gray images: as they were published
    origin = (
        f"test as published; val: {100 * settings.val:g} % of {len(pool):,} training images, stratified, "
        f"split seed {settings.split_seed}"
    )
    return DataSplits(
        class_names, splits["train"], splits["val"], splits["test"], source=settings.source, origin=origin,
        fingerprint=fingerprint(splits, class_names, contents), augment=augment,
    )  # fmt: skip


def digest_pixels(splits: Mapping[str, ImageSet], channels: slice | int = slice(None)) -> dict[str, list[str]]:
    """Return split -> SHA-256 of the pixels of each image, for a fingerprint."""
    return {
        split: [hashlib.sha256(images.pixels(i)[..., channels].tobytes()).hexdigest() for i in range(len(images))]
        for split, images in splits.items()
    }
