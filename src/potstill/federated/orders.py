"""What the server tells every client with each message, so that a client needs to remember next to nothing."""

import dataclasses
import json
from typing import Any

from potstill.errors import ArtifactError
from potstill.experiments.recipe import Recipe
from potstill.federated.messages import Message
from potstill.inputs import InputSpec
from potstill.models.classifier import Classifier
from potstill.models.create import create_model


def texts_for(recipe: Recipe, student: Classifier, teacher: Classifier | None, epochs: int) -> dict[str, str]:
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
        "student": _network(student),
    }
    return texts if teacher is None else texts | {"teacher": _network(teacher)}


def recipe_of(message: Message) -> Recipe:
    """The recipe that came.

    Raises:
        ArtifactError: it is none, as of another version of potstill.
    """
    try:
        return Recipe.model_validate_json(message.texts["recipe"])
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"the server's recipe cannot be read: {error}\nUse one version of potstill") from error


def classes_of(message: Message) -> tuple[str, ...]:
    """The server's classes, in order."""
    return tuple(map(str, json.loads(message.texts["classes"])))


def network_of(message: Message, which: str) -> Classifier:
    """The student or the teacher as described, untrained."""
    described: dict[str, Any] = json.loads(message.texts[which])
    spec = InputSpec.from_dict(described["input"])
    classes = classes_of(message)
    module = create_model(described["architecture"], len(classes), size=spec.size)
    return Classifier(module, described["architecture"], classes, spec)


def _network(network: Classifier) -> str:
    return json.dumps({"architecture": network.architecture, "input": dataclasses.asdict(network.input)})
