"""One process of a sweep: run trials, retry those of processes that died, choose and confirm the best.

A trial is a run folder whose student is evaluated on val, and never sees the test split.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.config.recipe import Recipe, load_recipe
from potstill.errors import NonFiniteError, StorageError, UsageError
from potstill.experiment.run_folder import RunFolder, RunLock
from potstill.io import read_checksummed_json, write_checksummed_json
from potstill.methods import needs_teacher
from potstill.sweep import Space, baseline_space, recipe_values, study
from potstill.training.callbacks import ForwardingObserver, Observer, OnceObserver, SignalHandler, SilentObserver

if TYPE_CHECKING:
    import optuna


class Pruned(Exception):
    """Ends a pruned trial; raised during training, handled in this module."""


class PruningObserver(ForwardingObserver):
    """Forwards to another observer, reports the student's metric on val to the study, and ends pruned trials."""

    def __init__(self, trial: "optuna.Trial", measure: str, student: str, observer: Observer) -> None:
        super().__init__(observer)
        self._trial, self._measure, self._student, self._last = trial, measure, student, False

    def epoch_start(self, epoch: int, epochs: int, steps: int, images: int) -> None:
        """Forward, and remember whether this is the last epoch."""
        self._last = epoch == epochs
        super().epoch_start(epoch, epochs, steps, images)

    def epoch_end(self, record: dict[str, Any]) -> None:
        """Forward, and report the student's epochs to the study, which may prune the trial."""
        super().epoch_end(record)
        value = record.get("val", {}).get(self._measure)
        if self.current_stage != self._student or value is None:
            return
        self._trial.report(float(value), int(record["epoch"]))
        if not self._last and self._trial.should_prune():
            raise Pruned


def run_trial(
    recipe: Recipe,
    trials: Path,
    name: str,
    trial: "optuna.Trial",
    *,
    measure: str,
    student: str,
    observer: Observer,
    stopping: "SignalHandler | None",
) -> float:
    """Train a trial's student, or resume the training of a killed process; return ``measure`` on val of its best epoch.

    ``recipe`` has a trained teacher; ``student`` is "distilled" or "baseline".  Pruned: the study pruned the trial.
    """
    from potstill.experiment.pipeline import run

    folder = run(
        recipe,
        output_dir=trials,
        name=name,
        resume=RunFolder(trials / name).known,
        stages=("teacher", "distilled") if student == "distilled" else (student,),
        observer=PruningObserver(trial, measure, student, observer),
        stopping=stopping,
        evaluate=False,
    )
    return best_on_val(folder, student, measure)


def best_on_val(folder: Path, student: str, measure: str) -> float:
    """Return the metric on val of a student as it was saved: its best epoch, or the probe that it started from."""
    return float(read_checksummed_json(folder / student / "model.json")["facts"]["val"][measure])


def train_teachers(
    recipe: Recipe, folder: Path, observer: Observer, stopping: "SignalHandler | None"
) -> tuple[str, ...]:
    """Train the teachers of a search once, in ``teacher`` of its folder, and return the settings that use them."""
    from potstill.experiment.pipeline import run

    home, several = RunFolder(folder / "teacher"), isinstance(recipe.teacher, list)
    names = ["teacher" if at == 0 else f"teacher-{at + 1}" for at in range(len(recipe.teacher_list))]
    while not all(home.trained(name) for name in names):
        try:
            run(
                recipe,
                output_dir=folder,
                name="teacher",
                resume=home.known,
                stages=("teacher",),
                observer=observer,
                stopping=stopping,
                evaluate=False,
            )
        except StorageError as error:
            if "another process" not in str(error):
                raise
            time.sleep(POLL_SECONDS)
        except UsageError:
            if not home.known:  # otherwise another process started it meanwhile
                raise
    keys = [f"teacher.{at}" if several else "teacher" for at in range(len(names))]
    return tuple(
        text
        for key, name in zip(keys, names, strict=True)
        for text in (
            f"{key}.weights={home.stage(name).resolve()}",
            f"{key}.new_head=false",
            f"{key}.head={'none' if recipe.network(name).head == 'none' else 'null'}",  # else it is a part of them
            f"{key}.prompts=null",
            f"{key}.classes=null",
            f"{key}.mean=null",
            f"{key}.std=null",
        )
    )


def with_chosen_cache(recipe: Recipe, folder: Path) -> Recipe:
    """Return a recipe of a search with the ``data.cache`` that was chosen for its teachers, so that all trainings see
    the same pixels.
    """
    home = RunFolder(folder / "teacher")
    if recipe.data.cache != "auto" or not home.known:
        return recipe
    cache = load_recipe(home.recipe, data_needed=False, recorded=True).data.cache
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache": cache})})


def train_again(
    recipes: Mapping[str, Recipe],
    folder: Path,
    observer: Observer,
    stopping: "SignalHandler | None",
    *,
    evaluate: bool = True,
) -> None:
    """Train winner and best baseline of a search with fresh seeds, in ``CONFIRMATION_FOLDER``, if not done yet."""
    from potstill.experiment.pipeline import run

    for student, recipe in recipes.items():
        home = RunFolder(folder / study.CONFIRMATION_FOLDER / student)
        run(
            recipe,
            output_dir=home.path.parent,
            name=student,
            resume=home.known,
            stages=("teacher", "distilled") if student == "distilled" else (student,),
            observer=observer,
            stopping=stopping,
            evaluate=evaluate,
        )


DEFAULT_TRIALS = 20  # without --trials or a grid
CONFIRM_SEEDS = 5  # fresh seeds for comparing the best trial with the baseline
RETRIES = 2  # of a trial whose process died
POLL_SECONDS = 0.3
_START_SECONDS = 30.0  # within which a process has registered its trial


class Sweep:
    """One process of the sweep in a folder."""

    def __init__(
        self,
        source: Any,
        sets: Sequence[str],
        flags: Mapping[str, Any],
        space: Space,
        *,
        folder: Path,
        trials: int | None = None,
        grid: bool = False,
        observer: Observer | None = None,
        stopping: "SignalHandler | None" = None,
        on_trial: Callable[[dict[str, Any]], None] | None = None,
        student: str = "distilled",
        confirm_seeds: int = CONFIRM_SEEDS,
    ) -> None:
        self.source, self.sets, self.flags, self.space = source, tuple(sets), dict(flags), space
        self.folder, self.observer, self.stopping, self.on_trial = (
            folder,
            observer or SilentObserver(),
            stopping,
            on_trial,
        )
        self.in_trainings = OnceObserver(self.observer)
        self.grid = grid
        self.combinations = space.grid() if grid else []
        self.trials = trials if trials is not None else len(self.combinations) or DEFAULT_TRIALS
        if grid:
            self.trials = min(self.trials, len(self.combinations))
        self.recipe = load_recipe(source, sets, flags=flags)
        if not self.recipe.data.labeled and all(each.head == "none" for each in self.recipe.teacher_list):
            raise UsageError(
                "a search compares accuracies, or agreement with the teacher, and there is neither: --no-labels, and "
                "the teacher has no classes (teacher.head: none)"
            )
        self.measure = self.recipe.stage_training("distilled").selection_metric
        self.student, self.confirm_seeds = student, confirm_seeds
        self.worker = secrets.token_hex(6)

    def work(self, timeout: float | None = None) -> bool:
        """Run trials; return whether the sweep is finished: the best trial chosen and, if requested, confirmed.

        ``timeout``: seconds after which no further trial begins here.
        """
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        self._open_study()
        alive = self.folder / "workers" / self.worker
        alive.mkdir(parents=True)
        with RunLock(alive):
            teachers = self._teachers()
            while time.monotonic() < deadline:
                trial = self._next_trial()
                if trial is None:
                    break
                if trial is not _WAITING:
                    self._run_trial(trial, teachers)
                    continue
                time.sleep(POLL_SECONDS)
            else:
                return False
            self._choose_best()
            return self._confirm_best(teachers, deadline) if self.confirm_seeds else True

    def _locked(self) -> RunLock:
        return RunLock(self.folder, wait=True)

    def _open_study(self) -> None:
        from potstill.console import silence_native_stderr
        from potstill.data.datasets import load_data

        self.folder.mkdir(parents=True, exist_ok=True)
        with silence_native_stderr():
            data = load_data(self.recipe.data, None, progress=self.observer)
        self.recipe = self.recipe.with_chosen_method(len(data.class_names))
        wanted = study.describe_sweep(self.recipe, self.space, data.fingerprint, grid=self.grid, trials=self.trials)
        with self._locked():
            study.begin_or_join(self.folder, wanted)
            RunFolder(self.folder).write_skipped(data.all_skipped)
            self.study = study.open_study(
                self.folder,
                minimize=self.measure == "nll",
                seed=self.recipe.seed + int(self.worker, 16) % 2**31 * (self.folder / study.JOURNAL_FILE).exists(),
                grid=self.grid,
                epochs=self.recipe.stage_training("distilled").epochs,
            )
            known_cells = {trial.user_attrs.get("cell") for trial in self.study.get_trials(deepcopy=False)}
            for cell, combination in enumerate(self.combinations[: self.trials]):
                if cell not in known_cells:
                    self.study.enqueue_trial(combination, user_attrs={"cell": cell})
            # The first trial of a baseline has the recipe's own settings.
            own = recipe_values(self.space, self.recipe) if self.student == "baseline" else {}
            if own and not known_cells and not self.combinations:
                self.study.enqueue_trial(own)
        (self.folder / "trials").mkdir(exist_ok=True)

    def _teachers(self) -> tuple[str, ...]:
        if self.student == "baseline" or not self.recipe.teacher_list:
            return ()
        recipe = self._recipe_with_teacher()
        return () if recipe is None else train_teachers(recipe, self.folder, self.in_trainings, self.stopping)

    def _recipe_with_teacher(self) -> Recipe | None:
        """Return the recipe for training the teacher: the first of the space that needs one."""
        if needs_teacher(self.recipe.method):
            return self.recipe
        methods = next((each.choices for each in self.space.dimensions if each.key == "method.name"), ())
        for name in methods:
            recipe = load_recipe(self.source, [*self.sets, f"method.name={name}"], flags=self.flags)
            if needs_teacher(recipe.method):
                return recipe
        return None

    def _next_trial(self) -> Any:
        from optuna.trial import TrialState

        with self._locked():
            self._retry_trials()
            known = self.study.get_trials(deepcopy=False)
            begun = [t for t in known if t.state != TrialState.WAITING and not t.user_attrs.get("died")]
            retried = [t for t in known if t.state == TrialState.WAITING and "retry_of" in t.user_attrs]
            if len(begun) + len(retried) >= self.trials and not retried:
                return _WAITING if any(t.state == TrialState.RUNNING for t in begun) else None
            trial = self.study.ask()
            trial.set_user_attr("worker", self.worker)
            if "home" not in trial.user_attrs:
                trial.set_user_attr("home", f"{trial.number:04d}")
            trial.set_user_attr("chosen", study.suggest_settings(trial, self.space))
            return trial

    def _retry_trials(self) -> None:
        """Enqueue again the trials whose process no longer holds its lock."""
        from datetime import datetime

        import optuna
        from optuna.trial import TrialState

        for each in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker = each.user_attrs.get("worker")
            if worker == self.worker:
                continue
            age = (datetime.now() - each.datetime_start).total_seconds() if each.datetime_start else 0.0
            if (worker is None and age < _START_SECONDS) or (worker and self._is_alive(worker)):
                continue
            times = int(each.user_attrs.get("times", 0)) + (not each.user_attrs.get("let_go"))
            retry = times <= RETRIES
            if retry:  # before it is marked, so that a crash here repeats the trial instead of losing it
                entries = {key: each.user_attrs[key] for key in ("home",) if key in each.user_attrs}
                chosen = each.params or each.system_attrs.get("fixed_params", {})
                self.study.enqueue_trial(chosen, user_attrs={"retry_of": each.number, "times": times, **entries})
                self.observer.note(f"trial {each.number}: its process has ended; it is retried")
            optuna.trial.Trial(self.study, each._trial_id).set_user_attr("died" if retry else "error", _DIED)
            self.study.tell(each.number, state=TrialState.FAIL)

    def _is_alive(self, worker: str) -> bool:
        folder = self.folder / "workers" / worker
        if not folder.is_dir():
            return False
        try:
            with RunLock(folder):
                return False
        except StorageError:
            return True

    def _recipe(self, chosen: Mapping[str, str], teachers: Sequence[str], more: Sequence[str] = ()) -> Recipe:
        from potstill.experiment.teacher_cache import count_views

        base = {"method.name": str(self.recipe.method["name"])}
        varied = [*(f"{key}={text}" for key, text in chosen.items() if text != base.get(key)), *more]
        recipe = load_recipe(self.source, [*self.sets, *varied], flags=self.flags)
        if teachers and needs_teacher(recipe.method):
            recipe = load_recipe(self.source, [*self.sets, *varied, *teachers], flags=self.flags)
        if recipe.teacher_cache.views == "auto":  # trials of other lengths are compared on the same views
            views = count_views(self.recipe)
            recipe = recipe.model_copy(
                update={"teacher_cache": recipe.teacher_cache.model_copy(update={"views": views})}
            )
        return with_chosen_cache(recipe, self.folder)

    def _run_trial(self, trial: "optuna.Trial", teachers: Sequence[str]) -> None:
        from optuna.trial import TrialState

        started = time.monotonic()
        state, value = TrialState.COMPLETE, None
        chosen, home = trial.user_attrs["chosen"], trial.user_attrs["home"]
        self.observer.note(f"trial {trial.number}: {', '.join(f'{key}={text}' for key, text in chosen.items())}")
        try:
            recipe = self._recipe(chosen, teachers)
            value = run_trial(
                recipe,
                self.folder / "trials",
                home,
                trial,
                measure=self.measure,
                student=self.student,
                observer=self.in_trainings,
                stopping=self.stopping,
            )
        except Pruned:
            state = TrialState.PRUNED
        except (NonFiniteError, UsageError) as error:  # other combinations may work
            state = TrialState.FAIL
            trial.set_user_attr("error", str(error).splitlines()[0])
            self.observer.warn(f"trial {trial.number} failed: {error}")
        except BaseException:  # a signal or a full disk: not an error of the trial
            trial.set_user_attr("let_go", True)
            raise
        trial.set_user_attr("seconds", round(time.monotonic() - started, 3))
        with self._locked():
            self.study.tell(trial, value, state=None if state == TrialState.COMPLETE else state)
            self._write_trials()

    def _write_trials(self) -> None:
        rows = self.rows()
        found = {"schema": 1, "trials": rows}
        write_checksummed_json(self.folder / study.TRIALS_FILE, found)
        if self.on_trial is not None:
            self.on_trial({**found, "measure": self.measure, "wanted": self.trials})

    def rows(self) -> list[dict[str, Any]]:
        """Return all started trials in order, without those of dead processes, which were retried."""
        return [
            {
                "number": each.number,
                "folder": each.user_attrs.get("home"),
                "state": each.state.name.lower(),
                "chosen": each.user_attrs.get("chosen", {}),
                "value": each.value if each.state.name == "COMPLETE" else None,
                "last": each.intermediate_values[max(each.intermediate_values)] if each.intermediate_values else None,
                "epochs": len(each.intermediate_values),
                "seconds": each.user_attrs.get("seconds"),
                "error": each.user_attrs.get("error"),
            }
            for each in self.study.get_trials(deepcopy=False)
            if each.state.name != "WAITING" and not each.user_attrs.get("died")
        ]

    def winner(self) -> dict[str, Any]:
        """Return number, folder, chosen values and metric on val of the best trial."""
        found: dict[str, Any] = read_checksummed_json(self.folder / study.FINAL_FILE)
        return found

    def _choose_best(self) -> None:
        """Choose the best trial by val; test is not used."""
        with self._locked():
            if (self.folder / study.FINAL_FILE).exists():
                return
            done = [row for row in self.rows() if row["value"] is not None]
            if not done:
                reasons = sorted({str(row["error"]) for row in self.rows() if row["error"]})
                raise UsageError("no trial finished:\n" + "\n".join(reasons[:5]))
            best = (min if self.measure == "nll" else max)(done, key=lambda row: row["value"])
            self.observer.note(f"trial {best['number']} is the best on val, which is optimistic after a search")
            entries = {key: best[key] for key in ("folder", "chosen", "value")}
            write_checksummed_json(self.folder / study.FINAL_FILE, {"schema": 1, "trial": best["number"], **entries})

    def _confirm_best(self, teachers: Sequence[str], deadline: float) -> bool:
        """Search the baseline with as many trials, train both again on fresh seeds, and evaluate them on test."""
        if (self.folder / study.CONFIRMATION_FILE).exists():
            return True
        baseline_sweep = self.baseline_sweep()
        count = f"{baseline_sweep.trials} trials" if baseline_sweep.trials > 1 else "one trial"
        self.observer.note(
            f"the baseline is tuned as well: {count} over {', '.join(map(str, baseline_sweep.space.dimensions))}"
        )
        if not baseline_sweep.work(None if deadline == float("inf") else max(0.0, deadline - time.monotonic())):
            return False
        seed_settings = [f"seed={self.recipe.seed + 1}", f"seeds={self.confirm_seeds}"]
        recipes = {
            "distilled": self._recipe(self.winner()["chosen"], teachers, seed_settings),
            "baseline": baseline_sweep._recipe(baseline_sweep.winner()["chosen"], (), seed_settings),
        }
        with self._locked():
            if (self.folder / study.CONFIRMATION_FILE).exists():
                return True
            train_again(recipes, self.folder, self.in_trainings, self.stopping)
            facts = {"seeds": self.confirm_seeds, "first_seed": self.recipe.seed + 1, "trials": baseline_sweep.trials}
            write_checksummed_json(self.folder / study.CONFIRMATION_FILE, {"schema": 1, **facts})
        return True

    def baseline_sweep(self) -> "Sweep":
        """Return the search of the baseline's settings, with as many trials."""
        space = baseline_space(self.space, self.recipe, self.trials)
        found = Sweep(
            self.source,
            self.sets,
            self.flags,
            space,
            folder=self.folder / "baseline",
            trials=self.trials,
            grid=bool(space.dimensions) and space.listed and len(space.grid()) <= self.trials,
            observer=self.observer,
            stopping=self.stopping,
            student="baseline",
            confirm_seeds=0,
        )
        found.in_trainings = self.in_trainings
        return found


_WAITING = object()
_DIED = f"its process died {RETRIES + 1} times"
