import pytest
import torch
from torch import nn

from potstill.training import autotune as threads_module
from potstill.training.autotune import ThreadSelector
from potstill.training.callbacks import SilentObserver
from potstill.training.devices import Compute
from potstill.training.settings import TrainingSettings

CPU = Compute(torch.device("cpu"), bf16=False, channels_last=False)
GPU = Compute(torch.device("cuda"), bf16=True, channels_last=True)
AUTO = TrainingSettings()


@pytest.fixture(autouse=True)
def eight_threads(monkeypatch, thread_count):
    """On a machine of eight cores, whatever this one has."""
    torch.set_num_threads(8)
    monkeypatch.setattr(threads_module, "usable_cores", lambda: 8)


@pytest.fixture
def asked(monkeypatch):
    """The candidates of each calibration; the last one wins."""
    calls = []

    def calibrate(step, candidates, **_):
        step()
        calls.append(list(candidates))
        return candidates[-1], dict.fromkeys(candidates, 0.01)

    monkeypatch.setattr(threads_module, "select_fastest", calibrate)
    return calls


def settle(threads, settings=AUTO, compute=CPU, **kwargs):
    threads.select(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), 8, settings, compute, **kwargs)
    return torch.get_num_threads()


def test_the_first_training_is_timed_and_the_others_follow(asked):
    notes, kept = [], []

    class Listening(SilentObserver):
        def note(self, message):
            notes.append(message)

    with ThreadSelector(on_choice=kept.append) as threads:
        assert settle(threads, observer=Listening()) == 1
        torch.set_num_threads(5)
        assert settle(threads, observer=Listening()) == 1
    assert asked == [[8, 1]]
    assert kept == [{"threads": 1, "calibration": {"1": 0.01, "8": 0.01}}]
    assert len(notes) == 1
    assert torch.get_num_threads() == 8  # put back


def test_a_resumed_run_takes_what_its_first_process_found(asked):
    kept = []
    with ThreadSelector({"threads": 3, "calibration": {"1": 0.5, "3": 0.2}}, kept.append) as threads:
        assert settle(threads) == 3
    assert asked == []
    assert kept == [{"threads": 3, "calibration": {"1": 0.5, "3": 0.2}}]  # environment.json is written anew


@pytest.mark.parametrize("recorded", [{"threads": 3}, {"threads": 9, "calibration": {}}, {}, None])
def test_what_nobody_chose_or_what_another_machine_had_is_found_anew(asked, recorded):
    with ThreadSelector(recorded) as threads:
        assert settle(threads) == 1
    assert asked == [[8, 1]]


def test_an_explicit_number_is_taken_as_it_is(asked):
    with ThreadSelector() as threads:
        assert settle(threads, TrainingSettings(threads=3)) == 3
        assert settle(threads) == 1  # the next training's own setting
    assert asked == [[8, 1]]


@pytest.mark.parametrize(("workers", "candidates"), [(2, [[6, 1]]), (6, [[2, 1]]), (7, []), (20, [])])
def test_workers_need_cores_too(asked, workers, candidates):
    with ThreadSelector() as threads:
        settle(threads, workers=workers)
    assert asked == candidates


def test_one_thread_leaves_nothing_to_time(asked):
    torch.set_num_threads(1)  # as OMP_NUM_THREADS=1 does
    kept = []
    with ThreadSelector(on_choice=kept.append) as threads:
        assert settle(threads) == 1
    assert asked == []
    assert kept == [{"threads": 1, "calibration": {}}]


def test_on_a_gpu_nothing_is_timed(asked):
    with ThreadSelector() as threads:
        assert settle(threads, compute=GPU) == 8
    assert asked == []


def test_never_more_threads_than_were_allowed(asked):
    torch.set_num_threads(4)  # as OMP_NUM_THREADS=4 does
    with ThreadSelector() as threads:
        settle(threads)
    assert asked == [[4, 1]]


def test_for_real():
    with ThreadSelector() as threads:
        settle(threads)
        assert threads.choice.threads in (1, 8)
        assert sorted(threads.choice.seconds) == [1, 8]
