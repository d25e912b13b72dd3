import math
import subprocess
import sys
from typing import Any

import pytest

from potstill.amounts import points
from potstill.experiments.verdict.sentences import accuracies
from potstill.experiments.verdict.several_seeds import T_975, over_seeds, verdict_over_seeds
from potstill.experiments.verdict.verdict import finding, headline, verdict

SEED = "One seed cannot tell"


def comparison(gain: float | None, low: float | None, high: float | None, **more: Any) -> dict[str, Any]:
    found = {"top1_gain": gain, "top1_gain_low": low, "top1_gain_high": high, "test_images": 270}
    found |= {"gap": 0.045, "gap_closed": None if gain is None else gain / 0.045, "mcnemar_p": 0.01}
    return found | {"parameter_ratio": 12.34, "latency_ratio": 3.1, "fixed": 12, "broken": 7} | more


def test_clear_gain() -> None:
    text = verdict(comparison(0.018, 0.004, 0.032))
    assert text.startswith(
        "Distillation helped: the student gained 1.8 points of top-1 on 270 test images (95 % interval +0.4 to +3.2)."
    )
    assert "closed 40 % of this gap" in text
    assert "12.3 times smaller in parameters and 3.1 times faster for one image" in text
    assert SEED in text


def test_clear_loss() -> None:
    text = verdict(comparison(-0.021, -0.04, -0.002))
    assert text.startswith(
        "Distillation hurt: the student lost 2.1 points of top-1 on 270 test images (95 % interval -4.0 to -0.2)."
    )
    assert "widened" in text
    assert SEED in text
    assert "helped" not in text


@pytest.mark.parametrize(
    ("gain", "low", "high"),
    [
        (0.01, -0.01, 0.03),
        (0.01, 0.0, 0.02),
        (-0.01, -0.02, 0.0),
        (0.3, -1e-9, 0.6),
        (0.0, 0.0, 0.0),
        (-0.01, -0.03, 0.01),
    ],
)
def test_an_interval_with_0_is_never_called_help_or_harm(gain: float, low: float, high: float) -> None:
    text = verdict(comparison(gain, low, high))
    assert finding(comparison(gain, low, high)) == "unclear"
    assert text.startswith("No clear difference")
    assert "helped" not in text
    assert "hurt" not in text
    assert " % of this gap" not in text  # a share of the gap would be a claim
    assert SEED in text


def test_equal_predictions() -> None:
    assert headline(comparison(0.0, 0.0, 0.0, fixed=0, broken=0)).startswith("No difference: the student was right on")


def test_teacher_worse_than_baseline() -> None:
    text = verdict(comparison(0.018, 0.004, 0.032, gap=-0.031, gap_closed=None))
    assert "The teacher is 3.1 points worse than the baseline, so there was no gap to close" in text
    assert "closed" not in text


def test_more_than_the_whole_gap() -> None:
    assert "closed all of this gap" in verdict(comparison(0.05, 0.01, 0.09))


def test_student_larger_and_slower() -> None:
    text = verdict(comparison(0.02, 0.01, 0.03, parameter_ratio=0.5, latency_ratio=1.0))
    assert "2.0 times larger in parameters and neither faster nor slower for one image" in text


@pytest.mark.parametrize(
    "missing", [None, {}, comparison(None, None, None), comparison(0.1, None, 0.2), comparison(0.1, math.nan, 1)]
)
def test_nothing_is_claimed_without_figures(missing: dict[str, Any] | None) -> None:
    assert verdict(missing).startswith("Whether distillation helped cannot be said")


def test_help_is_claimed_only_where_both_tests_see_it() -> None:
    doubtful = comparison(0.018, 0.001, 0.035, mcnemar_p=0.07)
    assert finding(doubtful) == "unclear"
    assert "No clear difference" in headline(doubtful)
    assert "McNemar's exact test gives p = 0.07" in headline(doubtful)
    assert finding(comparison(0.018, 0.001, 0.035, mcnemar_p=0.049)) == "helped"
    assert finding(comparison(-0.018, -0.035, -0.001, mcnemar_p=0.05)) == "unclear"


def of_seeds(low: float, high: float, images: tuple[float, float], p: float) -> dict[str, Any]:
    top1 = {"n": 3, "difference": 0.02, "difference_low": low, "difference_high": high}
    seeds = {"figures": {"top1": top1}, "images": {"gain": 0.02, "low": images[0], "high": images[1], "p": p}}
    return comparison(0.02, 0.001, 0.03) | {"seeds": seeds}


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (of_seeds(0.01, 0.03, (0.005, 0.035), 0.01), "helped"),
        (of_seeds(-0.01, 0.05, (0.005, 0.035), 0.01), "unclear"),
        (of_seeds(0.01, 0.03, (-0.001, 0.041), 0.01), "unclear"),
        (of_seeds(0.01, 0.03, (0.005, 0.035), 0.05), "unclear"),
    ],
)
def test_over_seeds_three_must_agree(made: dict[str, Any], found: str) -> None:
    assert finding(made) == found
    assert ("No clear difference" in headline(made)) == (found == "unclear")


def test_accuracies_of_the_stages() -> None:
    stages = {
        name: {"test": {"top1": top1}} for name, top1 in (("teacher", 0.9), ("baseline", 0.84), ("distilled", 0.858))
    }
    assert "Top-1 on test: teacher 90.0 %, baseline 84.0 %, distilled 85.8 %." in verdict(
        comparison(0.018, 0.004, 0.032), stages
    )


def test_of_several_teachers_the_ensemble_has_its_figure_too() -> None:
    tops = (("teacher", 0.9), ("teacher-2", 0.88), ("baseline", 0.84), ("distilled", 0.858))
    stages = {name: {"test": {"top1": top1}} for name, top1 in tops}
    made = comparison(0.018, 0.004, 0.032) | {"teachers": 2, "teachers_top1": 0.915}
    assert (
        "Top-1 on test: teacher 90.0 %, teacher-2 88.0 %, baseline 84.0 %, distilled 85.8 %, "
        "the teachers together 91.5 %." in verdict(made, stages)
    )
    assert "together" not in accuracies(stages, made | {"teachers": 1})


def test_rounding_never_hides_the_sign() -> None:
    assert "95 % interval +0.04 to +3.2" in headline(comparison(0.018, 0.0004, 0.032))
    assert [points(0.00001), points(-0.001), points(0), points(0.012, signed=False)] == ["+0.001", "-0.1", "0.0", "1.2"]


def test_t_quantiles_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert pytest.approx([stats.t.ppf(0.975, n) for n in range(1, 31)], abs=5e-4) == T_975


def test_over_seeds_is_scipys_interval() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = [0.011, 0.018, -0.002, 0.024, 0.009]
    mean, deviation, low, high = over_seeds(values)
    expected = stats.t.interval(0.95, 4, loc=stats.tmean(values), scale=stats.sem(values))
    assert deviation == pytest.approx(stats.tstd(values))
    assert (mean, low, high) == pytest.approx((0.012, *expected), abs=5e-6)


def test_verdict_over_seeds() -> None:
    assert verdict_over_seeds([0.01, 0.012, 0.011]).startswith(
        "Distillation helped: 1.1 points of top-1 gained on average"
    )
    assert verdict_over_seeds([-0.01, -0.012, -0.011]).startswith("Distillation hurt: 1.1 points of top-1 lost")
    assert verdict_over_seeds([0.01, -0.01, 0.02]).startswith("No clear difference: +0.7 points")
    assert verdict_over_seeds([0.5]).startswith("One seed only")


def test_torch_stays_out() -> None:
    code = (
        "import sys, potstill.experiments.verdict.verdict, potstill.report.render, potstill.report.compare;"
        "heavy = {'torch', 'matplotlib', 'sklearn', 'jinja2'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
