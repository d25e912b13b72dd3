import pytest
import torch
import torch.nn.functional as F

from potstill.methods.nst import nst_loss


def slow(student, teacher):
    """The kernel of every two channels, one by one."""
    ours, theirs = (F.normalize(features.flatten(2), dim=2) for features in (student, teacher))

    def kernel(first, second):
        values = [
            (first[b, i] @ second[b, j]) ** 2
            for b in range(len(first))
            for i in range(first.shape[1])
            for j in range(second.shape[1])
        ]
        return sum(values) / len(values)

    return kernel(theirs, theirs) + kernel(ours, ours) - 2 * kernel(ours, theirs)


def test_equals_the_kernel_of_every_two_channels():
    student, teacher = torch.randn(3, 2, 4, 4).double(), torch.randn(3, 5, 4, 4).double()
    torch.testing.assert_close(nst_loss([student], [teacher]), slow(student, teacher), rtol=1e-12, atol=0)


def test_permuted_channels_are_the_same_distribution():
    features = torch.randn(2, 4, 3, 3)
    assert nst_loss([features[:, [2, 0, 3, 1]]], [features]).item() == pytest.approx(0, abs=1e-6)
    assert nst_loss([features.flip(2)], [features]).item() > 1e-3
