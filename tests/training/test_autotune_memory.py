"""Whether a batch fits is found out before the first epoch; memory runs out where a stand-in says so."""

import pytest
import torch
from torch import nn

from potstill.distillation.distiller import Distiller
from potstill.distributed.group import ProcessGroup
from potstill.errors import StorageError
from potstill.methods import create_method
from potstill.methods.kd import KD
from potstill.training import trainer as trainer_module
from potstill.training.autotune import BatchTrial, is_out_of_memory, largest_fitting_batch
from potstill.training.devices import Compute
from potstill.training.settings import TrainingSettings
from potstill.types import Batch

from .test_trainer import Counting, train

CPU = Compute(torch.device("cpu"), bf16=False, channels_last=False)
SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.9 GiB\nmore"


class Limited(nn.Module):
    """A network for at most so many images, in its forward or its backward pass."""

    def __init__(self, network, most, backward=False):
        super().__init__()
        self.network, self.most, self.backward, self.tried = network, most, backward, []

    def forward(self, images):
        self.tried.append(len(images))
        too_many = len(images) > self.most
        if too_many and not self.backward:
            raise torch.OutOfMemoryError(SAID)
        logits = self.network(images)
        if too_many and logits.requires_grad:
            logits.register_hook(self.fail)
        return logits

    def fail(self, _):
        raise torch.OutOfMemoryError(SAID)


def trial(student, teacher, images=256, compute=CPU, method=None):
    distiller = Distiller(student, teacher, method or KD())
    labels = torch.arange(images) % 3
    batch = Batch(torch.zeros(images, 3, 2, 2), labels, torch.arange(images), torch.zeros_like(labels))
    return distiller, BatchTrial(distiller, batch, compute, stage="distilled", state_bytes=10)


@pytest.mark.parametrize(
    ("student", "teacher", "backward", "part"),
    [(100, 999, False, "student's forward pass"), (999, 100, False, "teacher's forward pass"),
     (100, 999, True, "backward pass")],
)  # fmt: skip
def test_the_error_names_stage_part_bytes_and_the_batch_that_fits(student, teacher, backward, part):
    _, tried = trial(Limited(Counting(), student, backward), Limited(Counting(), teacher))
    with pytest.raises(StorageError) as error:
        tried.run()
    first, second = str(error.value).splitlines()
    assert first.startswith(f"distilled: out of memory at batch 256, in the {part}: 96 fits.")
    assert "Tried to allocate 2.00 GiB" in first
    assert second == "To go on, set training.batch_size=96, or accumulate: training.gradient_accumulation_steps=3"
    assert error.value.exit_code == 5


def test_several_processes_are_told_the_batch_of_all():
    four = Compute(torch.device("cpu"), bf16=False, channels_last=False, processes=ProcessGroup(0, 4, 0, 4))
    _, tried = trial(Limited(Counting(), 100), Counting(), compute=four)
    with pytest.raises(StorageError, match=r"at batch 256 in each of 4 processes.*96 in each of 4 processes fits"):
        tried.run()
    with pytest.raises(StorageError, match=r"batch_size=384"):
        tried.run()


def test_nothing_fits():
    _, tried = trial(Limited(Counting(), 0), Counting())
    with pytest.raises(StorageError, match=r"not even one image fits.*\nTo go on, take smaller images"):
        tried.run()


def test_a_trial_changes_nothing():
    torch.manual_seed(0)
    distiller, tried = trial(Counting(), Counting())
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    random = torch.get_rng_state()
    tried.run()
    after = distiller.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in distiller.parameters())
    assert distiller.training


def test_a_memory_of_samples_is_restored():
    images, labels = torch.zeros(8, 3, 2, 2), torch.arange(8) % 3
    distiller = Distiller(
        Counting(), Counting(), create_method("pskd"), example=images, train_labels=labels, batch_size=8
    )
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    batch = Batch(images, labels, torch.arange(8), torch.zeros_like(labels))
    BatchTrial(distiller, batch, CPU, stage="distilled", state_bytes=0).run()
    assert all(torch.equal(value, before[name]) for name, value in distiller.state_dict().items())


def test_other_errors_are_not_taken_for_memory():
    def attempt(images):
        raise ValueError("a shape")

    with pytest.raises(ValueError, match="a shape"):
        largest_fitting_batch(attempt, 8)
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))


def test_it_is_tried_before_the_first_epoch(tmp_path, monkeypatch):
    """With the batch of the loader: four images."""
    from .test_trainer import Numbers

    class Loader(Numbers):
        spec = type("Spec", (), {"size": 2})
        collator = type("Collator", (), {"mixer": None})

    tried = []
    monkeypatch.setattr(trainer_module, "needs_trial", lambda compute: True)
    monkeypatch.setattr(BatchTrial, "run", lambda self: tried.append((len(self.batch), self.stage, self.state_bytes)))
    train(tmp_path / "baseline", TrainingSettings(epochs=1, lr=0.05), loader=Loader(18))
    weights = sum(parameter.numel() for parameter in Counting().parameters())
    assert tried == [(4, "baseline", 8 * weights)]  # AdamW keeps two numbers for a weight
