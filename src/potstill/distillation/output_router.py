"""Pair layers of student and teachers, and give each part of a method the outputs that it requires."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from potstill.distillation.teachers import ExtractionRequest, FeatureExtractor, ForwardOutput, Teachers
from potstill.errors import UsageError
from potstill.features.stages import NetworkStructure, Stage, find_stage_at, find_stages
from potstill.formatting import format_columns
from potstill.methods.base import Method, NetworkInfo
from potstill.types import Outputs

LayerPaths = Sequence[tuple[str, str]]  # (path in the student, path in the teacher), shallow to deep


@dataclass(frozen=True)
class FeaturePair:
    """Stages whose maps a method reads: paired by position, unless it requires all of both networks."""

    student: tuple[Stage, ...] = ()
    teacher: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class ExaminedNetwork:
    """A network with example images and the structure that one forward pass found."""

    name: str  # "student" or "teacher", for messages
    network: nn.Module
    example: Tensor
    structure: NetworkStructure

    @classmethod
    def examine(cls, name: str, network: nn.Module, example: Tensor) -> "ExaminedNetwork":
        """Find the structure by one forward pass of the example."""
        return cls(name, network, example, find_stages(network, example))


def pair_features(
    method: Method, student: ExaminedNetwork, teacher: ExaminedNetwork | None, layers: LayerPaths | None = None
) -> FeaturePair:
    """Return the stages whose maps ``method`` reads: ``layers``, or those found by depth and resolution."""
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
    for network in (student, teacher):
        if network is not None and not network.structure.stages:
            raise UsageError(
                f"{method.label} reads feature maps, and none were found in the {network.name} "
                f"({type(network.network).__name__}); name them with layers, or use kd"
            )
    if teacher is None:
        stages = student.structure.stages
        return FeaturePair({"last": stages[-1:], "middle": stages[(len(stages) - 1) // 2 :][:1]}.get(choice, stages))
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
    """Refuse networks without the linear head or the average pooling that the method needs."""
    needs = method.needs
    for network, head in ((student, needs.student_head), (teacher, needs.teacher_head)):
        if network is None:
            continue
        path = network.structure.head if head else network.structure.embedder
        if (head or needs.embedding) and path is None:
            raise UsageError(
                f"{method.label} needs a last linear layer that computes the logits, and the {network.name} "
                f"({type(network.network).__name__}) has none; methods on logits work, such as kd or dist"
            )
        if needs.pooled and head and network.structure.inactive:
            raise UsageError(
                f"{method.label} reads the features before the head, and those of the {network.name} "
                f"({type(network.network).__name__}) are all 0: its units no longer respond to any image; train it "
                "again, with a lower learning rate, or take another network"
            )
        if needs.pooled and head and not network.structure.pooled:
            raise UsageError(
                f"{method.label} needs a head that reads the mean of the last feature map, and that of the "
                f"{network.name} ({type(network.network).__name__}) reads something else (hidden layers, class token, "
                "or another pooling); at, on the same maps, needs no head"
            )


BatchNorms = list[list[tuple[nn.BatchNorm2d | None, ...]]]  # by part, by teacher, by map


class OutputRouter:
    """Converts outputs of forward passes to the ``Outputs`` that each of the method's ``parts`` requires."""

    def __init__(
        self,
        method: Method,
        teachers: int,
        feature_pairs: list[list[FeaturePair]] | None = None,
        extractor: FeatureExtractor | None = None,
    ) -> None:
        self.parts = [part.needs for part in method.parts]
        self.feature_pairs = feature_pairs or [[FeaturePair()] * teachers for _ in self.parts]
        self.extractor = extractor or FeatureExtractor()

    def student_outputs(self, output: ForwardOutput) -> Outputs:
        """Return the student's outputs; ``parts`` and ``members`` differ only in their maps."""
        parts = []
        for needs, feature_pairs in zip(self.parts, self.feature_pairs, strict=True):
            before = needs.before_activation == "both"
            members = tuple(output.outputs(pair.student, before_activation=before) for pair in feature_pairs)
            parts.append(replace(members[0], members=members))
        return replace(parts[0], parts=tuple(parts))

    def teacher_outputs(
        self, teachers: Teachers, outputs: list[ForwardOutput], second: list[ForwardOutput] | None = None
    ) -> Outputs:
        """Return the teachers' outputs, new or cached; the logits of several are combined."""
        if second is not None:
            return attach_second_outputs(
                self.teacher_outputs(teachers, outputs), self.teacher_outputs(teachers, second)
            )
        logits, parts = teachers.combine_logits(outputs), []
        for needs, feature_pairs in zip(self.parts, self.feature_pairs, strict=True):
            before = needs.before_activation != "none"
            members = tuple(
                output.outputs(pair.teacher, before_activation=before)
                for output, pair in zip(outputs, feature_pairs, strict=True)
            )
            combined = members[0] if len(members) == 1 else Outputs(logits)
            parts.append(replace(combined, members=members))
        return replace(parts[0], parts=tuple(parts))

    def batch_norms(self, teachers: Teachers) -> BatchNorms:
        """Return the BatchNorm before each of the teachers' maps; None for a map without one."""
        return [
            [
                tuple(_norm_of_stage(network, stage) for stage in pair.teacher)
                for network, pair in zip(teachers.networks, feature_pairs, strict=True)
            ]
            for feature_pairs in self.feature_pairs
        ]

    @property
    def table(self) -> str:
        """Which layers of student and teacher are paired, as text."""
        texts = []
        for needs, feature_pairs in zip(self.parts, self.feature_pairs, strict=True):
            for pair in feature_pairs:
                if needs.maps in ("last", "middle", "pairs") and pair.teacher:
                    texts.append(format_pairs(tuple(zip(pair.student, pair.teacher, strict=True))))
        return "\n".join(dict.fromkeys(texts))


def build_output_router(
    method: Method, student: nn.Module, teachers: Teachers | None, example: Tensor, layers: LayerPaths | None
) -> OutputRouter:
    """Return the router for the layers that ``method`` reads; sets the teachers' extractors."""
    if not method.needs.features:
        count = 1 if teachers is None else len(teachers)
        if teachers is not None:
            teachers.extractors = [FeatureExtractor(ExtractionRequest(taps=method.teacher_taps)) for _ in range(count)]
        return OutputRouter(method, count, extractor=FeatureExtractor(ExtractionRequest(taps=method.student_taps)))
    ours = ExaminedNetwork.examine("student", student, example)
    theirs: list[ExaminedNetwork | None] = [None]
    if teachers is not None:
        theirs = [
            ExaminedNetwork.examine("teacher", network, convert(example))
            for network, convert in zip(teachers.networks, teachers.input_converters, strict=True)
        ]
    feature_pairs = [[pair_features(part, ours, one, layers) for one in theirs] for part in method.parts]
    if teachers is not None:
        teachers.extractors = [
            FeatureExtractor(
                _extraction_request(method, one, [[pairs[at].teacher] for pairs in feature_pairs], teacher=True)
            )
            for at, one in enumerate(theirs)
            if one is not None
        ]
    stages = [[pair.student for pair in pairs] for pairs in feature_pairs]
    request = _extraction_request(method, ours, stages, teacher=False)
    return OutputRouter(method, len(theirs), feature_pairs, FeatureExtractor(request))


def network_info(
    outputs: Outputs,
    stages: list[list[tuple[Stage, ...]]],
    batch_norms: BatchNorms | None = None,
    untrained_copy: Callable[[], nn.Module] | None = None,
) -> NetworkInfo:
    """Return the information that a method is built from; ``stages`` and ``batch_norms`` are by part and teacher."""
    parts = []
    for position, part in enumerate(outputs.parts):
        norms = batch_norms[position] if batch_norms is not None else [()] * len(part.members)
        members = tuple(
            NetworkInfo(member, member_norms, member_stages, untrained_copy)
            for member, member_norms, member_stages in zip(part.members, norms, stages[position], strict=True)
        )
        parts.append(NetworkInfo(part, norms[0], stages[position][0], untrained_copy, members))
    return replace(parts[0], parts=tuple(parts))


def attach_second_outputs(outputs: Outputs, second: Outputs) -> Outputs:
    """Return the outputs together with the same network's outputs for the second images."""
    parts = tuple(replace(one, second=two) for one, two in zip(outputs.parts, second.parts, strict=True))
    return replace(outputs, second=second, parts=parts)


def _extraction_request(
    method: Method, network: ExaminedNetwork, stages: list[list[tuple[Stage, ...]]], *, teacher: bool
) -> ExtractionRequest:
    """Return what all parts together read of one network; ``stages``: by part, and by teacher for the student."""
    needs, head = method.needs, network.structure.head
    after: list[Stage] = []
    before: list[Stage] = []
    for part, chosen in zip(method.parts, stages, strict=True):
        networks = part.needs.before_activation
        reads_before = networks == "both" or (teacher and networks == "teacher")
        (before if reads_before else after).extend(stage for each in chosen for stage in each)
    return ExtractionRequest(
        tuple(dict.fromkeys(after)),
        tuple(dict.fromkeys(before)),
        network.structure.embedder if needs.embedding else None,
        head if (needs.teacher_head if teacher else needs.student_head) else None,
        method.teacher_taps if teacher else method.student_taps,
    )


def _norm_of_stage(network: nn.Module, stage: Stage) -> nn.BatchNorm2d | None:
    return cast(nn.BatchNorm2d, network.get_submodule(stage.norm)) if stage.norm is not None else None


StagePair = tuple[Stage, Stage]  # the student's, the teacher's


def pair_stages(student: NetworkStructure, teacher: NetworkStructure) -> tuple[StagePair, ...]:
    """Pair every stage of the network with fewer stages with one of the other network, shallow to deep.

    The last belongs to the last.  Before it, partners are those whose resolutions differ least, in halvings relative to
    each network's image; where that leaves a choice, those at the most similar relative depth.
    """
    fewer, more = sorted((student, teacher), key=lambda structure: len(structure.stages))
    if not fewer.stages:
        raise UsageError("no feature maps were found to be paired; name layers by their paths")
    count = len(fewer.stages) - 1
    chosen = min(
        itertools.combinations(range(len(more.stages) - 1), count),
        key=lambda positions: _mismatch(fewer, more, positions),
    )
    partners = [*(more.stages[position] for position in chosen), more.stages[-1]]
    ordered = zip(fewer.stages, partners, strict=True)
    return tuple(ordered) if fewer is student else tuple((ours, theirs) for theirs, ours in ordered)


def middle_pair(student: NetworkStructure, teacher: NetworkStructure) -> StagePair:
    """Return the middle pair (the shallower of two), as in FitNet's published results."""
    pairs = pair_stages(student, teacher)
    return pairs[(len(pairs) - 1) // 2]


def format_pairs(pairs: Sequence[StagePair]) -> str:
    """Describe the paths and shapes [C, H, W] of each pair, and the ratio of their sizes.

    Example:
        >>> small, large = Stage("stage2", 32, 8, 8, "NCHW"), Stage("blocks.5", 192, 4, 4, "tokens", 1)
        >>> print(format_pairs([(small, large)]))
        student          teacher                channels  size
        stage2 [32,8,8]  blocks.5 [192,4,4] tokens  x 6       x 0.5
    """
    rows = [("student", "teacher", "channels", "size")]
    rows += [
        (
            _format_stage(ours),
            _format_stage(theirs),
            f"x {theirs.channels / ours.channels:.3g}",
            _ratio(theirs.height / ours.height, theirs.width / ours.width),
        )
        for ours, theirs in pairs
    ]
    return "\n".join(format_columns(rows, left=range(4)))


def _format_stage(stage: Stage) -> str:
    text = f"{stage.path} [{stage.channels},{stage.height},{stage.width}]"
    return text if stage.layout == "NCHW" else f"{text} {stage.layout}"


def _ratio(high: float, wide: float) -> str:
    return f"x {high:.3g}" if high == wide else f"x {high:.3g}, {wide:.3g}"


def _mismatch(fewer: NetworkStructure, more: NetworkStructure, positions: Sequence[int]) -> tuple[float, float]:
    resolution = depth = 0.0
    for place, position in enumerate(positions):
        resolution += abs(_halvings(fewer, place) - _halvings(more, position))
        depth += abs((place + 1) / len(fewer.stages) - (position + 1) / len(more.stages))
    return round(resolution, 3), depth


def _halvings(structure: NetworkStructure, position: int) -> float:
    """Return how often the image was halved to this size."""
    stage, (height, width) = structure.stages[position], structure.image
    if height and width:
        return math.log2(height * width / (stage.height * stage.width)) / 2
    return -math.log2(stage.height * stage.width) / 2
