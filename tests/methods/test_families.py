"""Every method that reads hidden layers, between networks of unlike families: it trains, or says why it cannot.

Each family is both teacher and student.  By default every method takes two of the twelve pairs, others than its
neighbours in the list; ``POTSTILL_PAIRS=ring`` takes the twelve for each, ``POTSTILL_PAIRS=all`` all 144.  By default
VGG is the small one for CIFAR: timm's has 129 million weights, and each of its cases takes seconds.
"""

import copy
import os
from functools import cache

import pytest
import torch
from torch import nn

from potstill.distillation.distiller import Distiller
from potstill.errors import UsageError
from potstill.methods import create_method, list_methods
from potstill.models.factory import create_model
from potstill.types import Batch

OPTIONS = {
    "combined": {"methods": [{"name": "kd"}, {"name": "at"}, {"name": "fitnet", "factor": 0.5}]},
    "crd": {"negatives": 2},
    "ft": {"paraphraser_epochs": 1},
}
PAIRS = os.environ.get("POTSTILL_PAIRS")
FAMILIES = (
    "timm/resnet18",
    "timm/vgg11_bn" if PAIRS else "cifar/vgg8",
    "timm/mobilenetv3_small_100",
    "timm/efficientnet_lite0",
    "timm/regnety_002",
    "timm/convnext_atto",
    "timm/vit_tiny_patch16_224",
    "timm/deit_tiny_distilled_patch16_224",
    "timm/swin_s3_tiny_224",
    "timm/mobilevit_xxs",
    "torchvision/resnet18",
    "torchvision/mobilenet_v2",
)
# Each family once as teacher and once as student, far from its neighbours in the list.
RING = [(FAMILIES[at], FAMILIES[(at + 5) % len(FAMILIES)]) for at in range(len(FAMILIES))]
SIZE, K, B = 64, 4, 4
IMAGES = torch.randn(B, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
LABELS, INDEX = torch.arange(B) % K, torch.arange(B)


@cache
def network(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(name, K, size=SIZE)


def reads_hidden_layers(name: str) -> bool:
    return name in OPTIONS or create_method(name).needs.features


def made(name: str, teacher: str, student: str) -> Distiller:
    torch.manual_seed(0)
    distiller = Distiller(
        copy.deepcopy(network(student, 1)),
        copy.deepcopy(network(teacher, 0)),
        create_method(name, **OPTIONS.get(name, {})),
        example=IMAGES[:2],
        train_labels=LABELS,
        batch_size=B,
    )
    distiller.prepare(lambda: iter([Batch(IMAGES, LABELS, INDEX)]))
    return distiller


def chosen() -> list[tuple[str, str, str]]:
    names = [name for name in list_methods() if reads_hidden_layers(name)]
    if PAIRS == "all":
        return [(name, teacher, student) for name in names for teacher in FAMILIES for student in FAMILIES]
    if PAIRS == "ring":
        return [(name, *pair) for name in names for pair in RING]
    return [(name, *RING[(5 * at + shift) % 12]) for at, name in enumerate(names) for shift in (0, 6)]


@pytest.mark.parametrize(
    ("name", "teacher", "student"),
    [pytest.param(*each, id="-".join(part.split("/")[-1] for part in each)) for each in chosen()],
)
def test_two_steps_run_or_the_reason_is_said(name, teacher, student):
    try:
        distiller = made(name, teacher, student)
    except UsageError as refusal:
        distiller, reason = None, str(refusal)
    if distiller is None:  # a reason, and the nearest method that works
        assert len(reason) > 60
        assert any(known in reason for known in list_methods())
        return
    optimizer = torch.optim.SGD([p for _, p in distiller.trained_parameters()], lr=1e-3)
    adapters = dict(distiller.method.named_parameters())
    reached = set()
    for epoch in (0, 39):  # methods of two phases show both
        distiller.start_epoch(epoch, 40)
        step = distiller(IMAGES, LABELS, index=INDEX, second=IMAGES)
        assert all(term.isfinite() for term in step.terms.values()), step.terms
        optimizer.zero_grad()
        step.loss.backward()
        reached |= {key for key, p in adapters.items() if p.grad is not None and p.grad.isfinite().all()}
        nn.utils.clip_grad_norm_(list(distiller.student.parameters()), 1.0)
        optimizer.step()
    assert {key for key, p in adapters.items() if p.requires_grad} <= reached
