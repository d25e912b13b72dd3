"""The others: a loop as tutorials write it, torchdistill's and timm's, each used as its documentation shows.

All read the same files by the same torchvision transforms, step by the same Adam, and weigh labels and teacher alike.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.speed.scene import ALPHA, LR, MEAN, SCALE, STD, TEMPERATURE, Scene
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

Turn = Callable[[], object]


class Absent(Exception):
    """Why a peer takes no part."""


def images(scene: Scene, workers: int) -> DataLoader:
    """Torchvision's usual way: decode each file in each epoch, crop, flip, normalise; one image after the other."""
    steps = [
        transforms.RandomResizedCrop(scene.size, scale=SCALE),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    dataset = ImageFolder(str(scene.data), transforms.Compose(steps))
    return DataLoader(
        dataset, batch_size=scene.batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )


def naive(scene: Scene, workers: int = 0) -> Turn:
    """One epoch of the loop that most tutorials show: the teacher runs at every step, in float32."""
    loader, teacher, student = images(scene, workers), scene.teacher(), scene.student()
    optimizer = torch.optim.Adam(student.parameters(), lr=LR)

    def epoch() -> float:
        student.train()
        total = 0.0
        for inputs, labels in loader:
            with torch.no_grad():
                wanted = teacher(inputs)
            logits = student(inputs)
            soft = F.kl_div(
                F.log_softmax(logits / TEMPERATURE, dim=1),
                F.softmax(wanted / TEMPERATURE, dim=1),
                reduction="batchmean",
            )
            loss = ALPHA * F.cross_entropy(logits, labels) + (1 - ALPHA) * TEMPERATURE**2 * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total / len(loader)

    return epoch


def torchdistill(scene: Scene, workers: int = 0) -> Turn:
    """One epoch of torchdistill's DistillationBox with its KDLoss, as its image classification example trains.

    Raises:
        Absent: it is not installed.
    """
    loader = images(scene, workers)
    optimizer = {"key": "Adam", "kwargs": {"lr": LR}}
    box = distillation_box(scene.student(), scene.teacher(), loader, optimizer, TEMPERATURE, ALPHA)

    def epoch() -> None:
        box.pre_epoch_process(epoch=0)
        for inputs, labels in loader:
            box.pre_forward_process()
            loss = box.forward_process(inputs, labels, None)
            box.post_forward_process(loss)
        box.post_epoch_process()

    return epoch


def distillation_box(
    student: nn.Module,
    teacher: nn.Module,
    loader: DataLoader,
    optimizer: dict[str, Any],
    temperature: float,
    alpha: float,
) -> Any:
    """Return torchdistill's DistillationBox for Hinton's loss; ``alpha`` weighs the labels.

    Raises:
        Absent: it is not installed.
    """
    try:
        from torchdistill.core.distillation import get_distillation_box
    except ImportError as error:
        raise Absent(f"which is not installed ({error}); docs/benchmarks.md says how") from None
    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    config = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": optimizer,
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "kd": {
                        "criterion": {
                            "key": "KDLoss",
                            "kwargs": {
                                "student_module_path": ".",
                                "student_module_io": "output",
                                "teacher_module_path": ".",
                                "teacher_module_io": "output",
                                "temperature": temperature,
                                "alpha": alpha,
                                "reduction": "batchmean",
                            },
                        },
                        "weight": 1.0,
                    }
                }
            },
        },
    }
    box = get_distillation_box(teacher, student, {}, config, torch.device("cpu"), None, False, 1.0)
    box.train_data_loader = loader
    return box


def timm_task(scene: Scene, workers: int = 0, *, bf16: bool) -> Turn:
    """One epoch with timm's LogitDistillationTask.

    Args:
        scene: of the race.
        workers: processes that decode.
        bf16: as its training script does with --amp --amp-dtype bfloat16 --channels-last.

    Raises:
        Absent: this timm has no such task, or the networks are not timm's, which it wants.
    """
    loader, student, layout = images(scene, workers), scene.student(), torch.contiguous_format
    teacher = scene.teacher()
    if not hasattr(student, "pretrained_cfg"):
        raise Absent(f"which takes timm's own networks, and {scene.student_name} is none")
    if bf16:
        layout = torch.channels_last
        student, teacher = student.to(memory_format=layout), teacher.to(memory_format=layout)
    task = logit_task(student, teacher, TEMPERATURE, ALPHA)
    optimizer = torch.optim.Adam(student.parameters(), lr=LR)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, labels in loader:
            yield inputs.contiguous(memory_format=layout), labels

    def epoch() -> None:
        task.train()
        teacher.eval()  # older versions would train it
        for inputs, labels in batches():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = task(inputs, labels)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def logit_task(student: nn.Module, teacher: nn.Module, temperature: float, alpha: float) -> Any:
    """Return timm's LogitDistillationTask, in which ``alpha`` weighs the labels and ``1 - alpha`` the teacher.

    Raises:
        Absent: this timm has no such task.
    """
    try:
        from timm.task import LogitDistillationTask
    except ImportError as error:
        raise Absent(f"which this timm lacks ({error})") from None
    return LogitDistillationTask(
        student_model=student,
        teacher_model=teacher,
        criterion=nn.CrossEntropyLoss(),
        task_loss_weight=alpha,
        temperature=temperature,
        verbose=False,
    )
