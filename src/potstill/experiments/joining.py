"""Student, teachers and method put together as the recipe says: for training, and for the rehearsal before it."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from potstill.data.splits import DataSplits
from potstill.distiller import Distiller
from potstill.errors import UsageError
from potstill.evaluation.cost import parameters
from potstill.experiments.method_settings import describe
from potstill.experiments.plan import Planned
from potstill.experiments.recipe import Recipe
from potstill.features.expanded_stage import ExpandedStage
from potstill.features.remodelled import Remodelled
from potstill.methods.base import Method
from potstill.models.classifier import Classifier
from potstill.training.devices import Compute

ROUNDS = 3  # in which a teacher's answer is timed, after one that is thrown away


def join(
    planned: Planned,
    student: Classifier,
    method: Method,
    teachers: Sequence[Classifier],
    *,
    recipe: Recipe,
    data: DataSplits,
    compute: Compute,
    example: Tensor,
    label_loss: nn.Module,
) -> Distiller:
    """A Distiller on the compute's device; each teacher gets images of its own size and normalisation.

    Raises:
        UsageError: networks that the method cannot join.
    """
    if planned.layers and method.needs.maps == "none":
        raise UsageError(
            f"layers: method {describe(recipe.method)} joins no feature maps of student and teacher; leave layers out"
        )
    several = len(teachers) > 1
    for network in (student, *teachers):
        network.module.to(compute.device).to(memory_format=compute.memory_format)
    return Distiller(
        student.module,
        [teacher.module for teacher in teachers] or None,
        method,
        example=example,
        student_input=student.input if teachers else None,
        teacher_input=[teacher.input for teacher in teachers] or None,
        label_loss=label_loss,
        layers=planned.layers,
        train_labels=torch.as_tensor(data.train.labels, dtype=torch.int64, device=compute.device),
        batch_size=recipe.stage_training(planned.name).batch_size,
        teacher_weights=recipe.teachers.weights if several else None,
        combine=recipe.teachers.combine,
    ).to(compute.device)


def settle(student: Classifier, distiller: Distiller) -> None:
    """Let ``student`` hold what is deployed: for few methods another network than the one that went in."""
    network = distiller.student
    if network is student.module:
        return
    if isinstance(network, ExpandedStage):
        network = network.merged()
    student.module = network
    student.remodelled = network.facts if isinstance(network, Remodelled) else None


def layers_text(distiller: Distiller, *, most: int | None = None) -> str:
    """For people: which layers are joined and what is trained besides the student; empty where there is neither.

    Args:
        distiller: whose table and adapters are shown.
        most: rows of adapters; of more, only the sum of each group is shown.

    Example:
        >>> from potstill.methods.kd import KD
        >>> student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(2))
        >>> layers_text(Distiller(student, teacher, KD()))
        ''
    """
    parts = [f"Joined layers\n\n{distiller.table.rstrip()}"] if distiller.table else []
    if isinstance(distiller.student, Remodelled):
        facts = ", ".join(f"{key} {value}" for key, value in distiller.student.facts.items() if value and key != "name")
        parts.append(f"The student with other last layers: {distiller.student.name}\n\n{facts}")
    adapters = [
        (name.removeprefix("method."), parameter)
        for name, parameter in distiller.trained_parameters()
        if not name.startswith("student.")
    ]
    if adapters:
        parts.append(f"Trained besides the student, and left behind with the teacher\n\n{_table(adapters, most)}")
    return "\n\n".join(parts) + "\n" if parts else ""


def _table(adapters: list[tuple[str, nn.Parameter]], most: int | None) -> str:
    rows = [(name, " x ".join(map(str, each.shape)) or "1", each.numel()) for name, each in adapters]
    total = sum(count for *_, count in rows)
    if most is not None and len(rows) > most:
        groups: dict[str, list[int]] = {}
        for name, _, count in rows:
            groups.setdefault(".".join(name.split(".")[:2]), []).append(count)
        rows = [(f"{name}.*", f"{len(counts)} tensors", sum(counts)) for name, counts in groups.items()]
    cells = [("name", "shape", "parameters"), *((a, b, f"{c:,}") for a, b, c in rows), ("total", "", f"{total:,}")]
    wide, middle, narrow = (max(map(len, column)) for column in zip(*cells, strict=True))
    return "\n".join(f"{a:<{wide}}  {b:>{middle}}  {c:>{narrow}}" for a, b, c in cells)


def teaching_cost(distiller: Distiller, batch_size: int, size: int, compute: Compute) -> dict[str, Any] | None:
    """What the teachers' answers cost in each training step: ``parameters``, ``bytes`` that these take in memory, and
    ``ms_per_step`` (median); None where there is no teacher.

    Args:
        distiller: on the compute's device.
        batch_size: images of a step.
        size: of the student's images in pixels.
        compute: where and in which precision.
    """
    if distiller.teacher is None:
        return None
    images = torch.zeros(batch_size, 3, size, size, device=compute.device).to(memory_format=compute.memory_format)
    times = []
    for _ in range(ROUNDS + 1):
        compute.wait()
        start = time.perf_counter()
        with compute.autocast():
            distiller.ask_teacher(images)
        compute.wait()
        times.append(1000 * (time.perf_counter() - start))
    held = list(distiller.teacher.parameters())
    return {
        "parameters": parameters(distiller.teacher),
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in held),
        "ms_per_step": round(sorted(times[1:])[ROUNDS // 2], 3),
        "batch_size": batch_size,
    }
