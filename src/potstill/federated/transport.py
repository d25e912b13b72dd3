"""How messages reach clients: here within one process; through Flower in ``flower``."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from potstill.errors import PotstillError, WorkerError
from potstill.federated.client import Client
from potstill.federated.messages import Arrays, Message, pack, unpack


@dataclass
class Answers:
    """What came back from the clients that were asked."""

    replies: dict[int, Message] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)  # client -> what kind of failure
    down: int = 0  # bytes from the server to clients
    up: int = 0  # bytes back


class Clients(Protocol):
    """Everybody who takes part."""

    def present(self) -> Sequence[int]:
        """Numbers of the clients that can be asked now."""

    def ask(self, messages: Mapping[int, Message]) -> Answers:
        """Send each client its message, and wait; a client that fails is left out of the replies."""


class InProcess:
    """All clients one after the other in this process; every message is turned into bytes and back.

    Args:
        clients: by number.
    """

    def __init__(self, clients: Mapping[int, Client]) -> None:
        self.clients = dict(clients)
        self.memories: dict[int, Arrays] = {number: {} for number in clients}

    def present(self) -> Sequence[int]:
        """All of them."""
        return sorted(self.clients)

    def ask(self, messages: Mapping[int, Message]) -> Answers:
        """See ``Clients``; what a person here can mend is raised: from the greeting, and where nobody can answer."""
        answers = Answers()
        mendable: list[PotstillError] = []
        for number, message in messages.items():
            sent = pack(message)
            answers.down += len(sent)
            try:
                reply = pack(self.clients[number].answer(unpack(sent), self.memories[number]))
            except PotstillError as error:
                mendable.append(type(error)(f"client {number}: {error}"))
                if message.task == "hello":
                    raise mendable[-1] from error
                answers.failed[number] = type(error).__name__
            except Exception as error:  # a client that dies, of whatever, does not stop the round
                answers.failed[number] = type(error).__name__
            else:
                answers.up += len(reply)
                answers.replies[number] = unpack(reply)
        if mendable and len(mendable) == len(messages):
            raise mendable[0]
        return answers


def wait_for(clients: Clients, count: int, seconds: float) -> None:
    """Return once so many clients are connected.

    Raises:
        WorkerError: they are not after so many seconds.
    """
    until = time.monotonic() + seconds
    while len(clients.present()) < count:
        if time.monotonic() > until:
            raise WorkerError(f"{len(clients.present())} of {count} clients are connected after {seconds:g} s")
        time.sleep(0.2)
