"""Collate sample ids and pixels into a batch: views, second images, mixed images, labels.

``view_fingerprint`` lists everything that decides the pixels of a view: a cache of teacher outputs compares it.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.augment import BatchMixer, MixParams, ViewTransform
from potstill.data.image_io import decoder_version
from potstill.data.samplers import Ids, SameClassSampler
from potstill.data.settings import AugmentSettings
from potstill.data.transforms import ViewSize, center_crop, normalize
from potstill.errors import UsageError
from potstill.input_spec import InputSpec
from potstill.types import Batch

GENERATOR = "splitmix64"
VERSION = 2  # of all that turns decoded pixels into a view; raised with every change that changes a pixel


def view_fingerprint(
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
        "decoder": decoder_version(),
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
    if strong or augment.auto_augment != "none":
        import torch
        import torchvision

        found |= {"torch": torch.__version__, "torchvision": torchvision.__version__, "device": device}
    return found


SecondImages = Literal["none", "strong", "same class"]


@dataclass(frozen=True)
class BatchPlan:
    """Samples of a batch, and what has been drawn for them."""

    ids: Ids  # [B]
    view: Ids | int  # of all, or [B]
    partners: Ids | None = None  # [B]: samples of which images are needed beside
    mixture: MixParams | None = None  # how the partners are mixed in

    @property
    def shown(self) -> Ids:
        """The samples whose pixels are needed, [B] or [2 B]."""
        return self.ids if self.partners is None else np.concatenate([self.ids, self.partners])

    @property
    def views(self) -> Ids | int:
        """The view numbers in which they are."""
        twice = self.partners is not None and not isinstance(self.view, int)
        return np.concatenate([self.view, self.view]) if twice else self.view


class Collator:
    """``batch(wanted(ids, view), pixels)``; the arguments are those of ``Loader``.

    Args:
        labels: [N] class ids of the labeled images.
        unlabeled: M.
        side: of the squares that come as pixels.
        balanced: partners to mix with are drawn class by class.
        drawn: the pixels in which views are drawn; None: those in which they are shown.
    """

    def __init__(
        self,
        spec: InputSpec,
        augment: AugmentSettings | None,
        *,
        labels: Ids,
        unlabeled: int,
        side: int,
        seed: int,
        second: SecondImages,
        classes: int | None,
        balanced: bool,
        device: torch.device,
        drawn: ViewSize | None = None,
    ) -> None:
        self.spec, self.augment, self.side, self.seed = spec, augment, side, seed
        self.drawn = drawn or ViewSize(side, spec.size)
        self.labels, self.unlabeled, self.second, self.balanced = labels, unlabeled, second, balanced
        self.device = device
        self.every_label = torch.from_numpy(np.concatenate([labels, np.full(unlabeled, -100)])).to(device)
        self.views = None
        if augment is not None:
            self.views = ViewTransform(augment, size=spec.size, seed=seed, drawn=self.drawn)
        self.strong = self.partners = self.mixing = None
        if second == "strong":
            self.strong = ViewTransform(
                augment or AugmentSettings(), size=spec.size, seed=seed, strong=True, drawn=self.drawn
            )
        elif second == "same class":
            self.partners = SameClassSampler(labels, seed)
        if augment is not None and augment.mixes and classes is not None:
            alphas = {"mixup": augment.mixup, "cutmix": augment.cutmix}
            self.mixing = BatchMixer(
                labels, **alphas, classes=classes, size=self.drawn.size, seed=seed, balanced=balanced
            )

    @property
    def distinct_views(self) -> bool:
        """Whether two views of an image differ."""
        return self.second != "none" or not (self.augment is None or self.augment.changes_nothing)

    @property
    def has_partners(self) -> bool:
        """Whether a batch needs the pixels of twice as many samples."""
        return self.mixing is not None or self.partners is not None

    def describe(self, second: bool) -> dict[str, Any]:
        """All that decides a view's pixels besides the images themselves, as ``Loader.describe_views``."""
        if second:
            self._refuse_without_second()
        found = view_fingerprint(
            self.augment,
            self.spec,
            side=self.side,
            seed=self.seed,
            labels=self.labels,
            unlabeled=self.unlabeled,
            balanced=self.balanced,
            strong=second and self.second == "strong",
            same_class=second and self.second == "same class",
            device=self.device.type,
        )
        return found if self.drawn == (self.side, self.spec.size) else found | {"drawn": list(self.drawn)}

    def wanted(self, ids: Ids, view: Ids | int, *, second: bool = True) -> BatchPlan:
        """What a batch of these samples needs; without ``second``, what its first images do."""
        if self.mixing is not None:
            mixture = self.mixing.draw(ids, view)
            return BatchPlan(ids, view, mixture.partners, mixture)
        if self.partners is not None and second:
            return BatchPlan(ids, view, self.partners(ids, view))
        return BatchPlan(ids, view)

    def batch(self, wanted: BatchPlan, pixels: Tensor) -> Batch:
        """The batch; ``pixels``: uint8 [B or 2 B, 3, R, R], the squares of ``wanted.shown``."""
        pixels = self._move_to_device(pixels)
        index = torch.from_numpy(wanted.ids).to(self.device, non_blocking=True)
        numbers = np.broadcast_to(wanted.view, wanted.ids.shape).astype(np.int64)
        images, second = self._both(wanted, pixels)
        labels, soft = self.every_label[index], None
        if wanted.mixture is not None and self.mixing is not None:
            others = self.every_label[torch.from_numpy(wanted.mixture.partners).to(self.device, non_blocking=True)]
            labels, soft = self.mixing.labels(labels, others, wanted.mixture)
        view = torch.from_numpy(numbers).to(self.device, non_blocking=True)
        return Batch(images, labels, index, view, second, soft)

    def images(self, wanted: BatchPlan, pixels: Tensor) -> Tensor:
        """The batch's first images alone."""
        return self._both(wanted, self._move_to_device(pixels), strong=False)[0]

    def seconds(self, wanted: BatchPlan, pixels: Tensor) -> Tensor:
        """The batch's second images alone.

        Raises:
            UsageError: there are none.
        """
        self._refuse_without_second()
        second = self._both(wanted, self._move_to_device(pixels))[1]
        assert second is not None
        return second

    def _both(self, wanted: BatchPlan, pixels: Tensor, *, strong: bool = True) -> tuple[Tensor, Tensor | None]:
        images = self._prepared(pixels, wanted, self.views)
        count = len(wanted.ids)
        if wanted.mixture is not None and self.mixing is not None:
            return self.mixing.images(images[:count], images[count:], wanted.mixture), None
        if wanted.partners is not None:
            return images[:count], images[count:]
        if self.strong is not None and strong:
            return images, self._prepared(pixels, wanted, self.strong)
        return images, None

    def _prepared(self, pixels: Tensor, wanted: BatchPlan, views: ViewTransform | None) -> Tensor:
        size = self.spec.size
        shown = views(pixels, wanted.shown, wanted.views) if views is not None else center_crop(pixels, size)
        return normalize(shown, self.spec)

    def _move_to_device(self, pixels: Tensor) -> Tensor:
        """To the device; from memory that it reads by itself, so that nobody waits."""
        if self.device.type == "cuda" and pixels.device.type == "cpu":
            pixels = pixels.pin_memory()
        return pixels.to(self.device, non_blocking=True)

    def _refuse_without_second(self) -> None:
        if self.second == "none":
            raise UsageError('this loader gives no second images; make it with second="strong" or "same class"')
