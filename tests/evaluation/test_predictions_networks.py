import numpy as np
import pytest
import torch
from torch import nn

from potstill.errors import DataError, NonFiniteError, UsageError
from potstill.evaluation.predictions import evaluation_mode, predict_probabilities
from potstill.types import Batch


class Images:
    """As the loader: batches of a fixed list of images."""

    def __init__(self, images, labels, order=None, batch=4):
        self.images, self.labels, self.batch = images, labels, batch
        self.order = list(range(len(labels))) if order is None else order
        self.count = len(labels)

    def epoch(self, number=0):
        for start in range(0, len(self.order), self.batch):
            index = torch.tensor(self.order[start : start + self.batch])
            yield Batch(self.images[index], self.labels[index], index, torch.full_like(index, number))


def split(count=10, classes=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 4, 4, generator=generator)
    return images, torch.randint(0, classes, (count,), generator=generator)


def network(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, classes))


def test_probabilities_are_the_softmax_of_each_image_alone():
    images, labels = split()
    net = network()
    probabilities, seen, index = predict_probabilities(net, Images(images, labels), classes=3)
    net.eval()
    with torch.no_grad():
        expected = torch.cat([net(image[None]).double().softmax(1) for image in images])
    np.testing.assert_allclose(probabilities, expected.numpy(), atol=1e-6)
    assert probabilities.dtype == np.float32
    assert seen.tolist() == labels.tolist()
    assert index.tolist() == list(range(10))


def test_rows_follow_the_split_whatever_the_order():
    images, labels = split()
    listed = predict_probabilities(network(), Images(images, labels), classes=3)
    mixed = predict_probabilities(network(), Images(images, labels, order=[3, 1, 9, 0, 2, 4, 8, 7, 6, 5]), classes=3)
    np.testing.assert_allclose(mixed[0], listed[0], atol=1e-6)
    assert mixed[1].tolist() == listed[1].tolist()


def test_each_submodule_gets_its_mode_back_and_statistics_stay():
    net = network().train()
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    predict_probabilities(net, Images(*split()), classes=3)
    assert [module.training for module in net.modules()] == [True, True, False, True, True, True]
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_modes_come_back_after_an_error():
    net = network().train()
    with pytest.raises(RuntimeError), evaluation_mode(net):
        raise RuntimeError
    assert all(module.training for module in net.modules())


def test_networks_that_cache_in_eval_mode_hear_of_training_again():
    class Cached(nn.Module):
        cache = None

        def train(self, mode=True):
            if mode:
                self.cache = None
            return super().train(mode)

    net = nn.Sequential(Cached()).train()
    with evaluation_mode(net):
        net[0].cache = "of these weights"
    assert net[0].cache is None


def test_training_goes_on_after_evaluation():
    net = network()
    predict_probabilities(net, Images(*split()), classes=3)
    net(split()[0]).sum().backward()
    assert net[0].weight.grad is not None


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7, 8], r"1 left out \[9\]"),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 8], r"1 came twice \[8\]"),
        ([*range(10), 4], r"1 came twice \[4\]"),
        ([], "no image"),
    ],
)
def test_each_image_is_seen_exactly_once(order, message):
    with pytest.raises(DataError, match=message):
        predict_probabilities(network(), Images(*split(), order=order), classes=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_logit_that_is_not_finite_names_the_image(value):
    class Broken(nn.Module):
        def forward(self, images):
            logits = images.flatten(1)[:, :3].clone()
            logits[images[:, 0, 0, 0] == 7, 1] = value
            return logits

    images, labels = split()
    images[6, 0, 0, 0] = images[8, 0, 0, 0] = 7
    with pytest.raises(NonFiniteError, match=r"image 6 is NaN or infinite \(2 of 10"):
        predict_probabilities(Broken(), Images(images, labels, order=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0]), classes=3)


def test_wrong_logits_are_refused():
    with pytest.raises(UsageError, match=r"must return logits \[4, 5\], got \[4, 3\]"):
        predict_probabilities(network(), Images(*split()), classes=5)


def test_batches_without_numbers_are_refused():
    images = Images(*split())
    images.epoch = lambda: iter([Batch(images.images, images.labels)])
    with pytest.raises(UsageError, match="number its images"):
        predict_probabilities(network(), images, classes=3)
