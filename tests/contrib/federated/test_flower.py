"""The messages as Flower carries them: what is in its records, and what the server hears of a failure."""

import gc
from types import SimpleNamespace

import numpy as np
import pytest

from potstill.contrib.federated.client import Client
from potstill.contrib.federated.messages import Message
from potstill.contrib.federated.server import InProcessClients
from potstill.data.image_sets import Subset
from potstill.errors import DataError
from potstill.training.callbacks import SilentObserver

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def flower(monkeypatch):
    pytest.importorskip("flwr", reason="needs the extra federated")
    from potstill.contrib.federated import flower_app

    # An envelope can be made inside a running app only; what is put into it is what counts here.
    monkeypatch.setattr(flower_app, "Envelope", lambda content, reply_to: SimpleNamespace(content=content))
    yield flower_app
    gc.collect()


def asked(flower, message, client):
    """What a client hands to Flower when it is asked, and what it keeps."""
    from flwr.app import Context, RecordDict

    context = Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config={})
    envelope = SimpleNamespace(content=flower.as_content(message))
    return flower.answer(envelope, context, lambda message: client).content, context


def test_records_hold_a_message_whole(flower):
    arrays = {"state/w": np.arange(6, dtype=np.float32).reshape(2, 3), "state/n": np.array(4, np.int64)}
    again = flower.as_message(flower.as_content(Message("train", arrays, {"images": 5.0}, {"guide": "none"})))
    assert (again.task, again.numbers, again.texts) == ("train", {"images": 5.0}, {"guide": "none"})
    assert {name: (each.dtype, each.tolist()) for name, each in again.arrays.items()} == {
        name: (each.dtype, each.tolist()) for name, each in arrays.items()
    }


@pytest.mark.parametrize("name", ["fedavg", "fedmd"])
def test_flowers_reply_holds_no_image_and_no_name(flower, recipe, data, public, parts, name):
    sent = {}

    class Listens(InProcessClients):
        def ask(self, messages):
            sent.update(messages)
            return super().ask(messages)

    client = Client(lambda classes: Subset(data.train, range(30)), lambda: public)
    server = parts.server(name, recipe(), data, Listens({0: client}), public=public)
    server.carry_out(SilentObserver())
    content, context = asked(flower, sent[0], client)
    assert set(content) == {"arrays", "numbers", "texts"}
    assert dict(content["texts"]) == {"task": sent[0].task}
    assert set(content["numbers"]) <= {"images", "loss", "public"}
    names = {"logits"} if name == "fedmd" else {f"state/{key}" for key in server.student.module.state_dict()}
    assert set(content["arrays"]) == names
    whole = b"".join(each.data for each in content["arrays"].values())
    assert not any(data.train.pixels(at).tobytes()[:64] in whole for at in range(30))
    assert ("potstill" in context.state) == (name == "fedmd")  # its network, which stays with the client


def test_the_server_hears_the_kind_of_a_mistake_and_no_path(flower):
    def broken(classes):
        raise DataError("/home/somebody/photos/anna.png cannot be read")

    class Asked:
        def answer(self, message, memory):
            return broken(())

    content, _ = asked(flower, Message("train"), Asked())
    assert dict(content["texts"]) == {"task": "train", "failed": "DataError"}
    assert len(content["arrays"]) == len(content["numbers"]) == 0
