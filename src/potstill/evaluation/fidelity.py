"""Fidelity of a student to its teacher: agreement and KL divergence of predictions, linear CKA of stages.

CKA: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019 (arXiv:1905.00414); over
batches with the unbiased estimator of HSIC: Nguyen et al., Do Wide and Deep Networks Learn the Same Things?, ICLR 2021
(arXiv:2010.15327), section 3.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.evaluation import Array
from potstill.evaluation.predictions import Probabilities, as_probabilities, evaluation_mode, iterate_blocks
from potstill.features.hooks import FeatureRequest, capture_features
from potstill.features.stages import Stage, find_stages


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


MAX_MAP_VALUES = 2**20  # per image; larger stages are left out: 64 images would take 256 MB
MIN_BATCH_SIZE = 4  # for the unbiased estimator

_StageKey = tuple[str, int]  # name of a network, index of its stage
_HsicSums = dict[tuple[_StageKey, _StageKey], float]


def hsic(first: Tensor, second: Tensor) -> Tensor:
    r"""Return HSIC_1, the unbiased estimator of Song et al. (JMLR 2012), of two Gram matrices.

    .. math:: \frac{1}{n(n-3)} \left( tr(K L) + \frac{1'K1 \; 1'L1}{(n-1)(n-2)} - \frac{2}{n-2} 1'K L 1 \right)

    with the diagonals of K and L set to 0.

    Each is [n, n], inner products of the same n >= 4 images.
    """
    n = len(first)
    if n < MIN_BATCH_SIZE or first.shape != (n, n) or second.shape != (n, n):
        raise UsageError(
            f"hsic takes two [n, n] with n of {MIN_BATCH_SIZE} or more, got {first.shape} and {second.shape}"
        )
    k, m = (each - torch.diag(each.diagonal()) for each in (first.double(), second.double()))
    rows, columns = k.sum(dim=0), m.sum(dim=0)
    total = (k * m).sum() + rows.sum() * columns.sum() / ((n - 1) * (n - 2)) - 2 * (rows @ columns) / (n - 2)
    return total / (n * (n - 3))


@dataclass(frozen=True)
class StageSimilarity:
    """Linear CKA between the stages of a network and those of others."""

    layers: dict[str, tuple[str, ...]]  # paths of the stages of each network, shallow to deep
    values: dict[str, list[list[float | None]]]  # by other network: [first's stages][its own]; None: one is constant
    left_out: dict[str, tuple[str, ...]]  # stages of each network whose maps are too large
    images: int  # that were compared


def stage_similarity(
    networks: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Tensor]], *, max_values: int = MAX_MAP_VALUES
) -> StageSimilarity:
    """Compare the outputs of the stages of the first network with those of each other network.

    HSIC is averaged over batches, so memory does not grow with the number of images.  Batches should be of about the
    same size, each drawn from all classes; those of fewer than 4 images are skipped.  Stages of more than
    ``max_values`` values per image are left out.
    """
    chosen: dict[str, tuple[Stage, ...]] = {}
    left_out: dict[str, tuple[str, ...]] = {}
    sums: _HsicSums = {}
    first, count = next(iter(networks)), 0
    for batch in batches:
        if len(batch[first]) < MIN_BATCH_SIZE:
            continue
        grams: dict[str, list[Tensor]] = {}
        for name, module in networks.items():
            if name not in chosen:
                found = find_stages(module, batch[name]).stages
                chosen[name] = tuple(each for each in found if each.channels * each.height * each.width <= max_values)
                left_out[name] = tuple(each.path for each in found if each not in chosen[name])
            with evaluation_mode(module), capture_features(module, FeatureRequest(chosen[name])) as reading:
                module(batch[name])
            grams[name] = [_gram_matrix(each) for each in reading.maps]
        count += len(batch[first])
        _add_hsic(sums, first, grams)
    if not count:
        raise UsageError(f"CKA needs batches of {MIN_BATCH_SIZE} images or more")
    return StageSimilarity(
        layers={name: tuple(stage.path for stage in found) for name, found in chosen.items()},
        values={name: _cka_matrix(sums, first, name, chosen) for name in networks if name != first},
        left_out={name: paths for name, paths in left_out.items() if paths},
        images=count,
    )


def _add_hsic(sums: _HsicSums, first: str, grams: dict[str, list[Tensor]]) -> None:
    """Add the HSIC of each stage with itself, and of each stage of the first network with each of the others."""
    stages = {(name, i): gram for name, matrices in grams.items() for i, gram in enumerate(matrices)}
    for a in stages:
        for b in stages:
            if a == b or (a[0] == first and b[0] != first):
                sums[a, b] = sums.get((a, b), 0.0) + float(hsic(stages[a], stages[b]))


def _cka_matrix(
    sums: _HsicSums, first: str, name: str, chosen: Mapping[str, Sequence[Stage]]
) -> list[list[float | None]]:
    rows, columns = ([(each, i) for i in range(len(chosen[each]))] for each in (first, name))
    return [[_normalized_hsic(sums[a, b], sums[a, a], sums[b, b]) for b in columns] for a in rows]


def _gram_matrix(features: Tensor) -> Tensor:
    """Return inner products [n, n] of features [n, ...], centred so that large means do not cost precision."""
    flat = features.detach().flatten(1).float()
    flat = flat - flat.mean(dim=0)
    return (flat @ flat.T).cpu().double()


def _normalized_hsic(both: float, first: float, second: float) -> float | None:
    # HSIC of a representation that does not vary with itself is 0, or noise around it.
    if not first > 0 or not second > 0:
        return None
    value = both / math.sqrt(first * second)
    return value if math.isfinite(value) else None
