"""The Python interface of ``potstill run``, ``predict`` and others."""

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
        recipe: name of a shipped recipe, a YAML file, or its content as a dict.
        sets: changes like ``"training.epochs=5"``.
        data: images from Python (``potstill.data.datasets.from_torch``) in place of the recipe's source.
        root: where run folders stand.
        name: the run folder's name; the recipe's own where None.
        resume: go on with an existing run of the same recipe.
        overwrite: delete an existing run of this name first.
        observer: is told what happens; silent where None.

    Raises:
        PotstillError: anything that a user can mend.
    """
    checked = load_recipe(recipe, sets, data_needed=data is None)
    path = pipeline.run(
        checked, root=Path(root), name=name, resume=resume, overwrite=overwrite, data=data, observer=observer
    )
    render(path)
    log_files(path, observer or SilentObserver())
    return path


def load(path: str | Path) -> Classifier:
    """Load the model of a run (distilled, else baseline, else teacher) or of a model folder, in eval mode on the CPU.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    return load_model(find_model(Path(path)))
