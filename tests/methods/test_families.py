"""Every method that reads hidden layers, between networks of unlike families: it trains, or says why it cannot.

Each family is both teacher and student.  By default every method takes two of the twelve pairs, others than its
neighbours in the list, between small networks of each family, made by the family's own class: stages, layouts and heads
are those of the large ones, and a case takes a tenth of a second.  ``POTSTILL_PAIRS=ring`` takes the twelve pairs of
the networks that people use for each, ``POTSTILL_PAIRS=all`` all 144.
"""

import copy
import os
from collections.abc import Callable
from functools import cache

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.swin_transformer import SwinTransformer
from timm.models.vgg import VGG
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import MobileNetV2, mobilenet_v2
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops.misc import Conv2dNormActivation

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
SIZE, K, B = 64, 4, 4
VGG_LAYERS = [8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"]  # channels, and "M" of a pooling layer
TRANSFORMER = {"img_size": SIZE, "patch_size": 16, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": K}


def narrow_at_the_end(network: MobileNetV2) -> MobileNetV2:
    """Its last maps have 1280 channels at any width: to adapt to them took one case as long as all others together."""
    inputs, narrow = network.features[-1][0].in_channels, 64
    network.features[-1] = Conv2dNormActivation(inputs, narrow, kernel_size=1, activation_layer=nn.ReLU6)
    network.classifier[1] = nn.Linear(narrow, K)
    return network


SMALL: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: timm.create_model("test_resnet", num_classes=K),
    "vgg": lambda: VGG(VGG_LAYERS, num_classes=K, mlp_ratio=1 / 64, norm_layer=nn.BatchNorm2d),
    "mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=K),
    "efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=K),
    "regnety": lambda: RegNet(RegNetCfg(w0=16, wa=16.0, wm=2.0, group_size=8, depth=6, se_ratio=0.25), num_classes=K),
    "convnext": lambda: timm.create_model("test_convnext", num_classes=K),
    "vit": lambda: VisionTransformer(**TRANSFORMER),
    "deit": lambda: VisionTransformerDistilled(**TRANSFORMER),
    "swin": lambda: SwinTransformer(
        img_size=SIZE, window_size=4, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), num_classes=K
    ),
    "mobilevit": lambda: timm.create_model("mobilevit_xxs", num_classes=K),
    "torchvision-resnet": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=K),
    "torchvision-mobilenetv2": lambda: narrow_at_the_end(mobilenet_v2(width_mult=0.25, num_classes=K)),
}
LARGE = (
    "timm/resnet18",
    "timm/vgg11_bn",
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
FAMILIES = LARGE if PAIRS else tuple(SMALL)
# Each family once as teacher and once as student, far from its neighbours in the list.
RING = [(FAMILIES[at], FAMILIES[(at + 5) % len(FAMILIES)]) for at in range(len(FAMILIES))]
IMAGES = torch.randn(B, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
LABELS, INDEX = torch.arange(B) % K, torch.arange(B)


@cache
def network(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return SMALL[name]() if name in SMALL else create_model(name, K, size=SIZE)


def reads_hidden_layers(name: str) -> bool:
    return name in OPTIONS or create_method(name).needs.features


def made(name: str, teacher: str, student: str) -> Distiller:
    torch.manual_seed(0)
    distiller = Distiller(
        copy.deepcopy(network(student, 1)),
        network(teacher, 0),  # which it leaves as it was: test_contract.py
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
