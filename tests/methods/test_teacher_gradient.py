"""What a teacher said is a constant: no loss sends a gradient into it, even where somebody lets it require one."""

import inspect

import pytest
import torch

from potstill import functional

GIVEN = {"labels", "temperature"}
LOSSES = [
    name
    for name, loss in inspect.getmembers(functional, inspect.isfunction)
    if name.endswith("_loss")
    and list(parameters := inspect.signature(loss).parameters)[:2] == ["student_logits", "teacher_logits"]
    and {key for key, each in parameters.items() if each.default is each.empty} - GIVEN
    == {"student_logits", "teacher_logits"}
]


def test_most_losses_of_logits_are_among_them():
    assert {"kd_loss", "dkd_loss", "dist_loss", "nkd_loss", "ofa_loss", "ttm_loss"} <= set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_reaches_the_teachers_logits(name):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 4, generator=generator).requires_grad_() for _ in range(2))
    loss = getattr(functional, name)
    given = {"labels": torch.arange(6) % 4, "temperature": 2.0}
    loss(student, teacher, **{key: given[key] for key in GIVEN & inspect.signature(loss).parameters.keys()}).backward()
    assert student.grad.norm() > 0
    assert teacher.grad is None
