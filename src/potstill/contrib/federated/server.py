"""The server: sends messages to clients, merges their replies into one student, evaluates it on val, round by round.

Messages reach clients within this process here, and through Flower in ``flower_clients``.  A reply that cannot be used
is dropped, as if its client had died.  The state after each round is a checkpoint, from which a killed run resumes.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from potstill.config.recipe import Recipe
from potstill.contrib.federated.algorithms import Algorithm, average_logits, average_states
from potstill.contrib.federated.client import Client, PublicDataset, reply_logits
from potstill.contrib.federated.messages import (
    LOGITS,
    STATE_PREFIX,
    TEACHER_PREFIX,
    Arrays,
    Message,
    arrays_to_state_dict,
    encode_texts,
    pack,
    state_dict_to_arrays,
    unpack,
)
from potstill.data.loader import Loader
from potstill.errors import NonFiniteError, PotstillError, UsageError, WorkerError
from potstill.evaluation.predictions import predict_probabilities
from potstill.models.model_file import Classifier
from potstill.training.callbacks import Observer
from potstill.training.checkpointing import load_checkpoint, save_checkpoint
from potstill.training.devices import Compute


@dataclass
class RoundReplies:
    """What came back from the clients that were asked."""

    replies: dict[int, Message] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)  # client -> what kind of failure
    down: int = 0  # bytes from the server to clients
    up: int = 0  # bytes back


class Clients(Protocol):
    """Everybody who takes part."""

    def present(self) -> Sequence[int]:
        """Numbers of the clients that can be asked now."""

    def ask(self, messages: Mapping[int, Message]) -> RoundReplies:
        """Send each client its message, and wait; a client that fails is left out of the replies."""


class InProcessClients:
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

    def ask(self, messages: Mapping[int, Message]) -> RoundReplies:
        """See ``Clients``; what a person here can mend is raised: from the greeting, and where nobody can answer."""
        answers = RoundReplies()
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


def wait_for_clients(clients: Clients, count: int, seconds: float) -> None:
    """Return once so many clients are connected.

    Raises:
        WorkerError: they are not after so many seconds.
    """
    until = time.monotonic() + seconds
    while len(clients.present()) < count:
        if time.monotonic() > until:
            raise WorkerError(f"{len(clients.present())} of {count} clients are connected after {seconds:g} s")
        time.sleep(0.2)


NOT_FINITE = "NonFiniteError"  # the kind that a client itself reports when its loss is NaN
_WRONG_ARRAYS, _WRONG_COUNTS = "other arrays", "wrong counts"


def drop_invalid_replies(answers: RoundReplies, student: Arrays, logits: tuple[int, int] | None) -> None:
    """Move replies that would spoil the average from ``replies`` to ``failed``; in place.

    Args:
        answers: to a round's messages.
        student: its weights, as the server holds them: names, shapes and types that weights must have.
        logits: [P, K] that are wanted in place of weights; None: weights are.
    """
    if logits is None:
        wanted = {f"{STATE_PREFIX}{name}": (each.shape, each.dtype) for name, each in student.items()}
    else:
        wanted = {LOGITS: (logits, np.dtype(np.float32))}
    for number in list(answers.replies):
        if problem := _find_problem(answers.replies[number], wanted):
            del answers.replies[number]
            answers.failed[number] = problem


def _find_problem(reply: Message, wanted: dict[str, tuple[tuple[int, ...], "np.dtype[np.generic]"]]) -> str | None:
    if {name: (each.shape, each.dtype) for name, each in reply.arrays.items()} != wanted:
        return _WRONG_ARRAYS
    if not reply.numbers.get("images", 0) >= 1 or "loss" not in reply.numbers:
        return _WRONG_COUNTS
    floats = [each for each in reply.arrays.values() if each.dtype.kind == "f"]
    finite = np.isfinite([*reply.numbers.values()]).all() and all(np.isfinite(each).all() for each in floats)
    return None if finite else NOT_FINITE


RoundRecord = dict[str, Any]


@dataclass(frozen=True)
class Schedule:
    """How long, and how the public images are learned from."""

    rounds: int = 5
    local_epochs: int = 1
    public_epochs: int = 5
    temperature: float = 1.0  # FedDF's
    fewest: int = 1  # clients that must answer a round


@dataclass
class ServerState:
    """What a federated training has come to: with it, it can go on after any round."""

    records: list[RoundRecord] = field(default_factory=list)
    best: int = 0  # round whose student is the best on val; from 1
    state: Arrays = field(default_factory=dict)  # of the server's student
    best_state: Arrays = field(default_factory=dict)
    said: Arrays = field(default_factory=dict)  # logits that all clients hear in the next round


class Server:
    """Holds the student, and the teacher where there is one.

    Args:
        algorithm: what is done in a round.
        student: where it begins; trained in place.
        recipe: with ``data.augment`` filled in.
        schedule: of the rounds.
        clients: are asked.
        val: picks the best round.
        compute: of the server.
        public: images without labels, where the algorithm wants them.
        teacher: where it wants one.
    """

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
    ) -> None:
        self.algorithm, self.student, self.schedule, self.clients = algorithm, student, schedule, clients
        self.recipe, self.val, self.compute, self.public = recipe, val, compute, public
        self.teacher = teacher if algorithm.guide == "teacher" else None
        if algorithm.public and public is None:
            raise UsageError(
                "this algorithm needs public images: data.unlabeled, or --public SHARE of the training images"
            )
        if algorithm.guide == "teacher" and teacher is None:
            raise UsageError("this algorithm needs a trained teacher: --teacher RUN")
        epochs = schedule.rounds * schedule.local_epochs
        self.texts = encode_texts(recipe, student, self.teacher, epochs) | {"guide": algorithm.guide}
        self.numbers: dict[str, float] = {
            "epochs": schedule.local_epochs,
            "public_epochs": schedule.public_epochs,
            "temperature": schedule.temperature,
        }

    def handshake(self) -> tuple[dict[int, int], dict[int, str]]:
        """How many images each client has, and who cannot take part; the first thing that is asked.

        Raises:
            PotstillError: a client that cannot take part, where it is in this process.
            WorkerError: too few clients are there; public images are not the same everywhere.
        """
        answers = self._ask("hello", {}, 0)
        self._check_replies(answers, "the greeting")
        if self.algorithm.sends == "logits" and self.public is not None:
            for number, reply in answers.replies.items():
                if reply.numbers.get("public") != len(self.public):
                    has = f"{reply.numbers.get('public', 0):g}"
                    raise WorkerError(f"client {number} has {has} public images and the server {len(self.public)}")
        return {number: int(reply.numbers["images"]) for number, reply in answers.replies.items()}, answers.failed

    def carry_out(
        self, observer: Observer, progress: ServerState | None = None, keep: Callable[[ServerState], None] | None = None
    ) -> ServerState:
        """All rounds; leaves the student with the weights of the round that was best on val.

        Args:
            observer: is told what happens.
            progress: of an earlier process, to go on from.
            keep: receives the progress after each round.

        Raises:
            WorkerError: fewer clients than ``schedule.fewest`` sent something that can be used.
            NonFiniteError: none did, since all their numbers became NaN or infinite.
        """
        progress = progress or ServerState()
        if progress.state:
            self.student.module.load_state_dict(arrays_to_state_dict(progress.state))
        taught = self._send_teacher() if len(progress.records) < self.schedule.rounds else RoundReplies()
        for number in range(len(progress.records) + 1, self.schedule.rounds + 1):
            started = time.monotonic()
            answers = self._round(number, progress)
            answers.down, taught.down = answers.down + taught.down, 0
            answers.up, taught.up = answers.up + taught.up, 0
            progress.state = state_dict_to_arrays(self.student.module.state_dict())
            val = self.evaluate(self.val)
            if not progress.best or val["top1"] > progress.records[progress.best - 1]["val"]["top1"]:
                progress.best, progress.best_state = number, progress.state
            progress.records.append(_round_record(number, val, answers, time.monotonic() - started))
            observer.note(_format_record(progress.records[-1], self.schedule.rounds))
            if keep is not None:
                keep(progress)
        self.student.module.load_state_dict(arrays_to_state_dict(progress.best_state))
        return progress

    def evaluate(self, loader: Loader) -> dict[str, float]:
        """Top-1 (a share) and negative log-likelihood (nats) of the student."""
        probabilities, labels, _ = predict_probabilities(
            self.student.module.to(self.compute.device),
            loader,
            classes=len(self.student.class_names),
        )
        right = probabilities[np.arange(len(labels)), labels]
        return {
            "top1": float((probabilities.argmax(axis=1) == labels).mean()),
            "nll": float(-np.log(np.maximum(right, 1e-12)).mean()),
        }

    # one round

    def _round(self, number: int, progress: ServerState) -> RoundReplies:
        weights = self.algorithm.sends == "weights"
        arrays = state_dict_to_arrays(self.student.module.state_dict()) if weights or number == 1 else progress.said
        first = (number - 1) * self.schedule.local_epochs
        answers = self._ask("train" if weights else "answer", arrays, first)
        drop_invalid_replies(
            answers, state_dict_to_arrays(self.student.module.state_dict(), ""), None if weights else self._said()
        )
        self._check_replies(answers, f"round {number}")
        replies = [answers.replies[each] for each in sorted(answers.replies)]
        images = [reply.numbers["images"] for reply in replies]
        if weights:
            states = [
                {key: value for key, value in reply.arrays.items() if key.startswith(STATE_PREFIX)} for reply in replies
            ]
            logits = [self._public_logits(state) for state in states] if self.algorithm.distils else []
            self.student.module.load_state_dict(arrays_to_state_dict(average_states(states, images)))
        else:
            logits = [reply_logits(reply) for reply in replies]
        if self.algorithm.distils and self.public is not None:
            said = average_logits(logits, images)
            self.public.train_student(
                self.student,
                said,
                temperature=self.schedule.temperature,
                epochs=self.schedule.public_epochs,
                first=(number - 1) * self.schedule.public_epochs,
            )
            progress.said = {LOGITS: said} if not weights else {}
        return answers

    def _said(self) -> tuple[int, int]:
        """The shape [P, K] of what each client says of the public images."""
        assert self.public is not None
        return len(self.public), len(self.student.class_names)

    def _public_logits(self, state: Arrays) -> Any:
        """What a client's network says of the public images; the student lends its body."""
        assert self.public is not None
        self.student.module.load_state_dict(arrays_to_state_dict(state))
        return self.public.ask(self.student)

    def _send_teacher(self) -> RoundReplies:
        if self.teacher is None:
            return RoundReplies()
        return self._ask("teach", state_dict_to_arrays(self.teacher.module.state_dict(), TEACHER_PREFIX), 0)

    def _ask(self, task: str, arrays: Arrays, first: int) -> RoundReplies:
        told = {number: self.numbers | {"client": number, "first": first} for number in self.clients.present()}
        return self.clients.ask({each: Message(task, arrays, numbers, self.texts) for each, numbers in told.items()})

    def _check_replies(self, answers: RoundReplies, when: str) -> None:
        if len(answers.replies) >= self.schedule.fewest:
            return
        if answers.failed and set(answers.failed.values()) == {NOT_FINITE}:
            raise NonFiniteError(
                f"{when}: loss or weights of {len(answers.failed)} clients became NaN or infinite, no other answered; "
                "lower training.lr, or set training.max_grad_norm"
            )
        kinds = ", ".join(f"client {number}: {why}" for number, why in answers.failed.items()) or "none is connected"
        raise WorkerError(f"{when}: {len(answers.replies)} clients answered, {self.schedule.fewest} must ({kinds})")


def _round_record(number: int, val: dict[str, float], answers: RoundReplies, seconds: float) -> RoundRecord:
    images = {each: reply.numbers["images"] for each, reply in answers.replies.items()}
    loss = sum(reply.numbers["loss"] * images[each] for each, reply in answers.replies.items()) / sum(images.values())
    return {
        "round": number,
        "seconds": round(seconds, 3),
        "val": val,
        "local_loss": loss,
        "clients": sorted(answers.replies),
        "failed": {str(each): why for each, why in sorted(answers.failed.items())},
        "bytes_down": answers.down,
        "bytes_up": answers.up,
    }


def _format_record(record: RoundRecord, rounds: int) -> str:
    failed = f", {len(record['failed'])} failed" if record["failed"] else ""
    return (
        f"round {record['round']}/{rounds}: val top-1 {record['val']['top1']:.1%}, {len(record['clients'])} clients"
        f"{failed}, {record['bytes_down'] / 1e6:.2f} MB down, {record['bytes_up'] / 1e6:.2f} MB up"
    )


_ARRAY_FIELDS = ("state", "best_state", "said")


class RoundCheckpoint:
    """One checkpoint: the server's progress, and what each client remembers (the teacher is sent again).

    Args:
        path: of the file.
        memories: of the clients in this process, by number.
    """

    def __init__(self, path: Path, memories: dict[int, Arrays]) -> None:
        self.path, self.memories = path, memories

    def write(self, progress: ServerState) -> None:
        """Take the place of the state after the round before."""
        arrays: Arrays = {
            f"{part}|{key}": each for part in _ARRAY_FIELDS for key, each in getattr(progress, part).items()
        }
        for number, memory in self.memories.items():
            own = {key: each for key, each in memory.items() if not key.startswith(TEACHER_PREFIX)}
            arrays |= {f"client {number}|{key}": each for key, each in own.items()}
        tensors = {key: torch.from_numpy(each) for key, each in arrays.items()}
        save_checkpoint(self.path, tensors, {"records": progress.records, "best": progress.best})

    def read(self) -> ServerState | None:
        """The progress, with the clients' memories put back; None where nothing was kept.

        Raises:
            ArtifactError: the file is damaged.
        """
        for memory in self.memories.values():
            memory.clear()  # of another algorithm
        if not self.path.exists():
            return None
        tensors, facts = load_checkpoint(self.path)
        progress = ServerState(list(facts["records"]), int(facts["best"]))
        for name, tensor in tensors.items():
            part, _, key = name.partition("|")
            where = self.memories[int(part.split()[1])] if part not in _ARRAY_FIELDS else getattr(progress, part)
            where[key] = tensor.numpy()
        return progress

    def remove(self) -> None:
        """The model is written, so it is of no more use."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
