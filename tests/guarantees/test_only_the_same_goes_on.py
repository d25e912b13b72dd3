"""G7: a run goes on with the same recipe and the same images only; what changed is named, with its old and new value.

Every setting of the recipe's schema is tried, found by walking it, not from a list.
"""

import shutil
import types
import typing
from functools import cache

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel

from potstill.cli import main
from potstill.config.recipe import Recipe, dump_recipe, load_recipe
from potstill.config.yaml import parse_yaml
from potstill.errors import PotstillError, UsageError
from potstill.experiment import pipeline, resume
from potstill.experiment.resume import check_same_recipe
from potstill.experiment.run_folder import RunFolder
from potstill.training.callbacks import SilentObserver
from potstill.training.settings import TrainingSettings

FREE = {  # docs/guarantees.md and docs/recipes.md say so
    "name", "description", "teacher_below_baseline", "data.workers", "data.cache_fraction", "teacher_cache.folder",
    "training.checkpoint_seconds",
    "teacher.training.checkpoint_seconds", "student.training.checkpoint_seconds", "tracker",
    "training.keep_checkpoint", "teacher.training.keep_checkpoint", "student.training.keep_checkpoint",
}  # fmt: skip
ONLY_WITH_ANOTHER = {  # valid only together with another change, or with a file that is there
    "data.unlabeled", "data.classes", "data.labeled", "data.labeled_test", "teacher.fallback", "student.fallback",
    "data.fold", "data.keep_splits", "data.class_folder",
    "teacher.prompts", "student.prompts", "teacher.weights", "student.weights", "teachers.weights",
    "training.milestones", "training.nesterov", "teacher.training.nesterov", "student.training.nesterov",
    "student.training.milestones",
    "teacher.training.milestones", "training.ema_decay",
    "domain.confidence", "domain.class_balance", "domain.adapt_batch_norm", "data.target_labels", "data.target_options",
    "teacher.classes", "student.classes", "student.head", "training.freeze", "training.layer_decay",
    "student.training.layer_decay", "training.layer_decay_no_opt_scale", "teacher.training.layer_decay_no_opt_scale",
    "student.training.layer_decay_no_opt_scale",
}  # fmt: skip


def words_of(kind):
    """All that a Literal within a type allows."""
    if typing.get_origin(kind) is typing.Literal:
        return list(typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType, typing.Annotated):
        return [word for part in typing.get_args(kind) for word in words_of(part)]
    return []


def leaves(model, prefix=""):
    """(key, type) of every setting below a model."""
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if name == "training" and model is not Recipe:
            yield from ((f"{prefix}training.{key}", kind) for key, kind in leaves(TrainingSettings))
        elif inner is not None and name not in ("assistants", "previous", "tracker", "fallback"):
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.annotation


LEAVES = dict(leaves(Recipe)) | {"method.temperature": float, "method.alpha": float}
KEYS = sorted(LEAVES.keys() - {"method", "data.options", "assistants", "previous", "teacher"})
OTHERS = [
    True, False, 0, 1, 2, 3, 5, 24, 0.05, 0.3, 0.6, 0.97, 7.5, "cifar/resnet14", "cifar/resnet20", "stretch", "else",
    "cpu", "sgd", "fashion-mnist", "tensorboard", [0.4, 0.9],
    {"hflip": True}, [0.4, 0.5, 0.6], [["stage1", "stage1"]],
]  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run that has begun, whose recipe is parsed once and not for each setting."""
    folder = RunFolder(tmp_path_factory.mktemp("begun") / "quickstart")
    folder.path.mkdir()
    folder.write_recipe(dump_recipe(load_recipe("quickstart")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "parse_yaml", cache(resume.parse_yaml))
        yield folder


@cache
def before():
    """The recipe that nothing was changed of; as it is written into a run."""
    return parse_yaml(dump_recipe(load_recipe("quickstart")), "recipe.yaml").value


def value_at(recipe, key):
    value = recipe
    for part in key.split("."):
        value = (value or {}).get(part)
    return value


def beside(key):
    """Settings without which another value of this one has no effect, and is refused for that."""
    stage, _, name = key.rpartition(".")
    needed = {
        "momentum": ["optimizer=sgd"],
        "dot_delta": ["optimizer=dot"],
        "gamma": ["schedule=step", "milestones=[2]"],
    }
    return [f"{stage}.{each}" for each in needed.get(name, ())]


def changed(key, other):
    """The recipe with another value of a setting; None where that is not allowed, or none."""
    text = yaml.safe_dump(other, default_flow_style=True).replace("\n...", "").strip()
    try:
        after = load_recipe("quickstart", [f"{key}={text}", *beside(key)])
    except PotstillError:
        return None
    return None if value_at(before(), key) == value_at(after.model_dump(mode="json"), key) else after


def candidates(key):
    return [*words_of(LEAVES[key]), *OTHERS]


@pytest.mark.parametrize("key", sorted(set(KEYS) - ONLY_WITH_ANOTHER))
def test_every_setting_is_refused_by_name(key, begun):
    recipe = next((found for other in candidates(key) if (found := changed(key, other)) is not None), None)
    assert recipe is not None, f"no other value of {key} is known to this test"
    if key in FREE or key == "seeds":  # more of them only add stages
        check_same_recipe(begun, recipe)
        return
    with pytest.raises(UsageError) as raised:
        check_same_recipe(begun, recipe)
    text, new = str(raised.value), value_at(recipe.model_dump(mode="json"), key)
    if key.startswith("data.augment."):  # from null to all of its settings: the first eight are named
        assert "  data.augment." in text
        assert "more" in text
        return
    assert f"  {key}" in text
    if not isinstance(new, (dict, list)) and value_at(before(), key) is not None:
        assert f"  {key}: was {value_at(before(), key)!r}, now {new!r}" in text


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_settings_together(data, begun):
    """Refused if and only if one of them is not free; all that are not, up to eight, are named."""
    may_grow = {"seeds", "training.epochs", "teacher.training.epochs", "student.training.epochs"}
    keys = data.draw(
        st.lists(st.sampled_from(sorted(set(KEYS) - ONLY_WITH_ANOTHER - may_grow)), max_size=4, unique=True)
    )
    sets = []
    for key in keys:
        other = data.draw(st.sampled_from(candidates(key)))
        if changed(key, other) is not None:
            sets.append((key, yaml.safe_dump(other, default_flow_style=True).replace("\n...", "").strip()))
    try:
        recipe = load_recipe("quickstart", [f"{key}={text}" for key, text in sets])
    except PotstillError:
        return  # each alone would do
    bound = [key for key, _ in sets if key not in FREE]
    if not bound:
        check_same_recipe(begun, recipe)
        return
    with pytest.raises(UsageError) as raised:
        check_same_recipe(begun, recipe)
    text = str(raised.value)
    named = [line.partition(":")[0].strip() for line in text.splitlines() if ": was " in line]
    assert len(named) <= 8
    for key in bound:  # in alphabetical order; of more than eight, the first ones
        assert f"  {key}" in text or (len(named) == 8 and " more" in text and key > named[-1])


def test_settings_are_named_as_the_recipe_has_them(begun):
    """``off`` is text in YAML 1.2, by which recipes are read, and false in YAML 1.1."""
    with pytest.raises(UsageError, match=r"teacher_cache\.mode: was 'auto', now 'off'"):
        check_same_recipe(begun, load_recipe("quickstart", ["teacher_cache.mode=off"]))


def test_epochs_may_grow_while_no_stage_is_in_the_midst_of_them(begun, tmp_path):
    longer = load_recipe("quickstart", ["training.epochs=24"])  # 12 before
    check_same_recipe(begun, longer)
    check_same_recipe(begun, load_recipe("quickstart", ["teacher.training.epochs=16"]))  # 15
    with pytest.raises(UsageError, match=r"training\.lr: was") as raised:
        check_same_recipe(begun, load_recipe("quickstart", ["training.epochs=24", "training.lr=0.5"]))
    assert "epochs" not in str(raised.value)
    with pytest.raises(UsageError, match=r"teacher\.training\.epochs: was 15, now 4"):
        check_same_recipe(begun, load_recipe("quickstart", ["training.epochs=24", "teacher.training.epochs=4"]))
    under_way = RunFolder(tmp_path)
    under_way.write_recipe(begun.read_recipe())
    checkpoint = tmp_path / "baseline" / "checkpoints" / "last.checkpoint"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    with pytest.raises(UsageError, match=r"training\.epochs: was 12, now 24"):
        check_same_recipe(under_way, longer)


@pytest.mark.parametrize(
    "change",
    [
        "domain.confidence=0.5",
        "domain.class_balance=false",
        "domain.adapt_batch_norm=true",
        "data.target_labels=0.2",
        "data.target=digits",
        "data.target_options={classes: 4}",
    ],
)
def test_settings_of_a_second_domain_too(change, tmp_path):
    pair = ["data.source=solar", "data.target=solar", "data.options={cells: mono}", "data.target_options={cells: poly}"]
    folder = RunFolder(tmp_path / "domain")
    folder.path.mkdir()
    folder.write_recipe(dump_recipe(load_recipe("domain", pair, data_needed=False)))
    check_same_recipe(folder, load_recipe("domain", pair, data_needed=False))
    with pytest.raises(UsageError, match=f"  {change.partition('=')[0].replace('.', chr(92) + '.')}"):
        check_same_recipe(folder, load_recipe("domain", [*pair, change], data_needed=False))


# images


RECIPE = """
name: tiny
data: {{source: "{source}", size: 16, workers: 0}}
teacher: null
student: {{model: cifar/resnet8}}
method: {{name: supervised}}
training: {{epochs: 2, batch_size: 8, lr: 0.003, precision: float32, checkpoint_seconds: 0, threads: 1}}
teacher_cache: off
"""


class Killed(Exception):
    pass


class Killer(SilentObserver):
    def epoch_start(self, epoch, *_):
        if epoch == 2:
            raise Killed


class Case:
    """A run of which one epoch of two is done, and its images, anew for each edit."""

    def __init__(self, folder):
        self.folder, self.images, random = folder, folder / "images", np.random.default_rng(0)
        for split, count in (("train", 8), ("val", 4), ("test", 4)):
            for name in ("blue", "red"):
                (self.images / split / name).mkdir(parents=True)
                for i in range(count):
                    pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(self.images / split / name / f"{i}.png")
        (folder / "tiny.yaml").write_text(RECIPE.format(source=self.images))
        shutil.copytree(self.images, folder / "images before")
        self.model = folder / "runs" / "one" / "baseline" / "model.safetensors"

    def train(self, *flags):
        root = ["--output-dir", str(self.folder / "runs"), "--name", "one"]
        return main(["train", str(self.folder / "tiny.yaml"), "--stage", "baseline", *root, *flags])

    def again(self):
        """Images and run as they were after the first epoch."""
        shutil.rmtree(self.images)
        shutil.copytree(self.folder / "images before", self.images)
        shutil.rmtree(self.folder / "runs", ignore_errors=True)
        shutil.copytree(self.folder / "runs before", self.folder / "runs")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    made = Case(tmp_path_factory.mktemp("edits"))
    assert made.train() == 0
    made.weights = made.model.read_bytes()
    shutil.rmtree(made.folder / "runs")
    recipe = load_recipe(made.folder / "tiny.yaml")
    with pytest.raises(Killed):
        pipeline.run(recipe, output_dir=made.folder / "runs", name="one", stages=("baseline",), observer=Killer())
    shutil.copytree(made.folder / "runs", made.folder / "runs before")
    return made


SPLITS = st.sampled_from(["train", "val", "test"])
CLASSES = st.sampled_from(["blue", "red"])
SAID = {  # what the refusal says of each edit; None where the run goes on
    "add": ["new: ", "new.png"], "remove": ["gone: "], "rename": ["gone: ", "new: ", "renamed.png"],
    "repaint": ["of other content: "], "other class": ["gone: ", "moved.png"],
    "other split": ["gone: ", "moved.png"], "rename class": ["gone: ", "new: ", "/green/"],
    "add class": ["new: ", "/green/"], "touch": None, "copy": None,
}  # fmt: skip


def edit(images, kind, split, name, number):
    file = images / split / name / f"{number}.png"
    other = {"blue": "red", "red": "blue"}[name]
    if kind == "add":
        Image.new("RGB", (16, 16), (number, 7, 9)).save(file.with_name("new.png"))
    elif kind == "remove":
        file.unlink()
    elif kind == "rename":
        file.rename(file.with_name("renamed.png"))
    elif kind == "repaint":
        Image.new("RGB", (16, 16), (number, 8, 9)).save(file)
    elif kind == "other class":
        file.rename(images / split / other / "moved.png")
    elif kind == "other split":
        file.rename(images / {"train": "val", "val": "test", "test": "train"}[split] / name / "moved.png")
    elif kind == "rename class":
        for each in images.iterdir():
            (each / name).rename(each / "green")
    elif kind == "add class":
        for each in images.iterdir():
            shutil.copytree(each / name, each / "green")
    elif kind == "touch":
        file.touch()
    else:  # the same bytes in a new file, in another place of the folder's list
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)


@pytest.mark.parametrize("kind", SAID)
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(split=SPLITS, name=CLASSES, number=st.integers(0, 3))
def test_edits_of_images(kind, split, name, number, case, capsys):
    case.again()
    edit(case.images, kind, split, name, number)
    capsys.readouterr()
    code = case.train("--resume")
    error = capsys.readouterr().err
    if SAID[kind] is None:
        assert code == 0, error
        assert case.model.read_bytes() == case.weights
        return
    assert code == 2, error
    assert "needs the same images" in error
    for words in SAID[kind]:
        assert words in error
    assert "Traceback" not in error
    assert not case.model.exists()


def test_without_its_list_of_images(case, capsys):
    """Still refused; only the names are not known."""
    case.again()
    (case.folder / "runs" / "one" / "splits.csv").unlink()
    edit(case.images, "remove", "train", "blue", 0)
    assert case.train("--resume") == 2
    assert "the changed images are unknown" in capsys.readouterr().err


def test_another_model_in_use_is_refused(begun, tmp_path):
    weights = tmp_path / "first.safetensors"
    weights.write_bytes(b"")  # its content is read later
    after = load_recipe("quickstart", [f"previous={{model: cifar/resnet8, weights: {weights}}}"])
    with pytest.raises(UsageError, match=r"previous"):
        check_same_recipe(begun, after)
