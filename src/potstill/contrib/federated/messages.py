"""Messages between server and clients: named arrays, a few numbers and texts.  Nothing else, and never an image.

In bytes a message is a safetensors file: the arrays, and everything else as JSON in its header.  Opening one runs no
code.  A client's reply is checked before it leaves: ``check_reply`` allows the weights of the student that the server
sent, logits of the public images, and counts.

Every message of the server carries recipe, classes and networks, so that a client stores next to nothing.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from potstill.config.code_references import refuse_code_in_recipe
from potstill.config.recipe import Recipe
from potstill.errors import ArtifactError, UsageError
from potstill.input_spec import InputSpec
from potstill.models.factory import create_model
from potstill.models.model_file import Classifier

Arrays = dict[str, NDArray[Any]]

STATE_PREFIX, TEACHER_PREFIX, LOGITS = "state/", "teacher/", "logits"  # how the names of arrays begin
COUNTS = ("images", "loss", "public")  # numbers that a client may send
_HEADER_LENGTH_BYTES = 8  # bytes that hold the length of safetensors' header


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
        length = int.from_bytes(content[:_HEADER_LENGTH_BYTES], "little")
        rest = json.loads(content[_HEADER_LENGTH_BYTES : _HEADER_LENGTH_BYTES + length])["__metadata__"]
        return Message(rest["task"], arrays, json.loads(rest["numbers"]), json.loads(rest["texts"]))
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"a message cannot be read: {error}") from error


def state_dict_to_arrays(state: Mapping[str, Tensor], prefix: str = STATE_PREFIX) -> Arrays:
    """A state dict as arrays of its own memory."""
    return {f"{prefix}{key}": value.detach().cpu().contiguous().clone().numpy() for key, value in state.items()}


def arrays_to_state_dict(arrays: Arrays, prefix: str = STATE_PREFIX) -> dict[str, Tensor]:
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
    allowed = {f"{STATE_PREFIX}{key}": (tuple(value.shape), str(value.dtype)) for key, value in state.items()}
    if logits is not None:
        allowed[LOGITS] = (logits, "torch.float32")
    for name, array in reply.arrays.items():
        if allowed.get(name) != (array.shape, f"torch.{array.dtype}"):
            raise UsageError(f"a client does not send {name!r}, {array.dtype} {list(array.shape)}")
    more = [name for name in reply.numbers if name not in COUNTS] + list(reply.texts)
    if more:
        raise UsageError(f"a client sends counts only, and no {', '.join(map(repr, more))}")
    return reply


def encode_texts(recipe: Recipe, student: Classifier, teacher: Classifier | None, epochs: int) -> dict[str, str]:
    """Recipe, classes and networks as texts; where the server has its files is left out.

    Args:
        recipe: with ``data.augment`` filled in, since its default depends on the server's data.
        student: as the server holds it.
        teacher: likewise, where there is one.
        epochs: of all rounds together, over which the learning rate's schedule goes.
    """
    data = recipe.data.model_copy(update={"source": "python", "unlabeled": None, "options": {}})
    training = recipe.student.training | {"epochs": epochs}
    bare = recipe.student.model_copy(update={"weights": None, "training": training})
    told = recipe.model_copy(update={"data": data, "student": bare, "teacher": None, "tracker": []})
    texts = {
        "recipe": told.model_dump_json(),
        "classes": json.dumps(list(student.class_names)),
        "student": _encode_network(student),
    }
    return texts if teacher is None else texts | {"teacher": _encode_network(teacher)}


def decode_recipe(message: Message) -> Recipe:
    """The recipe that came.

    Raises:
        ArtifactError: it is none, as of another version of potstill.
        UsageError: it names code that would run here.
    """
    try:
        recipe = Recipe.model_validate_json(message.texts["recipe"])
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"the server's recipe cannot be read: {error}\nUse one version of potstill") from error
    refuse_code_in_recipe(recipe.model_dump())
    return recipe


def decode_classes(message: Message) -> tuple[str, ...]:
    """The server's classes, in order."""
    return tuple(map(str, json.loads(message.texts["classes"])))


def decode_network(message: Message, which: str) -> Classifier:
    """The student or the teacher as described, untrained."""
    described: dict[str, Any] = json.loads(message.texts[which])
    spec = InputSpec.from_dict(described["input"])
    classes = decode_classes(message)
    module = create_model(described["architecture"], len(classes), size=spec.size)
    return Classifier(module, described["architecture"], classes, spec)


def _encode_network(network: Classifier) -> str:
    return json.dumps({"architecture": network.architecture, "input": dataclasses.asdict(network.input)})
