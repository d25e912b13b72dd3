"""Which layers of student and teacher belong together, for one method and one teacher."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.features.pairing import middle, pair
from potstill.features.stages import Anatomy, Stage, stage_at, stages
from potstill.methods.base import Method

Layers = Sequence[tuple[str, str]]  # (path in the student, path in the teacher), shallow to deep


@dataclass(frozen=True)
class Joint:
    """Maps that a method reads: paired by position, unless it asked for all of both."""

    student: tuple[Stage, ...] = ()
    teacher: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class Known:
    """A network with an example of its images and what one dry forward pass showed."""

    name: str  # "student" or "teacher", for messages
    network: nn.Module
    example: Tensor
    anatomy: Anatomy

    @classmethod
    def look(cls, name: str, network: nn.Module, example: Tensor) -> "Known":
        """Run the example through the network once."""
        return cls(name, network, example, stages(network, example))


def join(method: Method, student: Known, teacher: Known | None, layers: Layers | None = None) -> Joint:
    """The maps that ``method`` is to see.

    Args:
        method: one that looks at the networks on its own account.
        student: the network that is trained.
        teacher: one teacher; None where the method has none.
        layers: the user's own pairs in place of those found by depth and resolution.

    Raises:
        UsageError: a network without what the method needs; unknown layers.
    """
    _refuse_missing(method, student, teacher)
    choice = method.needs.maps
    if choice == "none":
        return Joint()
    if layers:
        pairs = tuple(
            (stage_at(student.network, student.example, ours), stage_at(teacher.network, teacher.example, theirs))
            if teacher is not None
            else (stage_at(student.network, student.example, ours),) * 2
            for ours, theirs in layers
        )
        chosen = {"last": pairs[-1:], "middle": pairs[(len(pairs) - 1) // 2 :][:1]}.get(choice, pairs)
        return Joint(tuple(ours for ours, _ in chosen), tuple(theirs for _, theirs in chosen) if teacher else ())
    for side in (student, teacher):
        if side is not None and not side.anatomy.stages:
            raise UsageError(
                f"{_name(method)} reads feature maps, and none were found in the {side.name} "
                f"({type(side.network).__name__}); name them with layers, or use kd"
            )
    if teacher is None:
        own = student.anatomy.stages
        return Joint({"last": own[-1:], "middle": own[(len(own) - 1) // 2 :][:1]}.get(choice, own))
    if choice == "all":
        return Joint(student.anatomy.stages, teacher.anatomy.stages)
    if choice == "last":
        return Joint(student.anatomy.stages[-1:], teacher.anatomy.stages[-1:])
    if choice == "middle":
        ours, theirs = middle(student.anatomy, teacher.anatomy)
        return Joint((ours,), (theirs,))
    pairs = pair(student.anatomy, teacher.anatomy)
    return Joint(tuple(ours for ours, _ in pairs), tuple(theirs for _, theirs in pairs))


def _refuse_missing(method: Method, student: Known, teacher: Known | None) -> None:
    """Linear heads and average pooling cannot be added from outside."""
    needs = method.needs
    for side, head in ((student, needs.student_head), (teacher, needs.teacher_head)):
        if side is None:
            continue
        path = side.anatomy.head if head else side.anatomy.embedder
        if (head or needs.embedding) and path is None:
            raise UsageError(
                f"{_name(method)} needs a last linear layer that puts out the logits, and the {side.name} "
                f"({type(side.network).__name__}) has none; methods on logits work, such as kd or dist"
            )
        if needs.pooled and head and not side.anatomy.pooled:
            raise UsageError(
                f"{_name(method)} needs a head that reads the mean of the last feature map, and that of the "
                f"{side.name} ({type(side.network).__name__}) reads something else (hidden layers, class token, "
                "or another pooling); at, on the same maps, needs no head"
            )


def _name(method: Method) -> str:
    return type(method).__name__
