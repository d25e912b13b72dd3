import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from potstill.errors import NonFiniteError, UsageError
from potstill.evaluation.metrics import AUC_BINS, BUFFER_ROWS, StreamingMetrics, log_odds
from potstill.types import UNLABELED


def sample(classes, count, *, present=None, scale=2.0, seed=0):
    """Logits that favour the label, and labels out of the first ``present`` classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, present or classes, count)
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), labels] += 1.5
    return torch.tensor(logits * scale, dtype=torch.float32), torch.tensor(labels)


def stream(logits, labels, batch=37):
    metrics = StreamingMetrics(logits.shape[1])
    for start in range(0, len(labels), batch):
        metrics.update(logits[start : start + batch], labels[start : start + batch])
    return metrics


def reference(logits, labels):
    """scikit-learn's figures, from the float64 softmax."""
    p, y, classes = logits.double().softmax(1).numpy(), labels.numpy(), logits.shape[1]
    figures = {"top1": sk.accuracy_score(y, p.argmax(1)), "count": len(y)}
    figures["top3"] = np.mean([y[i] in np.argsort(-p[i], kind="stable")[:3] for i in range(len(y))])
    for kind in ("micro", "macro", "weighted"):
        for name, function in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
            there = np.unique(y) if kind == "macro" else range(classes)
            score = function(y, p.argmax(1), labels=there, average=kind, zero_division=0)
            figures[f"{name}_{kind}"] = score
    truth = y[:, None] == np.arange(classes)
    defined = [k for k in range(classes) if 0 < truth[:, k].sum() < len(y)]
    areas = [sk.roc_auc_score(truth[:, k], p[:, k]) for k in defined]
    figures["auc_micro"] = sk.roc_auc_score(truth.ravel(), p.ravel())
    figures["auc_macro"] = np.mean(areas)
    figures["auc_weighted"] = np.average(areas, weights=truth[:, defined].sum(0))
    figures["nll"] = sk.log_loss(y, p, labels=range(classes))
    figures["ece"] = slow_ece(p, y)
    return figures


def slow_ece(p, y):
    total = 0.0
    for low in range(15):
        members = [i for i in range(len(y)) if low / 15 < p[i].max() <= (low + 1) / 15]
        if members:
            accuracy = sum(p[i].argmax() == y[i] for i in members) / len(members)
            confidence = sum(p[i].max() for i in members) / len(members)
            total += len(members) / len(y) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_equals_sklearn_to_1e6_up_to_4096_images(classes):
    logits, labels = sample(classes, 1500)
    assert stream(logits, labels).compute() == pytest.approx(reference(logits, labels), abs=1e-6)


@pytest.mark.parametrize("classes", [2, 4, 100])
def test_auc_from_bins_is_within_1e4_of_sklearn(classes):
    logits, labels = sample(classes, 3 * BUFFER_ROWS + 5)
    figures, expected = stream(logits, labels, batch=500).compute(), reference(logits, labels)
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, abs=1e-4 if name.startswith("auc") else 1e-6), name


@pytest.mark.parametrize("scale", [0.2, 10.0, 40.0])
def test_bins_cover_timid_and_overconfident_networks(scale):
    """Log-odds of some tenths, and of hundreds, where float32 probabilities are all 0 or 1."""
    logits, labels = sample(5, 20_000, scale=scale)
    figures = stream(logits, labels, batch=999).compute()
    truth = labels.numpy()[:, None] == np.arange(5)
    odds = log_odds(logits.double()).numpy()
    areas = [sk.roc_auc_score(truth[:, k], odds[:, k]) for k in range(5)]
    assert figures["auc_macro"] == pytest.approx(np.mean(areas), abs=1e-4)
    assert figures["auc_micro"] == pytest.approx(sk.roc_auc_score(truth.ravel(), odds.ravel()), abs=1e-4)


@pytest.mark.parametrize("count", [300, BUFFER_ROWS + 300])
def test_absent_classes_are_left_out_of_auc_and_macro_figures(count):
    logits, labels = sample(6, count, present=4)
    assert stream(logits, labels).compute() == pytest.approx(reference(logits, labels), abs=1e-4)


def test_a_case_worked_by_hand():
    half = math.log(0.5)
    logits = torch.tensor([[half, math.log(0.3), math.log(0.2)], [math.log(0.1), math.log(0.2), math.log(0.7)]])
    logits = torch.cat([logits, logits])  # predictions 0 2 0 2
    figures = stream(logits, torch.tensor([0, 2, 1, 1])).compute()
    assert figures["top1"] == 0.5
    assert figures["top3"] == 1
    assert figures["precision_macro"] == pytest.approx((1 / 2 + 0 + 1 / 2) / 3)
    assert figures["recall_macro"] == pytest.approx((1 + 0 + 1) / 3)
    assert figures["recall_weighted"] == pytest.approx(0.5)
    assert figures["f1_macro"] == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    # Class 0: 0.5 against 0.1 0.5 0.1 = (1 + 1/2 + 1) / 3; class 1: 0.3 0.2 against 0.3 0.2 = 1/2; class 2 as class 0.
    assert figures["auc_macro"] == pytest.approx((5 / 6 + 1 / 2 + 5 / 6) / 3)
    assert figures["auc_weighted"] == pytest.approx((5 / 6 + 2 * 1 / 2 + 5 / 6) / 4)
    assert figures["nll"] == pytest.approx(-math.log(0.5 * 0.7 * 0.3 * 0.2) / 4)
    assert figures["ece"] == pytest.approx((abs(0.5 - 0.5) + abs(0.7 - 0.5)) / 2, abs=1e-6)


def test_equal_logits_favour_the_lower_class_and_give_an_auc_of_one_half():
    figures = stream(torch.zeros(50, 5), torch.arange(50) % 5).compute()
    assert figures["top1"] == pytest.approx(0.2)
    assert figures["top3"] == pytest.approx(0.6)
    assert (figures["auc_micro"], figures["auc_macro"], figures["auc_weighted"]) == (0.5, 0.5, 0.5)
    assert figures["precision_macro"] == pytest.approx(0.2 / 5)
    assert [stream(torch.zeros(1, 5), torch.tensor([k])).compute()["top3"] for k in range(5)] == [1, 1, 1, 0, 0]


def test_two_classes_have_a_top3_of_one():
    logits, labels = sample(2, 40)
    assert stream(logits, labels).compute()["top3"] == 1


def test_one_image_has_no_auc_per_class():
    figures = stream(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([1])).compute()
    assert (figures["auc_macro"], figures["auc_weighted"], figures["auc_micro"]) == (None, None, 1.0)
    assert (figures["top1"], figures["count"]) == (1, 1)


def test_no_image_gives_none():
    figures = StreamingMetrics(3).compute()
    assert figures.pop("count") == 0
    assert set(figures) | {"count"} == set(stream(*sample(3, 5)).compute())
    assert set(figures.values()) == {None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_before_the_softmax(dtype):
    logits, labels = sample(10, 400)
    logits = logits.to(dtype)
    assert stream(logits, labels).compute() == pytest.approx(reference(logits.float(), labels), abs=1e-6)


def test_batches_of_any_size_give_the_same():
    logits, labels = sample(4, 2 * BUFFER_ROWS + 100)
    expected = stream(logits, labels, batch=len(labels)).compute()
    for batch in (1000, BUFFER_ROWS, BUFFER_ROWS + 1):
        assert stream(logits, labels, batch).compute() == pytest.approx(expected, abs=1e-12)


def test_processes_merge_by_addition():
    logits, labels = sample(4, 3000)
    parts = [stream(logits[part], labels[part]).state() for part in (slice(0, 1000), slice(1000, 3000))]
    merged = StreamingMetrics(4)
    merged.merge({name: parts[0][name] + parts[1][name] for name in parts[0]})
    assert merged.compute() == pytest.approx(reference(logits, labels), abs=1e-4)


def test_compute_changes_nothing_and_reset_forgets():
    logits, labels = sample(4, 600)
    metrics = stream(logits[:300], labels[:300])
    assert metrics.compute() == metrics.compute()
    metrics.update(logits[300:], labels[300:])
    assert metrics.compute() == stream(logits, labels).compute()
    metrics.reset()
    assert metrics.compute()["count"] == 0


@pytest.mark.parametrize("count", [900, 2 * BUFFER_ROWS])
def test_images_without_labels_are_left_out(count):
    logits, labels = sample(5, count)
    known = torch.arange(count) % 3 > 0
    labels[~known] = UNLABELED
    logits[0] = math.nan  # nobody asks of what
    figures, expected = stream(logits, labels).compute(), stream(logits[known], labels[known]).compute()
    assert figures["count"] == int(known.sum())
    assert figures == pytest.approx(expected, abs=1e-12 if count < BUFFER_ROWS else 1e-6)
    assert stream(logits[:40], torch.full((40,), UNLABELED)).compute()["count"] == 0


def test_update_keeps_a_copy_and_no_graph():
    logits, labels = sample(3, 20)
    metrics = StreamingMetrics(3)
    reused = logits.clone().requires_grad_()
    metrics.update(reused * 1, labels)
    with torch.no_grad():
        reused.zero_()
    assert metrics.compute() == stream(logits, labels).compute()
    assert not any(values.requires_grad for values in metrics.state().values())


def test_update_never_reads_from_the_device():
    """Tensors on the meta device have no values: any .item() would raise."""
    metrics = StreamingMetrics(3, device="meta")
    for _ in range(3):
        metrics.update(
            torch.empty(BUFFER_ROWS, 3, device="meta"), torch.empty(BUFFER_ROWS, dtype=torch.int64, device="meta")
        )
    assert metrics.state()["histogram"].is_meta


def test_state_does_not_grow_with_images():
    sizes = [sum(t.numel() for t in stream(*sample(7, count), 500).state().values()) for count in (10, 2 * BUFFER_ROWS)]
    assert sizes[0] == sizes[1] < 2 * 7 * (AUC_BINS + 10)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count", [10, BUFFER_ROWS + 10])
def test_a_logit_that_is_not_finite_is_reported(value, count):
    logits, labels = sample(3, count)
    logits[4, 1] = value
    with pytest.raises(NonFiniteError, match=f"1 of {count} images"):
        stream(logits, labels).compute()


def test_a_very_wrong_image_costs_what_it_costs_in_sklearn():
    logits, labels = torch.tensor([[0.0, 500.0], [0.0, 1.0]]), torch.tensor([0, 1])
    expected = sk.log_loss(labels.numpy(), logits.double().softmax(1).numpy())
    assert stream(logits, labels).compute()["nll"] == pytest.approx(expected, abs=1e-6)


def test_log_odds_of_sure_and_hopeless_classes():
    logits = torch.tensor([[60.0, 0.0, -40.0], [1.0, 1.0, 1.0], [-1.0, 0.0, 300.0]])
    expected = [
        [60.0, -60.0, -100.0],
        [-math.log(2)] * 3,
        [-301.0, -300.0, 300 - math.log(1 + math.exp(-1))],
    ]
    torch.testing.assert_close(log_odds(logits), torch.tensor(expected))


@pytest.mark.parametrize(
    ("logits", "labels"), [((4, 2), (4,)), ((4, 3), (3,)), ((4, 3), (4, 1)), ((3,), (3,))], ids=lambda shape: str(shape)
)
def test_wrong_shapes_are_refused(logits, labels):
    with pytest.raises(UsageError, match=r"logits \[B, 3\]"):
        StreamingMetrics(3).update(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))


def test_one_class_is_refused():
    with pytest.raises(UsageError, match="two classes or more, got 1"):
        StreamingMetrics(1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_without_waiting():
    logits, labels = sample(10, 2 * BUFFER_ROWS + 77)
    metrics = StreamingMetrics(10, device="cuda")
    batches = [(logits[i : i + 500].cuda(), labels[i : i + 500].cuda()) for i in range(0, len(labels), 500)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            metrics.update(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics.compute() == pytest.approx(stream(logits, labels).compute(), abs=1e-6)
