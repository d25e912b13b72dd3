"""What Flower's records carry, with a grid that hands every message to the client app at once; needs Flower."""

import io

import numpy as np
import pytest
import torch

from potstill.contrib.federated.client import Client
from potstill.contrib.federated.messages import Message
from potstill.contrib.federated.server import InProcessClients
from potstill.data.image_sets import Subset
from potstill.errors import DataError, UsageError, WorkerError
from potstill.input_spec import InputSpec
from potstill.models.factory import create_model
from potstill.models.model_file import Classifier
from potstill.training.callbacks import SilentObserver

pytest.importorskip("flwr", reason="needs the extra federated")
pytestmark = pytest.mark.filterwarnings("ignore")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict  # noqa: E402
from flwr.app import Message as FlowerMessage  # noqa: E402

from potstill.contrib.federated import flower  # noqa: E402


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """Flower makes messages only inside a running task."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr(flower, "_POLL_SECONDS", 0.0)


class Grid:
    """Flower's grid, as far as it is used: node -> what handles a message; ids of messages are their numbers."""

    def __init__(self, nodes):
        self.nodes, self.sent = nodes, {}

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        for message in messages:
            identity = str(len(self.sent))
            message.metadata.__dict__["_message_id"] = identity
            self.sent[identity] = message
            yield identity

    def pull_messages(self, identities):
        for identity in identities:
            message = self.sent[identity]
            reply = self.nodes[message.metadata.dst_node_id](message)
            if reply is not None:
                yield reply


def node(client, contexts=None):
    """A SuperNode with this client."""
    context = Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config={})
    if contexts is not None:
        contexts.append(context)
    return lambda message: flower.handle_message(message, context, lambda _: client)


@pytest.fixture
def clients(data):
    def create():
        cut = np.array_split(np.arange(len(data.train)), 2)
        return [Client(lambda classes, part=part: Subset(data.train, part)) for part in cut]

    return create


@pytest.mark.parametrize("name", ["fedavg", "feddf", "guided"])
def test_the_weights_are_those_of_one_process_bit_for_bit(recipe, data, public, parts, clients, name):
    torch.manual_seed(1)
    teacher = Classifier(create_model("cifar/resnet8", 3, size=16), "cifar/resnet8", data.class_names, InputSpec(16))
    given = {"public": public, "rounds": 2, "teacher": teacher}
    here = parts.server(name, recipe(), data, InProcessClients(dict(enumerate(clients()))), **given)
    contexts = []
    grid = Grid({at + 5: node(client, contexts) for at, client in enumerate(clients())})
    there = parts.server(name, recipe(), data, flower.GridClients(grid, 60), **given)
    assert there.describe_clients() == ({0: 30, 1: 30}, {})
    records, found = here.train(SilentObserver()).records, there.train(SilentObserver()).records
    for key in ("val", "clients", "failed", "bytes_up", "bytes_down", "local_loss"):
        assert [each[key] for each in found] == [each[key] for each in records], key
    for key, value in here.student.module.state_dict().items():
        assert torch.equal(value, there.student.module.state_dict()[key]), (name, key)
    assert ["potstill" in each.state for each in contexts] == [name == "guided"] * 2  # the teacher that clients keep


def test_a_reply_holds_no_image_and_no_name(recipe, data, parts, clients):
    replies = []

    def listen(message):
        replies.append(node_of(message))
        return replies[-1]

    node_of = node(clients()[0])
    server = parts.server("fedavg", recipe(), data, flower.GridClients(Grid({3: listen}), 60))
    server.train(SilentObserver())
    (reply,) = replies
    assert set(reply.content) == {"arrays", "numbers", "texts"}
    assert dict(reply.content["texts"]) == {"task": "weights"}
    assert set(reply.content["numbers"]) == {"images", "loss"}
    state = server.student.module.state_dict()
    assert set(reply.content["arrays"]) == {f"state/{key}" for key in state}
    whole = b"".join(each.data for each in reply.content["arrays"].values())
    assert not any(data.train.pixels(at).tobytes()[:64] in whole for at in range(30))


def records(arrays, numbers, texts):
    return RecordDict({"arrays": arrays, "numbers": MetricRecord(numbers), "texts": ConfigRecord(texts)})


def array_of(data, shape=(2,), dtype="float32", stype="numpy.ndarray"):
    return ArrayRecord({"state/w": Array(dtype, shape, stype, data)})


def header(shape, dtype="<f4"):
    """An array file that claims a shape and holds eight bytes."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue() + bytes(8)


GOOD = ({"images": 1.0, "loss": 0.5}, {"task": "weights"})
UNREADABLE = {
    "no records": RecordDict({}),
    "other records": RecordDict(
        {"texts": ConfigRecord({"task": "weights"}), "numbers": ConfigRecord({"images": "many"}),
         "arrays": ArrayRecord({})}
    ),
    "no task": records(ArrayRecord({}), {}, {}),
    "lists of numbers": records(ArrayRecord({}), {"images": [1.0, 2.0]}, {"task": "weights"}),
    "no array": records(array_of(b"noise"), *GOOD),
    "empty array": records(array_of(b""), *GOOD),
    "terabytes": records(array_of(header((2**44,))), *GOOD),
    "more than it holds": records(array_of(header((3,))), *GOOD),
    "objects": records(array_of(header((1,), "|O")), *GOOD),
    "text": records(array_of(header((1,), "<U2")), *GOOD),
}  # fmt: skip


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_a_reply_that_cannot_be_read_costs_that_client_the_round(recipe, data, parts, clients, content):
    good, bad = clients()
    honest = node(bad)

    def hostile(message):
        task = message.content["texts"]["task"]
        return honest(message) if task == "describe" else FlowerMessage(content=content, reply_to=message)

    server = parts.server("fedavg", recipe(), data, flower.GridClients(Grid({1: node(good), 2: hostile}), 60))
    server.describe_clients()
    record = server.train(SilentObserver()).records[0]
    assert (record["clients"], record["failed"]) == ([0], {"1": "unreadable reply"})


def test_an_array_in_flowers_record_comes_back():
    for value in (np.float32([[1, 2], [3, 4]]), np.array(4), np.zeros((0, 3), np.float32)):
        found = flower.decode_array(Array(value))
        assert (found.dtype, found.shape, found.tolist()) == (value.dtype, value.shape, value.tolist())


def raises(message):
    raise ValueError("Unexpected set of `children`")  # as Flower does for a message that was tampered with


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (raises, "unreadable reply"),
        (lambda message: None, "no reply"),  # until the time is over
        (lambda message: FlowerMessage(error=gone(), reply_to=message), "no reply"),
    ],
)
def test_a_node_that_fails_or_falls_silent_is_left_out(recipe, data, parts, clients, broken, why):
    grid = Grid({1: node(clients()[0]), 2: broken})
    server = parts.server("fedavg", recipe(), data, flower.GridClients(grid, 0.2))
    record = server.train(SilentObserver()).records[0]
    assert (record["clients"], record["failed"]) == ([0], {"1": why})


def gone():
    from flwr.app import Error

    return Error(code=0, reason="gone")


@pytest.mark.parametrize("error", [DataError, ZeroDivisionError])
def test_the_server_receives_the_class_of_an_error_and_no_path(error):
    class Broken:
        def reply(self, request, memory):
            raise error("/home/somebody/photos/anna.png")

    grid = Grid({1: node(Broken())})
    clients = flower.GridClients(grid, 1)
    clients.connected()
    found = clients.send_and_receive({0: Message("weights", {}, {"client": 0})})
    assert (found.replies, found.failed) == ({}, {0: error.__name__})
    content = node(Broken())(grid.sent["0"]).content
    assert (dict(content["arrays"]), dict(content["numbers"])) == ({}, {})
    assert dict(content["texts"]) == {"task": "weights", "failed": error.__name__}


def test_control_characters_of_a_client_are_not_passed_on():
    def hostile(message):
        texts = {"task": "weights", "failed": "\x1b[2Jyou have won"}
        return FlowerMessage(content=records(ArrayRecord({}), {}, texts), reply_to=message)

    clients = flower.GridClients(Grid({1: hostile}), 1)
    clients.connected()
    assert clients.send_and_receive({0: Message("weights")}).failed == {0: "failed"}


def test_too_few_clients_after_the_wait_are_an_error():
    with pytest.raises(WorkerError, match=r"1 of 2 clients connected within 0.1 s"):
        flower.wait_for_clients(flower.GridClients(Grid({1: raises}), 1), 2, 0.1)


def test_the_server_does_not_choose_the_folder_of_a_supernode(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    run = {"simulated-clients": str(tmp_path)}
    with pytest.raises(UsageError, match="this SuperNode has no images"):
        flower._create_client({}, run)
    assert flower._create_client({"partition-id": 1}, run)
