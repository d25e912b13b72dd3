"""The main job end to end, on image files."""

import csv
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from sklearn import metrics as sk

from potstill.errors import ArtifactError, DataError, UsageError
from potstill.evaluation.cascade import Cascade, CascadeCalibration
from potstill.evaluation.cost import count_flops, measure_memory, model_summary
from potstill.experiment import pipeline
from potstill.experiment.builders import build_network
from potstill.export.predict import predict
from potstill.io import write_checksummed_text
from potstill.models.factory import create_model
from potstill.models.model_file import Classifier, load_model, save_model
from potstill.training.callbacks import SilentObserver

STAGES = ("teacher", "baseline", "distilled")


@pytest.fixture(scope="module")
def module_recipe(photographs):
    from potstill.config.recipe import load_recipe

    return load_recipe(
        {
            "name": "tiny",
            "data": {"source": str(photographs), "size": 8, "workers": 0, "augment": {"hflip": True}},
            "teacher": {"model": "cifar/resnet14", "training": {"epochs": 3}},
            "student": {"model": "cifar/resnet8"},
            "method": {"name": "kd", "temperature": 2.0, "alpha": 0.5},
            "training": {"epochs": 2, "batch_size": 16, "lr": 0.003, "precision": "float32", "checkpoint_seconds": 0},
        }
    )


@pytest.fixture(scope="module")
def run(module_recipe, tmp_path_factory):
    return pipeline.run(module_recipe, output_dir=tmp_path_factory.mktemp("runs"))


def results(path):
    return json.loads((path / "results.json").read_text())


def predictions(path, stage, split):
    with (path / stage / f"predictions_{split}.csv").open(newline="") as file:
        header, *rows = list(csv.reader(file))
    classes = [name.removeprefix("p:") for name in header[3:]]
    return classes, rows


def weights(path, stage):
    return load_model(path / stage).module.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_every_file_of_the_run_folder_is_there(run):
    for name in ("recipe.yaml", "environment.json", "splits.csv", "results.json"):
        assert (run / name).stat().st_size > 0
    for stage in STAGES:
        names = ["model.safetensors", "model.json", "summary.txt", "metrics.jsonl", "metrics.json"]
        names += [f"predictions_{split}.csv" for split in ("train", "val", "test")]
        for name in names:
            assert (run / stage / name).stat().st_size > 0, f"{stage}/{name}"
        assert [path.name for path in (run / stage / "checkpoints").iterdir()] == ["figures.checkpoint"]


def test_results_have_the_documented_shape(run):
    found = results(run)
    assert found["schema"] == 1
    assert tuple(found["stages"]) == STAGES
    assert found["data"]["class_names"] == ["blue", "green", "red"]
    assert sum(sum(counts.values()) for counts in found["data"]["counts"].values()) == 60
    for stage in STAGES:
        entry = found["stages"][stage]
        assert entry["model"]["file_bytes"] == (run / stage / "model.safetensors").stat().st_size
        assert entry["training"]["best_epoch"] <= entry["training"]["epochs"] == (3 if stage == "teacher" else 2)
        for split in ("train", "val", "test"):
            assert {"top1", "top3", "f1_macro", "auc_micro", "ece", "nll", "loss"} <= entry[split].keys()
    assert "agreement" in found["stages"]["distilled"]["test"]
    assert "agreement" not in found["stages"]["baseline"]["test"]


def test_costs_are_those_of_each_stages_own_network(run):
    for stage in STAGES:
        model, entry = load_model(run / stage), results(run)["stages"][stage]
        flops = count_flops(model.module, model.input)
        assert entry["model"]["flops"] == flops
        assert entry["memory"] == measure_memory(model.module, model.input)
        table = model_summary(model.module, model.input, model.class_names, flops=flops)
        assert (run / stage / "summary.txt").read_text() == table


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_metrics_equal_scikit_learns_on_the_saved_predictions(run, stage, split):
    classes, rows = predictions(run, stage, split)
    labels = np.array([classes.index(row[1]) for row in rows])
    scores = np.array([[float(cell) for cell in row[3:]] for row in rows])
    scores /= scores.sum(axis=1, keepdims=True)  # float32 rows sum to 1 within 1e-7, which is not enough for log_loss
    named = np.array([classes.index(row[2]) for row in rows])
    found = results(run)["stages"][stage][split]
    wanted = {
        "top1": sk.accuracy_score(labels, named),
        "top3": 1.0,
        "nll": sk.log_loss(labels, scores, labels=[0, 1, 2]),
    }
    one_hot = np.eye(3)[labels]
    for average in ("micro", "macro", "weighted"):
        triple = sk.precision_recall_fscore_support(labels, named, average=average, labels=[0, 1, 2], zero_division=0)
        for name, value in zip(("precision", "recall", "f1"), triple, strict=False):
            wanted[f"{name}_{average}"] = value
        wanted[f"auc_{average}"] = sk.roc_auc_score(one_hot, scores, average=average)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    assert found["loss"] == found["nll"]


def test_the_temperature_is_fitted_on_val_alone(photographs, recipe, tmp_path):
    from potstill.evaluation.final_metrics import fit_temperature

    paths = sorted(shutil.copytree(photographs, tmp_path / "confused").rglob("*.png"))
    pixels, random = [path.read_bytes() for path in paths], np.random.default_rng(0)
    for path, at in zip(paths, random.permutation(len(paths)), strict=True):  # no network is ever sure and right
        path.write_bytes(pixels[at])
    confused = recipe(**{"data.source": tmp_path / "confused", "training.epochs": 1})
    run = pipeline.run(confused, output_dir=tmp_path / "runs", stages=("baseline",))
    fitted = {}
    for split in ("val", "test"):
        classes, rows = predictions(run, "baseline", split)
        labels = np.array([classes.index(row[1]) for row in rows])
        fitted[split] = fit_temperature(np.array([row[3:] for row in rows], dtype=np.float64), labels)
    assert fitted["val"] != pytest.approx(fitted["test"], rel=0.05)
    shown = results(run)["stages"]["baseline"]["calibration"]["temperature"]
    assert shown == pytest.approx(fitted["val"], rel=1e-2)


def test_comparison_is_counted_on_the_test_images(run):
    rows = {stage: predictions(run, stage, "test")[1] for stage in STAGES}
    right = {stage: np.array([row[1] == row[2] for row in rows[stage]]) for stage in STAGES}
    comparison = results(run)["comparison"]
    assert comparison["top1_gain"] == pytest.approx(right["distilled"].mean() - right["baseline"].mean())
    assert comparison["fixed"] == (right["distilled"] & ~right["baseline"]).sum()
    assert comparison["broken"] == (~right["distilled"] & right["baseline"]).sum()
    assert comparison["gap"] == pytest.approx(right["teacher"].mean() - right["baseline"].mean())
    assert comparison["test_images"] == len(rows["teacher"])
    agree = np.mean([a[2] == b[2] for a, b in zip(rows["distilled"], rows["teacher"], strict=True)])
    assert results(run)["stages"]["distilled"]["test"]["agreement"] == pytest.approx(agree)


def test_the_cascade_is_calibrated_on_val_and_measured_on_test(run):
    found = Cascade.read(run / "distilled")
    assert (found.student, found.teachers) == ("distilled", ("teacher",))
    (_, val), (_, test), (_, teacher) = (
        predictions(run, *which) for which in (("distilled", "val"), ("distilled", "test"), ("teacher", "test"))
    )
    assert found.calibration.images == len(val)
    assert found.calibration.candidates == 2  # its epochs
    confidence = [max(map(float, row[3:])) for row in val]
    assert all(min(abs(at - each) for each in confidence) < 1e-6 for at, _, _ in found.calibration.steps[:-1])
    shown = results(run)["cascade"]
    assert shown["curve"][0] == [0, np.mean([row[1] == row[2] for row in test])]
    assert shown["curve"][-1] == [1, np.mean([row[1] == row[2] for row in teacher])]


def test_a_cascade_asks_the_teacher_where_the_student_is_not_confident(run, photographs, monkeypatch):
    alone = {stage: predict(run / stage, [photographs]) for stage in ("distilled", "teacher")}
    middle = float(np.median([each.classes[0][1] for each in alone["distilled"]]))
    calibration = CascadeCalibration(1000, 1, ((middle, 0, 500), (0.0, 900, 1000)))
    changed = replace(Cascade.read(run / "distilled"), calibration=calibration)
    monkeypatch.setattr(Cascade, "read", lambda folder: changed)
    found = predict(run, [photographs], risk=0.05)
    assert {each.answered_by for each in found} == {"student", "teacher"}
    for each, student, teacher in zip(found, alone["distilled"], alone["teacher"], strict=True):
        own = student.classes[0][1] > middle
        assert each.answered_by == ("student" if own else "teacher")
        answer = student if own else teacher
        assert [name for name, _ in each.classes] == [name for name, _ in answer.classes]
        assert [share for _, share in each.classes] == pytest.approx([share for _, share in answer.classes], abs=1e-5)


def test_splits_are_disjoint_and_written(run, photographs):
    with (run / "splits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["name"] for row in rows}) == 60
    assert {row["split"] for row in rows} == {"train", "val", "test"}
    for row in rows:
        assert (photographs / row["name"]).exists()
        assert row["name"].startswith(row["class"])


def test_no_student_file_holds_the_teacher(run):
    sizes = {stage: (run / stage / "model.safetensors").stat().st_size for stage in STAGES}
    assert sizes["distilled"] == sizes["baseline"] < sizes["teacher"]


def test_checkpoints_are_kept_on_request_and_hold_no_teacher(recipe, tmp_path):
    kept = recipe(**{"training.epochs": 1, "training.keep_checkpoint": True, "teacher.model": "cifar/resnet14"})
    path = pipeline.run(kept, output_dir=tmp_path, evaluate=False)
    sizes = {}
    for stage in STAGES:
        (last,) = (path / stage / "checkpoints").iterdir()
        assert last.name == "last.checkpoint"
        sizes[stage] = last.stat().st_size
    assert abs(sizes["distilled"] - sizes["baseline"]) < 5000
    assert sizes["baseline"] < sizes["teacher"]


def test_same_seed_same_weights_whatever_the_workers(run, module_recipe, tmp_path):
    for workers in (1, 2):
        data = module_recipe.data.model_copy(
            update={"workers": workers, "cache_fraction": 1e-12}
        )  # streamed, not resident
        again = pipeline.run(
            module_recipe.model_copy(update={"data": data}), output_dir=tmp_path, name=f"w{workers}",
            stages=("baseline",), evaluate=False,
        )  # fmt: skip
        assert same(weights(again, "baseline"), weights(run, "baseline"))
    other = pipeline.run(
        module_recipe.model_copy(update={"seed": 1}),
        output_dir=tmp_path,
        name="seed1",
        stages=("baseline",),
        evaluate=False,
    )
    assert not same(weights(other, "baseline"), weights(run, "baseline"))


def test_baseline_and_distilled_differ_by_the_method_alone(recipe, tmp_path):
    # With alpha = 1 the teacher counts for nothing: the distilled student must be the baseline, bit for bit.
    path = pipeline.run(recipe(**{"method.alpha": 1.0, "teacher.training.epochs": 1}), output_dir=tmp_path)
    assert same(weights(path, "distilled"), weights(path, "baseline"))
    assert results(path)["comparison"]["top1_gain"] == 0


def test_a_killed_run_goes_on_and_ends_the_same(run, module_recipe, tmp_path):
    class Killed(Exception):
        pass

    class Killer(SilentObserver):
        def __init__(self, stage):
            self.doomed, self.current = stage, ""

        def stage(self, name, detail):
            self.current = name

        def epoch_start(self, epoch, *_):
            if self.current == self.doomed and epoch == 2:
                raise Killed

    with pytest.raises(Killed):
        pipeline.run(module_recipe, output_dir=tmp_path, observer=Killer("teacher"))
    with pytest.raises(Killed):
        pipeline.run(module_recipe, output_dir=tmp_path, observer=Killer("distilled"), resume=True)
    path = pipeline.run(module_recipe, output_dir=tmp_path, resume=True)
    for stage in STAGES:
        assert same(weights(path, stage), weights(run, stage)), stage


def test_resume_refuses_other_settings_by_name(recipe, tmp_path):
    pipeline.run(recipe(), output_dir=tmp_path, stages=("baseline",), evaluate=False)
    with pytest.raises(UsageError, match=r"training\.lr: was 0\.003, now 0\.01"):
        pipeline.run(recipe(**{"training.lr": 0.01}), output_dir=tmp_path, stages=("baseline",), resume=True)
    pipeline.run(recipe(**{"data.workers": 1}), output_dir=tmp_path, stages=("baseline",), resume=True, evaluate=False)


def test_resume_fills_in_what_an_older_recipe_did_not_know(recipe, tmp_path):
    path = pipeline.run(recipe(), output_dir=tmp_path, stages=("baseline",), evaluate=False)
    older = yaml.safe_load((path / "recipe.yaml").read_text())
    for key in ("born_again_generations", "feature_pairs", "assistants", "teachers"):
        del older[key]
    del older["teacher"]["size"]
    write_checksummed_text(path / "recipe.yaml", yaml.safe_dump(older))
    pipeline.run(recipe(), output_dir=tmp_path, stages=("baseline",), resume=True, evaluate=False)
    with pytest.raises(UsageError, match="born_again_generations: was 1, now 2"):
        pipeline.run(recipe(born_again_generations=2), output_dir=tmp_path, stages=("baseline",), resume=True)


def test_resume_refuses_other_images(photographs, recipe, tmp_path):
    shutil.copytree(photographs, tmp_path / "mine")
    tiny = recipe(**{"data.source": f"'{tmp_path / 'mine'}'", "training.epochs": 1})
    pipeline.run(tiny, output_dir=tmp_path, stages=("baseline",), evaluate=False)
    shutil.copy(photographs / "blue" / "00.png", tmp_path / "mine" / "red" / "00.png")
    with pytest.raises(UsageError, match="has changed since"):
        pipeline.run(tiny, output_dir=tmp_path, stages=("baseline",), resume=True)


def test_overwriting_spares_the_weights_that_the_new_run_starts_from(recipe, tmp_path):
    path = pipeline.run(
        recipe(**{"teacher.training.epochs": 1}), output_dir=tmp_path, stages=("teacher",), evaluate=False
    )
    again = recipe(**{"teacher.weights": f"'{path / 'teacher'}'"})
    with pytest.raises(UsageError, match="would delete the weights from which teacher starts"):
        pipeline.run(again, output_dir=tmp_path, overwrite=True)
    assert (path / "teacher" / "model.safetensors").exists()


def test_a_teacher_from_another_run_is_not_trained_again(run, recipe, tmp_path):
    changes = {"teacher.model": "cifar/resnet14", "teacher.weights": f"'{run / 'teacher'}'"}
    path = pipeline.run(recipe(**changes), output_dir=tmp_path)
    assert same(weights(path, "teacher"), weights(run, "teacher"))
    assert results(path)["stages"]["teacher"]["training"] is None
    assert not (path / "teacher" / "metrics.jsonl").exists()


def test_a_bare_state_dict_is_a_teacher_too(run, recipe, tmp_path):
    file = tmp_path / "teacher.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights(run, "teacher").items()}}, file)
    changes = {"teacher.model": "cifar/resnet14", "teacher.weights": f"'{file}'"}
    path = pipeline.run(recipe(**changes), output_dir=tmp_path, stages=("teacher",), evaluate=False)
    assert same(weights(path, "teacher"), weights(run, "teacher"))


def test_of_several_teachers_one_with_another_order_of_classes_is_refused(run, recipe, tmp_path):
    """Averaged as they are, its logits would speak for the wrong classes."""
    found = load_model(run / "teacher")
    turned = Classifier(found.module, found.architecture, found.class_names[::-1], found.input)
    save_model(turned, tmp_path / "turned")
    both = [{"model": found.architecture, "weights": str(path)} for path in (run / "teacher", tmp_path / "turned")]
    with pytest.raises(ArtifactError, match=r"turned has other classes than this data, or another order"):
        pipeline.run(recipe(teacher=json.dumps(both)), output_dir=tmp_path, name="two")


def test_a_teacher_of_other_classes_is_refused_or_gets_a_new_head(run, photographs, recipe, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for new, old in {"azure": "blue", "green": "green", "red": "red"}.items():
        shutil.copytree(photographs / old, other / new)
    changes = {"data.source": f"'{other}'", "teacher.weights": f"'{run / 'teacher'}'"}
    changes |= {"teacher.model": "cifar/resnet14"}
    with pytest.raises(ArtifactError, match="has other classes"):
        pipeline.run(recipe(**changes), output_dir=tmp_path, name="a")

    said = []

    class Listening(SilentObserver):
        def warn(self, message):
            said.append(message)

    path = pipeline.run(
        recipe(**changes, **{"teacher.head": "random"}), output_dir=tmp_path, name="b", observer=Listening()
    )
    assert any("NEW HEAD" in message for message in said)
    assert results(path)["stages"]["teacher"]["training"]["epochs"] == 3
    del said[:]
    path = pipeline.run(
        recipe(**changes, **{"teacher.new_head": True}), output_dir=tmp_path, name="c", observer=Listening()
    )
    assert not any("NEW HEAD" in message for message in said)
    assert results(path)["stages"]["teacher"]["head"]["kind"] == "probe"


def test_weights_of_another_number_of_classes_are_refused_with_both_numbers(recipe, tmp_path):
    torch.save(create_model("cifar/resnet8", 7, size=16).state_dict(), tmp_path / "seven.pth")
    for key, way_out in (("teacher", "teacher.head=probe"), ("student", "student.new_head=true")):
        found = recipe(**{f"{key}.model": "cifar/resnet8", f"{key}.weights": f"'{tmp_path / 'seven.pth'}'"})
        with pytest.raises(ArtifactError, match=rf"has 7 outputs, and this data 3 classes(.|\n)*--set {way_out}$"):
            build_network(found, found.network(key), ("blue", "green", "red"))


def test_a_useless_teacher_is_reported_before_the_student(recipe, tmp_path):
    events = []

    class Listening(SilentObserver):
        def stage(self, name, detail):
            events.append(name)

        def warn(self, message):
            events.append(message)

        def wait(self, what, done, total):
            waited[what] = done, total

    waited = {}
    path = pipeline.run(
        recipe(**{"teacher.training": "{epochs: 1, lr: 1e-12}", "training.epochs": 4}),
        output_dir=tmp_path,
        observer=Listening(),
    )
    warned = [i for i, event in enumerate(events) if "no better than chance" in event or "below the baseline" in event]
    assert warned
    assert warned[0] < events.index("distilled")
    for split in ("train", "val", "test"):  # of large networks, they take minutes
        done, total = waited[f"predictions of the distilled on {split}"]
        assert done == total > 0
    found = results(path)
    assert found["warnings"]
    (below,) = found["teacher_below_baseline"]
    assert below["teacher"] == "teacher"
    assert below["teacher_val_top1"] < below["baseline_val_top1"] == found["stages"]["baseline"]["val"]["top1"]
    assert found["comparison"]["teacher_below_baseline"] == [below]
    assert any("--set teacher.training.epochs=4" in warning for warning in found["warnings"])


def test_all_mistakes_come_at_once_before_any_training(recipe, tmp_path):
    bad = recipe().model_copy(update={"student": recipe().student.model_copy(update={"model": "cifar/resnet9"})})
    bad = bad.model_copy(update={"training": bad.training.model_copy(update={"optimizer": "adamm"})})
    with pytest.raises(UsageError) as caught:
        pipeline.run(bad, output_dir=tmp_path)
    assert "cifar/resnet9" in str(caught.value)
    assert "adamm" in str(caught.value)
    assert not (tmp_path / "tiny" / "recipe.yaml").exists()


def test_a_broken_image_stops_the_run_before_training(photographs, recipe, tmp_path):
    broken = tmp_path / "broken"
    for name in ("blue", "green", "red"):
        shutil.copytree(photographs / name, broken / name)
    (broken / "red" / "00.png").write_text("no picture")
    with pytest.raises(DataError, match=r"red/00\.png"):
        pipeline.run(recipe(**{"data.source": f"'{broken}'"}), output_dir=tmp_path)


def test_stages_must_make_sense(recipe, tmp_path):
    with pytest.raises(UsageError, match="needs a trained teacher"):
        pipeline.run(recipe(), output_dir=tmp_path, stages=("distilled",))


def test_class_weights_are_inverse_to_the_counts(photographs, recipe, tmp_path):
    from potstill.data.datasets import load_data
    from potstill.experiment.stage import label_loss

    folder = shutil.copytree(photographs, tmp_path / "uneven")
    for at, name in enumerate(sorted(path.name for path in folder.iterdir())):  # 20, 14 and 8 are left
        for path in sorted((folder / name).iterdir())[: 6 * at]:
            path.unlink()
    weighted = recipe(**{"data.class_balance": "weights", "data.source": folder})
    data = load_data(weighted.data)
    counts = np.bincount(data.train.labels)
    assert counts[0] > counts[1] > counts[2]
    found = label_loss(weighted, weighted.training, data).weight.numpy()
    np.testing.assert_allclose(found, counts.sum() / (3 * counts), rtol=1e-6)
    assert (found * counts).sum() / counts.sum() == pytest.approx(1, rel=1e-6)
    assert label_loss(recipe(), recipe().training, data).weight is None


@pytest.mark.parametrize("class_balance", ["none", "weights"])
def test_label_smoothing_reaches_the_loss(recipe, class_balance):
    from potstill.data.datasets import load_data
    from potstill.experiment.stage import label_loss

    smoothed = recipe(**{"training.label_smoothing": 0.3, "data.class_balance": class_balance})
    loss = label_loss(smoothed, smoothed.training, load_data(smoothed.data))
    logits = torch.tensor([[2.0, 0.0, 0.0]])
    normaliser = math.log(math.exp(2) + 2)
    by_hand = 0.8 * (normaliser - 2) + 0.2 * normaliser  # 0.7 + 0.1 of class 0, 0.1 of each other one
    assert loss(logits, torch.tensor([0])).item() == pytest.approx(by_hand, rel=1e-6)


class Counting(SilentObserver):
    def __init__(self):
        self.epochs, self.current = {}, ""

    def stage(self, name, detail):
        self.current = name

    def epoch_start(self, epoch, epochs, steps, images):
        self.epochs.setdefault(self.current, []).append((steps, images))


def test_a_method_with_layers_of_the_batchs_size_sees_the_batches_of_its_baseline(module_recipe, tmp_path):
    recipe, counting = module_recipe.model_copy(update={"method": {"name": "semckd"}}), Counting()
    pipeline.run(recipe, output_dir=tmp_path, observer=counting, evaluate=False)
    assert counting.epochs["baseline"] == counting.epochs["distilled"] == [(3, 42)] * 2  # 16, 16 and 10 images
