"""The recipe: every setting of a run, in one short YAML file that is validated completely before anything is loaded."""

import copy
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

from potstill.code_references import permit_code
from potstill.config.code_references import find_code, refuse_code_in_recipe, resolve_code_paths
from potstill.config.method_settings import normalize_method
from potstill.config.overrides import apply_overrides, fill_architectures
from potstill.config.settings_errors import (
    CLASS_LIST_NAME,
    CLASS_MAPPING,
    CLASS_SEQUENCE,
    ONE,
    SEVERAL,
    SettingProblem,
    parse_settings,
)
from potstill.config.stage_names import stage_number, stage_role
from potstill.config.validation import TARGET_MISSING, find_problems, lacks_target
from potstill.config.yaml import Document, KeyPath, dump_yaml, parse_yaml
from potstill.data.settings import DataSettings, Pacing
from potstill.distillation.teacher_cache import TeacherCacheSettings
from potstill.errors import PotstillError, UsageError, did_you_mean
from potstill.loggers import LoggerSettings, as_logger_list
from potstill.training.settings import TrainingSettings


class CurriculumSettings(BaseModel):
    """Easy images first, by its teacher's word; `null`: all images in every epoch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    order: Literal["easy", "hard", "random"] = Field(
        "easy", description="who comes first; hard (anti-curriculum) and random are there to compare with"
    )
    score: Literal["loss", "confidence"] = Field(
        "loss",
        description="of the teacher: loss: on the true class; confidence: in whatever it names",
    )
    pacing: Pacing = Field("linear", description="how the share of admitted images grows from start to 1")
    start: float = Field(0.3, gt=0, le=1, description="share of each class that the first epoch draws from")
    until: float = Field(0.5, gt=0, le=1, description="share of the epochs after which all images are admitted")


class DomainSettings(BaseModel):
    """Which images of `data.target` teach the student, and what their teacher is told of them first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    confidence: float = Field(
        0.9, ge=0, le=1, description="least probability of the teacher's first class for an image to be learned from"
    )
    class_balance: bool = Field(
        True, description="draw each class that the teacher names equally often; false: each image equally often"
    )
    adapt_batch_norm: bool = Field(
        False, description="take the teacher's BatchNorm statistics anew from the target's training images"
    )


NAME_PATTERN = r"^[A-Za-z0-9._-]{1,64}$"
MAX_BYTES = 1_000_000  # of a recipe file; a person writes a thousandth of that
DATA_MISSING = "data.source is not given: this recipe has no data of its own; name a folder of images with --data DIR"


OutputClasses = Annotated[
    Annotated[Literal["cifar10", "cifar100", "imagenet-1k", "imagenet-21k"], Tag(CLASS_LIST_NAME)]
    | Annotated[dict[str, Annotated[list[int | str], Field(min_length=1)]], Field(min_length=2), Tag(CLASS_MAPPING)]
    | Annotated[list[str], Field(min_length=2), Tag(CLASS_SEQUENCE)],
    Discriminator(
        lambda value: (
            CLASS_MAPPING
            if isinstance(value, Mapping)
            else CLASS_LIST_NAME
            if isinstance(value, str)
            else CLASS_SEQUENCE
        )
    ),
]


class StageSettings(BaseModel):
    """One network: what it is, what it starts from, what differs in its training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        min_length=1,
        description="an architecture, see `potstill models`, or file.py:callable",
    )
    weights: str | None = Field(
        None,
        description='"pretrained", a run folder, a model of ours, a state dict, "own" for those that code of your own '
        "gives its network; null: random initialisation",
    )
    classes: OutputClasses | None = Field(
        None,
        description="class names of the outputs of bare weights, in their order: a list, a text file with a name a "
        "line, or cifar10, cifar100, imagenet-1k, imagenet-21k; or {mine: [theirs, ...]}, by name or number; null: "
        "those of the data, in its order",
    )
    new_head: bool = Field(False, description="allow weights of other classes: the head starts anew")
    head: Literal["probe", "finetune"] | None = Field(
        None,
        description="of a teacher from weights of other classes: probe: a linear layer fitted on frozen embeddings; "
        "finetune: trained on from there, and the better of both on val; null: a random one, trained with the rest",
    )
    size: int | None = Field(
        None,
        ge=8,
        le=4096,
        description="its own height and width in pixels, to which its images are cut from the originals, a teacher's "
        "views too; null: data.size",
    )
    precision: Literal["auto", "float32"] = Field(
        "auto", description="of a teacher's answers; auto: weights in bf16 where the hardware is fast in it"
    )
    training: dict[str, Any] = Field({}, description="what differs from the recipe's shared training settings")


class TeachersSettings(BaseModel):
    """How several teachers speak with one voice."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    combine: Literal["logits", "probabilities"] = Field(
        "logits", description="what is averaged where a method compares logits"
    )
    weights: list[float] | None = Field(
        None,
        description="one for each teacher, at least 0: of its logits and of terms that read its layers; null: equal",
    )


Teachers = Annotated[
    Annotated[StageSettings, Tag(ONE)] | Annotated[list[StageSettings], Tag(SEVERAL)],
    Discriminator(lambda value: SEVERAL if isinstance(value, (list, tuple)) else ONE),
]


class Recipe(BaseModel):
    """Teacher, student, data, method and training of one run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME_PATTERN, description="the run folder's name unless --name gives another")
    description: str = Field("", description="one sentence for lists and reports")
    seed: int = Field(
        0,
        ge=0,
        le=2**32 - 1,
        description="of initialisation, order, dropout, and of augmentation where data.augmentation_seed is null",
    )
    seeds: int = Field(
        1,
        ge=1,
        le=1000,
        description="how many: baseline and distilled are trained with seed, seed + 1, ...; their teacher once",
    )
    data: DataSettings = DataSettings()
    domain: DomainSettings | None = Field(
        None, description="with `data.target`: how the student gets there; null: its defaults"
    )
    teacher: Teachers | None = Field(
        None, description="one network or a list of them; null for methods that learn from no teacher"
    )
    teachers: TeachersSettings = TeachersSettings()
    assistants: list[StageSettings] = Field(
        [],
        description="networks between teacher and student, each of which learns from the one before",
    )
    student: StageSettings
    born_again_generations: int = Field(
        1,
        ge=1,
        le=100,
        description="students in a row, each of which learns from the one before",
    )
    method: dict[str, Any] = Field(
        {"name": "kd"}, description="name and options, or a list of methods with factors; see `potstill methods`"
    )
    curriculum: CurriculumSettings | None = Field(
        None, description="easy images first for whoever distils; null: all images in every epoch"
    )
    feature_pairs: list[tuple[str, str]] | None = Field(
        None, description="[path in the student, path in the teacher] of each joined pair; null: found by depth"
    )
    train_predictions: bool = Field(
        False,
        description="predictions on train too where images x classes > 10 million; of fewer they are always written",
    )
    teacher_cache: TeacherCacheSettings = TeacherCacheSettings()
    training: TrainingSettings = TrainingSettings()
    tracker: list[LoggerSettings] = Field(
        [],
        description="loggers for the metrics: tensorboard, wandb, mlflow, trackio, or several",
    )

    @field_validator("teacher_cache", mode="before")
    @classmethod
    def _mode_alone(cls, teacher_cache: Any) -> Any:
        return {"mode": teacher_cache} if isinstance(teacher_cache, (str, bool)) else teacher_cache

    @field_validator("tracker", mode="before")
    @classmethod
    def _several_trackers(cls, tracker: Any) -> Any:
        return as_logger_list(tracker)

    @field_validator("method", mode="before")
    @classmethod
    def _one_method(cls, method: Any) -> Any:
        return normalize_method(method)

    @property
    def each_teacher(self) -> tuple[StageSettings, ...]:
        """The teachers, however many."""
        if self.teacher is None:
            return ()
        return tuple(self.teacher) if isinstance(self.teacher, list) else (self.teacher,)

    @property
    def augmentation_seed(self) -> int:
        """The seed of the views: ``data.augmentation_seed``, or else ``seed``."""
        return self.seed if self.data.augmentation_seed is None else self.data.augmentation_seed

    @property
    def domains(self) -> DomainSettings:
        """How the student gets to the target, where there is one."""
        return self.domain or DomainSettings()

    def network(self, stage: str) -> StageSettings:
        """The network of a stage (see ``stage_names``); "student" is also that of baseline and distilled."""
        several = {"teacher": self.each_teacher, "assistant": tuple(self.assistants)}.get(stage_role(stage))
        return self.student if several is None else several[stage_number(stage) - 1]

    def stage_training(self, stage: str) -> TrainingSettings:
        """The shared training settings with this stage's own on top."""
        shared = self.training.model_dump()
        if stage_role(stage) in ("teacher", "assistant"):  # who is not deployed need not stand int8
            shared["qat_fraction"] = 0.0
        network = self.network(stage)
        settings = {**shared, **network.training}
        if settings["freeze_batch_norm"] == "auto":
            # The head was fitted to embeddings normalised by these statistics; those of small batches spoil it.
            settings["freeze_batch_norm"] = network.head == "finetune"
        return TrainingSettings.model_validate(settings)


def load_recipe(
    source: "str | Path | Mapping[str, Any]",
    sets: Iterable[str] = (),
    *,
    flags: Mapping[str, Any] | None = None,
    data_needed: bool = True,
    recorded: bool = False,
) -> Recipe:
    """Read and check a recipe; flags overrule the file, ``sets`` overrule both.

    Args:
        source: name of a shipped recipe, a YAML file, or the same content as a dict.
        sets: ``"training.epochs=5"``, as after ``--set``; values are YAML.
        flags: by their names in ``overrides.FLAGS``, such as ``{"--data": "photos"}``; None if not given.
            ``"--allow-code"``: True loads code that a recipe file names.
        data_needed: False leaves ``data.source`` unchecked: the images come from Python, or are no longer needed.
        recorded: True reads the recipe of a run folder for its settings: code that it names is neither loaded nor
            refused, and what only that code could check is not checked again.

    Raises:
        UsageError: all problems at once, a line each, with file, line and column, or the flag; or a recipe file that
            names code, without ``--allow-code``.
        DataError, ArtifactError: the recipe itself is well, but its data or weights are not there.
    """
    document = Document("", copy.deepcopy(dict(source))) if isinstance(source, Mapping) else _read(source)
    value = document.value
    if not isinstance(value, dict):
        raise UsageError(f"{document.label}: a recipe is a mapping; start from `potstill recipes quickstart`")
    value.setdefault("method", {"name": "kd"})  # so that --set method.alpha=0.9 has a method to change
    if isinstance(value.get("teacher_cache"), (str, bool)):  # likewise for --set teacher_cache.views=8
        value["teacher_cache"] = {"mode": value["teacher_cache"]}
        document.places.move(("teacher_cache",), ("teacher_cache", "mode"))
    apply_overrides(document, flags or {}, sets)
    resolve_code_paths(value, document.places, Path() if isinstance(source, Mapping) else Path(source).parent)
    if recorded and any(find_code(value)):
        recipe, problems = parse_settings(value, Recipe)
        _raise_problems(document, problems, [])
        assert recipe is not None
        return recipe
    if not (flags or {}).get("--allow-code"):
        refuse_code_in_recipe(value, document.places)
    if "tracker" in value:  # so that what is wrong with one has a place
        value["tracker"] = as_logger_list(value["tracker"])
    value.setdefault("name", _name_of(source))
    failures = fill_architectures(value, allow_code=bool((flags or {}).get("--allow-code")))
    no_source = isinstance(value.get("data"), dict) and value["data"].get("source", "") is None
    if no_source:
        value["data"]["source"] = "python"
    found = find_problems(value, Recipe)
    if no_source and data_needed:
        found.append((("data", "source"), DATA_MISSING))
    if data_needed and lacks_target(value):
        found.append((("data", "target"), TARGET_MISSING))
    if not no_source and data_needed and ("data", "val") not in dict(found):  # which it would say again
        failures += _source_failure(value)
    _raise_problems(document, found, failures)
    recipe, problems = parse_settings(value, Recipe)
    assert recipe is not None, problems
    permit_code(name for _, name in find_code(value))  # in the model files of its run, too
    return recipe


def list_recipes() -> dict[str, Path]:
    """The recipes that ship with potstill, by name."""
    folder = Path(str(resources.files("potstill.recipes")))
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return dict(sorted(found.items(), key=lambda item: ("/" in item[0], item[0])))  # those of a protocol come last


def dump_recipe(recipe: Recipe) -> str:
    """The complete recipe, defaults included, as YAML that ``load_recipe`` reads."""
    return dump_yaml(recipe.model_dump(mode="json"))


def _read(source: str | Path) -> Document:
    shipped, path = list_recipes(), Path(source)
    if isinstance(source, str) and source in shipped:
        path = shipped[source]
    elif not path.exists() and path.suffix not in (".yaml", ".yml"):
        known = f"Known: {', '.join(shipped)}; or name a .yaml file"
        raise UsageError(f"no recipe {str(source)!r}{did_you_mean(str(source), shipped)}\n{known}")
    label = path.name if path in shipped.values() else str(source)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read recipe {source}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{label}: a recipe is a text file in UTF-8, and this is none") from error
    if len(content) > MAX_BYTES:
        raise UsageError(f"{label}: a recipe of more than {MAX_BYTES:,} bytes is no recipe")
    return parse_yaml(text, label)


def _name_of(source: Any) -> str:
    stem = "recipe" if isinstance(source, Mapping) else Path(source).stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem)[:64] or "recipe"


def _source_failure(value: dict[str, Any]) -> list[tuple[KeyPath, PotstillError]]:
    data, _ = parse_settings(value.get("data", {}), DataSettings)
    if data is None:
        return []
    from potstill.data.datasets import check_source, check_target
    from potstill.data.file_datasets import check_unlabeled

    failures: list[tuple[KeyPath, PotstillError]] = []
    for key, check in (("source", check_source), ("target", check_target), ("unlabeled", check_unlabeled)):
        try:
            check(data)
        except PotstillError as error:
            failures.append((("data", key), error))
    return failures


def _raise_problems(
    document: Document, found: list[SettingProblem], failures: list[tuple[KeyPath, PotstillError]]
) -> None:
    """One error for everything; its kind is that of the failures only where nothing is wrong with the recipe."""
    kinds = {type(error) for _, error in failures}
    where = document.places.find
    lines = [(where(path), str(sentence)) for path, sentence in [*found, *failures]]
    texts = document.problems + [f"{place}: {sentence}" if place else sentence for place, sentence in lines]
    if texts and len(texts) == len(failures) and len(kinds) == 1:
        raise kinds.pop()("\n".join(texts))
    if texts:
        raise UsageError("\n".join(sorted(texts, key=lambda text: _reading_order(text, document.label))))


def _reading_order(text: str, label: str) -> tuple[int, int, int]:
    """The file from top to bottom, then the flags."""
    position = re.match(r":(\d+):(\d+): ", text.removeprefix(label)) if label and text.startswith(label) else None
    return (0, int(position[1]), int(position[2])) if position else (1, 0, 0)
