"""Through Flower (https://flower.ai): the same messages between a SuperLink and SuperNodes on other machines.

``server`` and ``client`` are the two halves of a Flower app; ``potstill federated app`` writes the two small files that
name them.  Needs the extra ``federated``.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.app import Message as Envelope
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from potstill.data.images import ImageSet
from potstill.data.settings import DataSettings
from potstill.data.sources import list_images
from potstill.data.unlabeled import UnlabeledFiles
from potstill.errors import PotstillError, UsageError
from potstill.federated.client import Client
from potstill.federated.messages import Arrays, Message, pack
from potstill.federated.own_images import own_images
from potstill.federated.transport import Answers

_MEMORY = "potstill"
_LOG = logging.getLogger("flwr")

client = ClientApp()
server = ServerApp()


def as_content(message: Message) -> RecordDict:
    """A message of ours as Flower's records."""
    arrays = ArrayRecord({name: Array(value) for name, value in message.arrays.items()})
    texts = ConfigRecord({"task": message.task, **message.texts})
    return RecordDict({"arrays": arrays, "numbers": MetricRecord(dict(message.numbers)), "texts": texts})


def as_message(content: RecordDict) -> Message:
    """The way back."""
    texts = {str(name): str(value) for name, value in content["texts"].items()}
    numbers = {str(name): float(value) for name, value in content["numbers"].items()}
    return Message(texts.pop("task"), _arrays(content["arrays"]), numbers, texts)


class GridClients:
    """All SuperNodes that are connected, through the grid of a running ServerApp.

    Args:
        grid: Flower's.
        timeout: seconds to wait for the answers of a round; who is later is left out of it.
    """

    def __init__(self, grid: Grid, timeout: float) -> None:
        self.grid, self.timeout = grid, timeout
        self.numbers: dict[int, int] = {}  # node id -> number, in the order in which they were first seen

    def present(self) -> Sequence[int]:
        """Numbers of the nodes that are connected now."""
        nodes = sorted(self.grid.get_node_ids())
        for node in nodes:
            self.numbers.setdefault(node, len(self.numbers))
        return sorted(self.numbers[node] for node in nodes)

    def ask(self, messages: Mapping[int, Message]) -> Answers:
        """See ``transport.Clients``; bytes are those of our messages, without Flower's envelopes."""
        nodes = {number: node for node, number in self.numbers.items()}
        answers, envelopes = Answers(), []
        for number, message in messages.items():
            answers.down += len(pack(message))
            envelopes.append(Envelope(content=as_content(message), dst_node_id=nodes[number], message_type="train"))
        for reply in self.grid.send_and_receive(envelopes, timeout=self.timeout):
            if reply.has_error():
                continue  # of a node that is gone, it comes from the SuperLink, which does not say for whom it speaks
            number = self.numbers[reply.metadata.src_node_id]
            message = as_message(reply.content)
            if "failed" in message.texts:
                answers.failed[number] = message.texts["failed"]
                continue
            answers.up += len(pack(message))
            answers.replies[number] = message
        for number in messages:
            if number not in answers.replies:
                answers.failed.setdefault(number, "no answer")
        return answers


def answer(envelope: Envelope, context: Context, find: Callable[[Message], Client]) -> Envelope:
    """What a client does with every message; what went wrong stands in its own log, the server hears of the kind.

    Args:
        envelope: holds the server's message.
        context: of Flower; holds what the client keeps between messages.
        find: the client that is to answer.
    """
    memory = _arrays(context.state[_MEMORY]) if _MEMORY in context.state else {}
    before = dict(memory)
    message = as_message(envelope.content)
    try:
        reply = find(message).answer(message, memory)
        if before.keys() != memory.keys() or any(memory[name] is not value for name, value in before.items()):
            context.state[_MEMORY] = ArrayRecord({name: Array(np.asarray(value)) for name, value in memory.items()})
    except PotstillError as error:
        _LOG.error("potstill: %s", error)
        reply = Message(message.task, texts={"failed": type(error).__name__})
    return Envelope(content=as_content(reply), reply_to=envelope)


def _serve(grid: Grid, context: Context) -> None:
    """Carry out the rounds that the app's configuration asks for."""
    from potstill.federated.served import serve

    wishes = dict(context.run_config)
    serve(GridClients(grid, float(wishes.get("timeout", 600.0))), wishes)


def _client(config: Mapping[str, Any]) -> Client:
    folder, public = config.get("folder"), config.get("public")
    if not folder:
        raise UsageError("this SuperNode has no images: start it with --node-config 'folder=\"DIR\"'")
    asked = None if not public else (lambda: _public(Path(str(public)).expanduser()))
    how = {key: bool(config.get(key, False)) for key in ("follow_links", "skip_bad")}
    return Client(lambda classes: own_images(Path(str(folder)).expanduser(), classes, **how), asked)


def _public(root: Path) -> ImageSet:
    return UnlabeledFiles(root, list_images(root, DataSettings())[0])


def _arrays(record: ArrayRecord) -> Arrays:
    return {str(name): value.numpy() for name, value in record.items()}


def _answer(envelope: Envelope, context: Context) -> Envelope:
    return answer(envelope, context, lambda message: _client(context.node_config))


client.train()(_answer)
server.main()(_serve)
