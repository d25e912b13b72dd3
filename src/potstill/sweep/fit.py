"""``potstill fit``: find the best small student within limits of latency and file size and within a time budget.

The students come from the model table; ``halving`` chooses among them; here is what it needs done, by a recipe.
"""

import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from potstill.config.recipe import Recipe, dump_recipe, load_recipe
from potstill.config.yaml import dump_yaml
from potstill.data.splits import DataSplits
from potstill.errors import UsageError, advising, did_you_mean, storing
from potstill.experiment.plan import choose_networks, lengthen_short_trainings, plan_stages, scale_training
from potstill.experiment.run_folder import RunFolder, RunLock
from potstill.formatting import format_milliseconds, format_scaled
from potstill.io import read_checksummed_json, write_checksummed_json
from potstill.models.model_table import (
    REFERENCE,
    SMALL_IMAGE,
    SMALL_IMAGE_STUDENTS,
    STUDENTS,
    Limits,
    ModelRow,
    parse_limits,
    read_table,
)
from potstill.models.pretrained import offline
from potstill.models.registry import check_model
from potstill.sweep import refuse_test_curves, study
from potstill.sweep.halving import (
    EXPORTED_SPEED,
    FIT_FILE,
    FRESH_SEEDS,
    MAX_STUDENTS,
    HalvingSearch,
    Student,
    Trained,
)
from potstill.sweep.worker import best_on_val, train_again, train_teachers, with_chosen_cache
from potstill.training.callbacks import ForwardingObserver, Observer, OnceObserver, SignalHandler, SilentObserver
from potstill.training.settings import TrainingSettings


class RecipeTrainings:
    """Trainings by a recipe: with other students, settings of kd and numbers of epochs."""

    def __init__(
        self,
        source: Any,
        sets: Sequence[str],
        flags: Mapping[str, Any],
        *,
        folder: Path,
        int8: bool = False,
        observer: Observer | None = None,
        stopping: "SignalHandler | None" = None,
    ) -> None:
        from potstill.console import silence_native_stderr
        from potstill.data.datasets import load_data
        from potstill.experiment.teacher_cache import count_views

        self.source, self.flags, self.folder, self.int8 = source, dict(flags), folder, int8
        self.observer, self.stopping = observer or SilentObserver(), stopping
        self.in_trainings = OnceObserver(self.observer)
        recipe = load_recipe(source, sets, flags=flags)
        refuse_test_curves(recipe)
        if not recipe.data.labeled:
            raise UsageError("fit compares with a baseline, which needs labels: use `potstill run --no-labels`")
        shared = []
        if recipe.data.augmentation_seed is None:  # fresh seeds see the views that the teacher has answered
            shared.append(f"data.augmentation_seed={recipe.seed}")
        if recipe.teacher_cache.views == "auto":  # trainings of other lengths are compared on the same views
            shared.append(f"teacher_cache.views={count_views(recipe)}")
        self.sets = [*sets, *shared]
        self.recipe = load_recipe(source, self.sets, flags=flags)
        for teacher in self.recipe.teacher_list:
            check_model(teacher.model)
        if not self.recipe.teacher_list:
            raise UsageError(f"the recipe {source} has no teacher, so there is nothing to distil: give --teacher M")
        self.measure: str = self.recipe.stage_training("distilled").selection_metric
        with silence_native_stderr():
            self.data: DataSplits = load_data(self.recipe.data, None, progress=self.observer)
        self.classes = len(self.data.class_names)
        self._teachers: tuple[str, ...] = ()
        self._known: dict[Student, TrainingSettings] = {}

    def pretrained(self, name: str) -> str | None:
        """Return "pretrained" if the recipe's students are, and these weights are on this machine."""
        from potstill.models.factory import why_weights_are_missing

        if self.recipe.student.weights != "pretrained":
            return None
        with offline():
            missing = why_weights_are_missing(name, "pretrained", size=self.recipe.data.size)
        return None if missing else "pretrained"

    def student_settings(self, student: Student) -> dict[str, str]:
        """Return the settings of a student; from scratch, it is trained like the recipe's alternative from scratch."""
        own = self.recipe.student
        if own.weights != "pretrained" or student.weights is not None:
            return {}
        other = next((each for each in own.fallback if each.weights is None), None)
        training = own.training if other is None else other.training
        return {"student.weights": "null", "student.head": "null", "student.training": json.dumps(training)}

    def student_recipe(
        self, student: Student, settings: Mapping[str, str], epochs: int | None = None, more: Iterable[str] = ()
    ) -> Recipe:
        """Return the recipe of a training; ``epochs``: None: those of the recipe."""
        chosen = {"student.model": student.name, **self.student_settings(student), **settings}
        texts = [*self.sets, *(f"{key}={text}" for key, text in chosen.items()), *more]
        recipe = load_recipe(self.source, [*texts, *self._teachers], flags=self.flags)
        recipe = with_chosen_cache(lengthen_short_trainings(recipe, len(self.data.train)), self.folder)
        if epochs is None:
            return recipe
        freeze = min(recipe.stage_training("student").freeze, epochs - 1)
        own = scale_training(recipe, epochs) | {"freeze": freeze}
        return recipe.model_copy(update={"student": recipe.student.model_copy(update={"training": own})})

    def _training(self, student: Student) -> TrainingSettings:
        if student not in self._known:
            self._known[student] = self.student_recipe(student, {}).stage_training("student")
        return self._known[student]

    def base_epochs(self, student: Student) -> int:
        """Return the epochs that the recipe trains a student."""
        return self._training(student).epochs

    def learning_rate(self, student: Student) -> float:
        """Return the learning rate that the recipe trains a student with."""
        return self._training(student).lr

    def views(self) -> int:
        """Return the number of views that the teacher answers."""
        views = self.recipe.teacher_cache.views
        return views if isinstance(views, int) else 10**9

    def estimate(self, students: Sequence[Student]) -> tuple[float, float, dict[str, float]]:
        """Return the seconds of the teacher's training, of one view of all images, and of each student's epoch."""
        from potstill.experiment.estimate import estimate_stages
        from potstill.training.devices import create_compute

        compute = create_compute(self.recipe.stage_training("student"))
        epoch, teacher, view = dict[str, float](), 0.0, 0.0
        for at, student in enumerate(students):
            recipe = choose_networks(self.student_recipe(student, {}, 1))[0]
            planned = [each for each in plan_stages(recipe) if at == 0 or each.name == "baseline"]
            seconds = estimate_stages(recipe, planned, self.data, compute)
            epoch[student.name] = seconds.get("baseline", 1.0)
            if at == 0:
                teacher = sum(value for name, value in seconds.items() if name.startswith("teacher"))
                view = max(0.0, seconds.get("distilled", 0.0) - epoch[student.name])
        return teacher, view, epoch

    def measure_student(self, student: Student) -> tuple[float, int]:
        """Return milliseconds for one image and bytes of the exported student, before it is trained."""
        from potstill.experiment.builders import build_network
        from potstill.export.exporter import measure_network

        network = build_network(
            self.recipe, self.student_recipe(student, {}).student, self.data.class_names, self.data.range
        )
        return measure_network(network.module, network.architecture, network.input, self.data, int8=self.int8)

    def train_teacher(self) -> None:
        """Train the teacher, unless it is trained."""
        self._teachers = train_teachers(self.recipe, self.folder, self.in_trainings, self.stopping)

    def train(self, role: str, student: Student, settings: Mapping[str, str], epochs: int, name: str) -> Trained:
        """Train "distilled" or "baseline" in the folder ``trials/name``, or resume its training."""
        from potstill.experiment.pipeline import run

        self.train_teacher()
        times = _EpochTimes(role, self.in_trainings)
        folder = run(
            self.student_recipe(student, settings, epochs),
            output_dir=self.folder / "trials",
            name=name,
            resume=RunFolder(self.folder / "trials" / name).known,
            stages=("teacher", "distilled") if role == "distilled" else (role,),
            observer=times,
            stopping=self.stopping,
            evaluate=False,
        )
        for copied in folder.glob("teacher*/model.safetensors"):  # the teacher's own folder has it
            copied.unlink()
        return Trained(best_on_val(folder, role, self.measure), len(times.seconds), sum(times.seconds))

    def train_again(
        self,
        trainings: Mapping[str, tuple[Student, Mapping[str, str]]],
        epochs: int,
        seeds: int,
        *,
        evaluate: bool,
    ) -> None:
        """Train baseline and distilled student with fresh seeds; resume if there are more seeds than before."""
        self.train_teacher()
        more = [f"seed={self.recipe.seed + 1}", f"seeds={seeds}"]
        recipes = {
            role: self.student_recipe(student, settings, epochs, more)
            for role, (student, settings) in trainings.items()
        }
        train_again(recipes, self.folder, self.in_trainings, self.stopping, evaluate=evaluate)

    def export(self) -> dict[str, Any]:
        """Export the better of the two on val; return role, path, milliseconds and bytes."""
        from potstill.export.exporter import export, single_thread_latency
        from potstill.export.onnx import facts_path
        from potstill.export.options import ExportOptions

        folders = {role: self.folder / study.CONFIRMATION_FOLDER / role for role in ("distilled", "baseline")}
        values = {
            role: statistics.fmean(
                best_on_val(folder, each.parent.name, self.measure)
                for each in sorted(folder.glob(f"{role}*/model.json"))
            )
            for role, folder in folders.items()
        }
        worse = (
            values["distilled"] > values["baseline"]
            if self.measure == "nll"
            else values["distilled"] < values["baseline"]
        )
        role = "baseline" if worse else "distilled"
        options = ExportOptions(int8=self.int8, max_drop=1.0, output=self.folder / "export" / "model.onnx")
        path = export(folders[role] / role, options=options, note=self.observer.note)
        content, accuracy = path.read_bytes(), read_checksummed_json(facts_path(path))["accuracy"]
        return {
            "role": role,
            "file": str(path),
            "ms": single_thread_latency(content, self.recipe.data.size),
            "bytes": len(content),
            "int8_drop": None if accuracy is None else accuracy["before"] - accuracy["after"],
            "val": values,
        }


class _EpochTimes(ForwardingObserver):
    def __init__(self, stage: str, observer: Observer) -> None:
        super().__init__(observer)
        self._stage, self.seconds = stage, list[float]()

    def expect(self, estimate: Callable[[], Mapping[str, float]]) -> None:
        """Estimate nothing: that would take time, and is done for all trainings at once."""

    def epoch_end(self, record: dict[str, Any]) -> None:
        super().epoch_end(record)
        if self.current_stage == self._stage:
            self.seconds.append(float(record.get("seconds") or 0.0))


def find_families(
    size: int,
    classes: int,
    limits: Limits,
    *,
    int8: bool,
    reference: Callable[[], float],
    pretrained: Callable[[str], str | None],
    names: Sequence[str] = (),
) -> list[list[tuple[Student, float | None]]]:
    """Return the students that may be within the limits, by family and from large to small, from the model table.

    Without ``limits``, those of the table's reference network, whose milliseconds ``reference`` measures.
    ``pretrained`` returns "pretrained" for a network whose weights are at hand.  Each student comes with its estimated
    milliseconds.
    """
    table = {row.name: row for row in read_table()}
    milliseconds = reference() if limits.milliseconds is not None else None

    def estimate(row: ModelRow | None) -> float | None:
        return None if row is None or milliseconds is None else row.milliseconds(milliseconds, size)

    if names:
        return [
            [(Student(name, pretrained(name)), estimate(table.get(name) or table.get(f"timm/{name}")))]
            for name in names
        ]

    def excess(row: ModelRow) -> float:
        if limits == Limits():
            return row.multiply_adds / table[REFERENCE].multiply_adds
        exported = estimate(row)
        exported = None if exported is None else EXPORTED_SPEED * exported
        return limits.excess(exported, row.file_size(classes, int8=int8))

    listed = (SMALL_IMAGE_STUDENTS if size <= SMALL_IMAGE else STUDENTS).values()
    families = [[table[name] for name in reversed(family) if name in table] for family in listed]
    families = [fitting for family in families if (fitting := [row for row in family if excess(row) <= 1])]
    if not families:
        families = [[row] for row in table.values() if excess(row) <= 1]
        families.sort(key=lambda family: -family[0].multiply_adds)
        families = families[:MAX_STUDENTS]
    if not families:
        nearest = min(table.values(), key=excess)
        exported = estimate(nearest)
        kind = "estimated, in int8" if int8 else "estimated"
        time_text = "" if exported is None else f"{format_milliseconds(EXPORTED_SPEED * exported)} and "
        raise UsageError(
            f"--under {limits}: no network is below that with images of {size} px and {classes} classes.\nNearest: "
            f"{nearest.name}, {time_text}{format_scaled(nearest.file_size(classes, int8=int8), 'B')} ({kind})"
        )
    found = []
    for family in families:
        students = [(Student(row.name, pretrained(row.name)), estimate(row)) for row in family]
        found.append(sorted(students, key=lambda pair: pair[0].weights is None))
    return sorted(found, key=lambda family: family[0][0].weights is None)


def find_in_either_precision(
    find: Callable[..., list[list[tuple[Student, float | None]]]], *, int8: bool
) -> tuple[list[list[tuple[Student, float | None]]], bool]:
    """Return the students within the limits and whether to export to int8: as wanted, or where float32 has none."""
    try:
        return find(int8=int8), int8
    except UsageError:
        if int8:
            raise
    return find(int8=True), True


def fit(
    source: Any,
    sets: Sequence[str],
    flags: Mapping[str, Any],
    *,
    output_dir: Path,
    name: str | None = None,
    under: str | None = None,
    within: str | None = None,
    students: Sequence[str] = (),
    seeds: int = FRESH_SEEDS,
    int8: bool = False,
    resume: bool = False,
    observer: Observer | None = None,
    stopping: "SignalHandler | None" = None,
) -> tuple[Path, dict[str, Any]]:
    """Search, write the report's files, and return the folder of the search and the content of its fit.json.

    ``under`` limits the exported student (``parse_limits``), ``within`` the time (``parse_duration``).  Winner and
    baseline get as many fresh ``seeds`` as there is time for.  Without ``int8`` too, files are in int8 where no float32
    is within.
    """
    from potstill.evaluation.cost import measure_reference
    from potstill.export.options import find_format

    began = time.monotonic()
    limits = parse_limits(under) if under is not None else Limits()
    seconds = parse_duration(within) if within is not None else None
    for each in students:
        check_model(each)
    find_format("onnx")
    name = f"{load_recipe(source, sets, flags=flags).name[:60]}-fit" if name is None else name
    folder = output_dir / study.check_name(name)
    if (folder / FIT_FILE).exists() and not resume:
        raise UsageError(f"{folder} exists. To continue it: --resume. To keep it: --name {name}-2")
    if resume and not (folder / FIT_FILE).exists():
        raise UsageError(f"nothing to resume: {folder} holds no search; start it without --resume")
    observer = observer or SilentObserver()
    trainings = RecipeTrainings(source, sets, flags, folder=folder, int8=int8, observer=observer, stopping=stopping)
    find = partial(
        find_families,
        trainings.recipe.data.size,
        trainings.classes,
        limits,
        reference=cache(measure_reference),
        pretrained=trainings.pretrained,
        names=list(dict.fromkeys(students)),
    )
    families, trainings.int8 = find_in_either_precision(find, int8=int8)
    if trainings.int8 > int8:
        observer.note(f"no network is below {limits} in float32, so the student is exported to int8")
    int8 = trainings.int8
    options = {"--under": str(limits), "--students": ",".join(students), "--int8": int8}
    settings = dump_yaml(trainings.recipe.model_dump(mode="json") | options)
    description = {"recipe": settings, "data": trainings.data.fingerprint, "space": [], "grid": True}
    with storing(f"write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    with RunLock(folder), advising("--resume continues the search", (folder / FIT_FILE).exists):
        search = HalvingSearch(
            trainings,
            folder,
            description,
            limits=limits,
            within=seconds,
            seeds=seeds,
            observer=observer,
            began=began,
        )
        found = search.work(families)
        _write_report_files(folder, trainings, found)
    return folder, found


def parse_duration(text: str) -> float:
    """Return the seconds of a text such as 90s, 30min, 1.5h or 1h30min.

    Example:
        >>> [parse_duration(text) for text in ("90s", "30min", "1.5h", "1h30min")]
        [90.0, 1800.0, 5400.0, 5400.0]
    """
    parts = re.findall(r"(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)", text)
    if not parts or re.sub(r"(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)|\s", "", text):
        raise UsageError(f"--within {text}: write a number and its unit, such as 90s, 30min, 2h or 1h30min")
    if unknown := [unit for _, unit in parts if unit not in _DURATION_UNITS]:
        given = f"unknown unit {unknown[0]!r}{did_you_mean(unknown[0], _DURATION_UNITS)}" if unknown[0] else "no unit"
        raise UsageError(f"--within {text}: {given}\nUnits: {', '.join(_DURATION_UNITS)}")
    seconds = sum(float(number) * _DURATION_UNITS[unit] for number, unit in parts)
    if not 0 < seconds < math.inf:
        raise UsageError(f"--within {text[:40]}: the time must be above 0 and finite")
    return seconds


def repeat_command(found: Mapping[str, Any]) -> list[str]:
    """Return the arguments of ``potstill run`` that train teacher, baseline and the winner without a search."""
    texts = {**found["winner"], **found["student_settings"]}
    texts["student.training.epochs"], texts["student.training.min_steps"] = str(found["final_epochs"]), "0"
    student = texts.pop("student.model")
    weights = next(row["weights"] for row in found["students"] if row["name"] == student)
    return [
        "--student",
        f"{student}@{weights}" if weights else student,
        *(part for key, text in texts.items() for part in ("--set", f"{key}={text}")),
    ]


_DURATION_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def _write_report_files(folder: Path, trainings: RecipeTrainings, found: Mapping[str, Any]) -> None:
    """Write the files of a sweep, from which its report is made; see ``study``."""
    rows = [row for row in found["trials"] if row["role"] == "distilled"]
    keys = list(dict.fromkeys(key for row in rows for key in row["chosen"]))
    chosen = [row["chosen"] for row in rows]  # each with the options of its own method
    choices = {key: list(dict.fromkeys(each[key] for each in chosen if key in each)) for key in keys}
    space = [
        {"key": key, "choices": choices[key], "low": 0.0, "high": 0.0, "log": False, "whole": False,
         "text": f"{key}={','.join(choices[key])}"}
        for key in keys
    ]  # fmt: skip
    last = max((row["rung"] for row in rows), default=0)
    best = next((row for row in rows if row["rung"] == last and row["chosen"] == found["winner"]), None)
    recipe = {"recipe": dump_recipe(trainings.recipe), "data": trainings.data.fingerprint}
    sweep = {"schema": 1, **recipe, "space": space, "grid": True, "trials": len(rows), "measure": trainings.measure}
    write_checksummed_json(folder / study.SWEEP_FILE, sweep)
    RunFolder(folder).write_skipped(trainings.data.all_skipped)
    write_checksummed_json(folder / study.TRIALS_FILE, {"schema": 1, "trials": rows})
    final = {"trial": None, "folder": "", "value": None} if best is None else {
        "trial": best["number"], "folder": best["folder"], "value": best["value"],
    }  # fmt: skip
    write_checksummed_json(folder / study.FINAL_FILE, {"schema": 1, "chosen": found["winner"], **final})
    seeds = {"seeds": found["fresh_seeds"], "first_seed": trainings.recipe.seed + 1}
    facts = {"schema": 1, **seeds, "trials": found["baseline"]["trials"]}
    write_checksummed_json(folder / study.CONFIRMATION_FILE, facts)
