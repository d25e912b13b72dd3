"""Build the parts of a stage from the recipe: networks (new or with weights), loaders, and the Distiller."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from potstill.code_references import is_permitted, permit_code
from potstill.config import stage_role
from potstill.config.overrides import WITHOUT_FILE
from potstill.config.recipe import Recipe, StageSettings
from potstill.data.image_io import ValueRange, format_range
from potstill.data.image_sets import FileSet, ImageSet
from potstill.data.loader import Loader
from potstill.data.splits import NO_CLASSES, DataSplits
from potstill.distillation.distiller import Distiller
from potstill.distillation.teachers import TeacherViews
from potstill.errors import ArtifactError, UsageError, did_you_mean
from potstill.evaluation.cost import known_parameters
from potstill.experiment.plan import PlannedStage, derive_seed
from potstill.experiment.run_folder import find_model
from potstill.features.stages import find_stages
from potstill.features.student_surgery import ExpandedStage, ModifiedStudent
from potstill.formatting import format_columns, format_names
from potstill.hub import model_path
from potstill.input_spec import InputSpec, Triple
from potstill.io import sha256_hex
from potstill.methods import describe_method, list_classless_methods
from potstill.methods.base import Method
from potstill.methods.requirements import Requirements
from potstill.models.answer_tables import read_answers
from potstill.models.class_names import OutputNames, class_list, lists_with
from potstill.models.exported_files import LABELS
from potstill.models.factory import (
    OWN_WEIGHTS,
    LoadedModel,
    count_outputs,
    create_model,
    group_outputs,
    load_for_classes,
    load_weights,
    load_zero_shot,
    output_groups,
)
from potstill.models.families import opaque_models
from potstill.models.families.opaque_models import (
    FileNetwork,
    TableNetwork,
    clear_head,
    example_answers,
    find_opaque,
    find_table,
)
from potstill.models.families.own_models import GIVEN, given_input
from potstill.models.model_file import Classifier, load_model, predicts_classes
from potstill.models.output_groups import OutputGroups
from potstill.models.pruning import Widths, cut_channels
from potstill.models.registry import build_model, input_spec, own_size, resolve
from potstill.models.state_dict import read_class_names
from potstill.training.callbacks import Observer, SilentObserver
from potstill.training.devices import Compute
from potstill.training.settings import TrainingSettings


@dataclass
class InitialNetwork:
    """A network before training."""

    module: nn.Module
    architecture: str
    input: InputSpec
    ready: bool  # its head is for these classes, so that a teacher needs no training
    facts: dict[str, Any] = field(default_factory=dict)  # the source of its weights
    remodelled: dict[str, Any] | None = None  # from a model file, if a method has changed its layers
    output_groups: OutputGroups | None = None  # if several outputs belong to one class
    pruned: Widths | None = None  # from a model file, if channels were removed
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # such as a randomly initialised head


def build_network(
    recipe: Recipe, network: StageSettings, classes: tuple[str, ...], value_range: ValueRange | None = None
) -> InitialNetwork:
    """Return a new network, drawn from torch's global generator, or one with the weights of ``network.weights``.

    For ``NO_CLASSES`` it gets a head that stays 0 and is not trained.
    """
    start = _build_network(recipe, network, classes)
    if network.head == "none" or classes == NO_CLASSES:
        _take_classes_away(start, network_key(recipe, network))
    own = start.input.range
    if value_range is None or own == value_range:
        return start
    if own is not None:
        raise ArtifactError(
            f"{network.weights} was trained with data.range {format_range(own)}, but this data has the range "
            f"{format_range(value_range)}.\n"
            f"Set data.range=[{own[0]:.10g},{own[1]:.10g}], or train the network on this data"
        )
    start.input = replace(start.input, range=value_range)
    return start


def _take_classes_away(start: InitialNetwork, key: str) -> None:
    """Set the head of a network to 0 and freeze it, so that only its embeddings and maps teach or are trained."""
    if find_opaque(start.module) is None:
        example = torch.randn(2, 3, start.input.size, start.input.size, generator=torch.Generator().manual_seed(0))
        path = find_stages(start.module, example).head
        if path is None:
            other = "a function of images that returns embeddings, or " if key.startswith("teacher") else ""
            raise UsageError(
                f"{key}: without classes, the embedding in front of the last linear layer counts, and "
                f"{start.architecture} has none: give {other}another network"
            )
        head = start.module.get_submodule(path)
        assert isinstance(head, nn.Linear)  # see ``find_head``
        clear_head(head).requires_grad_(False)
    start.ready, start.warnings = True, []
    start.notes = [note for note in start.notes if "px" in note]
    start.facts["head"] = {"kind": "none"}


def _build_network(recipe: Recipe, network: StageSettings, classes: tuple[str, ...]) -> InitialNetwork:
    """Do as ``build_network``, but for the range."""
    size = _size(recipe, network)
    is_saved = network.weights not in (None, *WITHOUT_FILE) and _is_potstill_model(model_path(network.weights))
    if opaque_models.is_model(network.model) and not is_saved:
        return _from_other_program(recipe, network, classes)
    if network.weights is None:
        module = create_model(network.model, len(classes), size=size)
        if find_opaque(module) is not None:
            raise UsageError(
                f"{network_key(recipe, network)}: {network.model} is a function of images, which cannot be trained: it "
                "can be a teacher"
            )
        return InitialNetwork(module, network.model, network_spec(recipe, network), ready=False)
    key = network_key(recipe, network)
    if network.head == "zero_shot":
        return _build_zero_shot(recipe, network, classes, key)
    if network.head == "none" and network.weights == OWN_WEIGHTS:
        module = build_model(network.model, len(classes), size=size)
        if (function := find_opaque(module)) is not None:
            function.add_head(function.examine(size), len(classes))
            spec = network_spec(recipe, network)
            return InitialNetwork(module.eval(), network.model, spec, ready=True, facts=_file_facts(network))
    if is_saved:
        if network.classes is not None:
            raise UsageError(f"{key}.classes is for weights without class names; {network.weights} has its own")
        if network.mean is not None or network.std is not None:
            raise UsageError(f"{key}.mean and {key}.std are for files without them; {network.weights} has its own")
        return _from_model_file(model_path(network.weights), network, classes, key)
    theirs, setting = network.classes, f"{key}.classes"
    if theirs is None and network.weights not in WITHOUT_FILE and network.head != "none":
        theirs, setting = _published_names(model_path(network.weights), classes), f"config.json of {network.weights}"
    if theirs is not None:
        loaded = load_for_classes(network.model, network.weights, theirs, classes, size=size, key=setting)
        facts = {"weights": network.weights, "classes": theirs}
        spec = network_spec(recipe, network, loaded.normalisation)
        start = InitialNetwork(loaded.module, network.model, spec, ready=True, facts=facts, notes=loaded.notes)
        start.output_groups = loaded.output_groups
        return start
    loaded = load_weights(network.model, network.weights, len(classes), size=size)
    new_head = network.new_head or network.head is not None
    if loaded.new_head and network.weights not in WITHOUT_FILE and not new_head:
        outputs = count_outputs(network.model, network.weights, size=size)
        raise ArtifactError(
            f"{network.weights} has {outputs:,} outputs, and this data {len(classes):,} classes.\n"
            "If its classes include these, give the class of each output, in order: "
            f"--set {key}.classes={_likely_classes(classes)}; to train it with a new head: "
            f"--set {_new_head_setting(key)}"
        )
    start = InitialNetwork(
        loaded.module,
        network.model,
        network_spec(recipe, network, loaded.normalisation),
        ready=not loaded.new_head,
        facts={"weights": network.weights},
    )
    if network.weights == "pretrained" and network.size is None and key.startswith("teacher"):
        start.notes += _resolution_notes(network.model, size, key)
    if loaded.new_head:
        start.warnings += loaded.notes if _has_random_head(network, key) else []
        if (found := lists_with(classes)) and not network.model.startswith("open_clip/"):  # which has no classes
            start.notes.append(
                f"all classes of this data are classes of {found[0]}: if the outputs of {network.weights} are "
                f"those, {key}.classes={found[0]} keeps the head, and no training is needed"
            )
    else:
        weights = network.model if network.weights in WITHOUT_FILE else network.weights
        start.notes += [
            *loaded.notes,
            f"{weights} has no class names: its outputs are assumed to be, in this order, "
            f"{format_names(classes, 12)}; {key}.classes gives another order",
        ]
    return start


def _has_random_head(network: StageSettings, key: str) -> bool:
    """Return whether a new head stays random: none is fitted, not even by default, as in a teacher."""
    return network.head == "random" or (network.head is None and not key.startswith("teacher"))


def _new_head_setting(key: str) -> str:
    """Return the setting that accepts weights of other classes."""
    return f"{key}.head=probe" if key.startswith("teacher") else f"{key}.new_head=true"


def _size(recipe: Recipe, network: StageSettings) -> int:
    """Return the size of a network's images: nothing is fitted to another than its own in a zero-shot network."""
    return network.size or (own_size(network.model) if network.head == "zero_shot" else recipe.data.size)


DEFAULT_PROMPT = "a photo of a {}."


def _build_zero_shot(recipe: Recipe, network: StageSettings, classes: tuple[str, ...], key: str) -> InitialNetwork:
    assert network.weights is not None
    if network.weights != "pretrained" and _is_potstill_model(model_path(network.weights)):
        raise UsageError(
            f"{key}.head: {network.weights} was saved without text tower: leave {key}.head out if it has these "
            "classes, use head: probe, or give the checkpoint of open_clip"
        )
    given = network.prompts or [DEFAULT_PROMPT]
    prompts = _class_prompts(given, classes, f"{key}.prompts")
    module, scale = load_zero_shot(network.model, network.weights, prompts, size=_size(recipe, network))
    texts = [text for each in prompts.values() for text in each]
    head = {"kind": "zero_shot", "prompts": given, "texts": len(texts), **scale}
    facts = {"weights": network.weights, "head": head}
    start = InitialNetwork(module, network.model, network_spec(recipe, network), ready=True, facts=facts)
    start.notes.append(
        f"{key}: its head is made of {len(texts):,} texts for {len(classes):,} classes, such as {texts[0]!r}"
    )
    return start


def _class_prompts(
    prompts: list[str] | dict[str, list[str]], classes: tuple[str, ...], key: str
) -> dict[str, list[str]]:
    """Return the texts of each class; ``{}`` stands for its name, with spaces for underscores."""
    if isinstance(prompts, list):
        prompts = dict.fromkeys(classes, prompts)
    missing = [name for name in classes if name not in prompts]
    unknown = [name for name in prompts if name not in classes]
    if missing or unknown:
        problems = [f"has no prompts for {format_names(missing, 12)}"] if missing else []
        problems += [f"has prompts for {format_names(unknown, 12)}, of which the data has no images"] if unknown else []
        near = did_you_mean(unknown[0], missing or classes) if unknown else ""
        raise UsageError(
            f"{key} {' and '.join(problems)}{near}\n"
            f"It must name every class of this data: {format_names(classes, 12)}; or give templates for all, such as "
            f'["{DEFAULT_PROMPT}"]'
        )
    return {name: [text.replace("{}", name.replace("_", " ")) for text in prompts[name]] for name in classes}


def _published_names(weights: Path, ours: tuple[str, ...]) -> list[str] | None:
    """Return the class names beside weights from the Hugging Face hub; None if a class of the data is missing."""
    names = read_class_names(weights.expanduser())
    if names is None or len(set(names)) < len(names):
        return None
    known = OutputNames(names)
    return list(names) if all(len(known.find(name)) == 1 for name in ours) else None


def _likely_classes(classes: tuple[str, ...]) -> str:
    """Return a value of ``teacher.classes`` that may fit this data."""
    return next(iter(lists_with(classes)), "FILE")


def _resolution_notes(architecture: str, size: int, key: str) -> list[str]:
    """Return a note if a pretrained teacher sees fewer pixels than its weights were trained on."""
    family, bare = resolve(architecture)
    own = family.own_size(bare)
    if own is None or own <= size:
        return []
    return [
        f"{architecture} was trained on {own} px and sees {size} px, like its student: --set {key}.size={own} "
        f"gives it more of the original pixels, for about {(own / size) ** 2:.0f} times the computation"
    ]


def _from_other_program(recipe: Recipe, network: StageSettings, classes: tuple[str, ...]) -> InitialNetwork:
    key, source = network_key(recipe, network), str(network.weights)
    label = LABELS[network.model]
    if not key.startswith("teacher"):
        raise UsageError(f"{key}: {source} is {label}, which cannot be trained: it can be a teacher")
    if network.new_head or network.head not in (None, "none"):
        raise UsageError(f"{key}: {source} is {label}, which cannot be trained: leave new_head and head out")
    if network.model == "table":
        return _from_table(recipe, network, classes)
    module = FileNetwork.read(network.model, Path(source).expanduser())
    size = network.size or module.fixed_size
    if size is None:
        raise UsageError(f"{source} does not say the size of its images in pixels: add --set {key}.size=224, or yours")
    if module.fixed_size not in (None, size):
        raise ArtifactError(f"{source} takes images of {module.fixed_size} px, but {key}.size is {network.size}")
    mean, std = module.normalisation or (None, None)
    mean, std = network.mean or mean, network.std or std
    if mean is None or std is None:
        raise UsageError(
            f"{source} does not say how its images are normalised: add the mean and standard deviation of its "
            f"training, such as those of ImageNet:\n"
            f"  --set {key}.mean=[0.485,0.456,0.406] --set {key}.std=[0.229,0.224,0.225]\n"
            f"For pixels from 0 to 1: {key}.mean=[0,0,0] and {key}.std=[1,1,1]"
        )
    spec = InputSpec(size, mean, std, recipe.data.resize_mode)
    names = None if module.metadata is None else module.metadata.class_names
    count, notes = module.examine(size), list[str]()
    if network.head == "none":
        module.add_head(count, len(classes))
        return InitialNetwork(module.eval(), network.model, spec, ready=True, facts=_file_facts(network))
    groups = _file_groups(network, names, count, classes, key, notes)
    loaded = (
        LoadedModel(module.eval(), new_head=False)
        if groups is None
        else group_outputs(LoadedModel(module.eval(), new_head=False), count, groups)
    )
    if module.gives_probabilities:
        notes.append(f"the outputs of {source} are probabilities: their logarithms are used as logits")
    start = InitialNetwork(loaded.module, network.model, spec, ready=True, facts=_file_facts(network), notes=notes)
    start.output_groups = loaded.output_groups
    return start


def _from_table(recipe: Recipe, network: StageSettings, classes: tuple[str, ...]) -> InitialNetwork:
    """Return a teacher that is a table of answers, whose columns are those of the classes."""
    key, notes = network_key(recipe, network), list[str]()
    wrong = [name for name in ("size", "mean", "std") if getattr(network, name) is not None]
    if wrong:
        raise UsageError(f"{key}.{wrong[0]}: {network.weights} is a table of answers and sees no images: leave it out")
    table = read_answers(Path(str(network.weights)).expanduser())
    notes.append(f"{network.weights} has {table.kind} of {len(table.paths):,} images")
    if (network.head == "none") != (table.kind == "embeddings"):
        has, setting = f"{network.weights} has {table.kind}", f"{key}.head"
        raise UsageError(
            f"{has}, and a teacher without classes ({setting}: none) has embeddings: leave {setting} out, or call the "
            "columns embedding_0, embedding_1, ..."
            if network.head == "none"
            else f"{has} and no classes: set {setting}: none, with a method that reads embeddings "
            f"({', '.join(list_classless_methods(embeddings_only=True))})"
        )
    spec = network_spec(recipe, recipe.student)
    if network.head == "none":
        module = TableNetwork(table.paths, table.values).eval()
        module.add_head(table.values.shape[1], len(classes))
        module.label = table.origin
        return InitialNetwork(module, network.model, spec, ready=True, facts=_file_facts(network), notes=notes)
    logits = table.logits()
    groups = _file_groups(network, table.class_names, logits.shape[1], classes, key, notes)
    if groups is not None:
        columns = [np.logaddexp.reduce(logits[:, group], axis=1) for group in groups]
        logits = np.stack(columns, axis=1).astype(np.float32)
    module = TableNetwork(table.paths, logits).eval()
    module.label = table.origin
    return InitialNetwork(module, network.model, spec, ready=True, facts=_file_facts(network), notes=notes)


def _file_facts(network: StageSettings) -> dict[str, Any]:
    return {"weights": network.weights} | ({} if network.classes is None else {"classes": network.classes})


def _file_groups(
    network: StageSettings,
    names: Sequence[str] | None,
    count: int,
    classes: tuple[str, ...],
    key: str,
    notes: list[str],
) -> list[list[int]] | None:
    """Return the outputs of a file that belong to each class; None if they are assumed to be in the data's order."""
    source, theirs = str(network.weights), network.classes or (None if names is None else list(names))
    if theirs is not None:
        names = class_list(theirs) if isinstance(theirs, str) else theirs if isinstance(theirs, list) else names
        setting = f"{key}.classes" if network.classes is not None else source
        if names is not None and len(names) != count:
            raise ArtifactError(f"{setting} has {len(names)} classes, but {source} has {count} outputs")
        return output_groups(theirs, names, count, classes, key=setting, source=source)
    if count != len(classes):
        raise ArtifactError(
            f"{source} has {count} outputs, and this data {len(classes)} classes: give the class of each output, "
            f"{key}.classes={_likely_classes(classes)}"
        )
    notes.append(
        f"{source} has no class names: its outputs are assumed to be, in this order, {format_names(classes, 12)}; "
        f"{key}.classes gives another order"
    )
    return None


def _from_model_file(path: Path, network: StageSettings, classes: tuple[str, ...], key: str) -> InitialNetwork:
    model = load_model(folder := find_model(path))
    if isinstance(hidden := find_opaque(model.module), FileNetwork) and is_permitted(str(folder.resolve())):
        permit_code([sha256_hex(hidden.content.numpy().tobytes())])
    facts, has_head = {"weights": network.weights}, predicts_classes(model.facts)
    if model.class_names == classes and (has_head or network.head == "none" or classes == NO_CLASSES):
        if network.size not in (None, model.input.size):
            raise ArtifactError(f"{path} takes images of {model.input.size} px, but {key}.size is {network.size}")
        facts |= {"head": model.facts["head"]} if "head" in model.facts else {}
        return InitialNetwork(
            model.module,
            model.architecture,
            model.input,
            ready=True,
            facts=facts,
            remodelled=model.remodelled,
            output_groups=model.output_groups,
            pruned=model.pruned,
        )
    if model.remodelled is not None:
        name = model.remodelled.get("name")
        raise ArtifactError(f"{path} has layers of method {name}: it cannot get a new head for other classes")
    if model.output_groups is not None:
        raise ArtifactError(f"{path} has several outputs per class: it cannot get a new head for other classes")
    if key == "previous":
        raise ArtifactError(_class_difference(path, model.class_names, classes))
    if not has_head and key.startswith("teacher") and not network.new_head and network.head is None:
        raise ArtifactError(
            f"{path} has no classes: it is for methods that read embeddings or feature maps, with {key}.head=none; "
            f"{key}.head=probe fits a head"
        )
    if not network.new_head and network.head is None and has_head and classes != NO_CLASSES:
        raise ArtifactError(
            f"{path} has other classes than this data, or another order.\n"
            f"It has {len(model.class_names)}: {format_names(model.class_names, 12)}\n"
            f"The data has {len(classes)}: {format_names(classes, 12)}\n"
            f"Use data with the same class names, or train it with a new head: {_new_head_setting(key)}"
        )
    warning = f"{path} gets a NEW HEAD of {len(classes)} classes, randomly initialised; its other weights are kept"
    if not has_head:
        warning = f"{path} has no classes: {warning}. --set {key}.head=finetune starts from a linear probe"
    module = create_model(model.architecture, len(classes), size=model.input.size)
    module = module if model.pruned is None else cut_channels(module, model.pruned)
    own = module.state_dict()
    kept = {key: value for key, value in model.module.state_dict().items() if own[key].shape == value.shape}
    head = _head_keys(model.module, module, len(model.class_names) == len(classes))
    module.load_state_dict({key: value for key, value in kept.items() if key not in head}, strict=False)
    warnings = [warning] if _has_random_head(network, key) else []
    start = InitialNetwork(module, model.architecture, model.input, ready=False, facts=facts, warnings=warnings)
    start.pruned = model.pruned
    return start


def _class_difference(path: Path, theirs: Sequence[str], ours: Sequence[str]) -> str:
    """Return why the model in use and the data have not the same classes."""
    what = f"the previous model, {path}, must have the classes of the data, in their order"
    lost, new = ([name for name in one if name not in other] for one, other in ((theirs, ours), (ours, theirs)))
    if not lost and not new:
        return f"{what}; it has them in another order: {format_names(theirs, 12)}"
    differ = [f"only it has {format_names(lost)}"] if lost else []
    differ += [f"only the data has {format_names(new)}"] if new else []
    return f"{what}: {'; '.join(differ)}"


def network_spec(
    recipe: Recipe, network: StageSettings, normalisation: tuple[Triple, Triple] | None = None
) -> InputSpec:
    """Return the preprocessing of a network: pretrained weights have their own, others the recipe's."""
    data = recipe.data
    if network.model.startswith(GIVEN):
        given = given_input(network.model)
        if given is not None:
            return given
        if network is not recipe.student:  # default: the student's preprocessing
            spec = network_spec(recipe, recipe.student)
            return replace(spec, size=network.size or spec.size)
    spec = input_spec(network.model, _size(recipe, network), data.resize_mode)
    if normalisation is not None:
        spec = replace(spec, mean=normalisation[0], std=normalisation[1])
    mean, std = (data.mean, data.std) if network.weights != "pretrained" else (None, None)
    return replace(spec, mean=network.mean or mean or spec.mean, std=network.std or std or spec.std)


def _head_keys(old: nn.Module, new: nn.Module, same_size: bool) -> set[str]:
    """Return the parameters of the last linear layer, if equal shapes would keep them for other classes."""
    if not same_size:
        return set()
    last = [name for name, module in new.named_modules() if isinstance(module, nn.Linear)][-1:]
    return {f"{name}.{part}" for name in last for part in ("weight", "bias")}


def network_key(recipe: Recipe, network: StageSettings) -> str:
    """Return the key of a network of the recipe, as for ``--set``: "teacher", "teacher.1", "student"."""
    if network is recipe.previous:
        return "previous"
    lists = [("assistants", recipe.assistants)]
    if isinstance(recipe.teacher, list):
        lists.append(("teacher", recipe.teacher))
    found = (f"{key}.{at}" for key, networks in lists for at, each in enumerate(networks) if each is network)
    return next(found, "teacher" if network is recipe.teacher else "student")


def _is_potstill_model(path: Path) -> bool:
    try:
        return (find_model(path) / "model.json").is_file()
    except ArtifactError:
        return False


def train_loader(
    planned: PlannedStage,
    needs: Requirements,
    spec: InputSpec,
    *,
    recipe: Recipe,
    data: DataSplits,
    compute: Compute,
    observer: Observer | None = None,
    drawn_for: InputSpec | None = None,
    network: nn.Module | None = None,
) -> Loader:
    """Return the loader of augmented training images, in a new order each epoch.

    Baseline and distilled get the same order, batches and views.
    ``drawn_for``: the student's spec, if its views are drawn at the size of ``spec``; a table as ``network`` gives
    answers.
    """
    unlabeled = data.unlabeled if needs.teacher or needs.peers else None
    views = recipe.teacher_cache.views
    balances = recipe.data.class_balance == "sampling" if data.draws is None else data.draws.groups is not None
    return Loader(
        data.train,
        spec,
        batch_size=recipe.stage_training(planned.name).batch_size,
        augment=recipe.data.augment or data.augment,
        order="balanced" if balances else "shuffled",
        seed=derive_seed(recipe.seed, f"{planned.seed}/order"),
        workers=recipe.data.workers,
        device=compute.device,
        cache_fraction=recipe.data.cache_fraction,
        local_processes=compute.processes.local_count,
        second=needs.second,
        classes=len(data.class_names),
        unlabeled=unlabeled,
        unlabeled_share=recipe.data.unlabeled_share,
        views=None if planned.role == "teacher" or isinstance(views, str) else views,
        view_seed=derive_seed(recipe.augmentation_seed, f"{planned.seed}/views"),
        identity=f"{data.fingerprint}/train",
        progress=observer,
        draws=data.draws,
        share=(compute.processes.rank, compute.processes.count),
        jpeg=recipe.data.cache == "jpeg",
        drawn_for=drawn_for,
        answers=table_answers(network, data.train, unlabeled),
        embeddings=answers_are_embeddings(network),
    )


def table_answers(network: nn.Module | None, images: ImageSet, unlabeled: ImageSet | None = None) -> Tensor | None:
    """Return the answers of a table in the place of images, [N + M, K, 1, 1]; None if ``network`` is no table."""
    table = None if network is None else find_table(network)
    if table is None:
        return None
    found = [table.answers(images.names)]
    if unlabeled is not None:
        found.append(table.answers(unlabeled.names, folder_name(unlabeled)))
    return torch.cat(found)


def answers_are_embeddings(network: nn.Module | None) -> bool:
    """Return whether a table has embeddings in place of logits."""
    table = None if network is None else find_table(network)
    return table is not None and table.head is not None


def folder_name(images: ImageSet) -> str:
    """Return the name of the folder of unlabeled images, which the rows of a table may begin with."""
    return images.root.name if isinstance(images, FileSet) else ""


def describe_training_views(loader: Loader, recipe: Recipe, data: DataSplits, epochs: int) -> dict[str, Any]:
    """Return ``count`` of views of an image, ``augmentation_seed``, and ``sha256`` of all that determines the views."""
    described = loader.describe_views()
    described["samples"] = described["samples"][0]
    count = min(loader.views_in_turn or epochs, epochs) if described["augment"] is not None else 1
    content = json.dumps([data.fingerprint, count, described], sort_keys=True, default=str)
    return {"count": count, "augmentation_seed": recipe.augmentation_seed, "sha256": sha256_hex(content.encode())}


def split_loader(
    data: DataSplits,
    split: str,
    spec: InputSpec,
    recipe: Recipe,
    settings: TrainingSettings,
    compute: Compute,
    *,
    shared: bool = True,
    drawn_for: InputSpec | None = None,
    network: nn.Module | None = None,
) -> Loader:
    """Return the loader of the images of a split, in order and without augmentation; arguments as of ``train_loader``.

    ``shared``: divide the batches among the processes; False: each process gets all of them.
    """
    processes = compute.processes
    return Loader(
        data.split(split),
        spec,
        batch_size=settings.batch_size,
        workers=recipe.data.workers,
        device=compute.device,
        cache_fraction=recipe.data.cache_fraction,
        local_processes=processes.local_count,
        identity=f"{data.fingerprint}/{split}",
        progress=SilentObserver(),  # the loader of the training images has reported already
        share=(processes.rank, processes.count) if shared else (0, 1),
        drawn_for=drawn_for,
        answers=table_answers(network, data.split(split)),
    )


def build_teacher_views(
    student: InputSpec,
    teachers: Sequence[Classifier],
    loader: Callable[..., Loader],
    memory_format: torch.memory_format = torch.contiguous_format,
) -> TeacherViews | None:
    """Return the student's views at the size and normalisation of teachers with others, and the answers of tables; None
    if there are none.  ``loader`` is a partial of ``train_loader`` or ``split_loader``.
    """
    by_spec: dict[InputSpec, Loader] = {}
    loaders: list[Loader | None] = []
    for teacher in teachers:
        own = teacher.input
        if find_table(teacher.module) is not None:
            loaders.append(loader(spec=student, network=teacher.module))
        elif own.size == student.size:
            loaders.append(None)
        else:
            spec = replace(student, size=own.size, mean=own.mean, std=own.std)
            if spec not in by_spec:
                by_spec[spec] = loader(spec=spec, drawn_for=student)
            loaders.append(by_spec[spec])
    return TeacherViews(loaders, memory_format) if any(each is not None for each in loaders) else None


TIMING_ROUNDS = 3  # timed forward passes of the teachers, after one for warm-up


def build_distiller(
    planned: PlannedStage,
    student: Classifier,
    method: Method,
    teachers: Sequence[Classifier],
    *,
    recipe: Recipe,
    data: DataSplits,
    compute: Compute,
    example: Tensor,
    label_loss: nn.Module,
) -> Distiller:
    """Return a Distiller on the compute's device; each teacher gets images of its own size and normalisation."""
    if planned.feature_pairs and method.needs.maps == "none":
        raise UsageError(
            f"feature_pairs: method {describe_method(recipe.method)} compares no feature maps of student and "
            "teacher; leave them out"
        )
    several = len(teachers) > 1
    for name, network in zip((planned.name, *planned.teachers), (student, *teachers), strict=True):
        compute.place(network.module, name)
        used = compute.for_training(network.module) if network is student else compute
        network.module.to(memory_format=used.memory_format)
    with example_answers(teacher.module for teacher in teachers):
        distiller = Distiller(
            student.module,
            [teacher.module for teacher in teachers] or None,
            method,
            example=example,
            student_input=student.input if teachers else None,
            teacher_input=[teacher.input for teacher in teachers] or None,
            label_loss=label_loss,
            feature_pairs=planned.feature_pairs,
            train_labels=torch.as_tensor(data.train.labels, dtype=torch.int64, device=compute.device),
            batch_size=recipe.stage_training(planned.name).batch_size,
            teacher_weights=_teacher_weights(planned, recipe) if several else None,
            combine=recipe.teachers.combine,
        )
    return distiller.to(compute.device)


def _teacher_weights(planned: PlannedStage, recipe: Recipe) -> list[float] | None:
    """Return the weights of a stage's teachers; the previous model, the last one, has none in their combination."""
    *others, last = planned.teachers
    given = recipe.teachers.weights
    if stage_role(last) != "previous":
        return given
    return [*(given if given is not None and len(others) > 1 else [1.0] * len(others)), 0.0]


def take_deployed_network(student: Classifier, distiller: Distiller) -> None:
    """Set ``student.module`` to the network to deploy: some methods replace or merge layers."""
    network = distiller.student
    if network is student.module:
        return
    if isinstance(network, ExpandedStage):
        network = network.merged()
    student.module = network
    student.remodelled = network.facts if isinstance(network, ModifiedStudent) else None


def describe_layers(distiller: Distiller, *, max_rows: int | None = None) -> str:
    """Return a text on the feature pairs and on what is trained besides the student; empty if there is neither.

    Rows of adapters beyond ``max_rows`` are summed by group.

    Example:
        >>> from potstill.methods.kd import KD
        >>> student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(2))
        >>> describe_layers(Distiller(student, teacher, KD()))
        ''
    """
    parts = [f"Feature pairs\n\n{distiller.table.rstrip()}"] if distiller.table else []
    if isinstance(distiller.student, ModifiedStudent):
        facts = ", ".join(f"{key} {value}" for key, value in distiller.student.facts.items() if value and key != "name")
        parts.append(f"The student with other last layers: {distiller.student.name}\n\n{facts}")
    adapters = [
        (name.removeprefix("method."), parameter)
        for name, parameter in distiller.trained_parameters()
        if not name.startswith("student.")
    ]
    if adapters:
        parts.append(f"Trained besides the student, not deployed\n\n{_adapter_table(adapters, max_rows)}")
    return "\n\n".join(parts) + "\n" if parts else ""


def _adapter_table(adapters: list[tuple[str, nn.Parameter]], max_rows: int | None) -> str:
    rows = [(name, " x ".join(map(str, each.shape)) or "1", each.numel()) for name, each in adapters]
    total = sum(count for *_, count in rows)
    if max_rows is not None and len(rows) > max_rows:
        groups: dict[str, list[int]] = {}
        for name, _, count in rows:
            groups.setdefault(".".join(name.split(".")[:2]), []).append(count)
        rows = [(f"{name}.*", f"{len(counts)} tensors", sum(counts)) for name, counts in groups.items()]
    cells = [("name", "shape", "parameters"), *((a, b, f"{c:,}") for a, b, c in rows), ("total", "", f"{total:,}")]
    return "\n".join(format_columns(cells))


def measure_teacher_cost(distiller: Distiller, batch_size: int, size: int, compute: Compute) -> dict[str, Any] | None:
    """Return ``parameters``, ``bytes`` and ``ms_per_step`` (median) of the teachers' forward pass of a step; None
    without teacher, or if a GPU has too little memory.
    """
    if distiller.teacher is None:
        return None
    images = torch.zeros(batch_size, 3, size, size, device=compute.device).to(memory_format=compute.memory_format)
    times = []
    for _ in range(TIMING_ROUNDS + 1):
        compute.synchronize()
        start = time.perf_counter()
        try:
            with compute.autocast(), example_answers([distiller.teacher]):
                distiller.run_teacher(images)
        except torch.OutOfMemoryError:
            return None
        compute.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    parameters, count = list(distiller.teacher.parameters()), known_parameters(distiller.teacher)
    in_memory = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return {
        "parameters": count,
        "bytes": None if count is None else in_memory,
        "ms_per_step": round(sorted(times[1:])[TIMING_ROUNDS // 2], 3),
        "batch_size": batch_size,
    }
