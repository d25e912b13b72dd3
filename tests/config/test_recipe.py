import json
from pathlib import Path
from typing import Any

import pytest

from potstill.config.recipe import Recipe, dump_recipe, list_recipes, load_recipe
from potstill.errors import ArtifactError, UsageError
from potstill.io import write_checksummed_json
from potstill.methods import method_info

PRESET = method_info("dkd").presets["cifar100/resnet32x4-resnet8x4"]
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


def model_folder(folder: Path, architecture: str, **facts: Any) -> Path:
    folder.mkdir(parents=True)
    write_checksummed_json(folder / "model.json", {"schema": 1, "architecture": architecture, "facts": facts})
    return folder


# shipped recipes


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_is_well_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))

    assert recipe.name == name.replace("/", "-")  # a folder's name has no slash
    assert recipe.description
    assert load(tmp_path / "again.yaml") == recipe  # where `auto` has become the method that it chose
    assert load(str(list_recipes()[name])) == recipe


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["teacher={model: efficientnet-lite0, weights: pretrained}"], {"name": "srd", "temperature": 1.0}),
        (["teacher=[{model: efficientnet-lite0, weights: pretrained}]"], {"name": "srd", "temperature": 1.0}),
        ([], {"name": "dist", "ce_weight": 0.0}),  # a teacher from scratch
        (["method.alpha=0.5"], {"name": "kd", "temperature": 1.0, "alpha": 0.5}),  # which the others have not
        (["method.temperature=2"], {"name": "dist", "ce_weight": 0.0, "temperature": 2}),
        (["teacher={model: efficientnet-lite0, weights: pretrained}", "method.alpha=0.5"],
         {"name": "kd", "temperature": 1.0, "alpha": 0.5}),
        (["teacher={model: efficientnet-lite0, weights: pretrained}", "method.temperature=2"],
         {"name": "srd", "temperature": 2}),
        (["teacher={model: efficientnet-lite0, weights: pretrained}", "student.weights=pretrained"],
         {"name": "kd", "temperature": 4.0, "alpha": 0.5}),
        (["teacher={model: efficientnet-lite0, weights: pretrained}", "student.weights=pretrained",
          "data.labels_per_class=10"], {"name": "kd", "temperature": 1.0, "alpha": 0.0}),
        (["teacher={model: efficientnet-lite0, weights: pretrained}", "data.labeled=false", "teacher.classes=[a, b]"],
         {"name": "srd", "temperature": 1.0, "ce_weight": 0.0}),
    ],
)  # fmt: skip
def test_the_method_auto_depends_on_the_networks(sets: list[str], expected: dict[str, object]) -> None:
    assert load(SMALL | {"method": {"name": "auto"}}, *sets).method == expected


def test_the_method_auto_looks_where_a_ready_teacher_learned(tmp_path: Path) -> None:
    """One that a run trained from scratch is no other teacher than one that this run would train."""
    training = {"epochs": 15}
    scratch = model_folder(tmp_path / "scratch", "cifar/resnet20", training=training)
    copy = model_folder(tmp_path / "copy", "cifar/resnet20", weights=str(scratch))
    tuned = model_folder(tmp_path / "tuned", "cifar/resnet20", weights="pretrained", training=training)
    lost = model_folder(tmp_path / "lost", "cifar/resnet20", weights=str(tmp_path / "lost"))  # names itself
    for folder, name in ((scratch, "dist"), (copy, "dist"), (tuned, "srd"), (lost, "srd")):
        recipe = load(SMALL | {"method": {"name": "auto"}}, flags={"--teacher": str(folder)})
        assert recipe.method["name"] == name, folder


def test_the_method_auto_takes_logits_from_a_teacher_without_layers(tmp_path: Path) -> None:
    (tmp_path / "answers.csv").write_text("path,cat,dog\nimages/1.png,0.2,0.8\n")
    recipe = load(SMALL | {"method": {"name": "auto"}}, f"teacher={{weights: {tmp_path / 'answers.csv'}}}")
    assert recipe.method["name"] == "dist"
    assert load(SMALL, flags={"--method": "auto"}).method["name"] == "dist"
    previous = model_folder(tmp_path / "previous", "cifar/resnet8")
    inside = load(SMALL, flags={"--method": "auto", "--previous": str(previous)}).method
    assert (inside["name"], inside["base_method"]) == ("pct", {"name": "dist", "ce_weight": 0.0})
    (nested,) = problems(SMALL, "method={name: ls, base_method: {name: auto}}")
    assert "the method of a whole recipe" in nested
    assert "no option 'alhpa'" in " ".join(problems(SMALL, "method={name: auto, alhpa: 2}"))


def test_recipes_for_everyday_use_come_first() -> None:
    names = list(list_recipes())
    everyday = [name for name in names if "/" not in name]
    assert names[: len(everyday)] == sorted(everyday)
    assert {"domain", "fashion-mnist", "funmatch", "quickstart", "solar", "vgg16-resnet18"} <= set(everyday)
    protocols = {name.partition("/")[0] for name in names[len(everyday) :]}
    assert protocols == {"cifar100", "imagenet"}  # tests/.../test_protocol.py


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
        "vgg16-resnet18.yaml:7:3: data.source is missing: give a folder of images with --data DIR"
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
  augment: {hflip: 1, erasin: 0, auto_augment: randaug}
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
        "recipe.yaml:6:23: data.augment.erasin: unknown key; did you mean 'erasing'?",
        "recipe.yaml:6:34: data.augment.auto_augment must be 'none', 'randaugment' or 'trivialaugment', got 'randaug'"
        "; did you mean 'randaugment'?",
        "recipe.yaml:9:14: teacher.training.milestons: unknown key; did you mean 'milestones'?",
        "recipe.yaml:9:30: teacher.training.epochs must be at least 1, got 0",
        "recipe.yaml:10:1: student.model is missing (an architecture (see `potstill models`), or file.py:callable)",
        "recipe.yaml:10:11: student.mode: unknown key; did you mean 'model'?",
        "recipe.yaml:13:3: method.temperature must be above 0, got 0",
        "recipe.yaml:14:3: method.alph: no option 'alph'; did you mean 'alpha'? It takes temperature, alpha, "
        "confidence",
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
        *(
            ({"training": training}, f"training.{message}")
            for training, message in [
                ({"momentum": 0.5}, "momentum has an effect with optimizer: sgd or dot only"),
                ({"optimizer": "sgd", "dot_delta": 0.05}, "dot_delta has an effect with optimizer: dot only"),
                ({"gamma": 0.5}, "gamma has an effect with schedule: step only"),
                ({"min_lr_ratio": 0.1}, "min_lr_ratio has an effect with schedule: cosine only"),
                ({"decay_all": True, "weight_decay": 0}, "decay_all has no effect with weight_decay: 0"),
                ({"schedule": "cosine", "min_lr_ratio": 1}, "min_lr_ratio 1 makes schedule: cosine constant"),
                ({"schedule": "step", "milestones": [3], "gamma": 1}, "gamma 1 makes schedule: step constant"),
                (
                    {"schedule": "step", "milestones": [3], "warmup_epochs": 3},
                    "milestones must come after warmup_epochs, 3, got [3]",
                ),
                ({"optimizer_options": {"lr": 0.5}}, "optimizer_options.lr contradicts training.lr: leave it out"),
                (
                    {"optimizer": "sgd", "optimizer_options": {"momentum": 0.5}},
                    "optimizer_options.momentum contradicts training.momentum",
                ),
                (
                    {"optimizer_options": {"weight_decay": 0.5}},
                    "optimizer_options.weight_decay contradicts training.weight_decay",
                ),
            ]
        ),
        (
            {"teacher": {"model": "vgg16", "training": {"momentum": 0.5}}},
            "teacher.training.momentum has an effect with optimizer: sgd or dot only",
        ),
        (
            {"data": {"class_balance": "weights"}, "training": {"batch_size": 1}},
            "training.batch_size must be at least 2: data.class_balance: weights has no effect in a batch of one image",
        ),
        ({"training": {"nesterov": True}}, "training.nesterov needs optimizer: sgd and momentum above 0"),
        ({"training": {"device": "gpu"}}, "training.device must be auto, cpu, cuda"),
        ({"training": {"threads": 0}}, "training.threads must be 1 to 1,024 or 'auto', got 0"),
        ({"training": {"lr": float("inf")}}, "training.lr must be a finite number, got inf"),
        ({"data": {"val": 0.6, "test": 0.4}}, "data.val and data.test must sum to less than 1"),
        ({"data": {"augment": {"crop_scale": [0.9, 0.2]}}}, "data.augment.crop_scale must be two shares"),
        ({"data": {"augment": {"crop_scale": [0.9]}}}, "data.augment.crop_scale[1] is missing"),
        ({"data": {"workers": -1}}, "data.workers must be 0 to 1,024 or 'auto', got -1"),
        ({"method": {"name": "kdd"}}, "method.name: no method 'kdd'; did you mean 'kd'?"),
        ({"method": {"temperature": 2}}, "method.name is missing"),
        ({"method": "kd"}, "method must be a mapping, got 'kd'"),
        ({"training": [3]}, "training must be a mapping, got [3]"),
        ({"seed": True}, "seed must be a whole number, got true"),
        ({"teacher": None}, "teacher is missing; for example"),
        ({"teacher": []}, "teacher is missing, got an empty list"),
        ({"teacher": "vgg16"}, "teacher must be a mapping, got 'vgg16'"),
        (
            {"teacher": [{"model": "a"}, {"modl": "b", "model": "b"}]},
            "teacher[1].modl: unknown key; did you mean 'model'",
        ),
        ({"teacher": [{"model": "a"}, {"size": 32}]}, "teacher[1].model is missing (an architecture"),
        ({"teacher": {"model": "a", "size": 4}}, "teacher.size must be at least 8, got 4"),
        (
            {"teacher": [{"model": "a"}, {"model": "b", "training": {"epochs": 0}}]},
            "teacher[1].training.epochs must be at least 1, got 0",
        ),
        ({"teachers": {"weights": [1, 2]}}, "teachers.weights must be one number for each of the 1 teachers, got 2"),
        (
            {"teacher": [{"model": "a"}] * 2, "teachers": {"weights": [1, -1]}},
            "teachers.weights must be at least 0, and not all 0, got [1, -1]",
        ),
        ({"teachers": {"combine": "logit"}}, "teachers.combine must be 'logits' or 'probabilities', got 'logit'"),
        ({"assistants": [{"modell": "a", "model": "a"}]}, "assistants[0].modell: unknown key; did you mean 'model'?"),
        ({"born_again_generations": 0}, "born_again_generations must be at least 1, got 0"),
        (
            {"method": {"name": "tfkd_reg"}, "born_again_generations": 2},
            "born_again_generations: each student learns from the one before, and method tfkd_reg learns "
            "from no teacher",
        ),
        (
            {"method": {"name": "tfkd_reg"}, "assistants": [{"model": "a"}]},
            "assistants learn from a teacher, and method tfkd_reg learns from no teacher",
        ),
        ({"feature_pairs": [["a", "b"], ["c"]]}, "feature_pairs[1][1] is missing"),
        ({"feature_pairs": [["a", 1]]}, "feature_pairs[0][1] must be text, got 1"),
        ({"method": [{"name": "kd"}]}, "method must be one method or a list of two or more, got a list of 1"),
        ({"method": ["kd", {"name": "dkd"}]}, "method[0] must be a method, a mapping such as {name: kd}, got 'kd'"),
        ({"method": [{"name": "kd"}, {"factor": 2}]}, "method[1].name is missing"),
        ({"method": [{"name": "kd"}, {"name": "dkd", "factor": -1}]}, "method[1].factor must be at least 0, got -1"),
        (
            {"method": {"name": "ls", "base_method": {"name": "dkd", "temperature": 0}}},
            "method.base_method.temperature must be above 0, got 0",
        ),
        (
            {
                "method": {
                    "name": "combined",
                    "methods": [{"name": "kd"}, {"name": "ls", "base_method": {"name": "dkdd"}}],
                }
            },
            "method.methods[1].base_method.name: no method 'dkdd'; did you mean 'dkd'?",
        ),
        ({"method": {"name": "dkd", "preset": "cifar"}}, "method.preset: no preset 'cifar'"),
        ({"method": {"name": "kd", "schedule": 3}}, "method.schedule must be a mapping of terms or options, got 3"),
        *(
            ({"method": {"name": "kd", "schedule": schedule}}, f"method.{message}")
            for schedule, message in [
                ({"temperature": {"start": 0}}, "schedule.temperature.start must be above 0, got 0"),
                ({"alpha": {"shape": "linear", "start": 0.5, "end": 2}}, "schedule.alpha.end must be from 0 to 1"),
                ({"kd": {"shape": "linear", "start": 1, "end": -1}}, "schedule.kd.end must be at least 0, got -1"),
                ({"kd": {"start": 1, "end": 0}}, "schedule.kd.end has no effect with shape constant; give a shape"),
                ({"kd": {"shape": "step", "begin": 0.5}}, "schedule.kd.begin has no effect with shape step"),
                ({"kd": {"shape": "linear", "finish": 2}}, "schedule.kd: begin and finish are shares of the training"),
                ({"kd": {"shape": "cosine", "begin": 1}}, "schedule.kd: begin and finish are shares of the training"),
            ]
        ),
        (
            {"method": {"name": "vid", "schedule": {"variance": {"start": 2}}}},
            "method.schedule.variance: variance of vid cannot change during training; what can: weight, ce_weight, the",
        ),
        (
            {"method": {"name": "at", "schedule": {"power": {"start": 2}}}},
            "method.schedule.power: power of at cannot change during training",
        ),
        (
            {"training": {"pick_by": "nll"}},
            "training.pick_by: unknown key; it has been renamed to 'selection_metric'",
        ),
        (
            {"teacher": {"model": "a", "training": {"pick_by": "nll"}}},
            "teacher.training.pick_by: unknown key; it has been renamed to 'selection_metric'",
        ),
        (
            {"training": {"selection_metric": "loss"}},
            "training.selection_metric must be 'top1', 'top3', 'f1_macro', 'auc_macro' or 'nll', got 'loss'; the",
        ),
    ],
)
def test_each_kind_of_mistake_is_one_sentence(changes: dict[str, object], expected: str) -> None:
    found = problems({**SMALL, **changes})

    assert len(found) == 1, found
    assert found[0].startswith(expected)


def test_a_shared_setting_may_be_meant_for_one_network() -> None:
    """The teacher is trained by sgd with this momentum, the student by adamw."""
    teacher = {"model": "vgg16", "training": {"optimizer": "sgd"}}
    recipe = load_recipe({**SMALL, "teacher": teacher, "training": {"momentum": 0.5}})
    assert recipe.stage_training("teacher").momentum == 0.5


def test_options_of_an_optimizer_that_are_no_settings_of_ours_are_its_own() -> None:
    training = {"optimizer": "rmsprop", "optimizer_options": {"momentum": 0.5}}
    assert load_recipe({**SMALL, "training": training}).training.optimizer_options == {"momentum": 0.5}


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
        "recipe.yaml: a recipe must be a mapping; start from `potstill recipes quickstart`",
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
        "training.max_grad_norm=null",
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
        "--set a=1: a: unknown key. Keys here: name, description, seed, seeds, data, domain, teacher, teachers, "
        "assistants, student, born_again_generations, method, previous, teacher_below_baseline, curriculum, "
        "feature_pairs, train_predictions, "
        "teacher_cache, training, "
        "tracker",
        "--set method.temperture=3: method.temperture: no option 'temperture'; did you mean 'temperature'? "
        "It takes temperature, alpha, confidence",
        "--set nonsense: write it as key=value, for example --set training.epochs=5",
        "--set seed.x=2: seed must be a whole number, got {'x': 2}",
        "--set seed=[1: expected ',' or ']', but got '<stream end>'",
        "--set training.lr=1e999: training.lr must be a finite number, got inf",
    ]


def test_a_renamed_key_names_the_new_one() -> None:
    assert problems("quickstart", "data.fit=squash") == [
        "--set data.fit=squash: data.fit: unknown key; it has been renamed to 'resize_mode'"
    ]
    assert problems("quickstart", "data.view_seed=1") == [
        "--set data.view_seed=1: data.view_seed: unknown key; it has been renamed to 'augmentation_seed'"
    ]
    assert "'crop', 'pad' or 'stretch'" in problems("quickstart", "data.resize_mode=squash")[0]


def test_a_misspelt_option_by_set_gets_the_nearest_name() -> None:
    found = problems("quickstart", "method.temperture=3", "name.x=3")

    assert found[0] == "--set name.x=3: name is a single value without keys"
    assert found[1].startswith("--set method.temperture=3: ")
    assert "did you mean 'temperature'?" in found[1]


def test_another_method_by_set_leaves_the_former_options_behind() -> None:
    assert load("quickstart", "method.name=supervised").method == {"name": "supervised"}
    # alpha of kd is not alpha of dkd: another method starts from its own defaults
    assert load("quickstart", "method.name=dkd").method == {"name": "dkd"}
    # An option that the user names together with the method is not the recipe's, and stays.
    (found,) = problems("quickstart", "method.alpha=0.3", "method.name=supervised")
    assert "no option 'alpha'" in found
    assert "method kd has 'alpha'" in found
    assert load("quickstart", "method.name=dist").method == {"name": "dist"}
    assert load("few-labels", "method.name=kd").method == load("few-labels").method


def test_required_options_of_a_new_method_point_at_the_set() -> None:
    found = problems("quickstart", "method.name=combined")

    assert len(found) == 1
    assert found[0].startswith("--set method.name=combined: method.methods must be given")


def test_problems_in_lists_and_inner_methods_stand_at_their_own_line(written) -> None:  # type: ignore[no-untyped-def]
    recipe = written(
        """\
teacher:
  - model: a
  - model: b
    siz: 3
student: {model: c}
method:
  - {name: kd, alpha: 2}
  - name: ls
    factor: heavy
    base_method:
      name: dkd
      bta: 8
"""
    )

    assert problems(recipe, "method.0.temperature=-1", "teacher.2.model=d", "teacher.model=d") == [
        "recipe.yaml:4:5: teacher[1].siz: unknown key; did you mean 'size'?",
        "recipe.yaml:7:16: method[0].alpha must be from 0 to 1, got 2",
        "recipe.yaml:9:5: method[1].factor must be a number at least 0, got 'heavy'",
        "recipe.yaml:12:7: method[1].base_method.bta: no option 'bta'; did you mean 'beta'? It takes "
        + ", ".join(method_info("dkd").options),
        "--set teacher.2.model=d: teacher is a list with the members teacher.0 to teacher.1",
        "--set teacher.model=d: teacher is a list with the members teacher.0 to teacher.1",
        "--set method.0.temperature=-1: method[0].temperature must be above 0, got -1",
    ]


# methods


def test_a_list_of_methods_is_short_for_combined() -> None:
    both = [{"name": "kd", "temperature": 4.0}, {"name": "crd", "factor": 0.8}]
    recipe = load({**SMALL, "method": both})

    assert recipe.method == {"name": "combined", "methods": both}
    assert load(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe


def test_set_reaches_into_a_list_of_methods() -> None:
    source = {**SMALL, "method": [{"name": "kd"}, {"name": "crd", "factor": 0.8}]}

    assert load(source, "method.1.factor=0.5", "method.0.temperature=3").method["methods"] == [
        {"name": "kd", "temperature": 3},
        {"name": "crd", "factor": 0.5},
    ]
    # The list as a whole has an option of its own, and another method in its place.
    assert load(source, "method.ce_weight=0.5").method == {**load(source).method, "ce_weight": 0.5}
    assert load(source, "method.name=dkd", "method.beta=2").method == {"name": "dkd", "beta": 2}


def test_a_preset_by_set_overrules_the_file_but_not_another_set() -> None:
    source = {**SMALL, "method": {"name": "dkd", "alpha": 1.0, "beta": 0.5}}
    preset = "method.preset=cifar100/resnet32x4-resnet8x4"

    assert load(source, preset).method == {
        "name": "dkd",
        "preset": "cifar100/resnet32x4-resnet8x4",
        **{key: value for key, value in source["method"].items() if key not in PRESET | {"name": ""}},
    }
    assert load(source, preset, "method.beta=3").method["beta"] == 3


# networks


def test_one_teacher_several_or_none() -> None:
    two = load({**SMALL, "teacher": [{"model": "a", "size": 64}, {"model": "b", "training": {"lr": 0.5}}]})
    none = load({"student": {"model": "c"}, "method": {"name": "tfkd_reg"}})

    assert [teacher.model for teacher in load(SMALL).teacher_list] == ["cifar/vgg8"]
    assert [(teacher.model, teacher.size) for teacher in two.teacher_list] == [("a", 64), ("b", None)]
    assert (two.network("teacher-2").model, two.stage_training("teacher-2").lr) == ("b", 0.5)
    assert none.teacher_list == ()


def test_assistants_and_generations_have_settings_of_their_own() -> None:
    assistants = [{"model": "big"}, {"model": "small", "training": {"epochs": 3}}]
    recipe = load({**SMALL, "assistants": assistants, "born_again_generations": 3})

    assert recipe.stage_training("assistant-2").epochs == 3
    assert [recipe.network(name).model for name in ("assistant-1", "assistant-2", "generation-2", "distilled")] == [
        "big",
        "small",
        "cifar/resnet8",
        "cifar/resnet8",
    ]


def test_several_teachers_by_flag_keep_what_the_recipe_says_of_each() -> None:
    source = {**SMALL, "teacher": {"model": "a", "training": {"epochs": 3}}}
    recipe = load(source, flags={"--teacher": ["b", "c@pretrained"]})
    back = load(recipe.model_dump(mode="json"), flags={"--teacher": ["d"]})

    assert [(t.model, t.weights, t.training) for t in recipe.teacher_list] == [
        ("b", None, {"epochs": 3}),
        ("c", "pretrained", {"epochs": 3}),
    ]
    assert [(t.model, t.weights) for t in back.teacher_list] == [("d", None)]
    assert problems(source, flags={"--teacher": ["b", "gone.pth"]}) == [
        "--teacher gone.pth: teacher[1].weights: no such file or folder: gone.pth"
    ]


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
    import torch

    (tmp_path / "w.pth").write_bytes(b"x")
    assert load(SMALL, flags={"--teacher": "vgg16@w.pth"}).teacher.weights == "w.pth"
    torch.save({"a.weight": torch.zeros(2, 3)}, tmp_path / "w.pth")
    assert problems(SMALL, flags={"--teacher": "w.pth"}) == [
        "--teacher w.pth: teacher.weights: w.pth contains weights only; give their architecture as ARCHITECTURE@w.pth",
        "It has 1 tensors of 6 values in all: a.weight (2, 3)",
    ]
    assert problems(SMALL, flags={"--teacher": "gone.pth"}) == [
        "--teacher gone.pth: teacher.weights: no such file or folder: gone.pth"
    ]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("cifar10", "cifar10"),
        ("names.txt", ["red", "blue"]),
        ('["red", "blue"]', ["red", "blue"]),
        ("{a: [red, 3], b: blue}", {"a": ["red", 3], "b": ["blue"]}),
    ],
)
def test_classes_are_a_list_a_file_a_known_list_or_a_mapping(written, tmp_path: Path, given, kept) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "names.txt").write_text("red\nblue\n")
    (tmp_path / "w.pth").write_bytes(b"x")
    recipe = load(SMALL, f"teacher.classes={given}", flags={"--teacher": "vgg16@w.pth"})
    assert recipe.network("teacher").classes == kept
    assert load(dict(recipe.model_dump(mode="json"))).network("teacher").classes == kept


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[red]", "teacher.classes must be"),
        ("{a: [red]}", "teacher.classes must be"),
        ("{a: [], b: [1]}", "teacher.classes.a must be"),
        ("5", "teacher.classes must be"),
        ("cifar11", "teacher.classes: cifar11 cannot be read as class names, one per line: No such file or directory"),
    ],
)
def test_classes_that_are_none_of_these(written, tmp_path: Path, given, message) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "w.pth").write_bytes(b"x")
    found = problems(SMALL, f"teacher.classes={given}", flags={"--teacher": "vgg16@w.pth"})
    assert message in found[0]
    assert len(found) <= 2


def test_a_model_file_that_names_code_needs_permission(written, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write_checksummed_json(tmp_path / "model.json", {"architecture": "/there/mine.py:Net"})
    assert "--allow-code" in "".join(problems(SMALL, flags={"--teacher": str(tmp_path)}))
    allowed = load(SMALL, flags={"--teacher": str(tmp_path), "--allow-code": True})
    assert allowed.network("teacher").model == "/there/mine.py:Net"


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


def test_the_recipe_of_a_run_is_read_though_its_teacher_was_moved(written) -> None:  # type: ignore[no-untyped-def]
    recipe = written(
        "data: {source: digits}\nteacher: {model: vgg16, weights: moved.pth}\nstudent: {model: resnet18}\n"
    )

    assert load_recipe(recipe, recorded=True).teacher_list[0].weights == "moved.pth"
    with pytest.raises(UsageError, match=r"teacher\.weights: no such file or folder: moved\.pth"):
        load_recipe(recipe)


def test_training_settings_of_the_caller_reach_the_student(tmp_path: Path) -> None:
    """The recipe of a run has the student's epochs of that run, which would override ``--epochs``."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "data: {source: digits}\n"
        "teacher: {model: cifar/vgg8, training: {epochs: 2, lr: 0.5}}\n"
        "student: {model: cifar/resnet8, training: {epochs: 7, lr: 0.4}}\n"
        "training: {epochs: 3}\n"
    )

    def epochs(*sets: str, **flags: int) -> tuple[int, int]:
        recipe = load_recipe(path, sets, flags={f"--{key}": value for key, value in flags.items()})
        return recipe.stage_training("student").epochs, recipe.stage_training("teacher").epochs

    assert epochs() == (7, 2)
    assert epochs("training.epochs=30") == epochs(epochs=30) == epochs("training={epochs: 30}") == (30, 2)
    assert epochs("student.training.epochs=5", epochs=30) == (5, 2)
    assert load_recipe(path, ["training.epochs=30"]).stage_training("student").lr == 0.4


def test_training_settings_of_the_caller_reach_a_student_without_weights() -> None:
    recipe = load_recipe("photos", ["training.lr=0.007", "data.source=digits"])
    assert "lr" not in recipe.student.fallback[0].training
    assert recipe.student.fallback[0].training["min_steps"] == 2000
    sets = ["teacher.size=64", "teacher.training.min_steps=10", "student.training={lr: 0.01}", "student.head=finetune"]
    recipe = load_recipe("photos", [*sets, "data.source=digits"])
    assert {each.size for each in recipe.teacher.fallback} == {64}
    assert {each.training["min_steps"] for each in recipe.teacher.fallback} == {10}
    scratch = recipe.student.fallback[0]
    assert (scratch.head, scratch.training) == (None, {"lr": 0.01})


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("data.range=[5,5]", "data.range must be auto or two numbers, the lower one first, e.g. [0, 4095], got [5, 5]"),
        ("data.workers=100000", "data.workers must be 0 to 1,024 or 'auto', got 100000"),
        ("training.threads=9999999", "threads must be 1 to 1,024 or 'auto', got 9999999"),
        ("method.name=KD", "did you mean 'kd'?"),
    ],
)
def test_values_that_are_refused(setting: str, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        load_recipe("quickstart", [setting])
    assert says in str(raised.value)
    assert "value error" not in str(raised.value).lower()
