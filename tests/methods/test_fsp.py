import pytest
import torch
from made_maps import built, outputs

from potstill.errors import UsageError
from potstill.methods.fsp import FSP, fsp_loss


def test_equals_loops_over_channels():
    student = [torch.randn(2, 3, 4, 4).double(), torch.randn(2, 2, 2, 2).double()]
    teacher = [torch.randn(2, 3, 4, 4).double(), torch.randn(2, 2, 2, 2).double()]

    def flow(lower, upper):
        pooled = lower.reshape(2, 3, 2, 2, 2, 2).mean(dim=(3, 5))
        return torch.stack([(pooled[:, c] * upper[:, d]).mean(dim=(1, 2)) for c in range(3) for d in range(2)])

    wanted = (flow(*student) - flow(*teacher)).square().mean()
    torch.testing.assert_close(fsp_loss(student, teacher), wanted, rtol=1e-12, atol=0)


def test_sizes_may_differ_between_the_networks():
    student, teacher = [torch.ones(1, 2, 4, 4)] * 2, [torch.ones(1, 2, 7, 7)] * 2
    assert fsp_loss(student, teacher).item() == pytest.approx(0, abs=1e-12)


def test_refuses_unequal_channels_and_a_single_stage():
    with pytest.raises(UsageError, match=r"the student's stages have \[4, 6\], the teacher's \[4, 8\]\. Use ickd"):
        built(FSP(), outputs((4, 4), (6, 2)), outputs((4, 4), (8, 2)))
    with pytest.raises(UsageError, match=r"these networks have one pair\. Use nst"):
        built(FSP(), outputs((4, 4)), outputs((4, 4)))
