"""``potstill export --prune`` and ``potstill shrink``: make a run's student smaller, with its teacher.

Channels are removed, and what is left is fine-tuned by the run's own recipe, from the run's teachers, whose outputs are
in the teacher cache.  ``shrink`` does so step by step, and keeps the smallest file that is good enough on val.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from potstill.config import stage_number, stage_role
from potstill.config.recipe import Recipe, StageSettings, load_recipe
from potstill.data.splits import DataSplits
from potstill.errors import ArtifactError, DataError, UsageError, did_you_mean
from potstill.evaluation.significance import paired_interval, paired_loss_bound, wilson_interval
from potstill.experiment.plan import PlannedStage, plan_stages, scale_training
from potstill.experiment.resume import changed_images, check_same_recipe
from potstill.experiment.run_folder import RunFolder
from potstill.formatting import format_loss, format_milliseconds, format_percent, format_points, format_scaled
from potstill.io import check_exists, read_checksummed_json, write_checksummed_json
from potstill.models.exported_files import ExportMetadata, create_onnx_predictor
from potstill.models.model_table import Limits, parse_limits
from potstill.training.callbacks import Observer, OnceObserver, SignalHandler, SilentObserver

if TYPE_CHECKING:
    from potstill.export.formats import Predictor
    from potstill.models.model_file import Classifier

PRUNED_FOLDER, START, FINETUNED = "pruned", "start", "finetuned"
EPOCH_SHARE = 4  # by default, fine-tuning takes this part of the student's epochs
QAT_FRACTION = 0.5  # of the epochs of fine-tuning that are quantization-aware, for int8; with early stopping: all
_MAX_SHARE = 0.9  # of the weights, that pruning removes at most for a target of size or time
_ATTEMPTS = 8  # pruned networks that are measured for a target of size or time
_TOLERANCE = 0.03  # so far below a target of size or time a pruned network may be


@dataclass(frozen=True)
class Target:
    """What a pruned network has to meet: a share of weights to remove, or limits of its file."""

    text: str
    share: float | None = None
    limits: Limits | None = None


def parse_target(text: str) -> Target:
    """Parse the value of ``--prune``: a share, or limits."""
    try:
        share = float(text)
    except ValueError:
        try:
            limits = parse_limits(text)
        except UsageError as error:
            raise UsageError(
                f"--prune{str(error).removeprefix('--under')}\nOr a share of the weights, such as 0.5"
            ) from None
        return Target(str(limits), limits=limits)
    if not 0 <= share < 1:
        raise UsageError(
            f"--prune {text}: the share of the weights to remove is from 0 to below 1, such as 0.5; a size or a time "
            "has a unit, such as 2MB or 5ms"
        )
    return Target(f"{share:g}", share=share)


@dataclass(frozen=True)
class Finetuning:
    """How a pruned network is fine-tuned."""

    epochs: int | None = None  # None: a quarter of the student's
    sets: tuple[str, ...] = ()  # settings, as after ``--set``
    data: str | None = None  # path of the run's data, if it has moved
    int8: bool = False  # whether the last half of the epochs is quantization-aware; with early stopping, all of them


class PrunedStudent:
    """A run's student, and how smaller ones are made of it; ``stage``: by default distilled, else baseline."""

    def __init__(
        self,
        run: Path,
        stage: str | None,
        finetuning: Finetuning,
        *,
        observer: Observer | None = None,
        stopping: "SignalHandler | None" = None,
    ) -> None:
        from potstill.models.model_file import load_model

        check_exists(run, "a run folder, such as runs/NAME")
        self.run, self.finetuning = RunFolder(run), finetuning
        self.observer, self.stopping = observer or SilentObserver(), stopping
        self._in_trainings = OnceObserver(self.observer)
        if not self.run.recipe.is_file():
            raise UsageError(
                f"{run} is no run folder, and pruning fine-tunes by a run's recipe, with its teacher: give the folder "
                "of a run, such as runs/photos"
            )
        self.stage = self._find_stage(stage)
        self.student: Classifier = load_model(self.run.stage(self.stage))
        if self.student.remodelled is not None or self.student.output_groups is not None:
            other = "the last layers of another method" if self.student.remodelled else "several outputs per class"
            raise UsageError(
                f"{self.run.stage(self.stage)} cannot be pruned: it has {other}.\n"
                "Prune the baseline, --model baseline, or distil with another method, such as kd"
            )
        self.recipe = self._recipe()

    def _find_stage(self, wanted: str | None) -> str:
        known = [name for name in ("distilled", "baseline") if self.run.trained(name)]
        if wanted is None and known:
            return known[0]
        if wanted is None:
            raise ArtifactError(f"{self.run.path} has no trained student, so there is nothing to prune")
        if stage_role(wanted) not in ("distilled", "baseline"):
            raise UsageError(
                f"--model {wanted}: only students are pruned, by their teacher{did_you_mean(wanted, known)}"
            )
        if not self.run.trained(wanted):
            raise ArtifactError(f"{self.run.path} has no trained {wanted!r}; it has {', '.join(known) or 'no student'}")
        return wanted

    @property
    def role(self) -> str:
        """Return "distilled" or "baseline"."""
        return stage_role(self.stage)

    def _recipe(self) -> Recipe:
        sets = [f"data.source={json.dumps(self.finetuning.data)}"] if self.finetuning.data else []
        own = load_recipe(self.run.recipe, data_needed=False, recorded=True)
        recipe = load_recipe(self.run.recipe, [*sets, *self.finetuning.sets], data_needed=True, recorded=True)
        if not recipe.data.labeled:
            raise UsageError(
                f"{self.run.path} was trained without labels (data.labeled: false), and pruning is judged by labels"
            )
        planned = next(
            each for each in plan_stages(own) if each.name == self.role
        )  # of the first seed: those of the others learn from the same networks
        epochs = self.finetuning.epochs or self._default_epochs(recipe)
        changed = {each.partition("=")[0] for each in self.finetuning.sets}
        training = self._training(recipe, epochs, changed)
        student = recipe.student.model_copy(
            update={
                "weights": None,
                "classes": None,
                "new_head": False,
                "head": None,
                "fallback": [],
                "training": training,
            }
        )
        return recipe.model_copy(
            update={
                "name": f"{recipe.name[:50]}-pruned",
                "seed": recipe.seed + stage_number(self.stage) - 1,
                "seeds": 1,
                "student": student,
                "teacher": self._teachers(own, planned),
                "assistants": [],
                "born_again_generations": 1,
                "teacher_below_baseline": "warn",
            }
        )

    def _default_epochs(self, recipe: Recipe) -> int:
        planned = self.student.facts.get("training", {}).get("planned_epochs")
        return max(1, math.ceil((planned or recipe.stage_training("student").epochs) / EPOCH_SHARE))

    def _training(self, recipe: Recipe, epochs: int, changed: set[str]) -> dict[str, Any]:
        """Return the student's own training settings: a short schedule of the same shape."""
        given = recipe.stage_training("student")
        quantized = given.qat_fraction
        if self.finetuning.int8 and not changed & {"training.qat_fraction", "student.training.qat_fraction"}:
            # Early stopping might end the training before its quantization-aware part.
            quantized = quantized or (QAT_FRACTION if given.early_stopping_patience is None else 1.0)
        return scale_training(recipe, epochs) | {"freeze": 0, "qat_fraction": quantized}

    def _teachers(self, own: Recipe, planned: PlannedStage) -> list[StageSettings] | StageSettings | None:
        """Return the trained networks that the student learned from: teachers, or an assistant or generation."""
        found = []
        for name in planned.teachers:
            network = own.network(name)
            changes: dict[str, Any] = dict.fromkeys(("prompts", "classes", "mean", "std"))
            changes |= {"weights": str(self.run.stage(name).resolve()), "new_head": False, "fallback": []}
            changes["head"] = network.head if network.head == "none" else None
            found.append(network.model_copy(update=changes))
        if not found:  # the baseline, or a method without teacher
            return own.teacher
        return found if isinstance(own.teacher, list) and stage_role(planned.teachers[0]) == "teacher" else found[0]

    @cached_property
    def splits(self) -> DataSplits:
        """The splits of the run's data; DataError: the images have changed since, so that val may have trained ones."""
        from potstill.console import silence_native_stderr
        from potstill.data.datasets import load_data

        with silence_native_stderr():
            found = load_data(self.recipe.data, None, progress=self.observer)
        if self.run.read_environment().get("data_fingerprint") != found.fingerprint:
            raise DataError(
                f"{found.source} has changed since {self.run.path} was trained on it, so that images of its train may "
                "now be in val or test:\n"
                + "\n".join(changed_images(self.run, found.as_rows()))
                + "\nRestore the former images, or give the folder where they are with --data"
            )
        return found

    def prune(self, student: "Classifier", share: float) -> "Classifier":
        """Return a copy of a student with at most ``1 - share`` of its weights."""
        from potstill.models.pruning import describe_widths, prune_channels
        from potstill.models.registry import build_model

        pruned = prune_channels(student.module, share, size=student.input.size, architecture=student.architecture)
        whole = build_model(student.architecture, len(student.class_names), size=student.input.size)
        widths = describe_widths(whole, pruned)
        return dataclasses.replace(student, module=pruned, pruned=widths or None, facts={})

    def prune_to(self, target: Target, *, int8: bool) -> "Classifier":
        """Return the least pruned student that meets a target."""
        if target.share is not None:
            return self.prune(self.student, target.share)
        from potstill.export.exporter import measure_network
        from potstill.models.pruning import count_weights

        assert target.limits is not None
        limits, splits = target.limits, self.splits.measured
        low, high, found, nearest = 0.0, _MAX_SHARE, None, ""
        share = 0.0
        for _ in range(_ATTEMPTS):
            candidate = self.prune(self.student, share)
            ms, size = measure_network(candidate.module, candidate.architecture, candidate.input, splits, int8=int8)
            figures = f"{format_milliseconds(ms)} and {format_scaled(size, 'B')}"
            removed = 1 - count_weights(candidate.module) / count_weights(self.student.module)
            self.observer.note(f"{format_percent(removed, 0)} of the weights removed: {figures}")
            excess = limits.excess(ms, size)
            if excess <= 1:
                high, found = share, candidate
                if share == 0 or excess >= 1 - _TOLERANCE:
                    break
            elif share >= high:
                nearest = f"{figures}, with {format_percent(removed, 0)} of the weights removed"
                break
            else:
                low = share
            if found is None:
                share = high if low > 0 else min(high, 1 - (1 - share) / (excess * (1 + _TOLERANCE / 2)))
            else:
                share = (low + high) / 2
        if found is None:
            raise UsageError(
                f"--prune {target.text}: no pruning of {self.student.architecture} is below that. Nearest: {nearest}.\n"
                "Give a larger target, or a smaller student: `potstill fit DATA --under` finds one"
            )
        return found

    def finetune(self, start: Callable[[], "Classifier"], folder: Path) -> Path:
        """Fine-tune a pruned network; return its run folder.  What is finished already stays as it is."""
        from potstill.experiment.pipeline import run
        from potstill.models.model_file import save_model

        home, first = RunFolder(folder / FINETUNED), folder / START
        if not home.trained(self.role):
            _ = self.splits  # refuses other images before anything is written
        if not (first / "model.json").exists():
            save_model(start(), first)
        student = self.recipe.student.model_copy(update={"weights": str(first.resolve())})
        recipe = self.recipe.model_copy(update={"student": student})
        if home.known:
            _check_same_settings(home, recipe, self.role)
        if not home.trained(self.role):
            run(
                recipe,
                output_dir=folder,
                name=FINETUNED,
                resume=home.known,
                stages=("teacher", "distilled") if self.role == "distilled" else ("baseline",),
                observer=self._in_trainings,
                stopping=self.stopping,
                evaluate=False,
            )
        for copied in home.path.glob("teacher*/model.safetensors"):  # the run has it
            copied.unlink()
        return home.path


def _check_same_settings(home: RunFolder, recipe: Recipe, role: str) -> None:
    changes = []
    try:
        check_same_recipe(home, recipe)
    except UsageError as error:
        changes = str(error).splitlines()[1:-1]
    former = load_recipe(home.recipe, data_needed=False, recorded=True).stage_training(role).epochs
    if not changes and former != (epochs := recipe.stage_training(role).epochs):  # a run may be extended, this may not
        changes = [f"  training.epochs: was {former}, now {epochs}"]
    if changes:
        lines = "\n".join(changes)
        raise UsageError(
            f"{home.path.parent} was fine-tuned with other settings:\n{lines}\nDelete it to train it again"
        )


def prune_run(
    run: Path,
    stage: str | None,
    target: Target,
    finetuning: Finetuning,
    *,
    observer: Observer | None = None,
    stopping: "SignalHandler | None" = None,
) -> Path:
    """Prune a run's student to a target and fine-tune it; return the model folder."""
    from potstill.models.pruning import count_weights, require_torch_pruning

    if target.share != 0:
        require_torch_pruning()
    work = PrunedStudent(run, stage, finetuning, observer=observer, stopping=stopping)
    name = f"{work.stage}-{target.text.replace(',', '-')}{'-int8' if finetuning.int8 else ''}"

    def start() -> "Classifier":
        pruned = work.prune_to(target, int8=finetuning.int8)
        before, after = count_weights(work.student.module), count_weights(pruned.module)
        work.observer.note(
            f"pruned {pruned.architecture}: {after:,} of {before:,} weights are left "
            f"({format_percent(after / before, 0)})"
        )
        return pruned

    return work.finetune(start, run / PRUNED_FOLDER / name) / work.role


SHRINK_FOLDER, SHRINK_FILE = "shrink", "shrink.json"
STEP = 0.25  # of the remaining weights, removed from one candidate to the next
MAX_STEPS = 12  # after which 3 % of the weights are left
# The chance that the chosen file loses more than allowed: of files before the first failure, and after it.
ERROR_LEVELS = (0.03, 0.02)


class LossTest:
    """Decides on val which files lose little enough; the search ends at the second failure.

    Of the files that lose too much in truth, the first is tested at a level of 3 % if none has failed before, and of
    2 % otherwise.  If it does not pass, it is a failure itself, so the next one is tested at 2 %, and if that does not
    pass, the search ends.  So the chance that any such file passes is at most 3 % + 2 % (Bonferroni over the
    failures), however many files are tried and however their errors depend on each other.
    """

    def __init__(self, max_loss: float) -> None:
        self.max_loss, self.failures = max_loss, 0

    @property
    def ended(self) -> bool:
        """Return whether as many files have failed as may fail."""
        return self.failures == len(ERROR_LEVELS)

    def judge(self, lost: int, gained: int, images: int) -> dict[str, Any]:
        """Return ``loss``, its upper ``bound``, the ``confidence`` of that, and whether the file ``passes``."""
        confidence = 1 - ERROR_LEVELS[self.failures]
        bound = paired_loss_bound(lost, gained, images, confidence)
        passes = 100 * bound <= self.max_loss + 1e-9
        self.failures += not passes
        return {"loss": (lost - gained) / images, "bound": bound, "confidence": confidence, "passes": passes}


@dataclass
class _Candidate:
    folder: Path  # of the model
    content: bytes
    row: dict[str, Any]  # as in shrink.json

    @property
    def passes(self) -> bool:
        return bool(self.row["passes"])


def shrink(
    run: Path,
    stage: str | None,
    max_loss: float,
    finetuning: Finetuning,
    *,
    observer: Observer | None = None,
    stopping: "SignalHandler | None" = None,
) -> tuple[Path, dict[str, Any]]:
    """Find the smallest file that loses at most ``max_loss`` points on val with 95 % confidence.

    Points are in (0, 100], against the student in float32.  Return the folder of the search, and its shrink.json.
    """
    from potstill.export.options import find_format
    from potstill.models.pruning import require_torch_pruning

    if not 0 < max_loss <= 100:
        raise UsageError(f"--max-loss is in points of accuracy, above 0 and at most 100, got {max_loss:g}")
    require_torch_pruning()
    find_format("onnx")
    work = PrunedStudent(run, stage, finetuning, observer=observer, stopping=stopping)
    search = _Search(work, max_loss)
    return search.folder, search.run()


class _Search:
    def __init__(self, work: PrunedStudent, max_loss: float) -> None:
        from potstill.models.pruning import check_prunable

        self.work, self.max_loss, self.int8 = work, max_loss, work.finetuning.int8
        self.folder = work.run.path / SHRINK_FOLDER / work.stage
        self.note = work.observer.note
        check_prunable(work.student.module, work.student.architecture)
        self.splits = work.splits.measured
        _check_images(len(self.splits.val), max_loss)
        self.reference = self._correct(self._torch(work.student), "val")
        self.rows: list[dict[str, Any]] = []
        self.test = LossTest(max_loss)

    def run(self) -> dict[str, Any]:
        """Try one candidate after the other; export the last that is good enough; return the content of shrink.json."""
        chosen = self._try_all()
        if chosen is None:
            nearest = min(self.rows, key=lambda row: row["bound"])
            raise ArtifactError(
                f"no smaller file loses at most {self.max_loss:g} points with 95 % confidence, on "
                f"{len(self.splits.val)} val images. Nearest: {_describe_row(nearest)}.\n"
                "Allow more with --max-loss, fine-tune longer with --epochs, or export the student as it is"
            )
        found = self._finish(chosen)
        write_checksummed_json(self.folder / SHRINK_FILE, found)
        return found

    def _try_all(self) -> _Candidate | None:
        """Return the smallest candidate that is good enough; ``rows`` has all of them."""
        from potstill.models.model_file import load_model
        from potstill.models.pruning import UnreachableShare

        chosen, current = None, self.work.student
        if self.int8:
            chosen = self._try(self.work.run.stage(self.work.stage), "as it is")
            if not chosen.passes:
                folder = self._finetune(0, lambda: self.work.prune(self.work.student, 0.0))
                chosen = self._try(folder, "fine-tuned")
                if self.test.ended:
                    return None
                current = load_model(folder)
        for step in range(1, MAX_STEPS + 1):
            before = current
            try:
                folder = self._finetune(step, lambda: self.work.prune(before, STEP))  # noqa: B023 # called at once
            except UnreachableShare as error:
                self.note(f"the search ends here: {str(error).splitlines()[0]}")
                break
            candidate, current = self._try(folder, "pruned and fine-tuned"), load_model(folder)
            if candidate.passes:
                chosen = candidate
            elif self.test.ended:
                break
        return chosen

    def _finetune(self, step: int, start: "Callable[[], Classifier]") -> Path:
        name = f"{'int8' if self.int8 else 'float32'}-{step:02d}"
        return self.work.finetune(start, self.folder / "candidates" / name) / self.work.role

    def _try(self, folder: Path, how: str) -> _Candidate:
        from potstill.export.exporter import convert_network, single_thread_latency
        from potstill.models.model_file import load_model
        from potstill.models.pruning import count_weights

        model = load_model(folder)
        content = convert_network(model.module, model.architecture, model.input, self.splits, int8=self.int8)
        correct = self._correct(create_onnx_predictor(content), "val")
        lost, gained = int((self.reference & ~correct).sum()), int((~self.reference & correct).sum())
        images = len(correct)
        row = {
            "folder": str(folder.relative_to(self.work.run.path)),
            "how": how,
            "weights": count_weights(model.module),
            "bytes": len(content),
            "ms": single_thread_latency(content, model.input.size),
            "val": wilson_interval(int(correct.sum()), images)._asdict(),
            "lost": lost,
            "gained": gained,
            **self.test.judge(lost, gained, images),
        }
        self.rows.append(row)
        self.note(f"{_describe_row(row)}: {'small enough a loss' if row['passes'] else 'too much may be lost'}")
        return _Candidate(folder, content, row)

    def _finish(self, chosen: _Candidate) -> dict[str, Any]:
        from potstill.export.exporter import export
        from potstill.export.options import ExportOptions

        target = self.folder / "export" / f"model{'-int8' if self.int8 else ''}.onnx"
        options = ExportOptions(int8=self.int8, max_drop=1.0, output=target, data=self.work.finetuning.data)
        export(chosen.folder, options=options, note=self.note)
        student = self._correct(self._torch(self.work.student), "test")
        file = self._correct(create_onnx_predictor(target.read_bytes()), "test")
        images, student_row = len(file), self.work.student
        return {
            "schema": 1,
            "run": str(self.work.run.path),
            "stage": self.work.stage,
            "architecture": student_row.architecture,
            "max_loss": self.max_loss,
            "int8": self.int8,
            "finetuning_epochs": self.work.recipe.stage_training(self.work.role).epochs,
            "val_images": len(self.reference),
            "reference": self._reference_row(),
            "candidates": self.rows,
            "chosen": self.rows.index(chosen.row),
            "file": str(target),
            "test": {
                "images": images,
                "looks": self._looks() + 1,
                "student": wilson_interval(int(student.sum()), images)._asdict(),
                "file": wilson_interval(int(file.sum()), images)._asdict(),
                "difference": paired_interval(student, file)._asdict(),
            },
        }

    def _looks(self) -> int:
        """Return how often searches in this folder have evaluated files on test."""
        path = self.folder / SHRINK_FILE
        return int(read_checksummed_json(path)["test"]["looks"]) if path.exists() else 0

    def _reference_row(self) -> dict[str, Any]:
        from potstill.export.exporter import convert_network, single_thread_latency
        from potstill.models.pruning import count_weights

        model = self.work.student
        content = convert_network(model.module, model.architecture, model.input, self.splits, int8=False)
        return {
            "weights": count_weights(model.module),
            "bytes": len(content),
            "ms": single_thread_latency(content, model.input.size),
            "val": wilson_interval(int(self.reference.sum()), len(self.reference))._asdict(),
        }

    def _torch(self, model: "Classifier") -> "Predictor":
        from potstill.export.exporter import create_torch_predictor

        return create_torch_predictor(model.module, model.input, "none")

    def _correct(self, predictor: "Predictor", split: str) -> Any:
        """Return for each image of a split whether a model in float32 or a file classifies it correctly, [N] bool."""
        from potstill.export.exporter import compute_logits

        student, images = self.work.student, self.splits.split(split)
        metadata = ExportMetadata(student.architecture, tuple(student.class_names), student.input, "none", int8=False)
        (logits,) = compute_logits([predictor], images, range(len(images)), metadata)
        return logits.argmax(axis=1) == images.labels


def _check_images(count: int, max_loss: float) -> None:
    """Raise UsageError if so few val images cannot show that little is lost, even if no image changes."""
    confidence = 1 - ERROR_LEVELS[0]
    bound = 100 * paired_loss_bound(0, 0, count, confidence)
    if bound > max_loss:
        squared, share = NormalDist().inv_cdf(confidence) ** 2, max_loss / 100
        needed = math.ceil(squared * (1 - share) / share)  # the bound of 0 changes among n is z^2 / (n + z^2)
        raise UsageError(
            f"--max-loss {max_loss:g}: {count} val images cannot show so small a loss: if not one image changes, up to "
            f"{bound:.2g} points may be lost, with {format_percent(confidence, 0)} confidence.\n"
            f"Nearest: --max-loss {math.ceil(10 * bound) / 10:g}; or a run with at least {needed:,} val images"
        )


def _describe_row(row: Mapping[str, Any]) -> str:
    return (
        f"{row['how']}, {format_scaled(row['weights'])} weights: {format_scaled(row['bytes'], 'B')}, "
        f"{format_milliseconds(row['ms'])}, val top-1 {format_percent(row['val']['value'])}, "
        f"{format_loss(row['loss'])}, loses at most {format_points(row['bound'], signed=False)} points "
        f"({format_percent(row['confidence'], 0)})"
    )
