"""Clients that are reached through Flower (https://flower.ai).  Needs the extra ``federated``."""

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.app import Message as Envelope
from flwr.serverapp import Grid

from potstill.contrib.federated.client import Client
from potstill.contrib.federated.messages import Arrays, Message, pack
from potstill.contrib.federated.server import RoundReplies
from potstill.errors import PotstillError

_MEMORY_KEY = "potstill"


_LOG = logging.getLogger("flwr")


def message_to_records(message: Message) -> RecordDict:
    """A message of ours as Flower's records."""
    arrays = ArrayRecord({name: Array(value) for name, value in message.arrays.items()})
    texts = ConfigRecord({"task": message.task, **message.texts})
    return RecordDict({"arrays": arrays, "numbers": MetricRecord(dict(message.numbers)), "texts": texts})


def records_to_message(content: RecordDict) -> Message:
    """The way back."""
    texts = {str(name): str(value) for name, value in content["texts"].items()}
    numbers = {str(name): float(value) for name, value in content["numbers"].items()}
    return Message(texts.pop("task"), _record_to_arrays(content["arrays"]), numbers, texts)


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

    def ask(self, messages: Mapping[int, Message]) -> RoundReplies:
        """See ``transport.Clients``; bytes are those of our messages, without Flower's envelopes."""
        nodes = {number: node for node, number in self.numbers.items()}
        answers, envelopes = RoundReplies(), []
        for number, message in messages.items():
            answers.down += len(pack(message))
            envelopes.append(
                Envelope(content=message_to_records(message), dst_node_id=nodes[number], message_type="train")
            )
        for reply in self.grid.send_and_receive(envelopes, timeout=self.timeout):
            if reply.has_error():
                continue  # of a node that is gone, it comes from the SuperLink, which does not say for whom it speaks
            number = self.numbers[reply.metadata.src_node_id]
            message = records_to_message(reply.content)
            if "failed" in message.texts:
                answers.failed[number] = message.texts["failed"]
                continue
            answers.up += len(pack(message))
            answers.replies[number] = message
        for number in messages:
            if number not in answers.replies:
                answers.failed.setdefault(number, "no answer")
        return answers


def handle_message(envelope: Envelope, context: Context, find: Callable[[Message], Client]) -> Envelope:
    """What a client does with every message; what went wrong stands in its own log, the server hears of the kind.

    Args:
        envelope: holds the server's message.
        context: of Flower; holds what the client keeps between messages.
        find: the client that is to answer.
    """
    memory = _record_to_arrays(context.state[_MEMORY_KEY]) if _MEMORY_KEY in context.state else {}
    before = dict(memory)
    message = records_to_message(envelope.content)
    try:
        reply = find(message).answer(message, memory)
        if before.keys() != memory.keys() or any(memory[name] is not value for name, value in before.items()):
            context.state[_MEMORY_KEY] = ArrayRecord({name: Array(np.asarray(value)) for name, value in memory.items()})
    except PotstillError as error:
        _LOG.error("potstill: %s", error)
        reply = Message(message.task, texts={"failed": type(error).__name__})
    return Envelope(content=message_to_records(reply), reply_to=envelope)


def _record_to_arrays(record: ArrayRecord) -> Arrays:
    return {str(name): value.numpy() for name, value in record.items()}
