"""How closely the student follows the teacher, right or wrong; and whether a model has the classes in another order."""

import numpy as np

from potstill.errors import UsageError
from potstill.evaluation.averages import Array
from potstill.evaluation.predictions import Rows, as_rows, blocks_of


def agreement(student: Rows | Array, teacher: Rows | Array) -> dict[str, float | None]:
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
    student, teacher = as_rows(student), as_rows(teacher)
    if student.shape != teacher.shape or len(student.shape) != 2:
        raise UsageError(f"student and teacher must have the same [N, K], got {student.shape} and {teacher.shape}")
    if not student.shape[0]:
        return {"agreement": None, "kl_to_teacher": None}
    # What float32 rounded to 0 counts as its smallest number: the divergence stays finite.
    smallest = float(np.finfo(np.float32).tiny)
    same, divergence = 0, 0.0
    for _, (q, p) in blocks_of(student, teacher):
        same += int((q.argmax(axis=1) == p.argmax(axis=1)).sum())
        p, q = p.astype(np.float64), np.maximum(q.astype(np.float64), smallest)
        divergence += float((p * (np.log(np.maximum(p, smallest)) - np.log(q))).sum())
    return {"agreement": same / student.shape[0], "kl_to_teacher": divergence / student.shape[0]}


def class_order(predicted: Array, labels: Array, classes: int) -> Array | None:
    """Return the order of the classes that a model's outputs seem to have, where it is another one than the labels'.

    Outputs and classes are assigned one to one so that most images are right (Kuhn, "The Hungarian method for the
    assignment problem", 1955, by scipy).  Only an order that leaves less than half of the errors counts: among K!
    orders there is always one that is a little better by chance.

    Args:
        predicted: indices [N] of the outputs.
        labels: indices [N] of the classes.
        classes: K.

    Returns:
        Indices [K]: the class of each output; None where the outputs are in order, or where no order explains them.

    Example:
        >>> labels = np.repeat([0, 1, 2], 10)
        >>> class_order(np.repeat([2, 0, 1], 10), labels, 3)
        array([1, 2, 0])
    """
    from scipy.optimize import linear_sum_assignment

    matrix = np.bincount(predicted * classes + labels, minlength=classes * classes).reshape(classes, classes)
    outputs, order = linear_sum_assignment(matrix, maximize=True)
    errors, left = len(labels) - int(np.trace(matrix)), len(labels) - int(matrix[outputs, order].sum())
    return np.asarray(order) if errors - left >= 5 and 2 * left < errors else None
