"""How often "helped" or "hurt" would be said after a cross-validation of two methods that are equally good.

The outcomes are made by the probit model of ``test_significance_false_alarms.py``, with two more effects in place of
that of a seed: of a cell (fold and seed), independent; and of a fold's training set, correlated by 1 / K between the
folds, as Nadeau and Bengio assume, since their training sets overlap.  Both methods have the same distribution, so the
difference of their accuracies is exactly 0.

The tables: ``python -m pytest -m slow -s tests/evaluation/test_significance_folds.py``.
"""

import numpy as np
import pytest
from scipy import special

from potstill.errors import UsageError
from potstill.evaluation.significance import crossed_interval, gap_closed, seeds_summary

IMAGE = 1.5  # standard deviation of how hard an image is
# Standard deviations of a cell and of a training set, correlation between the methods of how hard an image is.
WORLDS = {
    "images alone": (0.0, 0.0, 0.5),
    "few of cells": (0.03, 0.0, 0.8),
    "cells": (0.08, 0.0, 0.9),
    "mostly cells": (0.25, 0.0, 0.98),
    "few of training sets": (0.0, 0.03, 0.8),
    "training sets": (0.0, 0.08, 0.9),
    "both": (0.08, 0.08, 0.9),
}


def outcomes(random, folds, seeds, images, world):
    """Two [seeds, images] arrays of bool, and the fold of each image."""
    cell, training, shared = WORLDS[world]
    bar = special.ndtri(0.9) * np.sqrt(1 + IMAGE**2 + cell**2 + training**2)
    hard, own = IMAGE * random.standard_normal((2, images))
    of_image = (hard, shared * hard + np.sqrt(1 - shared**2) * own)
    fold = np.arange(images) % folds
    found = []
    for image in of_image:
        common = random.standard_normal() / np.sqrt(folds)
        of_fold = training * (common + np.sqrt(1 - 1 / folds) * random.standard_normal(folds))
        of_cell = cell * random.standard_normal((seeds, folds))
        score = bar - image - of_fold[fold] - of_cell[:, fold]
        found.append(random.standard_normal((seeds, images)) < score)
    return found[0], found[1], fold


def called(found):
    """As the verdict calls it."""
    return (found.low > 0 or found.high < 0) and found.p < 1 - found.confidence


def false_alarms(folds, seeds, images, world, repeats):
    random, alarms = np.random.default_rng(folds + seeds), []
    for _ in range(repeats):
        before, after, fold = outcomes(random, folds, seeds, images, world)
        alarms.append(called(crossed_interval(before, after, folds=fold)))
    return np.mean(alarms)


def test_the_variance_by_hand():
    """Two folds of two images each: gains 1, 0 and 0, 0.

    Within folds: deviations +-0.5 and 0, sum of squares 0.5 over 4 - 2 degrees of freedom and 4 images: 1/16.
    Between folds: means 0.5 and 0, (2 x 0.25^2) x 2 / 1 / 4 = 1/16, times 1.3 is 1.3/16; the excess of 0.3/16 counts
    1 + 2 / 1 = 3 times.
    """
    after = np.array([[True, False, False, False]])
    found = crossed_interval(np.zeros((1, 4), bool), after, folds=np.array([0, 0, 1, 1]))
    assert found.value == 0.25
    assert found.seed_share == pytest.approx(0.9 / 1.9)
    half = found.value - found.low
    wide = crossed_interval(np.zeros((1, 4), bool), after, 0.5, np.array([0, 0, 1, 1]))
    # Only the critical value depends on the confidence: z + share ** 0.9 * (t - z) standard errors.
    critical = [z + (0.9 / 1.9) ** 0.9 * (t - z) for z, t in ((1.95996, 12.7062), (0.67449, 1.0))]
    assert wide.value - wide.low == pytest.approx(critical[1] * np.sqrt(1.9 / 16), rel=1e-4)
    assert half == pytest.approx(min(critical[0] * np.sqrt(1.9 / 16), 1.25), rel=1e-4)


def test_seeds_within_folds_are_not_widened_for_overlap():
    """The same gains, once as three seeds of each fold that differ, once as folds that differ."""
    random = np.random.default_rng(0)
    base = np.zeros((3, 500), bool)
    fold = np.arange(500) % 5
    by_seed = random.random((3, 500)) < np.array([0.02, 0.1, 0.18])[(np.arange(3)[:, None] + fold) % 3]
    by_fold = random.random((3, 500)) < np.array([0.02, 0.06, 0.1, 0.14, 0.18])[fold]
    narrow, wide = (crossed_interval(base, each, folds=fold) for each in (by_seed, by_fold))
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_one_fold_is_refused():
    with pytest.raises(UsageError, match="needs two folds"):
        crossed_interval(np.zeros((1, 4), bool), np.ones((1, 4), bool), folds=np.zeros(4, int))


def test_metrics_of_folds_are_compared_with_the_correction():
    """t of 3.1824 with 3 degrees of freedom; deviation 0.02; (1 + 4 / 3) / 4 in place of 1 / 4."""
    found = seeds_summary([0.5] * 4, [0.52, 0.56, 0.54, 0.54], folds=True)
    deviation = np.std([0.02, 0.06, 0.04, 0.04], ddof=1)
    assert found["difference_high"] - found["difference"] == pytest.approx(3.18245 * deviation * np.sqrt(7 / 12), 1e-5)


def test_the_gap_has_an_interval_over_folds():
    random = np.random.default_rng(1)
    fold = np.arange(1000) % 5
    baseline, teacher = random.random((1, 1000)) < 0.7, random.random(1000) < 0.95
    distilled = baseline | (random.random((1, 1000)) < 0.4)
    gap, closed = gap_closed(teacher, baseline, distilled, fold)
    assert gap.low < gap.value < gap.high
    assert closed is not None
    assert closed.low < closed.value < closed.high
    plain = gap_closed(teacher, baseline, distilled)
    assert closed.value == plain.closed.value
    assert closed.high - closed.low > 0.8 * (plain.closed.high - plain.closed.low)


@pytest.mark.parametrize("world", ["images alone", "training sets"])
def test_five_folds_raise_few_false_alarms(world):
    """300 repeats: three standard deviations above 7 % is 11.4 %; folds taken as images of one test split: 15 %."""
    assert false_alarms(5, 1, 1000, world, 300) <= 0.07 + 3 * np.sqrt(0.07 * 0.93 / 300)


@pytest.mark.slow
@pytest.mark.parametrize("images", [300, 2000])
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("folds", [5, 10])
def test_table_of_false_alarms(folds, seeds, images, capsys):
    """7 % at most, within three standard deviations of the simulation."""
    repeats, shares = 1000, []
    for world in WORLDS:
        shares.append(false_alarms(folds, seeds, images, world, repeats))
        with capsys.disabled():
            where = f"{folds:>2} folds {seeds} seeds {images:>5} images"
            print(f"\n{where}  {world:<20} {100 * shares[-1]:4.1f} % (n = {repeats})", end="")
    assert max(shares) <= 0.07 + 3 * np.sqrt(0.07 * 0.93 / repeats)
