"""The server: sends requests to clients, merges the valid replies into one student, evaluates it on val, each round.

Requests reach clients in this process here, and through Flower in ``flower``.  The state after each round is a
checkpoint, from which a killed run resumes.

FedAvg averages the clients' weights by their numbers of images.  McMahan et al., "Communication-Efficient Learning of
Deep Networks from Decentralized Data", AISTATS 2017.  https://arxiv.org/abs/1602.05629

No client is trusted:
- A reply with wrong arrays, NaN, or more images than the client declared at first is dropped, as if it had not come.
- No client has more than ``Schedule.max_share`` of the weight in an average, whatever number of images it declares.
- An update far larger than those of the other clients is scaled down.  Sun et al., "Can You Really Backdoor Federated
  Learning?", 2019 (norm clipping; here against the median).  https://arxiv.org/abs/1911.07963
This bounds what one client can do; it does not detect weights that are wrong but of ordinary size.

Traps:
- BatchNorm's statistics are averaged too.  The variance over all images is not the mean of the clients' variances:
  clients that see other classes have other means.  So it is pooled: the mean of ``v_i + (m_i - m)^2``.
- Whole numbers (BatchNorm's batch counts) are not averaged; the largest is kept.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.config.recipe import Recipe
from potstill.contrib.federated import Algorithm
from potstill.contrib.federated.client import Client, PublicDataset
from potstill.contrib.federated.messages import (
    NOT_FINITE,
    TEACHER_PREFIX,
    Arrays,
    ArraySpecs,
    Message,
    array_specs,
    arrays_to_state_dict,
    encode_texts,
    find_reply_problem,
    state_dict_to_arrays,
)
from potstill.data.loader import Loader
from potstill.errors import DataError, NonFiniteError, PotstillError, UsageError, WorkerError
from potstill.evaluation.predictions import predict_probabilities
from potstill.formatting import format_many
from potstill.models.model_file import Classifier
from potstill.training.callbacks import Observer
from potstill.training.checkpointing import load_checkpoint, save_checkpoint
from potstill.training.devices import Compute

_RUNNING_MEAN, _RUNNING_VARIANCE = "running_mean", "running_var"
_LOGITS = "logits"  # of the public images, averaged like weights
MAX_UPDATE_RATIO = 10.0  # norm of a client's update, in units of the clients' median


def average_states(states: Sequence[Arrays], images: Sequence[float]) -> Arrays:
    """Return the average of several clients' arrays, computed in float64, in each array's own dtype.

    Floats are weighted by ``images`` (pooled for running variances); of whole numbers it is the largest.

    Example:
        >>> one, two = ({"w": np.array([value], np.float32)} for value in (1.0, 5.0))
        >>> average_states([one, two], [3, 1])["w"].tolist()
        [2.0]
    """
    if not states or sum(images) <= 0:
        raise DataError("there is nothing to average: no client has sent weights that come from images")
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
            values = values + (means - np.tensordot(shares, means, axes=1)) ** 2
        found[name] = np.asarray(np.tensordot(shares, values, axes=1)).astype(first.dtype)
    return found


def limit_counts(images: Sequence[float], max_share: float) -> list[float]:
    """Return the weights of clients in an average: their images, the largest reduced to ``max_share`` of the sum.

    ``max_share`` is from 0.5 to 1; a single client keeps its weight.

    Example:
        >>> limit_counts([10, 20, 1_000_000], 0.5), limit_counts([10, 20, 25], 0.5)
        ([10.0, 20.0, 30.0], [10.0, 20.0, 25.0])
    """
    largest = int(np.argmax(images))
    rest = float(sum(images)) - images[largest]
    limited = [float(each) for each in images]
    if rest > 0 and max_share < 1:
        limited[largest] = min(limited[largest], rest * max_share / (1 - max_share))
    return limited


def limit_updates(states: Sequence[Arrays], reference: Arrays) -> tuple[list[Arrays], list[int]]:
    """Scale down updates whose norm is above ``MAX_UPDATE_RATIO`` times the median (of an even number: the lower one).

    ``reference``: what updates are measured from.  Return the states, those within the limit unchanged, and the
    positions of the others.  Norms of weights and of BatchNorm's statistics are compared each by themselves.
    """
    limited, positions = [dict(state) for state in states], set()
    names = [name for name, each in reference.items() if each.dtype.kind == "f"]
    statistics = [name for name in names if name.endswith((_RUNNING_MEAN, _RUNNING_VARIANCE))]
    for group in (statistics, [name for name in names if name not in statistics]):
        norms = np.zeros(len(states))
        for name in group:
            start = reference[name].astype(np.float64)
            norms += [float(np.square(state[name] - start).sum()) for state in states]
        norms = np.sqrt(norms)
        limit = MAX_UPDATE_RATIO * float(np.sort(norms)[(len(norms) - 1) // 2])
        for at in np.flatnonzero(norms > limit).tolist():
            positions.add(at)
            for name in group:
                start = reference[name].astype(np.float64)
                value = start + (states[at][name] - start) * (limit / norms[at])
                limited[at][name] = np.asarray(value).astype(reference[name].dtype)
    return limited, sorted(positions)


@dataclass
class Replies:
    """The replies of the clients to a request, and their failures."""

    replies: dict[int, Message] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)  # client -> kind of failure
    bytes_down: int = 0  # from the server to clients
    bytes_up: int = 0


class Clients(Protocol):
    """The clients of a federation, by number."""

    def connected(self) -> Sequence[int]:
        """Return the numbers of the clients that are connected now."""

    def send_and_receive(self, requests: Mapping[int, Message]) -> Replies:
        """Send each client its request and wait for the replies; a client that fails has none."""


class InProcessClients:
    """All clients one after the other in this process."""

    def __init__(self, clients: Mapping[int, Client]) -> None:
        self.clients = dict(clients)
        self.memories: dict[int, Arrays] = {number: {} for number in clients}

    def connected(self) -> Sequence[int]:
        """Return all numbers."""
        return sorted(self.clients)

    def send_and_receive(self, requests: Mapping[int, Message]) -> Replies:
        """See ``Clients``."""
        result = Replies()
        errors: list[PotstillError] = []
        for number, request in requests.items():
            result.bytes_down += request.size
            try:
                reply = self.clients[number].reply(request, self.memories[number])
                result.bytes_up += reply.size
                result.replies[number] = reply
            except PotstillError as error:
                errors.append(type(error)(f"client {number}: {error}"))
                if request.task == "describe":
                    raise errors[-1] from error
                result.failed[number] = type(error).__name__
            except Exception as error:  # any error of a client: the round continues without it
                result.failed[number] = type(error).__name__
        if errors and len(errors) == len(requests):
            raise errors[0]
        return result


RoundRecord = dict[str, Any]


@dataclass(frozen=True)
class Schedule:
    """Number and length of the rounds, and the replies that they need."""

    rounds: int = 5
    local_epochs: int = 1
    public_epochs: int = 5
    temperature: float = 1.0  # of the averaged logits; 1 in FedDF
    min_replies: int = 1  # valid replies without which a round is an error
    max_share: float = 0.5  # of one client in an average, from 0.5 to 1


@dataclass
class ServerState:
    """All that the server needs to resume after any round."""

    records: list[RoundRecord] = field(default_factory=list)
    best: int = 0  # the round, from 1, whose student is the best on val
    state: Arrays = field(default_factory=dict)  # the student's
    best_state: Arrays = field(default_factory=dict)


class Server:
    """Holds the student, trained in place, and the teacher of algorithms that have one; ``val`` selects a round."""

    def __init__(
        self,
        algorithm: Algorithm,
        student: Classifier,
        recipe: Recipe,
        schedule: Schedule,
        clients: Clients,
        val: Loader,
        compute: Compute,
        *,
        public: PublicDataset | None = None,
        teacher: Classifier | None = None,
        declared: Mapping[int, int] | None = None,
    ) -> None:
        self.algorithm, self.student, self.schedule, self.clients = algorithm, student, schedule, clients
        self.recipe, self.val, self.compute, self.public = recipe, val, compute, public
        self.teacher = teacher if algorithm.guided else None
        self.declared = dict(declared or {})
        if algorithm.distils and public is None:
            raise UsageError("feddf needs public images: data.unlabeled, or --public SHARE of the training images")
        if algorithm.guided and teacher is None:
            raise UsageError("the algorithm guided needs a trained teacher: --teacher RUN")
        if schedule.min_replies < 1:
            raise UsageError(f"at least 1 reply is needed in a round, got min-replies {schedule.min_replies}")
        if not 0.5 <= schedule.max_share <= 1:
            raise UsageError(f"--max-share of one client in an average is from 0.5 to 1, got {schedule.max_share:g}")
        epochs = schedule.rounds * schedule.local_epochs
        self.texts = encode_texts(recipe, student, self.teacher, epochs)
        self.numbers: dict[str, float] = {"epochs": schedule.local_epochs}

    def describe_clients(self) -> tuple[dict[int, int], dict[int, str]]:
        """Request the clients' numbers of images; return these, and the errors of clients that cannot take part."""
        result = self._send("describe", {}, 0)
        self._drop_invalid(result, {}, need_loss=False)
        self._check_enough(result, "the first request")
        return {number: self.declared[number] for number in result.replies}, result.failed

    def train(
        self, observer: Observer, progress: ServerState | None = None, save: Callable[[ServerState], None] | None = None
    ) -> ServerState:
        """Train all rounds; the student ends with the weights of the best round on val."""
        progress = progress or ServerState()
        if progress.state:
            self.student.module.load_state_dict(arrays_to_state_dict(progress.state))
        teacher = self._send_teacher() if len(progress.records) < self.schedule.rounds else Replies()
        warned: set[int] = set()
        for number in range(len(progress.records) + 1, self.schedule.rounds + 1):
            started = time.monotonic()
            result, limited = self._round(number, progress)
            result.bytes_down, teacher.bytes_down = result.bytes_down + teacher.bytes_down, 0
            result.bytes_up, teacher.bytes_up = result.bytes_up + teacher.bytes_up, 0
            progress.state = state_dict_to_arrays(self.student.module.state_dict())
            val = self.evaluate(self.val)
            if not progress.best or val["top1"] > progress.records[progress.best - 1]["val"]["top1"]:
                progress.best, progress.best_state = number, progress.state
            progress.records.append(_round_record(number, val, result, limited, time.monotonic() - started))
            observer.note(_format_record(progress.records[-1], self.schedule.rounds))
            for client in set(limited) - warned:
                observer.warn(
                    f"client {client} sent an update more than {MAX_UPDATE_RATIO:g} times as large as the median "
                    f"client's in round {number}; it was scaled down"
                )
            warned |= set(limited)
            if save is not None:
                save(progress)
        self.student.module.load_state_dict(arrays_to_state_dict(progress.best_state))
        return progress

    def evaluate(self, loader: Loader) -> dict[str, float]:
        """Return top-1 (a share) and negative log-likelihood (nats) of the student."""
        found = predict_probabilities(
            self.student.module.to(self.compute.device),
            loader,
            classes=len(self.student.class_names),
        )
        assert found is not None  # of a single process
        probabilities, labels, _ = found
        probabilities = np.nan_to_num(probabilities)  # finite weights may still give outputs that are not
        label_probabilities = probabilities[np.arange(len(labels)), labels]
        return {
            "top1": float((probabilities.argmax(axis=1) == labels).mean()),
            "nll": float(-np.log(np.maximum(label_probabilities, 1e-12)).mean()),
        }

    # one round

    def _round(self, number: int, progress: ServerState) -> tuple[Replies, list[int]]:
        """Return the valid replies, and the clients whose update was scaled down."""
        when, start = f"round {number}", state_dict_to_arrays(self.student.module.state_dict())
        result = self._send("weights", start, (number - 1) * self.schedule.local_epochs)
        self._drop_invalid(result, array_specs(start), start)
        self._check_enough(result, when)
        senders = sorted(result.replies)
        states, limited = limit_updates([result.replies[each].arrays for each in senders], start)
        received, logits = dict(zip(senders, states, strict=True)), dict[int, Arrays]()
        if self.algorithm.distils:
            logits = {each: {_LOGITS: self._public_logits(state)} for each, state in received.items()}
            for each, arrays in logits.items():
                if not np.isfinite(arrays[_LOGITS]).all():
                    result.failed[each] = NOT_FINITE
                    del result.replies[each], received[each]
            self._check_enough(result, when)
        images = limit_counts([result.replies[each].numbers["images"] for each in received], self.schedule.max_share)
        average = average_states(list(received.values()), images)
        self.student.module.load_state_dict(arrays_to_state_dict(average))
        if self.algorithm.distils and self.public is not None:
            self.public.train_student(
                self.student,
                average_states([logits[each] for each in received], images)[_LOGITS],
                temperature=self.schedule.temperature,
                epochs=self.schedule.public_epochs,
                first=(number - 1) * self.schedule.public_epochs,
            )
        return result, [senders[at] for at in limited]

    def _drop_invalid(
        self, result: Replies, specs: ArraySpecs, start: Arrays | None = None, *, need_loss: bool = True
    ) -> None:
        """Move replies that are not valid from ``replies`` to ``failed``."""
        for number in list(result.replies):
            try:
                problem = self._find_problem(number, result.replies[number], specs, start or {}, need_loss)
            except Exception as error:  # a reply of unexpected structure
                problem = type(error).__name__
            if problem is not None:
                del result.replies[number]
                result.failed[number] = problem

    def _find_problem(
        self, number: int, reply: Message, specs: ArraySpecs, start: Arrays, need_loss: bool
    ) -> str | None:
        if problem := find_reply_problem(reply, specs, need_loss=need_loss):
            return problem
        images = int(reply.numbers["images"])
        if images > self.declared.setdefault(number, images):
            return "more images than declared"
        steps = self.schedule.local_epochs * images  # at least one image each
        counts = [name for name, each in reply.arrays.items() if each.dtype.kind != "f"]
        return "wrong counts" if any((reply.arrays[name] > start[name] + steps).any() for name in counts) else None

    def _public_logits(self, state: Arrays) -> NDArray[np.float32]:
        """Return the logits ``[P, K]`` of a client's network, which is loaded into the student's module."""
        assert self.public is not None
        self.student.module.load_state_dict(arrays_to_state_dict(state))
        return self.public.predict_logits(self.student)

    def _send_teacher(self) -> Replies:
        if self.teacher is None:
            return Replies()
        return self._send("teacher", state_dict_to_arrays(self.teacher.module.state_dict(), TEACHER_PREFIX), 0)

    def _send(self, task: str, arrays: Arrays, first: int) -> Replies:
        numbers = {each: self.numbers | {"client": each, "first": first} for each in self.clients.connected()}
        requests = {each: Message(task, arrays, own, self.texts) for each, own in numbers.items()}
        return self.clients.send_and_receive(requests)

    def _check_enough(self, result: Replies, when: str) -> None:
        if len(result.replies) >= self.schedule.min_replies:
            return
        if result.failed and set(result.failed.values()) == {NOT_FINITE}:
            raise NonFiniteError(
                f"{when}: loss or weights of {format_many(len(result.failed), 'client')} became NaN or infinite, and "
                "no other replied; lower training.lr, or set training.max_grad_norm"
            )
        kinds = (
            ", ".join(f"client {number}: {reason}" for number, reason in result.failed.items()) or "none is connected"
        )
        raise WorkerError(
            f"{when}: {len(result.replies)} valid replies, at least {self.schedule.min_replies} needed ({kinds})"
        )


def _round_record(
    number: int, val: dict[str, float], result: Replies, limited: list[int], seconds: float
) -> RoundRecord:
    images = {each: reply.numbers["images"] for each, reply in result.replies.items()}
    loss = sum(reply.numbers["loss"] * images[each] for each, reply in result.replies.items()) / sum(images.values())
    return {
        "round": number,
        "seconds": round(seconds, 3),
        "val": val,
        "local_loss": loss,
        "clients": sorted(result.replies),
        "failed": {str(each): reason for each, reason in sorted(result.failed.items())},
        "limited": limited,
        "bytes_down": result.bytes_down,
        "bytes_up": result.bytes_up,
    }


def _format_record(record: RoundRecord, rounds: int) -> str:
    failed = f", {len(record['failed'])} failed" if record["failed"] else ""
    clients = format_many(len(record["clients"]), "client")
    return (
        f"round {record['round']}/{rounds}: val top-1 {record['val']['top1']:.1%}, {clients}{failed}, "
        f"{record['bytes_down'] / 1e6:.2f} MB down, {record['bytes_up'] / 1e6:.2f} MB up"
    )


_ARRAY_FIELDS = ("state", "best_state")


class RoundCheckpoint:
    """A checkpoint of the server's progress, without the teacher, which is sent again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, progress: ServerState) -> None:
        """Replace the checkpoint of the round before."""
        arrays = {f"{part}|{key}": each for part in _ARRAY_FIELDS for key, each in getattr(progress, part).items()}
        tensors = {key: torch.from_numpy(each) for key, each in arrays.items()}
        save_checkpoint(self.path, tensors, {"records": progress.records, "best": progress.best})

    def read(self) -> ServerState | None:
        """Return the progress; None without a checkpoint."""
        if not self.path.exists():
            return None
        tensors, facts = load_checkpoint(self.path)
        progress = ServerState(list(facts["records"]), int(facts["best"]))
        for name, tensor in tensors.items():
            part, _, key = name.partition("|")
            getattr(progress, part)[key] = tensor.numpy()
        return progress

    def remove(self) -> None:
        """Delete the checkpoint, after the model was written."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
