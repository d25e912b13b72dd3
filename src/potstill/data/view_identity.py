"""What decides the pixels of a view, in words: whoever keeps answers to views knows by it whether they still fit."""

import dataclasses
import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.data.decode import decoder
from potstill.data.settings import AugmentSettings
from potstill.inputs import InputSpec

GENERATOR = "splitmix64"
VERSION = 2  # of all that turns decoded pixels into a view; raised with every change that changes a pixel


def describe(
    augment: AugmentSettings | None,
    spec: InputSpec,
    *,
    side: int,
    seed: int,
    labels: NDArray[np.int64],
    unlabeled: int,
    balanced: bool,
    strong: bool,
    same_class: bool,
    device: str,
) -> dict[str, Any]:
    """Values that JSON knows; where they are equal, so are the views of equal images.

    Args:
        augment: what views change.
        spec: how the network wants its images.
        side: of the squares that views are cut from.
        seed: of the views.
        labels: [N] class ids; which samples are partners may depend on them.
        unlabeled: how many images without labels there are.
        balanced: partners to mix with are drawn class by class.
        strong: these are the second views with RandAugment on top.
        same_class: these are views of other samples of the same class.
        device: its kind; torchvision's policies may differ by a pixel between two kinds, nothing else does.
    """
    augment = augment or AugmentSettings()
    changes = not augment.changes_nothing or strong or same_class
    found: dict[str, Any] = {
        "version": VERSION,
        "decoder": decoder(),
        "input": dataclasses.asdict(spec)
        | {"mean": list(spec.mean), "std": list(spec.std), "range": None if spec.range is None else list(spec.range)},
        "side": side,
        "samples": [len(labels), unlabeled],
        "strong": strong,
        "augment": None,
    }
    if changes:
        beside = set() if augment.pad_crop else {"pad_mode"}
        found |= {"augment": augment.model_dump(mode="json", exclude=beside), "generator": GENERATOR, "seed": seed}
    if same_class or augment.mixes:
        content = hashlib.sha256(np.ascontiguousarray(labels, dtype="<i8").tobytes()).hexdigest()
        found["partners"] = {"same class": same_class, "balanced": augment.mixes and balanced, "labels": content}
    if augment.mixes:
        import scipy  # whose function gives the shares

        found["scipy"] = scipy.__version__
    if strong or augment.policy != "none":
        import torch
        import torchvision

        found |= {"torch": torch.__version__, "torchvision": torchvision.__version__, "device": device}
    return found
