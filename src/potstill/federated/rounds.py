"""The server's loop: ask the clients, make one student of what they say, look at val."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from potstill.data.loader import Loader
from potstill.errors import NonFiniteError, UsageError, WorkerError
from potstill.evaluation.evaluate import collect
from potstill.experiments.recipe import Recipe
from potstill.federated.algorithms import Algorithm
from potstill.federated.averaging import average_logits, average_states
from potstill.federated.client import known_logits
from potstill.federated.distilling import Public
from potstill.federated.messages import LOGITS, STATE, TEACHER, Arrays, Message, as_arrays, as_state
from potstill.federated.orders import texts_for
from potstill.federated.received import NOT_FINITE, leave_out_unusable
from potstill.federated.transport import Answers, Clients
from potstill.models.classifier import Classifier
from potstill.training.devices import Compute
from potstill.training.observer import Observer

Record = dict[str, Any]


@dataclass(frozen=True)
class Schedule:
    """How long, and how the public images are learned from."""

    rounds: int = 5
    local_epochs: int = 1
    public_epochs: int = 5
    temperature: float = 1.0  # FedDF's
    fewest: int = 1  # clients that must answer a round


@dataclass
class Progress:
    """What a federated training has come to: with it, it can go on after any round."""

    records: list[Record] = field(default_factory=list)
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
        public: Public | None = None,
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
        self.texts = texts_for(recipe, student, self.teacher, epochs) | {"guide": algorithm.guide}
        self.numbers: dict[str, float] = {
            "epochs": schedule.local_epochs,
            "public_epochs": schedule.public_epochs,
            "temperature": schedule.temperature,
        }

    def greet(self) -> tuple[dict[int, int], dict[int, str]]:
        """How many images each client has, and who cannot take part; the first thing that is asked.

        Raises:
            PotstillError: a client that cannot take part, where it is in this process.
            WorkerError: too few clients are there; public images are not the same everywhere.
        """
        answers = self._ask("hello", {}, 0)
        self._refuse_few(answers, "the greeting")
        if self.algorithm.sends == "logits" and self.public is not None:
            for number, reply in answers.replies.items():
                if reply.numbers.get("public") != len(self.public):
                    has = f"{reply.numbers.get('public', 0):g}"
                    raise WorkerError(f"client {number} has {has} public images and the server {len(self.public)}")
        return {number: int(reply.numbers["images"]) for number, reply in answers.replies.items()}, answers.failed

    def carry_out(
        self, observer: Observer, progress: Progress | None = None, keep: Callable[[Progress], None] | None = None
    ) -> Progress:
        """All rounds; leaves the student with the weights of the round that was best on val.

        Args:
            observer: is told what happens.
            progress: of an earlier process, to go on from.
            keep: receives the progress after each round.

        Raises:
            WorkerError: fewer clients than ``schedule.fewest`` sent something that can be used.
            NonFiniteError: none did, since all their numbers became NaN or infinite.
        """
        progress = progress or Progress()
        if progress.state:
            self.student.module.load_state_dict(as_state(progress.state))
        taught = self._teach() if len(progress.records) < self.schedule.rounds else Answers()
        for number in range(len(progress.records) + 1, self.schedule.rounds + 1):
            started = time.monotonic()
            answers = self._round(number, progress)
            answers.down, taught.down = answers.down + taught.down, 0
            answers.up, taught.up = answers.up + taught.up, 0
            progress.state = as_arrays(self.student.module.state_dict())
            val = self.evaluate(self.val)
            if not progress.best or val["top1"] > progress.records[progress.best - 1]["val"]["top1"]:
                progress.best, progress.best_state = number, progress.state
            progress.records.append(_record(number, val, answers, time.monotonic() - started))
            observer.note(_line(progress.records[-1], self.schedule.rounds))
            if keep is not None:
                keep(progress)
        self.student.module.load_state_dict(as_state(progress.best_state))
        return progress

    def evaluate(self, loader: Loader) -> dict[str, float]:
        """Top-1 (a share) and negative log-likelihood (nats) of the student."""
        probabilities, labels, _ = collect(
            self.student.module.to(self.compute.device),
            loader,
            classes=len(self.student.class_names),
            device=self.compute.device,
        )
        right = probabilities[np.arange(len(labels)), labels]
        return {
            "top1": float((probabilities.argmax(axis=1) == labels).mean()),
            "nll": float(-np.log(np.maximum(right, 1e-12)).mean()),
        }

    # one round

    def _round(self, number: int, progress: Progress) -> Answers:
        weights = self.algorithm.sends == "weights"
        arrays = as_arrays(self.student.module.state_dict()) if weights or number == 1 else progress.said
        first = (number - 1) * self.schedule.local_epochs
        answers = self._ask("train" if weights else "answer", arrays, first)
        leave_out_unusable(answers, as_arrays(self.student.module.state_dict(), ""), None if weights else self._said())
        self._refuse_few(answers, f"round {number}")
        replies = [answers.replies[each] for each in sorted(answers.replies)]
        images = [reply.numbers["images"] for reply in replies]
        if weights:
            states = [{key: value for key, value in reply.arrays.items() if key.startswith(STATE)} for reply in replies]
            logits = [self._asked(state) for state in states] if self.algorithm.distils else []
            self.student.module.load_state_dict(as_state(average_states(states, images)))
        else:
            logits = [known_logits(reply) for reply in replies]
        if self.algorithm.distils and self.public is not None:
            said = average_logits(logits, images)
            self.public.teach(
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

    def _asked(self, state: Arrays) -> Any:
        """What a client's network says of the public images; the student lends its body."""
        assert self.public is not None
        self.student.module.load_state_dict(as_state(state))
        return self.public.ask(self.student)

    def _teach(self) -> Answers:
        if self.teacher is None:
            return Answers()
        return self._ask("teach", as_arrays(self.teacher.module.state_dict(), TEACHER), 0)

    def _ask(self, task: str, arrays: Arrays, first: int) -> Answers:
        told = {number: self.numbers | {"client": number, "first": first} for number in self.clients.present()}
        return self.clients.ask({each: Message(task, arrays, numbers, self.texts) for each, numbers in told.items()})

    def _refuse_few(self, answers: Answers, when: str) -> None:
        if len(answers.replies) >= self.schedule.fewest:
            return
        if answers.failed and set(answers.failed.values()) == {NOT_FINITE}:
            raise NonFiniteError(
                f"{when}: loss or weights of {len(answers.failed)} clients became NaN or infinite, no other answered; "
                "lower training.lr, or set training.clip_norm"
            )
        kinds = ", ".join(f"client {number}: {why}" for number, why in answers.failed.items()) or "none is connected"
        raise WorkerError(f"{when}: {len(answers.replies)} clients answered, {self.schedule.fewest} must ({kinds})")


def _record(number: int, val: dict[str, float], answers: Answers, seconds: float) -> Record:
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


def _line(record: Record, rounds: int) -> str:
    failed = f", {len(record['failed'])} failed" if record["failed"] else ""
    return (
        f"round {record['round']}/{rounds}: val top-1 {record['val']['top1']:.1%}, {len(record['clients'])} clients"
        f"{failed}, {record['bytes_down'] / 1e6:.2f} MB down, {record['bytes_up'] / 1e6:.2f} MB up"
    )
