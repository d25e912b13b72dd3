"""A run that goes on with more epochs; one stage alone; another run's baseline."""

import shutil

import pytest

from potstill.errors import UsageError
from potstill.experiment import pipeline
from potstill.experiment.reproduce import read_run_record
from potstill.experiment.run_folder import RunFolder
from potstill.training.callbacks import SilentObserver

STUDENTS = ("baseline", "distilled")


class Heard(SilentObserver):
    """Keeps what a run says, and interrupts a stage after one of its epochs."""

    def __init__(self, interrupt=None):
        self.notes, self.stages, self.interrupt = [], [], interrupt

    def note(self, message):
        self.notes.append(message)

    def warn(self, message):
        self.notes.append(message)

    def stage(self, name, detail):
        self.stages.append(name)

    def expect(self, estimate):
        self.expected = estimate()

    def epoch_end(self, record):
        if (self.stages[-1], record["epoch"]) == self.interrupt:
            raise KeyboardInterrupt


def weights(path, stage):
    return (path / stage / "model.safetensors").read_bytes()


def results(path):
    return RunFolder(path).read_results()


@pytest.fixture
def root(tmp_path):
    return tmp_path


@pytest.fixture(scope="module")
def ready(recipe, tmp_path_factory):
    """Two run folders: of a trained teacher alone, and of a baseline alone."""
    folder = tmp_path_factory.mktemp("ready")
    return tuple(
        pipeline.run(recipe(), output_dir=folder, name=stage, stages=(stage,), evaluate=False)
        for stage in ("teacher", "baseline")
    )


@pytest.fixture
def teacher(ready):
    return ready[0]


@pytest.fixture
def baseline(ready):
    return ready[1]


def test_a_run_that_is_extended_is_one_that_was_as_long_from_the_start(recipe, root, teacher):
    """Where neither learning rate nor views depend on the length."""
    same = {"teacher.weights": teacher, "teacher_cache.views": 2}
    whole = pipeline.run(recipe(**same, **{"training.epochs": 4}), output_dir=root, name="whole")
    short = pipeline.run(recipe(**same, **{"training.keep_checkpoint": True}), output_dir=root, name="part")
    assert results(short)["looks"]["epochs_added_after_look"] == 0
    before = weights(short, "teacher")
    longer = recipe(**same, **{"training.epochs": 4})
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(longer, output_dir=root, name="part", resume=True, observer=Heard(("distilled", 3)))
    heard = Heard()
    assert pipeline.run(longer, output_dir=root, name="part", resume=True, observer=heard) == short
    assert heard.stages == ["distilled"]
    assert any("distilled: extended from 2 to 4 epochs" in note for note in heard.notes)
    for stage in STUDENTS:
        assert weights(short, stage) == weights(whole, stage)
        training = results(short)["stages"][stage]["training"]
        assert (training["epochs"], training["planned_epochs"], training["extended_from"]) == (4, 4, [2])
    assert weights(short, "teacher") == before  # ready-made, so no epochs are its own
    looks = results(short)["looks"]
    assert (looks["test_evaluations"], looks["epochs_added_after_look"]) == (2, 2)
    assert "extended_from" not in results(whole)["stages"]["distilled"]["training"]
    with pytest.raises(UsageError, match="was extended after 2 epochs"):
        read_run_record(short)


def test_a_run_is_not_shortened(recipe, root, teacher):
    same = {"teacher.weights": teacher}
    pipeline.run(recipe(**same), output_dir=root, name="part", stages=("teacher", "distilled"), evaluate=False)
    with pytest.raises(UsageError, match=r"training\.epochs: was 2, now 1"):
        pipeline.run(recipe(**same, **{"training.epochs": 1}), output_dir=root, name="part", resume=True)
    with pytest.raises(UsageError, match=r"training\.lr: was 0\.003, now 0\.1"):
        pipeline.run(
            recipe(**same, **{"training.epochs": 3, "training.lr": 0.1}), output_dir=root, name="part", resume=True
        )


def test_a_run_without_its_checkpoints_is_trained_from_the_start(recipe, root, teacher):
    same = {"teacher.weights": teacher, "teacher_cache.views": 2}
    whole = pipeline.run(recipe(**same, **{"training.epochs": 3}), output_dir=root, name="whole", evaluate=False)
    path = pipeline.run(recipe(**same), output_dir=root, name="part")
    assert not (path / "baseline" / "checkpoints" / "last.checkpoint").exists()
    longer = recipe(**same, **{"training.epochs": 3})
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(longer, output_dir=root, name="part", resume=True, observer=Heard(("distilled", 2)))
    heard = Heard()
    assert pipeline.run(longer, output_dir=root, name="part", resume=True, observer=heard) == path
    assert any("distilled: extended from 2 to 3 epochs, trained again from the start" in note for note in heard.notes)
    for stage in STUDENTS:
        assert weights(path, stage) == weights(whole, stage)


def test_the_distilled_stage_alone_and_a_baseline_from_elsewhere(recipe, root, teacher, baseline):
    same = {"teacher.weights": teacher}
    whole = pipeline.run(recipe(**same), output_dir=root, name="whole")
    heard = Heard()
    alone = pipeline.run(recipe(**same), output_dir=root, name="alone", stages=("distilled",), observer=heard)
    assert heard.stages == ["teacher", "distilled"]
    assert weights(alone, "distilled") == weights(whole, "distilled")
    assert results(alone)["comparison"] is None
    # how good the ready-made teacher is comes before anything is trained
    images = results(alone)["stages"]["teacher"]["val"]["count"]
    assert f"on {images} val images" in next(note for note in heard.notes if note.startswith("teacher: top-1 "))
    with pytest.raises(UsageError, match=r"needs a trained teacher: .*--teacher"):
        pipeline.run(recipe(), output_dir=root, name="none", stages=("distilled",))

    other = recipe(**same, **{"method.temperature": 4})  # which a baseline has nothing to do with
    heard = Heard()
    found = pipeline.run(other, output_dir=root, name="reusing", baseline=baseline, observer=heard)
    assert "baseline" not in heard.expected  # it takes no time
    assert weights(found, "baseline") == weights(whole, "baseline")
    assert results(found)["stages"]["baseline"]["reused_from"] == str(baseline)
    assert results(found)["views_differ"] == []
    assert {**results(found)["stages"]["baseline"]["test"]} == results(whole)["stages"]["baseline"]["test"]
    with pytest.raises(UsageError, match="the baseline was taken from"):
        read_run_record(found)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"training.lr": 0.01}, r"training\.lr: 0\.003 there, 0\.01 here"),
        ({"student.training": "{epochs: 3}"}, r"training\.epochs: 2 there, 3 here"),
        ({"student.model": "cifar/resnet14"}, r"student\.model: 'cifar/resnet8' there, 'cifar/resnet14' here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"teacher_cache.views": 1}, r"teacher_cache\.views: 2 there, 1 here"),
        ({"data.split_seed": 1}, "images: other ones"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_a_baseline_that_was_trained_otherwise_is_refused(recipe, root, teacher, baseline, changes, named):
    with pytest.raises(UsageError, match=named):
        pipeline.run(recipe(**{"teacher.weights": teacher}, **changes), output_dir=root, name="run", baseline=baseline)
    assert not (root / "run").exists()
    shutil.copytree(teacher, root / "run")
    with pytest.raises(UsageError, match=named):  # what would be overwritten is still there
        pipeline.run(
            recipe(**{"teacher.weights": teacher}, **changes),
            output_dir=root,
            name="run",
            baseline=baseline,
            overwrite=True,
        )
    assert weights(root / "run", "teacher") == weights(teacher, "teacher")
    shutil.rmtree(root / "run")


def test_a_run_without_baseline_has_none_to_give(recipe, root, teacher):
    with pytest.raises(UsageError, match="there is no trained baseline"):
        pipeline.run(recipe(**{"teacher.weights": teacher}), output_dir=root, name="run", baseline=teacher)
    with pytest.raises(UsageError, match="is this run itself"):
        pipeline.run(recipe(), output_dir=teacher.parent, name=teacher.name, baseline=teacher, overwrite=True)
