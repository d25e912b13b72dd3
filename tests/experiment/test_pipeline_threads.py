"""All trainings of a run compute with one number of threads, and so does the process that goes on with it."""

import json

import pytest
import torch

from potstill.experiment.pipeline import run
from potstill.training import autotune as threads_module
from potstill.training.callbacks import SilentObserver


class Counting(SilentObserver):
    """Notes the number of threads at each epoch; ends after ``stop`` of them."""

    def __init__(self, stop=None):
        self.seen, self.stop = [], stop

    def epoch_end(self, record):
        self.seen.append(torch.get_num_threads())
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt


@pytest.fixture
def four_cores(monkeypatch, thread_count):
    """Of which one is found best; the calls that found it are counted."""
    calls = []
    torch.set_num_threads(4)

    def calibrate(step, candidates, **_):
        calls.append(list(candidates))
        torch.set_num_threads(1)
        return 1, dict.fromkeys(candidates, 0.01)

    monkeypatch.setattr(threads_module, "usable_cores", lambda: 4)
    monkeypatch.setattr(threads_module, "select_fastest", calibrate)
    return calls


def environment(folder):
    return json.loads((folder / "environment.json").read_text())


def test_one_number_for_all_stages_is_found_once_recorded_and_put_back(recipe, tmp_path, four_cores):
    observer = Counting()
    folder = run(recipe(), output_dir=tmp_path, observer=observer)
    assert four_cores == [[4, 1]]
    assert set(observer.seen) == {1}
    assert len(observer.seen) == 3 + 2 + 2  # teacher, baseline, distilled
    assert environment(folder)["threads"] == 1
    assert environment(folder)["calibration"] == {"1": 0.01, "4": 0.01}
    assert torch.get_num_threads() == 4


def test_a_run_that_goes_on_keeps_the_number(recipe, tmp_path, four_cores):
    with pytest.raises(KeyboardInterrupt):
        run(recipe(), output_dir=tmp_path, name="run", observer=Counting(stop=4))
    assert torch.get_num_threads() == 4
    observer = Counting()
    folder = run(recipe(), output_dir=tmp_path, name="run", resume=True, observer=observer)
    assert four_cores == [[4, 1]]  # not timed again
    assert set(observer.seen) == {1}
    assert environment(folder)["threads"] == 1
    assert environment(folder)["calibration"] == {"1": 0.01, "4": 0.01}


def test_a_given_number_is_taken_without_timing(recipe, tmp_path, four_cores):
    observer = Counting()
    folder = run(recipe(**{"training.threads": 2}), output_dir=tmp_path, observer=observer)
    assert four_cores == []
    assert set(observer.seen) == {2}
    assert environment(folder)["threads"] == 2
