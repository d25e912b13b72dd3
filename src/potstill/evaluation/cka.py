"""How alike two networks see the same images: linear CKA between the ends of their stages.

Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019 (arXiv:1905.00414); over batches
with the unbiased estimator of HSIC: Nguyen et al., Do Wide and Deep Networks Learn the Same Things?, ICLR 2021
(arXiv:2010.15327), section 3.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.evaluation.evaluate import evaluating
from potstill.features.reading import Request, read
from potstill.features.stages import Stage, stages

LARGEST = 2**20  # values of one image's map; above, a stage is left out: 64 images would take 256 MB
FEWEST = 4  # images of a batch that the unbiased estimator needs

_Place = tuple[str, int]  # name of a network, number of its stage
_Sums = dict[tuple[_Place, _Place], float]


def hsic(first: Tensor, second: Tensor) -> Tensor:
    r"""HSIC_1, the unbiased estimator of Song et al. (JMLR 2012), of two Gram matrices.

    .. math:: \frac{1}{n(n-3)} \left( tr(K L) + \frac{1'K1 \; 1'L1}{(n-1)(n-2)} - \frac{2}{n-2} 1'K L 1 \right)

    with the diagonals of K and L set to 0.

    Args:
        first: [n, n], inner products of n representations.
        second: likewise, of the same images.

    Raises:
        UsageError: fewer than 4 images, or matrices of different shapes.
    """
    n = len(first)
    if n < FEWEST or first.shape != (n, n) or second.shape != (n, n):
        raise UsageError(f"hsic takes two [n, n] with n of {FEWEST} or more, got {first.shape} and {second.shape}")
    k, m = (each - torch.diag(each.diagonal()) for each in (first.double(), second.double()))
    rows, columns = k.sum(dim=0), m.sum(dim=0)
    total = (k * m).sum() + rows.sum() * columns.sum() / ((n - 1) * (n - 2)) - 2 * (rows @ columns) / (n - 2)
    return total / (n * (n - 3))


def linear_cka(first: Tensor, second: Tensor) -> float | None:
    """Linear CKA of two representations of the same images, by the unbiased estimator.

    1: equal but for rotation and scale; 0: nothing in common, where chance may give a little less.

    Args:
        first: [n, ...], anything behind the first dimension counts as one vector.
        second: likewise, of any length.

    Returns:
        None where one of them is the same for every image.

    Raises:
        UsageError: fewer than 4 images, or not the same number.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 3.0], [0.0, 0.0]])
        >>> round(linear_cka(x, 3 * x @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])), 6)
        1.0
    """
    a, b = _gram(first), _gram(second)
    return _ratio(float(hsic(a, b)), float(hsic(a, a)), float(hsic(b, b)))


@dataclass(frozen=True)
class Similarity:
    """Linear CKA between the stages of a network and those of others."""

    layers: dict[str, tuple[str, ...]]  # by network: paths of its stages, shallow to deep
    values: dict[str, list[list[float | None]]]  # by other network: a row for each stage of the first, a column for
    # each of its own; None where one of them does not vary
    left_out: dict[str, tuple[str, ...]]  # by network: stages whose maps are too large
    images: int  # that were compared


def stage_similarity(
    networks: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Tensor]], *, largest: int = LARGEST
) -> Similarity:
    """Compare the ends of the stages of the first network with those of each of the others.

    HSIC is estimated in each batch and its mean over the batches taken, so that memory does not grow with the number
    of images.  Batches should be of about the same size, each drawn from all classes.

    Args:
        networks: by name: images [B, 3, H, W] -> logits; each stays as it was.
        batches: by network: the same images, as it wants them, on its device.  Fewer than 4 are left out.
        largest: values of one image's map, above which a stage is left out.

    Raises:
        UsageError: no batch of 4 images or more.
    """
    chosen: dict[str, tuple[Stage, ...]] = {}
    left_out: dict[str, tuple[str, ...]] = {}
    sums: _Sums = {}
    first, count = next(iter(networks)), 0
    for batch in batches:
        if len(batch[first]) < FEWEST:
            continue
        grams: dict[str, list[Tensor]] = {}
        for name, module in networks.items():
            if name not in chosen:
                found = stages(module, batch[name]).stages
                chosen[name] = tuple(each for each in found if each.channels * each.height * each.width <= largest)
                left_out[name] = tuple(each.path for each in found if each not in chosen[name])
            with evaluating(module), read(module, Request(chosen[name])) as reading:
                module(batch[name])
            grams[name] = [_gram(each) for each in reading.maps]
        count += len(batch[first])
        _add(sums, first, grams)
    if not count:
        raise UsageError(f"CKA needs batches of {FEWEST} images or more")
    return Similarity(
        layers={name: tuple(stage.path for stage in found) for name, found in chosen.items()},
        values={name: _matrix(sums, first, name, chosen) for name in networks if name != first},
        left_out={name: paths for name, paths in left_out.items() if paths},
        images=count,
    )


def _add(sums: _Sums, first: str, grams: dict[str, list[Tensor]]) -> None:
    """Add the HSIC of each stage with itself, and of each of the first network's with each of the others'."""
    places = [(name, i) for name, found in grams.items() for i in range(len(found))]
    pairs = [(a, b) for a in places for b in places if a == b or (a[0] == first and b[0] != first)]
    for a, b in pairs:
        sums[a, b] = sums.get((a, b), 0.0) + float(hsic(grams[a[0]][a[1]], grams[b[0]][b[1]]))


def _matrix(sums: _Sums, first: str, name: str, chosen: Mapping[str, Sequence[Stage]]) -> list[list[float | None]]:
    rows, columns = ([(each, i) for i in range(len(chosen[each]))] for each in (first, name))
    return [[_ratio(sums[a, b], sums[a, a], sums[b, b]) for b in columns] for a in rows]


def _gram(features: Tensor) -> Tensor:
    """[n, ...] -> [n, n]; of features less their mean, which changes no HSIC but keeps large means from rounding."""
    flat = features.detach().flatten(1).float()
    flat = flat - flat.mean(dim=0)
    return (flat @ flat.T).cpu().double()


def _ratio(both: float, first: float, second: float) -> float | None:
    """None of what does not vary: then the estimate of its own HSIC is 0, or noise beside it."""
    if not first > 0 or not second > 0:
        return None
    value = both / math.sqrt(first * second)
    return value if math.isfinite(value) else None
