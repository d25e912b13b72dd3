"""Runs whose teacher is a frozen encoder with a fitted head."""

import csv
import json

import pytest
import torch

from potstill.cli import main
from potstill.distillation.teachers import FoldHeads, Teachers
from potstill.errors import ArtifactError, UsageError
from potstill.experiment import curriculum, pipeline, probe
from potstill.experiment.cache_verification import verify_cache
from potstill.models.factory import create_model
from potstill.models.model_file import load_model
from potstill.report.run_reader import read_run
from potstill.report.text_reports import training_text
from potstill.training.callbacks import SilentObserver
from potstill.training.devices import Compute


class Listening(SilentObserver):
    def __init__(self):
        self.notes, self.warnings, self.embedded, self.predicted = [], [], set(), set()

    def note(self, message):
        self.notes.append(message)

    def warn(self, message):
        self.warnings.append(message)

    def wait(self, what, done, total):
        if "embeddings of" in what:
            self.embedded.add(what.rpartition(" ")[2])
        if "predictions of the teacher on" in what:
            self.predicted.add(what.rpartition(" ")[2])


ALONE = ("teacher", "distilled")  # without a baseline


class Stopping(SilentObserver):
    """Ends a run after the first epoch of a stage."""

    def __init__(self, stage):
        self.last = stage

    def stage(self, name, detail):
        self.name = name

    def epoch_end(self, record):
        if (self.name, record["epoch"]) == (self.last, 1):
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Weights of five other classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "encoder.pth"
    torch.save(create_model("cifar/resnet8", 5, size=16).state_dict(), path)
    return path


@pytest.fixture
def probing(recipe, encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))

    def make(**changes):
        teacher = {"teacher.model": "cifar/resnet8", "teacher.weights": encoder, "teacher.head": "probe"}
        return recipe(**{**teacher, **changes})

    return make


def results(path):
    return json.loads((path / "results.json").read_text())


def test_the_encoder_stays_and_the_head_is_fitted(probing, encoder, tmp_path):
    heard = Listening()
    run = pipeline.run(probing(), output_dir=tmp_path, stages=("teacher",), observer=heard)
    before, teacher = torch.load(encoder), load_model(run / "teacher")
    after = teacher.module.state_dict()
    head = [key for key in before if not torch.equal(before[key], after[key])] if before.keys() == after.keys() else []
    entry = results(run)["stages"]["teacher"]
    assert {key.rpartition(".")[0] for key in head} == {entry["head"]["layer"]}
    assert entry["training"] is None
    assert entry["head"]["kind"] == "probe"
    assert entry["head"]["images"] == results(run)["data"]["counts"]["train"]["red"] * 3
    assert entry["head"]["C"] > 0
    assert entry["head"]["seconds"] > 0
    assert entry["head"]["val_top1"] == pytest.approx(entry["val"]["top1"], abs=0.11)  # one of 9 images, by rounding
    assert entry["val"]["top1"] > 0.5  # noisy colours
    assert any("C " in note and "5-fold" in note for note in heard.notes)
    shown = training_text(read_run(run).stages["teacher"])
    assert shown.startswith("a linear probe on embeddings of 42 images (C ")
    assert "cross-validated top-1" in shown


@pytest.fixture
def teach(probing, tmp_path):
    """Fit a probe in a run of its own; return its model and the splits whose images the encoder ran on."""
    count = iter(range(100))

    def run(**changes):
        heard = Listening()
        recipe = probing(**changes)
        run = pipeline.run(recipe, output_dir=tmp_path, name=f"run-{next(count)}", stages=("teacher",), observer=heard)
        said = any("from the cache: C" in note for note in heard.notes)
        assert said is (not heard.embedded)
        return load_model(run / "teacher"), heard.embedded

    return run


BOTH = {"train", "val"}


def test_embeddings_are_read_from_the_cache_in_other_runs(teach, tmp_path, monkeypatch):
    first, embedded = teach()
    assert embedded == BOTH
    again, embedded = teach()
    assert embedded == set()
    assert all(torch.equal(first.module.state_dict()[key], value) for key, value in again.module.state_dict().items())
    other_seed, embedded = teach(seed=5)
    assert embedded == set()
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "empty"))
    fresh, embedded = teach(seed=5)
    assert embedded == BOTH
    ours, theirs = (each.module.state_dict() for each in (other_seed, fresh))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not torch.equal(first.module.state_dict()["head.bias"], ours["head.bias"])  # other folds choose another C


def test_other_encoders_images_and_sizes_have_caches_of_their_own(teach, tmp_path):
    teach()
    torch.manual_seed(8)
    torch.save(create_model("cifar/resnet8", 5, size=16).state_dict(), tmp_path / "other.pth")
    assert teach(**{"teacher.weights": tmp_path / "other.pth"})[1] == BOTH
    assert teach(**{"teacher.size": 24})[1] == BOTH
    assert teach(**{"data.split_seed": 1})[1] == BOTH
    assert teach(**{"teacher_cache.mode": "off"})[1] == BOTH
    assert teach()[1] == set()


def probabilities(run, split):
    with (run / "teacher" / f"predictions_{split}.csv").open(newline="") as file:
        return [[float(row[name]) for name in ("p:red", "p:green", "p:blue")] for row in csv.DictReader(file)]


@pytest.mark.parametrize("folds", [None, 3])
def test_images_whose_embeddings_are_cached_are_evaluated_by_the_head_alone(probing, tmp_path, folds):
    changes = {"training.epochs": 1} | ({"data.folds": folds} if folds else {})
    recipe, heard = probing(**changes), Listening()
    stages = pipeline.STAGES if folds else ("teacher",)
    run = pipeline.run(recipe, output_dir=tmp_path, name="read", stages=stages, observer=heard)
    assert heard.predicted == {"test"}
    live, without = Listening(), probing(**changes, **{"teacher_cache.mode": "off"})
    other = pipeline.run(without, output_dir=tmp_path, name="live", stages=stages, observer=live)
    assert live.predicted == {"train", "val", "test"}
    for fold in ["."] if folds is None else [f"fold-{each}" for each in (1, 2, 3)]:
        for split in ("train", "val", "test"):
            ours, theirs = probabilities(run / fold, split), probabilities(other / fold, split)
            assert ours == [pytest.approx(row, abs=2e-6) for row in theirs]


@pytest.mark.parametrize("changes", [{"teacher.head": "finetune", "teacher.training.epochs": 1}, {}])
def test_the_network_predicts_what_its_embeddings_do_not_tell(probing, tmp_path, monkeypatch, changes):
    if not changes:  # embeddings are rounded
        monkeypatch.setattr(Compute, "teacher_in_bf16", property(lambda _: True))
        monkeypatch.setattr(probe, "_MAX_DIFFERENCE", 1.0)
    heard = Listening()
    pipeline.run(probing(**changes), output_dir=tmp_path, stages=("teacher",), observer=heard)
    assert heard.predicted == {"train", "val", "test"}


def identity(store):
    return json.loads((store / "manifest.json").read_text())["identity"]


def test_damaged_embeddings_are_computed_again(teach, tmp_path, capsys):
    first, _ = teach()
    caches = [path for path in tmp_path.glob("cache/teachers/*/logits.bin") if "embedding" in identity(path.parent)]
    assert len(caches) == 2
    for path in caches:
        path.write_bytes(bytes(path.stat().st_size))
        assert main(["cache", "verify", path.parent.name]) == 4
    again, embedded = teach()
    assert embedded == BOTH
    assert all(torch.equal(first.module.state_dict()[key], value) for key, value in again.module.state_dict().items())
    assert main(["cache", "verify", caches[0].parent.name]) == 0
    assert "0 are damaged" in capsys.readouterr().out


def test_without_disk_space_the_encoder_runs_again(teach, monkeypatch):
    monkeypatch.setattr("potstill.experiment.teacher_cache.MAX_DISK_FRACTION", 0)
    assert teach()[1] == teach()[1] == BOTH


class Indices:
    """Which sample ids teachers are asked for."""

    def __init__(self, monkeypatch):
        self.seen = []
        original = Teachers.run

        def watched(teachers, images, own=(), index=None):
            self.seen.append(None if index is None else index.tolist())
            return original(teachers, images, own, index)

        monkeypatch.setattr(Teachers, "run", watched)


@pytest.mark.parametrize(("mode", "size"), [("auto", 8), ("off", 8), ("auto", 12), ("off", 12)])
def test_training_images_are_answered_by_heads_that_have_not_seen_them(probing, tmp_path, monkeypatch, mode, size):
    indices = Indices(monkeypatch)
    changes = {"teacher_cache.mode": mode, "teacher.size": size}
    run = pipeline.run(probing(**changes), output_dir=tmp_path, stages=ALONE)
    teacher = load_model(run / "teacher")
    train = sum(results(run)["data"]["counts"]["train"].values())
    asked = {each for ids in indices.seen if ids is not None for each in ids}
    assert asked == set(range(train))
    assert None in indices.seen  # val
    assert teacher.facts["head"]["fold_heads"]["sha256"]


def test_a_curriculum_judges_images_by_heads_that_have_not_seen_them(probing, tmp_path, monkeypatch):
    seen, own = [], curriculum.image_difficulty
    monkeypatch.setattr(curriculum, "image_difficulty", lambda *rows: seen.append(rows) or own(*rows))
    monkeypatch.setattr(curriculum, "_BLOCK", 20)
    run = pipeline.run(probing(curriculum="{}"), output_dir=tmp_path, stages=ALONE)
    teacher, ((probabilities, labels),) = results(run)["stages"]["teacher"], seen
    assert own(probabilities, labels).mean() == pytest.approx(teacher["head"]["cross_validated"]["nll"], rel=1e-3)
    assert teacher["train"]["nll"] < 0.9 * teacher["head"]["cross_validated"]["nll"]


def test_caches_hold_the_folds_answers_and_resuming_goes_on_with_them(probing, tmp_path):
    whole = pipeline.run(probing(), output_dir=tmp_path, name="whole", stages=ALONE)
    caches = tmp_path.glob("cache/teachers/*/manifest.json")
    (store,) = [path.parent for path in caches if json.loads(path.read_text())["record"]["classes"]][:1]
    assert verify_cache(store).largest < 0.05
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(probing(), output_dir=tmp_path, name="parts", stages=ALONE, observer=Stopping("distilled"))
    parts = pipeline.run(probing(), output_dir=tmp_path, name="parts", stages=ALONE, resume=True)
    ours, theirs = (load_model(each / "distilled").module.state_dict() for each in (whole, parts))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_run_that_takes_the_probe_of_another_takes_its_folds(probing, recipe, tmp_path):
    first = pipeline.run(probing(), output_dir=tmp_path, name="first", stages=ALONE)
    taken = recipe(**{"teacher.model": "cifar/resnet8", "teacher.weights": first})
    again = pipeline.run(taken, output_dir=tmp_path, name="again", stages=ALONE)
    ours, theirs = (load_model(each / "distilled").module.state_dict() for each in (first, again))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert results(again)["stages"]["teacher"]["head"] == results(first)["stages"]["teacher"]["head"]
    (again / "teacher" / "fold_heads.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="fold_heads"):
        pipeline.run(
            recipe(**{"teacher.weights": again, "teacher.model": "cifar/resnet8"}), output_dir=tmp_path, name="third"
        )


def test_fine_tuning_starts_from_the_probe_and_the_better_is_taken(probing, tmp_path):
    heard = Listening()
    changes = {"teacher.head": "finetune", "teacher.training.epochs": 2, "teacher.training.freeze": 1}
    assert probing(**changes).stage_training("teacher").freeze_batch_norm is True
    assert probing(**changes).stage_training("baseline").freeze_batch_norm is False
    run = pipeline.run(probing(**changes), output_dir=tmp_path, stages=("teacher",), observer=heard)
    entry = results(run)["stages"]["teacher"]
    better = max(entry["head"]["val_top1"], entry["head"]["finetuned_val_top1"])
    assert load_model(run / "teacher").facts["val"]["top1"] == better
    assert entry["head"]["taken"] == (
        "finetuned" if entry["head"]["finetuned_val_top1"] > entry["head"]["val_top1"] else "probe"
    )
    assert any("as a probe" in note and "fine-tuned" in note for note in heard.notes)


def test_an_interrupted_fine_tuning_goes_on_to_the_same_teacher(probing, tmp_path):
    recipe = probing(**{"teacher.head": "finetune", "teacher.training.epochs": 3, "teacher.training.freeze": 2})
    whole = pipeline.run(recipe, output_dir=tmp_path, name="whole", stages=("teacher",))
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe, output_dir=tmp_path, name="parts", stages=("teacher",), observer=Stopping("teacher"))
    parts = pipeline.run(recipe, output_dir=tmp_path, name="parts", stages=("teacher",), resume=True)
    ours, theirs = (load_model(each / "teacher") for each in (whole, parts))
    assert all(torch.equal(value, theirs.module.state_dict()[key]) for key, value in ours.module.state_dict().items())
    kept = [{**each.facts["head"], "seconds": 0} for each in (ours, theirs)]
    assert kept[0] == kept[1]
    first, second, third = (
        json.loads(line)["val"] for line in (whole / "teacher" / "metrics.jsonl").read_text().splitlines()
    )
    assert len({each["nll"] for each in (first, second, third)}) == 3


def test_a_fine_tuning_that_spoils_the_probe_leaves_the_probe(probing, encoder, tmp_path):
    changes = {"teacher.head": "finetune", "teacher.training.epochs": 1, "teacher.training.lr": 10.0}
    spoilt = pipeline.run(probing(**changes), output_dir=tmp_path, name="a", stages=("teacher",))
    probed = pipeline.run(probing(), output_dir=tmp_path, name="b", stages=("teacher",))
    assert results(spoilt)["stages"]["teacher"]["head"]["taken"] == "probe"
    ours, theirs = (load_model(each / "teacher").module.state_dict() for each in (spoilt, probed))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_teacher_with_weights_of_other_classes_is_probed_by_default(probing, tmp_path):
    heard = Listening()
    changes = {"teacher.head": "null", "teacher.new_head": True}
    run = pipeline.run(probing(**changes), output_dir=tmp_path, name="a", stages=("teacher",), observer=heard)
    asked = pipeline.run(probing(), output_dir=tmp_path, name="b", stages=("teacher",))
    ours, theirs = (load_model(each / "teacher").module.state_dict() for each in (run, asked))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert results(run)["stages"]["teacher"]["head"]["default"] is True
    assert results(asked)["stages"]["teacher"]["head"]["default"] is False
    said = next(note for note in heard.notes if "teacher.head is not set" in note)
    assert "the default is probe" in said
    assert "teacher.training has no effect then" in said
    shown = training_text(read_run(run).stages["teacher"])
    assert shown.startswith("a linear probe, the default for weights of other classes, on embeddings of 42 images")


def test_a_random_head_is_trained_with_all_layers_if_asked_for(probing, encoder, tmp_path):
    heard = Listening()
    changes = {"teacher.head": "random", "teacher.training.epochs": 1}
    run = pipeline.run(probing(**changes), output_dir=tmp_path, stages=("teacher",), observer=heard)
    entry = results(run)["stages"]["teacher"]
    assert "head" not in entry
    assert entry["training"]["epochs"] == 1
    assert any("the head of cifar/resnet8 is new and random" in warning for warning in heard.warnings)
    after = load_model(run / "teacher").module.state_dict()
    assert not torch.equal(after["stem.0.weight"], torch.load(encoder)["stem.0.weight"])


def test_the_default_is_a_random_head_where_no_probe_can_be_fitted(probing, tmp_path):
    heard = Listening()
    torch.save(create_model("torchvision/squeezenet1_1", 5, size=32).state_dict(), tmp_path / "squeeze.pth")
    changes = {
        "teacher.model": "torchvision/squeezenet1_1",
        "teacher.weights": tmp_path / "squeeze.pth",
        "teacher.head": "null",
        "teacher.new_head": True,
        "teacher.training.epochs": 1,
        "data.size": 32,
    }
    run = pipeline.run(probing(**changes), output_dir=tmp_path, stages=("teacher",), observer=heard)
    assert results(run)["stages"]["teacher"]["training"]["epochs"] == 1
    (warning,) = [each for each in heard.warnings if "no probe can be fitted" in each]
    assert "torchvision/squeezenet1_1 has none" in warning


def test_weights_of_the_same_classes_are_not_probed_by_default(probing, tmp_path):
    first = pipeline.run(probing(), output_dir=tmp_path, name="first", stages=("teacher",))
    changes = {"teacher.weights": first, "teacher.head": "null"}
    again = pipeline.run(probing(**changes), output_dir=tmp_path, name="second", stages=("teacher",))
    ours, theirs = (load_model(each / "teacher").module.state_dict() for each in (first, again))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_student_with_weights_of_other_classes_gets_a_random_head(probing, encoder, tmp_path):
    changes = {"student.weights": encoder, "student.new_head": True, "teacher.head": "probe"}
    run = pipeline.run(probing(**changes), output_dir=tmp_path, stages=("baseline",))
    assert "head" not in results(run)["stages"]["baseline"]
    assert results(run)["stages"]["baseline"]["training"]["epochs"] == 2


def test_weights_that_know_the_classes_are_refused(probing, tmp_path):
    first = pipeline.run(probing(), output_dir=tmp_path, name="first", stages=("teacher",))
    with pytest.raises(UsageError, match=r"teacher\.head: .* already has a head for these 3 classes"):
        pipeline.run(probing(**{"teacher.weights": first}), output_dir=tmp_path, name="second")


def test_a_network_without_a_linear_head_is_refused(probing, tmp_path):
    torch.save(create_model("torchvision/squeezenet1_1", 5, size=32).state_dict(), tmp_path / "squeeze.pth")
    changes = {
        "teacher.model": "torchvision/squeezenet1_1",
        "teacher.weights": tmp_path / "squeeze.pth",
        "data.size": 32,
    }
    with pytest.raises(UsageError, match="needs a last linear layer with bias"):
        pipeline.run(probing(**changes), output_dir=tmp_path)


def test_one_image_of_a_class_is_refused(probing, photographs, tmp_path):
    for split, count in (("train", 1), ("val", 4), ("test", 4)):
        for name in ("blue", "green", "red"):
            folder = tmp_path / "few" / split / name
            folder.mkdir(parents=True)
            at = {"train": 0, "val": 5, "test": 10}[split]
            for i in range(at, at + (count if name == "red" else 4)):
                (folder / f"{i}.png").write_bytes((photographs / name / f"{i:02d}.png").read_bytes())
    with pytest.raises(UsageError, match="one image of 'red'"):
        pipeline.run(probing(**{"data.source": tmp_path / "few"}), output_dir=tmp_path)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"student.head": "probe"}, "student.head: probe leaves nothing to distil into"),
        ({"teacher.weights": "null"}, "teacher.weights is not given"),
        ({"teacher.training.freeze": 3}, "freeze must be below epochs, 3"),
        ({"teacher.head": "prob"}, "probe"),
        ({"training.freeze": 1}, "student.weights is not given"),
        ({"training.layer_decay": 0.5}, "student.weights is not given: set it for a network with weights only"),
        ({"student.training.layer_decay": 0.5}, "student.weights is not given: give them, or leave it out"),
        ({"training.freeze_batch_norm": True}, "student.weights is not given"),
    ],
)
def test_settings_that_cannot_be_are_refused(probing, changes, word):
    with pytest.raises(UsageError, match=word):
        probing(**changes)


def test_images_beyond_those_of_training_get_the_head_of_all():
    weight = torch.stack([torch.eye(2), 2 * torch.eye(2), 3 * torch.eye(2)])
    heads = FoldHeads("fc", weight, torch.zeros(3, 2), torch.tensor([0, 1, 2]))
    said = heads(torch.ones(5, 2), torch.tensor([1, 0, 2, 3, 99]))
    assert said[:, 0].tolist() == [2.0, 1.0, 3.0, 3.0, 3.0]


def student_probing(probing, encoder, **changes):
    student = {"student.weights": encoder, "student.head": "finetune", "student.model": "cifar/resnet8"}
    return probing(**{**student, **changes})


def test_baseline_and_distilled_start_from_one_probe_and_train_on(probing, encoder, tmp_path):
    heard = Listening()
    run = pipeline.run(student_probing(probing, encoder), output_dir=tmp_path, observer=heard)
    stages = results(run)["stages"]
    assert stages["baseline"]["head"]["C"] == stages["distilled"]["head"]["C"]
    assert stages["baseline"]["head"]["val_top1"] == stages["distilled"]["head"]["val_top1"]
    for name in ("baseline", "distilled"):
        assert stages[name]["head"]["kind"] == "finetune"
        assert stages[name]["training"]["epochs"] == stages[name]["training"]["planned_epochs"]
        found = [note for note in heard.notes if note.startswith(f"{name}: val top-1") and "as a probe" in note]
        assert len(found) == 1


def test_a_training_that_spoils_the_student_leaves_its_probe(probing, encoder, tmp_path):
    spoilt = student_probing(probing, encoder, **{"training.lr": 1.0})
    run = pipeline.run(spoilt, output_dir=tmp_path)
    for name in ("baseline", "distilled"):
        entry = results(run)["stages"][name]
        assert entry["head"]["taken"] == "probe"
        assert entry["val"]["top1"] == pytest.approx(entry["head"]["val_top1"], abs=0.11)  # one of 9 images
