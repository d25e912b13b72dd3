import json
from pathlib import Path

import pytest

from potstill.errors import ArtifactError, UsageError
from potstill.experiments.recipe import Recipe, dump_recipe, list_recipes, load_recipe

SMALL = {"name": "small", "teacher": {"model": "cifar/vgg8"}, "student": {"model": "cifar/resnet8"}}


def load(source: object, *sets: str, **options: object) -> Recipe:
    return load_recipe(source, sets, **{"data_needed": False, **options})  # type: ignore[arg-type]


def problems(source: object, *sets: str, **options: object) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load(source, *sets, **options)
    return str(caught.value).splitlines()


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A function that writes recipe.yaml in the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        Path("recipe.yaml").write_text(text)
        return "recipe.yaml"

    return write


def model_folder(folder: Path, architecture: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps({"schema": 1, "architecture": architecture}))
    return folder


# shipped recipes


@pytest.mark.parametrize("name", ["fashion-mnist", "quickstart", "solar", "vgg16-resnet18"])
def test_every_shipped_recipe_is_well_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))

    assert recipe.name == name
    assert recipe.description
    assert load(tmp_path / "again.yaml") == recipe
    assert load(str(list_recipes()[name])) == recipe


def test_no_recipe_ships_untested() -> None:
    assert sorted(list_recipes()) == ["fashion-mnist", "quickstart", "solar", "vgg16-resnet18"]


def test_the_original_specification_has_its_own_settings() -> None:
    recipe = load("vgg16-resnet18")
    teacher, student = recipe.stage_training("teacher"), recipe.stage_training("student")

    assert (recipe.teacher.model, recipe.student.model, recipe.teacher.weights) == ("vgg16", "resnet18", None)
    assert recipe.method == {"name": "kd", "temperature": 2.0, "alpha": 0.5}
    assert (teacher.epochs, student.epochs) == (100, 30)
    assert (teacher.batch_size, student.batch_size, teacher.lr, student.lr) == (32, 32, 1e-4, 1e-4)
    assert recipe.data.size == 224


def test_a_recipe_without_data_says_how_to_give_some() -> None:
    assert problems("vgg16-resnet18", data_needed=True) == [
        "vgg16-resnet18.yaml:7:3: data.source is not given: this recipe has no data of its own; "
        "name a folder of images with --data DIR"
    ]


# what is wrong


def test_all_problems_come_at_once_with_line_column_and_nearest_name(written) -> None:  # type: ignore[no-untyped-def]
    recipe = written(
        """\
name: bad/name
sed: 3
data:
  size: 4
  workers: many
  augment: {hflip: 1, polic: none, policy: randaug}
teacher:
  model: vgg16
  training: {milestons: [3], epochs: 0}
student: {mode: resnet18}
method:
  name: kd
  temperature: 0
  alph: 0.5
training:
  epochs: "30"
  optimizer: adamm
epochs: 3
"""
    )

    assert problems(recipe) == [
        "recipe.yaml:1:1: name must be made of 1 to 64 letters, digits, dots, dashes and underscores, got 'bad/name'",
        "recipe.yaml:2:1: sed: unknown key; did you mean 'seed'?",
        "recipe.yaml:4:3: data.size must be at least 8, got 4",
        "recipe.yaml:5:3: data.workers must be a whole number or 'auto', got 'many'",
        "recipe.yaml:6:13: data.augment.hflip must be true or false, got 1",
        "recipe.yaml:6:23: data.augment.polic: unknown key; did you mean 'policy'?",
        "recipe.yaml:6:36: data.augment.policy must be 'none', 'randaugment' or 'trivialaugment', got 'randaug'"
        "; did you mean 'randaugment'?",
        "recipe.yaml:9:14: teacher.training.milestons: unknown key; did you mean 'milestones'?",
        "recipe.yaml:9:30: teacher.training.epochs must be at least 1, got 0",
        "recipe.yaml:10:1: student.model is missing (an architecture; see `potstill models`)",
        "recipe.yaml:10:11: student.mode: unknown key; did you mean 'model'?",
        "recipe.yaml:13:3: method.temperature must be above 0, got 0",
        "recipe.yaml:14:3: method.alph: no option 'alph'; did you mean 'alpha'? It takes temperature, alpha",
        "recipe.yaml:16:3: training.epochs must be a whole number, got '30'",
        "recipe.yaml:17:3: training.optimizer: no class 'adamm' in torch.optim; did you mean 'adamw'?",
        "recipe.yaml:18:1: epochs: unknown key; did you mean 'training.epochs'?",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"training": {"milestones": [3]}}, "training.milestones need schedule: step, got schedule: constant"),
        ({"training": {"schedule": "step"}}, "training.schedule step needs milestones"),
        (
            {"training": {"schedule": "step", "milestones": [3, 30]}},
            "training.milestones must rise from 1 to below epochs 30, got [3, 30]",
        ),
        ({"training": {"warmup_epochs": 31}}, "training.warmup_epochs must be at most epochs, 30, got 31"),
        (
            {"training": {"warmup_epochs": 6}, "teacher": {"model": "vgg16", "training": {"epochs": 5}}},
            "teacher.training.warmup_epochs must be at most epochs, 5, got 6",
        ),
        ({"training": {"nesterov": True}}, "training.nesterov needs optimizer: sgd and momentum above 0"),
        ({"training": {"device": "gpu"}}, "training.device must be auto, cpu, cuda"),
        ({"training": {"threads": 0}}, "training.threads must be at least 1 or 'auto', got 0"),
        ({"training": {"lr": float("inf")}}, "training.lr must be a finite number, got inf"),
        ({"data": {"val": 0.6, "test": 0.4}}, "data.val and data.test must leave something to train on"),
        ({"data": {"augment": {"crop_scale": [0.9, 0.2]}}}, "data.augment.crop_scale must be two shares"),
        ({"data": {"augment": {"crop_scale": [0.9]}}}, "data.augment.crop_scale[1] is missing"),
        ({"data": {"workers": -1}}, "data.workers must be at least 0 or 'auto', got -1"),
        ({"method": {"name": "kdd"}}, "method.name: no method 'kdd'; did you mean 'kd'?"),
        ({"method": {"temperature": 2}}, "method.name is missing"),
        ({"method": "kd"}, "method must be a mapping, got 'kd'"),
        ({"training": [3]}, "training must be a mapping, got [3]"),
        ({"seed": True}, "seed must be a whole number, got true"),
        ({"teacher": None}, "teacher must be a mapping, got null"),
    ],
)
def test_each_kind_of_mistake_is_one_sentence(changes: dict[str, object], expected: str) -> None:
    found = problems({**SMALL, **changes})

    assert len(found) == 1, found
    assert found[0].startswith(expected)


def test_a_setting_that_cannot_be_read_is_not_compared_with_others() -> None:
    # The default of 30 epochs must not be held against the warm-up.
    assert problems({**SMALL, "training": {"epochs": "many", "warmup_epochs": 50}}) == [
        "training.epochs must be a whole number, got 'many'"
    ]


def test_a_fault_in_one_setting_does_not_hide_another() -> None:
    found = problems({**SMALL, "training": {"epochs": "many", "threads": 0}, "data": {"size": "big", "val": 0.9}})

    assert [line.split(" ")[0] for line in found] == ["data.size", "training.epochs", "data.val", "training.threads"]


@pytest.mark.parametrize("text", ["", "just text", "- a\n- b"])
def test_a_recipe_that_is_no_mapping_is_refused(written, text: str) -> None:  # type: ignore[no-untyped-def]
    assert problems(written(text)) == [
        "recipe.yaml: a recipe is a mapping; start from `potstill recipes quickstart`",
    ]


def test_unknown_names_and_missing_files_are_told_apart() -> None:
    assert problems("quickstat")[0] == "no recipe 'quickstat'; did you mean 'quickstart'?"
    assert problems("nowhere.yaml") == ["cannot read recipe nowhere.yaml: No such file or directory"]


def test_binary_files_and_huge_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    (tmp_path / "huge.yaml").write_bytes(b"#" * 1_000_001)

    assert "UTF-8" in problems(tmp_path / "picture.yaml")[0]
    assert "more than 1,000,000 bytes" in problems(tmp_path / "huge.yaml")[0]


# --set and flags


def test_set_reads_yaml_values_and_comes_last() -> None:
    recipe = load(
        SMALL,
        "training.lr=1e-4",
        "training.milestones=[3, 5]",
        "training.schedule=step",
        "training.warmup_epochs=0",
        "data.augment.hflip=true",
        "seed=7",
        "training.clip_norm=null",
        flags={"--seed": 3, "--student": "resnet18"},
    )

    assert recipe.training.lr == 0.0001
    assert recipe.training.milestones == [3, 5]
    assert recipe.data.augment is not None
    assert recipe.data.augment.hflip
    assert (recipe.seed, recipe.student.model) == (7, "resnet18")


def test_problems_of_set_name_the_set_and_come_after_the_file(written) -> None:  # type: ignore[no-untyped-def]
    recipe = written("teacher: {model: a}\nstudent: {model: b}\nsed: 1\n")

    found = problems(recipe, "method.temperture=3", "seed.x=2", "nonsense", "seed=[1", "training.lr=1e999", "a=1")

    assert found[0] == "recipe.yaml:3:1: sed: unknown key; did you mean 'seed'?"
    assert sorted(found[1:]) == [
        "--set a=1: a: unknown key. Known here: name, description, seed, data, teacher, student, method, training",
        "--set method.temperture=3: method.temperture: no option 'temperture'; did you mean 'temperature'? "
        "It takes temperature, alpha",
        "--set nonsense: write it as key=value, for example --set training.epochs=5",
        "--set seed.x=2: seed must be a whole number, got {'x': 2}",
        "--set seed=[1: expected ',' or ']', but got '<stream end>'",
        "--set training.lr=1e999: training.lr must be a finite number, got inf",
    ]


def test_a_misspelt_option_by_set_gets_the_nearest_name() -> None:
    found = problems("quickstart", "method.temperture=3", "name.x=3")

    assert found[0] == "--set name.x=3: name is a single value and has no keys in it"
    assert found[1].startswith("--set method.temperture=3: ")
    assert "did you mean 'temperature'?" in found[1]


def test_another_method_by_set_leaves_the_former_options_behind() -> None:
    assert load("quickstart", "method.name=supervised").method == {"name": "supervised"}
    # An option that the user names together with the method is not the recipe's, and stays.
    assert "no option 'alpha'" in problems("quickstart", "method.alpha=0.3", "method.name=supervised")[0]
    assert load("quickstart", "method.name=kd").method == load("quickstart").method


def test_required_options_of_a_new_method_point_at_the_set() -> None:
    found = problems("quickstart", "method.name=fitnet")

    assert found
    assert all(line.startswith("--set method.name=fitnet: method.") and "must be given" in line for line in found)


def test_data_by_flag_drops_the_options_of_the_former_data(tmp_path: Path) -> None:
    recipe = load("solar", flags={"--data": str(tmp_path)})

    assert (recipe.data.source, recipe.data.options) == (str(tmp_path), {})
    assert load("solar", flags={"--data": "solar"}).data.options == {"classes": 4, "cells": "all"}


@pytest.mark.parametrize(
    ("flag", "model", "weights"),
    [("resnet18", "resnet18", None), ("timm/resnet18@pretrained", "timm/resnet18", "pretrained")],
)
def test_a_teacher_by_architecture(flag: str, model: str, weights: str | None) -> None:
    with_weights = {**SMALL, "teacher": {"model": "vgg16", "weights": "pretrained", "training": {"epochs": 3}}}
    teacher = load(with_weights, flags={"--teacher": flag}).teacher

    assert (teacher.model, teacher.weights, teacher.training) == (model, weights, {"epochs": 3})


def test_a_bare_state_dict_needs_its_architecture(written, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "w.pth").write_bytes(b"x")

    assert load(SMALL, flags={"--teacher": "vgg16@w.pth"}).teacher.weights == "w.pth"
    assert problems(SMALL, flags={"--teacher": "w.pth"}) == [
        "--teacher w.pth: teacher.weights: w.pth holds weights alone; name their architecture as ARCHITECTURE@w.pth"
    ]
    assert problems(SMALL, flags={"--teacher": "gone.pth"}) == [
        "--teacher gone.pth: teacher.weights: no such file or folder: gone.pth"
    ]


def test_a_run_folder_gives_a_teacher_its_teacher_and_a_student_its_student(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").touch()
    model_folder(run / "teacher", "vgg16")
    model_folder(run / "distilled", "resnet18")
    recipe = load(SMALL, flags={"--teacher": str(run), "--student": str(run)})

    assert (recipe.teacher.model, recipe.teacher.weights) == ("vgg16", str(run / "teacher"))
    assert (recipe.student.model, recipe.student.weights) == ("resnet18", str(run / "distilled"))


def test_weights_of_ours_need_no_architecture_but_must_not_contradict_one(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "vgg16")
    (folder / "model.safetensors").write_bytes(b"x")

    for path in (folder, folder / "model.json", folder / "model.safetensors"):
        teacher = load({**SMALL, "teacher": {"weights": str(path)}}).teacher
        assert (teacher.model, teacher.weights) == ("vgg16", str(folder))
    assert (
        "is a vgg16, but teacher.model is resnet18"
        in problems({**SMALL, "teacher": {"model": "resnet18", "weights": str(folder)}})[0]
    )


def test_a_damaged_model_is_an_artifact_error_unless_the_recipe_is_wrong_too(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "vgg16")
    (folder / "model.json").write_text("{")
    damaged = {**SMALL, "teacher": {"weights": str(folder)}}

    with pytest.raises(ArtifactError, match=r"teacher\.weights: .*is damaged"):
        load(damaged)
    assert len(problems({**damaged, "seed": -1})) == 2


def test_the_callers_dict_stays_as_it_was() -> None:
    source = {**SMALL, "teacher": {"model": "vgg16"}, "data": {"source": None}}
    before = json.dumps(source)
    load(source, "teacher.training.epochs=3", flags={"--student": "resnet18"})

    assert json.dumps(source) == before


def test_a_stage_has_the_shared_settings_and_its_own_on_top() -> None:
    recipe = load({**SMALL, "training": {"epochs": 9, "lr": 0.1}, "teacher": {"model": "a", "training": {"lr": 0.2}}})

    assert (recipe.stage_training("teacher").lr, recipe.stage_training("teacher").epochs) == (0.2, 9)
    assert (recipe.stage_training("student").lr, recipe.stage_training("student").epochs) == (0.1, 9)
