"""Settings of the data: source, splits, preprocessing, augmentation; base class of a named data set's options."""

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from potstill.errors import UsageError, did_you_mean


class AugmentSettings(BaseModel):
    """Random augmentation of training images; each draw depends on (seed, sample id, view) alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pad_crop: float = Field(0.0, ge=0, le=0.5, description="random shift by up to this share of the size")
    pad_mode: Literal["reflect", "black"] = Field("reflect", description="pixels beyond the border after a shift")
    crop_scale: tuple[float, float] | None = Field(
        None, description="area of a random resized crop as shares of the whole image, e.g. [0.35, 1]; null: none"
    )
    hflip: bool = Field(False, description="flip left to right with probability 0.5")
    vflip: bool = Field(False, description="flip top to bottom with probability 0.5")
    rotate90: bool = Field(False, description="rotate by 0, 90, 180 or 270 degrees")
    color_jitter: float = Field(
        0.0, ge=0, le=1, description="strength of the changes of brightness, contrast and saturation"
    )
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = Field(
        "none", description="policy of torchvision v2"
    )
    erasing: float = Field(0.0, ge=0, le=1, description="probability of erasing a rectangle")
    mixup: float = Field(
        0.0, ge=0, le=100, description="alpha of mixup: blend pairs of images and their labels; 0: off"
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        le=100,
        description="alpha of CutMix: paste a rectangle of another image; 0: off; with mixup: one of both per batch",
    )

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def changes_nothing(self) -> bool:
        """Whether every view of an image is the same."""
        ignored = {"pad_mode"}  # has no effect alone
        return self.model_dump(exclude=ignored) == AugmentSettings().model_dump(exclude=ignored)


class DataSettings(BaseModel):
    """Images, classes and splits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        "digits",
        description="a folder, a manifest (.csv, .tsv, .txt, .jsonl), .tar or .parquet files, hf://datasets/USER/NAME, "
        "the name of a data set, or file.py:callable",
    )
    options: dict[str, Any] = Field(
        {}, description="options of a data set given by name or code, e.g. {classes: 2} for solar"
    )
    follow_links: bool = Field(
        False, description="follow links, and paths of a manifest, to files and folders outside the data folder"
    )
    skip_bad: bool = Field(
        False,
        description="leave out files that cannot be read and classes that are too small, and list them in skipped.csv",
    )
    size: int = Field(224, ge=8, le=4096, description="height and width of the networks' input in pixels")
    range: Literal["auto"] | tuple[float, float] = Field(
        "auto",
        description="[black, white] of images of more than 8 bits, e.g. [0, 4095]; auto: measured on the training "
        "images",
    )
    resize_mode: Literal["crop", "pad", "stretch"] = Field(
        "crop",
        description="how images become square: crop the centre, pad with black, or stretch",
    )
    labeled: bool = Field(
        True,
        description="false: source is a folder of images at any depth, without labels; the teacher names the classes, "
        "if it has any",
    )
    classes: Annotated[list[str], Field(min_length=2)] | None = Field(
        None, description="class names of data without labels, in the order of the outputs; null: the teacher's"
    )
    labeled_test: str | None = Field(
        None,
        description="test images for data without labels: a folder of class folders, or a manifest; null: some of the "
        "images, for which the accuracy stays unknown",
    )
    unlabeled: str | None = Field(
        None, description="a folder of unlabeled training images, at any depth; only terms without labels use them"
    )
    unlabeled_share: float = Field(
        0.5,
        gt=0,
        le=0.9,
        description="share of unlabeled images in a batch; they are added to the `batch_size` labeled ones",
    )
    labels_per_class: int | None = Field(
        None,
        ge=1,
        description="keep the labels of this many training images of each class, and use the others as unlabeled "
        "images; val and test keep all labels; null: all",
    )
    target: str | None = Field(
        None, description="target domain of the student: images of the same classes; given in the same way as `source`"
    )
    target_options: dict[str, Any] = Field({}, description="options of a target given by name")
    target_labels: float = Field(
        0.0, ge=0, le=1, description="share of the target's training and val images whose labels may be used"
    )
    mean: tuple[float, float, float] | None = Field(
        None, description="RGB mean in [0, 1] for normalisation; null, or weights: pretrained: the network's own"
    )
    std: tuple[float, float, float] | None = Field(
        None, description="RGB standard deviation for normalisation; null: as for mean"
    )
    val: float = Field(0.15, gt=0, lt=1, description="share of the images that becomes val, if the source has none")
    test: float = Field(0.15, gt=0, lt=1, description="share of the images that becomes test, if the source has none")
    keep_splits: Literal["all", "test", "none"] = Field(
        "all",
        description="splits of a folder, a manifest or tables that are kept; test: val is split off from train and val "
        "together; none: all images are split anew",
    )
    class_folder: Annotated[int, Field(ge=1)] | Literal["last"] = Field(
        1,
        description="folder that names the class of an image, counted from the data folder or that of the split: 1, 2 "
        "and so on, or last: the one that the image lies in",
    )
    split_seed: int = Field(0, ge=0, description="seed of the split; runs with different `seed` share a split")
    folds: int | None = Field(
        None,
        ge=2,
        le=1000,
        description="cross-validation: K runs, in each of which another K-th of all images (those of given splits are "
        "pooled) is the test split; null: one run with one test split",
    )
    fold: int | Literal["all"] | None = Field(
        None,
        description="with folds: run this fold alone, 1 to K; all: train on all images but one of each class, for the "
        "model to deploy; null: all folds",
    )
    augment: AugmentSettings | None = Field(
        None, description="augmentation of training images; null: the data set's default"
    )
    augmentation_seed: int | None = Field(
        None,
        ge=0,
        description="seed of the augmentation; null: `seed`; a number: all seeds see the same views and share cached "
        "teacher outputs",
    )
    class_balance: Literal["none", "weights", "sampling"] = Field(
        "none", description="for imbalanced classes: class weights in the label loss, or balanced sampling"
    )
    workers: int | Literal["auto"] = Field(
        "auto", description="processes that decode images; results do not depend on it"
    )
    cache: Literal["auto", "raw", "jpeg"] = Field(
        "auto",
        description="how training images are kept between epochs; raw: as pixels, or where these do not fit, as files, "
        "decoded in each epoch; jpeg: as JPEG records of the size that the networks need, a tenth of the bytes, with "
        "pixels that differ slightly; auto: jpeg only where raw pixels fit neither into memory nor on the disk, and "
        "records do",
    )
    cache_fraction: float = Field(0.3, gt=0, lt=1, description="share of free memory for decoded images")

    @field_validator("range")
    @classmethod
    def _low_and_high(cls, value: Literal["auto"] | tuple[float, float]) -> Literal["auto"] | tuple[float, float]:
        if value != "auto" and not (math.isfinite(value[0]) and math.isfinite(value[1]) and value[0] < value[1]):
            raise ValueError("must be auto or two numbers, the lower one first, e.g. [0, 4095]")
        return value


class Options(BaseModel):
    """Base class of the options of a data set; unknown options are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


OptionsT = TypeVar("OptionsT", bound=Options)


def read_options(settings: DataSettings, model: type[OptionsT]) -> OptionsT:
    """Return ``settings.options`` as the options class of the data set; UsageError names all that are wrong."""
    try:
        return model.model_validate(settings.options)
    except ValidationError as error:
        problems = []
        for problem in error.errors(include_url=False):
            name = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                allowed = ", ".join(model.model_fields) or "none"
                problems.append(f"unknown option {name!r} (allowed: {allowed}){did_you_mean(name, model.model_fields)}")
            else:
                problems.append(f"option {name}: {problem['msg']}, got {problem['input']!r}")
        raise UsageError(f"data set {settings.source!r}: " + "; ".join(problems)) from error
