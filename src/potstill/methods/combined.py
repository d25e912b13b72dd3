"""Combined: a weighted sum of several methods.

The published combinations are sums of this kind: CRD + KD (Tian et al., "Contrastive Representation Distillation",
ICLR 2020, https://arxiv.org/abs/1910.10699), ReviewKD + DKD, WKD-L + WKD-F.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.methods import create_method
from potstill.methods.base import Method, NetworkInfo, TeacherPasses, TrainingInfo
from potstill.methods.ls import LS
from potstill.methods.requirements import Requirements
from potstill.methods.wrappers import MethodWrapper, refuse_idle_label_weight, wrap_per_teacher
from potstill.options import MethodSettings, NonNegative, option
from potstill.types import Batch, Outputs


class Combined(Method):
    """``ce_weight * CE`` plus each method's other terms times its factor.

    The methods' own label terms do not count: there is one cross-entropy.
    """

    name = "combined"

    methods: list[MethodSettings] = option(
        doc="each a mapping with ``name``, its options (its own weight among them), and ``factor`` (1 where not "
        "given), by which all of its terms are multiplied. KD's alpha still counts: its term weighs 1 - alpha.",
    )
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    def __post_init__(self) -> None:
        if len(self.methods) < 2:
            raise UsageError(f"combined needs two methods or more, got {len(self.methods)}")
        self.factors = [float(settings.get("factor", 1.0)) for settings in self.methods]
        self.names = [str(settings["name"]) for settings in self.methods]
        self.inner = nn.ModuleList(
            create_method(**{key: value for key, value in settings.items() if key != "factor"})
            for settings in self.methods
        )
        for settings, method in zip(self.methods, self.each(), strict=True):
            name = settings["name"]
            if len(method.parts) > 1 or not _has_plain_label_terms(method):
                raise UsageError(f"{name} decides over the label term itself and cannot be combined with other methods")
            refuse_idle_label_weight(settings, method, "combined")
        self.needs = _union_of_requirements([method.needs for method in self.each()])
        self.student_taps = tuple(dict.fromkeys(path for method in self.each() for path in method.student_taps))
        self.teacher_taps = tuple(dict.fromkeys(path for method in self.each() for path in method.teacher_taps))

    @property
    def label(self) -> str:
        return " + ".join(method.label for method in self.each())

    @property
    def label_term_names(self) -> frozenset[str]:
        return frozenset({"ce"}).union(*(method.label_term_names for method in self.each()))

    def each(self) -> list[Method]:
        """The methods."""
        return [method for method in self.inner if isinstance(method, Method)]

    @property
    def parts(self) -> tuple[Method, ...]:
        return tuple(method.parts[0] for method in self.each())

    @property
    def staged(self) -> bool:
        return any(method.staged for method in self.each())

    def warmup_length(self, epochs: int) -> float:
        return max(method.warmup_length(epochs) for method in self.each())

    def for_teachers(self, shares: Sequence[float]) -> Method:
        self.inner = nn.ModuleList(wrap_per_teacher(method, shares) for method in self.each())
        return self

    def build(self, student: NetworkInfo, teacher: Any, training: TrainingInfo) -> None:
        for position, method in enumerate(self.each()):
            method.build(student.parts[position], teacher.parts[position] if teacher else None, training)

    def modify_student(self, student: nn.Module, student_side: NetworkInfo, teacher_side: Any) -> nn.Module:
        for position, method in enumerate(self.each()):
            theirs = teacher_side.parts[position] if teacher_side else None
            student = method.modify_student(student, student_side.parts[position], theirs)
        # Some lie inside the new network.
        self.student_taps = tuple(dict.fromkeys(path for method in self.each() for path in method.student_taps))
        return student

    def start_epoch(self, epoch: int, epochs: int) -> None:
        super().start_epoch(epoch, epochs)
        for method in self.each():
            method.start_epoch(epoch, epochs)

    def prepare(self, passes: TeacherPasses) -> None:
        for position, method in enumerate(self.each()):
            if method.needs.prepare:
                method.prepare(lambda at=position: ((_part_outputs(outputs, at), batch) for outputs, batch in passes()))  # type: ignore[misc]

    def distill(self, student: Outputs, teacher: Any, batch: Batch) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        for position, (name, method, factor) in enumerate(zip(self.names, self.each(), self.factors, strict=True)):
            found = method.distill(
                _part_outputs(student, position),
                _part_outputs(teacher, position) if teacher is not None else None,
                batch,
            )
            for term, value in found.items():
                key = term if term not in terms else f"{name}_{term}"
                terms[key if key not in terms else f"{key}_{position + 1}"] = factor * value
        return terms


def _part_outputs(outputs: Outputs, position: int) -> Outputs:
    """Where the teacher's outputs come from elsewhere, they are logits, the same for all."""
    return outputs.parts[position] if outputs.parts else outputs


def _has_plain_label_terms(method: Method) -> bool:
    """Whether the combination's own cross-entropy may stand in for the method's."""
    if isinstance(method, MethodWrapper) and not isinstance(method, LS):
        return _has_plain_label_terms(method.inner)
    return type(method).label_terms in (Method.label_terms, LS.label_terms)


def _union_of_requirements(needs: list[Requirements]) -> Requirements:
    seconds = {need.second for need in needs} - {"none"}
    if len(seconds) > 1:
        raise UsageError("these methods want different second images (a strong view; one of the same class)")
    flags: dict[str, Any] = {
        field.name: any(getattr(need, field.name) for need in needs)
        for field in fields(Requirements)
        if isinstance(field.default, bool)
    }
    flags["second_gradient"] = any(need.second_gradient for need in needs if need.second != "none")
    maps = [need.maps for need in needs if need.maps != "none"]
    return Requirements(**flags, maps=maps[0] if maps else "none", second=seconds.pop() if seconds else "none")
