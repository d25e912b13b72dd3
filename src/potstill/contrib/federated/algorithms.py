"""The algorithms of federated training, their baselines, the recipes that they accept, and the averages they compute.

FedAvg averages the clients' weights by how many images each has.  McMahan and others, "Communication-Efficient Learning
of Deep Networks from Decentralized Data", AISTATS 2017.  https://arxiv.org/abs/1602.05629

Traps:
- Each client counts by its images.  Equal weights would give a client with three images the weight of one with a
  thousand.
- BatchNorm's statistics are averaged too.  The variance over all images is not the mean of the clients' variances: how
  far apart their means are belongs to it, and clients that see other classes have other means.  So here it is pooled:
  the mean of ``v_i + (m_i - m)^2``.
- Counts of batches (int64) are no weights; the largest is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from potstill.config.recipe import Recipe
from potstill.contrib.federated.messages import LOGITS, Arrays
from potstill.errors import DataError, UsageError, did_you_mean


@dataclass(frozen=True)
class Algorithm:
    """What clients do and send, and what the server makes of it."""

    summary: str
    sends: Literal["weights", "logits"] = "weights"
    distils: bool = False  # the server, on public images
    guide: Literal["none", "teacher", "student"] = "none"  # of local training: the server's teacher, or what it sent

    @property
    def public(self) -> bool:
        """Whether public images are needed."""
        return self.distils or self.sends == "logits"


ALGORITHMS: dict[str, Algorithm] = {
    "fedavg": Algorithm("clients train on labels, the server averages their weights"),
    "feddf": Algorithm("likewise, then their averaged logits on public images teach the average", distils=True),
    "fedmd": Algorithm("clients keep their networks and send logits of public images", sends="logits", distils=True),
    "guided": Algorithm("fedavg, and the server's teacher guides local training", guide="teacher"),
    "selfguided": Algorithm("fedavg, and the student that the server sent guides local training", guide="student"),
}


def parse_algorithms(text: str) -> list[str]:
    """Names separated by commas.

    Raises:
        UsageError: unknown or repeated ones; names the nearest.

    Example:
        >>> parse_algorithms("fedavg,feddf")
        ['fedavg', 'feddf']
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in ALGORITHMS:
            raise UsageError(f"no algorithm {name!r}{did_you_mean(name, ALGORITHMS)}\nKnown: {', '.join(ALGORITHMS)}")
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--algorithms: name one or more of {', '.join(ALGORITHMS)}, each once; got {text!r}")
    return names


BASELINES = {
    "alone": "each client by itself, as many rounds; the mean over clients",
    "central": "one client that has all images, as many rounds: what federation could reach at best",
}


def parse_baselines(text: str) -> list[str]:
    """Names separated by commas, or nothing.

    Raises:
        UsageError: an unknown one.

    Example:
        >>> parse_baselines("alone,central"), parse_baselines("")
        (['alone', 'central'], [])
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in BASELINES:
            raise UsageError(f"no baseline {name!r}{did_you_mean(name, BASELINES)}\nKnown: {', '.join(BASELINES)}")
    return list(dict.fromkeys(names))


def check_recipe(recipe: Recipe, names: Sequence[str]) -> None:
    """Settings that a client's few steps have no place for.

    Raises:
        UsageError: names each, and what to set it to.
    """
    training, problems = recipe.stage_training("student"), []
    asked = [
        (training.ema_decay is not None, "training.ema_decay", "null: weights are averaged among clients"),
        (training.qat_fraction > 0, "training.qat_fraction", "0: train for int8 afterwards, with `potstill run`"),
        (
            training.gradient_accumulation_steps > 1,
            "training.gradient_accumulation_steps",
            "1, and training.batch_size to what a client can hold",
        ),
        (
            recipe.data.class_balance != "none",
            "data.class_balance",
            "none: nobody knows the classes' shares among all clients",
        ),
        (recipe.data.target is not None, "data.target", "null: there is one domain"),
        (recipe.student.weights is not None, "student.weights", "null: all clients begin with new weights"),
        (bool(recipe.assistants), "assistants", "[]"),
        (recipe.born_again_generations > 1, "born_again_generations", "1"),
        (recipe.seeds > 1, "seeds", "1: give --seed, and repeat the command with others"),
    ]
    for wrong, key, value in asked:
        if wrong:
            problems.append(f"{key}: set it to {value}")
    if any(ALGORITHMS[name].guide == "teacher" for name in names):
        teachers = recipe.each_teacher
        if len(teachers) != 1 or teachers[0].weights is None:
            given = ", ".join(f"{each.model}{' without weights' * (each.weights is None)}" for each in teachers)
            problems.append(
                "guided: the server needs one teacher that is trained already: --teacher RUN, a folder that is there; "
                f"got {given}"
            )
    if problems:
        raise UsageError("\n".join(["this recipe cannot be trained by rounds:", *(f"  {each}" for each in problems)]))


_RUNNING_MEAN, _RUNNING_VARIANCE = "running_mean", "running_var"


def average_states(states: Sequence[Arrays], images: Sequence[float]) -> Arrays:
    """One state dict from those of several clients, in float64 inside and in each array's own kind outside.

    Args:
        states: with the same names and shapes.
        images: how many each client has trained on.

    Returns:
        The weighted mean of floats (see above for variances), and the largest of whole numbers.

    Raises:
        UsageError: states that differ in names or shapes.
        DataError: there is none, or no image at all.

    Example:
        >>> one, two = ({"w": np.array([value], np.float32)} for value in (1.0, 5.0))
        >>> average_states([one, two], [3, 1])["w"].tolist()
        [2.0]
    """
    if not states or sum(images) <= 0:
        raise DataError("there is nothing to average: no client has sent weights that come from images")
    _check_same_arrays(states)
    shares = np.asarray(images, dtype=np.float64) / float(sum(images))
    found: Arrays = {}
    for name, first in states[0].items():
        values = np.stack([state[name] for state in states])
        if first.dtype.kind != "f":
            found[name] = np.asarray(values.max(axis=0))
            continue
        values = values.astype(np.float64)
        mean = name.removesuffix(_RUNNING_VARIANCE) + _RUNNING_MEAN
        if name.endswith(_RUNNING_VARIANCE) and mean in states[0]:
            means = np.stack([state[mean] for state in states]).astype(np.float64)
            values = values + (means - _weighted_mean(means, shares)) ** 2
        found[name] = np.asarray(_weighted_mean(values, shares)).astype(first.dtype)
    return found


def average_logits(logits: Sequence[NDArray[Any]], images: Sequence[float]) -> NDArray[Any]:
    """The clients' logits [P, K], averaged by how many images each has.

    Raises:
        UsageError: shapes that differ.
        DataError: there are none.
    """
    return average_states([{LOGITS: each} for each in logits], images)[LOGITS]


def _weighted_mean(values: NDArray[Any], shares: NDArray[np.float64]) -> NDArray[Any]:
    mean: NDArray[Any] = np.tensordot(shares, values, axes=1)
    return mean


def _check_same_arrays(states: Sequence[Arrays]) -> None:
    wanted = {name: value.shape for name, value in states[0].items()}
    for number, state in enumerate(states[1:], start=2):
        if {name: value.shape for name, value in state.items()} != wanted:
            raise UsageError(f"client {number} of {len(states)} sent other arrays than the first: networks differ")
