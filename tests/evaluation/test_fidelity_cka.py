"""Linear CKA against the definition of its estimator, written out, and against what must hold of it."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn

from potstill.errors import UsageError
from potstill.evaluation.fidelity import hsic, stage_similarity
from potstill.models.factory import create_model


def slow_hsic(k, m):
    """Song et al. (2012): the mean over all quadruples of different images of K_ij L_ij + K_ij L_qr - 2 K_ij L_iq."""
    terms = [
        k[i, j] * m[i, j] + k[i, j] * m[q, r] - 2 * k[i, j] * m[i, q] for i, j, q, r in permutations(range(len(k)), 4)
    ]
    return float(np.mean([float(term) for term in terms]))


def slow_cka(x, y):
    k, m = x.flatten(1) @ x.flatten(1).T, y.flatten(1) @ y.flatten(1).T
    return slow_hsic(k, m) / (slow_hsic(k, k) * slow_hsic(m, m)) ** 0.5


def linear_cka(x, y):
    k, m = (each.flatten(1).double() @ each.flatten(1).double().T for each in (x, y))
    return float(hsic(k, m)) / (float(hsic(k, k)) * float(hsic(m, m))) ** 0.5


def by_hand():
    """Four images, each network telling one pair alike: 0 with 1; 2 with 3."""
    k, m = torch.eye(4), torch.eye(4)
    k[0, 1] = k[1, 0] = m[2, 3] = m[3, 2] = 1.0
    return k, m


def test_a_worked_example():
    k, m = by_hand()
    # tr(KK) = 2, 1'K1 = 2, 1'KK1 = 2: (2 + 4 / 6 - 4 / 2) / 4.  tr(KL) = 0, 1'KL1 = 0: (0 + 4 / 6 - 0) / 4.
    assert float(hsic(k, k)) == pytest.approx(1 / 6)
    assert float(hsic(k, m)) == pytest.approx(1 / 6)
    m = m.clone()
    m[2, 3] = m[3, 2] = 0
    m[0, 2] = m[2, 0] = 1.0  # shares image 0: 1'KL1 = 1
    assert float(hsic(k, m)) == pytest.approx((0 + 4 / 6 - 2 * 1 / 2) / 4)


def test_equal_to_the_mean_over_all_quadruples():
    x, y = torch.randn(7, 3, 2, 2, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64) + 2
    y[:, 0] += x[:, 0, 0, 0]
    k, m = x.flatten(1) @ x.flatten(1).T, y @ y.T
    assert float(hsic(k, m)) == pytest.approx(slow_hsic(k, m), rel=1e-9)
    assert linear_cka(x, y) == pytest.approx(slow_cka(x, y), rel=1e-4)  # which subtracts no mean, and need not


def test_rotation_and_scale_do_not_count_but_other_maps_do():
    torch.manual_seed(0)
    x = torch.randn(40, 6)
    turned = torch.linalg.qr(torch.randn(6, 6))[0]
    assert linear_cka(x, 7 * x @ turned + 3) == pytest.approx(1, abs=1e-5)
    assert linear_cka(x, x @ torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1]))) < 0.8


def test_independent_features_have_nothing_in_common_however_many():
    torch.manual_seed(0)
    values = [linear_cka(torch.randn(32, 4000), torch.randn(32, 4000)) for _ in range(20)]
    assert abs(sum(values) / 20) < 0.05  # the biased estimator says 0.99 here
    assert min(values) < 0


def test_too_few_images_are_refused():
    with pytest.raises(UsageError, match="4 or more"):
        hsic(torch.eye(3), torch.eye(3))


class Still(nn.Module):
    """Two stages, of 2 and 3 maps, that see red and green alone."""

    def __init__(self, colour):
        super().__init__()
        self.first = nn.Conv2d(3, 2, 1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.second = nn.Conv2d(2, 3, 1, bias=False)
        self.head = nn.Linear(3, 2)
        with torch.no_grad():
            self.first.weight.zero_()
            self.first.weight[:, colour] = 1.0

    def forward(self, images):
        maps = self.second(self.pool(self.first(images)))
        return self.head(maps.mean(dim=(2, 3)))


def test_stages_of_two_networks():
    torch.manual_seed(0)
    red, green = Still(0), Still(1)
    images = torch.randn(48, 3, 4, 4)
    batches = [{"teacher": part, "same": part, "other": part} for part in (*images.split(16), images[:3])]
    found = stage_similarity({"teacher": red, "same": red, "other": green}, batches)
    assert found.images == 48
    assert found.layers == dict.fromkeys(("teacher", "same", "other"), ("first", "second"))
    assert found.values["same"][0][0] == pytest.approx(1, abs=1e-6)
    assert found.values["same"][1][1] == pytest.approx(1, abs=1e-6)
    assert abs(found.values["other"][0][0]) < 0.2
    assert found.left_out == {}
    # The mean of the estimates over batches, not the mean of their quotients.
    sums = {"ab": 0.0, "aa": 0.0, "bb": 0.0}
    for part in images.split(16):
        with torch.no_grad():
            a, b = red.first(part).flatten(1).double(), green.second(green.pool(green.first(part))).flatten(1).double()
        for pair, (one, two) in {"ab": (a, b), "aa": (a, a), "bb": (b, b)}.items():
            sums[pair] += float(hsic(one @ one.T, two @ two.T))
    assert found.values["other"][0][1] == pytest.approx(sums["ab"] / (sums["aa"] * sums["bb"]) ** 0.5, abs=1e-5)


def test_large_maps_are_left_out_and_the_networks_stay_as_they_were():
    net = create_model("cifar/resnet8", 4, size=32).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images = torch.randn(8, 3, 32, 32)
    found = stage_similarity({"a": net, "b": net}, [{"a": images, "b": images}], max_values=16 * 16 * 32)
    assert found.left_out == {"a": ("stage1",), "b": ("stage1",)}
    assert found.layers["a"] == ("stage2", "stage3")
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_no_batch_that_is_large_enough():
    net = create_model("cifar/resnet8", 4, size=32)
    with pytest.raises(UsageError, match="4 images or more"):
        stage_similarity({"a": net, "b": net}, [{"a": torch.zeros(3, 3, 32, 32), "b": torch.zeros(3, 3, 32, 32)}])
