"""Fidelity of a student to its teacher: agreement and KL divergence of predictions, cosine of embeddings."""

import math

import numpy as np

from potstill.errors import UsageError
from potstill.evaluation import Array
from potstill.evaluation.predictions import Probabilities, as_probabilities, iterate_blocks


def agreement(student: Probabilities | Array, teacher: Probabilities | Array) -> dict[str, float | None]:
    """Compare a student's probabilities [N, K] with its teacher's for the same images.

    ``agreement``: share of images with the same top class; ``kl_to_teacher``: mean KL(teacher || student) in nats, at T
    = 1.  Both are None without images.

    Example:
        >>> agreement(np.array([[0.5, 0.5], [0.1, 0.9]]), np.array([[1.0, 0.0], [0.9, 0.1]]))["agreement"]
        0.5
    """
    student, teacher = as_probabilities(student), as_probabilities(teacher)
    if student.shape != teacher.shape or len(student.shape) != 2:
        raise UsageError(f"student and teacher must have the same [N, K], got {student.shape} and {teacher.shape}")
    if not student.shape[0]:
        return {"agreement": None, "kl_to_teacher": None}
    # A probability that float32 rounded to 0 counts as its smallest number, so the divergence stays finite.
    smallest = float(np.finfo(np.float32).tiny)
    same, divergence = 0, 0.0
    for _, (q, p) in iterate_blocks(student, teacher):
        same += int((q.argmax(axis=1) == p.argmax(axis=1)).sum())
        p, q = p.astype(np.float64), np.maximum(q.astype(np.float64), smallest)
        divergence += float((p * (np.log(np.maximum(p, smallest)) - np.log(q))).sum())
    return {"agreement": same / student.shape[0], "kl_to_teacher": divergence / student.shape[0]}


MAX_READ_OUT_IMAGES = 4_000  # that a linear map of embeddings is fitted on
_PENALTIES = tuple(10.0**exponent for exponent in range(-2, 6))


def cosine_agreement(fitted: tuple[Array, Array], held_out: tuple[Array, Array]) -> Array:
    """Return how well a student's embeddings determine its teacher's linearly: a cosine for each held-out image.

    A linear map (ridge regression, whose penalty is chosen by leave-one-out error) from the student's to the teacher's
    embeddings is ``fitted`` on other images, [N, D] and [N, E].  The cosine [M], -1 to 1, is that of its output and the
    teacher's embedding, both minus the teacher's mean on those images, which all may have largely in common.

    Example:
        >>> random = np.random.default_rng(0)
        >>> teacher = random.normal(size=(60, 3)) + 9.0
        >>> student = teacher @ random.normal(size=(3, 4))  # the same, in another basis
        >>> bool(cosine_agreement((student[:40], teacher[:40]), (student[40:], teacher[40:])).min() > 0.999)
        True
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (ours, theirs), (new, wanted) = (tuple(each.astype(np.float64) for each in pair) for pair in (fitted, held_out))
    center = theirs.mean(axis=0)
    read_out = make_pipeline(StandardScaler(), RidgeCV(alphas=_PENALTIES)).fit(ours, theirs - center)
    found, wanted = read_out.predict(new), wanted - center
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    return np.asarray((found * wanted).sum(axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny))


def class_order(predicted: Array, labels: Array, classes: int) -> Array | None:
    """Return the class order of a model's outputs if it seems to differ from that of the labels.

    Outputs and classes are matched for maximal accuracy (Kuhn, "The Hungarian method for the assignment problem", 1955,
    by scipy).  Among K! orders, some are better by chance.  An order counts if it has more images right than chance
    gives (the best one for shuffled labels), and leaves less than half of the errors; or if it has many more than that,
    and twice as many as the model: a weak model.  Return the class of each output, [K], or None.

    Example:
        >>> labels = np.repeat([0, 1, 2], 10)
        >>> class_order(np.repeat([2, 0, 1], 10), labels, 3)
        array([1, 2, 0])
    """
    right = int((predicted == labels).sum())
    order, most = _best_order(predicted, labels, classes)
    clearly = 2 * (len(labels) - most) < len(labels) - right
    if most - right < 5 or not (clearly or most >= 2 * right):
        return None
    by_chance = _best_order(predicted, np.random.default_rng(0).permutation(labels), classes)[1]
    deviation = math.sqrt(by_chance * (1 - by_chance / len(labels)))
    return order if most - by_chance > (2 * deviation if clearly else 5 + 3 * deviation) else None


def _best_order(predicted: Array, labels: Array, classes: int) -> tuple[Array, int]:
    """Return the order of classes, [K], in which most images are right, and their number."""
    from scipy.optimize import linear_sum_assignment

    matrix = np.bincount(predicted * classes + labels, minlength=classes * classes).reshape(classes, classes)
    outputs, order = linear_sum_assignment(matrix, maximize=True)
    return np.asarray(order), int(matrix[outputs, order].sum())
