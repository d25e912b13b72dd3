import numpy as np
import pytest
import torch

from potstill.contrib.federated.messages import (
    Message,
    array_specs,
    arrays_to_state_dict,
    find_reply_problem,
    state_dict_to_arrays,
)

STATE = {"bn.running_var": torch.zeros(2, 3), "bn.num_batches_tracked": torch.tensor(4)}
ARRAYS = state_dict_to_arrays(STATE)
SPECS = array_specs(ARRAYS)
COUNTS = {"images": 3.0, "loss": 0.5}


def test_a_state_dict_comes_back_whole():
    weight = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    found = arrays_to_state_dict(state_dict_to_arrays({"w": weight, **STATE}))
    assert found["w"].flatten().tolist() == list(range(24))
    assert found["bn.num_batches_tracked"].dtype == torch.int64
    assert int(found["bn.num_batches_tracked"]) == 4
    found["bn.running_var"] += 1  # a copy
    assert float(STATE["bn.running_var"].sum()) == 0


def test_the_size_is_that_of_the_arrays_and_the_text():
    message = Message("weights", {"w": np.zeros((2, 3), np.float32)}, {"images": 5.0}, {"a": "b"})
    assert message.size == 24 + len('["weights", ["w"], {"images": 5.0}, {"a": "b"}]')


def test_a_client_may_send_weights_and_counts():
    assert find_reply_problem(Message("weights", ARRAYS, COUNTS), SPECS) is None
    assert find_reply_problem(Message("describe", {}, {"images": 3.0}), {}, need_loss=False) is None


def changed(name, value):
    return ARRAYS | {name: value}


NAN, VARIANCE, BATCHES = np.full((2, 3), np.nan, np.float32), "state/bn.running_var", "state/bn.num_batches_tracked"
HUGE = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (2**40, 3), (0, 0))  # 12 terabytes, by its shape


@pytest.mark.parametrize(
    ("arrays", "numbers", "texts", "problem"),
    [
        (changed(VARIANCE, NAN), COUNTS, {}, "NonFiniteError"),
        (changed(VARIANCE, -NAN * 0 + np.float32("inf")), COUNTS, {}, "NonFiniteError"),
        (ARRAYS, COUNTS | {"loss": float("inf")}, {}, "NonFiniteError"),
        (ARRAYS, COUNTS | {"images": float("nan")}, {}, "NonFiniteError"),
        (changed(VARIANCE, np.zeros((2, 3), np.uint8)), COUNTS, {}, "wrong arrays"),  # pixels in place of weights
        (changed(VARIANCE, np.zeros((2, 3), np.float64)), COUNTS, {}, "wrong arrays"),
        (changed(VARIANCE, np.zeros((2, 3), object)), COUNTS, {}, "wrong arrays"),
        (changed(VARIANCE, np.zeros((3, 2), np.float32)), COUNTS, {}, "wrong arrays"),
        (changed(VARIANCE, HUGE), COUNTS, {}, "wrong arrays"),
        (changed("images", np.zeros((8, 3, 16, 16), np.float32)), COUNTS, {}, "wrong arrays"),
        ({VARIANCE: ARRAYS[VARIANCE]}, COUNTS, {}, "wrong arrays"),
        ({}, COUNTS, {}, "wrong arrays"),
        (changed(VARIANCE, [[0.0] * 3] * 2), COUNTS, {}, "not a reply"),
        (changed(VARIANCE, np.full((2, 3), -1, np.float32)), COUNTS, {}, "negative variances or counts"),
        (changed(BATCHES, np.array(-4)), COUNTS, {}, "negative variances or counts"),
        (ARRAYS, {"loss": 0.5}, {}, "wrong numbers"),
        (ARRAYS, {"images": 3.0}, {}, "wrong numbers"),
        (ARRAYS, COUNTS | {"images": 0.0}, {}, "wrong numbers"),
        (ARRAYS, COUNTS | {"images": -3.0}, {}, "wrong numbers"),
        (ARRAYS, COUNTS | {"images": 2.5}, {}, "wrong numbers"),
        (ARRAYS, COUNTS | {"images": 1e300}, {}, "wrong numbers"),
        (ARRAYS, COUNTS | {"images": "3"}, {}, "wrong numbers"),
        (ARRAYS, COUNTS | {"loss": -1e300}, {}, "wrong numbers"),
        (ARRAYS, COUNTS | {"label of 7": 1.0}, {}, "texts or numbers that a client must not send"),
        (ARRAYS, COUNTS, {"names": "cat/1.png"}, "texts or numbers that a client must not send"),
    ],
)
def test_and_nothing_else(arrays, numbers, texts, problem):
    assert find_reply_problem(Message("weights", arrays, numbers, texts), SPECS) == problem
