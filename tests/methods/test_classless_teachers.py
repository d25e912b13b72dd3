"""Methods that need no classes of the teacher do not read its logits, and the others do."""

import copy

import pytest
import torch

from potstill.distillation.distiller import Distiller
from potstill.methods import create_method, list_classless_methods, list_own_methods, method_info
from potstill.models.factory import create_model
from potstill.types import Batch

ELSEWHERE = {"simkd", "deit_hard", "deit_soft"}  # deploys the teacher's head itself; students with two heads
WITH_TEACHER = [
    name
    for name in list_own_methods()
    if (needs := method_info(name).requirements) is not None and needs.teacher and name not in ELSEWHERE
]


def test_lists() -> None:
    embeddings, every = list_classless_methods(embeddings_only=True), list_classless_methods()
    assert set(embeddings) == {"cc", "cosine", "crd", "itrd", "nd", "pkt", "rkd", "srd"}
    assert set(embeddings) < set(every)
    assert {"at", "fitnet", "vkd", "sp"} <= set(every)
    assert not {*ELSEWHERE, "kd", "dist", "srrl", "ofa", "dho", "wkd_l", "combined", "supervised"} & set(every)


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_a_head_of_nan_reaches_the_loss_only_of_methods_that_need_classes(name: str) -> None:
    torch.manual_seed(0)
    student, teacher = create_model("cifar/resnet8", 4, size=16), create_model("cifar/resnet14", 4, size=16)
    options = (
        {"kd_weight": 0.0} if "kd_weight" in method_info(name).options and name in list_classless_methods() else {}
    )
    method = create_method(name, **options)
    assert method.needs.teacher_classes != (name in list_classless_methods())
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    teachers = [teacher, copy.deepcopy(teacher)] if method.needs.members else [teacher]
    distiller = Distiller(student, teachers, method, example=images, train_labels=labels, batch_size=8)
    for each in teachers:
        head = [module for module in each.modules() if isinstance(module, torch.nn.Linear)][-1]
        head.weight.data.fill_(torch.nan)
    distiller.prepare(lambda: iter([Batch(images, labels, torch.arange(8))]))
    distiller.start_epoch(1, 4)
    step = distiller(images, labels, index=torch.arange(8), second=images.flip(3))
    assert bool(step.loss.isfinite()) == (name in list_classless_methods())
