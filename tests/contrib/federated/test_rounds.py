"""Server and clients together: what crosses the wire, who may fail, and how a run goes on."""

import numpy as np
import pytest
import torch

from potstill.contrib.federated.client import Client
from potstill.contrib.federated.server import InProcessClients, Replies, RoundCheckpoint, ServerState
from potstill.data.image_sets import Subset
from potstill.errors import DataError, UsageError, WorkerError
from potstill.input_spec import InputSpec
from potstill.models.factory import create_model
from potstill.models.model_file import Classifier
from potstill.training.callbacks import SilentObserver


@pytest.fixture
def clients(data):
    def make(count=2):
        parts = np.array_split(np.arange(len(data.train)), count)
        return {
            number: Client(lambda classes, part=part: Subset(data.train, part)) for number, part in enumerate(parts)
        }

    return make


@pytest.fixture
def wiretap(monkeypatch):
    """Every message in both directions."""
    heard = {"down": [], "up": []}

    class Tapped(InProcessClients):
        def send_and_receive(self, requests):
            heard["down"] += requests.values()
            answers = super().send_and_receive(requests)
            heard["up"] += answers.replies.values()
            return answers

    return Tapped, heard


def content(message):
    """All that a message holds, as bytes."""
    rest = repr((message.task, list(message.arrays), message.numbers, message.texts)).encode()
    return rest + b"".join(each.tobytes() for each in message.arrays.values())


def size(module):
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


@pytest.mark.parametrize("name", ["fedavg", "feddf"])
def test_clients_send_weights_and_counts_and_nothing_that_is_an_image(
    recipe, data, public, clients, parts, wiretap, name
):
    tapped, heard = wiretap
    server = parts.server(name, recipe(), data, tapped(clients()), public=public, rounds=2)
    server.describe_clients()
    progress = server.train(SilentObserver())
    state = server.student.module.state_dict()
    pixels = [data.train.pixels(at).tobytes() for at in range(len(data.train))]
    hello, rounds = heard["up"][:2], heard["up"][2:]
    assert len(rounds) == 4
    for sent in hello:
        assert sent.arrays == {}
        assert set(sent.numbers) == {"images"}
        assert sent.size < 400
    for sent in rounds:
        message = sent
        shapes = {key: (value.shape, str(value.dtype)) for key, value in message.arrays.items()}
        assert shapes == {f"state/{k}": (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in state.items()}
        assert set(message.numbers) == {"images", "loss"}
        assert message.texts == {}
        assert sent.size < size(server.student.module) + 200 * len(state)  # names and shapes, no room for images
        assert not any(each[:64] in content(sent) for each in pixels)
        assert not any(word.encode() in content(sent) for word in ("train/", "/000", "blue"))
    for number, record in enumerate(progress.records):
        assert record["bytes_up"] == sum(each.size for each in rounds[2 * number : 2 * number + 2])
        assert record["bytes_down"] == sum(each.size for each in heard["down"][2 + 2 * number : 4 + 2 * number])


def test_fedavg_is_the_mean_of_what_each_client_would_send(recipe, data, clients, parts):
    """Each client alone, with the start of all, then averaged by hand."""
    tiny, everybody = recipe(), clients()
    states = []
    for number in everybody:
        one = parts.server("fedavg", tiny, data, InProcessClients({number: everybody[number]}))
        one.train(SilentObserver())
        states.append(one.student.module.state_dict())
    both = parts.server("fedavg", tiny, data, InProcessClients(everybody))
    both.train(SilentObserver())
    weight = (states[0]["stem.0.weight"] + states[1]["stem.0.weight"]) / 2  # 30 images each
    torch.testing.assert_close(both.student.module.state_dict()["stem.0.weight"], weight, atol=1e-7, rtol=0)


def test_rounds_learn_and_the_best_one_on_val_is_kept(recipe, data, clients, parts):
    server = parts.server("fedavg", recipe(), data, InProcessClients(clients()), rounds=3, local_epochs=2)
    progress = server.train(SilentObserver())
    values = [record["val"]["top1"] for record in progress.records]
    assert max(values) > 0.8  # three colours: chance is a third
    assert progress.best == values.index(max(values)) + 1
    assert server.evaluate(server.val)["top1"] == max(values)


def test_each_round_goes_on_with_epochs_that_were_not_seen(recipe, data, clients, parts, wiretap):
    tapped, heard = wiretap
    parts.server("fedavg", recipe(), data, tapped(clients()), rounds=3, local_epochs=2).train(SilentObserver())
    told = heard["down"]
    assert [(each.numbers["client"], each.numbers["first"]) for each in told] == [
        (client, first) for first in (0, 2, 4) for client in (0, 1)
    ]
    assert {each.numbers["epochs"] for each in told} == {2}


class Dies:
    """A client that answers so many messages and then no more."""

    def __init__(self, client, answers):
        self.client, self.left = client, answers

    def reply(self, request, memory):
        self.left -= 1
        if self.left < 0:
            raise ConnectionResetError("gone")
        return self.client.reply(request, memory)


def test_a_client_that_dies_does_not_stop_the_round(recipe, data, clients, parts):
    everybody = clients(3)
    everybody[1] = Dies(everybody[1], 1)
    server = parts.server("fedavg", recipe(), data, InProcessClients(everybody), rounds=2)
    progress = server.train(SilentObserver())
    assert [record["clients"] for record in progress.records] == [[0, 1, 2], [0, 2]]
    assert [record["failed"] for record in progress.records] == [{}, {"1": "ConnectionResetError"}]
    assert progress.records[1]["bytes_up"] < progress.records[0]["bytes_up"]


def test_a_round_without_enough_answers_is_an_error(recipe, data, clients, parts):
    everybody = {number: Dies(client, 0) for number, client in clients().items()}
    server = parts.server("fedavg", recipe(), data, InProcessClients(everybody))
    with pytest.raises(
        WorkerError, match=r"round 1: 0 valid replies, at least 1 needed \(client 0: ConnectionResetError"
    ):
        server.train(SilentObserver())
    everybody = clients()
    everybody[1] = Dies(everybody[1], 0)
    server = parts.server("fedavg", recipe(), data, InProcessClients(everybody), min_replies=2)
    with pytest.raises(WorkerError, match="1 valid replies, at least 2 needed"):
        server.train(SilentObserver())


def test_what_all_clients_say_is_wrong_is_heard_where_they_are_here(recipe, data, clients, parts):
    class Refuses:
        def reply(self, request, memory):
            raise DataError("photos/1.png cannot be read")

    server = parts.server("fedavg", recipe(), data, InProcessClients({0: Refuses(), 1: Refuses()}))
    with pytest.raises(DataError, match=r"client 0: photos/1.png cannot be read"):
        server.train(SilentObserver())
    progress = parts.server("fedavg", recipe(), data, InProcessClients(clients() | {1: Refuses()})).train(
        SilentObserver()
    )
    assert progress.records[0]["failed"] == {"1": "DataError"}


def test_the_teacher_is_sent_once_and_guides(recipe, data, clients, parts, wiretap):
    tapped, heard = wiretap
    torch.manual_seed(1)
    teacher = Classifier(create_model("cifar/resnet14", 3, size=16), "cifar/resnet14", data.class_names, InputSpec(16))
    server = parts.server("guided", recipe(), data, tapped(clients()), rounds=2, teacher=teacher)
    progress = server.train(SilentObserver())
    taught = [sent for sent in heard["down"] if sent.task == "teacher"]
    assert len(taught) == 2  # one for each client
    assert not any(name.startswith("teacher/") for sent in heard["up"] for name in sent.arrays)
    assert progress.records[0]["bytes_down"] > progress.records[1]["bytes_down"] + 2 * size(teacher.module)
    plain = parts.server("fedavg", recipe(), data, InProcessClients(clients()), rounds=2)
    plain.train(SilentObserver())
    assert not torch.equal(server.student.module.stem[0].weight, plain.student.module.stem[0].weight)


@pytest.mark.parametrize("name", ["fedavg", "feddf"])
def test_a_run_goes_on_after_any_round_as_if_it_had_not_stopped(tmp_path, recipe, data, public, clients, parts, name):
    def server(everybody):
        return parts.server(name, recipe(), data, everybody, public=public, rounds=3)

    whole = server(InProcessClients(clients()))
    whole.train(SilentObserver())

    first = InProcessClients(clients())
    checkpoint = RoundCheckpoint(tmp_path / "rounds.checkpoint")

    class Killed(BaseException):
        pass

    def save(progress: ServerState):
        checkpoint.write(progress)
        if len(progress.records) == 2:
            raise Killed

    with pytest.raises(Killed):
        server(first).train(SilentObserver(), None, save)
    second = InProcessClients(clients())
    again = server(second)
    progress = RoundCheckpoint(tmp_path / "rounds.checkpoint").read()
    assert len(progress.records) == 2
    progress = again.train(SilentObserver(), progress)
    assert len(progress.records) == 3
    for key, value in whole.student.module.state_dict().items():
        assert torch.equal(value, again.student.module.state_dict()[key]), key


def test_what_an_algorithm_needs_is_said_before_anything_is_sent(recipe, data, clients, parts):
    with pytest.raises(UsageError, match=r"needs public images: data.unlabeled, or --public"):
        parts.server("feddf", recipe(), data, InProcessClients(clients()))
    with pytest.raises(UsageError, match=r"needs a trained teacher: --teacher RUN"):
        parts.server("guided", recipe(), data, InProcessClients(clients()))


def test_the_greeting_tells_what_is_wrong_with_whom(recipe, data, clients, parts):
    def empty(classes):
        raise DataError("photos: this client has 0 training images")

    everybody = clients() | {2: Client(empty)}
    with pytest.raises(DataError, match="client 2: photos: this client has 0"):
        parts.server("fedavg", recipe(), data, InProcessClients(everybody)).describe_clients()


def test_nobody_connected_is_an_error(recipe, data, parts):
    class Nobody:
        def connected(self):
            return []

        def send_and_receive(self, requests):
            return Replies()

    with pytest.raises(WorkerError, match="none is connected"):
        parts.server("fedavg", recipe(), data, Nobody()).describe_clients()
