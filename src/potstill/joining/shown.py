"""What a method is shown of the networks: for each of combined methods, and each teacher, the layers it asked for."""

from collections.abc import Callable
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from potstill.features.pairing import pairs_table
from potstill.features.stages import Stage
from potstill.joining.joints import Joint, Known, Layers, join
from potstill.joining.reader import Reader, Said, Wanted
from potstill.joining.teachers import Teachers
from potstill.methods.base import Method, Side
from potstill.types import Outputs

Norms = list[list[tuple[nn.BatchNorm2d | None, ...]]]  # by part, by teacher, by map


class Shown:
    """Turns what networks said into the Outputs that each part of the method asked for.

    Args:
        method: whose ``parts`` look at the networks.
        teachers: how many; 1 where there is none.
        joints: by part and teacher, the maps that are read; none where not given.
        reader: how the student is asked.
    """

    def __init__(
        self,
        method: Method,
        teachers: int,
        joints: list[list[Joint]] | None = None,
        reader: Reader | None = None,
    ) -> None:
        self.parts = [part.needs for part in method.parts]
        self.joints = joints or [[Joint()] * teachers for _ in self.parts]
        self.reader = reader or Reader()

    def by_student(self, said: Said) -> Outputs:
        """The student's outputs; ``parts`` and ``members`` differ in their maps alone."""
        shown = []
        for needs, joints in zip(self.parts, self.joints, strict=True):
            before = needs.before_activation == "both"
            members = tuple(said.outputs(joint.student, before_activation=before) for joint in joints)
            shown.append(replace(members[0], members=members))
        return replace(shown[0], parts=tuple(shown))

    def by_teachers(self, teachers: Teachers, said: list[Said]) -> Outputs:
        """The teachers' outputs; of several, the logits are combined."""
        logits, shown = teachers.combined(said), []
        for needs, joints in zip(self.parts, self.joints, strict=True):
            before = needs.before_activation != "none"
            members = tuple(
                one.outputs(joint.teacher, before_activation=before) for one, joint in zip(said, joints, strict=True)
            )
            alone = members[0] if len(members) == 1 else Outputs(logits)
            shown.append(replace(alone, members=members))
        return replace(shown[0], parts=tuple(shown))

    def norms(self, teachers: Teachers) -> Norms:
        """The BatchNorm in front of each of the teachers' maps."""
        return [
            [
                tuple(_norm(network, stage) for stage in joint.teacher)
                for network, joint in zip(teachers.networks, joints, strict=True)
            ]
            for joints in self.joints
        ]

    @property
    def table(self) -> str:
        """For people: which layers of student and teacher are joined."""
        texts = []
        for needs, joints in zip(self.parts, self.joints, strict=True):
            for joint in joints:
                if needs.maps in ("last", "middle", "pairs") and joint.teacher:
                    texts.append(pairs_table(tuple(zip(joint.student, joint.teacher, strict=True))))
        return "\n".join(dict.fromkeys(texts))


def look(
    method: Method, student: nn.Module, teachers: Teachers | None, example: Tensor, layers: Layers | None
) -> Shown:
    """Find the layers that ``method`` wants to see, by one dry forward pass of each network.

    Raises:
        UsageError: a network without what the method needs.
    """
    if not method.needs.features:
        count = 1 if teachers is None else len(teachers)
        if teachers is not None:
            teachers.readers = [Reader(Wanted(taps=method.teacher_taps)) for _ in range(count)]
        return Shown(method, count, reader=Reader(Wanted(taps=method.student_taps)))
    ours = Known.look("student", student, example)
    theirs: list[Known | None] = [None]
    if teachers is not None:
        theirs = [
            Known.look("teacher", network, convert(example))
            for network, convert in zip(teachers.networks, teachers.converts, strict=True)
        ]
    joints = [[join(part, ours, one, layers) for one in theirs] for part in method.parts]
    if teachers is not None:
        teachers.readers = [
            Reader(_wanted(method, one, [[joints_of[at].teacher] for joints_of in joints], teacher=True))
            for at, one in enumerate(theirs)
            if one is not None
        ]
    wanted = _wanted(method, ours, [[joint.student for joint in joints_of] for joints_of in joints], teacher=False)
    return Shown(method, len(theirs), joints, Reader(wanted))


def side(
    outputs: Outputs,
    stages: list[list[tuple[Stage, ...]]],
    norms: Norms | None = None,
    fresh: Callable[[], nn.Module] | None = None,
) -> Side:
    """What a method is built by; ``stages`` and ``norms``: by part and teacher."""
    parts = []
    for position, part in enumerate(outputs.parts):
        found = norms[position] if norms is not None else [()] * len(part.members)
        members = tuple(
            Side(member, of, at, fresh) for member, of, at in zip(part.members, found, stages[position], strict=True)
        )
        parts.append(Side(part, found[0], stages[position][0], fresh, members))
    return replace(parts[0], parts=tuple(parts))


def with_second(outputs: Outputs, second: Outputs) -> Outputs:
    """Outputs that also hold what the same network said of the second images."""
    parts = tuple(replace(one, second=two) for one, two in zip(outputs.parts, second.parts, strict=True))
    return replace(outputs, second=second, parts=parts)


def _wanted(method: Method, known: Known, stages: list[list[tuple[Stage, ...]]], *, teacher: bool) -> Wanted:
    """The union of what the parts ask of one network; ``stages``: by part, and by teacher for the student."""
    needs, head = method.needs, known.anatomy.head
    after: list[Stage] = []
    before: list[Stage] = []
    for part, chosen in zip(method.parts, stages, strict=True):
        wish = part.needs.before_activation
        kept = before if wish == "both" or (teacher and wish == "teacher") else after
        kept.extend(stage for each in chosen for stage in each)
    return Wanted(
        tuple(dict.fromkeys(after)),
        tuple(dict.fromkeys(before)),
        known.anatomy.embedder if needs.embedding else None,
        head if (needs.teacher_head if teacher else needs.student_head) else None,
        method.teacher_taps if teacher else method.student_taps,
    )


def _norm(network: nn.Module, stage: Stage) -> nn.BatchNorm2d | None:
    return cast(nn.BatchNorm2d, network.get_submodule(stage.norm)) if stage.norm is not None else None
