"""Clients that lie, break or fall silent: the round goes on without them, and none takes the average over."""

import dataclasses

import numpy as np
import pytest
import torch

from potstill.contrib.federated.client import Client
from potstill.contrib.federated.messages import Message
from potstill.contrib.federated.server import InProcessClients, Replies
from potstill.data.image_sets import Subset
from potstill.errors import NonFiniteError, UsageError, WorkerError
from potstill.training.callbacks import SilentObserver


@pytest.fixture
def clients(data):
    parts = np.array_split(np.arange(len(data.train)), 3)
    return {number: Client(lambda classes, part=part: Subset(data.train, part)) for number, part in enumerate(parts)}


class Hostile:
    """A client whose replies pass through ``change`` before they are sent."""

    def __init__(self, client, change):
        self.client, self.change = client, change

    def reply(self, request, memory):
        reply = self.client.reply(request, memory)
        return reply if reply.task == "describe" else self.change(reply)


class Observer(SilentObserver):
    def __init__(self):
        self.warnings = []

    def warn(self, message):
        self.warnings.append(message)


def floats(change):
    """A reply whose weights, statistics and logits are changed."""
    return lambda reply: dataclasses.replace(
        reply, arrays={name: change(each) if each.dtype.kind == "f" else each for name, each in reply.arrays.items()}
    )


def counts(change):
    """A reply whose whole numbers (BatchNorm's batch counts) are changed."""
    return lambda reply: dataclasses.replace(
        reply,
        arrays={
            name: np.asarray(change(each)) if each.dtype.kind == "i" else each for name, each in reply.arrays.items()
        },
    )


def numbers(**new):
    return lambda reply: dataclasses.replace(reply, numbers=reply.numbers | new)


def dies(reply):
    raise MemoryError


INVALID = {
    "NaN": (floats(lambda each: each * np.float32(np.nan)), "NonFiniteError"),
    "float64": (floats(lambda each: each.astype(np.float64)), "wrong arrays"),
    "shape": (floats(lambda each: each.reshape(-1)), "wrong arrays"),
    "giant": (floats(lambda each: np.broadcast_to(np.float32(1), (2**40,))), "wrong arrays"),
    "missing": (lambda reply: dataclasses.replace(reply, arrays={}), "wrong arrays"),
    "no numbers": (lambda reply: dataclasses.replace(reply, numbers={}), "wrong numbers"),
    "no images": (numbers(images=0.0), "wrong numbers"),
    "negative": (numbers(images=-20.0), "wrong numbers"),
    "more than declared": (numbers(images=21.0), "more images than declared"),
    "huge": (numbers(images=1e12), "more images than declared"),
    "text": (lambda reply: dataclasses.replace(reply, texts={"x": "\x1b[2J"}), "texts or numbers"),
    "exception": (dies, "MemoryError"),
}


@pytest.fixture(scope="module")
def honest_weights():
    """What a round of the honest clients alone gives, by algorithm, when it has been trained once."""
    return {}


@pytest.mark.parametrize("name", ["fedavg", "feddf"])
@pytest.mark.parametrize("attack", INVALID)
def test_an_invalid_reply_is_left_out_and_the_others_make_the_round(
    recipe, data, public, clients, parts, honest_weights, name, attack
):
    change, why = INVALID[attack]

    def trained(everybody, share):
        server = parts.server(name, recipe(), data, InProcessClients(everybody), public=public, max_share=share)
        server.describe_clients()
        return server.train(SilentObserver()).records[0], server.student.module.state_dict()

    record, state = trained(clients | {1: Hostile(clients[1], change)}, 0.5)
    assert record["clients"] == [0, 2]
    assert record["failed"]["1"].startswith(why)
    if name not in honest_weights:
        honest = {number: client for number, client in clients.items() if number != 1}
        honest_weights[name] = trained(honest, 0.5)[1]
    assert all(torch.equal(state[key], value) for key, value in honest_weights[name].items())


@pytest.mark.parametrize(
    ("change", "why"),
    [(lambda each: each + 2**60, "wrong counts"), (lambda each: -each - 1, "negative variances or counts")],
)
def test_batch_counts_are_bounded_by_the_declared_images(recipe, data, clients, parts, change, why):
    server = parts.server(
        "fedavg", recipe(), data, InProcessClients(clients | {1: Hostile(clients[1], counts(change))})
    )
    assert server.train(SilentObserver()).records[0]["failed"] == {"1": why}


@pytest.mark.parametrize("name", ["fedavg", "feddf"])
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_enormous_finite_values_do_not_take_the_average_over(recipe, data, public, clients, parts, name, size):
    """Valid by type and shape; the update is scaled down to a few times an honest one, and learning goes on."""
    everybody = clients | {1: Hostile(clients[1], floats(lambda each: np.full_like(each, size)))}
    observer = Observer()
    server = parts.server(name, recipe(), data, InProcessClients(everybody), public=public, rounds=2)
    records = server.train(observer).records
    assert [(record["clients"], record["limited"]) for record in records] == [([0, 1, 2], [1])] * 2
    assert len(observer.warnings) == 1
    assert "client 1 sent an update more than 10 times" in observer.warnings[0]
    state = server.student.module.state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())
    assert float(state["stem.0.weight"].abs().max()) < 10
    assert all(np.isfinite(record["val"]["nll"]) for record in records)


def test_a_client_that_declares_a_billion_images_has_half_of_the_weight(recipe, data, clients, parts):
    class Boasts(Hostile):
        def reply(self, request, memory):
            return numbers(images=1e9)(self.client.reply(request, memory))

    def trained(everybody):
        server = parts.server("fedavg", recipe(), data, InProcessClients(everybody))
        server.describe_clients()
        server.train(SilentObserver())
        return server.student.module.state_dict()["stem.0.weight"]

    alone = [trained({number: clients[number]}) for number in range(3)]
    found = trained(clients | {1: Boasts(clients[1], None)})
    torch.testing.assert_close(found, alone[1] / 2 + (alone[0] + alone[2]) / 4, atol=1e-6, rtol=0)


@pytest.mark.parametrize("reply", [None, Message("describe"), Message("describe", numbers={"images": "many"})])
def test_the_first_reply_is_validated_too(recipe, data, clients, parts, reply):
    class Answers(InProcessClients):
        def send_and_receive(self, requests):
            return Replies(super().send_and_receive(requests).replies | {1: reply})

    known, failed = parts.server("fedavg", recipe(), data, Answers(clients)).describe_clients()
    assert known == {0: 20, 2: 20}
    assert failed.keys() == {1}


def test_a_round_of_invalid_replies_alone_is_an_error(recipe, data, clients, parts):
    nan = Hostile(clients[0], INVALID["NaN"][0])
    with pytest.raises(NonFiniteError, match=r"round 1: .* of 1 client became NaN .*; lower training.lr"):
        parts.server("fedavg", recipe(), data, InProcessClients({0: nan})).train(SilentObserver())
    everybody = {number: Hostile(client, numbers(images=-1.0)) for number, client in clients.items()}
    with pytest.raises(WorkerError, match=r"0 valid replies, at least 1 needed \(client 0: wrong numbers"):
        parts.server("fedavg", recipe(), data, InProcessClients(everybody)).train(SilentObserver())


@pytest.mark.parametrize(("limits", "sentence"), [({"max_share": 0.3}, "0.5 to 1"), ({"min_replies": 0}, "at least 1")])
def test_limits_that_protect_nobody_are_refused(recipe, data, clients, parts, limits, sentence):
    with pytest.raises(UsageError, match=sentence):
        parts.server("fedavg", recipe(), data, InProcessClients(clients), **limits)
