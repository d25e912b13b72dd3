"""A trained model measured on labelled images; classes are matched by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.errors import DataError, nearest
from potstill.experiments.recipe import load_recipe
from potstill.experiments.run_folder import find_model
from potstill.sealed import read_sealed_text

BATCH = 64


def evaluate(model: Path | str, source: str, *, device: str = "auto") -> dict[str, Any]:
    """Every figure of the final metrics, on images that the model may never have seen.

    Which images: of the data that the run itself was trained on, its test split, as it was split then; of any other
    folder or manifest, ``test`` where it has splits, else everything; of a named data set, its test split.

    Args:
        model: a run folder (distilled, else baseline, else teacher), a model folder or file.
        source: a folder, a manifest, or a data set's name.
        device: "auto", "cpu", "cuda", ...

    Returns:
        The keys of ``evaluation.exact.split_metrics``, and ``model`` and ``data``: a sentence on each.

    Raises:
        UsageError: no such data.
        DataError: images that cannot be read, or of classes that the model does not know.
        ArtifactError: no model, or a damaged one.
    """
    folder = find_model(Path(model))

    from potstill.data.loader import Loader
    from potstill.evaluation.exact import split_metrics
    from potstill.evaluation.predictions import predict_split
    from potstill.models.model_file import load_model
    from potstill.training.devices import choose
    from potstill.training.settings import TrainingSettings

    classifier = load_model(folder)
    images, names, which = _test_images(source, folder)
    labels = _matched(names, classifier.class_names)
    where = choose(TrainingSettings(device=device)).device
    classifier.module.to(where)
    loader = Loader(images, classifier.input, batch_size=BATCH, device=where)
    classes = len(classifier.class_names)
    found = predict_split(classifier.module, loader, classes=classes, device=where, labels=labels)
    return {
        "model": f"{classifier.architecture} of {folder}",
        "data": f"{source}, {which}",
        **split_metrics(found, classifier.class_names),
    }


def _test_images(source: str, model: Path) -> tuple[Any, list[str], str]:
    """The images to measure on, the class name of each, and which of the source's images they are."""
    from potstill.data.check import check_files
    from potstill.data.datasets import DATASETS, check_source, load_data
    from potstill.data.folders import list_folder
    from potstill.data.images import FileSet
    from potstill.data.manifest import list_manifest
    from potstill.data.settings import DataSettings

    settings = DataSettings(source=source)
    check_source(settings)
    known = _as_split_by(data_of_run(model), source)
    if known is not None or source in DATASETS:
        splits = load_data(known or settings)
        names = [splits.class_names[label] for label in splits.test.labels]
        return splits.test, names, "test split of the run" if known is not None else "test split"
    path = Path(source).expanduser()
    root, entries = (path, list_folder(path)) if path.is_dir() else (path.parent, list_manifest(path))
    which = "all images"
    if any(entry.split for entry in entries):
        entries, which = [entry for entry in entries if entry.split == "test"], "its test images"
    if not entries:
        raise DataError(f"{source} has splits, but no test images; to measure on others give their own folder")
    # The ids do not count: classes are matched by name.
    images = FileSet(root, [entry.name for entry in entries], [0] * len(entries))
    check_files(root, images.names, source)
    return images, [entry.label for entry in entries], which


def data_of_run(model: Path) -> Any:
    """The data settings of the run that a model stands in, or None for a model that stands alone."""
    recipe = model.parent / "recipe.yaml"
    if not recipe.is_file():
        return None
    read_sealed_text(recipe)  # compares it with its digest, before it is parsed
    return load_recipe(recipe, data_needed=False).data


def _as_split_by(own: Any, source: str) -> Any:
    """The settings with which a run has loaded this data, as its target or its source; None where it has not."""
    from potstill.data.target import target_settings

    if own is None:
        return None
    if own.target is not None and _same(own.target, source):
        return target_settings(own)
    alone = {} if own.target is None else {"target": None, "unlabeled": None}  # these are of the target
    return own.model_copy(update=alone) if _same(own.source, source) else None


def _same(first: str, second: str) -> bool:
    return first == second or (Path(first).exists() and Path(second).exists() and Path(first).samefile(second))


def _matched(labels: Sequence[str], class_names: Sequence[str]) -> Any:
    """Class ids by name, [N] int64."""
    import numpy as np

    unknown = sorted(set(labels) - set(class_names))
    if unknown:
        shown = ", ".join(f"{name!r}{nearest(name, class_names)}" for name in unknown[:5])
        raise DataError(
            f"the model does not know {len(unknown)} of these classes: {shown}\nIt knows {_list(class_names)}"
        )
    ids = {name: i for i, name in enumerate(class_names)}
    return np.array([ids[label] for label in labels], dtype=np.int64)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
