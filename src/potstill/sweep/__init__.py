"""Search space of a sweep: ``--search KEY=a,b,c`` and ``--search KEY=low..high[:log]``, checked against the recipe."""

import contextlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from potstill.config.recipe import Recipe, load_recipe
from potstill.config.yaml import parse_yaml
from potstill.errors import PotstillError, UsageError
from potstill.experiment.resume import flatten_settings
from potstill.methods import METHOD_SETTINGS, method_info

METHOD = "method.name"
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(:.*)?")
# All trials share one teacher, one metric and one val split.
_NOT_SEARCHABLE = (
    "name",
    "description",
    "seed",
    "seeds",
    "teacher",
    "data.source",
    "data.options",
    "data.target",
    "data.target_options",
    "data.target_labels",
    "data.val",
    "data.test",
    "data.split_seed",
    "teacher_cache",
    "training.selection_metric",
    "training.evaluate_test_every_epoch",
    "student.training.selection_metric",
    "student.training.evaluate_test_every_epoch",
)
_DISTILLATION_ONLY = (
    "method",
    "teachers",
    "assistants",
    "born_again_generations",
    "curriculum",
    "feature_pairs",
    "domain",
)


@dataclass(frozen=True)
class Dimension:
    """A key with its ``choices`` (YAML texts) or range."""

    key: str  # as after ``--set``
    choices: tuple[str, ...] = ()  # empty for a range
    low: float = 0.0  # of a range; included
    high: float = 0.0  # of a range; included
    log: bool = False  # whether the range is searched on a logarithmic scale
    whole: bool = False  # whether only integers are tried

    def __str__(self) -> str:
        if self.choices:
            return f"{self.key}={','.join(self.choices)}"
        return f"{self.key}={self.low:g}..{self.high:g}{':log' if self.log else ''}"

    def facts(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self) | {"choices": list(self.choices)}


@dataclass(frozen=True)
class Space:
    """All dimensions; a method's options apply only to methods that have them."""

    dimensions: tuple[Dimension, ...]
    base_method: str

    @property
    def listed(self) -> bool:
        """Whether every dimension is a list, so that there is a finite number of combinations."""
        return all(dimension.choices for dimension in self.dimensions)

    def active(self, dimension: Dimension, chosen: Mapping[str, Any]) -> bool:
        """Return whether a dimension applies to the values chosen before it."""
        key = dimension.key
        if key == METHOD or not key.startswith("method.") or key.count(".") > 1:
            return True
        return _has_option(str(chosen.get(METHOD, self.base_method)), key.removeprefix("method."))

    def grid(self) -> list[dict[str, str]]:
        """Return every combination once, without options that its method does not have."""
        found: dict[tuple[tuple[str, str], ...], None] = {}
        for values in itertools.product(*(dimension.choices for dimension in self.dimensions)):
            chosen = dict(zip((dimension.key for dimension in self.dimensions), values, strict=True))
            active = {each.key: chosen[each.key] for each in self.dimensions if self.active(each, chosen)}
            found[tuple(active.items())] = None
        return [dict(items) for items in found]


def parse_space(texts: Sequence[str], source: Any, sets: Sequence[str], flags: Mapping[str, Any]) -> Space:
    """Parse ``--search`` texts; each value is validated in the recipe by itself."""
    if not texts:
        raise UsageError(
            "a sweep needs something to vary: --search method.temperature=1,2,4 or --search method.alpha=0..1"
        )
    base = load_recipe(source, sets, flags=flags)
    refuse_test_curves(base)
    dimensions = [read_dimension(text) for text in texts]
    keys = [dimension.key for dimension in dimensions]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise UsageError(f"--search names {', '.join(twice)} twice; list all its values in one")
    dimensions.sort(key=lambda dimension: dimension.key != METHOD)  # its options depend on it
    base_method = _base_method(dimensions, base, source, sets, flags)
    methods = next((d.choices for d in dimensions if d.key == METHOD), (base_method,))
    found, problems = [], list[str]()
    for dimension in dimensions:
        try:
            found.append(_validate(dimension, source, sets, flags, methods))
        except PotstillError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
    return Space(tuple(found), base_method)


def _base_method(
    dimensions: Sequence[Dimension], base: Recipe, source: Any, sets: Sequence[str], flags: Mapping[str, Any]
) -> str:
    """Return the name of the recipe's method; ``auto`` chooses it by the options that are searched as well."""
    options = [d for d in dimensions if d.key.startswith("method.") and d.key != METHOD]
    searched = [f"{d.key}={d.choices[0] if d.choices else int(d.low) if d.whole else d.low}" for d in options]
    with contextlib.suppress(PotstillError):  # what is wrong with them is reported where they are validated
        base = load_recipe(source, [*sets, *searched], flags=flags)
    return str(base.method["name"])


def read_dimension(text: str) -> Dimension:
    """Parse ``KEY=a,b`` or ``KEY=low..high[:log]``, without validating it in a recipe.

    Example:
        >>> read_dimension("method.temperature=1,2").choices
        ('1', '2')
        >>> str(read_dimension("training.lr=1e-4..1e-1:log"))
        'training.lr=0.0001..0.1:log'
    """
    key, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not values or not all(key.split(".")):
        raise UsageError(
            f"--search {text}: write it as KEY=a,b,c or KEY=low..high, e.g. --search method.temperature=1,2,4"
        )
    match = _RANGE.fullmatch(values)
    if match is None:
        choices = tuple(dict.fromkeys(_split(values)))
        if not all(choices):
            raise UsageError(f"--search {text}: there is nothing between two commas")
        return Dimension(key, choices)
    low, high, suffix = float(match[1]), float(match[2]), match[3]
    if suffix not in (None, ":log"):
        raise UsageError(f"--search {text}: after a range there may be :log, got {suffix!r}")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(f"--search {text}: a range goes from a smaller to a larger number")
    if suffix and low <= 0:
        raise UsageError(f"--search {text}: a logarithmic range begins above 0")
    whole = all(re.fullmatch(r"[-+]?\d+", match[at]) for at in (1, 2))
    return Dimension(key, low=low, high=high, log=bool(suffix), whole=whole)


def baseline_space(space: Space, recipe: Recipe, trials: int) -> Space:
    """Return the search space of the baseline for a search of ``trials`` trials over ``space``.

    It has the dimensions that apply to training on labels alone.  If these have fewer combinations than there are
    trials, its learning rate is searched too (a quarter to four times the recipe's), or else its weight decay.
    """
    own = [each for each in space.dimensions if each.key.partition(".")[0] not in _DISTILLATION_ONLY]
    if all(each.choices for each in own) and math.prod(len(each.choices) for each in own) < trials:
        training = recipe.stage_training("baseline")
        keys = {each.key.rpartition(".")[2] for each in own}
        if "lr" not in keys:
            own.append(Dimension("student.training.lr", low=training.lr / 4, high=training.lr * 4, log=True))
        elif "weight_decay" not in keys:
            middle = training.weight_decay or 1e-4
            own.append(Dimension("student.training.weight_decay", low=middle / 10, high=middle * 10, log=True))
    return Space(tuple(own), space.base_method)


def recipe_values(space: Space, recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's own value of each setting of the training, for Optuna, if it is one of the space.

    Example:
        >>> recipe = load_recipe("quickstart", ["training.lr=0.01"])
        >>> texts = ("student.training.lr=1e-2,1e-1", "training.weight_decay=0..1", "training.batch_size=8,16")
        >>> recipe_values(Space(tuple(map(read_dimension, texts)), "kd"), recipe)
        {'student.training.lr': '1e-2', 'training.weight_decay': 0.0001}
    """
    training = flatten_settings(recipe.stage_training("baseline").model_dump(mode="json"))
    found: dict[str, Any] = {}
    for each in space.dimensions:
        section, _, key = each.key.partition("training.")
        value = training.get(key) if section in ("", "student.") else None
        if not each.choices and isinstance(value, int | float) and each.low <= value <= each.high:
            found[each.key] = value
        found |= {each.key: text for text in each.choices if parse_yaml(text, each.key).value == value}
    return found


def _validate(
    dimension: Dimension, source: Any, sets: Sequence[str], flags: Mapping[str, Any], methods: Sequence[str]
) -> Dimension:
    """Return the dimension with ``whole`` as in the recipe."""
    key = dimension.key
    if any(key == each or key.startswith(f"{each}.") for each in _NOT_SEARCHABLE):
        raise UsageError(
            f"--search {key}: all trials share teacher, data, seed and measure, so this cannot be varied; use --set"
        )
    if key.startswith("method.") and key != METHOD and key.count(".") == 1:
        option = key.removeprefix("method.")
        methods = [name for name in methods if _has_option(name, option)] or methods[:1]
        prefixes = [[f"{METHOD}={name}"] for name in methods]
    else:
        prefixes = [[]]

    def attempt(text: str) -> None:
        for extra in prefixes:
            _try_value(
                source, [*sets, *_without_default(extra, source, sets, flags), f"{key}={text}"], flags, key, text
            )

    if dimension.choices:
        for text in dimension.choices:
            attempt(text)
        return dimension
    whole = dimension.whole
    if whole:  # 0..1 of a fraction includes all numbers between; 1..9 of a count does not
        try:
            attempt(repr(dimension.low + 0.37 * (dimension.high - dimension.low)))
            whole = False
        except PotstillError:
            pass
    for end in (dimension.low, dimension.high):
        attempt(str(int(end)) if whole else repr(end))
    return Dimension(key, (), dimension.low, dimension.high, dimension.log, whole)


def _without_default(extra: list[str], source: Any, sets: Sequence[str], flags: Mapping[str, Any]) -> list[str]:
    """Keep the options of the recipe's method if a choice names the same one."""
    base = load_recipe(source, sets, flags=flags)
    return [text for text in extra if text != f"{METHOD}={base.method['name']}"]


def _try_value(source: Any, sets: list[str], flags: Mapping[str, Any], key: str, text: str) -> None:
    try:
        load_recipe(source, sets, flags=flags)
    except PotstillError as error:
        raise type(error)(str(error).replace(f"--set {key}={text}", f"--search {key}={text}")) from error


def _has_option(method: str, option: str) -> bool:
    try:
        return option in (*method_info(method).options, *METHOD_SETTINGS)
    except UsageError:
        return True  # an unknown method is reported by the check of its name


def refuse_test_curves(recipe: Recipe) -> None:
    """Raise UsageError if the trainings of a search would be evaluated on test, or have several seeds each."""
    if recipe.stage_training("student").evaluate_test_every_epoch:
        raise UsageError(
            "training.evaluate_test_every_epoch: a sweep evaluates only the best trial on test; set it to false"
        )
    if recipe.data.folds is not None and recipe.data.fold is None:
        raise UsageError(
            "data.folds (--folds): a sweep trains each trial once; name one fold with data.fold, or leave it out and "
            "run the best trial's recipe with --folds"
        )
    if recipe.seeds > 1:
        raise UsageError(f"seeds: a sweep trains each trial with one seed, and the recipe has seeds: {recipe.seeds}")


def _split(values: str) -> Iterator[str]:
    """Split at commas outside of brackets and quotes."""
    depth, quote, part = 0, "", ""
    for letter in values:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        if letter == "," and depth == 0 and not quote:
            yield part.strip()
            part = ""
        else:
            part += letter
    yield part.strip()
