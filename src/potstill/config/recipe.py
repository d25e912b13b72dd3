"""The recipe: the settings of a run in one YAML file, validated completely before images or weights are loaded."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_type_hints

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag, field_validator

from potstill.code_references import find_code, permit_code, refuse_code_in_recipe, resolve_code_paths
from potstill.config import stage_number, stage_role
from potstill.config.overrides import (
    apply_overrides,
    choose_method,
    complete_fallbacks,
    drop_soft_targets,
    fill_architectures,
    fill_class_names,
    wrap_method_for_previous,
)
from potstill.config.settings_errors import (
    CLASS_LIST_NAME,
    CLASS_MAPPING,
    CLASS_SEQUENCE,
    ONE,
    PROMPT_MAPPING,
    PROMPT_SEQUENCE,
    SEVERAL,
    SettingProblem,
    parse_settings,
)
from potstill.config.validation import TARGET_MISSING, find_problems, lacks_target, network_sections
from potstill.config.yaml import Document, KeyPath, dump_yaml, parse_yaml
from potstill.data.settings import DataSettings
from potstill.distillation.teacher_cache import TeacherCacheSettings
from potstill.errors import PotstillError, UsageError, did_you_mean
from potstill.loggers import LoggerSettings, as_logger_list
from potstill.methods import MethodInfo, list_methods, method_info, normalize_method
from potstill.methods.schedules import Schedule
from potstill.options import METHOD_SCHEMA, REQUIRED, SCALING_SCHEMA, WEIGHT_SCHEMA, Schema, json_schema
from potstill.training.settings import TrainingSettings


class CurriculumSettings(BaseModel):
    """Curriculum learning: the teacher's loss orders the images; ``null``: all images in every epoch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    order: Literal["easy", "hard", "random"] = Field(
        "easy", description="which images come first; hard (anti-curriculum) and random are for comparison"
    )
    start: float = Field(0.3, gt=0, le=1, description="share of the images of each class that the first epoch uses")
    until: float = Field(0.5, gt=0, le=1, description="share of the epochs after which all images are admitted")


class DomainSettings(BaseModel):
    """Domain adaptation: which target images the student learns from, and how the teacher adapts to them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    confidence: float = Field(
        0.9, ge=0, le=1, description="images count if the teacher's top class has at least this probability"
    )
    class_balance: bool = Field(
        True, description="draw each class that the teacher predicts equally often; false: each image equally often"
    )
    adapt_batch_norm: bool = Field(
        False, description="estimate the teacher's BatchNorm statistics on the target's training images"
    )


NAME_PATTERN = r"^[A-Za-z0-9._-]{1,64}$"
MAX_BYTES = 1_000_000  # of a recipe file
DATA_MISSING = "data.source is missing: give a folder of images with --data DIR"


Positive = Annotated[float, Field(gt=0)]
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


Prompts = Annotated[
    Annotated[dict[str, Annotated[list[str], Field(min_length=1)]], Tag(PROMPT_MAPPING)]
    | Annotated[list[str], Field(min_length=1), Tag(PROMPT_SEQUENCE)],
    Discriminator(lambda value: PROMPT_MAPPING if isinstance(value, Mapping) else PROMPT_SEQUENCE),
]


class StageSettings(BaseModel):
    """One network: architecture, initial weights, and training settings of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        min_length=1,
        description="an architecture (see `potstill models`), or file.py:callable",
    )
    weights: str | None = Field(
        None,
        description='"pretrained", a run folder, a model folder, a checkpoint file, hf-hub:USER/NAME, or "own": those '
        "that your own code gives its network; of a teacher also an ONNX, TorchScript or torch.export file; null: "
        "random initialisation",
    )
    classes: OutputClasses | None = Field(
        None,
        description="class names of the outputs, for weights without class names: a list in order, a text file with "
        "one name per line, or cifar10, cifar100, imagenet-1k, imagenet-21k; or {mine: [theirs, ...]}, by name or "
        "index; null: the classes of the data, in their order",
    )
    new_head: bool = Field(
        False, description="accept a file with weights of other classes; `head` sets what is done then"
    )
    head: Literal["probe", "finetune", "zero_shot", "random", "none"] | None = Field(
        None,
        description="head of a network with weights of other classes: probe: logistic regression on frozen embeddings, "
        "for teachers; finetune: then all layers are trained, and val selects the better; random: trained with all "
        "layers; zero_shot: embeddings of texts, for teachers from open_clip; none: a teacher without classes, for "
        "methods on embeddings or maps; null: probe for teachers if it can be fitted, else random",
    )
    prompts: Prompts | None = Field(
        None,
        description="texts of head: zero_shot: templates with {} for the class name, or {class: [texts]}; null: "
        '"a photo of a {}."',
    )
    size: int | None = Field(
        None,
        ge=8,
        le=4096,
        description="height and width of this network's input in pixels; a teacher's views are cut from the original "
        "images; null: data.size",
    )
    mean: tuple[float, float, float] | None = Field(
        None, description="RGB mean of this network's images, in [0, 1], for a file without them; null: data.mean"
    )
    std: tuple[Positive, Positive, Positive] | None = Field(
        None, description="RGB standard deviation of this network's images; null: data.std"
    )
    precision: Literal["auto", "float32"] = Field(
        "auto", description="precision of a teacher; auto: bf16 if the hardware is fast in it and predictions agree"
    )
    training: dict[str, Any] = Field({}, description="overrides of the recipe's training settings")
    fallback: list["StageSettings"] = Field(
        [],
        description="changes of these settings, such as another model, one of which is made if the pretrained weights "
        "are neither on this machine nor can be downloaded: the first whose weights can be had",
    )


class TeachersSettings(BaseModel):
    """How the outputs of several teachers are combined."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    combine: Literal["logits", "probabilities"] = Field(
        "logits", description="what is averaged for methods that compare logits"
    )
    weights: list[float] | None = Field(
        None,
        description="one weight >= 0 for each teacher, for its logits and its feature terms; null: equal",
    )


Teachers = Annotated[
    Annotated[StageSettings, Tag(ONE)] | Annotated[list[StageSettings], Tag(SEVERAL)],
    Discriminator(lambda value: SEVERAL if isinstance(value, (list, tuple)) else ONE),
]


class Recipe(BaseModel):
    """Teacher, student, data, method and training of one run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME_PATTERN, description="name of the run folder, unless --name is given")
    description: str = Field("", description="one sentence for lists and reports")
    seed: int = Field(
        0,
        ge=0,
        le=2**32 - 1,
        description="seed of initialisation, order and dropout, and of augmentation if data.augmentation_seed is null",
    )
    seeds: int = Field(
        1,
        ge=1,
        le=1000,
        description="number of seeds: baseline and distilled are trained with seed, seed + 1, ...; the teacher once",
    )
    data: DataSettings = DataSettings()
    domain: DomainSettings | None = Field(None, description="domain adaptation to `data.target`; null: the defaults")
    teacher: Teachers | None = Field(None, description="one network or a list; null for methods without teacher")
    teachers: TeachersSettings = TeachersSettings()
    assistants: list[StageSettings] = Field(
        [],
        description="teacher assistants, each of which learns from the network before",
    )
    student: StageSettings
    born_again_generations: int = Field(
        1,
        ge=1,
        le=100,
        description="number of students in a row, each of which learns from the one before",
    )
    method: dict[str, Any] = Field(
        {"name": "kd"}, description="name and options, or a list of methods, each with a factor; see `potstill methods`"
    )
    previous: StageSettings | None = Field(
        None,
        description="the model in use: method pct around `method` keeps what it has right, and the report counts the "
        "images that it has right and the new student wrong; a run or model folder with the same classes",
    )
    teacher_below_baseline: Literal["warn", "stop"] = Field(
        "warn",
        description="if every teacher's top-1 on val is below the baseline's by more than chance explains (one-sided "
        "sign test, 5 %): train the distilled student after a warning, or stop without it",
    )
    curriculum: CurriculumSettings | None = Field(
        None, description="easy images first, in stages that distil; null: all images in every epoch"
    )
    feature_pairs: list[tuple[str, str]] | None = Field(
        None,
        description="pairs of layers that feature methods compare: [path in student, path in teacher]; null: found by "
        "depth",
    )
    train_predictions: bool = Field(
        False,
        description="write the predictions on train too if images x classes > 10 million; below, they are always "
        "written",
    )
    teacher_cache: TeacherCacheSettings = TeacherCacheSettings()
    training: TrainingSettings = TrainingSettings()
    tracker: list[LoggerSettings] = Field(
        [],
        description="loggers of the metrics: tensorboard, wandb, mlflow, trackio, or a list",
    )
    _auto: dict[str, Any] | None = PrivateAttr(None)  # ``method`` as it was given, if ``auto`` is in it

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

    def __eq__(self, other: object) -> bool:
        """Compare the settings alone: not whether ``auto`` chose the method."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment] # as of a model that can change

    def with_chosen_method(self, classes: int | None = None) -> Self:
        """Return the recipe with method ``auto`` chosen again: for its present networks, which may be other than when
        the recipe was read, and so many classes (None: not known yet).
        """
        if self._auto is None:
            return self
        value = self.model_dump() | {"method": copy.deepcopy(self._auto)}
        _choose_method(value, classes)
        return self.model_copy(update={"method": normalize_method(value["method"])})

    @property
    def teacher_list(self) -> tuple[StageSettings, ...]:
        """The teachers, as a tuple; empty if there is none."""
        if self.teacher is None:
            return ()
        return tuple(self.teacher) if isinstance(self.teacher, list) else (self.teacher,)

    @property
    def augmentation_seed(self) -> int:
        """The seed of the views: ``data.augmentation_seed``, or else ``seed``."""
        return self.seed if self.data.augmentation_seed is None else self.data.augmentation_seed

    @property
    def domain_settings(self) -> DomainSettings:
        """``domain``, or its defaults if it is null."""
        return self.domain or DomainSettings()

    def network(self, stage: str) -> StageSettings:
        """Return the network of a stage (see ``stage_names``) or of "student"."""
        if stage_role(stage) == "previous":
            assert self.previous is not None
            return self.previous
        several = {"teacher": self.teacher_list, "assistant": tuple(self.assistants)}.get(stage_role(stage))
        return self.student if several is None else several[stage_number(stage) - 1]

    def stage_training(self, stage: str) -> TrainingSettings:
        """Return the training settings of a stage: the shared ones, overridden by its own."""
        shared = self.training.model_dump()
        if stage_role(stage) in ("teacher", "previous", "assistant"):  # never deployed, so never quantized
            shared["qat_fraction"] = 0.0
        network = self.network(stage)
        settings = {**shared, **network.training}
        if settings["freeze_batch_norm"] == "auto":
            # The head was fitted to embeddings normalised by these statistics; those of small batches spoil it.
            settings["freeze_batch_norm"] = network.head == "finetune"
        return TrainingSettings.model_validate(settings)


def load_recipe(
    source: "str | Path | Mapping[str, Any]",
    overrides: Iterable[str] = (),
    *,
    flags: Mapping[str, Any] | None = None,
    data_needed: bool = True,
    recorded: bool = False,
) -> Recipe:
    """Read and check a recipe; flags override the file, and ``overrides`` override both.

    ``overrides`` are as after ``--set``; ``flags`` as in ``config.overrides.FLAGS``, None if not given;
    ``"--allow-code": True`` loads code that a recipe file names.  ``data_needed=False`` leaves ``data.source``
    unchecked. ``recorded``: of a run folder; code that it names is neither loaded nor refused, nor settings checked by
    it.

    UsageError: all problems, one per line, with file, line and column, or the flag.  DataError, ArtifactError: the
    recipe is valid, but its data or weights cannot be used.
    """
    if isinstance(overrides, str):  # whose characters would be taken for overrides
        raise UsageError(f"overrides must be a list or tuple of KEY=VALUE, got {overrides!r}: write ({overrides!r},)")
    document = Document("", copy.deepcopy(dict(source))) if isinstance(source, Mapping) else _read(source)
    value = document.value
    if not isinstance(value, dict):
        raise UsageError(f"{document.label}: a recipe must be a mapping; start from `potstill recipes quickstart`")
    value.setdefault("method", {"name": "kd"})  # so that --set method.alpha=0.9 has a method to change
    if isinstance(value.get("teacher_cache"), (str, bool)):  # so that --set teacher_cache.views=8 has a mapping
        value["teacher_cache"] = {"mode": value["teacher_cache"]}
        document.locations.move(("teacher_cache",), ("teacher_cache", "mode"))
    apply_overrides(document, flags or {}, overrides)
    for section in list(network_sections(value)):
        complete_fallbacks(section[1])
    resolve_code_paths(value, document.locations, Path() if isinstance(source, Mapping) else Path(source).parent)
    if recorded and any(find_code(value)):
        recipe, problems = parse_settings(value, Recipe)
        _raise_problems(document, problems, [])
        assert recipe is not None
        return recipe
    if not (flags or {}).get("--allow-code"):
        refuse_code_in_recipe(value, document.locations)
    permit_code(name for _, name in find_code(value))  # also in the model files of its run
    if "tracker" in value:  # so that a problem has a path in the list
        value["tracker"] = as_logger_list(value["tracker"])
    value.setdefault("name", _name_of(source))
    failures = fill_architectures(value, allow_code=bool((flags or {}).get("--allow-code")), recorded=recorded)
    failures += fill_class_names(value)
    given = copy.deepcopy(value["method"])
    chosen = _choose_method(value)
    no_source = isinstance(value.get("data"), dict) and value["data"].get("source", "") is None
    if no_source:
        value["data"]["source"] = "python"
    found = find_problems(value, Recipe)
    if no_source and data_needed:
        found.append((("data", "source"), DATA_MISSING))
    if data_needed and lacks_target(value):
        found.append((("data", "target"), TARGET_MISSING))
    if not no_source and data_needed and ("data", "val") not in dict(found):  # which it would repeat
        failures += _source_failure(value)
    _raise_problems(document, found, failures)
    recipe, problems = parse_settings(value, Recipe)
    assert recipe is not None, problems
    if chosen:
        recipe._auto = normalize_method(given)
    return recipe


def _choose_method(value: dict[str, Any], classes: int | None = None) -> bool:
    """Put, in place, what the networks call for into the method; return whether it was ``auto``."""
    chosen = choose_method(value, classes)
    drop_soft_targets(value)
    wrap_method_for_previous(value)
    return chosen


def list_recipes() -> dict[str, Path]:
    """Return the paths of the recipes that ship with potstill, by name."""
    folder = Path(str(resources.files("potstill") / "recipes"))
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return dict(sorted(found.items(), key=lambda item: ("/" in item[0], item[0])))  # recipes in folders come last


def dump_recipe(recipe: Recipe) -> str:
    """Return the complete recipe, defaults included, as YAML that ``load_recipe`` reads."""
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
        raise UsageError(f"{label}: not a UTF-8 text file") from error
    if len(content) > MAX_BYTES:
        raise UsageError(f"{label}: too large for a recipe: more than {MAX_BYTES:,} bytes")
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
    """Raise one error with all problems: a UsageError, unless there are only failures, all of one class."""
    kinds = {type(error) for _, error in failures}
    lines = [(document.locations.find(path), str(problem)) for path, problem in [*found, *failures]]
    texts = document.problems + [f"{location}: {problem}" if location else problem for location, problem in lines]
    if texts and len(texts) == len(failures) and len(kinds) == 1:
        raise kinds.pop()("\n".join(texts))
    if texts:
        raise UsageError("\n".join(sorted(texts, key=lambda text: _reading_order(text, document.label))))


def _reading_order(text: str, label: str) -> tuple[int, int, int]:
    """Return a sort key: the file from top to bottom, then the flags."""
    position = re.match(r":(\d+):(\d+): ", text.removeprefix(label)) if label and text.startswith(label) else None
    return (0, int(position[1]), int(position[2])) if position else (1, 0, 0)


_CODE = {"type": "string", "pattern": r":[A-Za-z_]\w*$"}  # package.module:Class, path/file.py:Class
_WEIGHTED: Schema = {"$ref": "#/$defs/WeightedMethod"}
_AUTO: Schema = {
    "type": "object",
    "properties": {"name": {"const": "auto", "description": "srd, dist or kd, by the networks; see docs/recipes.md"}},
    "required": ["name"],
}


def recipe_schema() -> Schema:
    """Return the schema (dialect 2020-12); methods of other installed packages are loaded and included."""
    schema = Recipe.model_json_schema()
    definitions, keys = schema["$defs"], schema["properties"]
    schema |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "potstill recipe"}
    schema["required"] = [key for key in schema["required"] if key != "name"]  # default: the file's name
    definitions |= _method_definitions()
    keys["method"] = {
        "description": keys["method"]["description"],
        "default": {"name": "kd"},
        "anyOf": [METHOD_SCHEMA, {"type": "array", "minItems": 2, "items": _WEIGHTED}, _AUTO],
    }
    source = definitions["DataSettings"]["properties"]["source"]
    source["type"] = [source["type"], "null"]  # null: given with --data
    stage = definitions["StageSettings"]
    stage["required"] = [key for key in stage["required"] if key != "model"]  # default: that of the weights
    stage["anyOf"] = [{"required": ["model"]}, {"required": ["weights"]}]
    stage["properties"]["classes"].setdefault("anyOf", []).append({"type": "string"})  # a file
    stage["properties"]["fallback"]["items"] = {"$ref": "#/$defs/StageSettings"}
    stage["properties"]["training"] |= {"$ref": "#/$defs/TrainingSettings"}
    modes = definitions["TeacherCacheSettings"]["properties"]["mode"]["enum"]
    keys["teacher_cache"] = {"anyOf": [{"$ref": "#/$defs/TeacherCacheSettings"}, {"enum": [*modes, False]}]}
    names = definitions["LoggerSettings"]["properties"]["name"]
    logger: Schema = {"anyOf": [{"$ref": "#/$defs/LoggerSettings"}, names]}
    keys["tracker"] = {
        "description": keys["tracker"]["description"],
        "anyOf": [{"type": "array", "items": logger}, *logger["anyOf"], {"type": "null"}],
    }
    return schema


def _method_definitions() -> dict[str, Schema]:
    """Return a definition for each method, and one that selects among them by name."""
    found = [info for name in list_methods() if (info := _loadable(name)) is not None]
    choice: Schema = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"anyOf": [{"enum": [info.name for info in found]}, _CODE]}},
        # Not oneOf: its error for an unknown option would list every method.
        "allOf": [
            {
                "if": {"properties": {"name": {"const": info.name}}, "required": ["name"]},
                "then": {"$ref": f"#/$defs/method_{info.name}"},
            }
            for info in found
        ],
    }
    shape = {field.name: json_schema(get_type_hints(Schedule)[field.name]) for field in fields(Schedule)}
    schedules = {"type": "object", "properties": shape, "additionalProperties": False}
    return {
        "Method": {**choice, "not": {"required": ["factor"]}},
        "WeightedMethod": choice,
        "Schedules": {"type": "object", "additionalProperties": schedules},
        **{f"method_{info.name}": _method_schema(info) for info in found},
    }


def _method_schema(info: MethodInfo) -> Schema:
    options = {key: {**_weighted(each.schema), "description": each.doc} for key, each in info.options.items()}
    for key, each in info.options.items():
        if each.default is not REQUIRED:
            options[key]["default"] = each.default
    filled = {key for preset in info.presets.values() for key in preset}
    return {
        "type": "object",
        "description": info.summary,
        "properties": {
            "name": {"const": info.name},
            **options,
            **({"preset": {"enum": list(info.presets), "description": "the authors' options"}} if info.presets else {}),
            "schedule": {"$ref": "#/$defs/Schedules", "description": "options and weights that change during training"},
            "scaling": {
                **SCALING_SCHEMA,
                "description": "whether the teacher's terms are bounded by those of the labels",
            },
            "factor": {**WEIGHT_SCHEMA, "default": 1.0, "description": "weight of all its terms, in a list of methods"},
        },
        "required": ["name", *(key for key in info.examples if key not in filled)],
        "additionalProperties": False,
    }


def _weighted(schema: Schema) -> Schema:
    """Return the schema of an option; methods in a list may each have a factor."""
    return {**schema, "items": _WEIGHTED} if schema.get("items") == METHOD_SCHEMA else schema


def _loadable(name: str) -> MethodInfo | None:
    try:
        return method_info(name)
    except UsageError:  # a broken package does not affect the other methods
        return None
