"""Figures of one epoch while it runs: sums on the device instead of lists of predictions.

State is O(classes).  ``update`` copies a batch into a buffer and never waits for the device; every ``ROWS`` images the
buffer is folded into the sums.  ``compute`` is the one place where the device is read.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from potstill.errors import NonFiniteError, UsageError
from potstill.evaluation.classification import (
    Array,
    MetricValues,
    auc_averages,
    binned_auc_per_class,
    classification_averages,
    exact_auc_per_class,
)

BUFFER_ROWS = 4096  # images held before they are folded; up to so many the AUC is exact
CPU_CACHE_VALUES = 2**17  # numbers that a CPU's cache holds together with what is made of them
AUC_BINS = 4096  # of the log-odds, per class
CALIBRATION_BINS = 15
NLL_CEILING = (
    36.043653389117154  # -log(2^-52): scikit-learn's log_loss takes a float64 probability below 2^-52 as 2^-52
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
    """Flat figures of logits [N, K] and labels [N] that come in batches.

    - ``top1``, ``top3``: share of images whose label is the first, is among the first min(3, K) classes; of equal
      logits the lower class number comes first, as in ``argmax``.
    - ``precision_``, ``recall_``, ``f1_`` + ``micro``, ``macro``, ``weighted``: see ``classification_averages``.
    - ``auc_micro``, ``auc_macro``, ``auc_weighted``: one class against the rest; classes without positives or without
      negatives are skipped; None where that leaves none.  Exact up to ``BUFFER_ROWS`` images, then from ``AUC_BINS``
      bins of the log-odds ``log p - log(1 - p)``.
    - ``ece``: expected calibration error over 15 equal bins (low, high] of the top class's probability.
    - ``nll``: mean negative log-likelihood, at most 36.04 for one image.
    - ``count``: images.

    Half precision is raised to float32 first.  For several processes: sum ``state()`` over them, ``merge`` the sum into
    a new object; or, as long as nothing is ``binned``, ``update`` one with the ``rows`` of all.

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
        """Forget everything, for the next epoch."""
        self._held = 0  # rows in the buffer
        self._binned = False  # whether scores are known by their bin alone
        real = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        self._histogram: Tensor | None = None  # made when it is needed: it is large, and few images need none
        self._sums = {
            "classes": torch.zeros(3, self.num_classes, dtype=torch.int64, device=self.device),
            "top3": torch.zeros(1, dtype=torch.int64, device=self.device),
            "calibration": torch.zeros(2, CALIBRATION_BINS, dtype=real, device=self.device),
            "nll": torch.zeros(1, dtype=real, device=self.device),
            "nonfinite": torch.zeros(1, dtype=torch.int64, device=self.device),
        }

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch: logits [B, K] of any floating type, labels [B] int64 in [0, K), or below 0: unlabeled images
        are left out of all figures.

        Raises:
            UsageError: wrong shapes.
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_classes or labels.shape != logits.shape[:1]:
            raise UsageError(
                f"metrics of {self.num_classes} classes take logits [B, {self.num_classes}] and labels [B], "
                f"got {list(logits.shape)} and {list(labels.shape)}"
            )
        taken = 0
        while taken < len(labels):
            if self._held == BUFFER_ROWS:
                self._fold(self._sums)
                self._histogram = self._with_scores(self._histogram)
                self._held, self._binned = 0, True
            rows = min(BUFFER_ROWS - self._held, len(labels) - taken)
            place, source = slice(self._held, self._held + rows), slice(taken, taken + rows)
            self._logits[place].copy_(logits[source], non_blocking=True)
            self._labels[place].copy_(labels[source], non_blocking=True)
            self._held += rows
            taken += rows

    @property
    def held(self) -> int:
        """Images whose logits are kept as they are; the sums of those before are folded."""
        return self._held

    @property
    def binned(self) -> bool:
        """Whether scores are known by their bins alone."""
        return self._binned

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Logits [held, K] and labels [held] of the images that are kept."""
        return self._logits[: self._held], self._labels[: self._held]

    def state(self) -> dict[str, Tensor]:
        """Sums of everything so far: tensors that processes may add up."""
        return self._counts() | {"histogram": self._scores()}

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add what another object's ``state()`` holds; AUC is then from bins."""
        for name, values in self._sums.items():
            values += state[name].to(self.device)
        self._histogram = self._empty(self._histogram).add_(state["histogram"].to(self.device))
        self._binned = True

    def pack(self) -> dict[str, Tensor]:
        """All that is known, for a checkpoint: unlike ``state``, with the rows that are held as they are."""
        known = {"logits": self._logits[: self._held], "labels": self._labels[: self._held]}
        return self._sums | known | ({} if self._histogram is None else {"histogram": self._histogram})

    def unpack(self, packed: Mapping[str, Tensor]) -> None:
        """Put what ``pack`` gave in place of one's own."""
        self.reset()
        for name, values in self._sums.items():
            values.copy_(packed[name])
        self._held = len(packed["labels"])
        self._logits[: self._held].copy_(packed["logits"])
        self._labels[: self._held].copy_(packed["labels"])
        if "histogram" in packed:
            self._histogram, self._binned = packed["histogram"].to(self.device), True

    def compute(self) -> MetricValues:
        """All figures so far; waits for the device.  Without any image all are None.

        Raises:
            NonFiniteError: a logit was NaN or infinite.
        """
        sums = {name: values.cpu().numpy() for name, values in self._counts().items()}
        support, called, hits = sums["classes"]
        count = int(support.sum())
        if count == 0:
            nothing: MetricValues = dict.fromkeys(METRIC_NAMES)
            return {**nothing, "count": 0}
        if sums["nonfinite"][0]:
            raise NonFiniteError(f"{sums['nonfinite'][0]} of {count} images have a logit that is NaN or infinite")
        confidence, right = sums["calibration"]
        return {
            "top1": float(hits.sum() / count),
            "top3": float(sums["top3"][0] / count),
            **classification_averages(hits, called, support),
            **auc_averages(*self.areas(), support),
            "ece": float(abs(confidence - right).sum() / count),
            "nll": float(sums["nll"][0] / count),
            "count": count,
        }

    def areas(self) -> tuple[Array, float]:
        """AUC of each class [K], NaN where it is not defined, and of all classes pooled; waits for the device."""
        if self._binned:
            return binned_auc_per_class(self._scores().cpu().numpy())
        scores, labels = log_odds(self._logits[: self._held]).cpu().numpy(), self._labels[: self._held].cpu().numpy()
        return exact_auc_per_class(scores[labels >= 0], labels[labels >= 0])

    def _counts(self) -> dict[str, Tensor]:
        """All sums but the histogram, with the rows that are held."""
        sums = {name: values.clone() for name, values in self._sums.items()}
        self._fold(sums)
        return sums

    def _scores(self) -> Tensor:
        """The histogram with the rows that are held."""
        return self._with_scores(None if self._histogram is None else self._histogram.clone())

    def _with_scores(self, histogram: Tensor | None) -> Tensor:
        """Add the scores of the rows that are held, in place; None: to a new histogram [2, K, BINS]."""
        histogram = self._empty(histogram)
        for logits, labels in self._pieces():
            _fold_scores(histogram, logits, labels)
        return histogram

    def _empty(self, histogram: Tensor | None) -> Tensor:
        shape = 2, self.num_classes, AUC_BINS
        return torch.zeros(shape, dtype=torch.int32, device=self.device) if histogram is None else histogram

    def _fold(self, sums: dict[str, Tensor]) -> None:
        """Add the rows that are held, in place."""
        for logits, labels in self._pieces():
            _fold(sums, logits, labels)

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows that are held; on a CPU in pieces that stay in its cache."""
        rows = max(1, CPU_CACHE_VALUES // self.num_classes) if self.device.type == "cpu" else BUFFER_ROWS
        for start in range(0, self._held, rows):
            piece = slice(start, min(start + rows, self._held))
            yield self._logits[piece], self._labels[piece]


def log_odds(logits: Tensor) -> Tensor:
    """``log p - log(1 - p)`` of the softmax of logits [B, K], without the cancellation in 1 - p.

    It orders images as p does, but tells apart what float32 rounds to p = 1.
    """
    top = logits.argmax(dim=1, keepdim=True)
    shifted = logits - logits.gather(1, top)
    # Of all classes but the top one p <= 1/2, so 1 - p loses nothing; for the top one the others are summed.
    exp = shifted.exp()
    odds = shifted - (exp.sum(dim=1, keepdim=True) - exp).log()
    others = shifted.scatter(1, top, -torch.inf).logsumexp(dim=1, keepdim=True)
    return odds.scatter_(1, top, -others)


def _fold(sums: dict[str, Tensor], logits: Tensor, labels: Tensor) -> None:
    """Add the rows to the sums, in place, without waiting for the device."""
    known = labels >= 0
    labels, one = labels.clamp(min=0), known.long()  # choosing rows would wait: unlabeled ones count 0 instead
    label_probability = logits.gather(1, labels[:, None])
    predicted = logits.argmax(dim=1)
    right = (predicted == labels) & known
    support, called, hits = sums["classes"]
    support.scatter_add_(0, labels, one)
    called.scatter_add_(0, predicted, one)
    hits.scatter_add_(0, labels, right.long())
    numbers = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > label_probability) | ((logits == label_probability) & (numbers < labels[:, None]))
    sums["top3"] += ((before.sum(dim=1) < min(3, logits.shape[1])) & known).sum()

    sums["nonfinite"] += ((~logits.isfinite()).any(dim=1) & known).sum()
    real = sums["nll"].dtype
    normaliser = logits.logsumexp(dim=1)
    nll = (normaliser - label_probability[:, 0]).clamp(max=NLL_CEILING)
    sums["nll"] += nll.where(known, 0.0).sum(dtype=real)
    confidence = (logits.amax(dim=1) - normaliser).exp()
    bins = ((confidence * CALIBRATION_BINS).ceil().long() - 1).clamp(0, CALIBRATION_BINS - 1)
    sums["calibration"][0].scatter_add_(0, bins, confidence.where(known, 0.0).to(real))
    sums["calibration"][1].scatter_add_(0, bins, right.to(real))


def _fold_scores(histogram: Tensor, logits: Tensor, labels: Tensor) -> None:
    # x / (8 + |x|) maps all log-odds into (-1, 1): nothing is clipped however sure a network is, and the bins are
    # finest (0.004) around even odds, 0.03 wide at +-15, 0.7 at +-100.
    odds = log_odds(logits).clamp_(-1e6, 1e6)
    share = odds / (odds.abs() + 8)
    # The clamp of the bin numbers is for NaN, which compute() reports; it must not index outside the histogram.
    index = (share + 1).mul_(AUC_BINS / 2).long().clamp_(0, AUC_BINS - 1)
    index += torch.arange(logits.shape[1], device=logits.device) * AUC_BINS
    own = labels.clamp(min=0)[:, None]
    index.scatter_add_(1, own, torch.full_like(own, logits.shape[1] * AUC_BINS))
    known = (labels >= 0).to(histogram.dtype)[:, None].expand_as(index)
    histogram.view(-1).scatter_add_(0, index.view(-1), known.reshape(-1))
