import pytest
import torch
from made_maps import built, labelled, outputs

from potstill.methods.wkd_f import WKDF, wkd_f_loss


def test_equals_loops_over_cells():
    student, teacher = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 6, 6).double()
    wanted = 0.0
    for row in range(2):
        for column in range(2):
            ours = student[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(2)
            theirs = teacher[:, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3].flatten(2)
            means = (ours.mean(dim=2) - theirs.mean(dim=2)).square().sum()
            spreads = ((ours.var(dim=2) + 1e-5).sqrt() - (theirs.var(dim=2) + 1e-5).sqrt()).square().sum()
            wanted += (3 * means + spreads) / 2 / 4
    torch.testing.assert_close(wkd_f_loss(student, teacher, mean_weight=3.0, grid=2), wanted, rtol=1e-10, atol=0)


def test_cells_are_those_of_torchs_adaptive_pooling():
    student = torch.randn(1, 2, 7, 5).double()
    pooled = torch.nn.functional.adaptive_avg_pool2d(student, 3)
    far = torch.zeros(1, 2, 3, 3).double()  # one place a cell
    spread = wkd_f_loss(student, far, mean_weight=0.0, grid=3)
    means = wkd_f_loss(student, far, mean_weight=1.0, grid=3) - spread
    torch.testing.assert_close(means, pooled.square().sum() / 9, rtol=1e-10, atol=0)


def test_a_cell_of_one_place_has_no_spread():
    student, teacher = torch.full((1, 1, 1, 1), 3.0, requires_grad=True), torch.full((1, 1, 1, 1), 1.0)
    loss = wkd_f_loss(student, teacher, mean_weight=2.0, grid=4)
    assert loss.item() == pytest.approx(8.0)
    loss.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", [*WKDF.PRESETS])
def test_presets_run(name):
    student, teacher = outputs((4, 3), grad=True), outputs((7, 5))
    method = built(WKDF(**WKDF.PRESETS[name]), student, teacher)
    assert method(student, teacher, labelled())["wkd_f"].isfinite()
