import numpy as np
import pytest
from scipy import stats

from potstill.errors import UsageError
from potstill.evaluation.final_metrics import final_metrics, split_intervals
from potstill.evaluation.predictions import Predictions

NAMES = [f"class {i}" for i in range(4)]


def made(count=240, seed=0):
    random = np.random.default_rng(seed)
    labels = random.choice(4, count, p=[0.4, 0.3, 0.2, 0.1])
    logits = random.normal(size=(count, 4))
    logits[np.arange(count), labels] += 1.8
    odds = np.exp(logits)
    return odds / odds.sum(axis=1, keepdims=True), labels


def metric_intervals(probabilities, labels):
    return split_intervals(Predictions.of(probabilities, labels))


@pytest.fixture(scope="module")
def resampled():
    """Slow reference: the very figures of 600 resamples of the images."""
    probabilities, labels = made()
    random = np.random.default_rng(9)
    draws = [random.integers(0, len(labels), len(labels)) for _ in range(600)]
    return [final_metrics(probabilities[draw], labels[draw], NAMES) for draw in draws]


@pytest.mark.parametrize(
    "name", ["precision_macro", "recall_macro", "recall_weighted", "f1_macro", "f1_weighted", "f1_micro"]
)
def test_intervals_are_as_wide_as_resamples_of_the_images(resampled, name):
    low, high = metric_intervals(*made())[name]
    expected = np.percentile([found[name] for found in resampled], [2.5, 97.5])
    assert (low, high) == pytest.approx(tuple(expected), abs=0.2 * (expected[1] - expected[0]) + 0.004)


@pytest.mark.parametrize("name", ["auc_micro", "auc_macro", "auc_weighted"])
def test_auc_without_resampling_is_as_wide_as_with_it(resampled, name):
    low, high = metric_intervals(*made())[name]
    spread = np.std([found[name] for found in resampled], ddof=1)
    assert (high - low) / (2 * 1.96) == pytest.approx(spread, rel=0.2)


def test_a_perfect_class_or_model_is_not_sure():
    """60 images right of 60 say at least 94 % (Wilson's 1 / (1 + 1.96^2 / 60)), for each figure of them."""
    labels = np.repeat([0, 1], 30)
    found = metric_intervals(np.eye(2)[labels] * 0.8 + 0.1, labels)
    for name in ("recall_macro", "precision_macro", "f1_macro", "auc_macro"):
        low, high = found[name]
        assert high == 1
        assert low == pytest.approx(1 / (1 + 1.959964**2 / 60)), name
    assert "ece" not in found


def test_intervals_of_small_classes_are_left_out():
    probabilities, labels = made()
    kept = (labels != 3) | (np.cumsum(labels == 3) <= 19)
    found = metric_intervals(probabilities[kept], labels[kept])
    assert not {"f1_macro", "recall_macro", "auc_macro", "auc_weighted"} & found.keys()
    assert {"top1", "f1_weighted", "auc_micro"} <= found.keys()


def coverage(skill, shares, count, repeats, seed=0):
    """Share of intervals that hold what 200,000 images give, by figure."""
    random = np.random.default_rng(seed)

    def draw(n):
        labels = random.choice(len(shares), n, p=shares)
        logits = random.normal(size=(n, len(shares)))
        logits[np.arange(n), labels] += np.asarray(skill)[labels]
        odds = np.exp(2 * logits)
        return odds / odds.sum(axis=1, keepdims=True), labels

    names = [f"{figure}_{kind}" for figure in ("precision", "recall", "f1", "auc") for kind in ("macro", "weighted")]
    truth = final_metrics(*draw(200_000), [str(k) for k in range(len(shares))])
    held = {name: [] for name in [*names, "nll"]}
    for _ in range(repeats):
        found = metric_intervals(*draw(count))
        for name in held:
            if name in found:
                held[name].append(found[name][0] <= truth[name] <= found[name][1])
    return {name: np.mean(each) for name, each in held.items() if len(each) > repeats / 4}


WORLDS = {
    "four classes": ([2, 2, 2, 2], [0.4, 0.3, 0.2, 0.1], 360),
    "small class": ([3, 3, 2], [0.6, 0.35, 0.05], 360),
    "nearly perfect": ([6, 5, 4, 5, 5], [0.2] * 5, 360),
    "few images": ([2.5, 2, 3], [0.4, 0.3, 0.3], 60),
}


@pytest.mark.parametrize("world", ["four classes", "small class"])
def test_intervals_hold_the_truth(world):
    """300 repeats of a share of 0.92 lie above 0.873 (three standard deviations)."""
    found = coverage(*WORLDS[world], 300)
    assert min(found.values()) >= 0.873, found


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_table_of_coverage(world, capsys):
    """92 to 98 %, within three standard deviations of the simulation; more where a figure can hardly fall."""
    found = coverage(*WORLDS[world], 1000)
    with capsys.disabled():
        print(f"\n{world:<14}", ", ".join(f"{name} {share:.1%}" for name, share in found.items()), end="")
    assert min(found.values()) >= 0.92 - 3 * np.sqrt(0.05 * 0.95 / 1000)


def test_shares_have_wilsons_interval():
    probabilities, labels = made()
    correct = int((probabilities.argmax(axis=1) == labels).sum())
    expected = stats.binomtest(correct, len(labels)).proportion_ci(0.95, method="wilson")
    assert metric_intervals(probabilities, labels)["top1"] == pytest.approx((expected.low, expected.high))
    within = int((np.argsort(-probabilities, axis=1)[:, :3] == labels[:, None]).sum())
    expected = stats.binomtest(within, len(labels)).proportion_ci(0.95, method="wilson")
    assert metric_intervals(probabilities, labels)["top3"] == pytest.approx((expected.low, expected.high))


def test_a_class_without_images_is_left_out_and_nothing_breaks():
    probabilities, labels = made()
    few = labels < 2  # 96 and 72 images, more or less
    found = metric_intervals(probabilities[few], labels[few])
    assert {"auc_macro", "f1_macro"} <= found.keys()
    assert metric_intervals(probabilities[:0], labels[:0]) == {}
    alone = metric_intervals(probabilities[labels == 0], labels[labels == 0])
    assert "auc_macro" not in alone  # nothing to set the class against


def test_shapes_are_checked():
    with pytest.raises(UsageError, match=r"need labels \[3\], got \[2\]"):
        metric_intervals(np.ones((3, 2)), np.zeros(2, dtype=np.int64))
