"""Streaming metrics and means of the loss terms of an epoch: sums on the device instead of lists of predictions.

State is O(classes).  ``update`` copies a batch into a buffer without synchronisation; every ``BUFFER_ROWS`` images the
buffer is added to the sums.  Only ``compute`` waits for the device.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.errors import NonFiniteError, UsageError
from potstill.evaluation import (
    Array,
    MetricValues,
    auc_averages,
    binned_auc_per_class,
    classification_averages,
    exact_auc_per_class,
)
from potstill.formatting import format_names
from potstill.types import widest_float

BUFFER_ROWS = 4096  # images in the buffer; up to so many, AUC is exact
CPU_CACHE_VALUES = 2**17  # logits per block that fit a CPU's cache together with intermediate results
AUC_BINS = 4096  # of the log-odds, per class
CALIBRATION_BINS = 15
NLL_CEILING = 36.043653389117154  # -log(2^-52), as scikit-learn's log_loss clips float64 probabilities

_MAX_NAMED_IMAGES = 3  # in an error message
NON_FINITE_HELP = (
    "Lower the learning rate (training.lr), or set training.max_grad_norm=1; the last checkpoint is finite"
)

_AVERAGES = ("micro", "macro", "weighted")
METRIC_NAMES = (
    "top1",
    "top3",
    *(f"{name}_{kind}" for name in ("precision", "recall", "f1", "auc") for kind in _AVERAGES),
    "ece",
    "nll",
)


class StreamingMetrics:
    """Metrics of logits [N, K] and labels [N] that come in batches.

    - ``top1``, ``top3``: share of images whose label is among the first 1 or min(3, K) classes; ties go to the lower
      class index, as in ``argmax``.
    - ``precision_``, ``recall_``, ``f1_`` + ``micro``, ``macro``, ``weighted``: see ``classification_averages``.
    - ``auc_micro``, ``auc_macro``, ``auc_weighted``: one class against the rest; classes without positives or without
      negatives are skipped; None if no class is left.  Exact up to ``BUFFER_ROWS`` images, then from ``AUC_BINS`` bins
      of the log-odds ``log p - log(1 - p)``.
    - ``ece``: expected calibration error over 15 equal bins (low, high] of the top class's probability.
    - ``nll``: mean negative log-likelihood, at most 36.04 for one image.
    - ``count``: images.

    Half precision is raised to float32.  For several processes: sum ``state()`` over them and ``merge`` the sum into a
    new object; or, if nothing is ``binned``, ``update`` one with the ``rows`` of all.

    Example:
        >>> metrics = StreamingMetrics(2)
        >>> metrics.update(torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 1, 1]))
        >>> figures = metrics.compute()
        >>> round(figures["top1"], 4), figures["auc_macro"]
        (0.6667, 0.5)
    """

    def __init__(self, num_classes: int, *, device: torch.device | str = "cpu") -> None:
        if num_classes < 2:
            raise UsageError(f"metrics need two classes or more, got {num_classes}")
        self.num_classes = num_classes
        self.device = torch.device(device)
        self._logits = torch.empty(BUFFER_ROWS, num_classes, device=self.device)
        self._labels = torch.empty(BUFFER_ROWS, dtype=torch.int64, device=self.device)
        self.reset()

    def reset(self) -> None:
        """Reset all sums."""
        self._held = 0  # rows in the buffer
        self._binned = False
        real = widest_float(self.device)
        self._histogram: Tensor | None = None  # large, so it is created on demand
        self._sums = {
            "classes": torch.zeros(3, self.num_classes, dtype=torch.int64, device=self.device),
            "top3": torch.zeros(1, dtype=torch.int64, device=self.device),
            "calibration": torch.zeros(2, CALIBRATION_BINS, dtype=real, device=self.device),
            "nll": torch.zeros(1, dtype=real, device=self.device),
            "nonfinite": torch.zeros(1, dtype=torch.int64, device=self.device),
        }

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add logits [B, K] and int64 labels [B]; those below 0 are left out of all metrics."""
        if logits.ndim != 2 or logits.shape[1] != self.num_classes or labels.shape != logits.shape[:1]:
            raise UsageError(
                f"metrics of {self.num_classes} classes take logits [B, {self.num_classes}] and labels [B], "
                f"got {list(logits.shape)} and {list(labels.shape)}"
            )
        start = 0
        while start < len(labels):
            if self._held == BUFFER_ROWS:
                self._add_counts(self._sums)
                self._histogram = self._add_scores(self._histogram)
                self._held, self._binned = 0, True
            rows = min(BUFFER_ROWS - self._held, len(labels) - start)
            target, source = slice(self._held, self._held + rows), slice(start, start + rows)
            self._logits[target].copy_(logits[source], non_blocking=True)
            self._labels[target].copy_(labels[source], non_blocking=True)
            self._held += rows
            start += rows

    @property
    def held(self) -> int:
        """Number of images in the buffer."""
        return self._held

    @property
    def binned(self) -> bool:
        """Whether AUC comes from bins."""
        return self._binned

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Logits [held, K] and labels [held] in the buffer."""
        return self._logits[: self._held], self._labels[: self._held]

    def state(self) -> dict[str, Tensor]:
        """Return the sums over all images; tensors that processes may add up."""
        return self._counts() | {"histogram": self._scores()}

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add another object's ``state()``; AUC then comes from bins."""
        for name, values in self._sums.items():
            values += state[name].to(self.device)
        self._histogram = self._or_zeros(self._histogram).add_(state["histogram"].to(self.device))
        self._binned = True

    def pack(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint: unlike ``state()``, it includes the buffer."""
        logits, labels = self.rows
        histogram = {} if self._histogram is None else {"histogram": self._histogram}
        return self._sums | {"logits": logits, "labels": labels} | histogram

    def unpack(self, packed: Mapping[str, Tensor]) -> None:
        """Replace the state by what ``pack`` returned."""
        self.reset()
        for name, values in self._sums.items():
            values.copy_(packed[name])
        self._held = len(packed["labels"])
        self._logits[: self._held].copy_(packed["logits"])
        self._labels[: self._held].copy_(packed["labels"])
        if "histogram" in packed:
            self._histogram, self._binned = packed["histogram"].to(self.device), True

    def compute(self) -> MetricValues:
        """Return all metrics, None without images; wait for the device.  NonFiniteError: NaN or infinite logits."""
        sums = {name: values.cpu().numpy() for name, values in self._counts().items()}
        support, predicted, hits = sums["classes"]
        count = int(support.sum())
        if count == 0:
            return {**dict.fromkeys(METRIC_NAMES), "count": 0}
        if sums["nonfinite"][0]:
            raise NonFiniteError(f"{sums['nonfinite'][0]} of {count} images have a logit that is NaN or infinite")
        confidence, correct = sums["calibration"]
        return {
            "top1": float(hits.sum() / count),
            "top3": float(sums["top3"][0] / count),
            **classification_averages(hits, predicted, support),
            **auc_averages(*self.auc_per_class(), support),
            "ece": float(abs(confidence - correct).sum() / count),
            "nll": float(sums["nll"][0] / count),
            "count": count,
        }

    def auc_per_class(self) -> tuple[Array, float]:
        """Return the AUC of each class [K], NaN if undefined, and of all classes pooled; waits for the device."""
        if self._binned:
            return binned_auc_per_class(self._scores().cpu().numpy())
        scores, labels = (each.cpu().numpy() for each in (log_odds(self.rows[0]), self.rows[1]))
        return exact_auc_per_class(scores[labels >= 0], labels[labels >= 0])

    def _counts(self) -> dict[str, Tensor]:
        """Return all sums but the histogram, including the buffer."""
        sums = {name: values.clone() for name, values in self._sums.items()}
        self._add_counts(sums)
        return sums

    def _scores(self) -> Tensor:
        return self._add_scores(None if self._histogram is None else self._histogram.clone())

    def _add_scores(self, histogram: Tensor | None) -> Tensor:
        """Add the scores in the buffer to the histogram [2, K, AUC_BINS] in place, or to a new one."""
        histogram = self._or_zeros(histogram)
        for logits, labels in self._blocks():
            _add_scores(histogram, logits, labels)
        return histogram

    def _or_zeros(self, histogram: Tensor | None) -> Tensor:
        shape = 2, self.num_classes, AUC_BINS
        return torch.zeros(shape, dtype=torch.int32, device=self.device) if histogram is None else histogram

    def _add_counts(self, sums: dict[str, Tensor]) -> None:
        for logits, labels in self._blocks():
            _add_counts(sums, logits, labels)

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the buffer; on a CPU in blocks that fit its cache."""
        rows = max(1, CPU_CACHE_VALUES // self.num_classes) if self.device.type == "cpu" else BUFFER_ROWS
        for start in range(0, self._held, rows):
            block = slice(start, min(start + rows, self._held))
            yield self._logits[block], self._labels[block]


def log_odds(logits: Tensor) -> Tensor:
    """Return ``log p - log(1 - p)`` [B, K] of the softmax of logits [B, K], without cancellation in 1 - p.

    The order is that of p, but values that float32 rounds to p = 1 stay distinct.
    """
    top = logits.argmax(dim=1, keepdim=True)
    shifted = logits - logits.gather(1, top)
    # For all classes but the top one p <= 1/2, so 1 - p is precise; for the top one the others are summed.
    exp = shifted.exp()
    odds = shifted - (exp.sum(dim=1, keepdim=True) - exp).log()
    others = shifted.scatter(1, top, -torch.inf).logsumexp(dim=1, keepdim=True)
    return odds.scatter_(1, top, -others)


def label_rank(scores: Tensor, labels: Tensor) -> Tensor:
    """Return how many classes of scores [B, K] come before each label [B]; ties go to the lower class index."""
    label_scores = scores.gather(1, labels[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > label_scores) | ((scores == label_scores) & lower)).sum(dim=1)


def _add_counts(sums: dict[str, Tensor], logits: Tensor, labels: Tensor) -> None:
    """Add rows to the sums, in place, without waiting for the device."""
    labeled = labels >= 0
    labels, one = labels.clamp(min=0), labeled.long()  # selecting rows would wait: unlabeled ones count 0 instead
    predicted = logits.argmax(dim=1)
    correct = (predicted == labels) & labeled
    support, predictions, hits = sums["classes"]
    support.scatter_add_(0, labels, one)
    predictions.scatter_add_(0, predicted, one)
    hits.scatter_add_(0, labels, correct.long())
    sums["top3"] += ((label_rank(logits, labels) < min(3, logits.shape[1])) & labeled).sum()

    sums["nonfinite"] += ((~logits.isfinite()).any(dim=1) & labeled).sum()
    real = sums["nll"].dtype
    normaliser = logits.logsumexp(dim=1)
    nll = (normaliser - logits.gather(1, labels[:, None])[:, 0]).clamp(max=NLL_CEILING)
    sums["nll"] += nll.where(labeled, 0.0).sum(dtype=real)
    confidence = (logits.amax(dim=1) - normaliser).exp()
    bins = ((confidence * CALIBRATION_BINS).ceil().long() - 1).clamp(0, CALIBRATION_BINS - 1)
    sums["calibration"][0].scatter_add_(0, bins, confidence.where(labeled, 0.0).to(real))
    sums["calibration"][1].scatter_add_(0, bins, correct.to(real))


def _add_scores(histogram: Tensor, logits: Tensor, labels: Tensor) -> None:
    # x / (8 + |x|) maps all log-odds into (-1, 1) without clipping; the bins are finest (0.004) around even odds, 0.03
    # wide at +-15, 0.7 at +-100.
    odds = log_odds(logits).clamp_(-1e6, 1e6)
    scaled = odds / (odds.abs() + 8)
    # The clamp is for NaN, which compute() reports; it must not index outside the histogram.
    index = (scaled + 1).mul_(AUC_BINS / 2).long().clamp_(0, AUC_BINS - 1)
    index += torch.arange(logits.shape[1], device=logits.device) * AUC_BINS
    own = labels.clamp(min=0)[:, None]
    index.scatter_add_(1, own, torch.full_like(own, logits.shape[1] * AUC_BINS))
    labeled = (labels >= 0).to(histogram.dtype)[:, None].expand_as(index)
    histogram.view(-1).scatter_add_(0, index.view(-1), labeled.reshape(-1))


class TermAverages:
    """Means of the loss terms over an epoch, each over the steps that have it, kept on the device until ``compute``."""

    def __init__(self) -> None:
        self._names: list[tuple[str, ...]] = []
        self._steps: list[Tensor] = []
        self._sizes: list[int] = []
        self._numbers: list[int] = []  # of the steps, from 1

    def update(self, terms: dict[str, Tensor], images: int, step: int | None = None) -> None:
        """Add one step's terms, means over its images."""
        self._names.append(tuple(terms))
        self._steps.append(torch.stack([term.detach().float() for term in terms.values()]))
        self._sizes.append(images)
        self._numbers.append(len(self._numbers) + 1 if step is None else step)

    def pack(self) -> tuple[dict[str, Tensor], list[Any]]:
        """Return the state as tensors by name and a JSON list."""
        tensors = {"terms": torch.cat(self._steps)} if self._steps else {}
        steps = zip(self._names, self._sizes, self._numbers, strict=True)
        return tensors, [[list(names), size, number] for names, size, number in steps]

    def unpack(self, tensors: Mapping[str, Tensor], facts: Sequence[Any]) -> None:
        """Replace the state by what ``pack`` returned."""
        self._names = [tuple(names) for names, _, _ in facts]
        self._sizes = [int(size) for _, size, _ in facts]
        self._numbers = [int(number) for _, _, number in facts]
        lengths = [len(names) for names in self._names]
        self._steps = list(tensors["terms"].split(lengths)) if lengths else []  # type: ignore[no-untyped-call]

    def merge(self, packed: Sequence[tuple[Mapping[str, Tensor], Sequence[Any]]]) -> None:
        """Replace the state by the steps of all processes, each given as its ``pack``, in order of their numbers."""
        parts = [TermAverages() for _ in packed]
        for part, (tensors, facts) in zip(parts, packed, strict=True):
            part.unpack(tensors, facts)
        steps = [
            each for part in parts for each in zip(part._numbers, part._names, part._steps, part._sizes, strict=True)
        ]
        steps.sort(key=lambda each: each[0])  # stable: within a step, in the order of the processes
        self._numbers = [number for number, _, _, _ in steps]
        self._names = [names for _, names, _, _ in steps]
        self._steps = [terms for _, _, terms, _ in steps]
        self._sizes = [size for _, _, _, size in steps]

    def compute(self, where: str, images: Callable[[int], Sequence[str]] | None = None) -> dict[str, float]:
        """Return the mean of each term over images; NonFiniteError names the first step with NaN or infinity."""
        known = list(dict.fromkeys(name for names in self._names for name in names))
        values = iter(torch.cat(self._steps).cpu().tolist())  # the only synchronisation with the device
        sums, weights = dict.fromkeys(known, 0.0), dict.fromkeys(known, 0)
        for step, names, size in zip(self._numbers, self._names, self._sizes, strict=True):
            terms = dict(zip(names, values, strict=False))  # takes as many values as there are names
            bad = [name for name, value in terms.items() if not math.isfinite(value)]
            if bad:
                raise NonFiniteError(
                    f"{where}: at step {step} the loss term {', '.join(bad)} is {sum(terms.values()):g}"
                    f"{f', on {format_names(images(step), _MAX_NAMED_IMAGES)}' if images is not None else ''}.\n"
                    f"{NON_FINITE_HELP}"
                )
            for name, value in terms.items():
                sums[name] += size * value
                weights[name] += size
        return {name: sums[name] / weights[name] for name in known}
