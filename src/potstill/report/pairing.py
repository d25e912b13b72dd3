"""Runs against each other on the same test images, image by image and seed by seed."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from potstill.evaluation.classification import Array
from potstill.evaluation.significance import Interval, crossed_interval, mcnemar, paired_interval
from potstill.experiment.verdict import MIN_SEEDS
from potstill.formatting import format_count, format_decimal, format_points
from potstill.report.run_reader import Run, StageResult, read_predictions

MAX_ALL_PAIRS = 6  # entrants up to which each meets each; of more, each meets the first alone


@dataclass(frozen=True)
class Contender:
    """One recipe with its distilled students, by seed; the baselines where there is no distilled student."""

    name: str
    students: Mapping[int, tuple[Run, StageResult]]
    images: tuple[tuple[str, str], ...] = ()  # (name, class) of each test image, as the predictions list them
    correct: Mapping[int, Array] = field(default_factory=dict)  # seed -> [N] bool
    fingerprint: str = ""


@dataclass(frozen=True)
class Pairing:
    """What two entrants' difference is, second minus first."""

    first: str
    second: str
    seeds: int
    gain: Interval  # of top-1, mean over the seeds; interval over seeds and test images, with one seed over these alone
    p: float  # of the test that goes with the interval
    adjusted: float = 1.0  # p, allowing for how many pairs were looked at


def read_contender(name: str, students: Mapping[int, tuple[Run, StageResult]]) -> Contender:
    """Read the test predictions of an entrant's students; seeds whose images are others than the first one's are out.

    Raises:
        ArtifactError: a damaged file.
    """
    images: tuple[tuple[str, str], ...] = ()
    correct: dict[int, Array] = {}
    for seed, (_, stage) in students.items():
        found = read_predictions(stage, "test")
        if found is None:
            continue
        labels = [found.class_names[label] for label in found.labels]
        own = tuple(zip(found.paths, labels, strict=True))
        images = images or own
        if own == images:
            correct[seed] = np.asarray(found.predicted) == np.asarray(found.labels)
    fingerprint = next((str(run.data.get("fingerprint") or "") for run, _ in students.values()), "")
    return Contender(name, students, images, correct, fingerprint)


def pair_contenders(entrants: Sequence[Contender]) -> tuple[list[Pairing], list[str]]:
    """Every two that were asked about the same test images, and a sentence on each two that were not."""
    pairs = list(itertools.combinations(entrants, 2))
    if len(entrants) > MAX_ALL_PAIRS:
        pairs = [(entrants[0], other) for other in entrants[1:]]
    meetings, notes = [], []
    for first, second in pairs:
        refused = _incomparable_reason(first, second)
        if refused:
            notes.append(refused)
            continue
        meetings.append(_make_pairing(first, second))
        if first.fingerprint != second.fingerprint:
            notes.append(
                f"{first.name} and {second.name} have test images of the same names and labels, but their data differ "
                "elsewhere: other training images, or other content"
            )
        if not first.correct.keys() & second.correct.keys():
            notes.append(f"{first.name} and {second.name} share no seed: they are paired in the order of their seeds")
    return _adjust_p_values(meetings), notes


def _incomparable_reason(first: Contender, second: Contender) -> str:
    both = f"{first.name} and {second.name} are not compared image by image"
    for each in (first, second):
        if not each.correct:
            return f"{both}: {each.name} has no test predictions"
    if first.images == second.images:
        return ""
    shared = len(set(first.images) & set(second.images))
    return (
        f"{both}: they were tested on different images ({format_count(len(first.images))} and "
        f"{format_count(len(second.images))}, "
        f"of which {format_count(shared)} have the same name and label), so the difference of their figures "
        "says nothing"
    )


def _make_pairing(first: Contender, second: Contender) -> Pairing:
    shared = sorted(first.correct.keys() & second.correct.keys())
    if shared:
        before, after = ([entrant.correct[seed] for seed in shared] for entrant in (first, second))
    else:
        few = min(len(first.correct), len(second.correct))
        before, after = (list(entrant.correct.values())[:few] for entrant in (first, second))
    a, b = np.stack(before), np.stack(after)
    if len(a) == 1:
        return Pairing(first.name, second.name, 1, paired_interval(a[0], b[0]), float(mcnemar(a[0], b[0])["p"]))
    found = crossed_interval(a, b)
    return Pairing(first.name, second.name, len(a), Interval(found.value, found.low, found.high), found.p)


def _adjust_p_values(meetings: Sequence[Pairing]) -> list[Pairing]:
    """Holm's step-down: with many pairs, some look different by chance."""
    order = sorted(range(len(meetings)), key=lambda at: meetings[at].p)
    adjusted, highest = dict[int, float](), 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min(1.0, (len(meetings) - rank) * meetings[at].p))
        adjusted[at] = highest
    return [Pairing(**{**vars(each), "adjusted": adjusted[at]}) for at, each in enumerate(meetings)]


def pairing_row(meeting: Pairing) -> dict[str, Any]:
    """A row of the page; better only with ``MIN_SEEDS`` seeds or more, where p allows for all pairs and is
    below 0.05.
    """
    low, high = meeting.gain.low, meeting.gain.high
    if meeting.seeds < MIN_SEEDS:
        says = f"too few seeds for a verdict: {MIN_SEEDS} or more are needed"
    elif (low > 0 or high < 0) and meeting.adjusted < 0.05:
        says = f"{meeting.second if meeting.gain.value > 0 else meeting.first} is better"
    else:
        says = "no clear difference"
    return {
        "first": meeting.first,
        "second": meeting.second,
        "gain": format_points(meeting.gain.value),
        "interval": f"{format_points(low)} to {format_points(high)}",
        "count": format_count(meeting.seeds),
        "p": format_decimal(meeting.adjusted, 3),
        "says": says,
    }
