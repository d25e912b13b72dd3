import pytest
import torch
from torch import nn

from potstill.distillation.distiller import Distiller
from potstill.errors import UsageError
from potstill.functional import dkd_loss, kd_loss, sdd_dkd_loss, sdd_kd_loss
from potstill.methods.sdd import SDD, region_logits
from potstill.types import Head

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0])


class Pooled(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def forward(self, images):
        return self.head(self.last(self.body(images)).mean(dim=(2, 3)))


class Flattened(Pooled):
    def __init__(self, width):
        super().__init__(width)
        self.head = nn.Linear(16 * width, 3)

    def forward(self, images):
        return self.head(self.last(self.body(images)).flatten(1))


def made(regions=5, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(6, classes, regions, generator=generator) for _ in range(2))
    return student, teacher, torch.arange(6) % classes


def region_weights(teacher, labels):
    right = [
        [row[:, n].argmax().item() == y for n in range(row.shape[1])] for row, y in zip(teacher, labels, strict=True)
    ]
    return [[1 if ok == row[0] else 2 for ok in row] for row in right]


@pytest.mark.parametrize("variant", ["kd", "dkd"])
def test_equals_the_sum_over_images_and_regions_one_by_one(variant):
    student, teacher, labels = made()
    weights, total = region_weights(teacher, labels), 0.0
    assert {1, 2} == {each for row in weights for each in row}
    for image in range(6):
        for region in range(5):
            pair = student[image : image + 1, :, region], teacher[image : image + 1, :, region]
            if variant == "kd":
                one = kd_loss(*pair, temperature=4.0)
            else:
                one = dkd_loss(*pair, labels[image : image + 1], temperature=4.0, alpha=0.5, beta=3.0)
            total += weights[image][region] * one.item()
    if variant == "kd":
        found = sdd_kd_loss(student, teacher, labels, temperature=4.0)
    else:
        found = sdd_dkd_loss(student, teacher, labels, temperature=4.0, alpha=0.5, beta=3.0)
    assert found.item() == pytest.approx(total / 30, rel=1e-5)


def test_one_region_is_the_plain_loss_and_copies_of_it_change_nothing():
    student, teacher, labels = made(regions=1)
    plain = kd_loss(student[:, :, 0], teacher[:, :, 0], temperature=4.0)
    torch.testing.assert_close(sdd_kd_loss(student, teacher, labels), plain)
    torch.testing.assert_close(sdd_kd_loss(student.repeat(1, 1, 7), teacher.repeat(1, 1, 7), labels), plain)


def test_is_finite_at_a_gap_of_900():
    student = torch.zeros(1, 3, 2)
    student[0, 0] = 900.0
    student.requires_grad_(True)
    loss = sdd_dkd_loss(student, -student.detach(), torch.tensor([0]), temperature=1.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_the_first_region_is_what_the_network_itself_says():
    network = Pooled(5).eval()
    features = network.last(network.body(IMAGES))
    regions = region_logits(features, Head(network.head.weight, network.head.bias), [1, 2, 4])
    assert regions.shape == (4, 3, 21)
    torch.testing.assert_close(regions[:, :, 0], network(IMAGES))
    torch.testing.assert_close(regions[:, :, 5], network.head(features[:, :, 0, 0]))  # 4 x 4: first place of the map
    torch.testing.assert_close(regions[:, :, 4], network.head(features[:, :, 2:, 2:].mean(dim=(2, 3))))


def test_autocast_does_not_lower_the_precision():
    features, head = torch.randn(2, 7, 4, 4), Head(torch.randn(3, 7), torch.randn(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = region_logits(features, head, [1, 2])
    torch.testing.assert_close(found, region_logits(features, head, [1, 2]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", ["kd", "dkd"])
def test_trains_body_and_head_through_the_regions(variant):
    student = Pooled(4)
    distiller = Distiller(student, Pooled(6), SDD(variant=variant, ce_weight=0.0), example=IMAGES)
    distiller(IMAGES, LABELS).loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in student.named_parameters() if "0.bias" not in name)


def test_refuses_heads_that_read_no_mean_and_scales_without_the_whole_image():
    with pytest.raises(UsageError, match="mean of the last feature map"):
        Distiller(Flattened(4), Pooled(6), SDD(), example=IMAGES)
    with pytest.raises(UsageError, match="mean of the last feature map"):
        Distiller(Pooled(4), Flattened(6), SDD(), example=IMAGES)
    with pytest.raises(UsageError, match="begin with 1"):
        SDD(scales=[2, 4])
