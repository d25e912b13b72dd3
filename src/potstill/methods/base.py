"""The one interface that every distillation method has."""

from torch import Tensor, nn

from potstill.types import Batch, Outputs


class Method(nn.Module):
    """What the student imitates, and how much each part counts.

    A method's ``__init__`` keywords are its options: recipes pass them by name.  It sees Outputs and Batch only: no
    model, optimizer, device or recipe.  What it needs beyond logits it declares here.
    """

    needs_teacher: bool = True
    student_taps: tuple[str, ...] = ()  # submodules of the student whose outputs are read, as in `named_modules()`
    teacher_taps: tuple[str, ...] = ()

    label_loss: nn.Module

    def __init__(self) -> None:
        super().__init__()
        # The Distiller replaces it where labels are smoothed or classes weighted.
        self.label_loss = nn.CrossEntropyLoss()

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Create adapters from one example's outputs.  Most methods have none."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """Return weighted terms by name, each a scalar; training minimises their sum."""
        raise TypeError(f"{type(self).__name__} must define forward(student, teacher, batch)")
