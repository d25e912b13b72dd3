import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from potstill.distillation.distiller import Distiller
from potstill.errors import UsageError
from potstill.functional import pskd_loss, pskd_targets
from potstill.methods.base import NetworkInfo, TrainingInfo
from potstill.methods.pskd import PSKD
from potstill.types import Batch, Outputs

LABELS = torch.tensor([0, 1, 0])
SAID = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()  # (3/4, 1/4) and (1/2, 1/2)


def ready(alpha=0.8):
    method = PSKD(alpha=alpha)
    method.build(NetworkInfo(Outputs(torch.zeros(2, 2))), None, TrainingInfo(classes=2, labels=LABELS))
    return method.train()


def step(method, logits, index):
    index = torch.tensor(index)
    batch = Batch(torch.zeros(len(index), 3, 1, 1), LABELS[index], index=index)
    terms = method(Outputs(logits), None, batch)
    return (terms["ce"] + terms["pskd"]).item()


def test_targets_lie_between_label_and_prediction():
    targets = pskd_targets(torch.tensor([[0.6, 0.4], [0.1, 0.9]]), torch.tensor([1, 1]), share=0.25)
    torch.testing.assert_close(targets, torch.tensor([[0.15, 0.85], [0.025, 0.975]]))
    slow = -(0.15 * math.log(0.75) + 0.85 * math.log(0.25))
    assert pskd_loss(SAID[:1], targets[:1]).item() == pytest.approx(slow, rel=1e-6)


def test_the_first_epoch_is_plain_cross_entropy():
    method = ready()
    method.start_epoch(0, 10)
    assert step(method, SAID, [0, 1]) == pytest.approx(F.cross_entropy(SAID, LABELS[:2]).item(), rel=1e-6)
    # even where an image comes twice in an epoch: what was said a moment ago counts from the next on
    assert step(method, SAID, [0, 1]) == pytest.approx(F.cross_entropy(SAID, LABELS[:2]).item(), rel=1e-6)


def test_later_epochs_mix_in_what_was_said_one_epoch_ago():
    method = ready()
    method.start_epoch(0, 10)
    step(method, SAID, [0, 1])
    method.start_epoch(1, 10)  # the share is 0.8 * 2 / 10 = 0.16
    now = torch.tensor([[1.0, 3.0], [1.0, 3.0]]).log()
    # image 0: targets 0.84 + 0.16 * 3/4 and 0.16 / 4; image 1: 0.16 / 2 and 0.84 + 0.16 / 2
    slow = -(0.96 * math.log(0.25) + 0.04 * math.log(0.75) + 0.08 * math.log(0.25) + 0.92 * math.log(0.75)) / 2
    assert step(method, now, [0, 1]) == pytest.approx(slow, rel=1e-6)
    # never seen: its label alone
    assert step(method, now[:1], [2]) == pytest.approx(math.log(4), rel=1e-6)
    method.start_epoch(2, 10)
    torch.testing.assert_close(method.previous[:2], torch.tensor([[0.25, 0.75], [0.25, 0.75]]))


def test_an_image_that_was_left_out_keeps_its_older_prediction():
    method = ready()
    for epoch in range(3):
        method.start_epoch(epoch, 10)
        if epoch == 0:
            step(method, SAID, [0, 1])
    torch.testing.assert_close(method.previous[:2], torch.tensor([[0.75, 0.25], [0.5, 0.5]]))


def test_the_share_reaches_alpha_in_the_last_epoch():
    method = ready(alpha=0.6)
    shares = []
    for epoch in range(4):
        method.start_epoch(epoch, 4)
        shares.append(method.share)
    assert shares == pytest.approx([0.15, 0.3, 0.45, 0.6])


def test_training_goes_on_alike_from_a_saved_state():
    method = ready()
    method.start_epoch(0, 10)
    step(method, SAID, [0, 1])
    other = ready()
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    for each in (method, other):
        each.start_epoch(1, 10)
    assert step(other, SAID, [0, 1]) == step(method, SAID, [0, 1]) != F.cross_entropy(SAID, LABELS[:2]).item()


def test_evaluation_leaves_the_memory_alone_and_gives_plain_cross_entropy():
    student = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    images = torch.randn(3, 3, 2, 2)
    distiller = Distiller(student, None, PSKD(), example=images, train_labels=LABELS)
    distiller.start_epoch(5, 10)
    distiller.eval()
    found = distiller(images, LABELS, index=torch.arange(3))
    assert found.loss.item() == pytest.approx(F.cross_entropy(student(images), LABELS).item(), rel=1e-6)
    assert distiller.method.current.abs().sum() == 0


def test_what_cannot_work_is_refused():
    method = ready()
    with pytest.raises(UsageError, match="start_epoch"):
        step(method, SAID, [0, 1])
    method.start_epoch(0, 10)
    mixed = Batch(torch.zeros(2, 3, 1, 1), LABELS[:2], index=torch.arange(2), soft_labels=torch.full((2, 2), 0.5))
    with pytest.raises(UsageError, match="mixup"):
        method(Outputs(SAID), None, mixed)
