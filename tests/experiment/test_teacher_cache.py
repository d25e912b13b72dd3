"""Stored answers through whole runs: asked once, never stale, and the same weights as with the live teacher."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from potstill.config.recipe import load_recipe
from potstill.errors import ArtifactError, DataError
from potstill.evaluation.predictions import predict_probabilities
from potstill.experiment import teacher_cache
from potstill.experiment.cache_verification import verify_cache
from potstill.experiment.pipeline import run as carry_out
from potstill.input_spec import InputSpec
from potstill.io import read_checksummed_json, write_checksummed_json
from potstill.models.factory import create_model
from potstill.models.model_file import Classifier, load_model, save_model

ALL = ("teacher", "baseline", "distilled")
TWO_VIEWS = {"training.epochs": 3, "teacher_cache.views": 2, "data.size": 16}


def run(recipe, *, stages=("distilled",), **options):
    """What the tests need of a run: its distilled student, and no figures of it."""
    return carry_out(recipe, stages=stages, evaluate=False, **options)


@pytest.fixture
def stores(tmp_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "teachers"


class Watching:
    """Keeps what a run says."""

    def __init__(self):
        self.warnings, self.notes = [], []

    def warn(self, message):
        self.warnings.append(message)

    def note(self, message):
        self.notes.append(message)

    def __getattr__(self, name):
        return lambda *arguments: None


class Impatient(Watching):
    """Interrupts the distilled stage after two epochs."""

    def stage(self, name, detail):
        self.current = name

    def epoch_end(self, record):
        if self.current == "distilled" and record["epoch"] == 2:
            raise KeyboardInterrupt


def weights(folder, stage="distilled"):
    return (Path(folder) / stage / "model.safetensors").read_bytes()


def asked_and_read(folder):
    facts = json.loads((folder / "distilled" / "model.json").read_text())["facts"]["teaching"]
    return facts.get("computed"), facts.get("read")


def identities(stores):
    """What each store holds, without those of predictions."""
    found = {path: json.loads((path / "manifest.json").read_text())["identity"] for path in stores.iterdir()}
    return {path: identity for path, identity in found.items() if "predictions" not in identity}


def train_stores(stores):
    return [path for path, identity in identities(stores).items() if identity["split"] == "train"]


@pytest.fixture(scope="module")
def filled(recipe, tmp_path_factory):
    """A run that filled its stores, and the cache with them; nobody may change them."""
    folder = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POTSTILL_CACHE", str(folder / "cache"))
        return run(recipe(**TWO_VIEWS), stages=ALL, output_dir=folder, name="first"), folder / "cache"


@pytest.fixture
def first(filled, recipe, tmp_path, stores):
    """That run, with a copy of its stores, and the recipe again with its teacher."""
    done, cache = filled
    shutil.copytree(cache, tmp_path / "cache")

    def again(name, stages=("distilled",), **changes):
        changes = {**TWO_VIEWS, "teacher.weights": str(done), **changes}
        return run(recipe(**changes), output_dir=tmp_path, name=name, stages=stages)

    return done, again


def test_the_second_run_asks_nothing_and_gets_the_same_weights(first):
    done, again = first
    images = 42  # of 60, stratified 70 / 15 / 15
    assert asked_and_read(done) == (2 * images, images)
    second = again("second")
    assert asked_and_read(second) == (0, 3 * images)
    assert weights(second) == weights(done)


def test_the_live_teacher_on_the_same_views_gives_the_same_weights_to_the_rounding_of_the_record(first):
    done, again = first
    live = again("live", ALL, teacher_cache="{mode: off, views: 2}")
    assert asked_and_read(live) == (None, None)
    assert weights(live, "baseline") == weights(done, "baseline")
    ours, theirs = (safetensors.torch.load(weights(folder)) for folder in (done, live))
    for name, tensor in ours.items():
        assert torch.allclose(tensor.float(), theirs[name].float(), atol=2e-3), name


def test_with_float32_records_byte_for_byte(first):
    _, again = first
    stored, live = (
        again("stored", **{"teacher_cache.record": "float32"}),
        again("live", teacher_cache="{mode: off, views: 2}"),
    )
    assert asked_and_read(stored)[0] > 0
    assert weights(stored) == weights(live)
    replayed = again("replayed", **{"teacher_cache.record": "float32"})
    assert asked_and_read(replayed)[0] == 0
    assert weights(replayed) == weights(live)


def test_temperature_alpha_method_and_seed_share_a_store(first, stores):
    _, again = first
    before = sorted(identities(stores))
    for number, changes in enumerate(
        [
            {"method.temperature": "4"},
            {"method.alpha": "0.9"},
            {"method.name": "dist"},
            {"seed": "7", "data.augmentation_seed": "0"},
            {"training.epochs": "5"},
        ]
    ):
        assert asked_and_read(again(f"run-{number}", **changes))[0] == 0
    assert sorted(identities(stores)) == before


def test_edited_code_of_a_network_is_another_teacher(tmp_path):
    file = tmp_path / "networks.py"

    def describe(factor):
        file.write_text(
            f"import torch\nclass Net(torch.nn.Linear):\n"
            f"    def forward(self, x):\n        return {factor} * super().forward(x)\n"
        )
        names = {}
        exec(compile(file.read_text(), str(file), "exec"), names)
        torch.manual_seed(0)
        network = Classifier(names["Net"](2, 2), "networks.py:Net", ("a", "b"), InputSpec(2))
        return teacher_cache.describe_teacher(teacher_cache.StageTeacher(network, None, "the same"))

    assert describe(1) == describe(1)
    assert describe(1) != describe(2)
    plain = Classifier(create_model("cifar/resnet8", 2, size=16), "cifar/resnet8", ("a", "b"), InputSpec(16))
    assert "code" not in teacher_cache.describe_teacher(teacher_cache.StageTeacher(plain, None, "the same"))


def test_other_outputs_beside_the_same_weights_and_code_are_another_teacher():
    def describe(name, slope, factor, training=False):
        torch.manual_seed(0)
        layers = (torch.nn.Flatten(), torch.nn.Linear(12, 2), torch.nn.LeakyReLU(slope), torch.nn.Dropout(0.5))
        module = torch.nn.Sequential(*layers).train(training)
        module.factor = factor
        module.register_forward_hook(lambda module, _, outputs: module.factor * outputs)
        network = Classifier(module, name, ("a", "b"), InputSpec(2))
        found = teacher_cache.describe_teacher(teacher_cache.StageTeacher(network, None, "the same"))
        assert module.training == module[3].training == training
        return found

    for name in ("python/teacher", "mine.py:Net"):
        assert describe(name, 0.1, 1.0) == describe(name, 0.1, 1.0) == describe(name, 0.1, 1.0, training=True)
        for other in ((0.2, 1.0), (0.1, 1.01), (0.1, float("inf")), (0.1, 0.0)):
            assert describe(name, 0.1, 1.0) != describe(name, *other)


def test_predictions_of_a_ready_teacher_are_kept_for_later_runs(first, recipe, tmp_path, monkeypatch):
    done, _ = first
    evaluated = []

    def predict(module, loader, *, what, **options):
        evaluated.append(what)
        return predict_probabilities(module, loader, what=what, **options)

    monkeypatch.setattr("potstill.experiment.ensembles.predict_probabilities", predict)

    def again(name, **changes):
        evaluated.clear()
        given = recipe(**{**TWO_VIEWS, "teacher.weights": str(done), **changes})
        folder = carry_out(given, output_dir=tmp_path, name=name, stages=("distilled",))
        files = [f"predictions_{split}.csv" for split in ("train", "val", "test")]
        asked = [what for what in evaluated if "teacher" in what]
        return sorted(asked), [(folder / "teacher" / file).read_bytes() for file in files]

    splits = [f"the teacher on {split}" for split in ("test", "train", "val")]
    asked, files = again("a")
    assert asked == splits
    assert again("b", seed=5, **{"method.alpha": 0.9}) == ([], files)
    assert again("c", **{"teacher_cache.mode": "off"}) == (sorted([*splits, "the teacher on val"]), files)
    other = load_model(done / "teacher")
    with torch.no_grad():
        next(other.module.parameters()).mul_(1.5)
    save_model(other, tmp_path / "other")
    asked, changed = again("d", **{"teacher.weights": str(tmp_path / "other")})
    assert asked == splits
    assert changed != files


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": "1"},
        {"data.augmentation_seed": "1"},
        {"data.augment": "{hflip: true, pad_crop: 0.1}"},
        {"data.augment": "{hflip: true, pad_crop: 0.2, mixup: 1.0}"},
        {"data.size": "24"},
        {"data.mean": "[0.4, 0.4, 0.4]"},
        {"data.split_seed": "3"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_changes_the_images_makes_another_store(first, changes):
    _, again = first
    assert asked_and_read(again("other", **changes))[0] > 0


def test_one_changed_weight_of_the_teacher_makes_another_store(first, tmp_path):
    done, again = first
    teacher = load_model(done / "teacher")
    with torch.no_grad():
        next(teacher.module.parameters()).view(-1)[0].add_(1e-4)
    save_model(teacher, tmp_path / "changed")
    assert asked_and_read(again("other", **{"teacher.weights": str(tmp_path / "changed")}))[0] > 0


def test_one_changed_image_makes_another_store(first, recipe, photographs, tmp_path):
    done, _ = first
    copied = tmp_path / "photographs"
    shutil.copytree(photographs, copied)
    changes = {**TWO_VIEWS, "teacher.weights": str(done), "data.source": str(copied)}
    same = run(recipe(**changes), output_dir=tmp_path, name="same")
    assert asked_and_read(same)[0] == 0
    from PIL import Image

    with Image.open(copied / "red" / "00.png") as image:
        pixels = np.asarray(image).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(copied / "red" / "00.png")
    changed = run(recipe(**changes), output_dir=tmp_path, name="changed")
    assert asked_and_read(changed)[0] > 0


def test_a_damaged_record_is_asked_for_again(first, stores):
    done, again = first
    (store,) = train_stores(stores)
    content = bytearray((store / "logits.bin").read_bytes())
    content[5] ^= 1
    (store / "logits.bin").write_bytes(content)
    second = again("second")
    assert asked_and_read(second)[0] == 16  # the batch whose record it was
    assert weights(second) == weights(done)


def test_on_a_full_disk_the_live_teacher_gives_the_same_weights(first, monkeypatch):
    done, again = first
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    live = again("live")
    assert asked_and_read(live) == (None, None)
    assert weights(live) == weights(done)
    assert load_recipe(live / "recipe.yaml").teacher_cache == load_recipe(done / "recipe.yaml").teacher_cache


def test_without_room_or_rights_training_goes_on_and_says_so_once(first, recipe, tmp_path):
    whole, _ = first
    (tmp_path / "file").write_text("no folder")
    watching = Watching()
    changes = {**TWO_VIEWS, "teacher.weights": str(whole)}
    changes["teacher_cache.folder"] = str(tmp_path / "file" / "stores")
    done = run(recipe(**changes), output_dir=tmp_path, name="blocked", observer=watching)
    assert asked_and_read(done) == (None, None)
    assert weights(done) == weights(whole)
    told = [message for message in watching.warnings if "teacher cache" in message]
    assert len(told) == 1
    assert "runs in every step" in told[0]


def test_a_foreign_version_is_left_alone_and_training_goes_on(first, stores, recipe, tmp_path):
    done, _ = first
    (store,) = train_stores(stores)
    manifest = read_checksummed_json(store / "manifest.json")
    write_checksummed_json(store / "manifest.json", manifest | {"format": 99})
    watching = Watching()
    changes = {**TWO_VIEWS, "teacher.weights": str(done)}
    second = run(recipe(**changes), output_dir=tmp_path, name="second", observer=watching)
    assert asked_and_read(second) == (None, None)
    assert any("format 99" in message for message in watching.warnings)


def test_several_teachers_each_have_a_store(recipe, tmp_path, stores):
    changes = {
        "teacher": "[{model: cifar/resnet14, training: {epochs: 2}}, {model: cifar/resnet8, training: {epochs: 2}}]",
        "teacher_cache.views": 2,
        "training.epochs": 3,
    }
    done = run(recipe(**changes), output_dir=tmp_path, name="several", stages=ALL)
    assert len(train_stores(stores)) == 2
    assert asked_and_read(done) == (2 * 42, 42)


def test_resuming_keeps_the_number_of_views_and_the_store(recipe, tmp_path, stores):
    whole = run(recipe(**{"training.epochs": 4}), output_dir=tmp_path, name="whole", stages=ALL)
    assert load_recipe(whole / "recipe.yaml").teacher_cache.views == 4
    with pytest.raises(KeyboardInterrupt):
        run(recipe(**{"training.epochs": 4}), output_dir=tmp_path, name="part", stages=ALL, observer=Impatient())
    resumed = run(recipe(**{"training.epochs": 4}), output_dir=tmp_path, name="part", stages=ALL, resume=True)
    assert weights(resumed) == weights(whole)


def test_records_are_what_the_teacher_says_now(first, stores):
    for store in stores.iterdir():
        found = verify_cache(store, 30)
        assert 0 < found.records <= 30
        assert found.largest <= 2**-6  # float16 keeps differences of 32 to 64 in steps of 2**-5
        assert found.same_class == 1.0


def test_verify_refuses_when_teacher_or_images_have_changed(recipe, photographs, tmp_path, stores):
    copied = tmp_path / "photographs"
    shutil.copytree(photographs, copied)
    done = run(
        recipe(**{"data.source": str(copied), "teacher_cache.views": 1}), output_dir=tmp_path, name="mine", stages=ALL
    )
    (store,) = train_stores(stores)
    verify_cache(store, 10)
    teacher = load_model(done / "teacher")
    with torch.no_grad():
        next(teacher.module.parameters()).view(-1)[0].add_(1e-4)
    save_model(teacher, done / "teacher")
    with pytest.raises(ArtifactError, match="has changed since"):
        verify_cache(store, 10)
    os.remove(copied / "red" / "00.png")
    with pytest.raises(DataError, match="have changed; this cache cannot be used"):
        verify_cache(store, 10)
