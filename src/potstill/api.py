"""Whole experiments from Python: ``potstill run`` and loading of trained models."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from potstill.code_references import allowed_code
from potstill.config.recipe import load_recipe
from potstill.data.splits import DataSplits
from potstill.errors import UsageError, check_argument
from potstill.experiment import pipeline
from potstill.experiment.run_folder import find_model
from potstill.hub import model_path
from potstill.input_spec import InputSpec
from potstill.models.factory import OWN_WEIGHTS
from potstill.models.families.own_models import GIVEN, Network, given_networks
from potstill.models.model_file import Classifier, load_model
from potstill.report.render import render
from potstill.report.sweep import render_shrink, render_sweep
from potstill.sweep.fit import fit as search
from potstill.sweep.halving import FRESH_SEEDS
from potstill.sweep.shrink import Finetuning
from potstill.sweep.shrink import shrink as search_smallest
from potstill.training.callbacks import Observer

# name -> types of an argument, in words; of all functions here
_ARGUMENTS: dict[str, tuple[tuple[type, ...], str]] = {
    "recipe": ((str, Path, Mapping), "the name of a recipe, a YAML file or its content as a dict"),
    "overrides": ((Collection,), "a list or tuple of KEY=VALUE"),
    "output_dir": ((str, Path), "a folder"),
    "name": ((str, NoneType), "a text or None"),
    "under": ((str, NoneType), "a text such as '5ms,2MB', or None"),
    "within": ((str, NoneType), "a text such as '30min', or None"),
    "run": ((str, Path), "a run folder"),
    "path": ((str, Path), "a run folder or a model folder"),
    "max_loss": ((int, float), "a number of points"),
}


def _check_arguments(given: Mapping[str, Any]) -> None:
    """Raise UsageError for an argument of another type; ``given``: ``locals()`` at the beginning of a function."""
    for name, (types, wanted) in _ARGUMENTS.items():
        if name in given:
            check_argument(name, given[name], types, wanted)
    for each in given.get("overrides", ()):
        check_argument("each of overrides", each, (str,), "a text, KEY=VALUE")


def run(
    recipe: str | Path | Mapping[str, Any],
    *,
    overrides: tuple[str, ...] = (),
    teacher: Network | Sequence[Network] | None = None,
    student: Network | None = None,
    teacher_input: InputSpec | None = None,
    student_input: InputSpec | None = None,
    data: DataSplits | None = None,
    output_dir: str | Path = "runs",
    name: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_code: bool = False,
    observer: Observer | None = None,
) -> Path:
    """Train teacher, baseline and distilled student; write the report; return the run folder.

    Args:
        recipe: name of a recipe that comes with potstill, a YAML file, or its content as a dict.
        overrides: changes of the recipe's settings, such as ``"training.epochs=5"``; as after ``--set``.
        teacher: a trained network, images [B, 3, S, S] -> logits [B, K], with its outputs in the order of the data's
            classes (``teacher.classes`` overrides another order), in place of the recipe's teacher; or several.
        student: the network to train, in place of the recipe's: a module, from whose weights every student of the run
            starts, or a callable that returns a new one (``callable(num_classes=K)`` or ``callable()``).  The run
            trains copies; what is passed is not changed.
        teacher_input: preprocessing of the teacher's images; None: that of the student.
        student_input: preprocessing of the student's images; None: ``data.size``, ``data.mean`` and ``data.std``.
        data: data set from Python (see ``potstill.data.datasets.from_torch``) in place of the recipe's source.
        output_dir: folder in which the run folder is created.
        name: name of the run folder; None: the recipe's name.
        resume: continue an existing run with the same settings.
        overwrite: delete an existing run of this name first.
        allow_code: run code that a recipe file names, as ``package.module:Name`` or ``path/file.py:Name``; code named
            in ``overrides`` or in a dict needs no permission.
        observer: its methods are called with the progress; None: no output.

    With ``data.folds``, the run folder is that of a cross-validation: it has the results of all folds, and a run folder
    for each, ``fold-1`` and so on.

    A run may end without its distilled student (``teacher_below_baseline: stop``): ``not_distilled`` of results.json
    then gives the reason.

    Raises:
        PotstillError: any error that the user can correct.
    """
    _check_arguments(locals())
    if data is not None and not isinstance(data, DataSplits):
        raise UsageError(
            f"data must be DataSplits, got {type(data).__name__}: from_torch of potstill.data.datasets makes them of "
            "data sets, and a folder goes into the recipe: overrides=('data.source=DIR',)"
        )
    if data is not None and data.unlabeled is not None and not hasattr(data.unlabeled, "names"):
        kind = type(data.unlabeled).__name__
        raise UsageError(f"data.unlabeled must be an ImageSet, such as from_torch(images).train, got {kind}")
    given, flags = _name_networks(teacher, student, teacher_input, student_input)
    taken = [f"{key}.model" for key in ("teacher", "student") if f"--{key}" in flags]
    if twice := [key for key in taken if any(each.partition("=")[0].strip() == key for each in overrides)]:
        raise UsageError(f"{twice[0]} of overrides would replace the network that is given: leave one of them out")
    with given_networks(given):
        checked = load_recipe(recipe, overrides, flags={**flags, "--allow-code": allow_code}, data_needed=data is None)
        path = pipeline.run(
            checked,
            output_dir=Path(output_dir),
            name=name,
            resume=resume,
            overwrite=overwrite,
            data=data,
            observer=observer,
        )
    render(path)
    return path


def fit(
    data: str | Path,
    *,
    under: str | None = None,
    within: str | None = None,
    teacher: str | Sequence[str] | None = None,
    students: Sequence[str] = (),
    int8: bool = False,
    recipe: str | Path | Mapping[str, Any] = "photos",
    overrides: tuple[str, ...] = (),
    seeds: int = FRESH_SEEDS,
    output_dir: str | Path = "runs",
    name: str | None = None,
    resume: bool = False,
    allow_code: bool = False,
    observer: Observer | None = None,
) -> Path:
    """Find the best small student for these images, within limits and a budget of time; return the folder.

    It is also the command ``potstill fit``.  ``export/model.onnx`` in the folder is the exported student, fit.json has
    all that was found, and sweep.html is the report.

    Args:
        data: a folder of images, a manifest, or the name of a data set.
        under: limits of the exported student, such as ``"5ms,2MB"``: the time of one image on one thread of this CPU,
            and the size of the file; None: none.
        within: the time for everything, such as ``"30min"``; None: as long as all candidates take.
        teacher: in place of the recipe's, as after ``--teacher``; or several.
        students: names of the networks to consider; empty: small ones of the model table.
        int8: export to int8; the limits are of that file. Without it, too, where no file in float32 is within them.
        recipe: teacher, augmentation and training.
        overrides: changes of the recipe's settings; as after ``--set``.
        seeds: fresh seeds of winner and baseline, if there is time for so many.
        output_dir: folder in which the folder of the search is created.
        name: its name; None: the recipe's name and "-fit".
        resume: continue a search with the same settings.
        allow_code: run code that a recipe file names.
        observer: its methods are called with the progress; None: no output.

    Raises:
        UsageError: limits that no network meets, or a budget that is too small for one candidate.
        PotstillError: any other error that the user can correct.
    """
    _check_arguments(locals())
    if not isinstance(data, str | Path):
        raise UsageError(
            f"fit takes a folder, a manifest or a name as data, got {type(data).__name__}; data of Python can come "
            "from code: data='path/file.py:callable'"
        )
    teachers = None if teacher is None else [teacher] if isinstance(teacher, str) else list(teacher)
    flags: dict[str, Any] = {"--data": str(data), "--teacher": teachers, "--allow-code": allow_code}
    folder, _ = search(
        recipe,
        overrides,
        flags,
        output_dir=Path(output_dir),
        name=name,
        under=under,
        within=within,
        students=students,
        seeds=seeds,
        int8=int8,
        resume=resume,
        observer=observer,
    )
    render_sweep(folder)
    return folder


def shrink(
    run: str | Path,
    *,
    max_loss: float = 1.0,
    int8: bool = True,
    stage: str | None = None,
    epochs: int | None = None,
    overrides: tuple[str, ...] = (),
    data: str | None = None,
    allow_code: bool = False,
    observer: Observer | None = None,
) -> Path:
    """Find the smallest file of a run's student that loses at most ``max_loss`` points; return the search's folder.

    It is also the command ``potstill shrink``.  ``export/`` in the folder has the file, shrink.json all that was found,
    and shrink.html is the report.

    Args:
        run: a run folder.
        max_loss: points of accuracy on val, with 95 % confidence, against the student in float32.
        int8: quantize the files.
        stage: "distilled" or "baseline"; None: distilled, else baseline.
        epochs: of fine-tuning after each pruning; None: a quarter of the student's.
        overrides: settings of the fine-tuning, such as ``"training.lr=1e-4"``.
        data: path of the run's data, if it has moved.
        allow_code: run code that the run's recipe names.
        observer: its methods are called with the progress; None: no output.

    Raises:
        UsageError: a loss that so few val images cannot show, or a student that cannot be pruned.
        ArtifactError: no candidate loses as little.
        PotstillError: any other error that the user can correct.
    """
    _check_arguments(locals())
    with allowed_code(allow_code):
        finetuning = Finetuning(epochs, overrides, data, int8)
        folder, _ = search_smallest(Path(run), stage, max_loss, finetuning, observer=observer)
    render_shrink(folder)
    return folder


def _name_networks(
    teacher: Network | Sequence[Network] | None,
    student: Network | None,
    teacher_input: InputSpec | None,
    student_input: InputSpec | None,
) -> tuple[dict[str, tuple[Network, InputSpec | None]], dict[str, Any]]:
    """Return labels for networks from Python, and the flags that put them into the recipe."""
    # A module of layers, such as nn.Sequential, is no sequence of networks.
    teachers: list[Any] = [] if teacher is None else list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
    if teacher is not None and not teachers:
        raise UsageError("teacher is an empty list; None: the recipe's teacher")
    for key, network in [("student", student), *(("teacher", each) for each in teachers)]:
        if network is not None and not isinstance(network, torch.nn.Module) and not callable(network):
            raise UsageError(
                f"{key} must be an nn.Module or a callable that returns one, got {type(network).__name__}; an "
                f"architecture by its name goes into the recipe: overrides=('{key}.model=...',)"
            )
    for key, spec, given_network in (
        ("teacher_input", teacher_input, teachers),
        ("student_input", student_input, student is not None),
    ):
        if spec is not None and not given_network:
            raise UsageError(f"{key} needs {key.removesuffix('_input')}, a network from Python")
    labels = [f"{GIVEN}teacher{f'-{at}' if at > 1 else ''}" for at in range(1, len(teachers) + 1)]
    given: dict[str, tuple[Network, InputSpec | None]] = {
        label: (each, teacher_input) for label, each in zip(labels, teachers, strict=True)
    }
    flags: dict[str, Any] = {"--teacher": [f"{label}@{OWN_WEIGHTS}" for label in labels]} if labels else {}
    if student is not None:
        given[f"{GIVEN}student"] = (student, student_input)
        flags["--student"] = f"{GIVEN}student"
    return given, flags


def load(path: str | Path, *, module: torch.nn.Module | None = None, allow_code: bool = False) -> Classifier:
    """Return the model of a run folder (distilled student, else baseline, else teacher) or of a model folder.

    The model is on the CPU and in eval mode.

    Args:
        path: a run folder, a model folder or file, or a repository of the hub with a model of potstill:
            ``hf-hub:USER/NAME`` or ``hf-hub:USER/NAME@REVISION``.
        module: the network that the weights are loaded into; required if ``run`` got the network from Python.
        allow_code: run the code that the model file names.

    Raises:
        ArtifactError: there is no model, it is damaged, or it names code and ``allow_code`` is False.
        UsageError: the repository cannot be read.
    """
    _check_arguments(locals())
    with allowed_code(allow_code):
        return load_model(find_model(model_path(path)), module=module)
