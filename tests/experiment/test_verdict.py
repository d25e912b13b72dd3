import math
import subprocess
import sys
from typing import Any

import pytest

from potstill.experiment.verdict import accuracy_sentence, effect_of, headline, verdict, verdict_sentences
from potstill.formatting import format_points


def comparison(gain: float | None, low: float | None, high: float | None, **more: Any) -> dict[str, Any]:
    """Of one seed."""
    found = {"top1_gain": gain, "top1_gain_low": low, "top1_gain_high": high, "test_images": 270}
    found |= {"gap": 0.045, "gap_closed": None if gain is None else gain / 0.045, "mcnemar_p": 0.01}
    return found | {"parameter_ratio": 12.34, "latency_ratio": 3.1, "fixed": 12, "broken": 7} | more


def of_seeds(
    gain: float, low: float, high: float, *, p: float = 0.01, n: int = 3, looks: int = 1, confidence: float = 0.95
) -> dict[str, Any]:
    whole = {"value": gain, "low": low, "high": high, "p": p, "confidence": confidence, "seed_share": 0.5}
    seeds = {"figures": {"top1": {"n": n}}, "top1_gain": whole | {"looks": looks}}
    return comparison(0.02, 0.001, 0.03) | {"seeds": seeds | {"gap": 0.045, "gap_closed": gain / 0.045}}


@pytest.mark.parametrize(("gain", "low", "high"), [(0.3, 0.2, 0.4), (0.018, 0.004, 0.032), (-0.021, -0.04, -0.002)])
def test_one_seed_never_helps_or_hurts(gain: float, low: float, high: float) -> None:
    """However clear it looks: on 10,000 images seeds alone exclude 0 in 20 to 56 of 100 cases."""
    made = comparison(gain, low, high, mcnemar_p=1e-9, test_images=10_000)
    assert effect_of(made) == "one_seed"
    text = verdict(made)
    assert text.startswith("On this seed, the distilled student's top-1 is")
    assert ("above" if gain > 0 else "below") in headline(made)
    assert "repeat with --seeds 5" in text
    assert "elped" not in text
    assert "hurt" not in text


def test_one_seed_names_interval_gap_and_price() -> None:
    text = verdict(comparison(0.018, 0.004, 0.032))
    assert "1.8 points above the baseline's on 270 test images (95 % interval over test images +0.4 to +3.2)" in text
    assert "on this seed the distilled student closed 40 % of this gap" in text
    assert "12.3 times smaller in parameters and 3.1 times faster for one image" in text


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (of_seeds(0.02, 0.01, 0.03), "helped"),
        (of_seeds(-0.02, -0.03, -0.01), "hurt"),
        (of_seeds(0.02, -0.01, 0.05, p=0.2), "unclear"),
        (of_seeds(0.02, 0.0, 0.04, p=0.05), "unclear"),
        (of_seeds(0.02, 0.01, 0.03, p=0.06), "unclear"),  # so few images changed
        (of_seeds(0.02, 0.01, 0.03, n=2), "unclear"),
        (of_seeds(0.02, 0.01, 0.03, p=0.006, confidence=0.995, looks=2), "unclear"),
        (of_seeds(0.02, 0.01, 0.03, p=0.004, confidence=0.995, looks=2), "helped"),
    ],
)
def test_help_is_claimed_with_three_seeds_and_one_interval(made: dict[str, Any], found: str) -> None:
    assert effect_of(made) == found
    text = headline(made)
    assert text.startswith("Distillation helped") == (found == "helped")
    assert text.startswith("Distillation hurt") == (found == "hurt")


def test_sentences_of_several_seeds() -> None:
    assert headline(of_seeds(0.02, 0.01, 0.03)) == (
        "Distillation helped: the student gained 2.0 points of top-1 on average over 3 seeds, on 270 test images "
        "(95 % interval over seeds and test images together +1.0 to +3.0)."
    )
    assert headline(of_seeds(0.02, 0.01, 0.03, n=2)).startswith("Two seeds are too few for a verdict")
    later = of_seeds(0.02, -0.01, 0.05, p=0.2, looks=2, confidence=0.995)
    assert "99.5 % interval" in headline(later)
    assert "This is evaluation 2 on the test split" in verdict(later)


def test_images_that_only_the_distilled_student_learned_from_are_named() -> None:
    made = of_seeds(0.02, 0.01, 0.03)
    assert "without labels" not in verdict(made)
    sentences = verdict_sentences(made | {"unlabeled_images": 2968})
    assert sentences[1].startswith(
        "Of the two, only the distilled student learned from the 2,968 images without labels"
    )


def test_equal_predictions() -> None:
    text = headline(comparison(0.0, -0.01, 0.01, fixed=0, broken=0))
    assert "of 270 test images, the distilled student and the baseline are correct on the same ones" in text


def network(top1: float = 0.9, **more: Any) -> dict[str, Any]:
    return {"test": {"top1": top1, "largest_class": 0.112, **more}}


def test_what_makes_the_figures_void_comes_first() -> None:
    made = of_seeds(-0.02, -0.03, -0.01)
    stages = {"teacher": network(), "baseline": network(), "distilled": network(0.103, at_chance=True)}
    first, second, *_ = verdict_sentences(made, stages)
    assert first.startswith(
        "The distilled student (first of 3 seeds) is not clearly better than chance on test: top-1 10.3"
    )
    assert "the most frequent class gives 11.2 %" in first
    assert second == headline(made)
    stages |= {"teacher": network(0.103, at_chance=True), "distilled": network(never_predicted=["cat", "dog"])}
    first, second, *_ = verdict_sentences(made, stages)
    assert first.startswith("The teacher is not clearly better than chance")
    assert second == "The distilled student (first of 3 seeds) never predicts 2 classes of the test split: cat, dog."
    assert verdict_sentences(comparison(0.0, -0.01, 0.01), stages)[1].startswith("The distilled student never predicts")
    assert verdict_sentences(made, {"distilled": network(), "baseline": network()})[0] == headline(made)


def test_a_student_that_is_its_probe_still_shows_nothing_of_distillation() -> None:
    made = of_seeds(0.0, -0.01, 0.01)
    first = verdict_sentences(made, {"distilled": {"head": {"taken": "probe"}}})[0]
    assert first.startswith("The distilled student (first of 3 seeds) is the probe that it started from")
    for head in ({"taken": "finetuned"}, None):
        assert verdict_sentences(made, {"distilled": {"head": head}})[0] == headline(made)


def test_a_teacher_below_the_baseline_comes_first() -> None:
    below = {"teacher": "teacher", "teacher_val_top1": 0.83, "baseline_val_top1": 0.9, "val_images": 300}
    made = comparison(0.018, 0.004, 0.032) | {"teacher_below_baseline": [below]}
    assert verdict(made).startswith("The teacher is below the baseline on val (top-1 83.0 % against 90.0 %)")


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (None, 1),
        ({"looks": {"test_evaluations": 1, "seeds_at_first_look": 5}}, 1),
        ({"looks": {"test_evaluations": 2, "seeds_at_first_look": 1}}, 1),
        ({"looks": {"test_evaluations": 2, "seeds_at_first_look": 3}}, 2),
        ({"looks": {"test_evaluations": 3, "seeds_at_first_look": 1}}, 2),
    ],
)
def test_looks_at_which_no_verdict_was_possible_do_not_count(known: dict[str, Any] | None, expected: int) -> None:
    from potstill.experiment.comparison import count_test_evaluations

    assert count_test_evaluations(known) == expected


def test_teacher_worse_than_baseline() -> None:
    text = verdict(comparison(0.018, 0.004, 0.032, gap=-0.031, gap_closed=None))
    assert "The teacher is 3.1 points worse than the baseline, so there was no gap to close" in text
    assert "closed" not in text


def test_more_than_the_whole_gap() -> None:
    assert "closed all of this gap" in verdict(of_seeds(0.05, 0.01, 0.09))


def test_student_larger_and_slower() -> None:
    text = verdict(comparison(0.02, 0.01, 0.03, parameter_ratio=0.5, latency_ratio=1.0))
    assert "2.0 times larger in parameters and neither faster nor slower for one image" in text


def test_no_speed_is_claimed_of_a_busy_machine() -> None:
    text = verdict(comparison(0.02, 0.01, 0.03, latency_ratio=22.0, latency_noise=5.77))
    assert "12.3 times smaller in parameters. Latencies were measured on a busy machine" in text
    assert "differ by a factor of 5.8" in text
    assert "times faster" not in text
    assert "3.1 times faster" in verdict(comparison(0.02, 0.01, 0.03, latency_noise=1.2))


@pytest.mark.parametrize(
    "missing", [None, {}, comparison(None, None, None), comparison(0.1, None, 0.2), comparison(0.1, math.nan, 1)]
)
def test_nothing_is_claimed_without_figures(missing: dict[str, Any] | None) -> None:
    assert verdict(missing).startswith("Whether distillation helped is unknown")


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
    assert "together" not in accuracy_sentence(stages, made | {"teachers": 1})


def test_rounding_never_hides_the_sign() -> None:
    assert "interval over test images +0.04 to +3.2" in headline(comparison(0.018, 0.0004, 0.032))
    assert [format_points(0.00001), format_points(-0.001), format_points(0), format_points(0.012, signed=False)] == [
        "+0.001",
        "-0.1",
        "0.0",
        "1.2",
    ]


def test_torch_stays_out() -> None:
    code = (
        "import sys, potstill.experiment.verdict, potstill.report.render, potstill.report.compare;"
        "heavy = {'torch', 'matplotlib', 'sklearn', 'jinja2'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
