"""Collate sample ids and pixels into a batch: views, second images, mixed images, labels.

``view_fingerprint`` describes everything that determines the pixels of a view; it is part of a teacher cache's key.
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
from potstill.data.transforms import ViewSize, center_crop, normalize, to_device
from potstill.errors import UsageError
from potstill.input_spec import InputSpec
from potstill.types import Batch

GENERATOR = "splitmix64"
VERSION = 2  # of the augmentation; increased with every change that changes a pixel of a view


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
    """Return JSON values that determine the views of equal images; ``device`` counts for torchvision's policies."""
    augment = augment or AugmentSettings()
    changes = not augment.changes_nothing or strong or same_class
    values: dict[str, Any] = {
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
        unused = set() if augment.pad_crop else {"pad_mode"}
        values |= {"augment": augment.model_dump(mode="json", exclude=unused), "generator": GENERATOR, "seed": seed}
    if augment.crop_scale is not None and spec.resize_mode == "crop":
        values["crops_of"] = "whole images"
    if same_class or augment.mixes:
        content = hashlib.sha256(np.ascontiguousarray(labels, dtype="<i8").tobytes()).hexdigest()
        values["partners"] = {"same class": same_class, "balanced": augment.mixes and balanced, "labels": content}
    if augment.mixes:
        import scipy  # computes the weights of mixed images

        values["scipy"] = scipy.__version__
    if strong or augment.auto_augment != "none":
        import torch
        import torchvision

        values |= {"torch": torch.__version__, "torchvision": torchvision.__version__, "device": device}
    return values


SecondImages = Literal["none", "strong", "same class"]


@dataclass(frozen=True)
class BatchPlan:
    """Samples of a batch, and the random choices for them."""

    ids: Ids  # [B]
    view: Ids | int  # view number, one for all or [B]
    partners: Ids | None = None  # [B] sample ids of partners or second images
    mixing: MixParams | None = None  # how the partners are mixed in
    aspects: NDArray[np.float64] | None = None  # width / height of the images of ``pixel_ids``, if they are stretched

    @property
    def pixel_ids(self) -> Ids:
        """Samples whose pixels are needed, [B] or [2 B]."""
        return self.ids if self.partners is None else np.concatenate([self.ids, self.partners])

    @property
    def pixel_views(self) -> Ids | int:
        """View numbers of ``pixel_ids``, one for all or [B] or [2 B]."""
        twice = self.partners is not None and not isinstance(self.view, int)
        return np.concatenate([self.view, self.view]) if twice else self.view


class Collator:
    """``batch(plan(ids, view), pixels)``; arguments as of ``Loader``, ``side`` that of the squares."""

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
        answers: Literal["logits", "embeddings"] | None = None,
    ) -> None:
        self.answers = answers
        self.spec, self.augment, self.side, self.seed = spec, augment, side, seed
        self.drawn = drawn or ViewSize(side, spec.size)
        self.labels, self.unlabeled, self.second, self.balanced = labels, unlabeled, second, balanced
        self.device = device
        self.every_label = torch.from_numpy(np.concatenate([labels, np.full(unlabeled, -100)])).to(device)
        self.views = None
        if augment is not None:
            self.views = ViewTransform(augment, size=spec.size, seed=seed, drawn=self.drawn)
        self.strong = self.partners = self.mixer = None
        if second == "strong":
            self.strong = ViewTransform(
                augment or AugmentSettings(), size=spec.size, seed=seed, strong=True, drawn=self.drawn
            )
        elif second == "same class":
            self.partners = SameClassSampler(labels, seed)
        if augment is not None and augment.mixes and classes is not None:
            alphas = {"mixup": augment.mixup, "cutmix": augment.cutmix}
            self.mixer = BatchMixer(
                labels,
                **alphas,
                classes=classes,
                size=self.drawn.size,
                seed=seed,
                balanced=balanced,
                unlabeled=unlabeled,
            )

    @property
    def distinct_views(self) -> bool:
        """Whether two views of an image differ."""
        return self.second != "none" or not (self.augment is None or self.augment.changes_nothing)

    @property
    def has_partners(self) -> bool:
        """Whether a batch needs the pixels of twice as many samples."""
        return self.mixer is not None or self.partners is not None

    def describe(self, second: bool) -> dict[str, Any]:
        """Return everything that determines a view's pixels besides the images, as ``Loader.describe_views``."""
        if second:
            self._require_second()
        values = view_fingerprint(
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
        return values if self.drawn == (self.side, self.spec.size) else values | {"drawn": list(self.drawn)}

    def plan(self, ids: Ids, view: Ids | int, *, second: bool = True) -> BatchPlan:
        """Draw the random choices for a batch of these samples; without ``second``, for its first images only."""
        if self.mixer is not None:
            params = self.mixer.draw(ids, view)
            return BatchPlan(ids, view, params.partners, params)
        if self.partners is not None and second:
            return BatchPlan(ids, view, self.partners(ids, view))
        return BatchPlan(ids, view)

    def batch(self, plan: BatchPlan, pixels: Tensor) -> Batch:
        """Return the batch; ``pixels`` are the squares of ``plan.pixel_ids``, uint8 [B or 2 B, *square_shape]."""
        pixels = self._move_to_device(pixels)
        index = to_device(torch.from_numpy(plan.ids), self.device)
        numbers = np.broadcast_to(plan.view, plan.ids.shape).astype(np.int64)
        images, second = self._transform(plan, pixels)
        labels, soft = self.every_label[index], None
        if plan.mixing is not None and self.mixer is not None:
            others = self.every_label[to_device(torch.from_numpy(plan.mixing.partners), self.device)]
            labels, soft = self.mixer.labels(labels, others, plan.mixing)
        view = to_device(torch.from_numpy(numbers), self.device)
        return Batch(images, labels, index, view, second, soft)

    def images(self, plan: BatchPlan, pixels: Tensor) -> Tensor:
        """Return only the batch's first images."""
        return self._transform(plan, self._move_to_device(pixels), strong=False)[0]

    def second_images(self, plan: BatchPlan, pixels: Tensor) -> Tensor:
        """Return only the batch's second images."""
        self._require_second()
        second = self._transform(plan, self._move_to_device(pixels))[1]
        assert second is not None
        return second

    def _transform(self, plan: BatchPlan, pixels: Tensor, *, strong: bool = True) -> tuple[Tensor, Tensor | None]:
        images = self._augment(pixels, plan, self.views)
        count = len(plan.ids)
        if plan.mixing is not None and self.mixer is not None:
            own, others = images[:count], images[count:]
            if self.answers is None:
                return self.mixer.images(own, others, plan.mixing), None
            return self.mixer.answers(own, others, plan.mixing, linear=self.answers == "embeddings"), None
        if plan.partners is not None:
            return images[:count], images[count:]
        if self.strong is not None and strong:
            return images, self._augment(pixels, plan, self.strong)
        return images, None

    def _augment(self, pixels: Tensor, plan: BatchPlan, views: ViewTransform | None) -> Tensor:
        if self.answers is not None:
            return pixels
        if views is None:
            return normalize(center_crop(pixels, self.spec.size), self.spec)
        squares = pixels[..., : self.side, :]
        return normalize(views(squares, plan.pixel_ids, plan.pixel_views, plan.aspects), self.spec)

    def _move_to_device(self, pixels: Tensor) -> Tensor:
        """Copy to the device, from pinned memory so that the CPU need not wait."""
        if self.device.type == "cuda" and pixels.device.type == "cpu":
            pixels = pixels.pin_memory()
        return to_device(pixels, self.device)

    def _require_second(self) -> None:
        if self.second == "none":
            raise UsageError('this loader has no second images; create it with second="strong" or "same class"')
