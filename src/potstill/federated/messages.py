"""What goes over the wire: named arrays, a few numbers and texts.  Nothing else, and never an image.

In bytes a message is a safetensors file: the arrays, and everything else as JSON in its header.  Opening one runs no
code.  What a client sends is checked before it leaves: ``check_reply`` allows the weights of the student that it was
sent, logits of the public images, and counts.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from potstill.errors import ArtifactError, UsageError

Arrays = dict[str, NDArray[Any]]

STATE, TEACHER, LOGITS = "state/", "teacher/", "logits"  # how the names of arrays begin
COUNTS = ("images", "loss", "public")  # numbers that a client may send
_HEAD = 8  # bytes that hold the length of safetensors' header


@dataclass(frozen=True)
class Message:
    """From the server to a client, or back."""

    task: str  # hello, teach, train or answer; of a reply, that of the message
    arrays: Arrays = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def pack(message: Message) -> bytes:
    """The message as bytes; what is reported as traffic is their number."""
    rest = {"task": message.task, "numbers": json.dumps(message.numbers), "texts": json.dumps(message.texts)}
    content: bytes = safetensors.numpy.save(message.arrays, metadata=rest)
    return content


def unpack(content: bytes) -> Message:
    """What ``pack`` made.

    Raises:
        ArtifactError: other bytes.
    """
    try:
        arrays = safetensors.numpy.load(content)
        length = int.from_bytes(content[:_HEAD], "little")
        rest = json.loads(content[_HEAD : _HEAD + length])["__metadata__"]
        return Message(rest["task"], arrays, json.loads(rest["numbers"]), json.loads(rest["texts"]))
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"a message cannot be read: {error}") from error


def as_arrays(state: Mapping[str, Tensor], prefix: str = STATE) -> Arrays:
    """A state dict as arrays of its own memory."""
    return {f"{prefix}{key}": value.detach().cpu().contiguous().clone().numpy() for key, value in state.items()}


def as_state(arrays: Arrays, prefix: str = STATE) -> dict[str, Tensor]:
    """The state dict among a message's arrays."""
    found = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    return {key: torch.from_numpy(value.copy()) for key, value in found.items()}


def check_reply(reply: Message, *, state: Mapping[str, Tensor], logits: tuple[int, int] | None = None) -> Message:
    """The reply, if it holds nothing but what a client may say.

    Args:
        reply: about to be sent.
        state: of the student: names, shapes and kinds of numbers that weights may have.
        logits: [P, K] of the public images; None: none are sent.

    Raises:
        UsageError: anything else is in it; names it.
    """
    allowed = {f"{STATE}{key}": (tuple(value.shape), str(value.dtype)) for key, value in state.items()}
    if logits is not None:
        allowed[LOGITS] = (logits, "torch.float32")
    for name, array in reply.arrays.items():
        if allowed.get(name) != (array.shape, f"torch.{array.dtype}"):
            raise UsageError(f"a client does not send {name!r}, {array.dtype} {list(array.shape)}")
    more = [name for name in reply.numbers if name not in COUNTS] + list(reply.texts)
    if more:
        raise UsageError(f"a client sends counts only, and no {', '.join(map(repr, more))}")
    return reply
