import numpy as np
import pytest

from potstill.contrib.federated.algorithms import average_logits, average_states
from potstill.errors import DataError, UsageError


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
    found = average_logits([np.array([[0.0, 4.0]], np.float32), np.array([[8.0, 0.0]], np.float32)], [1, 3])
    assert found.tolist() == [[6.0, 1.0]]


def test_nothing_and_different_networks_are_refused():
    with pytest.raises(DataError, match="nothing to average"):
        average_states([], [])
    with pytest.raises(DataError, match="nothing to average"):
        average_states([state([0], [0], [1], 1)], [0])
    with pytest.raises(UsageError, match="client 2 of 2 sent other arrays"):
        average_states([state([0], [0], [1], 1), state([0, 0], [0], [1], 1)], [1, 1])
