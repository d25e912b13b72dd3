import numpy as np
import pytest

from potstill.experiment.comparison import compare_with_baseline


def stage(top1, f1, auc, parameters, size, latency):
    return {
        "test": {"top1": top1, "f1_macro": f1, "auc_macro": auc},
        "model": {"parameters": parameters, "file_bytes": size},
        "latency_ms": {"p50": latency},
    }


def test_gains_go_from_baseline_to_distilled():
    right = {"teacher": 90, "baseline": 70, "distilled": 80}
    correct = {name: np.arange(100) < count for name, count in right.items()}
    correct["distilled"] = np.roll(correct["distilled"], 5)  # loses 0 .. 4, gains 70 .. 84
    stages = {
        "teacher": stage(0.9, 0.9, 0.99, 1000, 4000, 8.0),
        "baseline": stage(0.7, 0.6, 0.8, 100, 500, 2.0),
        "distilled": stage(0.8, 0.75, None, 100, 500, 2.0),
    }
    found = compare_with_baseline(stages, correct)
    assert found["top1_gain"] == pytest.approx(0.1)
    assert found["top1_gain_low"] < 0.1 < found["top1_gain_high"]
    assert (found["fixed"], found["broken"], found["test_images"]) == (15, 5, 100)
    assert found["mcnemar_p"] == pytest.approx(0.0414, abs=1e-4)  # two-sided binomial test of 5 in 20
    assert found["f1_macro_gain"] == pytest.approx(0.15)
    assert found["auc_macro_gain"] is None
    assert found["gap"] == pytest.approx(0.2)
    assert found["gap_closed"] == pytest.approx(0.5)
    assert (found["parameter_ratio"], found["file_ratio"], found["latency_ratio"]) == (10, 8, 4)
    assert found["latency_noise"] == 1.0
    stages["baseline"]["latency_ms"] = {"p50": 9.0}
    assert compare_with_baseline(stages, correct)["latency_noise"] == 4.5
    assert "10.0 points above the baseline's" in found["verdict"]


def test_a_teacher_that_does_not_lead_has_no_gap_to_close():
    correct = {name: np.ones(10, dtype=bool) for name in ("teacher", "baseline", "distilled")}
    stages = {name: stage(1.0, 1.0, 1.0, 10, 10, 1.0) for name in correct}
    assert compare_with_baseline(stages, correct)["gap_closed"] is None


def test_several_teachers_are_one_and_others_are_compared_too():
    right = {"baseline": 70, "distilled": 80, "assistant-1": 85, "generations": 60}
    correct = {name: np.arange(100) < count for name, count in right.items()}
    stages = {
        "teacher": stage(0.8, 0.9, 0.99, 1000, 4000, 8.0),
        "teacher-2": stage(0.9, 0.9, 0.99, 500, 3000, 4.0),
        "baseline": stage(0.7, 0.6, 0.8, 100, 500, 2.0),
        "assistant-1": stage(0.85, 0.6, 0.8, 300, 900, 2.0),
        "distilled": stage(0.8, 0.75, 0.9, 100, 500, 2.0),
    }
    groups = {"teachers": {"test": {"top1": 0.95}}, "generations": {"test": {"top1": 0.6}}}
    found = compare_with_baseline(stages, correct, groups)
    assert (found["teachers"], found["gap"]) == (2, pytest.approx(0.25))  # together 0.95, not 0.8 or 0.9
    assert found["teachers_top1"] == 0.95
    assert (found["parameter_ratio"], found["file_ratio"], found["latency_ratio"]) == (15, 14, 6)
    assert {name: other["top1_gain"] for name, other in found["others"].items()} == {
        "assistant-1": pytest.approx(0.15),
        "generations": pytest.approx(-0.1),
    }
    assert "The teachers together lead the baseline by 25.0 points" in found["verdict"]


def test_without_a_teacher_there_is_no_gap():
    correct = {"baseline": np.arange(100) < 50, "distilled": np.arange(100) < 80}
    stages = {name: stage(0.5, 0.5, 0.5, 10, 10, 1.0) for name in correct}
    found = compare_with_baseline(stages, correct)
    assert (found["teachers"], found["gap"], found["gap_closed"]) == (0, None, None)
    assert "parameter_ratio" not in found
    assert found["verdict"].startswith(
        "On this seed, the distilled student's top-1 is 30.0 points above the baseline's"
    )
    assert "teacher" not in found["verdict"].lower()
