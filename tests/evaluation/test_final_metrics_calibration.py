"""Against scikit-learn, a temperature that is known, and an answer worked by hand."""

import math

import numpy as np
import pytest

from potstill.errors import UsageError
from potstill.evaluation.final_metrics import calibration_report, fit_temperature, reliability_bins


def overconfident(count: int, factor: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities whose logits are ``factor`` times those that the labels were drawn from."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 1.5, (count, 4))
    true = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([random.choice(4, p=row) for row in true])
    said = np.exp(factor * logits)
    return said / said.sum(1, keepdims=True), labels


def test_temperature_that_the_answers_were_made_with_is_found() -> None:
    for factor in (0.5, 3.0):
        probabilities, labels = overconfident(8000, factor, seed=1)
        assert fit_temperature(probabilities, labels) == pytest.approx(factor, rel=0.06)


def test_figures_are_those_of_scikit_learn() -> None:
    from scipy.special import softmax
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import log_loss

    val, val_labels = overconfident(2000, 3.0, seed=2)
    test, labels = overconfident(2000, 3.0, seed=3)
    found = calibration_report(val, val_labels, test, labels)
    assert found is not None
    after = softmax(np.log(test) / found["temperature"], axis=1)
    for shown, figures in ((test, found["before"]), (after, found["after"])):
        assert figures["nll"] == pytest.approx(log_loss(labels, shown), rel=1e-6)
        right, confidence = calibration_curve(shown.argmax(1) == labels, shown.max(1), n_bins=15)
        assert [each[1] for each in figures["bins"]] == pytest.approx(list(confidence))
        assert [each[2] for each in figures["bins"]] == pytest.approx(list(right))
        assert sum(each[0] for each in figures["bins"]) == 2000
    assert found["after"]["nll"] < found["before"]["nll"]
    assert found["after"]["ece"] < found["before"]["ece"] / 2


def test_the_temperature_is_that_of_val_and_the_figures_are_those_of_test() -> None:
    (val, val_labels), (test, labels) = overconfident(3000, 3.0, seed=5), overconfident(3000, 0.5, seed=6)
    found = calibration_report(val, val_labels, test, labels)
    assert found is not None
    assert found["temperature"] == pytest.approx(3.0, rel=0.1)
    assert found["after"]["nll"] > found["before"]["nll"]  # on test it was the wrong thing to do, and that is said


def test_a_network_without_errors_gets_the_confidence_that_their_number_allows() -> None:
    # All right at p: NLL falls without end.  Of N + 2 images, one more would be wrong: 1 / 2 of that in each class.
    count, sure = 48, 0.6
    shown, labels = np.tile([[sure, 1 - sure]], (count, 1)), np.zeros(count, dtype=np.int64)
    temperature = fit_temperature(shown, labels)
    odds = (sure / (1 - sure)) ** (1 / temperature)
    assert odds / (1 + odds) == pytest.approx(1 - 0.5 / (count + 2), rel=1e-6)
    assert fit_temperature(np.tile([[1 - 1e-6, 1e-6]], (count, 1)), labels) > 1  # surer than they allow


def test_logits_of_any_scale() -> None:
    """Those of a loss that compares correlations are small."""
    probabilities, labels = overconfident(8000, 1.0, seed=4)
    for scale in (0.004, 0.02):
        flat = np.exp(scale * np.log(probabilities))
        found = fit_temperature(flat / flat.sum(axis=1, keepdims=True), labels)
        assert found == pytest.approx(scale, rel=0.06)


def test_ece_by_hand() -> None:
    # 3 of 4 right at 0.9: off by 0.15.  On val 3 of 4 right too, so the best temperature turns 0.9 into 0.75.
    shown, labels = np.tile([[0.9, 0.1]], (4, 1)), np.array([0, 0, 0, 1])
    found = calibration_report(shown, labels, shown, labels)
    assert found is not None
    assert found["before"]["ece"] == pytest.approx(0.15)
    assert found["temperature"] == pytest.approx(math.log(9) / math.log(3), rel=1e-4)
    assert found["after"]["ece"] == pytest.approx(0, abs=1e-5)


def test_bounds_certainty_and_nothing() -> None:
    certain, labels = np.eye(3, dtype=np.float32), np.arange(3)
    assert 0.001 <= fit_temperature(certain, labels) <= 20
    assert reliability_bins(np.ones(3), np.ones(3, dtype=bool)) == [[3, 1.0, 1.0]]
    assert reliability_bins(np.array([0.8, 0.2]), np.array([True, False])) == [[1, 0.2, 0.0], [1, 0.8, 1.0]]
    assert calibration_report(certain[:0], labels[:0], certain, labels) is None
    with pytest.raises(UsageError, match=r"labels \[N\]"):
        fit_temperature(certain, labels[:2])
