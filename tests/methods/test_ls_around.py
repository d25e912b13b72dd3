"""Logit standardisation around other methods."""

import pytest
import torch

from potstill.errors import UsageError
from potstill.functional import dkd_loss, kd_loss
from potstill.methods import create_method
from potstill.methods.ls import standardise
from potstill.types import Batch, Outputs

torch.manual_seed(0)
STUDENT, TEACHER = Outputs(3 * torch.randn(4, 5)), Outputs(7 * torch.randn(4, 5))
BATCH = Batch(torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 2, 3]))


def test_kd_sees_standardised_logits_and_cross_entropy_plain_ones():
    terms = create_method("ls")(STUDENT, TEACHER, BATCH)
    plain = torch.nn.functional.cross_entropy(STUDENT.logits, BATCH.labels)
    kd = kd_loss(standardise(STUDENT.logits), standardise(TEACHER.logits), temperature=2.0)
    torch.testing.assert_close(terms, {"ce": 0.1 * plain, "kd": 9 * kd})


def test_dkd_has_both_of_its_weights_multiplied():
    method = create_method(
        "ls", base_method={"name": "dkd", "temperature": 2.0, "beta": 6.0, "warmup_epochs": 0}, ce_weight=1
    )
    method.start_epoch(0, 1)
    terms = method(STUDENT, TEACHER, BATCH)
    wanted = dkd_loss(
        standardise(STUDENT.logits),
        standardise(TEACHER.logits),
        BATCH.labels,
        temperature=2.0,
        alpha=9.0,
        beta=54.0,
    )
    torch.testing.assert_close(terms["tckd"] + terms["nckd"], wanted)


def test_methods_that_compare_other_things_are_refused():
    with pytest.raises(UsageError, match="at compares other things"):
        create_method("ls", base_method={"name": "at"})
    with pytest.raises(UsageError, match="deit_hard compares other things"):
        create_method("ls", base_method={"name": "deit_hard"})
    with pytest.raises(UsageError, match=r"base_method.*did you mean 'temperature'"):
        create_method("ls", base_method={"name": "kd", "temprature": 2})
    with pytest.raises(UsageError, match="standardises some of its terms"):
        create_method("ls", base_method={"name": "mlld"})


def test_two_classes_are_refused():
    two = Outputs(torch.randn(4, 2))
    with pytest.raises(UsageError, match=r"two classes alike.*Use method kd"):
        create_method("ls")(two, two, Batch(torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 0, 1])))
