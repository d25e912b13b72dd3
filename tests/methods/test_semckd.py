import pytest
import torch
from made_maps import CLASSES, built, labelled, outputs

from potstill.errors import UsageError
from potstill.methods.base import NetworkInfo, TrainingInfo
from potstill.methods.semckd import SemCKD, semckd_loss


def test_equals_loops_over_images_and_stages():
    projected = [[torch.randn(3, 2, 4, 4) for _ in range(3)] for _ in range(2)]
    targets = [[torch.randn(3, 2, 4, 4) for _ in range(3)] for _ in range(2)]
    attention = torch.rand(3, 2, 3).softmax(dim=2)
    wanted = sum(
        attention[b, s, t] * (projected[s][t][b] - targets[s][t][b]).square().mean()
        for b in range(3)
        for s in range(2)
        for t in range(3)
    )
    torch.testing.assert_close(semckd_loss(projected, targets, attention), wanted / 6)


def test_attention_sums_to_1_over_the_teachers_stages():
    student, teacher = outputs((4, 4), (6, 2), batch=8), outputs((5, 4), (7, 2), (7, 1), batch=8)
    method = built(SemCKD(), student, teacher)
    attention = method.calibration.attention(student.maps, teacher.maps, 1.0)
    assert attention.shape == (8, 2, 3)
    torch.testing.assert_close(attention.sum(dim=2), torch.ones(8, 2))
    assert method.calibration.queries[0].linear2.out_features == 2  # 8 / 4


@pytest.mark.parametrize(("batch", "dimension"), [(64, 16), (8, 2), (7, 2), (4, 2), (2, 2)])
def test_queries_have_a_quarter_of_the_batch_but_two_dimensions_at_least(batch, dimension):
    method = built(SemCKD(), outputs((4, 4), batch=batch), outputs((5, 4), batch=batch))
    assert method.calibration.queries[0].linear2.out_features == dimension


def test_refuses_a_larger_batch():
    student, teacher = outputs((4, 4), batch=2), outputs((5, 4), batch=2)
    method = SemCKD()
    method.build(
        NetworkInfo(student), NetworkInfo(teacher), TrainingInfo(classes=CLASSES, batch_size=6)
    )  # the example has 2
    method(outputs((4, 4), batch=6), outputs((5, 4), batch=6), labelled(6))
    with pytest.raises(UsageError, match="built for 6 images a step and got 7"):
        method(outputs((4, 4), batch=7), outputs((5, 4), batch=7), labelled(7))


def test_images_that_a_smaller_last_batch_lacks_resemble_none():
    student, teacher = outputs((4, 4), (6, 2), batch=8), outputs((5, 4), (7, 2), batch=8)
    method = built(SemCKD(), student, teacher)
    ours, theirs = ([maps[:5] for maps in each.maps] for each in (student, teacher))
    found = method.calibration.attention(ours, theirs, 1.0)
    zeros = (
        [torch.zeros(3, *maps.shape[1:]) for maps in student.maps],
        [torch.zeros(3, *maps.shape[1:]) for maps in teacher.maps],
    )
    padded = (
        [torch.cat(pair) for pair in zip(maps, zero, strict=True)]
        for maps, zero in zip((ours, theirs), zeros, strict=True)
    )
    torch.testing.assert_close(found, method.calibration.attention(*padded, 1.0)[:5])
    terms = method(outputs((4, 4), (6, 2), batch=5), outputs((5, 4), (7, 2), batch=5), labelled(5))
    assert all(term.isfinite() for term in terms.values())
