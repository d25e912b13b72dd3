"""Successive halving within a budget of time: a race of students and settings, on val, with trainings done elsewhere.

All candidates are trained briefly, the better half longer, and so on; each training of a rung has the same epochs and
a complete schedule of its own.  The baseline of the winning student is searched in the same rungs, with as many trials.
Winner and baseline are then trained again with fresh seeds, which alone are evaluated on test.
"""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from potstill.errors import NonFiniteError, UsageError
from potstill.formatting import format_duration, format_many, format_milliseconds, format_scaled
from potstill.io import read_checksummed_json, write_checksummed_json
from potstill.models.model_table import Limits
from potstill.sweep import study
from potstill.training.callbacks import Observer, SilentObserver

if TYPE_CHECKING:
    from potstill.sweep.fit import RecipeTrainings

FIT_FILE = "fit.json"
FRESH_SEEDS = 3
MAX_STUDENTS = 4
SETTINGS: tuple[dict[str, str], ...] = (  # the first ones are tried where time is short
    {"method.name": "dist", "method.ce_weight": "1.0"},
    {"method.name": "kd", "method.temperature": "1.0", "method.alpha": "0.0"},
    {"method.name": "dist", "method.ce_weight": "0.0"},
    {"method.name": "kd", "method.temperature": "1.0", "method.alpha": "0.3"},
)
LR_FACTORS = (1.0, 0.5, 2.0, 0.25)  # of the baseline's learning rate, as many as a student has settings
MAX_STRETCH = 4  # times the recipe's epochs, where there is time
EXPORTED_SPEED = 0.5  # latency of an exported file, relative to the table's, until the first one is measured
EVALUATION_EPOCHS = 0.6  # time of a model's final evaluation on train, val and test, in epochs
END_SECONDS = 20.0  # for export and report, besides the time that the export of a student has taken
_PLANNED_SHARE = 0.97  # of the budget; the rest is for what estimates get wrong


class Student(NamedTuple):
    """A network that is trained."""

    name: str  # as for ``create_model``
    weights: str | None = None  # "pretrained", or None: from scratch


@dataclass(frozen=True)
class Candidate:
    """A student and the settings with which it is distilled."""

    student: Student
    settings: Mapping[str, str]

    @property
    def chosen(self) -> dict[str, str]:
        """All values that distinguish it, by key."""
        return {"student.model": self.student.name, **self.settings}


class Trained(NamedTuple):
    """What a training gave: metric on val, epochs that were trained now, and the seconds of these epochs."""

    value: float
    epochs: int
    seconds: float


class Costs:
    """Predict the seconds of trainings from estimates, corrected by the trainings so far.

    A training takes an overhead and its epochs; a distilled one also the teacher's time for each view that the cache
    does not have yet.

    ``epoch`` is the seconds of one epoch of each student, ``view`` of the teacher for one view of all images.
    """

    def __init__(self, epoch: Mapping[str, float], view: float, views: int) -> None:
        self._estimated, self._measured = dict(epoch), dict[str, float]()
        self.view, self._views, self.cached = view, views, 0
        self._overheads = list[float]()

    def epoch(self, student: str) -> float:
        """Return the seconds of an epoch, measured if possible."""
        if student in self._measured:
            return self._measured[student]
        ratios = [self._measured[name] / self._estimated[name] for name in self._measured]
        return self._estimated[student] * (statistics.fmean(ratios) if ratios else 1.0)

    def training(self, student: str, epochs: int, *, distilled: bool = True, cached: int | None = None) -> float:
        """Return the seconds of a training; ``cached``: views that the cache will have then."""
        overhead = statistics.fmean(self._overheads) if self._overheads else 5.0
        views = self.new_views(epochs, cached) if distilled else 0
        return overhead + epochs * self.epoch(student) + views * self.view

    def new_views(self, epochs: int, cached: int | None = None) -> int:
        """Return how many views a training of so many epochs adds to the cache."""
        return max(0, min(epochs, self._views) - (self.cached if cached is None else cached))

    def record(self, student: str, epochs: int, seconds: float, inside: float, *, distilled: bool) -> None:
        """Correct the predictions by a training that took ``seconds``, ``inside`` of them in its epochs."""
        if not epochs:
            return
        views = self.new_views(epochs) if distilled else 0
        predicted = epochs * self.epoch(student) + views * self.view
        ratio = inside / predicted if predicted > 0 else 1.0
        self._measured[student] = self.epoch(student) * ratio
        self.view *= ratio if views else 1.0
        self.cached += views
        self._overheads.append(max(0.0, seconds - inside))


def rung_sizes(candidates: int) -> tuple[int, ...]:
    """Return how many candidates each rung trains; a single candidate needs no race.

    Example:
        >>> [rung_sizes(n) for n in (1, 2, 3, 8, 16)]
        [(), (2,), (3, 2), (8, 4, 2), (16, 8, 4)]
    """
    sizes = [candidates] if candidates > 1 else []
    while sizes and sizes[-1] > 2 and len(sizes) < 3:
        sizes.append(math.ceil(sizes[-1] / 2))
    return tuple(sizes)


def rung_epochs(epochs: int, rung: int, rungs: int) -> int:
    """Return the epochs of a rung: all in the last one, half of the next one's in each before it.

    Example:
        >>> [rung_epochs(12, rung, 3) for rung in range(3)]
        [3, 6, 12]
    """
    halvings = rungs - 1 - rung
    return max(1, math.ceil(epochs / (1 << halvings)))


class Plan(NamedTuple):
    """How many candidates are raced, and how long and with how many fresh seeds the winner is trained."""

    candidates: int
    seeds: int
    epochs: int


def seconds_of(
    costs: Costs, pool: Sequence[Candidate], plan: Plan, *, done: Sequence[int] = (), sizes: Sequence[int] | None = None
) -> float:
    """Return the seconds of what is left of a plan, at most: as if the slowest candidates won every rung.

    ``done``: epochs of finished rungs, whose baselines are still to be trained; ``sizes`` of all rungs.
    """
    sizes = rung_sizes(plan.candidates) if sizes is None else sizes
    slowest = sorted(pool, key=lambda each: -costs.epoch(each.student.name))
    last = slowest[0].student.name
    per_student = max(Counter(each.student.name for each in pool).values())
    if done:  # the trials before may have had more settings of a student than are left
        per_student = max(per_student, min(len(SETTINGS), sizes[0]))
    seconds, cached = 0.0, costs.cached
    for rung, size in enumerate(sizes):
        epochs = done[rung] if rung < len(done) else rung_epochs(plan.epochs, rung, len(sizes))
        if rung >= len(done):
            for each in slowest[:size]:
                seconds += costs.training(each.student.name, epochs, cached=cached)
                cached += costs.new_views(epochs, cached)
        if per_student > 1:
            seconds += min(size, per_student) * costs.training(last, epochs, distilled=False)
    again = costs.training(last, plan.epochs, distilled=False) + EVALUATION_EPOCHS * costs.epoch(last)
    return seconds + plan.seeds * 2 * again + costs.new_views(plan.epochs, cached) * costs.view


def longest(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """Return the largest number from ``least`` to ``most`` for which ``fits`` holds; None if there is none.

    Example:
        >>> longest(lambda n: n * n < 50, 2, 100), longest(lambda n: False, 2, 100)
        (7, None)
    """
    if not fits(least):
        return None
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


class HalvingSearch:
    """The search in a folder: chooses students, races candidates, searches the baseline, trains both again.

    A resumed search must have the same ``description``.  ``within``: seconds of the budget, from ``began`` on; None:
    all candidates, with the recipe's epochs.
    """

    def __init__(
        self,
        trainings: "RecipeTrainings",
        folder: Path,
        description: Mapping[str, Any],
        *,
        limits: Limits,
        within: float | None,
        seeds: int = FRESH_SEEDS,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
        began: float | None = None,
    ) -> None:
        self.trainings, self.folder, self.description = trainings, folder, dict(description)
        self.limits, self.within, self.seeds, self.clock = limits, within, seeds, clock
        self.observer = observer or SilentObserver()
        self.state: dict[str, Any] = {}
        self._began, self._spent = clock() if began is None else began, 0.0

    def work(self, families: Sequence[Sequence[tuple[Student, float | None]]]) -> dict[str, Any]:
        """Do all that is left, and return fit.json; of each family the first one within the limits takes part."""
        self._open()
        if "seconds" in self.state:  # it is finished
            return self.state
        try:
            students = self._students(families)
            orders = [[Candidate(student, each) for each in self._settings(student)] for student in students]
            pool = [candidate for rank in zip(*orders, strict=True) for candidate in rank]
            teacher, view, epoch = self.trainings.estimate(students)
            costs = Costs(epoch, view, self.trainings.views())
            if "teacher" not in self.state:  # an error now rather than after the teacher's training
                self._plan(costs, pool, before=teacher)
        except UsageError:
            if "teacher" not in self.state:  # so that other limits can be given under the same name
                (self.folder / FIT_FILE).unlink()
            raise
        if "teacher" not in self.state:
            started = self.clock()
            self.trainings.train_teacher()
            self._save(teacher=round(self.clock() - started, 3))
        for row in self.rows:
            self._record(costs, row)
        if "plan" not in self.state:
            plan = self._plan(costs, pool)
            self._save(plan=plan._asdict())
        plan = Plan(**self.state["plan"])
        winner = self._race(costs, pool[: plan.candidates], plan)
        baseline = self._search_baseline(costs, winner, plan)
        self._train_again(costs, winner, baseline)
        if "exported" not in self.state:
            exported = self.trainings.export()
            missed = self.limits.excess(exported["ms"], exported["bytes"]) > 1
            self._save(exported=exported | {"missed": str(self.limits) if missed else ""})
        self._save(seconds=round(self._elapsed(), 1))
        return self.state

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All trials, in order."""
        rows: list[dict[str, Any]] = self.state["trials"]
        return rows

    def _open(self) -> None:
        path = self.folder / FIT_FILE
        if not path.exists():
            if any(not entry.name.startswith(".") for entry in self.folder.iterdir()):
                raise UsageError(f"{self.folder} exists and is no search; choose another --name or --output-dir")
            self.state = {"schema": 1, "settings": self.description, "trials": [], "rungs": [], "students": None}
            self._save()
            return
        self.state = read_checksummed_json(path)
        study.check_same_search(self.folder, self.state["settings"], self.description)
        self._spent = float(self.state.get("spent", 0.0))

    def _elapsed(self) -> float:
        return self._spent + self.clock() - self._began

    def _left(self) -> float:
        if self.within is None:
            return math.inf
        return _PLANNED_SHARE * self.within - self._elapsed() - self._end_seconds()

    def _end_seconds(self) -> float:
        """Return the seconds of export and report at the end."""
        return END_SECONDS + max((row.get("seconds", 0.0) for row in self.state["students"] or []), default=0.0)

    def _save(self, **facts: Any) -> None:
        self.state |= facts | {"spent": round(self._elapsed(), 3)}
        write_checksummed_json(self.folder / FIT_FILE, self.state)

    def _students(self, families: Sequence[Sequence[tuple[Student, float | None]]]) -> list[Student]:
        found = self.state["students"]
        if found is None:
            found, ratios = [], list[float]()
            limited = self.limits != Limits()
            for family in families:
                for student, estimate in family:
                    row: dict[str, Any] = {"name": student.name, "weights": student.weights, "estimated_ms": estimate}
                    speed = statistics.median(ratios) if ratios else EXPORTED_SPEED
                    is_last = student == family[-1][0]
                    if estimate is not None and self.limits.excess(estimate * speed, 0) > 1 and not is_last:
                        continue  # a smaller one of its family may do
                    if limited:
                        started = self.clock()
                        row["ms"], row["bytes"] = self.trainings.measure_student(student)
                        row["seconds"] = round(self.clock() - started, 3)
                        if estimate:
                            ratios.append(row["ms"] / estimate)
                    row["dropped"] = limited and self.limits.excess(row["ms"], row["bytes"]) > 1
                    found.append(row)
                    if limited:
                        self.observer.note(
                            f"{student.name}: {format_milliseconds(row['ms'])} for one image, "
                            f"{format_scaled(row['bytes'], 'B')} exported"
                            f"{f': dropped, it is not below {self.limits}' if row['dropped'] else ''}"
                        )
                    if not row["dropped"]:
                        if student.weights is None and self.trainings.student_settings(student):
                            self.observer.note(
                                f"{student.name}: its published weights are not on this machine, so it is trained from "
                                "scratch"
                            )
                        break
                if sum(not row["dropped"] for row in found) == MAX_STUDENTS:
                    break
            if found and all(row["dropped"] for row in found):
                nearest = min(found, key=lambda row: self.limits.excess(row["ms"], row["bytes"]))
                raise UsageError(
                    f"no student is below {self.limits} when exported.\nNearest: {nearest['name']}, "
                    f"{format_milliseconds(nearest['ms'])} and {format_scaled(nearest['bytes'], 'B')}; raise --under, "
                    "export to int8 with --int8, or make the images smaller with --image-size"
                )
            self._save(students=found)
        return [Student(row["name"], row["weights"]) for row in found if not row["dropped"]]

    def _settings(self, student: Student) -> list[dict[str, str]]:
        """Return the settings of the method in the order in which they are tried, the likely best first: kd for a
        pretrained student, dist for one from scratch.  Two classes are too few for dist.
        """
        found = [each for each in SETTINGS if each["method.name"] != "dist" or self.trainings.classes > 2]
        return sorted(found, key=lambda each: student.weights is not None and each["method.name"] != "kd")

    def _plan(self, costs: Costs, pool: Sequence[Candidate], *, before: float = 0.0) -> Plan:
        """Return the largest plan that fits into the time left; ``before``: seconds of what precedes the race."""
        base = min(self.trainings.base_epochs(each.student) for each in pool)
        if self.within is None:
            return Plan(len(pool), self.seeds, base)
        left, least = self._left() - before, math.ceil(base / 4)

        def fitting(count: int, seeds: int, shortest: int) -> Plan | None:
            epochs = longest(
                lambda epochs: seconds_of(costs, pool[:count], Plan(count, seeds, epochs)) <= left,
                shortest,
                MAX_STRETCH * base,
            )
            return None if epochs is None else Plan(count, seeds, epochs)

        shapes = [(count, self.seeds, base) for count in range(len(pool), 1, -1)]
        few = range(min(len(pool), 4), 1, -1)
        shapes += [(count, 1, shortest) for shortest in (math.ceil(base / 2), least) for count in few]
        for shape in [*shapes, (1, 1, least)]:
            if (plan := fitting(*shape)) is not None:
                return plan
        needed = seconds_of(costs, pool[:1], Plan(1, 1, least)) + before + self._elapsed() + self._end_seconds()
        raise UsageError(
            f"--within {format_duration(self.within)} is too short for one candidate, {pool[0].student.name}: teacher, "
            f"baseline and distilled student need about {format_duration(needed / _PLANNED_SHARE)} here"
            f"{f', the teacher {format_duration(before)} of it' if before else ''}"
            + ("" if before else ".\nWith --resume and a longer --within it continues from here")
        )

    def _race(self, costs: Costs, pool: list[Candidate], plan: Plan) -> Candidate:
        sizes, done = rung_sizes(plan.candidates), list[int]()
        for rung, size in enumerate(sizes):
            if rung == len(self.state["rungs"]):
                epochs = self._epochs_of_rung(costs, pool, plan, sizes, done)
                if epochs is None:
                    self.observer.note("no time left for another rung")
                    break
                self.state["rungs"].append(epochs)
                self._save()
                self.observer.note(
                    f"rung {rung + 1} of {len(sizes)}: {size} candidates, {format_many(epochs, 'epoch')} each"
                )
            epochs = self.state["rungs"][rung]
            rows = [
                self._trial(costs, "distilled", each, rung, epochs, optional=at > 0)
                for at, each in enumerate(pool[:size])
            ]
            ranked = self._rank(pool, rows)
            if not ranked:
                reasons = sorted({str(row["error"]) for row in self.rows if row["error"]})
                raise UsageError("no candidate could be trained:\n" + "\n".join(reasons[:5]))
            pool, done = ranked, [*done, epochs]
        return pool[0]

    def _epochs_of_rung(
        self, costs: Costs, pool: Sequence[Candidate], plan: Plan, sizes: Sequence[int], done: Sequence[int]
    ) -> int | None:
        """Return the epochs of the next rung, sized by the time that is left; None: there is none left for it."""
        rung, halvings = len(done), len(sizes) - 1 - len(done)
        if self.within is None:
            return rung_epochs(plan.epochs, rung, len(sizes))
        base = min(self.trainings.base_epochs(each.student) for each in pool)
        left = self._left()
        for seeds in (plan.seeds, 1):
            epochs = longest(
                lambda epochs, seeds=seeds: (  # type: ignore[misc]
                    seconds_of(costs, pool, Plan(plan.candidates, seeds, epochs), done=done) <= left
                ),
                max(1, math.ceil(base / 4), *(epochs << halvings for epochs in done[-1:])),  # no shorter than the last
                MAX_STRETCH * base,
            )
            if epochs is not None:
                return rung_epochs(epochs, rung, len(sizes))
        return None if done else rung_epochs(math.ceil(base / 4), 0, len(sizes))

    def _trial(
        self, costs: Costs, role: str, candidate: Candidate, rung: int, epochs: int, *, optional: bool
    ) -> dict[str, Any] | None:
        key = {"role": role, "rung": rung, "chosen": candidate.chosen}
        for row in self.rows:
            if all(row[name] == value for name, value in key.items()):
                return row
        name, distilled = candidate.student.name, role == "distilled"
        least = 2 * costs.training(name, epochs, distilled=False)  # of the fresh seeds
        if optional and costs.training(name, epochs, distilled=distilled) + least > self._left():
            self.observer.note(f"no time left for {', '.join(candidate.chosen.values())}")
            return None
        number, started = len(self.rows), self.clock()
        self.observer.note(f"{role} {', '.join(f'{key}={text}' for key, text in candidate.chosen.items())}")
        row = {**key, "number": number, "folder": f"{number:04d}", "state": "complete", "value": None, "error": None}
        trained: Trained | None = None
        try:
            trained = self.trainings.train(role, candidate.student, candidate.settings, epochs, str(row["folder"]))
        except (NonFiniteError, UsageError) as error:  # other candidates may work
            row |= {"state": "fail", "error": str(error).splitlines()[0]}
            self.observer.warn(f"{name} failed: {error}")
        row |= {"epochs": epochs, "seconds": round(self.clock() - started, 3), "last": None}
        row |= {"trained": 0, "inside": 0.0}
        if trained is not None:
            row |= {"value": trained.value, "trained": trained.epochs, "inside": trained.seconds}
        self.rows.append(row)
        self._record(costs, row)
        self._save()
        return row

    def _record(self, costs: Costs, row: Mapping[str, Any]) -> None:
        distilled = row["role"] == "distilled"
        name = row["chosen"]["student.model"]
        costs.record(name, row["trained"], row["seconds"], row["inside"], distilled=distilled)

    def _rank(self, pool: Sequence[Candidate], rows: Sequence[dict[str, Any] | None]) -> list[Candidate]:
        """Return the candidates with a result, best on val first; equal ones keep their order."""
        sign = 1 if self.trainings.measure == "nll" else -1
        ended = zip(pool[: len(rows)], rows, strict=True)
        pairs = [(sign * row["value"], each) for each, row in ended if row and row["value"] is not None]
        return [each for _, each in sorted(pairs, key=lambda pair: pair[0])]

    def _search_baseline(self, costs: Costs, winner: Candidate, plan: Plan) -> Candidate:
        """Return the best baseline of the winner's student, from as many trials in the same rungs."""
        trials = [
            sum(row["role"] == "distilled" and row["rung"] == rung and row["value"] is not None
                and row["chosen"]["student.model"] == winner.student.name for row in self.rows)
            for rung in range(len(self.state["rungs"]))
        ]  # fmt: skip
        lr = self.trainings.learning_rate(winner.student)
        pool = [
            Candidate(winner.student, {} if factor == 1 else {"student.training.lr": f"{factor * lr:.3g}"})
            for factor in LR_FACTORS
        ]
        counted = 0
        for rung, size in enumerate(trials):
            if size < 2:  # nothing to choose from
                break
            epochs = self.state["rungs"][rung]
            rows = [self._trial(costs, "baseline", each, rung, epochs, optional=True) for each in pool[:size]]
            pool = self._rank(pool, rows) or pool
            counted += sum(row is not None for row in rows)
        wanted = sum(size for size in trials if size > 1)
        if counted < wanted:
            self.observer.warn(
                f"for lack of time the baseline was searched with {counted} trials, the winner with {wanted}"
            )
        self._save(
            winner=winner.chosen,
            student_settings=self.trainings.student_settings(winner.student),
            baseline={"trials": max(1, counted), "wanted": max(1, wanted), "chosen": pool[0].chosen},
        )
        return pool[0]

    def _train_again(self, costs: Costs, winner: Candidate, baseline: Candidate) -> None:
        name = winner.student.name
        both = {"distilled": (winner.student, winner.settings), "baseline": (baseline.student, baseline.settings)}
        if "final_epochs" not in self.state:
            self._save(final_epochs=self._final_epochs(costs, winner.student))
        epochs = self.state["final_epochs"]
        if "fresh_seeds" not in self.state:
            started = self.clock()
            self.observer.note(
                f"winner and baseline are trained again with fresh seeds, {format_many(epochs, 'epoch')} each"
            )
            self.trainings.train_again(both, epochs, 1, evaluate=False)
            pair = self.clock() - started
            ends = 2 * EVALUATION_EPOCHS * costs.epoch(name)
            more = self.seeds - 1 if self.within is None else int((self._left() - ends) // (pair + ends))
            self._save(fresh_seeds=1 + max(0, min(self.seeds - 1, more)))
            if self.state["fresh_seeds"] < self.seeds:
                self.observer.note(f"there is time for {self.state['fresh_seeds']} of {self.seeds} fresh seeds")
        self.trainings.train_again(both, epochs, self.state["fresh_seeds"], evaluate=True)

    def _final_epochs(self, costs: Costs, student: Student) -> int:
        """Return the epochs of the fresh seeds: all that there is time for, at least a quarter of the recipe's."""
        base, name = self.trainings.base_epochs(student), student.name
        if self.within is None:
            return base
        left, least = self._left(), math.ceil(base / 4)

        def fits(epochs: int, seeds: int) -> bool:
            again = costs.training(name, epochs, distilled=False) + EVALUATION_EPOCHS * costs.epoch(name)
            return 2 * seeds * again + costs.new_views(epochs) * costs.view <= left

        # One of the models is deployed: further seeds are trained where each has the recipe's epochs at least.
        in_full = [(seeds, max([base, *self.state["rungs"]])) for seeds in range(self.seeds, 1, -1)]
        for seeds, shortest in (*in_full, (1, least)):
            found = longest(lambda epochs, seeds=seeds: fits(epochs, seeds), shortest, MAX_STRETCH * base)  # type: ignore[misc]
            if found is not None:
                return found
        return least
