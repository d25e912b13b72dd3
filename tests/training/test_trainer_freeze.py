"""Epochs in which the head alone is trained."""

from itertools import pairwise

import torch
from torch import nn

from potstill.input_spec import InputSpec
from potstill.training.settings import TrainingSettings

from .test_trainer import Numbers, train


class Sized(Numbers):
    spec = InputSpec(2)


def encoder_and_head(student):
    state = {key: value.clone() for key, value in student.state_dict().items()}
    head = {key: state.pop(key) for key in list(state) if key.startswith("net.4.")}
    return state, head


def test_the_encoder_stays_for_as_many_epochs_and_is_trained_from_then_on(tmp_path, monkeypatch):
    from potstill.training import trainer

    seen, evaluate = [], trainer.Trainer._evaluate

    def watched(self, epoch, split, loader):
        seen.append(encoder_and_head(self.distiller.student))
        return evaluate(self, epoch, split, loader)

    monkeypatch.setattr(trainer.Trainer, "_evaluate", watched)
    settings = TrainingSettings(epochs=4, lr=0.05, checkpoint_seconds=0, freeze=2, weight_decay=0.1)
    _, student = train(tmp_path, settings, loader=Sized(18))
    same = [all(torch.equal(a[key], b[key]) for key in a) for (a, _), (b, _) in pairwise(seen)]
    assert same == [True, False, False]  # after epochs 1 and 2, 2 and 3, 3 and 4; BatchNorm statistics among them
    assert not any(torch.equal(a["net.4.weight"], b["net.4.weight"]) for (_, a), (_, b) in pairwise(seen))
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert isinstance(student.net[4], nn.Linear)
