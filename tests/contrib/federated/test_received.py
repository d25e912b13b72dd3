"""A reply that would spoil the average is left out, and the round goes on with the others."""

import dataclasses

import numpy as np
import pytest

from potstill.contrib.federated.client import Client
from potstill.contrib.federated.messages import Message
from potstill.contrib.federated.server import InProcessClients, RoundReplies, drop_invalid_replies
from potstill.data.image_sets import Subset
from potstill.errors import NonFiniteError
from potstill.training.callbacks import SilentObserver

STUDENT = {"w": np.zeros((2, 3), np.float32), "batches": np.array(3, np.int64)}
GOOD = {"state/w": np.ones((2, 3), np.float32), "state/batches": np.array(4, np.int64)}
COUNTS = {"images": 5.0, "loss": 0.5}
NAN = np.full((2, 3), np.nan, np.float32)


@pytest.mark.parametrize(
    ("arrays", "numbers", "why"),
    [
        (GOOD | {"state/w": NAN}, COUNTS, "NonFiniteError"),
        (GOOD, {"images": 5.0, "loss": float("inf")}, "NonFiniteError"),
        (GOOD | {"state/w": np.ones((3, 2), np.float32)}, COUNTS, "other arrays"),
        (GOOD | {"state/w": np.ones((2, 3), np.float64)}, COUNTS, "other arrays"),
        ({"state/w": GOOD["state/w"]}, COUNTS, "other arrays"),
        (GOOD | {"images": np.zeros((1, 3), np.uint8)}, COUNTS, "other arrays"),
        (GOOD, {"images": -5.0, "loss": 0.5}, "wrong counts"),
        (GOOD, {"images": float("nan"), "loss": 0.5}, "wrong counts"),
        (GOOD, {"loss": 0.5}, "wrong counts"),
    ],
)
def test_one_is_left_out_and_the_other_stays(arrays, numbers, why):
    answers = RoundReplies({0: Message("train", arrays, numbers), 1: Message("train", GOOD, COUNTS)}, {2: "OSError"})
    drop_invalid_replies(answers, STUDENT, None)
    assert list(answers.replies) == [1]
    assert answers.failed == {0: why, 2: "OSError"}


def test_logits_in_place_of_weights():
    said = [{"logits": np.zeros(shape, np.float32)} for shape in ((4, 3), (5, 3))]
    answers = RoundReplies({at: Message("answer", each, COUNTS) for at, each in enumerate([*said, GOOD])})
    drop_invalid_replies(answers, STUDENT, (4, 3))
    assert list(answers.replies) == [0]
    assert answers.failed == {1: "other arrays", 2: "other arrays"}


class Broken:
    """A client whose weights are NaN."""

    def __init__(self, client):
        self.client = client

    def answer(self, message, memory):
        reply = self.client.answer(message, memory)
        return dataclasses.replace(reply, arrays={name: each * np.nan for name, each in reply.arrays.items()} | {
            name: each for name, each in reply.arrays.items() if each.dtype.kind != "f"})  # fmt: skip


def test_a_client_that_sends_nan_does_not_spoil_the_round(recipe, data, parts):
    halves = np.array_split(np.arange(len(data.train)), 2)
    good, other = (Client(lambda classes, part=part: Subset(data.train, part)) for part in halves)
    server = parts.server("fedavg", recipe(), data, InProcessClients({0: good, 1: Broken(other)}))
    record = server.carry_out(SilentObserver()).records[0]
    assert (record["clients"], record["failed"]) == ([0], {"1": "NonFiniteError"})
    with pytest.raises(NonFiniteError, match=r"round 1: .* of 1 clients became NaN .*; lower training.lr"):
        parts.server("fedavg", recipe(), data, InProcessClients({0: Broken(good)})).carry_out(SilentObserver())
