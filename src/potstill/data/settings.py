"""Settings of the data: source, splits, preprocessing, augmentation; base class of a named data set's options."""

import math
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from potstill.errors import UsageError, did_you_mean

Pacing = Literal["linear", "root", "step"]  # of a curriculum: how its share of the images grows


class AugmentSettings(BaseModel):
    """Augmentation of training images; each random choice depends only on (seed, sample id, view)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pad_crop: float = Field(0.0, ge=0, le=0.5, description="shift by up to this share of the size")
    pad_mode: Literal["reflect", "black"] = Field("reflect", description="how a shift fills pixels beyond the border")
    crop_scale: tuple[float, float] | None = Field(
        None, description="area shares between which a random resized crop is drawn, e.g. [0.35, 1]; null: none"
    )
    hflip: bool = Field(False, description="mirror left to right for half of the views")
    vflip: bool = Field(False, description="mirror top to bottom for half of the views")
    rotate90: bool = Field(False, description="rotate by 0, 90, 180 or 270 degrees")
    color_jitter: float = Field(0.0, ge=0, le=1, description="strength of brightness, contrast and saturation change")
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = Field("none", description="torchvision v2 policy")
    erasing: float = Field(0.0, ge=0, le=1, description="probability of erasing a rectangle")
    mixup: float = Field(
        0.0, ge=0, le=100, description="alpha of mixup: images of a batch blended in pairs, labels too; 0: off"
    )
    cutmix: float = Field(
        0.0, ge=0, le=100, description="alpha of cutmix: a rectangle from another image; with mixup: one or the other"
    )

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def changes_nothing(self) -> bool:
        """Whether every view of an image is the same."""
        no_effect = {"pad_mode"}  # without pad_crop
        return self.model_dump(exclude=no_effect) == AugmentSettings().model_dump(exclude=no_effect)


class DataSettings(BaseModel):
    """Images, classes and splits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        "digits", description="a name of `potstill.data.datasets.DATASETS`, a folder, or a .csv/.jsonl manifest"
    )
    options: dict[str, Any] = Field({}, description="options of the named data set, e.g. {classes: 2} for solar")
    follow_links: bool = Field(
        False, description="read links and a manifest's paths to files and folders outside the data folder too"
    )
    skip_bad: bool = Field(
        False,
        description="leave out files that cannot be read and classes that are too small, and list them in skipped.csv",
    )
    size: int = Field(224, ge=8, le=4096, description="height and width, in pixels, of the networks' input")
    range: Literal["auto"] | tuple[float, float] = Field(
        "auto",
        description="value range of images of more than 8 bits, mapped to 0 to 255, e.g. [0, 4095]; auto: found once, "
        "over the training images",
    )
    resize_mode: Literal["crop", "pad", "stretch"] = Field(
        "crop",
        description="how an image becomes square: centre crop, black borders, or another aspect ratio",
    )
    unlabeled: str | None = Field(
        None, description="a second folder, of images without labels at any depth: they join the teacher's terms only"
    )
    unlabeled_share: float = Field(
        0.5, gt=0, le=0.9, description="share of such images in a batch; they come on top of `batch_size`"
    )
    target: str | None = Field(
        None, description="another domain of the same classes, in which the student will be used; given like `source`"
    )
    target_options: dict[str, Any] = Field({}, description="options of the target, if it is a named data set")
    target_labels: float = Field(
        0.0, ge=0, le=1, description="share of the target's training and val images whose labels may be used"
    )
    mean: tuple[float, float, float] | None = Field(
        None, description="of RGB in [0, 1], subtracted from images; null, and for published weights: the network's own"
    )
    std: tuple[float, float, float] | None = Field(
        None, description="of RGB in [0, 1], by which images are then divided; null as for `mean`"
    )
    val: float = Field(0.15, gt=0, lt=1, description="share split off for val if the source has none")
    test: float = Field(0.15, gt=0, lt=1, description="share split off for test if the source has none")
    split_seed: int = Field(0, ge=0, description="of the split; separate from `seed`, so that seeds share a split")
    augment: AugmentSettings | None = Field(None, description="null: the data set's default, a light one")
    augmentation_seed: int | None = Field(
        None,
        ge=0,
        description="of the views; null: `seed`, so that each seed has its own views; a number: all seeds have the "
        "same views and share cached teacher outputs",
    )
    class_balance: Literal["none", "weights", "sampling"] = Field(
        "none", description="class weights in the label loss, or balanced sampling, for imbalanced classes"
    )
    workers: int | Literal["auto"] = Field("auto", description="processes that decode; results do not depend on it")
    cache_fraction: float = Field(0.3, gt=0, lt=1, description="share of free memory that decoded pixels may take")

    @field_validator("range")
    @classmethod
    def _low_and_high(cls, value: Literal["auto"] | tuple[float, float]) -> Literal["auto"] | tuple[float, float]:
        if value != "auto" and not (math.isfinite(value[0]) and math.isfinite(value[1]) and value[0] < value[1]):
            raise ValueError("must be auto or two numbers, the lower one first, e.g. [0, 4095]")
        return value


class Options(BaseModel):
    """Base of every data set's options: unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


OptionsT = TypeVar("OptionsT", bound=Options)


def read_options(settings: DataSettings, model: type[OptionsT]) -> OptionsT:
    """Return ``settings.options`` as the data set's own model.

    Raises:
        UsageError: unknown options or values; all of them, with the nearest known name.
    """
    try:
        return model.model_validate(settings.options)
    except ValidationError as error:
        problems = []
        for each in error.errors(include_url=False):
            name = ".".join(map(str, each["loc"]))
            if each["type"] == "extra_forbidden":
                allowed = ", ".join(model.model_fields) or "none"
                problems.append(f"unknown option {name!r} (allowed: {allowed}){did_you_mean(name, model.model_fields)}")
            else:
                problems.append(f"option {name}: {each['msg']}, got {each['input']!r}")
        raise UsageError(f"data set {settings.source!r}: " + "; ".join(problems)) from error
