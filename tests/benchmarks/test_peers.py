"""The peers do the same work: the same weights come out of each; who is not there is named with the reason."""

import sys

import pytest
import torch
from benchmarks.speed import peers
from benchmarks.speed.scene import ALPHA, TEMPERATURE, Scene, make_images
from torch import nn
from torch.nn.utils import parameters_to_vector

from potstill.functional import kd_loss

IMAGES, CLASSES, SIZE = 10, 2, 32


class Seen(Scene):
    """Keeps the networks that it gave, which are surer of themselves: of small logits, no loss depends on T."""

    def _network(self, name, seed):
        network = super()._network(name, seed)
        last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
        nn.init.normal_(last.weight, std=1.0)
        return network

    def student(self):
        object.__setattr__(self, "learner", super().student())
        return self.learner

    def teacher(self):
        object.__setattr__(self, "expert", super().teacher())
        return self.expert


@pytest.fixture
def scene(tmp_path):
    make_images(tmp_path, IMAGES, CLASSES, 40)
    return Seen(tmp_path, IMAGES, CLASSES, SIZE, 5, "cifar/resnet8", "timm/resnet10t")  # normalised alike


def trained(scene, make):
    """(the student's weights after an epoch of two steps, and before); the teacher's stay as they are."""
    turn = make(scene)
    start = parameters_to_vector(scene.learner.parameters()).detach()
    before = {name: value.clone() for name, value in scene.expert.state_dict().items()}
    torch.manual_seed(7)  # of order, crops and mirrors
    turn()
    assert all(torch.equal(value, before[name]) for name, value in scene.expert.state_dict().items())
    assert not scene.expert.training
    assert scene.learner.training
    return parameters_to_vector(scene.learner.parameters()).detach(), start


def assert_same_training(scene, make):
    expected, start = trained(scene, peers.naive)
    found, again = trained(scene, make)
    assert torch.equal(start, again)
    # Adam's first steps are about as long as the learning rate, 1e-4, whatever the gradient; where that is nearly 0,
    # rounding decides about its sign.
    assert (expected - start).abs().mean() > 2e-5
    assert ((found - expected).abs() < 1e-5).float().mean() > 0.98


def test_timms_task_learns_what_the_tutorials_loop_learns(scene):
    assert_same_training(scene, lambda scene: peers.timm_task(scene, bf16=False))


def test_torchdistills_box_learns_what_the_tutorials_loop_learns(scene):
    pytest.importorskip("torchdistill", reason="torchdistill is not installed; docs/benchmarks.md says how")
    assert_same_training(scene, peers.torchdistill)


def test_the_tutorials_loop_has_the_loss_of_our_kd(scene, monkeypatch):
    original, expected, said = peers.F.cross_entropy, [], []

    def seen(logits, labels):
        own = kd_loss(logits, said[-1], temperature=TEMPERATURE)
        expected.append((ALPHA * original(logits, labels) + (1 - ALPHA) * own).item())
        return original(logits, labels)

    monkeypatch.setattr(peers.F, "cross_entropy", seen)
    epoch = peers.naive(scene)
    scene.expert.register_forward_hook(lambda _, __, logits: said.append(logits))
    assert epoch() == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert len(expected) == 2


def test_who_is_not_installed_is_left_out_with_the_reason(measured, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdistill", None)
    monkeypatch.setitem(sys.modules, "torchdistill.core.distillation", None)
    printed = measured("race", "--student timm/test_resnet --batches 5")
    assert "left out: torchdistill, which is not installed" in printed
    assert "x torchdistill" not in printed


def test_networks_that_are_not_timms_leave_its_task_out(measured):
    printed = measured("race", "--student cifar/resnet8 --batches 5")
    assert "left out: timm task, float32, which takes timm's own networks, and cifar/resnet8 is none" in printed
    assert "x timm" not in printed
