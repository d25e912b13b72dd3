"""From one pile of images to train, val and test."""

from collections.abc import Sequence

from potstill.data.images import ImageSet, Subset
from potstill.data.settings import DataSettings
from potstill.data.splits import stratified


def made_here(settings: DataSettings, images: ImageSet, class_names: Sequence[str]) -> tuple[dict[str, ImageSet], str]:
    """A stratified split by ``settings.val``, ``settings.test`` and ``settings.split_seed``, and a sentence on it."""
    shares = {"val": settings.val, "test": settings.test}
    parts = stratified(images.names, images.labels, shares, settings.split_seed, class_names)
    percent = "/".join(f"{100 * share:g}" for share in (1 - settings.val - settings.test, settings.val, settings.test))
    sentence = f"made here: stratified {percent}, split seed {settings.split_seed}"
    return {split: Subset(images, parts[split]) for split in ("train", "val", "test")}, sentence
