"""Recipes of the published pairs: their settings by hand, and two steps of each on made images of the same format."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from potstill.config.recipe import Recipe, list_recipes, load_recipe
from potstill.data.datasets import load_data
from potstill.data.image_sets import Subset
from potstill.data.splits import DataSplits
from potstill.data.transforms import normalize
from potstill.errors import UsageError
from potstill.experiment.builders import build_network, train_loader
from potstill.experiment.plan import plan_stages
from potstill.experiment.preflight import create_stage_method
from potstill.experiment.stage import train_stage
from potstill.methods import method_info
from potstill.models.model_file import Classifier, load_model
from potstill.models.registry import check_model
from potstill.training.callbacks import SilentObserver
from potstill.training.devices import create_compute
from potstill.training.optim import create_optimizer, lr_factor

CIFAR = [name for name in list_recipes() if name.startswith("cifar100/")]
# A pair for each kind of student; the networks of all are made in tests/models/test_cifar.py.
QUICK = {name.rpartition("-")[2].rstrip("0123456789x_v"): name for name in CIFAR}.values()
OTHERS = [*(name for name in list_recipes() if name.startswith("imagenet/")), "funmatch"]
SMALL_RATES = ("mobilenet", "shufflenet")
# Two steps of two images, in the recipe's own precision and by its own optimizer.
SHORT = (
    "training.epochs=1", "training.schedule=constant", "training.milestones=[]", "training.warmup_epochs=0",
    "training.batch_size=2", "training.threads=1", "data.workers=0",
)  # fmt: skip


def pair(name: str) -> list[str]:
    return name.partition("/")[2].split("-")


def test_every_published_pair_has_its_recipe():
    assert sorted(CIFAR) == sorted(set(method_info("dkd").presets) & set(CIFAR))
    assert set(method_info("dkd").presets) <= {*CIFAR, *OTHERS}
    assert len(CIFAR) == 11


@pytest.mark.parametrize("name", CIFAR)
def test_the_cifar_protocol(name):
    recipe = load_recipe(name, data_needed=False)
    teacher, student = pair(name)
    assert (recipe.teacher_list[0].model, recipe.student.model) == (f"cifar/{teacher}", f"cifar/{student}")
    assert recipe.name == name.replace("/", "-")
    rate = 0.01 if student.startswith(SMALL_RATES) else 0.05
    for stage, lr in (("teacher", 0.05), ("student", rate)):
        settings = recipe.stage_training(stage)
        assert (settings.epochs, settings.batch_size, settings.optimizer, settings.nesterov) == (240, 64, "sgd", False)
        factor = lr_factor(settings, 10)
        at = {epoch: lr * factor(10 * (epoch - 1)) for epoch in (1, 150, 151, 180, 181, 210, 211, 240)}
        wanted = {
            1: lr,
            150: lr,
            151: lr / 10,
            180: lr / 10,
            181: lr / 100,
            210: lr / 100,
            211: lr / 1e3,
            240: lr / 1e3,
        }
        assert at == pytest.approx(wanted)
        layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        groups = create_optimizer(layers.named_parameters(), settings).param_groups
        assert {(group["lr"], group["momentum"], group["weight_decay"]) for group in groups} == {(lr, 0.9, 5e-4)}
    augment = recipe.data.augment
    assert augment is not None
    assert (augment.pad_crop * 32, augment.pad_mode, augment.hflip, augment.auto_augment) == (4, "black", True, "none")
    assert recipe.data.mean == (0.5071, 0.4867, 0.4408)
    assert recipe.data.std == (0.2675, 0.2565, 0.2761)
    assert recipe.training.selection_metric == "top1"  # of val: nothing is ever chosen by test


@pytest.mark.parametrize("name", CIFAR)
def test_methods_with_a_preset_for_the_pair_are_two_switches_away(name):
    recipe = load_recipe(name, ("method.name=dkd", f"method.preset={name}"), data_needed=False)
    assert recipe.method == {"name": "dkd", "preset": name}
    method = create_stage_method(recipe)
    # the paper's table of beta
    wanted = {"resnet56": 2.0, "resnet110": 2.0, "vgg13": 6.0}.get(pair(name)[0], 8.0)
    assert method.beta == (6.0 if pair(name)[1].startswith("wrn") else wanted)


def test_other_protocols():
    for name in OTHERS[:2]:
        recipe = load_recipe(name, data_needed=False)
        check_model(recipe.student.model)
        assert recipe.teacher_list[0].weights == "pretrained"
        settings = recipe.training
        assert (settings.epochs, settings.milestones, settings.lr, settings.batch_size) == (100, [30, 60, 90], 0.1, 256)
        assert settings.weight_decay == 1e-4
    funmatch = load_recipe("funmatch", data_needed=False)
    augment = funmatch.data.augment
    assert augment is not None
    assert (augment.mixup, augment.crop_scale, funmatch.method["alpha"]) == (1.0, (0.08, 1), 0.0)


@pytest.fixture(scope="module")
def cifar_folder(tmp_path_factory) -> Path:
    """A made cifar-100-binary: two images a class for train and val, one for test."""
    folder = tmp_path_factory.mktemp("data") / "cifar-100-binary"
    folder.mkdir()
    (folder / "fine_label_names.txt").write_text("\n".join(f"class_{i:02d}" for i in range(100)))
    random = np.random.default_rng(0)
    for split, count in (("train", 200), ("test", 100)):
        labels = (np.arange(count) % 100).astype(np.uint8)
        pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        rows = np.concatenate([labels[:, None] // 5, labels[:, None], pixels], axis=1)
        (folder / f"{split}.bin").write_bytes(rows.tobytes())
    return folder.parent


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for i in range(6):
            Image.fromarray(random.integers(0, 256, (70, 64, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def few(data: DataSplits) -> DataSplits:
    """Four images for training, two each for val and test."""
    first = {"train": 4, "val": 2, "test": 2}
    return dataclasses.replace(data, **{part: Subset(data.split(part), np.arange(n)) for part, n in first.items()})


def network(recipe: Recipe, stage: str, data: DataSplits) -> Classifier:
    torch.manual_seed(0)
    start = build_network(recipe, recipe.network(stage), data.class_names)
    return Classifier(start.module, start.architecture, data.class_names, start.input)


def distil(recipe: Recipe, folder: Path) -> None:
    """The distilled stage alone; its teacher is fresh."""
    data = few(load_data(recipe.data))
    student = network(recipe, "student", data)
    before = {key: value.clone() for key, value in student.module.named_parameters()}
    (planned,) = [stage for stage in plan_stages(recipe) if stage.name == "distilled"]
    method, compute = create_stage_method(recipe), create_compute(recipe.stage_training("student"))
    train = train_loader(planned, method.needs, student.input, recipe=recipe, data=data, compute=compute)
    history = train_stage(
        planned, student, method, [network(recipe, "teacher", data)], train, recipe=recipe, data=data,
        compute=compute, folder=folder, observer=SilentObserver(), resume=False,
    )  # fmt: skip
    (record,) = history.records
    terms = record["train"]["terms"]
    assert set(terms) == ({"kd"} if recipe.name == "funmatch" else {"ce", "kd"})
    assert all(0 <= value < 1000 for value in terms.values())  # neither can be negative
    after = dict(student.module.named_parameters())
    assert sum(not torch.equal(before[key], value) for key, value in after.items()) > 0.9 * len(after)
    assert load_model(folder).architecture == recipe.student.model


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CIFAR]
)
def test_two_steps_of_each_published_pair(name, cifar_folder, tmp_path):
    root = f"data.options.root={cifar_folder}"
    distil(load_recipe(name, (*SHORT, root)), tmp_path)


@pytest.mark.parametrize("name", OTHERS)
def test_two_steps_of_the_others_in_small(name, image_folder, tmp_path):
    # 32 px, without downloads, and smaller networks where the recipe's would take most of the time
    networks = ("teacher.model=resnet18", "student.model=resnet10t") if name == "funmatch" else ()
    sets = (*SHORT, "data.size=32", "teacher.weights=null", "teacher.head=null", *networks)
    distil(load_recipe(name, sets, flags={"--data": str(image_folder)}), tmp_path)


def test_images_are_normalised_as_the_recipe_says():
    recipe = load_recipe(CIFAR[0], data_needed=False)
    spec = build_network(recipe, recipe.student, ("cat", "dog")).input
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    found = normalize(white, spec)[0, :, 0, 0].tolist()
    assert found == pytest.approx([(1 - 0.5071) / 0.2675, (1 - 0.4867) / 0.2565, (1 - 0.4408) / 0.2761], abs=1e-5)


def test_published_weights_keep_their_own_normalisation(monkeypatch):
    recipe = load_recipe(CIFAR[0], data_needed=False)
    ready = recipe.student.model_copy(update={"model": "resnet18", "weights": "pretrained"})
    loaded = type("Loaded", (), {"module": torch.nn.Identity(), "new_head": False, "notes": [], "normalisation": None})
    monkeypatch.setattr("potstill.experiment.builders.load_weights", lambda *_, **__: loaded)
    assert build_network(recipe, ready, ("cat", "dog")).input.mean == (0.485, 0.456, 0.406)


def test_a_standard_deviation_of_zero_is_refused():
    with pytest.raises(UsageError, match=r"data.std must be three numbers above 0, got \[0.2, 0.0, 0.2\]"):
        load_recipe(CIFAR[0], ("data.std=[0.2, 0, 0.2]",), data_needed=False)
