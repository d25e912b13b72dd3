"""Contrastive representation distillation: contrast an image's teacher embedding with those of other classes.

Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020.  https://arxiv.org/abs/1910.10699
Two memory banks hold an embedding of every training image for each network: the student's embedding is compared with
the teacher's bank and the other way round.  The constants Z are taken from the first batch and kept.
Memory: 2 N dim numbers for the banks, and B N for the comparison.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.numerics import inner_products
from potstill.methods.requirements import Requirements
from potstill.options import Count, NonNegative, Positive, Share, checked, option
from potstill.types import Batch, Outputs, at_least_float32


class ClassSampler(nn.Module):
    """The training set sorted by class, from ``labels`` [N] by sample id; of two classes or more."""

    labels: Tensor
    order: Tensor  # sample ids by class
    counts: Tensor  # of each class
    starts: Tensor  # of each class's run in ``order``

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        counts = labels.bincount()
        present = counts[counts > 0]
        if len(present) < 2:
            raise UsageError(f"contrast needs samples of 2 classes or more, got {len(present)}; use kd instead")
        # Not in checkpoints: they follow from the training set.
        self.register_buffer("labels", labels, persistent=False)
        self.register_buffer("order", labels.argsort(stable=True), persistent=False)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("starts", counts.cumsum(0) - counts, persistent=False)
        self.smallest_pool = len(labels) - int(present.max())

    def draw_other(self, classes: Tensor, k: int) -> Tensor:
        """[B, k] sample ids, row i of other classes than ``classes[i]``, drawn with torch's global generator.

        No id comes twice in a row, unless all other classes together have fewer than ``k`` samples.
        """
        counts, starts = self._of(classes)
        pools = len(self.labels) - counts
        places = self._sparse(pools, k) if 2 * k < self.smallest_pool else self._dense(pools, k)
        places = places + counts * (places >= starts)  # step over the row's own class
        return self.order[places]

    def draw_same(self, classes: Tensor) -> Tensor:
        """[B] sample ids of the given classes."""
        counts, starts = self._of(classes)
        return self.order[(starts + _randint_below(counts, 1)).squeeze(1)]

    def _of(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        return self.counts[classes].unsqueeze(1), self.starts[classes].unsqueeze(1)

    def _dense(self, pools: Tensor, k: int) -> Tensor:
        """By sorting one random key for each sample; where the pool is smaller than k, with repetition."""
        repeated = _randint_below(pools, k)
        if k > len(self.labels):
            return repeated
        keys = torch.rand(len(pools), len(self.labels), device=pools.device)
        keys = keys.masked_fill(torch.arange(len(self.labels), device=pools.device) >= pools, 2)
        return torch.where(pools >= k, keys.argsort(dim=1)[:, :k], repeated)

    def _sparse(self, pools: Tensor, k: int) -> Tensor:
        """Draw more than needed with repetition, and keep the first k that differ: B k numbers, not B N."""
        pool = self.smallest_pool
        expected = pool * -math.log1p(-k / pool)  # draws until k differ
        draws = _randint_below(pools, math.ceil(expected + 8 * math.sqrt(expected) + 8))
        values, order = draws.sort(dim=1, stable=True)
        repeats = torch.zeros_like(draws, dtype=torch.bool)
        repeats[:, 1:] = values[:, 1:] == values[:, :-1]
        # Back in the order of drawing: keeping the k smallest would favour small places.
        late = torch.zeros_like(repeats).scatter_(1, order, repeats).to(torch.uint8)
        return draws.gather(1, late.argsort(dim=1, stable=True)[:, :k])


def _randint_below(bounds: Tensor, count: int) -> Tensor:
    """[B, count] whole numbers, evenly from 0 to below each row's bound."""
    # Of so many numbers the remainders are even to 13 digits; a float32 times the bound would skip ids above 2^24.
    return torch.randint(2**62, (len(bounds), count), device=bounds.device) % bounds


EPSILON = 1e-7  # of the authors' loss


@checked
def crd_loss(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor,
    teacher_memory: Tensor,
    contrast: Tensor,
    constants: Tensor,
    *,
    temperature: Positive = 0.07,
) -> Tensor:
    r"""Noise-contrastive loss of telling a sample's other embedding from k negatives, for both networks.

    .. math:: -\frac{1}{B} \sum_i \Big[ \log \frac{P_{i0}}{P_{i0} + k/N + \epsilon} +
        \sum_{j=1}^{k} \log \frac{k/N}{P_{ij} + k/N + \epsilon} \Big], \quad
        P_{ij} = \frac{1}{Z} \exp(u_i^\top m_j / \tau)

    once with the student's u and the teacher's bank m, once the other way round; the sum of both.

    Args:
        student: embeddings [B, D] of length 1.
        teacher: likewise.  The gradient reaches it: it comes through a trained layer.
        student_memory: [N, D], the bank that the teacher's embeddings are compared with.
        teacher_memory: [N, D], the bank that the student's embeddings are compared with.
        contrast: [B, 1 + k], int64 sample ids: the positive, then the negatives.
        constants: [2], Z of student and teacher, as ``crd_constants`` finds them on the first batch.
        temperature: tau > 0.

    Example:
        >>> unit, banks = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> # by hand: scores exp(0), Z = 2, so P = 1/2 = k/N: each side loses 2 ln 2
        >>> crd_loss(unit, unit, banks, banks, torch.tensor([[0, 1]]), torch.tensor([2.0, 2.0]))
        tensor(2.7726)
    """
    return _contrast(_scores(student, teacher_memory, contrast, temperature) / constants[0], len(teacher_memory)) + (
        _contrast(_scores(teacher, student_memory, contrast, temperature) / constants[1], len(student_memory))
    )


@torch.no_grad()
def crd_constants(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor,
    teacher_memory: Tensor,
    contrast: Tensor,
    *,
    temperature: Positive = 0.07,
) -> Tensor:
    """The constants Z of student and teacher, [2]: N times the mean score of a batch.  Arguments as in ``crd_loss``.

    Example:
        >>> unit, banks = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> crd_constants(unit, unit, banks, banks, torch.tensor([[0, 1]]))
        tensor([2., 2.])
    """
    pairs = (student, teacher_memory), (teacher, student_memory)
    means = [_scores(unit, memory, contrast, temperature).mean() * len(memory) for unit, memory in pairs]
    return torch.stack(means)


@torch.no_grad()
def crd_memory(memory: Tensor, unit: Tensor, index: Tensor, *, momentum: Share = 0.5) -> Tensor:
    """A new bank [N, D] in which the rows ``index`` have moved towards the embeddings ``unit`` and have length 1.

    Example:
        >>> # by hand: (0.5, 0.5), brought to length 1
        >>> crd_memory(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
        tensor([[0.7071, 0.7071]])
    """
    rows = F.normalize(momentum * memory[index] + (1 - momentum) * at_least_float32(unit), dim=1)
    # Not in place: the backward pass still reads the old bank.
    return memory.index_copy(0, index, rows.to(memory.dtype))


def _scores(unit: Tensor, memory: Tensor, contrast: Tensor, temperature: float) -> Tensor:
    """[B, 1 + k]: exp(u m / tau)."""
    if len(memory) <= contrast.shape[1] * memory.shape[1]:  # all N products are fewer numbers than copies of the rows
        similarity = inner_products(unit, memory).gather(1, contrast)
    else:
        similarity = inner_products(memory[contrast], unit.unsqueeze(1)).squeeze(2)
    return (similarity / temperature).exp()


def _contrast(probabilities: Tensor, samples: int) -> Tensor:
    noise = (probabilities.shape[1] - 1) / samples
    positive, negative = probabilities[:, 0], probabilities[:, 1:]
    log_positive = (positive / (positive + noise + EPSILON)).log()
    log_negative = (noise / (negative + noise + EPSILON)).log()
    return -(log_positive.sum() + log_negative.sum()) / len(probabilities)


class CRD(Method):
    """Labels plus contrast of linearly embedded features with two memory banks: ``CE + weight * CRD``.

    Needs sample ids and the labels of the training set.  With fewer than ``negatives`` images of other classes, some
    negatives come several times.
    """

    name = "crd"
    needs = Requirements(embedding=True, index=True, labels=True)

    weight: NonNegative = option(default=0.8, doc="weight of the contrast")
    dim: Count = option(default=128, doc="width of the two trained embeddings")
    negatives: Count = option(
        default=16384, doc="k for each image, of other classes; each at most once where there are so many"
    )
    temperature: Positive = option(default=0.07, doc="tau")
    momentum: Share = option(default=0.5, doc="share of the old row when a bank is updated")
    positive: Literal["exact", "relax"] = option(
        default="exact", doc='"exact", the image itself; or "relax", a random image of its class'
    )
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def __post_init__(self) -> None:
        self._constants_known = False

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        assert student.outputs.embedding is not None
        assert teacher.outputs.embedding is not None
        if training.labels is None:
            raise UsageError("crd keeps a memory of the training set: it needs the labels of all its images")
        self.embed_student = nn.Linear(student.outputs.embedding.shape[1], self.dim)
        self.embed_teacher = nn.Linear(teacher.outputs.embedding.shape[1], self.dim)
        self.table = ClassSampler(training.labels)
        bound = (3 / self.dim) ** 0.5  # rows of length 1 on average
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, torch.empty(len(training.labels), self.dim).uniform_(-bound, bound))
        self.student_memory: Tensor
        self.teacher_memory: Tensor
        self.constants: Tensor
        self.register_buffer("constants", torch.zeros(2))  # 0: the first batch sets them

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if batch.index is None:
            raise UsageError(
                "crd remembers every image by its sample id: pass index=, [B] positions in the training set"
            )
        units = (
            F.normalize(at_least_float32(self.embed_student(student.embedding)), dim=1),
            F.normalize(at_least_float32(self.embed_teacher(teacher.embedding)), dim=1),
        )
        contrast = self.draw(batch.index)
        memories = self.student_memory, self.teacher_memory
        if not self._constants_known:  # read once: it waits for the device
            if not self.constants.all():
                self.constants = crd_constants(*units, *memories, contrast, temperature=self.temperature)
            self._constants_known = True
        loss = crd_loss(*units, *memories, contrast, self.constants, temperature=self.temperature)
        self.student_memory, self.teacher_memory = (
            crd_memory(memory, unit, batch.index, momentum=self.momentum)
            for memory, unit in zip(memories, units, strict=True)
        )
        return {"contrast": self.weight * loss}

    def draw(self, index: Tensor) -> Tensor:
        """[B, 1 + k] sample ids: the positive, then k negatives of other classes."""
        classes = self.table.labels[index]
        positive = index if self.positive == "exact" else self.table.draw_same(classes)
        return torch.cat([positive.unsqueeze(1), self.table.draw_other(classes, self.negatives)], dim=1)
