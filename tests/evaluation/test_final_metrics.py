import json

import numpy as np
import pytest
from sklearn import metrics as sk

from potstill.errors import NonFiniteError, UsageError
from potstill.evaluation import predictions
from potstill.evaluation.final_metrics import final_metrics
from potstill.evaluation.predictions import Predictions


def sample(classes, count, *, present=None, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, present or classes, count)
    logits = rng.normal(size=(count, classes)) * 2
    logits[np.arange(count), labels] += 2
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (exp / exp.sum(axis=1, keepdims=True)).astype(np.float32), labels


def names(classes):
    return [f"class {k}" for k in range(classes)]


def check_against_sklearn(p, y):
    classes = p.shape[1]
    figures = final_metrics(p, y, names(classes))
    predicted, wide = p.argmax(1), p.astype(np.float64)
    assert figures["top1"] == pytest.approx(sk.accuracy_score(y, predicted), abs=1e-12)
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        y, predicted, labels=range(classes), zero_division=0
    )
    for k, entry in enumerate(figures["per_class"]):
        assert entry["class"] == f"class {k}"
        assert (entry["precision"], entry["recall"], entry["f1"], entry["support"]) == pytest.approx(
            (precision[k], recall[k], f1[k], support[k]), abs=1e-12
        )
    for kind in ("micro", "macro", "weighted"):
        expected = sk.precision_recall_fscore_support(
            y, predicted, labels=np.unique(y) if kind == "macro" else range(classes), average=kind, zero_division=0
        )[:3]
        mine = [figures[f"{name}_{kind}"] for name in ("precision", "recall", "f1")]
        assert mine == pytest.approx(expected, abs=1e-12), kind
    matrix = np.zeros((classes, classes), dtype=int)
    for true, said, images in zip(*Predictions.of(p, y).confusion(), strict=True):
        matrix[true, said] = images
    assert matrix.tolist() == sk.confusion_matrix(y, predicted, labels=range(classes)).tolist()
    truth = y[:, None] == np.arange(classes)
    defined = [k for k in range(classes) if 0 < truth[:, k].sum() < len(y)]
    assert figures["auc_skipped"] == [f"class {k}" for k in range(classes) if k not in defined]
    areas = [sk.roc_auc_score(truth[:, k], wide[:, k]) for k in defined]
    assert [figures["per_class"][k]["auc"] for k in defined] == pytest.approx(areas, abs=1e-6)
    assert figures["auc_micro"] == pytest.approx(sk.roc_auc_score(truth.ravel(), wide.ravel()), abs=1e-6)
    if defined:
        assert figures["auc_macro"] == pytest.approx(np.mean(areas), abs=1e-6)
        weights = truth[:, defined].sum(0)
        assert figures["auc_weighted"] == pytest.approx(np.average(areas, weights=weights), abs=1e-6)
    else:
        assert figures["auc_macro"] is figures["auc_weighted"] is None
    wide /= wide.sum(axis=1, keepdims=True)
    assert figures["nll"] == pytest.approx(sk.log_loss(y, wide, labels=range(classes)), abs=1e-6)
    assert figures["count"] == len(y)
    json.dumps(figures, allow_nan=False)
    return figures


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
@pytest.mark.parametrize("count", [37, 800])
def test_equals_sklearn(classes, count):
    check_against_sklearn(*sample(classes, count))


@pytest.mark.parametrize(("classes", "present"), [(3, 2), (3, 1), (10, 4), (100, 60)])
def test_absent_classes(classes, present):
    figures = check_against_sklearn(*sample(classes, 500, present=present))
    assert len(figures["auc_skipped"]) == (classes - present if present > 1 else classes)


def test_constant_scores():
    figures = check_against_sklearn(np.full((40, 4), 0.25, dtype=np.float32), np.arange(40) % 4)
    assert (figures["auc_macro"], figures["top1"], figures["top3"]) == (0.5, 0.25, 0.75)
    first = [final_metrics(np.full((1, 4), 0.25), np.array([k]), names(4))["top3"] for k in range(4)]
    assert first == [1, 1, 1, 0]


@pytest.mark.parametrize("classes", [2, 3])
def test_one_image(classes):
    figures = check_against_sklearn(*sample(classes, 1))
    assert figures["auc_skipped"] == names(classes)


def test_many_equal_scores():
    p, y = sample(5, 400)
    tenths = np.random.default_rng(0).multinomial(10, p / p.sum(axis=1, keepdims=True, dtype=np.float64)) / 10
    check_against_sklearn(tenths.astype(np.float32), y)


def test_auc_of_binary_data_equals_sklearns_usual_call():
    p, y = sample(2, 300)
    assert final_metrics(p, y, ["no", "yes"])["auc_macro"] == pytest.approx(sk.roc_auc_score(y, p[:, 1]), abs=1e-6)


def test_auc_equals_sklearns_one_versus_rest_call():
    p, y = sample(10, 600)
    wide = p / p.sum(axis=1, keepdims=True, dtype=np.float64)
    figures = final_metrics(p, y, names(10))
    for kind in ("micro", "macro", "weighted"):
        expected = sk.roc_auc_score(y, wide, multi_class="ovr", average=kind)
        assert figures[f"auc_{kind}"] == pytest.approx(expected, abs=1e-6), kind


def test_top3_against_a_loop():
    p, y = sample(8, 300)
    expected = np.mean([y[i] in sorted(range(8), key=lambda k, i=i: -p[i, k])[:3] for i in range(300)])
    assert final_metrics(p, y, names(8))["top3"] == pytest.approx(expected)


def test_calibration_error_worked_by_hand():
    p = np.array([[0.9, 0.1], [0.92, 0.08], [0.6, 0.4], [0.3, 0.7]], dtype=np.float32)
    # Bins (0.867, 0.933]: confidence 0.91, right 1/2; (0.533, 0.6]: 0.6, right; (0.667, 0.733]: 0.7, right.
    assert final_metrics(p, np.array([0, 1, 0, 1]), ["a", "b"])["ece"] == pytest.approx(
        (2 * abs(0.91 - 0.5) + (1 - 0.6) + (1 - 0.7)) / 4, abs=1e-6
    )


def test_calibration_error_against_a_loop():
    p, y = sample(20, 900)
    p = 0.9 / 20 + 0.1 * p  # top confidences from the lowest bins
    p[450:], y[450:] = sample(20, 450)
    total = 0.0
    for low in range(15):
        members = [i for i in range(900) if low / 15 < p[i].max() <= (low + 1) / 15]
        total += abs(sum(float(p[i].max()) - (p[i].argmax() == y[i]) for i in members))
    assert final_metrics(p, y, names(20))["ece"] == pytest.approx(total / 900, abs=1e-6)


def test_a_probability_of_zero_costs_what_it_costs_in_sklearn():
    p = np.array([[1.0, 0.0], [0.5, 0.5]], dtype=np.float32)
    assert final_metrics(p, np.array([1, 0]), ["a", "b"])["nll"] == pytest.approx(
        sk.log_loss([1, 0], p.astype(np.float64)), abs=1e-6
    )


def test_too_many_scores_to_sort_take_bins(monkeypatch):
    p, y = sample(5, 6000)
    p[0] = [1, 0, 0, 0, 0]
    expected = final_metrics(p, y, names(5))
    monkeypatch.setattr(predictions, "MAX_SORTED_SCORES", 20_000)
    figures = final_metrics(p, y, names(5))
    for kind in ("micro", "macro", "weighted"):
        assert figures[f"auc_{kind}"] != expected[f"auc_{kind}"]
        assert figures[f"auc_{kind}"] == pytest.approx(expected[f"auc_{kind}"], abs=1e-4)
    assert figures["f1_macro"] == expected["f1_macro"]


def test_no_images():
    figures = final_metrics(np.zeros((0, 3), np.float32), np.zeros(0, np.int64), names(3))
    assert (figures["count"], figures["top1"], figures["auc_skipped"]) == (0, None, names(3))


@pytest.mark.parametrize(
    ("p", "y", "message"),
    [
        (np.ones((4, 2)) / 2, [0, 1, 0], r"must be \[3, 3\]"),
        (np.ones((3, 3)) / 3, [0, 1, 3], "labels must be 0 to 2, got 0 to 3"),
        (np.ones((3, 3)) / 3, [0, 1, -1], "got -1 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(p, y, message):
    with pytest.raises(UsageError, match=message):
        final_metrics(p, np.array(y), names(3))


def test_not_a_number_is_refused():
    p, y = sample(3, 5)
    p[2, 1] = np.nan
    with pytest.raises(NonFiniteError, match="image 2 "):
        final_metrics(p, y, names(3))


def test_macro_figures_leave_out_absent_classes_and_name_them():
    """A perfect model on images of a and c alone: everything is 1, and b is named."""
    p = np.eye(3, dtype=np.float32)[[0, 0, 2, 2]]
    figures = final_metrics(p, np.array([0, 0, 2, 2]), ["a", "b", "c"])
    assert [figures[f"{name}_macro"] for name in ("precision", "recall", "f1", "auc")] == [1, 1, 1, 1]
    assert (figures["absent_classes"], figures["never_predicted"]) == (["b"], [])
    assert (figures["largest_class"], figures["at_chance"]) == (0.5, False)


@pytest.mark.parametrize(
    ("predicted", "never", "at_chance"),
    [
        ([0] * 100, ["b", "c"], True),  # always the most frequent class
        ([0] * 70 + [1] * 20 + [0] * 10, ["c"], False),
        (list(np.random.default_rng(0).permutation([0] * 70 + [1] * 20 + [2] * 10)), [], True),
        ([0] * 63 + [1] * 27 + [2] * 10, [], False),
    ],
)
def test_chance_and_classes_that_are_never_predicted(predicted, never, at_chance):
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    figures = final_metrics(np.eye(3, dtype=np.float32)[predicted], labels, ["a", "b", "c"])
    assert (figures["never_predicted"], figures["at_chance"]) == (never, at_chance)
    assert figures["largest_class"] == pytest.approx(0.7)


def test_rare_classes_that_are_found_are_above_chance():
    """600 and 6 images: top-1 cannot say it, recall does."""
    labels = np.repeat([0, 1], [600, 6])
    predicted = labels.copy()
    predicted[[0, 1, 2, 3, 4, 5, 605]] ^= 1
    figures = final_metrics(np.eye(2, dtype=np.float32)[predicted], labels, ["most", "few"])
    assert figures["top1"] < figures["largest_class"]
    assert not figures["at_chance"]
