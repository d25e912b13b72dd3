import pytest
import torch

from potstill.data.datasets import load_data
from potstill.experiment import estimate
from potstill.experiment.estimate import estimate_stages
from potstill.experiment.pipeline import run
from potstill.experiment.plan import plan_stages
from potstill.training.callbacks import SilentObserver
from potstill.training.devices import create_compute

WHOLE_RUNS = True


class Listening(SilentObserver):
    def __init__(self):
        self.said = []

    def note(self, message):
        self.said += [message] if message.startswith("teacher cache: ") else []


def test_a_run_says_it_before_it_trains_on_the_store(recipe, tmp_path):
    first, second = Listening(), Listening()
    options = {"training.epochs": 3, "teacher_cache.views": 2, "seed": 77}  # a teacher that no other test has recorded
    done = run(recipe(**options), output_dir=tmp_path, name="first", observer=first)
    run(recipe(**options, **{"teacher.weights": str(done)}), output_dir=tmp_path, name="second", observer=second)
    # 42 of 60 images train; three classes take six bytes
    (said,), (again,) = first.said, second.said
    assert said == "teacher cache: 2 views of 42 images, 504 B, empty"
    assert again == "teacher cache: 2 views of 42 images, 504 B, complete"


def test_nothing_is_said_where_nothing_is_stored(recipe, tmp_path):
    listening = Listening()
    run(recipe(**{"teacher_cache.mode": "off"}), output_dir=tmp_path, observer=listening)
    assert listening.said == []


def test_every_stage_has_its_time(recipe):
    given = recipe(**{"training.epochs": 10, "teacher.training.epochs": 1, "teacher_cache.views": 2})
    data = load_data(given.data)
    compute = create_compute(given.stage_training("student"))
    state = torch.random.get_rng_state()
    found = estimate_stages(given, plan_stages(given), data, compute)
    assert torch.equal(state, torch.random.get_rng_state())
    assert list(found) == ["teacher", "baseline", "distilled"]
    assert all(seconds > 0 for seconds in found.values())
    assert found["distilled"] > found["baseline"]  # the same, and two views by the teacher
    longer = estimate_stages(
        recipe(**{"training.epochs": 10_000}), plan_stages(given), data, compute
    )  # so much longer that no noise hides it
    assert longer["baseline"] > 10 * found["baseline"]


def test_no_training_step_is_timed_of_a_teacher_that_is_not_trained(recipe, monkeypatch):
    given = recipe(**{"teacher.weights": "pretrained", "teacher.head": "probe"})
    data, compute = load_data(given.data), create_compute(given.stage_training("student"))
    monkeypatch.setattr(estimate, "create_timed_step", None)
    assert estimate_stages(given, plan_stages(given, ("teacher",)), data, compute)["teacher"] > 0


def test_unlabeled_images_count_and_their_teacher_runs_until_all_views_are_recorded(recipe):
    changes = {"data.labels_per_class": 4, "data.unlabeled_share": 0.75, "teacher_cache.views": 2}
    given = recipe(**changes, **{"training.epochs": 40})
    data = load_data(given.data)
    assert (len(data.train), len(data.unlabeled)) == (12, 30)
    compute = create_compute(given.stage_training("student"))
    found = estimate_stages(given, plan_stages(given), data, compute)
    # 12 labeled and 36 unlabeled images an epoch: two views of 30 are seen after 5/3 epochs, of the 12 after two.
    assert found["distilled"].share == pytest.approx(2 / 40)
    assert found["distilled"].first > found["distilled"].at(0.5) - found["distilled"].at(0.45)
    assert found["distilled"].at(1) == pytest.approx(float(found["distilled"]))
    assert found["distilled"] > found["baseline"]
    assert found["baseline"].share == 0
