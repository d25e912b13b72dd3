"""Where a network comes from before this run trains it: new, or ready-made with the same classes."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from potstill.data.value_range import Range, shown
from potstill.errors import ArtifactError, UsageError
from potstill.experiments.recipe import Recipe, StageSettings
from potstill.experiments.run_folder import find_model
from potstill.inputs import InputSpec
from potstill.models.create import create_model
from potstill.models.input_spec import input_spec
from potstill.models.model_file import load_model
from potstill.models.weights import load_for_classes, load_weights


@dataclass
class Start:
    """A network before this run trains it."""

    module: nn.Module
    architecture: str
    input: InputSpec
    ready: bool  # it knows these classes already: a teacher needs no training
    facts: dict[str, Any] = field(default_factory=dict)  # where its weights come from
    remodelled: dict[str, Any] | None = None  # of a model file whose network a method has changed
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # a head that starts anew


def start_network(recipe: Recipe, network: StageSettings, classes: tuple[str, ...], ends: Range | None = None) -> Start:
    """A new network, or one that starts from ``network.weights``.

    The global random generator decides the initialisation.

    Args:
        recipe: of the run.
        network: which of its networks.
        classes: of the data, in order.
        ends: the data's range, by which images of more than 8 bits are read; None: it has none.

    Raises:
        ArtifactError: weights of other classes where no new head was asked for, or of another range; damaged or
            foreign files.
        UsageError: pretrained weights that cannot be had.
    """
    start = _started(recipe, network, classes)
    own = start.input.range
    if ends is None or own == ends:
        return start
    if own is not None:
        raise ArtifactError(
            f"{network.weights} was trained on images of more than 8 bits read by the range {shown(own)}, and this "
            f"data is read by {shown(ends)}: the same gray would be another one.\n"
            f"Set data.range=[{own[0]:.10g},{own[1]:.10g}], or train the network on this data"
        )
    start.input = replace(start.input, range=ends)
    return start


def _started(recipe: Recipe, network: StageSettings, classes: tuple[str, ...]) -> Start:
    """As ``start_network``, before the range of the data is known.

    Raises:
        ArtifactError: weights of other classes where no new head was asked for; damaged or foreign files.
        UsageError: pretrained weights that cannot be had; class names that do not fit weights or data.
    """
    size = network.size or recipe.data.size
    if network.weights is None:
        module = create_model(network.model, len(classes), size=size)
        return Start(module, network.model, _spec(recipe, network), ready=False)
    key = _key(recipe, network)
    if network.weights != "pretrained" and _is_ours(Path(network.weights)):
        if network.classes is not None:
            raise UsageError(f"{key}.classes is for weights without class names; {network.weights} has its own")
        return _from_our_model(Path(network.weights), network, classes, key)
    if network.classes is not None:
        setting = f"{key}.classes"
        loaded = load_for_classes(network.model, network.weights, network.classes, classes, size=size, key=setting)
        facts = {"weights": network.weights, "classes": network.classes}
        spec = _spec(recipe, network)
        return Start(loaded.module, network.model, spec, ready=True, facts=facts, notes=loaded.notes)
    loaded = load_weights(network.model, network.weights, len(classes), size=size)
    if loaded.new_head and network.weights != "pretrained" and not network.new_head:
        raise ArtifactError(
            f"{network.weights} was trained on another number of classes than the {len(classes)} of this data.\n"
            f"To train it on with a new head, set {_key(recipe, network)}.new_head=true"
        )
    start = Start(
        loaded.module,
        network.model,
        _spec(recipe, network),
        ready=not loaded.new_head,
        facts={"weights": network.weights},
    )
    if loaded.new_head:
        start.warnings += loaded.notes
    else:
        start.notes += [
            *loaded.notes,
            f"{network.weights} carries no class names: its outputs are taken to be, in this order, {_list(classes)}; "
            f"{key}.classes names another order",
        ]
    return start


def _from_our_model(path: Path, network: StageSettings, classes: tuple[str, ...], key: str) -> Start:
    model = load_model(find_model(path))
    facts = {"weights": str(path)}
    if model.class_names == classes:
        if network.size not in (None, model.input.size):
            raise ArtifactError(
                f"{path} takes images of {model.input.size} px, and the recipe says size: {network.size}"
            )
        return Start(
            model.module, model.architecture, model.input, ready=True, facts=facts, remodelled=model.remodelled
        )
    if model.remodelled is not None:
        name = model.remodelled.get("name")
        raise ArtifactError(f"{path} is a remodelled network ({name}), whose head cannot start anew for other classes")
    if not network.new_head:
        raise ArtifactError(
            f"{path} knows other classes than this data, or the same in another order.\n"
            f"It knows {len(model.class_names)}: {_list(model.class_names)}\n"
            f"The data has {len(classes)}: {_list(classes)}\n"
            f"Use data with the same class names, or train it on with a new head: {key}.new_head=true"
        )
    warning = f"{path} gets a NEW HEAD of {len(classes)} classes, randomly initialised; its other weights stay"
    module = create_model(model.architecture, len(classes), size=model.input.size)
    own = module.state_dict()
    kept = {key: value for key, value in model.module.state_dict().items() if own[key].shape == value.shape}
    head = _head_keys(model.module, module, len(model.class_names) == len(classes))
    module.load_state_dict({key: value for key, value in kept.items() if key not in head}, strict=False)
    return Start(module, model.architecture, model.input, ready=False, facts=facts, warnings=[warning])


def _spec(recipe: Recipe, network: StageSettings) -> InputSpec:
    """How the network wants its images; published weights know one normalisation, others take the recipe's."""
    data = recipe.data
    spec = input_spec(network.model, network.size or data.size, data.resize_mode)
    if network.weights == "pretrained":
        return spec
    return replace(spec, mean=data.mean or spec.mean, std=data.std or spec.std)


def _head_keys(old: nn.Module, new: nn.Module, same_size: bool) -> set[str]:
    """Parameters of the last linear layer, which equal shapes alone would carry over to other classes."""
    if not same_size:
        return set()
    last = [name for name, module in new.named_modules() if isinstance(module, nn.Linear)][-1:]
    return {f"{name}.{part}" for name in last for part in ("weight", "bias")}


def _key(recipe: Recipe, network: StageSettings) -> str:
    """How ``--set`` names a network of the recipe: "teacher", "teacher.1", "student"."""
    several = [("assistants", recipe.assistants)]
    if isinstance(recipe.teacher, list):
        several.append(("teacher", recipe.teacher))
    found = (f"{key}.{at}" for key, networks in several for at, each in enumerate(networks) if each is network)
    return next(found, "teacher" if network is recipe.teacher else "student")


def _is_ours(path: Path) -> bool:
    try:
        return (find_model(path) / "model.json").is_file()
    except ArtifactError:
        return False


def _list(names: tuple[str, ...], most: int = 12) -> str:
    shown = ", ".join(names[:most])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > most else shown
