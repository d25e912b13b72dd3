"""Epochs in which the head alone is trained."""

from itertools import pairwise

import torch
from torch import nn

from potstill.input_spec import InputSpec
from potstill.training.settings import TrainingSettings

from .test_trainer import Counting, Numbers, train


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


def test_batch_norm_statistics_stay_while_its_weights_are_trained(tmp_path):
    settings = TrainingSettings(epochs=2, lr=0.05, checkpoint_seconds=0, freeze_batch_norm=True)
    _, student = train(tmp_path / "a", settings, loader=Sized(18))
    assert torch.equal(student.net[2].running_mean, torch.zeros(8))
    assert torch.equal(student.net[2].running_var, torch.ones(8))
    assert not torch.equal(student.net[2].weight, torch.ones(8))
    _, student = train(tmp_path / "b", settings.model_copy(update={"freeze_batch_norm": False}), loader=Sized(18))
    assert not torch.equal(student.net[2].running_mean, torch.zeros(8))


def test_blocks_far_below_the_heads_learning_rate_are_not_trained(tmp_path, monkeypatch):
    scales = {"net.1": 0.25, "net.2": 0.5, "net.4": 1.0}  # layer_decay: 0.5

    def by_block(network, decay):
        return {name: scales[name.rpartition(".")[0]] for name, _ in network.named_parameters()}

    monkeypatch.setattr("potstill.training.optim.layer_lr_scales", by_block)
    settings = TrainingSettings(epochs=1, lr=0.05, checkpoint_seconds=0, layer_decay=0.5)
    torch.manual_seed(0)
    start, moved = Counting().state_dict(), {}
    for scale in (0.0, 0.3, 0.6):
        changes = {"layer_decay_no_opt_scale": scale}
        _, student = train(tmp_path / str(scale), settings.model_copy(update=changes), loader=Sized(18))
        moved[scale] = {n.split(".")[1] for n, p in student.named_parameters() if not torch.equal(p, start[n])}
        assert all(parameter.requires_grad for parameter in student.parameters())
    assert moved == {0.0: {"1", "2", "4"}, 0.3: {"2", "4"}, 0.6: {"4"}}
