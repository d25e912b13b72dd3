"""A trained model measured on labelled images; classes are matched by name."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from potstill.config.recipe import load_recipe
from potstill.data.entries import SkippedFile
from potstill.errors import DataError, did_you_mean
from potstill.export.loading import find_model_folder, load_classifier
from potstill.formatting import format_names
from potstill.io import read_checksummed_text

BATCH_SIZE = 64


def evaluate(
    model: Path | str,
    source: str,
    *,
    classes: str | None = None,
    device: str = "auto",
    follow_links: bool = False,
    skip_bad: bool = False,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Return all final metrics on labeled images.

    For the data that the run was trained on, the run's test split is used; for another folder or manifest, its
    ``test`` split, or all images if it has no splits; for a named data set, its test split.

    Args:
        model: a run folder (distilled student, else baseline, else teacher), a model folder or file, or bare weights;
            see ``load_classifier``.
        source: a folder, a manifest, or the name of a data set.
        classes: class names of bare weights: a file or the name of a list; None: those of the data.
        device: "auto", "cpu", "cuda", ...
        follow_links: follow links and paths that leave the data folder.
        skip_bad: leave out files that cannot be read.
        note: is called with a line on each thing that was assumed of bare weights.

    Returns:
        The metrics of a split as in results.json; ``model`` and ``data``, each a description; ``skipped``: path and
        reason of each file that was left out.

    Raises:
        UsageError: the data do not exist.
        DataError: images that cannot be read, or of classes that the model does not have.
        ArtifactError: there is no model, or it is damaged.
    """
    folder = find_model_folder(model)

    from potstill.data.loader import Loader
    from potstill.evaluation.final_metrics import split_metrics
    from potstill.evaluation.predictions import predict_split
    from potstill.training.devices import create_compute
    from potstill.training.settings import TrainingSettings

    images, names, which, skipped = _test_images(source, folder, follow_links=follow_links, skip_bad=skip_bad)
    classifier, origin = load_classifier(model, classes=classes, likely=sorted(set(names)), note=note)
    labels = _match_labels(names, classifier.class_names)
    where = create_compute(TrainingSettings(device=device)).device
    classifier.module.to(where)
    loader = Loader(images, classifier.input, batch_size=BATCH_SIZE, device=where)
    count = len(classifier.class_names)
    found = predict_split(classifier.module, loader, classes=count, device=where, labels=labels)
    return {
        "model": f"{classifier.architecture} of {origin}",
        "data": f"{source}, {which}",
        **({"skipped": [[each.path, each.reason] for each in skipped]} if skipped else {}),
        **split_metrics(found, classifier.class_names),
    }


def _test_images(source: str, model: Path | None, **how: bool) -> tuple[Any, list[str], str, Sequence[SkippedFile]]:
    """The images to measure on, the class name of each, which of the source's images they are, and what is left out."""
    from potstill.data.datasets import DATASETS, check_source, load_data
    from potstill.data.file_datasets import list_source, raise_refused, read_files, to_skipped
    from potstill.data.image_sets import FileSet
    from potstill.data.scan import check_files
    from potstill.data.settings import DataSettings

    settings = DataSettings.model_validate({"source": source, **how})
    check_source(settings)
    known = None if model is None else _run_split_settings(run_data_settings(model), source)
    if known is not None or source in DATASETS:
        asked = {key: True for key, value in how.items() if value}
        splits = load_data(settings if known is None else known.model_copy(update=asked))
        names = [splits.class_names[label] for label in splits.test.labels]
        which = "test split of the run" if known is not None else "test split"
        return splits.test, names, which, splits.skipped
    listing, skipped, contents = read_files(list_source(settings), settings)
    raise_refused(settings, listing.findings, listing.root)
    entries = listing.entries
    which = "all images"
    if any(entry.split for entry in entries):
        entries, which = [entry for entry in entries if entry.split == "test"], "its test images"
    if not entries:
        raise DataError(f"{source} has splits, but no test images; to measure on others give their own folder")
    # The ids do not count: classes are matched by name.
    images = FileSet(listing.root, [entry.name for entry in entries], [0] * len(entries))
    if not contents:
        check_files(listing.root, images.names, source)
    return images, [entry.label for entry in entries], which, to_skipped(skipped)


def run_data_settings(model: Path) -> Any:
    """The data settings of the run that a model stands in, or None for a model that stands alone."""
    recipe = model.parent / "recipe.yaml"
    if not recipe.is_file():
        return None
    read_checksummed_text(recipe)  # compares it with its digest, before it is parsed
    return load_recipe(recipe, data_needed=False, recorded=True).data


def _run_split_settings(own: Any, source: str) -> Any:
    """The settings with which a run has loaded this data, as its target or its source; None where it has not."""
    from potstill.data.datasets import target_settings

    if own is None:
        return None
    if own.target is not None and _is_same_source(own.target, source):
        return target_settings(own)
    alone = {} if own.target is None else {"target": None, "unlabeled": None}  # these are of the target
    return own.model_copy(update=alone) if _is_same_source(own.source, source) else None


def _is_same_source(first: str, second: str) -> bool:
    return first == second or (Path(first).exists() and Path(second).exists() and Path(first).samefile(second))


def _match_labels(labels: Sequence[str], class_names: Sequence[str]) -> Any:
    """Class ids by name, [N] int64."""
    import numpy as np

    unknown = sorted(set(labels) - set(class_names))
    if unknown:
        shown = ", ".join(f"{name!r}{did_you_mean(name, class_names)}" for name in unknown[:5])
        raise DataError(
            f"the model does not know {len(unknown)} of these classes: {shown}\n"
            f"It knows {format_names(class_names, 12)}"
        )
    ids = {name: i for i, name in enumerate(class_names)}
    return np.array([ids[label] for label in labels], dtype=np.int64)
