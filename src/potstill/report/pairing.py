"""Paired comparisons of recipes on the same test images, image by image and seed by seed."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from potstill.evaluation.classification import Array
from potstill.evaluation.significance import Interval, crossed_interval, mcnemar, paired_interval
from potstill.experiment.verdict import MIN_SEEDS
from potstill.formatting import format_count, format_decimal, format_points
from potstill.report.run_reader import Run, StageResult, read_predictions

MAX_ALL_PAIRS = 6  # contenders up to which all pairs are compared; of more, each with the first


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
    """The difference of two contenders, second minus first."""

    first: str
    second: str
    seeds: int
    gain: Interval  # mean gain of top-1; interval over seeds and test images, with one seed over test images
    p: float
    adjusted: float = 1.0  # p adjusted for the number of pairs


def read_contender(name: str, students: Mapping[int, tuple[Run, StageResult]]) -> Contender:
    """Read the test predictions of a contender's students; seeds with other images than the first are left out.

    Raises:
        ArtifactError: a file is damaged.
    """
    images: tuple[tuple[str, str], ...] = ()
    correct: dict[int, Array] = {}
    for seed, (_, stage) in students.items():
        found = read_predictions(stage, "test")
        if found is None:
            continue
        labels = [found.class_names[label] for label in found.labels]
        seed_images = tuple(zip(found.paths, labels, strict=True))
        images = images or seed_images
        if seed_images == images:
            correct[seed] = np.asarray(found.predicted) == np.asarray(found.labels)
    fingerprint = next((str(run.data.get("fingerprint") or "") for run, _ in students.values()), "")
    return Contender(name, students, images, correct, fingerprint)


def pair_contenders(contenders: Sequence[Contender]) -> tuple[list[Pairing], list[str]]:
    """Compare all pairs on the same test images; return also a sentence for each pair that cannot be compared."""
    pairs = list(itertools.combinations(contenders, 2))
    if len(contenders) > MAX_ALL_PAIRS:
        pairs = [(contenders[0], other) for other in contenders[1:]]
    pairings, notes = [], []
    for first, second in pairs:
        reason = _incomparable_reason(first, second)
        if reason:
            notes.append(reason)
            continue
        pairings.append(_make_pairing(first, second))
        if first.fingerprint != second.fingerprint:
            notes.append(
                f"{first.name} and {second.name} have test images of the same names and labels, but their data differ "
                "elsewhere: other training images, or other content"
            )
        if not first.correct.keys() & second.correct.keys():
            notes.append(f"{first.name} and {second.name} share no seed: they are paired in the order of their seeds")
    return _adjust_p_values(pairings), notes


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
        "means nothing"
    )


def _make_pairing(first: Contender, second: Contender) -> Pairing:
    shared = sorted(first.correct.keys() & second.correct.keys())
    if shared:
        before, after = ([each.correct[seed] for seed in shared] for each in (first, second))
    else:
        count = min(len(first.correct), len(second.correct))
        before, after = (list(each.correct.values())[:count] for each in (first, second))
    a, b = np.stack(before), np.stack(after)
    if len(a) == 1:
        return Pairing(first.name, second.name, 1, paired_interval(a[0], b[0]), float(mcnemar(a[0], b[0])["p"]))
    found = crossed_interval(a, b)
    return Pairing(first.name, second.name, len(a), Interval(found.value, found.low, found.high), found.p)


def _adjust_p_values(pairings: Sequence[Pairing]) -> list[Pairing]:
    """Adjust p for multiple comparisons by Holm's step-down procedure."""
    order = sorted(range(len(pairings)), key=lambda i: pairings[i].p)
    adjusted, highest = dict[int, float](), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(pairings) - rank) * pairings[i].p))
        adjusted[i] = highest
    return [replace(each, adjusted=adjusted[i]) for i, each in enumerate(pairings)]


def pairing_row(pairing: Pairing) -> dict[str, Any]:
    """Return a row of the page; a verdict needs ``MIN_SEEDS`` seeds and an adjusted p below 0.05."""
    low, high = pairing.gain.low, pairing.gain.high
    if pairing.seeds < MIN_SEEDS:
        verdict = f"too few seeds for a verdict: {MIN_SEEDS} or more are needed"
    elif (low > 0 or high < 0) and pairing.adjusted < 0.05:
        verdict = f"{pairing.second if pairing.gain.value > 0 else pairing.first} is better"
    else:
        verdict = "no clear difference"
    return {
        "first": pairing.first,
        "second": pairing.second,
        "gain": format_points(pairing.gain.value),
        "interval": f"{format_points(low)} to {format_points(high)}",
        "count": format_count(pairing.seeds),
        "p": format_decimal(pairing.adjusted, 3),
        "verdict": verdict,
    }
