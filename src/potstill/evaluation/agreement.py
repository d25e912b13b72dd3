"""How closely the student follows the teacher, right or wrong."""

import numpy as np

from potstill.errors import UsageError
from potstill.evaluation.averages import Array


def agreement(student: Array, teacher: Array) -> dict[str, float | None]:
    """Fidelity of a student's probabilities [N, K] to its teacher's, of the same images.

    Returns:
        ``agreement``: share of images with the same top class; ``kl_to_teacher``: mean KL divergence of the teacher's
        distribution from the student's, in nats, at T = 1.  None where there is no image.

    Raises:
        UsageError: different shapes.

    Example:
        >>> agreement(np.array([[0.5, 0.5], [0.1, 0.9]]), np.array([[1.0, 0.0], [0.9, 0.1]]))["agreement"]
        0.5
    """
    if student.shape != teacher.shape or student.ndim != 2:
        raise UsageError(f"student and teacher must have the same [N, K], got {student.shape} and {teacher.shape}")
    if not len(student):
        return {"agreement": None, "kl_to_teacher": None}
    # What float32 rounded to 0 counts as its smallest number: the divergence stays finite.
    smallest = float(np.finfo(np.float32).tiny)
    p, q = teacher.astype(np.float64), np.maximum(student.astype(np.float64), smallest)
    terms = p * (np.log(np.maximum(p, smallest)) - np.log(q))
    return {
        "agreement": float((student.argmax(axis=1) == teacher.argmax(axis=1)).mean()),
        "kl_to_teacher": float(terms.sum(axis=1).mean()),
    }
