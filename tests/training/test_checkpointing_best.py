"""When a checkpoint is due, and that writing it takes no part in the training."""

import threading

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from potstill.distillation.distiller import Distiller
from potstill.errors import StorageError
from potstill.methods.supervised import Supervised
from potstill.training import checkpointing
from potstill.training.checkpointing import History
from potstill.training.devices import Compute
from potstill.training.settings import TrainingSettings

CPU = Compute(torch.device("cpu"), bf16=False, channels_last=False)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(checkpointing, "time", found)
    return found


def saver(folder, **settings):
    distiller = Distiller(nn.Linear(3, 2), None, Supervised())
    optimizer = torch.optim.SGD(distiller.student.parameters(), lr=0.1)
    schedule = LambdaLR(optimizer, lambda _: 1.0)
    return checkpointing.Checkpointer(
        folder, TrainingSettings(epochs=4, **settings), CPU, distiller, optimizer, schedule, None, History()
    )


def test_the_end_of_a_short_training_has_no_checkpoint(tmp_path, clock):
    """It is due as at any other time, unless it is to be kept, or each epoch has one."""
    found = saver(tmp_path)
    clock.now += 59.9
    assert not found.is_due_at_end
    clock.now += 0.2
    assert found.is_due_at_end
    found.save(1)
    assert not found.is_due_at_end
    assert saver(tmp_path, keep_checkpoint=True).is_due_at_end
    assert saver(tmp_path, checkpoint_seconds=0).is_due_at_end


@pytest.mark.parametrize(("cost", "interval"), [(0.1, 60), (3.0, 150), (16.0, 800)])
def test_checkpoints_take_at_most_a_fiftieth_of_the_time(tmp_path, clock, monkeypatch, cost, interval):
    write = checkpointing.save_checkpoint

    def slow(*args, **kwargs):
        write(*args, **kwargs)
        clock.now += cost

    monkeypatch.setattr(checkpointing, "save_checkpoint", slow)
    found = saver(tmp_path)
    clock.now += 59.9
    assert not found.is_due
    clock.now += 0.2
    assert found.is_due
    found.save(1)
    clock.now += interval - 0.1
    assert not found.is_due
    clock.now += 0.2
    assert found.is_due


def test_the_first_checkpoint_of_a_large_memory_waits_as_long_as_its_bytes_suggest(tmp_path, clock):
    found = saver(tmp_path)
    bank = torch.empty(1, device="meta").expand(9, 10**8)  # 3.6 GB: 12 s, 2 % of 600
    found.distiller.register_buffer("bank", bank)
    clock.now += 599
    assert not found.is_due
    clock.now += 2
    assert found.is_due


def test_an_interval_that_is_given_is_kept_whatever_it_costs(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(checkpointing, "save_checkpoint", lambda *_, **__: setattr(clock, "now", clock.now + 100))
    found = saver(tmp_path, checkpoint_seconds=5)
    found.save(1)
    assert not found.is_due
    clock.now += 5
    assert found.is_due
    assert saver(tmp_path, checkpoint_seconds=0).is_due


def test_what_is_written_beside_the_training_is_the_state_at_that_time(tmp_path, monkeypatch):
    write, may_write = checkpointing.save_checkpoint, threading.Event()

    def waiting(*args, **kwargs):
        assert may_write.wait(60)
        write(*args, **kwargs)

    monkeypatch.setattr(checkpointing, "save_checkpoint", waiting)
    found = saver(tmp_path)
    weight = found.distiller.student.weight
    before = weight.detach().clone()
    found.save(1, background=True)
    assert not found.is_due
    with torch.no_grad():
        weight += 1  # training goes on
    may_write.set()
    found.wait()
    tensors, facts = checkpointing.load_checkpoint(tmp_path / checkpointing.LAST)
    assert facts["epoch"] == 1
    assert torch.equal(tensors["distiller/student.weight"], before)
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("call", ["wait", "save"])
def test_an_error_of_the_writing_thread_arrives(tmp_path, monkeypatch, call):
    def full(*_, **__):
        raise StorageError("cannot write last.checkpoint: No space left on device")

    monkeypatch.setattr(checkpointing, "save_checkpoint", full)
    found = saver(tmp_path)
    found.save(1, background=True)
    with pytest.raises(StorageError, match="No space left"):
        found.wait() if call == "wait" else found.save(2)
    found.wait()  # once


def test_checkpoints_of_a_finished_stage_are_removed_and_its_figures_stay(tmp_path):
    found = saver(tmp_path / "checkpoints")
    found.history.records.append({"epoch": 1, "best": True})
    for epoch in (1, 2):
        found.save(epoch)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    checkpointing.finish_checkpoints(tmp_path, found.history, keep=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [checkpointing.LAST]
    checkpointing.finish_checkpoints(tmp_path, found.history, keep=False)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [checkpointing.FIGURES]
    checkpointing.restore_metrics_file(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text().startswith('{"epoch": 1, "best": true')
