import pytest
import torch
from torch import nn

from potstill.distillation.distiller import Distiller
from potstill.errors import UsageError
from potstill.input_spec import InputSpec
from potstill.methods.kd import KD
from potstill.methods.supervised import Supervised
from potstill.types import Outputs


class Seen(nn.Module):
    """Remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, images):
        self.images = images
        return self.linear(images.mean(dim=(2, 3)))


IMAGES, LABELS = torch.rand(5, 3, 8, 8), torch.arange(5) % 4


def test_the_teacher_gets_its_own_normalisation_and_size():
    pixels = torch.rand(5, 3, 8, 8)
    student_spec = InputSpec(8, (0.5,) * 3, (0.5,) * 3)
    teacher_spec = InputSpec(16, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    student, teacher = Seen(), Seen()
    distiller = Distiller(student, teacher, KD(), student_input=student_spec, teacher_input=teacher_spec)
    images = (pixels - 0.5) / 0.5
    with torch.no_grad():
        distiller(images, LABELS)
    with pytest.warns(UserWarning, match=r"teacher of 16 px gets the student's images of 8 px, enlarged"):
        distiller(images, LABELS)
    distiller(images, LABELS)  # once
    mean, std = torch.tensor(teacher_spec.mean).view(3, 1, 1), torch.tensor(teacher_spec.std).view(3, 1, 1)
    large = nn.functional.interpolate(pixels, (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(teacher.images, (large - mean) / std)
    assert student.images is images


def test_one_input_spec_alone_is_refused():
    with pytest.raises(UsageError, match="give both student_input and teacher_input"):
        Distiller(Seen(), Seen(), KD(), student_input=InputSpec(8))


def test_known_teacher_outputs_replace_the_teacher():
    student, teacher = Seen(), Seen()
    distiller = Distiller(student, teacher, KD())
    live = distiller(IMAGES, LABELS)
    with torch.no_grad():
        known = Outputs(teacher(IMAGES))
    del teacher.images
    stored = distiller(IMAGES, LABELS, teacher=known)
    assert not hasattr(teacher, "images")
    torch.testing.assert_close(stored.loss, live.loss, rtol=0, atol=0)


def test_a_method_with_a_teacher_needs_one():
    with pytest.raises(UsageError, match="kd needs a teacher"):
        Distiller(Seen(), None, KD())


def test_without_need_no_teacher_is_kept_or_run():
    teacher = Seen()
    Distiller(Seen(), teacher, Supervised())(IMAGES, LABELS)
    assert not hasattr(teacher, "images")


def test_a_softmax_at_the_end_is_named_once():
    for student, teacher, name in (
        (nn.Sequential(Seen(), nn.Softmax(1)), Seen(), "student"),
        (Seen(), nn.Sequential(Seen(), nn.Softmax(1)), "teacher"),
    ):
        distiller = Distiller(student, teacher, KD())
        with pytest.warns(UserWarning, match=f"the {name} returns probabilities .* all losses want logits"):
            distiller(IMAGES, LABELS)
        distiller(IMAGES, LABELS)
    distiller = Distiller(Seen(), nn.Sequential(Seen(), nn.LogSoftmax(1)), KD())
    distiller(IMAGES, LABELS)


def test_logits_must_be_a_matrix():
    with pytest.raises(UsageError, match=r"must return logits \[B, K\]"):
        Distiller(nn.Identity(), None, Supervised())(IMAGES, LABELS)


def test_matches_a_loop_written_by_hand():
    torch.manual_seed(0)
    student, teacher = Seen(), Seen()
    step = Distiller(student, teacher, KD(temperature=3.0, alpha=0.2))(IMAGES, LABELS)
    z, t = student(IMAGES), teacher(IMAGES)
    soft = (t / 3).softmax(1)
    kd = 9 * (soft * (soft.log() - (z / 3).log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(step.loss, 0.2 * nn.functional.cross_entropy(z, LABELS) + 0.8 * kd)
