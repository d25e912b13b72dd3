"""Load a model by what the user gives: a run, a model folder, or weights from elsewhere with their architecture."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.code_references import is_code_reference, permit_code
from potstill.config.overrides import read_class_file, split_model
from potstill.errors import ArtifactError, UsageError
from potstill.experiment.run_folder import find_model
from potstill.hub import is_hub_model, model_path, pinned_name
from potstill.models.class_names import CLASS_LISTS, LIKELY_LISTS, class_list
from potstill.models.exported_files import LABELS, SUFFIXES

if TYPE_CHECKING:
    from potstill.models.model_file import Classifier


# Exported files that no network is made of here, by suffix.
_ENGINE_FILES = {
    ".xml": "OpenVINO",
    ".tflite": "LiteRT",
    ".ncnn.param": "ncnn",
    ".ncnn.bin": "ncnn",
    ".pte": "ExecuTorch",
    ".mlpackage.zip": "Core ML",
    ".html": "browsers",
}


def find_model_folder(model: Path | str) -> Path | None:
    """The folder of a run's or a model's files; None where ``model`` means bare weights."""
    path = model_path(model)
    try:
        return find_model(path)
    except (ArtifactError, UsageError):
        architecture, weights = split_model(os.fspath(model))
        if architecture is not None and weights is not None:
            return None
        if weights is not None and (path.is_file() or (path / "config.json").is_file()):
            return None
        raise


def load_classifier(
    model: Path | str,
    *,
    classes: str | None = None,
    likely: Sequence[str] = (),
    note: Callable[[str], None] = lambda line: None,
) -> "tuple[Classifier, str]":
    """Load a run's model, a model folder, or bare weights.

    ``model`` is a run or model folder, or one of a model's files; ``ARCHITECTURE@WEIGHTS``; or a file of weights whose
    network can be inferred.  ``classes`` of bare weights: a text file with the name of each output, or a name of
    ``CLASS_LISTS``; ``likely``: those of the data, if there are as many.  ``note`` is called with what was assumed.
    Return the classifier, in eval mode on the CPU, and where it comes from.
    """
    folder = find_model_folder(model)
    if (pinned := pinned_name(os.fspath(model))) != os.fspath(model):
        note(f"{model} is {pinned}")
    if folder is not None:
        from potstill.models.model_file import load_class_model

        if classes is not None:
            raise UsageError(f"--classes is for weights without class names; {folder} has its own")
        return load_class_model(folder), pinned if is_hub_model(pinned) else str(folder)
    architecture, weights = split_model(os.fspath(model))
    assert weights is not None
    if architecture is None:
        kind = SUFFIXES.get(Path(weights).suffix)
        engine = next((name for suffix, name in _ENGINE_FILES.items() if weights.endswith(suffix)), None)
        if kind is not None or engine is not None:
            raise UsageError(
                f"{weights} is {f'a file for {engine}' if kind is None else LABELS[kind]}, not a run or weights: give "
                "the run that it was exported from (export compares the two); potstill predict takes .onnx files, and "
                "potstill benchmark .onnx, .xml, .tflite and .ncnn.param"
            )
    weights = pinned_name(weights)
    return _load_bare(architecture, weights, classes, likely, note), weights


def _load_bare(
    architecture: str | None, weights: str, classes: str | None, likely: Sequence[str], note: Callable[[str], None]
) -> "Classifier":
    from dataclasses import replace

    from potstill.models.factory import count_outputs, load_weights
    from potstill.models.foreign_checkpoints import identify_network
    from potstill.models.model_file import Classifier
    from potstill.models.registry import input_spec, own_size
    from potstill.models.state_dict import read_class_names

    path = model_path(weights)
    if architecture is None:
        architecture = identify_network(path)
        note(f"{weights}: the network is taken to be {architecture}")
    elif is_code_reference(architecture):
        permit_code([architecture])
    size = own_size(architecture)
    count = count_outputs(architecture, weights, size=size)
    published = None if weights == "pretrained" else read_class_names(path)
    names = _class_names(classes, published, likely, count, weights, note)
    loaded = load_weights(architecture, weights, count, size=size)
    for line in loaded.notes:
        note(line)
    spec = input_spec(architecture, size)
    if loaded.normalisation is not None:
        spec = replace(spec, mean=loaded.normalisation[0], std=loaded.normalisation[1])
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (spec.mean, spec.std))
    note(f"{weights}: its input is taken to be images of {spec.size} px, with mean {mean} and std {std}")
    return Classifier(loaded.module.eval(), architecture, names, spec)


def _class_names(
    classes: str | None,
    published: Sequence[str] | None,
    likely: Sequence[str],
    count: int,
    weights: str,
    note: Callable[[str], None],
) -> tuple[str, ...]:
    if classes is not None:
        names = class_list(classes) if classes in CLASS_LISTS else tuple(read_class_file(classes, "--classes"))
        if len(names) != count:
            raise UsageError(f"--classes {classes} names {len(names)} classes, and {weights} has {count} outputs")
        if len(set(names)) < len(names):
            raise UsageError(f"--classes {classes} names a class twice")
        return names
    if published is not None and len(published) == count:
        return tuple(published)
    if len(likely) == count:
        note(f"{weights} has no class names: its outputs are taken to be the data's classes, in order; see --classes")
        return tuple(likely)
    if count in LIKELY_LISTS and (likely or count >= 1000):
        note(f"{weights} has no class names: its outputs are taken to be those of {LIKELY_LISTS[count]}; see --classes")
        return class_list(LIKELY_LISTS[count])
    if likely:
        raise UsageError(
            f"{weights} has {count} outputs, and the data {len(likely)} classes: name the class of each output with "
            f"--classes FILE, a name a line, or one of {', '.join(CLASS_LISTS)}"
        )
    note(f"{weights} has no class names: its outputs are numbered; name them with --classes FILE")
    return tuple(f"output {at}" for at in range(count))
