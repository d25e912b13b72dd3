"""The mistakes of the field, planted one by one: a test of ours must fail for each."""

from contextlib import ExitStack

import pytest
import test_contract as contract
import torch
import torch.nn.functional as F
from torch import nn

from potstill.distillation.distiller import Distiller
from potstill.distillation.teachers import Teachers
from potstill.functional import kd_loss
from potstill.methods.dkd import DKD
from potstill.methods.fitnet import FitNet
from potstill.methods.kd import KD
from potstill.methods.vid import VID


@pytest.fixture
def plant(monkeypatch):
    return monkeypatch.setattr


def kd_value(loss) -> float:
    """By hand: 4 (0.8808 ln(0.8808 / 0.5) + 0.1192 ln(0.1192 / 0.5)) = 1.3113."""
    return loss(torch.zeros(1, 2), torch.tensor([[4.0, 0.0]]), temperature=2.0).item()


def soft(logits, temperature):
    return F.log_softmax(logits / temperature, dim=1)


WRONG = {
    "T squared lost": lambda s, t, temperature: F.kl_div(
        soft(s, temperature), soft(t, temperature), reduction="batchmean", log_target=True
    ),
    "divided by B * K": lambda s, t, temperature: kd_loss(s, t, temperature=temperature) / s.shape[1],
    "the wrong way round": lambda s, t, temperature: kd_loss(t, s, temperature=temperature),
}


def test_the_right_value_passes():
    assert kd_value(kd_loss) == pytest.approx(1.3113, abs=1e-4)


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_divergence_has_another_value(mistake):
    assert kd_value(WRONG[mistake]) != pytest.approx(1.3113, abs=1e-2)


def test_a_teacher_in_train_mode(plant):
    plant(Teachers, "train", lambda self, mode=True: nn.Module.train(self, mode))
    with pytest.raises(AssertionError):
        contract.test_leaves_the_teacher_as_it_was("kd")


def test_a_teacher_that_is_not_frozen(plant):
    plant(nn.Module, "requires_grad_", lambda self, requires_grad=True: self)
    with pytest.raises(AssertionError):
        contract.test_leaves_the_teacher_as_it_was("kd")


def test_a_student_left_in_eval_mode(plant):
    def train(self, mode=True):
        nn.Module.train(self, mode)
        self.student.eval()
        return self

    plant(Distiller, "train", train)
    with pytest.raises(AssertionError):
        contract.test_student_is_in_train_mode_after_an_evaluation("kd")


def test_a_teacher_in_the_checkpoint(plant):
    plant("potstill.distillation.distiller._drop_teacher_state", lambda *_: None)
    with pytest.raises(AssertionError):
        contract.test_state_dict_holds_no_teacher_and_can_be_loaded("kd")


def test_an_adapter_without_gradient(plant):
    distill = FitNet.distill
    plant(FitNet, "distill", lambda *given: {name: term.detach() for name, term in distill(*given).items()})
    with pytest.raises(AssertionError):
        contract.test_gradient_reaches_every_trained_parameter("fitnet")


def test_an_adapter_that_the_optimizer_does_not_know(plant):
    parameters = Distiller.trained_parameters
    plant(
        Distiller,
        "trained_parameters",
        lambda self: [pair for pair in parameters(self) if pair[0].startswith("student.")],
    )
    with pytest.raises(AssertionError):
        contract.test_whatever_learns_is_among_the_trained_parameters("fitnet")


def test_variances_in_a_plain_list(plant):
    build = VID.build

    def hidden(self, *given):
        build(self, *given)
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.ndim == 1 and "scale" in name:
                    del module._parameters[name]
                    object.__setattr__(module, name, parameter)

    plant(VID, "build", hidden)
    with pytest.raises(AssertionError):
        contract.test_whatever_learns_is_among_the_trained_parameters("vid")


def test_hooks_that_stay(plant):
    class Forever(ExitStack):
        def __exit__(self, *_):
            self.pop_all()

    plant("potstill.features.hooks.ExitStack", Forever)
    with pytest.raises(AssertionError):
        contract.test_can_be_copied_and_leaves_no_hooks("at")


def test_a_label_term_that_cannot_be_replaced(plant):
    plant(
        KD,
        "label_terms",
        lambda self, student, batch: {"ce": self.alpha * F.cross_entropy(student.logits, batch.labels)},
    )
    with pytest.raises(AssertionError):
        contract.test_label_loss_can_be_replaced("kd")


def test_an_infinite_term_of_a_confident_student(plant):
    def overflows(logits, targets):
        chosen = logits.softmax(dim=1).gather(1, targets[:, None])
        return torch.cat([chosen, 1 - chosen], dim=1).log()

    plant("potstill.methods.numerics.binary_log_probs", overflows)
    from potstill.functional import tckd_loss

    sure = torch.tensor([[900.0, 0.0, 0.0]])
    assert not tckd_loss(sure, -sure, torch.tensor([0]), temperature=1.0).isfinite()


def test_a_warm_up_that_nobody_moves(plant):
    plant(DKD, "progress", 0)
    with pytest.raises(pytest.fail.Exception):
        contract.test_refuses_a_batch_that_lacks_what_it_needs("dkd")
