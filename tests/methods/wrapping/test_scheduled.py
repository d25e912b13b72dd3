import math

import pytest
import torch

from potstill.errors import UsageError
from potstill.methods import create_method
from potstill.methods.schedules import Schedule, check_schedule
from potstill.types import Batch, Outputs

STUDENT = Outputs(torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.2, 0.1]]))
TEACHER = Outputs(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
BATCH = Batch(torch.zeros(2, 3, 2, 2), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Schedule("constant", 3.0, 9.0), [3.0, 3.0, 3.0, 3.0, 3.0]),
        (Schedule("linear", 4.0, 0.0), [4.0, 3.0, 2.0, 1.0, 0.0]),
        (Schedule("cosine", 1.0, 0.0), [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0]),
        (Schedule("step", 1.0, 0.0, finish=0.5), [1.0, 1.0, 0.0, 0.0, 0.0]),
        (Schedule("linear", 0.0, 1.0, begin=0.5, finish=0.75), [0.0, 0.0, 0.0, 1.0, 1.0]),
    ],
)
def test_values_by_hand(schedule, values):
    assert [schedule.at(epoch, 5) for epoch in range(5)] == pytest.approx(values, abs=1e-12)


def test_a_training_of_one_epoch_stays_at_the_start():
    assert Schedule("linear", 4.0, 1.0).at(0, 1) == 4.0


def test_a_term_is_scaled_and_the_others_are_not():
    plain = create_method("kd")(STUDENT, TEACHER, BATCH)
    method = create_method("kd", schedule={"kd": {"shape": "linear", "start": 1, "end": 0}})
    for epoch, factor in enumerate((1.0, 0.5, 0.0)):
        method.start_epoch(epoch, 3)
        terms = method(STUDENT, TEACHER, BATCH)
        assert terms["kd"].item() == pytest.approx(factor * plain["kd"].item())
        assert terms["ce"].item() == pytest.approx(plain["ce"].item())


@pytest.mark.parametrize(
    ("name", "weighed"),  # of whom alpha is the weight
    [("kd", "ce"), ("tfkd_self", "other"), ("tfkd_reg", "other")],
)
def test_alpha_moves_both_terms(name, weighed):
    """As a method that was made with that alpha, whatever the one it began with."""
    method = create_method(name, schedule={"alpha": {"shape": "linear", "start": 0.8, "end": 0.2}})
    for epoch, alpha in enumerate((0.8, 0.5, 0.2)):
        method.start_epoch(epoch, 3)
        moved, made = (each(STUDENT, TEACHER, BATCH) for each in (method, create_method(name, alpha=alpha)))
        assert moved.keys() == made.keys()
        for key in made:
            torch.testing.assert_close(moved[key], made[key])
        labels = torch.nn.functional.cross_entropy(STUDENT.logits, BATCH.labels)
        torch.testing.assert_close(moved["ce"], (alpha if weighed == "ce" else 1 - alpha) * labels)


def test_an_option_is_set_to_the_value():
    method = create_method("kd", schedule={"temperature": {"shape": "linear", "start": 8, "end": 2}})
    method.start_epoch(1, 3)
    torch.testing.assert_close(
        method(STUDENT, TEACHER, BATCH)["kd"], create_method("kd", temperature=5.0)(STUDENT, TEACHER, BATCH)["kd"]
    )


def test_without_epochs_a_schedule_is_refused():
    method = create_method("kd", schedule={"kd": {"shape": "linear", "start": 1, "end": 0}})
    with pytest.raises(UsageError, match="start_epoch"):
        method(STUDENT, TEACHER, BATCH)


def test_a_term_that_does_not_exist_is_named_with_its_neighbour():
    method = create_method("kd", schedule={"kdd": {"shape": "linear"}})
    method.start_epoch(0, 2)
    with pytest.raises(UsageError, match=r"'kdd'.*did you mean 'kd'"):
        method(STUDENT, TEACHER, BATCH)


def test_settings_are_checked_before_anything_is_built():
    assert check_schedule({"kd": {"shape": "linear", "start": 1.0, "end": 0}}) == []
    (problem,) = check_schedule({"kd": {"shpe": "linear"}})
    assert "did you mean 'shape'" in problem
    (problem,) = check_schedule({"kd": {"shape": "curved"}})
    assert "constant, linear, cosine, step" in problem
    with pytest.raises(UsageError, match=r"schedule\.kd\.start must be a number"):
        create_method("kd", schedule={"kd": {"start": "much"}})
