import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from potstill.errors import UsageError
from potstill.evaluation.exact import final_metrics
from potstill.evaluation.intervals import metric_intervals

NAMES = [f"class {i}" for i in range(4)]


def made(count=240, seed=0):
    random = np.random.default_rng(seed)
    labels = random.choice(4, count, p=[0.4, 0.3, 0.2, 0.1])
    logits = random.normal(size=(count, 4))
    logits[np.arange(count), labels] += 1.8
    odds = np.exp(logits)
    return odds / odds.sum(axis=1, keepdims=True), labels


@pytest.fixture(scope="module")
def resampled():
    """Slow reference: the very figures of 600 resamples of the images."""
    probabilities, labels = made()
    random = np.random.default_rng(9)
    draws = [random.integers(0, len(labels), len(labels)) for _ in range(600)]
    return [final_metrics(probabilities[draw], labels[draw], NAMES) for draw in draws]


@pytest.mark.parametrize("name", ["top1", "precision_macro", "recall_weighted", "f1_macro", "f1_micro", "nll"])
def test_intervals_are_those_of_resampled_images(resampled, name):
    low, high = metric_intervals(*made())[name]
    expected = np.percentile([found[name] for found in resampled], [2.5, 97.5])
    assert (low, high) == pytest.approx(tuple(expected), abs=0.12 * (expected[1] - expected[0]) + 0.004)


@pytest.mark.parametrize("name", ["auc_micro", "auc_macro", "auc_weighted"])
def test_auc_without_resampling_is_as_wide_as_with_it(resampled, name):
    low, high = metric_intervals(*made())[name]
    spread = np.std([found[name] for found in resampled], ddof=1)
    assert (high - low) / (2 * 1.96) == pytest.approx(spread, rel=0.12)
    probabilities, labels = made()
    assert (low + high) / 2 == pytest.approx(final_metrics(probabilities, labels, NAMES)[name])


def test_two_classes_are_delongs_formula():
    random = np.random.default_rng(3)
    labels = np.repeat([0, 1], [30, 20])
    score = np.clip(random.normal(0.3 + 0.3 * labels, 0.2), 0.01, 0.99).round(2)  # with ties
    low, high = metric_intervals(np.stack([1 - score, score], axis=1), labels)["auc_macro"]
    wins = np.sign(score[labels == 1][:, None] - score[labels == 0][None]) / 2 + 0.5
    variance = wins.mean(axis=1).var() / 20 + wins.mean(axis=0).var() / 30
    area = sk.roc_auc_score(labels, score)
    assert (low, high) == pytest.approx(
        (area - 1.959964 * np.sqrt(variance), min(1.0, area + 1.959964 * np.sqrt(variance))), abs=1e-6
    )


def test_shares_have_wilsons_interval():
    probabilities, labels = made()
    correct = int((probabilities.argmax(axis=1) == labels).sum())
    expected = stats.binomtest(correct, len(labels)).proportion_ci(0.95, method="wilson")
    assert metric_intervals(probabilities, labels)["top1"] == pytest.approx((expected.low, expected.high))
    within = int((np.argsort(-probabilities, axis=1)[:, :3] == labels[:, None]).sum())
    expected = stats.binomtest(within, len(labels)).proportion_ci(0.95, method="wilson")
    assert metric_intervals(probabilities, labels)["top3"] == pytest.approx((expected.low, expected.high))


def test_calibration_error_holds_what_many_images_tell():
    """Resampling adds to the error; the reflected interval takes that away again: it holds the truth 9 times in 10."""
    truth = final_metrics(*made(60_000, 1), NAMES)["ece"]
    ends = [metric_intervals(*made(240, seed))["ece"] for seed in range(2, 62)]
    assert np.mean([low <= truth <= high for low, high in ends]) >= 0.8
    assert all(0 <= low <= high for low, high in ends)


def test_a_calibrated_model_may_have_no_error_at_all():
    """Labels drawn from the probabilities themselves: resamples alone would say that there surely is an error."""
    shares = []
    for seed in range(8):
        random = np.random.default_rng(seed)
        probabilities = random.dirichlet(np.ones(4), 300)
        labels = np.array([random.choice(4, p=row) for row in probabilities])
        low, high = metric_intervals(probabilities, labels)["ece"]
        value = final_metrics(probabilities, labels, NAMES)["ece"]
        assert low <= value <= high
        shares.append(low / value)
    assert np.mean(shares) < 0.3  # of plain percentiles: 0.8


def test_a_class_without_images_is_left_out_and_nothing_breaks():
    probabilities, labels = made()
    few = labels < 2
    found = metric_intervals(probabilities[few], labels[few])
    assert {"auc_macro", "f1_macro", "ece"} <= found.keys()
    assert metric_intervals(probabilities[:0], labels[:0]) == {}
    alone = metric_intervals(probabilities[labels == 0], labels[labels == 0])
    assert "auc_macro" not in alone  # nothing to set the class against


def test_the_seed_decides():
    assert metric_intervals(*made()) == metric_intervals(*made())


def test_shapes_are_checked():
    with pytest.raises(UsageError, match=r"needs \[N, K\] and \[N\]"):
        metric_intervals(np.ones((3, 2)), np.zeros(2, dtype=np.int64))
