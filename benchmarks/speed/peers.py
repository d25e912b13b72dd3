"""The others: a loop as tutorials write it, torchdistill's and timm's, each used as its documentation shows."""

import logging
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from benchmarks.speed.scene import ALPHA, LR, MEAN, SCALE, STD, TEMPERATURE, Scene
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

Turn = Callable[[], object]


def images(scene: Scene) -> DataLoader:
    """Torchvision's usual way: decode each file in each epoch, crop, flip, normalise; one image after the other."""
    steps = [
        transforms.RandomResizedCrop(scene.size, scale=SCALE),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    dataset = ImageFolder(str(scene.data), transforms.Compose(steps))
    return DataLoader(dataset, batch_size=scene.batch, shuffle=True, num_workers=0)


def naive(scene: Scene) -> Turn:
    """One epoch of the loop that most tutorials show: the teacher runs at every step, in float32."""
    loader, teacher, student = images(scene), scene.teacher(), scene.student()
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


def torchdistill(scene: Scene) -> Turn | None:
    """One epoch of torchdistill's DistillationBox with its KDLoss; None where it is not installed."""
    try:
        from torchdistill.core.distillation import get_distillation_box
    except ImportError:
        return None
    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    loader = images(scene)
    config = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "Adam", "kwargs": {"lr": LR}},
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
                                "temperature": TEMPERATURE,
                                "alpha": ALPHA,
                                "reduction": "batchmean",
                            },
                        },
                        "weight": 1.0,
                    }
                }
            },
        },
    }
    box = get_distillation_box(scene.teacher(), scene.student(), {}, config, torch.device("cpu"), None, False, 1.0)
    box.train_data_loader = loader

    def epoch() -> None:
        box.pre_epoch_process(epoch=0)
        for inputs, labels in loader:
            box.pre_forward_process()
            loss = box.forward_process(inputs, labels, None)
            box.post_forward_process(loss)

    return epoch


def timm_task(scene: Scene, *, bf16: bool) -> Turn:
    """One epoch with timm's LogitDistillationTask; ``bf16``: with its training script's --amp and --channels-last."""
    from timm.task import LogitDistillationTask

    loader, student, layout = images(scene), scene.student(), torch.contiguous_format
    teacher = scene.teacher()
    if bf16:
        layout = torch.channels_last
        student, teacher = student.to(memory_format=layout), teacher.to(memory_format=layout)
    task = LogitDistillationTask(
        student_model=student,
        teacher_model=teacher,
        criterion=nn.CrossEntropyLoss(),
        task_loss_weight=ALPHA,
        temperature=TEMPERATURE,
        verbose=False,
    )
    optimizer = torch.optim.Adam(student.parameters(), lr=LR)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, labels in loader:
            yield inputs.contiguous(memory_format=layout), labels

    def epoch() -> None:
        task.train()
        teacher.eval()
        for inputs, labels in batches():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = task(inputs, labels)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch
