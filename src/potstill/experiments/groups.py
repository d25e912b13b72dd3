"""Several networks of a run as one: its teachers, and the generations of its student."""

from collections.abc import Iterable, Sequence

import numpy as np

from potstill.evaluation.averages import Array
from potstill.experiments.recipe import TeachersSettings
from potstill.experiments.run_folder import SPLITS
from potstill.experiments.stage_names import in_order, role

Probabilities = dict[str, Array]  # by split, each [N, K]

_SMALLEST = float(np.finfo(np.float32).smallest_subnormal)  # in place of a probability that has become 0


def members(group: str, stages: Iterable[str]) -> list[str]:
    """The stages of a group: all ``teachers``; the ``generations``, of which distilled is the last."""
    roles = ("teacher",) if group == "teachers" else ("generation", "distilled")
    return in_order(name for name in stages if role(name) in roles)


def together(probabilities: dict[str, Probabilities], settings: TeachersSettings) -> dict[str, Probabilities]:
    """What several networks say as one: the teachers as the recipe combines them, the generations by their mean.

    A lone teacher is its own group; generations are one where there are several.

    Averaged logits are, after softmax, the weighted geometric mean of the probabilities.
    """
    groups: dict[str, Probabilities] = {}
    for group in ("teachers", "generations"):
        names = members(group, probabilities)
        if not names or (group == "generations" and len(names) < 2):
            continue
        by_logits = group == "teachers" and settings.combine == "logits"
        given = settings.weights if group == "teachers" and settings.weights is not None else [1.0] * len(names)
        shares = np.asarray(given, dtype=np.float64)[:, None, None] / sum(given)
        groups[group] = {
            split: _mean(np.stack([probabilities[name][split] for name in names]), shares, by_logits)
            for split in SPLITS
        }
    return groups


def as_one(each: Sequence[Array], settings: TeachersSettings) -> Array:
    """What several teachers say as one of the same images, [N, K]; a lone teacher's word as it is.

    Args:
        each: [N, K] probabilities of each, in their order.
        settings: how they are combined.
    """
    given = settings.weights if settings.weights is not None else [1.0] * len(each)
    shares = np.asarray(given, dtype=np.float64)[:, None, None] / sum(given)
    return each[0] if len(each) == 1 else _mean(np.stack(each), shares, settings.combine == "logits")


def _mean(stacked: Array, shares: Array, by_logits: bool) -> Array:
    """[M, N, K] -> [N, K]."""
    stacked = stacked.astype(np.float64)
    mean: Array = (shares * stacked).sum(axis=0)
    if len(stacked) == 1 or not by_logits:
        return mean
    logs = (shares * np.log(np.maximum(stacked, _SMALLEST))).sum(axis=0)
    raised = np.exp(logs - logs.max(axis=1, keepdims=True))
    combined: Array = raised / raised.sum(axis=1, keepdims=True)
    return combined
