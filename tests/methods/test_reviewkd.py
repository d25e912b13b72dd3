import pytest
import torch
import torch.nn.functional as F
from made_maps import built, labelled, outputs

from potstill.methods.reviewkd import Fusion, ReviewKD, hcl_loss


def test_weight_halves_only_for_sizes_that_are_used():
    student, teacher = torch.zeros(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
    teacher[0, 0, 0, 0] = 10.0  # mean 2
    two = F.adaptive_avg_pool2d(teacher, 2).square().mean().item()
    by_hand = ((8 + 100) / 9 + two / 2 + 4 / 4) / (1 + 1 / 2 + 1 / 4)  # 4 x 4 is left out, so 2 x 2 weighs a half
    assert hcl_loss([student], [teacher]).item() == pytest.approx(by_hand, rel=1e-6)


def test_attention_mixes_a_stage_with_the_deeper_one():
    fusion = Fusion(2, 3, 4, deepest=False).eval()
    torch.nn.init.zeros_(fusion.attention.weight)
    with torch.no_grad():
        fusion.attention.bias.copy_(torch.tensor([0.0, 100.0]))  # sigmoid: a half of this stage, all of the deeper
    features, deeper = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 2, 2)
    _, carried = fusion(features, deeper, (4, 4))
    wanted = 0.5 * fusion.reduce_norm(fusion.reduce(features)) + deeper.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(carried, wanted)


def test_weight_rises_within_the_warm_up():
    student, teacher = outputs((4, 4), (6, 2), grad=True), outputs((5, 4), (7, 2))
    method = built(ReviewKD(), student, teacher).eval()
    terms = {}
    for epoch in (0, 9, 19, 200):
        method.start_epoch(epoch, 240)
        terms[epoch] = method(student, teacher, labelled())["review"].item()
    full = terms[200]
    assert [terms[epoch] / full for epoch in (0, 9, 19)] == pytest.approx([1 / 20, 1 / 2, 1.0])
    targets = [*teacher.maps, teacher.embedding[:, :, None, None]]
    ours = method.review([*student.maps, student.embedding[:, :, None, None]], [t.shape[2:] for t in targets])
    assert full == pytest.approx(5 * hcl_loss(ours, targets).item(), rel=1e-5)


def test_middle_is_the_students_embedding_but_not_more_than_asked():
    student, teacher = outputs((4, 4), embedding=6), outputs((5, 4), embedding=7)
    assert built(ReviewKD(), student, teacher).review.fusions[0].reduce.out_channels == 6
    assert built(ReviewKD(max_mid=3), student, teacher).review.fusions[0].reduce.out_channels == 3


def test_reads_the_teacher_before_its_activation_and_the_student_as_asked():
    assert ReviewKD().needs.before_activation == "teacher"
    assert ReviewKD(student_before_activation=True).needs.before_activation == "both"
    assert ReviewKD(**ReviewKD.PRESETS["imagenet/resnet34-resnet18"]).needs.before_activation == "both"
