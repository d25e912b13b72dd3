"""The one interface that every distillation method has."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.features.stages import Stage
from potstill.methods.requirements import Requirements
from potstill.types import Batch, Outputs

TeacherPasses = Callable[[], Iterator[tuple[Outputs, Batch]]]


@dataclass(frozen=True)
class NetworkInfo:
    """What a method may know of the student or the teacher when it is built."""

    outputs: Outputs  # of an example batch: adapters are sized by it
    norms: tuple[nn.BatchNorm2d | None, ...] = ()  # in front of each map; None where there is none
    stages: tuple[Stage, ...] = ()  # where each map is read
    fresh: Callable[[], nn.Module] | None = None  # an untrained copy of the network, where needed
    members: "tuple[NetworkInfo, ...]" = ()  # one for each teacher
    parts: "tuple[NetworkInfo, ...]" = ()  # where methods are combined: one for each of them


@dataclass(frozen=True)
class TrainingInfo:
    """What a method may know of the training to come."""

    classes: int
    labels: Tensor | None = None  # [N], int64, of the training set by sample id
    batch_size: int | None = None


class Method(nn.Module):
    """What the student imitates, and how much each part counts.

    A method's ``__init__`` keywords are its options: recipes pass them by name.  It sees Outputs and Batch only: no
    model that it does not own, no optimizer, device or recipe.  What it needs beyond logits it declares in ``needs``.
    """

    needs: Requirements = Requirements()
    student_taps: tuple[str, ...] = ()  # submodules whose outputs are read into ``Outputs.features``, by path
    teacher_taps: tuple[str, ...] = ()

    FIXED: ClassVar[tuple[str, ...]] = ()  # options that take effect when the method is built, and no longer

    label_loss: nn.Module
    ce_weight: float = 1.0
    epoch: int | None = None  # from 0; None: nobody has said yet where training stands
    epochs: int | None = None
    _unchecked = True  # no training step so far

    def __init__(self, *, ce_weight: float = 1.0) -> None:
        super().__init__()
        self.ce_weight = ce_weight
        # The Distiller replaces it where labels are smoothed or classes weighted.
        self.label_loss = nn.CrossEntropyLoss()

    @property
    def label_term_names(self) -> frozenset[str]:
        """Which terms come from labels alone."""
        return frozenset({"ce"})

    @property
    def soft_temperature(self) -> float | None:
        """T, where the teacher's logits are read through ``softmax(z / T)`` alone, so that the largest of them and the
        mass of the others say nearly everything; None: they are read in other ways too.
        """
        return None

    @property
    def parts(self) -> "tuple[Method, ...]":
        """The methods that read the networks on their own account; more than one where methods are combined."""
        return (self,)

    @property
    def staged(self) -> bool:
        """Whether the terms themselves, and not only their weights, change with the epochs."""
        return False

    @property
    def warmup_length(self) -> float:
        """Epochs after which every term has its full weight; 0 where all have it from the first on."""
        return float(getattr(self, "warmup_epochs", 0))

    def for_teachers(self, shares: Sequence[float]) -> "Method":
        """The method for several teachers, each with its share; see ``wrapping.per_teacher``, which calls this first.

        Raises:
            UsageError: it can do with one only.
        """
        return self

    def use_label_loss(self, loss: nn.Module) -> None:
        """Replace plain cross-entropy, here and in every method inside this one."""
        for module in list(self.modules()):
            if isinstance(module, Method):
                module.label_loss = loss

    def build(self, student: NetworkInfo, teacher: NetworkInfo | None, training: TrainingInfo) -> None:
        """Create adapters and memories, sized by an example's outputs.  Most methods have none.

        Raises:
            UsageError: these networks cannot be joined by this method; says why and which method can.
        """

    def modify_student(
        self, student: nn.Module, student_side: NetworkInfo, teacher_side: NetworkInfo | None
    ) -> nn.Module:
        """The network that is trained and deployed in the student's place: the student itself, but for few methods."""
        return student

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Training is about to begin its epoch number ``epoch``, counted from 0, of ``epochs``."""
        self.epoch, self.epochs = epoch, epochs

    def prepare(self, passes: TeacherPasses) -> None:
        """Learn from the teacher's outputs alone, before training; each call of ``passes`` is one pass."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """Weighted terms by name, each a scalar; training minimises their sum.

        No method overrides it: ``label_terms`` and ``distill`` are all that a method around another calls.

        Raises:
            UsageError: at the first training step, a schedule that names no term.
        """
        terms = self.label_terms(student, batch) | self.distill(student, teacher, batch)
        if self.training and self._unchecked:
            self._unchecked = False
            if not self.staged:
                self.refuse_idle_schedules()
        return terms

    def refuse_idle_schedules(self) -> None:
        """Check that every scheduled factor, here and in every method inside this one, has been applied to a term.

        Raises:
            UsageError: one names a term that does not exist, or that does not count where its method stands.
        """
        for module in self.modules():
            if isinstance(module, Method) and (problem := module.idle_schedule()):
                raise UsageError(problem)

    def idle_schedule(self) -> str:
        """What is wrong with this method's own schedule, judged by the terms so far; empty where nothing is."""
        return ""

    def label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        """What the labels say; nothing where their weight is 0."""
        if self.ce_weight == 0:
            return {}
        return {"ce": self.ce_weight * self.label_loss(student.logits, batch.targets)}

    def plain_label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy alone, for images that are not those of training."""
        return {"ce": (self.ce_weight or 1.0) * self.label_loss(student.logits, batch.targets)}

    def distill(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """Every other term.  This is what a method defines."""
        return {}

    def warmup(self, length: float) -> float:
        """A weight's factor that rises evenly to 1 within ``length`` epochs: 1/length in the first (mdistiller's
        count; repositories that count from 0 give the first epoch no weight at all).
        """
        return 1.0 if length <= 0 else min((self.progress + 1) / length, 1.0)

    @property
    def progress(self) -> int:
        """The epoch, from 0.

        Raises:
            UsageError: nobody has said; a warm-up would silently stay at its start for ever.
        """
        if self.epoch is None:
            raise UsageError(
                f"{type(self).__name__} changes with the epochs: call distiller.start_epoch(epoch, epochs) at the "
                "start of each, counted from 0"
            )
        return self.epoch
