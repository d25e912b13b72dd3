"""What a server believes of what it hears: a reply that cannot be used is left out, as if its client had died."""

import numpy as np

from potstill.federated.messages import LOGITS, STATE, Arrays, Message
from potstill.federated.transport import Answers

NOT_FINITE = "NonFiniteError"  # the kind that a client itself reports when its loss is NaN
_OTHER, _COUNTS = "other arrays", "wrong counts"


def leave_out_unusable(answers: Answers, student: Arrays, logits: tuple[int, int] | None) -> None:
    """Move replies that would spoil the average from ``replies`` to ``failed``; in place.

    Args:
        answers: to a round's messages.
        student: its weights, as the server holds them: names, shapes and types that weights must have.
        logits: [P, K] that are wanted in place of weights; None: weights are.
    """
    if logits is None:
        wanted = {f"{STATE}{name}": (each.shape, each.dtype) for name, each in student.items()}
    else:
        wanted = {LOGITS: (logits, np.dtype(np.float32))}
    for number in list(answers.replies):
        if problem := _problem(answers.replies[number], wanted):
            del answers.replies[number]
            answers.failed[number] = problem


def _problem(reply: Message, wanted: dict[str, tuple[tuple[int, ...], "np.dtype[np.generic]"]]) -> str | None:
    if {name: (each.shape, each.dtype) for name, each in reply.arrays.items()} != wanted:
        return _OTHER
    if not reply.numbers.get("images", 0) >= 1 or "loss" not in reply.numbers:
        return _COUNTS
    floats = [each for each in reply.arrays.values() if each.dtype.kind == "f"]
    finite = np.isfinite([*reply.numbers.values()]).all() and all(np.isfinite(each).all() for each in floats)
    return None if finite else NOT_FINITE
