"""Whole experiments from Python: ``potstill run`` and loading of trained models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.config.recipe import load_recipe
from potstill.data.splits import DataSplits
from potstill.experiment import pipeline
from potstill.experiment.run_folder import find_model
from potstill.loggers.observer import log_files
from potstill.models.model_file import Classifier, load_model
from potstill.report.render import render
from potstill.training.callbacks import Observer, SilentObserver


def run(
    recipe: str | Path | Mapping[str, Any],
    *,
    sets: tuple[str, ...] = (),
    data: DataSplits | None = None,
    root: str | Path = "runs",
    name: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> Path:
    """Train teacher, baseline and distilled student; write the report; return the run folder.

    Args:
        recipe: name of a recipe that comes with potstill, a YAML file, or its content as a dict.
        sets: changed settings, such as ``"training.epochs=5"``.
        data: data set from Python (see ``potstill.data.datasets.from_torch``) in place of the recipe's source.
        root: folder that holds the run folders.
        name: name of the run folder; None: the recipe's name.
        resume: continue an existing run with the same settings.
        overwrite: delete an existing run of this name first.
        observer: its methods are called with the progress; None: no output.

    Raises:
        PotstillError: any error that the user can correct.
    """
    checked = load_recipe(recipe, sets, data_needed=data is None)
    path = pipeline.run(
        checked, root=Path(root), name=name, resume=resume, overwrite=overwrite, data=data, observer=observer
    )
    render(path)
    log_files(path, observer or SilentObserver())
    return path


def load(path: str | Path) -> Classifier:
    """Return the model of a run folder (distilled student, else baseline, else teacher) or of a model folder.

    The model is on the CPU and in eval mode.

    Raises:
        ArtifactError: there is no model, or it is damaged.
    """
    return load_model(find_model(Path(path)))
