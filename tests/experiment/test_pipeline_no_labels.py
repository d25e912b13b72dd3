"""Images without labels: a ready teacher names the classes, and no accuracy is claimed."""

import json
import re
import shutil

import pytest
import torch

from potstill.config.recipe import load_recipe
from potstill.errors import ArtifactError, DataError, UsageError
from potstill.experiment import pipeline
from potstill.experiment.builders import build_network
from potstill.export.loading import load_classifier
from potstill.models.model_file import load_model
from potstill.report.compare import compare
from potstill.report.render import render
from potstill.serve.runs import summary
from potstill.training.callbacks import SilentObserver

from .test_pipeline_unlabeled import Listening

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def teacher(recipe, tmp_path_factory):
    """The run folder of a trained teacher."""
    return pipeline.run(
        recipe(**{"teacher.training.epochs": 6}), output_dir=tmp_path_factory.mktemp("taught"), stages=("teacher",)
    )


@pytest.fixture(scope="module")
def images(photographs, tmp_path_factory):
    """The same photographs in one folder and a subfolder, without their classes."""
    folder = tmp_path_factory.mktemp("flat")
    (folder / "deep").mkdir()
    for name in CLASSES:
        for i in range(20):
            shutil.copy(photographs / name / f"{i:02d}.png", folder / ("deep" if i % 2 else "") / f"{name[0]}{i}.png")
    return folder


@pytest.fixture(scope="module")
def labeled_test(photographs, tmp_path_factory):
    """Five images of two of the classes; copies of images without labels."""
    folder = tmp_path_factory.mktemp("test")
    for name in ("red", "blue"):
        (folder / name).mkdir()
        for i in range(5):
            shutil.copy(photographs / name / f"{i:02d}.png", folder / name / f"{i:02d}.png")
    return folder


@pytest.fixture
def without_labels(photographs, images, teacher):
    def make(*changes, **flags):
        value = {
            "name": "none",
            "data": {"source": "digits", "size": 16, "workers": 0, "augment": {"hflip": True, "mixup": 0.2}},
            "teacher": {"model": "cifar/resnet14"},
            "student": {"model": "cifar/resnet8"},
            "method": {"name": "kd", "temperature": 2.0, "alpha": 0.5},
            "training": {"epochs": 2, "batch_size": 16, "lr": 0.003, "precision": "float32", "checkpoint_seconds": 0},
        }
        given = {"--data": str(images), "--no-labels": True, "--teacher": [str(teacher)]}
        flags = {f"--{key.replace('_', '-')}": each for key, each in flags.items()}
        return load_recipe(value, changes, flags=given | flags)

    return make


def results(path):
    return json.loads((path / "results.json").read_text())


def test_the_teacher_names_the_classes_and_no_accuracy_is_claimed(without_labels, teacher, tmp_path):
    listening = Listening()
    made = without_labels()
    assert tuple(made.data.classes) == CLASSES
    assert made.method == {"name": "kd", "temperature": 2.0, "alpha": 0.0}
    path = pipeline.run(made, output_dir=tmp_path, observer=listening)
    found = results(path)
    assert sorted(found["stages"]) == ["distilled", "teacher"]
    assert found["comparison"] is None
    assert found["data"]["teacher_labels"] == ["train", "val", "test"]
    assert found["data"]["class_names"] == list(CLASSES)
    rows = (path / "splits.csv").read_text().splitlines()[1:]
    assert len(rows) == 60
    assert not any(name in row for row in rows for name in CLASSES)  # labels are unknown
    student, test = load_model(path / "distilled"), found["stages"]["distilled"]["test"]
    assert student.class_names == CLASSES
    assert set(json.loads((path / "distilled" / "metrics.jsonl").read_text().splitlines()[0])["train"]["terms"]) == {
        "kd"
    }
    assert test["top1"] == test["agreement"] == found["without_labels"]["agreement"][0]
    assert test["kl_to_teacher"] > 0
    assert found["stages"]["teacher"]["test"]["top1"] == 1.0
    assert found["stages"]["distilled"]["calibration"] is None
    assert any("Accuracy is unknown" in each for each in found["without_labels"]["sentences"])
    assert any("accuracy is unknown" in each for each in listening.warnings)
    assert any("no labels: the teacher names the classes. On 9 val images" in each for each in listening.notes)
    page = render(path).read_text()
    assert "No labels: agreement with the teacher" in page
    assert "Accuracy is unknown" in page
    assert "Accuracy is unknown" in (path / "report.md").read_text()
    assert "top-1 is the agreement" in compare([path, path], tmp_path / "compared.html").read_text()
    assert {stage["test_top1"] for stage in summary("none", path)["stages"]} == {None}
    teacher_row = (path / "teacher" / "predictions_test.csv").read_text().splitlines()[1].split(",")
    assert teacher_row[1] == teacher_row[2]  # its own prediction stands where labels do


def test_a_small_labeled_test_set_gives_the_accuracies(without_labels, labeled_test, photographs, tmp_path):
    path = pipeline.run(without_labels(labeled_test=str(labeled_test)), output_dir=tmp_path)
    found = results(path)
    assert found["data"]["teacher_labels"] == ["train", "val"]
    assert found["data"]["counts"]["test"] == {"blue": 5, "green": 0, "red": 5}
    assert "without 10 copies of images of val or test" in found["data"]["origin"]
    rows = [row.split(",") for row in (path / "splits.csv").read_text().splitlines()[1:]]
    assert sum(row[0] == "test" for row in rows) == 10
    assert len(rows) == 60
    right = {}
    for stage in ("teacher", "distilled"):
        lines = [line.split(",") for line in (path / stage / "predictions_test.csv").read_text().splitlines()[1:]]
        right[stage] = sum(line[1] == line[2] for line in lines) / len(lines)
        assert [line[1] for line in lines] == ["blue"] * 5 + ["red"] * 5
        assert found["stages"][stage]["test"]["top1"] == pytest.approx(right[stage])
    known = found["without_labels"]
    assert known["accuracy"]["teacher"][0] == pytest.approx(right["teacher"])
    assert known["accuracy"]["student"][0] == pytest.approx(right["distilled"])
    assert known["difference"][0] == pytest.approx(right["distilled"] - right["teacher"])
    assert not any("unknown" in each for each in known["sentences"])
    assert "student - teacher" in render(path).read_text()


def test_a_killed_run_ends_the_same_and_the_cache_is_used(without_labels, tmp_path):
    class Killed(Exception):
        pass

    class Killer(SilentObserver):
        def epoch_start(self, epoch, *_):
            if epoch == 2:
                raise Killed

    made = without_labels()
    whole = pipeline.run(made, output_dir=tmp_path, name="whole")
    with pytest.raises(Killed):
        pipeline.run(made, output_dir=tmp_path, name="cut", observer=Killer())
    cut = pipeline.run(made, output_dir=tmp_path, name="cut", resume=True)
    ours, theirs = (load_model(path / "distilled").module.state_dict() for path in (cut, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert results(cut)["stages"]["distilled"]["teaching"]["computed"] == 0  # the first run's answers were kept
    assert results(cut)["without_labels"] == results(whole)["without_labels"]


def test_what_cannot_be_trained_without_labels_is_refused(without_labels, images, labeled_test, tmp_path):
    for changes, message in (
        (("method.alpha=0.3",), r"kd gives the labels the weight 0\.3, and there are none .*--alpha 0"),
        (("method={name: crd}",), "crd needs the label of every image, and there are none"),
        (("method={name: dho, balance: 0.5}",), r"dho gives the labels the weight 0\.5"),
        (("method={name: nkd}",), "nkd needs the label of every image"),
    ):
        with pytest.raises(UsageError, match=message):
            pipeline.run(without_labels(*changes), output_dir=tmp_path)
    for changes, flags, message in (
        (("method={name: supervised}",), {}, "needs a teacher, and method supervised learns from labels alone"),
        (("teacher.head=probe",), {}, r"teacher\.head is fitted on labels, .*--stage teacher"),
        ((), {"teacher": ["cifar/resnet14"]}, "needs a ready teacher, and teacher is not trained"),
        (("data.class_balance=weights",), {}, r"data\.class_balance has no effect without labels"),
        (("curriculum={}",), {}, "curriculum orders the images of each class"),
        ((f"data.unlabeled={images}",), {}, r"data\.unlabeled has no effect without labels"),
        ((), {"data": "/nowhere"}, "images without labels .* no such folder"),
        ((), {"labeled_test": "/nowhere"}, r"data\.labeled_test: no folder"),
        (
            (),
            {"no_labels": None, "data": str(labeled_test), "labeled_test": str(labeled_test)},
            "needs data.labeled: f",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            without_labels(*changes, **flags)
    with pytest.raises(UsageError) as caught:
        without_labels("teacher.head=none", teacher=["cifar/resnet14"])
    assert str(caught.value).count("\n") == 0  # one way out: a teacher with weights
    assert "needs a ready teacher" in str(caught.value)
    with pytest.raises(UsageError, match="there is no baseline: it learns from labels"):
        pipeline.run(without_labels(), output_dir=tmp_path, stages=("baseline",))
    (labeled_test.parent / "wrong" / "reed").mkdir(parents=True, exist_ok=True)
    shutil.copy(labeled_test / "red" / "00.png", labeled_test.parent / "wrong" / "reed" / "1.png")
    with pytest.raises(DataError, match=r"no class 'reed'; did you mean 'red'"):
        pipeline.run(without_labels(labeled_test=str(labeled_test.parent / "wrong")), output_dir=tmp_path)
    (tmp_path / "two").mkdir()
    with pytest.raises(DataError, match="no images"):
        pipeline.run(without_labels(data=str(tmp_path / "two")), output_dir=tmp_path)
    for i in range(2):
        shutil.copy(images / f"b{2 * i}.png", tmp_path / "two")
    with pytest.raises(DataError, match="2 images are too few for a split into train, val, test"):
        pipeline.run(without_labels(data=str(tmp_path / "two")), output_dir=tmp_path)


def test_a_teacher_without_class_names_gets_them_from_the_recipe(without_labels, teacher, tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save(load_model(teacher / "teacher").module.state_dict(), weights)
    bare = {"teacher": [f"cifar/resnet8@{weights}"]}
    with pytest.raises(
        UsageError, match=r"takes the class names from the teacher, and it has none: .*teacher\.classes"
    ):
        without_labels(**bare)
    made = without_labels("teacher.classes=[azure, lime, scarlet]", **bare)
    assert made.data.classes == ["azure", "lime", "scarlet"]
    path = pipeline.run(made, output_dir=tmp_path)
    assert load_model(path / "distilled").class_names == ("azure", "lime", "scarlet")
    merged = without_labels("teacher.classes={cold: [0, 1], warm: [2]}", **bare)
    assert merged.data.classes == ["cold", "warm"]


@pytest.fixture
def embeddings(without_labels):
    """A recipe without labels whose teacher has no classes."""

    def make(*changes, **flags):
        return without_labels("teacher.head=none", *changes, **{"method": "cosine"} | flags)

    return make


def test_embeddings_alone_train_a_student_that_gets_its_head_from_labels(embeddings, recipe, tmp_path):
    listening = Listening()
    made = embeddings()
    assert made.method == {"name": "cosine", "ce_weight": 0.0, "kd_weight": 0.0}
    path = pipeline.run(made, output_dir=tmp_path, observer=listening)
    found = results(path)
    assert list(found["stages"]) == ["distilled"]
    assert found["comparison"] is None
    assert found["data"]["class_names"] == []
    assert found["data"]["counts"] == {"train": {"images": 42}, "val": {"images": 9}, "test": {"images": 9}}
    known, test = found["without_labels"], found["stages"]["distilled"]["test"]
    cosine = test["cosine"]["teacher"]
    assert cosine["low"] < cosine["value"] < cosine["high"]
    assert cosine["difference"]["value"] == pytest.approx(cosine["value"] - cosine["before"])
    assert cosine["value"] != cosine["before"]
    assert "top1" not in test
    assert (known["test_labeled"], known["classes"]) == (False, False)
    assert "Accuracy is unknown" in " ".join(known["sentences"])
    epochs = [json.loads(line) for line in (path / "distilled" / "metrics.jsonl").read_text().splitlines()]
    assert {each["val"]["top1"] for each in epochs} == {None}
    assert epochs[0]["train"]["terms"].keys() == epochs[0]["val"]["terms"].keys() == {"embedding"}
    losses = [each["val"]["loss"] for each in epochs]
    student = load_model(path / "distilled")
    assert student.facts["training"]["best_epoch"] == 1 + losses.index(min(losses))
    assert student.facts["training"]["selection_metric"] == "loss"
    page = render(path).read_text()
    assert "No labels and no classes: cosine agreement with the teacher" in page
    assert f"{cosine['value']:.3f}" in page
    assert f"{cosine['value']:.3f}" in (path / "distilled" / "metrics.txt").read_text()
    assert "predicts no classes" in (path / "report.md").read_text()
    assert "potstill predict" not in page
    assert "potstill run RECIPE --data DIR --student " in page
    assert [each.name for each in (path / "distilled").glob("*.png")] == ["loss_curve.png"]  # there is no top-1
    assert compare([path, path], tmp_path / "compared.html").is_file()
    assert summary("none", path)["state"] == "finished"
    with pytest.raises(ArtifactError, match=r"predicts nothing.*--student"):
        load_classifier(path)
    for head, wanted in (("null", "has no classes: .* NEW HEAD"), ("finetune", None)):
        taught = recipe(**{"student": f"{{weights: {path}, head: {head}}}", "training.epochs": 1})
        start = build_network(taught, taught.student, CLASSES)
        ours, theirs = student.module.state_dict(), start.module.state_dict()
        assert ours["head.weight"].shape != theirs["head.weight"].shape
        assert all(torch.equal(ours[key], theirs[key]) for key in ours if not key.startswith("head."))
        assert bool(start.warnings) == bool(wanted)
        assert wanted is None or re.search(wanted, start.warnings[0])
    ended = pipeline.run(taught, output_dir=tmp_path, name="taught", stages=("baseline",))
    assert load_model(ended / "baseline").class_names == CLASSES


def test_a_killed_training_of_embeddings_ends_the_same(embeddings, tmp_path):
    class Killed(Exception):
        pass

    class Killer(SilentObserver):
        def epoch_start(self, epoch, *_):
            if epoch == 2:
                raise Killed

    made = embeddings("method.name=rkd", "seeds=2")
    whole = pipeline.run(made, output_dir=tmp_path, name="whole")
    with pytest.raises(Killed):
        pipeline.run(made, output_dir=tmp_path, name="cut", observer=Killer())
    cut = pipeline.run(made, output_dir=tmp_path, name="cut", resume=True)
    ours, theirs = (load_model(path / "distilled").module.state_dict() for path in (cut, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not ours["head.weight"].any()  # nothing trains the head
    ours, theirs = (results(path)["without_labels"]["sentences"] for path in (cut, whole))
    assert [each.replace("runs/cut", "runs/whole") for each in ours] == theirs
    assert "With further seeds: " in " ".join(ours)
    assert results(whole)["repeats"]["distilled-2"]["test"]["cosine"]["teacher"]["value"]


def test_what_needs_classes_is_refused_where_there_are_none(
    embeddings, without_labels, teacher, labeled_test, tmp_path
):
    for changes, flags, message in (
        ((), {"labeled_test": str(labeled_test)}, r"data\.labeled_test: the teacher has no classes"),
        (("data.classes=[a, b]",), {}, r"data\.classes: the teacher has no classes"),
        (("student.weights=pretrained", "student.head=finetune"), {}, "student.head: the probe that it"),
    ):
        with pytest.raises(UsageError, match=message):
            embeddings(*changes, **flags)
    with pytest.raises(UsageError, match="either every teacher names the classes, or none does"):
        without_labels("teacher.0.head=none", "teacher.1.head=null", teacher=[str(teacher)] * 2)
    for changes, flags, message in (
        ((), {"method": "kd"}, "method kd reads the classes of the teacher, which has none .* cosine"),
        (("method.ce_weight=1",), {}, r"gives the labels the weight 1.*use --method cosine or srd"),
        ((), {"method": "semckd"}, "semckd measures nothing on val but labels"),
        (("student={model: cifar/resnet8, training: {freeze: 1}}",), {}, "freeze"),
    ):
        with pytest.raises(UsageError, match=message):
            pipeline.run(embeddings(*changes, **flags), output_dir=tmp_path)


def test_auto_is_a_method_on_embeddings_where_the_teacher_has_no_classes(embeddings):
    assert embeddings(method="auto").method["name"] == "srd"


def test_several_teachers_vote(without_labels, teacher, recipe, tmp_path):
    other = pipeline.run(recipe(seed=3), output_dir=tmp_path, name="other", stages=("teacher",))
    path = pipeline.run(without_labels(teacher=[str(teacher), str(other)]), output_dir=tmp_path, name="both")
    found = results(path)
    assert found["together"]["teachers"]["test"]["top1"] == 1.0
    assert found["stages"]["distilled"]["test"]["agreement"] == found["without_labels"]["agreement"][0]
