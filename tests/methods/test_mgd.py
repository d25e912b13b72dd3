import pytest
import torch
from made_maps import built, labelled, outputs

from potstill.methods.mgd import MGD, mgd_loss


def test_draw_can_be_fixed_and_masks_channels_below_the_share():
    student, teacher = outputs((6, 4)), outputs((6, 4))
    method = built(MGD(mask_share=0.5, weight=1.0), student, teacher)
    drawn = torch.tensor([0.2, 0.5, 0.9, 0.1, 0.49, 0.51]).view(1, 6, 1, 1)
    method.draw = lambda features: drawn
    by_hand = student.maps[0].clone()
    by_hand[:, [0, 3, 4]] = 0
    wanted = mgd_loss(method.generator(by_hand, torch.ones(1)), teacher.maps[0])
    torch.testing.assert_close(method(student, teacher, labelled())["mgd"], wanted)


def test_share_is_that_of_the_draw():
    features = torch.zeros(64, 512, 1, 1)
    drawn = MGD().draw(features)
    assert drawn.shape == (64, 512, 1, 1)
    assert (drawn < 0.15).float().mean().item() == pytest.approx(0.15, abs=0.01)


def test_equal_channels_need_no_layer_between():
    assert built(MGD(), outputs((6, 4)), outputs((6, 4))).generator.align is None
    assert built(MGD(), outputs((6, 4)), outputs((7, 4))).generator.align.weight.shape == (7, 6, 1, 1)
