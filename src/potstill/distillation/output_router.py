"""Which layers of student and teacher belong together, and which outputs each method gets: for each of combined
methods, and each teacher, the layers that it requires.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from potstill.distillation.feature_extractor import ExtractionRequest, FeatureExtractor, ForwardOutput
from potstill.distillation.teachers import Teachers
from potstill.errors import UsageError
from potstill.features.pairing import format_pairs, middle_pair, pair_stages
from potstill.features.stages import NetworkStructure, Stage, find_stage_at, find_stages
from potstill.methods.base import Method, NetworkInfo
from potstill.types import Outputs

LayerPaths = Sequence[tuple[str, str]]  # (path in the student, path in the teacher), shallow to deep


@dataclass(frozen=True)
class FeaturePair:
    """Maps that a method reads: paired by position, unless it asked for all of both."""

    student: tuple[Stage, ...] = ()
    teacher: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class ExaminedNetwork:
    """A network with an example of its images and what one dry forward pass showed."""

    name: str  # "student" or "teacher", for messages
    network: nn.Module
    example: Tensor
    structure: NetworkStructure

    @classmethod
    def look(cls, name: str, network: nn.Module, example: Tensor) -> "ExaminedNetwork":
        """Run the example through the network once."""
        return cls(name, network, example, find_stages(network, example))


def pair_features(
    method: Method, student: ExaminedNetwork, teacher: ExaminedNetwork | None, layers: LayerPaths | None = None
) -> FeaturePair:
    """The maps that ``method`` is to see.

    Args:
        method: one that looks at the networks on its own account.
        student: the network that is trained.
        teacher: one teacher; None where the method has none.
        layers: the user's own pairs in place of those found by depth and resolution.

    Raises:
        UsageError: a network without what the method needs; unknown layers.
    """
    _require_head(method, student, teacher)
    choice = method.needs.maps
    if choice == "none":
        return FeaturePair()
    if layers:
        pairs = tuple(
            (
                find_stage_at(student.network, student.example, ours),
                find_stage_at(teacher.network, teacher.example, theirs),
            )
            if teacher is not None
            else (find_stage_at(student.network, student.example, ours),) * 2
            for ours, theirs in layers
        )
        chosen = {"last": pairs[-1:], "middle": pairs[(len(pairs) - 1) // 2 :][:1]}.get(choice, pairs)
        return FeaturePair(tuple(ours for ours, _ in chosen), tuple(theirs for _, theirs in chosen) if teacher else ())
    for side in (student, teacher):
        if side is not None and not side.structure.stages:
            raise UsageError(
                f"{_method_name(method)} reads feature maps, and none were found in the {side.name} "
                f"({type(side.network).__name__}); name them with layers, or use kd"
            )
    if teacher is None:
        own = student.structure.stages
        return FeaturePair({"last": own[-1:], "middle": own[(len(own) - 1) // 2 :][:1]}.get(choice, own))
    if choice == "all":
        return FeaturePair(student.structure.stages, teacher.structure.stages)
    if choice == "last":
        return FeaturePair(student.structure.stages[-1:], teacher.structure.stages[-1:])
    if choice == "middle":
        ours, theirs = middle_pair(student.structure, teacher.structure)
        return FeaturePair((ours,), (theirs,))
    pairs = pair_stages(student.structure, teacher.structure)
    return FeaturePair(tuple(ours for ours, _ in pairs), tuple(theirs for _, theirs in pairs))


def _require_head(method: Method, student: ExaminedNetwork, teacher: ExaminedNetwork | None) -> None:
    """Linear heads and average pooling cannot be added from outside."""
    needs = method.needs
    for side, head in ((student, needs.student_head), (teacher, needs.teacher_head)):
        if side is None:
            continue
        path = side.structure.head if head else side.structure.embedder
        if (head or needs.embedding) and path is None:
            raise UsageError(
                f"{_method_name(method)} needs a last linear layer that puts out the logits, and the {side.name} "
                f"({type(side.network).__name__}) has none; methods on logits work, such as kd or dist"
            )
        if needs.pooled and head and not side.structure.pooled:
            raise UsageError(
                f"{_method_name(method)} needs a head that reads the mean of the last feature map, and that of the "
                f"{side.name} ({type(side.network).__name__}) reads something else (hidden layers, class token, "
                "or another pooling); at, on the same maps, needs no head"
            )


def _method_name(method: Method) -> str:
    return type(method).__name__


BatchNorms = list[list[tuple[nn.BatchNorm2d | None, ...]]]  # by part, by teacher, by map


class OutputRouter:
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
        feature_pairs: list[list[FeaturePair]] | None = None,
        reader: FeatureExtractor | None = None,
    ) -> None:
        self.parts = [part.needs for part in method.parts]
        self.feature_pairs = feature_pairs or [[FeaturePair()] * teachers for _ in self.parts]
        self.reader = reader or FeatureExtractor()

    def outputs_of_student(self, said: ForwardOutput) -> Outputs:
        """The student's outputs; ``parts`` and ``members`` differ in their maps alone."""
        shown = []
        for needs, feature_pairs in zip(self.parts, self.feature_pairs, strict=True):
            before = needs.before_activation == "both"
            members = tuple(said.outputs(joint.student, before_activation=before) for joint in feature_pairs)
            shown.append(replace(members[0], members=members))
        return replace(shown[0], parts=tuple(shown))

    def outputs_of_teachers(self, teachers: Teachers, said: list[ForwardOutput]) -> Outputs:
        """The teachers' outputs; of several, the logits are combined."""
        logits, shown = teachers.combined(said), []
        for needs, feature_pairs in zip(self.parts, self.feature_pairs, strict=True):
            before = needs.before_activation != "none"
            members = tuple(
                one.outputs(joint.teacher, before_activation=before)
                for one, joint in zip(said, feature_pairs, strict=True)
            )
            alone = members[0] if len(members) == 1 else Outputs(logits)
            shown.append(replace(alone, members=members))
        return replace(shown[0], parts=tuple(shown))

    def norms(self, teachers: Teachers) -> BatchNorms:
        """The BatchNorm in front of each of the teachers' maps."""
        return [
            [
                tuple(_norm_of_stage(network, stage) for stage in joint.teacher)
                for network, joint in zip(teachers.networks, feature_pairs, strict=True)
            ]
            for feature_pairs in self.feature_pairs
        ]

    @property
    def table(self) -> str:
        """For people: which layers of student and teacher are joined."""
        texts = []
        for needs, feature_pairs in zip(self.parts, self.feature_pairs, strict=True):
            for joint in feature_pairs:
                if needs.maps in ("last", "middle", "pairs") and joint.teacher:
                    texts.append(format_pairs(tuple(zip(joint.student, joint.teacher, strict=True))))
        return "\n".join(dict.fromkeys(texts))


def build_output_router(
    method: Method, student: nn.Module, teachers: Teachers | None, example: Tensor, layers: LayerPaths | None
) -> OutputRouter:
    """Find the layers that ``method`` wants to see, by one dry forward pass of each network.

    Raises:
        UsageError: a network without what the method needs.
    """
    if not method.needs.features:
        count = 1 if teachers is None else len(teachers)
        if teachers is not None:
            teachers.readers = [FeatureExtractor(ExtractionRequest(taps=method.teacher_taps)) for _ in range(count)]
        return OutputRouter(method, count, reader=FeatureExtractor(ExtractionRequest(taps=method.student_taps)))
    ours = ExaminedNetwork.look("student", student, example)
    theirs: list[ExaminedNetwork | None] = [None]
    if teachers is not None:
        theirs = [
            ExaminedNetwork.look("teacher", network, convert(example))
            for network, convert in zip(teachers.networks, teachers.input_converters, strict=True)
        ]
    feature_pairs = [[pair_features(part, ours, one, layers) for one in theirs] for part in method.parts]
    if teachers is not None:
        teachers.readers = [
            FeatureExtractor(
                _extraction_request(method, one, [[joints_of[at].teacher] for joints_of in feature_pairs], teacher=True)
            )
            for at, one in enumerate(theirs)
            if one is not None
        ]
    wanted = _extraction_request(
        method, ours, [[joint.student for joint in joints_of] for joints_of in feature_pairs], teacher=False
    )
    return OutputRouter(method, len(theirs), feature_pairs, FeatureExtractor(wanted))


def network_info(
    outputs: Outputs,
    stages: list[list[tuple[Stage, ...]]],
    norms: BatchNorms | None = None,
    fresh: Callable[[], nn.Module] | None = None,
) -> NetworkInfo:
    """What a method is built by; ``stages`` and ``norms``: by part and teacher."""
    parts = []
    for position, part in enumerate(outputs.parts):
        found = norms[position] if norms is not None else [()] * len(part.members)
        members = tuple(
            NetworkInfo(member, of, at, fresh)
            for member, of, at in zip(part.members, found, stages[position], strict=True)
        )
        parts.append(NetworkInfo(part, found[0], stages[position][0], fresh, members))
    return replace(parts[0], parts=tuple(parts))


def attach_second_outputs(outputs: Outputs, second: Outputs) -> Outputs:
    """Outputs that also hold what the same network said of the second images."""
    parts = tuple(replace(one, second=two) for one, two in zip(outputs.parts, second.parts, strict=True))
    return replace(outputs, second=second, parts=parts)


def _extraction_request(
    method: Method, known: ExaminedNetwork, stages: list[list[tuple[Stage, ...]]], *, teacher: bool
) -> ExtractionRequest:
    """The union of what the parts ask of one network; ``stages``: by part, and by teacher for the student."""
    needs, head = method.needs, known.structure.head
    after: list[Stage] = []
    before: list[Stage] = []
    for part, chosen in zip(method.parts, stages, strict=True):
        wish = part.needs.before_activation
        kept = before if wish == "both" or (teacher and wish == "teacher") else after
        kept.extend(stage for each in chosen for stage in each)
    return ExtractionRequest(
        tuple(dict.fromkeys(after)),
        tuple(dict.fromkeys(before)),
        known.structure.embedder if needs.embedding else None,
        head if (needs.teacher_head if teacher else needs.student_head) else None,
        method.teacher_taps if teacher else method.student_taps,
    )


def _norm_of_stage(network: nn.Module, stage: Stage) -> nn.BatchNorm2d | None:
    return cast(nn.BatchNorm2d, network.get_submodule(stage.norm)) if stage.norm is not None else None
