import numpy as np
import pytest

from potstill.contrib.federated.server import average_states, limit_counts, limit_updates
from potstill.errors import DataError


def state(weight, mean, variance, batches):
    return {
        "state/conv.weight": np.array(weight, np.float32),
        "state/bn.running_mean": np.array(mean, np.float32),
        "state/bn.running_var": np.array(variance, np.float32),
        "state/bn.num_batches_tracked": np.array(batches, np.int64),
    }


def test_weights_by_images_by_hand():
    # 3 images and 1: (3 * 1 + 1 * 5) / 4 = 2 and (3 * -2 + 1 * 2) / 4 = -1.
    # Means 0 and 4 give 1; the variance is (3 (1 + 1) + 1 (2 + 9)) / 4 = 4.25.
    found = average_states([state([1, -2], [0], [1], 7), state([5, 2], [4], [2], 9)], [3, 1])
    assert found["state/conv.weight"].tolist() == [2, -1]
    assert found["state/bn.running_mean"].tolist() == [1]
    assert found["state/bn.running_var"].tolist() == [4.25]
    assert found["state/bn.num_batches_tracked"].tolist() == 9
    assert {name: value.dtype for name, value in found.items()} == {
        name: value.dtype for name, value in state(0, 0, 0, 0).items()
    }


def test_the_pooled_variance_is_that_of_all_images_together():
    random = np.random.default_rng(0)
    groups = [random.normal(centre, 1 + centre, size) for centre, size in ((0, 40), (3, 10), (-1, 25))]
    states = [state([0], [g.mean()], [g.var()], 1) for g in groups]
    found = average_states(states, [len(g) for g in groups])
    everything = np.concatenate(groups)
    assert found["state/bn.running_mean"][0] == pytest.approx(everything.mean(), abs=1e-6)
    assert found["state/bn.running_var"][0] == pytest.approx(everything.var(), rel=1e-6)


def test_one_client_comes_back_bit_for_bit():
    random = np.random.default_rng(1)
    one = {f"state/{name}": random.normal(size=5).astype(np.float32) for name in ("w", "running_mean", "running_var")}
    found = average_states([one], [17])
    assert all(np.array_equal(found[name], one[name]) for name in one)


def test_logits_by_hand():
    logits = [{"logits": np.array(each, np.float32)} for each in ([[0.0, 4.0]], [[8.0, 0.0]])]
    assert average_states(logits, [1, 3])["logits"].tolist() == [[6.0, 1.0]]


def test_nothing_is_refused():
    with pytest.raises(DataError, match="nothing to average"):
        average_states([], [])
    with pytest.raises(DataError, match="nothing to average"):
        average_states([state([0], [0], [1], 1)], [0])


@pytest.mark.parametrize(
    ("images", "share", "wanted"),
    [
        ([1e12, 20, 30], 0.5, [50, 20, 30]),
        ([90, 10], 0.8, [40, 10]),
        ([90, 10], 1, [90, 10]),
        ([20, 30, 25], 0.5, [20, 30, 25]),
        ([7], 0.5, [7]),
    ],
)
def test_no_client_has_more_than_its_share(images, share, wanted):
    assert limit_counts(images, share) == pytest.approx(wanted)
    if len(images) > 1:
        assert max(wanted) / sum(wanted) <= share + 1e-9


def test_an_update_is_at_most_ten_times_the_median_of_all():
    start = state([1, 1], [0], [1], 3)
    states = [state([1 + size, 1], [0.1], [1], 4) for size in (1, 2, 3)] + [state([1, 1 + 3e8], [0.1], [1], 4)]
    limited, positions = limit_updates(states, start)
    assert positions == [3]
    assert all(found is not each and found == each for found, each in zip(limited[:3], states[:3], strict=True))
    assert limited[3]["state/conv.weight"].tolist() == [1, 21]  # sizes 1, 2, 3, 3e8: the lower median is 2
    assert limited[3]["state/conv.weight"].dtype == np.float32
    assert limited[3]["state/bn.running_mean"] == states[3]["state/bn.running_mean"]  # compared by themselves


def test_a_statistic_is_limited_too_and_stays_one():
    start = state([1], [0], [1], 3)
    limited, positions = limit_updates([state([2], [0], [2], 4), state([2], [0], [1e30], 4)], start)
    assert positions == [1]
    assert limited[1]["state/bn.running_var"].tolist() == [11]


def test_one_client_has_nobody_to_be_compared_with():
    only = state([1e9], [0], [1], 3)
    assert limit_updates([only], state([0], [0], [1], 3)) == ([only], [])
