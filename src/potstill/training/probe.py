"""A linear probe: multinomial logistic regression on the embeddings of a frozen encoder.

The strength of the penalty is chosen by stratified cross-validation on the training images alone, by the cross-entropy
of the images that were left out: it is less noisy than their accuracy, and a teacher's probabilities matter as much as
its first class.  The heads of the folds are kept; they answer the training images in distillation (see
``distillation.teachers.FoldHeads``).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.errors import UsageError

FOLDS = 5
STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(-10, 5))  # of C, from 1e-5 to 100
_PATIENCE = 2  # weaker penalties that are still tried after the best so far
_MAX_ITERATIONS = 100  # of L-BFGS, for each strength; it starts from the solution of the one before
_TOLERANCE = 1e-4  # largest gradient entry of the mean loss at which it ends
_MAX_VALUES = 1 << 26  # logits that are held at a time
_SMALL = 1 << 23  # values of embeddings, of which threads would wait for each other longer than they compute
_MIN_SPREAD = 1e-3  # of an embedding's entry, in spreads of all: what hardly varies is not blown up


@dataclass(frozen=True)
class Probe:
    """A fitted probe.

    Attributes:
        weight: [F + 1, K, D] float32; number f was fitted without fold f, the last one on all images.
        bias: [F + 1, K].
        fold: [N] int64, of each image, 0 to F - 1; F for images without a label.
        C: inverse strength of the penalty on the weights, as in scikit-learn's ``LogisticRegression``, of embeddings
            that were standardised.
        top1: accuracy on the images left out, over all folds.
        nll: mean cross-entropy on them.
    """

    weight: Tensor
    bias: Tensor
    fold: Tensor
    C: float
    top1: float
    nll: float

    @property
    def folds(self) -> int:
        """F."""
        return len(self.weight) - 1

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return the outputs [B, K] of the head of all images for embeddings [B, D]."""
        return F.linear(embeddings, self.weight[-1], self.bias[-1])


def check_probe_labels(labels: "np.ndarray[tuple[int], np.dtype[np.int64]]", class_names: Sequence[str]) -> None:
    """Refuse training labels by which no head can be fitted and cross-validated.

    Raises:
        UsageError: a class with no image, or with one.
    """
    counts = np.bincount(labels[labels >= 0], minlength=len(class_names))
    for least, what in ((0, "no image"), (1, "one image")):
        found = [name for name, count in zip(class_names, counts, strict=True) if count == least]
        if found:
            names = ", ".join(map(repr, found[:5])) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
            raise UsageError(
                f"head: probe needs two training images of each class or more, one to fit and one to check, and there "
                f"is {what} of {names}: add images, move some from val or test, leave it out, or set head: random"
            )


def stratified_folds(labels: Tensor, folds: int, seed: int) -> Tensor:
    """Return the fold of each image, [N] int64: each class is spread evenly, drawn by ``seed``.

    A class of two images or more is in two folds or more, so that no fold's complement lacks it.

    Example:
        >>> stratified_folds(torch.tensor([0, 0, 0, 0, 1, 1]), 2, seed=0).bincount()
        tensor([3, 3])
    """
    random = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = np.lexsort((random.numpy(), labels.cpu().numpy()))
    found = torch.empty(len(labels), dtype=torch.int64)
    found[torch.from_numpy(order)] = torch.arange(len(labels)) % folds
    return found


def fit_probe(
    embeddings: Tensor,
    labels: Tensor,
    classes: int,
    *,
    seed: int,
    class_weights: Tensor | None = None,
    folds: int = FOLDS,
    strengths: Sequence[float] = STRENGTHS,
) -> Probe:
    r"""Fit the heads of all folds, and that of all images, at the strength with the best cross-validated cross-entropy.

    .. math::
        \min_{W, b} \; \frac{1}{2} \lVert W \rVert^2 + C \sum_i w_{y_i} \, \mathrm{CE}(W x_i + b, y_i)

    Args:
        embeddings: [N, D] float32, on the device where it is to be computed.
        labels: [N] int64; below 0 where there is none.
        classes: K; each has two images or more (``check_probe_labels``).
        seed: of the folds.
        class_weights: [K], w, with a mean of about 1 over the images; all 1 where None.
        folds: F.
        strengths: values of C, rising.

    Example:
        >>> points = torch.tensor([[-2.0], [-1.5], [-1.0], [1.0], [1.5], [2.0]])
        >>> probe = fit_probe(points, torch.tensor([0, 0, 0, 1, 1, 1]), 2, seed=0, folds=3)
        >>> probe.top1, probe.logits(torch.tensor([[-1.2], [0.9]])).argmax(dim=1)
        (1.0, tensor([0, 1]))
    """
    device, known = embeddings.device, labels >= 0
    rows, targets = embeddings[known.to(device)], labels[known].to(device)
    folds = min(folds, int(targets.bincount(minlength=classes).max()))
    fold = torch.full((len(labels),), folds, dtype=torch.int64)
    fold[known.cpu()] = stratified_folds(targets, folds, seed)
    own = fold[known.cpu()].to(device)
    mean, spread = rows.mean(dim=0), rows.std(dim=0, correction=0)
    typical = spread.square().mean().sqrt().clamp(min=torch.finfo(spread.dtype).tiny)
    spread = spread.clamp(min=_MIN_SPREAD * typical)
    rows = (rows - mean) / spread
    heads = torch.arange(folds + 1, device=device)
    share = (own[:, None] != heads).float()  # [N, F + 1]: which images a head is fitted on; the last one on all
    if class_weights is not None:
        share = share * class_weights.to(device)[targets][:, None]
    solver = _Solver(rows, targets, share, classes)
    best: tuple[float, float, float, Tensor, Tensor] | None = None  # nll, top1, C, weight, bias
    since = 0
    for strength in strengths:
        with _threads(1 if rows.numel() <= _SMALL else None):
            solver.solve(strength)
            top1, nll = solver.evaluate(own)
        since += 1
        if best is None or nll < best[0]:
            best, since = (nll, top1, strength, solver.weight.detach().clone(), solver.bias.detach().clone()), 0
        elif since >= _PATIENCE:
            break
    assert best is not None  # there is a strength
    nll, top1, strength, weight, bias = best
    weight = weight / spread
    bias = bias - weight @ mean
    # Softmax does not feel what all classes have in common, but rounding does.
    weight, bias = weight - weight.mean(dim=1, keepdim=True), bias - bias.mean(dim=1, keepdim=True)
    return Probe(weight.cpu(), bias.cpu(), fold, strength, top1, nll)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Within the block torch computes in so many threads; None: in as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Solver:
    """All heads at once: their problems are apart, but read the same rows.

    Args:
        rows: [N, D].
        targets: [N].
        share: [N, F + 1], what each image weighs in the fit of each head.
        classes: K.
    """

    def __init__(self, rows: Tensor, targets: Tensor, share: Tensor, classes: int) -> None:
        self.rows, self.targets, self.share = rows, targets, share
        self.count, self.classes = share.shape[1], classes
        self.images = (share > 0).sum(dim=0)  # [F + 1]
        self.weight = torch.zeros(self.count, classes, rows.shape[1], device=rows.device, requires_grad=True)
        self.bias = torch.zeros(self.count, classes, device=rows.device, requires_grad=True)
        self.block = max(1, _MAX_VALUES // (self.count * classes))

    def solve(self, strength: float) -> None:
        """Go on from the present solution to that of C ``strength``."""
        optimizer = torch.optim.LBFGS(
            [self.weight, self.bias],
            max_iter=_MAX_ITERATIONS,
            history_size=20,
            tolerance_grad=_TOLERANCE,
            tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        )

        def loss() -> float:
            optimizer.zero_grad()
            total = (self.weight.square().sum(dim=(1, 2)) / (2 * strength * self.images)).sum()
            total.backward()  # type: ignore[no-untyped-call]
            value = total.detach()
            for at in range(0, len(self.rows), self.block):
                part = slice(at, at + self.block)
                losses = self._cross_entropies(part)
                mean = (self.share[part] * losses / self.images).sum()
                mean.backward()  # type: ignore[no-untyped-call]
                value = value + mean.detach()
            return float(value)

        optimizer.step(loss)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def evaluate(self, fold: Tensor) -> tuple[float, float]:
        """Accuracy and cross-entropy of each image by the head that has not seen it; ``fold``: [N]."""
        right, total = 0, 0.0
        for at in range(0, len(self.rows), self.block):
            part = slice(at, at + self.block)
            logits = self._logits(part)[torch.arange(len(fold[part]), device=fold.device), fold[part]]
            right += int((logits.argmax(dim=1) == self.targets[part]).sum())
            total += float(F.cross_entropy(logits, self.targets[part], reduction="sum"))
        return right / len(self.rows), total / len(self.rows)

    def _logits(self, part: slice) -> Tensor:
        rows = self.rows[part]
        found = F.linear(rows, self.weight.view(-1, rows.shape[1]), self.bias.view(-1))
        return found.view(len(rows), self.count, self.classes)

    def _cross_entropies(self, part: slice) -> Tensor:
        """[B, F + 1]."""
        logits = self._logits(part)
        targets = self.targets[part, None].expand(-1, self.count)
        return F.cross_entropy(logits.permute(0, 2, 1), targets, reduction="none")
