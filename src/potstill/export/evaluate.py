"""Evaluation of a trained model on labelled images; classes are matched by name."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from potstill.code_references import permit_code, resolve_reference
from potstill.config.recipe import load_recipe
from potstill.data.entries import SkippedFile
from potstill.errors import DataError, did_you_mean
from potstill.export.loading import find_model_folder, load_classifier
from potstill.formatting import format_names
from potstill.io import read_checksummed_text

BATCH_SIZE = 64
_OWN_TEST_SPLIT = "test split of the run"


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
    ``test`` split, or all images if it has no splits; for a named data set, its test split; for tar shards, all images.

    Args:
        model: a run folder (distilled student, else baseline, else teacher), a model folder or file, or bare weights;
            see ``load_classifier``.
        source: a folder, a manifest, or the name of a data set.
        classes: class names of bare weights: a file or the name of a list; None: those of the data.
        device: "auto", "cpu", "cuda", ...
        follow_links: follow links and paths that leave the data folder.
        skip_bad: leave out files that cannot be read.
        note: is called with a line on each thing that was assumed of bare weights, and on images that the model's run
            was trained on.

    Returns:
        The metrics of a split as in results.json; ``model`` and ``data``, each a description; ``skipped``: path and
        reason of each file that was left out; ``seen_in_training``: the number of images, other than the run's own test
        split, that were in its train or val, by the content of the files, if any.

    Raises:
        UsageError: the data do not exist.
        DataError: images that cannot be read, or of classes that the model does not have.
        ArtifactError: there is no model, or it is damaged.
    """
    folder = find_model_folder(model)
    source = resolve_reference(source)
    permit_code([source])

    from potstill.data.loader import Loader
    from potstill.evaluation.final_metrics import split_metrics
    from potstill.evaluation.predictions import predict_split
    from potstill.training.devices import create_compute
    from potstill.training.settings import TrainingSettings

    images, own_classes, subset, skipped = _test_images(source, folder, follow_links=follow_links, skip_bad=skip_bad)
    classifier, origin = load_classifier(model, classes=classes, likely=own_classes, note=note)
    labels = _match_labels(images.labels, own_classes, classifier.class_names)
    resolved = create_compute(TrainingSettings(device=device)).device
    classifier.module.to(resolved)
    loader = Loader(images, classifier.input, batch_size=BATCH_SIZE, device=resolved, workers="auto")
    count = len(classifier.class_names)
    run = None if folder is None or subset == _OWN_TEST_SPLIT else folder.parent
    seen = [] if run is None else _seen_in_training(run, images)
    if seen:
        note(
            f"{len(seen):,} of {len(images):,} images, such as {seen[0]}, were in train or val of {run}: these metrics "
            "are higher than on new images"
        )
    predictions = predict_split(classifier.module, loader, classes=count, device=resolved, labels=labels)
    assert predictions is not None  # of a single process
    return {
        "model": f"{classifier.architecture} of {origin}",
        "data": f"{source}, {subset}",
        **({"skipped": [[each.path, each.reason] for each in skipped]} if skipped else {}),
        **({"seen_in_training": len(seen)} if seen else {}),
        **split_metrics(predictions, classifier.class_names),
    }


def _test_images(
    source: str, model: Path | None, **options: bool
) -> tuple[Any, Sequence[str], str, Sequence[SkippedFile]]:
    """Return the images, the class names of their labels, a description of the subset, and the files left out."""
    from potstill.data.datasets import check_source, is_dataset, load_data
    from potstill.data.file_datasets import (
        is_shards,
        list_source,
        raise_refused,
        read_files,
        read_shards,
        to_skipped,
    )
    from potstill.data.image_sets import FileSet
    from potstill.data.scan import check_files
    from potstill.data.settings import DataSettings

    settings = DataSettings.model_validate({"source": source, **options})
    check_source(settings)
    recorded = None if model is None else run_data_settings(model)
    run_settings = _run_split_settings(recorded, source)
    if run_settings is not None or is_dataset(source):
        enabled = {key: True for key, value in options.items() if value}
        splits = load_data(settings if run_settings is None else run_settings.model_copy(update=enabled))
        if "test" in splits.teacher_labels:
            raise DataError(
                f"the images of {model} have no labels: give labeled ones, with --data DIR, a folder of class folders"
            )
        if run_settings is not None and recorded is not None and model is not None:
            check_unseen(model.parent, splits.test, run_settings, is_target=run_settings.source != recorded.source)
        subset = _OWN_TEST_SPLIT if run_settings is not None else "test split"
        return splits.test, splits.class_names, subset, splits.skipped
    if is_shards(source):
        shard_classes, sets, _ = read_shards(settings)
        return sets["train"], shard_classes, "all images", ()
    if recorded is not None:  # the model's classes have the names of these folders
        settings = settings.model_copy(update={"class_folder": recorded.class_folder})
    listing, skipped, contents = read_files(list_source(settings), settings)
    # Nothing is trained: a class, or train itself, may be missing; a class that is missing in test gets a warning.
    passed = ("missing-class", "no-train")
    raise_refused(settings, [each for each in listing.findings if each.kind not in passed], listing.shown_root)
    entries = listing.entries
    class_names = tuple(sorted({entry.label for entry in entries}))  # of all splits: test may lack a class
    subset = "all images"
    if any(entry.split for entry in entries):
        entries, subset = [entry for entry in entries if entry.split == "test"], "its test images"
    if not entries:
        raise DataError(f"{source} has splits, but no test images; to evaluate on others give their own folder")
    ids = {name: i for i, name in enumerate(class_names)}
    images = FileSet(listing.root, [entry.name for entry in entries], [ids[entry.label] for entry in entries])
    images.expect(contents or check_files(listing.root, images.names, source, place=listing.place))
    return images, class_names, subset, to_skipped(skipped)


def _seen_in_training(run: Path, images: Any) -> list[str]:
    from potstill.experiment.resume import images_used_before

    return [name for is_target in (False, True) for name in images_used_before(run, images, is_target=is_target)]


def check_unseen(run: Path, tests: Any, settings: Any, *, is_target: bool) -> None:
    """Refuse test images that the run has used in train or val: a split that is made anew of changed data has such."""
    from potstill.experiment.resume import images_used_before

    hidden = settings.labels_per_class is not None
    if seen := images_used_before(run, tests, same_data=True, is_target=is_target, hidden=hidden):
        raise DataError(
            f"{settings.source} has changed since {run} was trained on it: {len(seen):,} of its {len(tests):,} "
            f"test images were used in that training, such as {seen[0]}, and metrics would be too high\n"
            "Restore the former images, or give images that are not among them: --data DIR"
        )


def run_data_settings(model: Path) -> Any:
    """Return the data settings of a model's run, without the unlabeled images, which nothing is measured on; None for a
    model outside of a run.
    """
    recipe = model.parent / "recipe.yaml"
    if not recipe.is_file():
        return None
    read_checksummed_text(recipe)  # compares it with its digest, before it is parsed
    return load_recipe(recipe, data_needed=False, recorded=True).data.model_copy(update={"unlabeled": None})


def _run_split_settings(settings: Any, source: str) -> Any:
    """Return the settings with which a run loaded ``source``, as its target or source domain; None if it did not."""
    from potstill.data.datasets import target_settings

    if settings is None:
        return None
    if settings.target is not None and _is_same_source(settings.target, source):
        return target_settings(settings)
    return settings.model_copy(update={"target": None}) if _is_same_source(settings.source, source) else None


def _is_same_source(first: str, second: str) -> bool:
    return first == second or (Path(first).exists() and Path(second).exists() and Path(first).samefile(second))


def _match_labels(labels: Any, own: Sequence[str], class_names: Sequence[str]) -> Any:
    """Return the model's class ids [N] of labels [N], which are those of the classes ``own``."""
    import numpy as np

    unknown = sorted({own[label] for label in set(labels.tolist())} - set(class_names))
    if unknown:
        shown = ", ".join(f"{name!r}{did_you_mean(name, class_names)}" for name in unknown[:5])
        raise DataError(
            f"the model does not know {len(unknown)} of these classes: {shown}\n"
            f"It knows {format_names(class_names, 12)}; rename these folders, or give data without them"
        )
    ids = {name: i for i, name in enumerate(class_names)}
    return np.array([ids.get(name, -1) for name in own], dtype=np.int64)[labels]
