"""Messages between server and clients: named arrays, a few numbers and texts, never an image or a file name.

Server messages carry the recipe, the classes and the networks, so that a client stores next to nothing.  Both sides
check a reply against the same rule, ``find_reply_problem``: the client before it sends, the server before it averages.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from potstill.code_references import refuse_code_in_recipe
from potstill.config.recipe import Recipe
from potstill.errors import ArtifactError
from potstill.input_spec import InputSpec
from potstill.models.factory import create_model
from potstill.models.model_file import Classifier

Arrays = dict[str, NDArray[Any]]
ArraySpecs = Mapping[str, tuple[tuple[int, ...], "np.dtype[Any]"]]  # name -> shape and dtype

STATE_PREFIX, TEACHER_PREFIX = "state/", "teacher/"  # names of arrays begin with these
COUNTS = ("images", "loss")  # numbers that a client may send
NOT_FINITE = "NonFiniteError"  # also the error that a client itself reports when its loss is NaN
MAX_LOSS = 1e9
_MAX_IMAGES = 2**40


@dataclass(frozen=True)
class Message:
    """A request of the server, or a client's reply to it."""

    task: str  # describe, teacher or weights; a reply has that of its request
    arrays: Arrays = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of its arrays, and of its names, numbers and texts as JSON; reported as traffic."""
        rest = json.dumps([self.task, list(self.arrays), self.numbers, self.texts])
        return sum(each.nbytes for each in self.arrays.values()) + len(rest.encode())


def state_dict_to_arrays(state: Mapping[str, Tensor], prefix: str = STATE_PREFIX) -> Arrays:
    """Return copies of a state dict's tensors as arrays, their names with ``prefix``."""
    return {f"{prefix}{key}": value.detach().cpu().contiguous().clone().numpy() for key, value in state.items()}


def arrays_to_state_dict(arrays: Arrays, prefix: str = STATE_PREFIX) -> dict[str, Tensor]:
    """Return copies of the arrays whose names have ``prefix`` as a state dict."""
    found = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    return {key: from_numpy(value.copy()) for key, value in found.items()}


def array_specs(arrays: Arrays) -> dict[str, tuple[tuple[int, ...], "np.dtype[Any]"]]:
    """Return name -> (shape, dtype)."""
    return {name: (each.shape, each.dtype) for name, each in arrays.items()}


def find_reply_problem(reply: Message, specs: ArraySpecs, *, need_loss: bool = True) -> str | None:
    """Return what is wrong with a reply, of which nothing is trusted, not even types, in a few words; None: nothing.

    Right is a reply with exactly the arrays of ``specs``, all values finite, variances and whole numbers (batch counts)
    not negative, a whole number of images of at least 1, a loss below 1e9, and no texts.
    """
    if not isinstance(reply, Message) or not all(isinstance(each, np.ndarray) for each in reply.arrays.values()):
        return "not a reply"
    if array_specs(reply.arrays) != dict(specs):
        return "wrong arrays"
    if reply.texts or not set(reply.numbers) <= set(COUNTS):
        return "texts or numbers that a client must not send"
    if not all(isinstance(each, (int, float)) for each in reply.numbers.values()):
        return "wrong numbers"
    arrays = reply.arrays
    floats = [each for each in arrays.values() if each.dtype.kind == "f"]
    if not all(map(math.isfinite, reply.numbers.values())) or not all(np.isfinite(each).all() for each in floats):
        return NOT_FINITE
    images = reply.numbers.get("images", 0)
    if not 1 <= images <= _MAX_IMAGES or images != int(images):
        return "wrong numbers"
    if abs(reply.numbers.get("loss", math.inf if need_loss else 0.0)) > MAX_LOSS:
        return "wrong numbers"
    signed = [each for name, each in arrays.items() if each.dtype.kind != "f" or name.endswith("running_var")]
    return "negative variances or counts" if any((each < 0).any() for each in signed) else None


def encode_texts(recipe: Recipe, student: Classifier, teacher: Classifier | None, epochs: int) -> dict[str, str]:
    """Return recipe (its ``data.augment`` filled in), classes and networks as texts, without paths."""
    data = recipe.data.model_copy(update={"source": "python", "unlabeled": None, "options": {}})
    training = recipe.student.training | {"epochs": epochs}
    bare = recipe.student.model_copy(update={"weights": None, "training": training})
    sent = recipe.model_copy(update={"data": data, "student": bare, "teacher": None, "tracker": []})
    networks = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    return {"recipe": sent.model_dump_json(), "classes": json.dumps(list(student.class_names))} | {
        name: json.dumps({"architecture": each.architecture, "input": dataclasses.asdict(each.input)})
        for name, each in networks.items()
    }


def decode_recipe(message: Message) -> Recipe:
    """Return the server's recipe; ArtifactError: of another version; UsageError: it names code that would run here."""
    try:
        recipe = Recipe.model_validate_json(message.texts["recipe"])
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"the server's recipe cannot be read: {error}\nUse one version of potstill") from error
    refuse_code_in_recipe(recipe.model_dump())
    return recipe


def decode_classes(message: Message) -> tuple[str, ...]:
    """Return the server's classes, in order."""
    return tuple(map(str, json.loads(message.texts["classes"])))


def decode_network(message: Message, which: str) -> Classifier:
    """Return the ``student`` or ``teacher`` that the message describes, untrained."""
    described: dict[str, Any] = json.loads(message.texts[which])
    spec = InputSpec.from_dict(described["input"])
    classes = decode_classes(message)
    module = create_model(described["architecture"], len(classes), size=spec.size)
    return Classifier(module, described["architecture"], classes, spec)
