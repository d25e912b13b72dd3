"""A run with a curriculum: as many steps, the teacher's order, the same after a kill; and what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from potstill.config.recipe import CurriculumSettings, load_recipe
from potstill.errors import UsageError
from potstill.experiment import curriculum as module
from potstill.experiment import ensembles, pipeline
from potstill.experiment.curriculum import image_difficulty, images_per_epoch
from potstill.models.model_file import load_model
from potstill.training.callbacks import SilentObserver
from potstill.training.devices import Compute

BASE = {
    "name": "t",
    "data": {"source": "digits"},
    "teacher": {"model": "cifar/resnet8"},
    "student": {"model": "cifar/resnet8"},
    "curriculum": {},
}
PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.0, 0.1, 0.9]])
LABELS = np.array([0, 1, 0])


def test_difficulty_by_hand():
    loss = image_difficulty(PROBABILITIES, LABELS)
    assert loss[:2] == pytest.approx([0.356675, 0.916291], abs=1e-6)  # -ln 0.7, -ln 0.4
    assert np.isfinite(loss[2])
    assert loss[2] > 80


@pytest.mark.parametrize(
    ("images", "classes", "epochs", "start", "counts"),
    [
        (100, 10, 5, 0.3, (30, 65, 100, 100, 100)),
        (100, 10, 5, 0.01, (10, 50, 100, 100, 100)),  # one of each class at least; 1 + 99 / 2 = 50.5 is rounded to even
        (8, 10, 3, 0.5, (8, 8, 8)),  # there are no more
        (100, 10, 5, 1.0, (100,) * 5),
    ],
)
def test_counts_by_hand(images, classes, epochs, start, counts):
    assert images_per_epoch(CurriculumSettings(start=start), images, classes, epochs) == counts


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": {"name": "supervised"}}, "a teacher scores the images, and method .* has none"),
        ({"data": {"source": "digits", "class_balance": "sampling"}}, "use class_balance: weights"),
        ({"data": {"source": "digits", "target": "digits"}}, "curriculum orders images by class"),
        ({"curriculum": {"order": "esy"}}, "did you mean 'easy'"),
        ({"curriculum": {"start": 0}}, "curriculum.start"),
        ({"curriculum": {"until": 1.5}}, "curriculum.until"),
        ({"curriculum": {"begin": 0.1}}, "curriculum.begin: unknown key"),
    ],
)
def test_what_does_not_go_with_a_curriculum_is_refused(changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        load_recipe({**BASE, **changes})


def test_the_recipe_of_the_package_has_all_of_it():
    found = load_recipe("curriculum")
    assert found.curriculum is not None
    assert load_recipe("curriculum", ["curriculum=null", "method.schedule={}"]).curriculum is None


class Notes(SilentObserver):
    def __init__(self):
        self.notes, self.steps, self.current = [], {}, ""

    def stage(self, name, detail):
        self.current = name

    def epoch_start(self, epoch, epochs, steps, images):
        self.steps.setdefault(self.current, []).append((steps, images))

    def note(self, message):
        self.notes.append(message)


@pytest.fixture
def drawn(monkeypatch):
    """By stage: the sample ids of each epoch that the training was given, in order."""
    found = {}
    real = module.apply_curriculum

    def note(data, stage, *others):
        changed = real(data, stage, *others)
        found[stage.name] = changed.draws
        return changed

    monkeypatch.setattr("potstill.experiment.pipeline.apply_curriculum", note)
    return found


ALONE = {"stages": ("teacher", "distilled"), "evaluate": False}


def _states(path, names=("teacher", "baseline", "distilled")):
    return {name: load_model(path / name).module.state_dict() for name in names}


def test_only_who_distils_follows_it_and_takes_as_many_steps(recipe, tmp_path, drawn):
    told, plain = Notes(), Notes()
    path = pipeline.run(recipe(curriculum="{start: 0.5}"), output_dir=tmp_path / "with", observer=told)
    other = pipeline.run(recipe(), output_dir=tmp_path / "without", observer=plain, evaluate=False)
    assert told.steps == plain.steps
    assert set(drawn) == {"teacher", "baseline", "distilled"}
    a, b = _states(path), _states(other)
    for name in ("teacher", "baseline"):
        assert all(torch.equal(a[name][key], b[name][key]) for key in a[name]), name
    assert not all(torch.equal(a["distilled"][key], b["distilled"][key]) for key in a["distilled"])
    images = json.loads((path / "results.json").read_text())["stages"]["distilled"]["train"]["count"]
    (note,) = [each for each in told.notes if each.startswith("curriculum")]
    assert (
        f"{images // 2} images in the first epoch, {images} from epoch 2 on; the number of steps per epoch does not "
        "change" in note
    )
    assert not [each for each in plain.notes if each.startswith("curriculum")]


@pytest.mark.parametrize(("order", "sign"), [("easy", 1), ("hard", -1)])
def test_the_order_is_that_of_the_teachers_own_predictions(recipe, tmp_path, drawn, order, sign):
    path = pipeline.run(recipe(curriculum=f"{{order: {order}}}"), output_dir=tmp_path, stages=ALONE["stages"])
    rows = [line.split(",") for line in (path / "teacher" / "predictions_train.csv").read_text().splitlines()]
    classes = [name.removeprefix("p:") for name in rows[0][3:]]
    labels = np.array([classes.index(row[1]) for row in rows[1:]])
    own = np.array([float(row[3 + label]) for row, label in zip(rows[1:], labels, strict=True)])
    found = drawn["distilled"].curriculum.order
    for label in range(3):
        members = found[labels[found] == label]
        assert len(members) == (labels == label).sum()
        assert (sign * np.diff(own[members]) <= 1e-4).all()  # first the largest share for the true class


class Killed(Exception):
    pass


class Killer(SilentObserver):
    def stage(self, name, detail):
        self.current = name

    def epoch_start(self, epoch, *_):
        if self.current == "distilled" and epoch == 2:
            raise Killed


@pytest.mark.parametrize("order", ["easy", "random"])
def test_a_killed_run_goes_on_with_the_same_order(recipe, tmp_path, order):
    made = recipe(curriculum=f"{{order: {order}, start: 0.5, until: 1}}", **{"training.threads": "1"})
    whole = pipeline.run(made, output_dir=tmp_path / "whole", **ALONE)
    with pytest.raises(Killed):
        pipeline.run(made, output_dir=tmp_path / "killed", observer=Killer(), **ALONE)
    path = pipeline.run(made, output_dir=tmp_path / "killed", resume=True, **ALONE)
    a, b = (_states(each, ["distilled"])["distilled"] for each in (whole, path))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_random_order_asks_for_no_ones_word_and_has_its_own_for_each_seed(recipe, tmp_path, drawn):
    orders = []
    for seed in (0, 1):
        made = recipe(curriculum="{order: random}", seed=str(seed))
        pipeline.run(made, output_dir=tmp_path, name=f"seed{seed}", **ALONE)
        orders.append(drawn["distilled"].curriculum.order.tolist())
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_several_teachers_are_asked_as_one(monkeypatch):
    said = iter([np.array([[0.8, 0.2]]), np.array([[0.2, 0.8]])])
    monkeypatch.setattr(ensembles, "predict_probabilities", lambda *_, **__: (next(said), None, None))
    monkeypatch.setattr(module, "split_loader", lambda *_, **__: None)
    teacher = SimpleNamespace(module=torch.nn.Identity(), input=None, class_names=("a", "b"))
    made = load_recipe({**BASE, "teachers": {"combine": "probabilities"}, "curriculum": {}})
    data = SimpleNamespace(train=SimpleNamespace(names=["a"], labels=[0]), class_names=("a", "b"))
    compute = Compute(torch.device("cpu"), bf16=False, channels_last=False)
    found = module._predict_difficulty(data, {"teacher": teacher, "teacher-2": teacher}, {}, made, compute)
    assert found == pytest.approx([0.693147], abs=1e-6)  # -ln 0.5
