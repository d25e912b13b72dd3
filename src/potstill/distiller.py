"""The wrapper: one student, perhaps a frozen teacher, and the method that joins them."""

from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.inputs import Convert, InputSpec
from potstill.methods.base import Method
from potstill.precision import at_least_float32
from potstill.taps import tap
from potstill.types import Batch, Outputs, Step


class Distiller(nn.Module):
    """Train ``student`` to imitate ``teacher`` by ``method``, in anybody's loop.

    The teacher is frozen: always in eval mode, without gradients, and left out of the state dict.  The student is the
    module that was passed in; use it alone after training.

    Args:
        student: maps images [B, 3, H, W] to logits [B, K]; this is what is trained.
        teacher: likewise; None where the method needs none.  Its parameters stop requiring gradients.
        method: see ``potstill.methods``.
        example: images like those of training (two or more); needed by methods with adapters, which are sized by it.
        student_input: how ``images`` are prepared.
        teacher_input: how the teacher wants them; images are renormalised and resized from the one to the other.
        label_loss: replaces plain cross-entropy in the method's label term (smoothing, class weights).

    Raises:
        UsageError: no teacher where one is needed, no example where one is needed, only one of the two input specs.

    Example:
        >>> from potstill.methods.kd import KD
        >>> student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(2))
        >>> distiller = Distiller(student, teacher, KD(temperature=2.0, alpha=0.5))
        >>> step = distiller(torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))
        >>> sorted(step.terms), step.loss.shape
        (['ce', 'kd'], torch.Size([]))
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        method: Method,
        *,
        example: Tensor | None = None,
        student_input: InputSpec | None = None,
        teacher_input: InputSpec | None = None,
        label_loss: nn.Module | None = None,
    ) -> None:
        super().__init__()
        name = type(method).__name__
        if method.needs_teacher and teacher is None:
            raise UsageError(f"{name} needs a teacher, got None")
        if (student_input is None) != (teacher_input is None) and method.needs_teacher:
            raise UsageError("give both student_input and teacher_input, or neither where both networks want the same")
        self.student = student
        self.teacher = teacher.requires_grad_(False) if teacher is not None and method.needs_teacher else None
        self.method = method
        if label_loss is not None:
            method.label_loss = label_loss
        self.convert: nn.Module = nn.Identity()
        if self.teacher is not None and student_input is not None and teacher_input is not None:
            self.convert = Convert(student_input, teacher_input)
        self._build(example)
        self.train()
        self.register_state_dict_post_hook(_forget_teacher)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_expect_no_teacher)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> "Distiller":
        """As ``nn.Module.train``, but the teacher stays in eval mode: its BatchNorm statistics must not drift."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        index: Tensor | None = None,
        view: Tensor | None = None,
        teacher: Outputs | None = None,
    ) -> Step:
        """One forward pass.

        Args:
            images: [B, 3, H, W], prepared for the student.
            labels: [B], int64.
            index: [B], int64 sample ids, for methods with a memory.
            view: [B], int64 view numbers.
            teacher: what the teacher says of these very images where it is known already; else the teacher is asked.

        Raises:
            UsageError: logits or labels of a wrong shape; student and teacher with different numbers of classes.
        """
        student = _ask(self.student, images, self.method.student_taps)
        if teacher is None:
            teacher = self.ask_teacher(images)
        _check_shapes(student, teacher, labels)
        return Step(student.logits, self.method(student, teacher, Batch(images, labels, index, view)))

    @torch.no_grad()
    def ask_teacher(self, images: Tensor) -> Outputs | None:
        """The teacher's outputs for images prepared for the student; None where the method needs no teacher."""
        if self.teacher is None:
            return None
        if self.teacher.training:  # somebody called teacher.train() behind our back
            self.teacher.eval()
        return _ask(self.teacher, self.convert(images), self.method.teacher_taps)

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters for the optimizer: the student's and the method's adapters'."""
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]

    @torch.no_grad()
    def _build(self, example: Tensor | None) -> None:
        if not (self.method.student_taps or self.method.teacher_taps):
            return
        if example is None:
            raise UsageError(f"{type(self.method).__name__} sizes its adapters by an example: pass example=images")
        self.eval()  # so that the example leaves no trace in BatchNorm
        self.method.build(_ask(self.student, example, self.method.student_taps), self.ask_teacher(example))
        self.method.to(example.device)


def _ask(model: nn.Module, images: Tensor, taps: tuple[str, ...]) -> Outputs:
    with tap(model, taps) as features:
        logits = model(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"{type(model).__name__} must return logits [B, K], got {shape}")
    return Outputs(at_least_float32(logits), features)


def _check_shapes(student: Outputs, teacher: Outputs | None, labels: Tensor) -> None:
    if labels.shape != student.logits.shape[:1] or labels.dtype != torch.int64:
        wanted = f"int64 [{len(student.logits)}]"
        raise UsageError(f"labels must be {wanted}, got {labels.dtype} {list(labels.shape)}")
    if teacher is not None and teacher.logits.shape != student.logits.shape:
        raise UsageError(
            f"teacher and student disagree: logits {list(teacher.logits.shape)} and {list(student.logits.shape)}; "
            "both must know the same classes in the same order"
        )


def _forget_teacher(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}teacher.")]:
        del state[key]


def _expect_no_teacher(module: nn.Module, incompatible: Any) -> None:
    if isinstance(module, Distiller) and module.teacher is not None:
        expected = tuple(f".teacher.{key}" for key in module.teacher.state_dict())
        # The Distiller may sit inside another module, whose prefix the keys then carry.
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not f".{key}".endswith(expected)]
