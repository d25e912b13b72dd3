"""`potstill recipes --schema`: every shipped recipe is valid by it, and what potstill refuses is not."""

import json
import subprocess
import sys

import pytest

from potstill.cli import main
from potstill.config.recipe import dump_recipe, list_recipes, load_recipe, recipe_schema
from potstill.config.yaml import parse_yaml
from potstill.methods import list_own_methods, method_info

jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="comes with schemathesis, of the dev group")
NETWORKS = {"teacher": {"model": "resnet50"}, "student": {"model": "resnet18"}}


@pytest.fixture(scope="module")
def errors():
    """What an editor says of a recipe's plain values."""
    validator = jsonschema_rs.Draft202012Validator(recipe_schema())
    return lambda value: [error.message for error in validator.iter_errors(value)]


@pytest.mark.parametrize("name", list(list_recipes()))
def test_every_shipped_recipe_is_valid_as_written_and_as_recorded(name, errors):
    assert errors(parse_yaml(list_recipes()[name].read_text("utf-8"), name).value) == []
    assert errors(parse_yaml(dump_recipe(load_recipe(name, data_needed=False)), name).value) == []


@pytest.mark.parametrize("name", list_own_methods())
def test_defaults_and_presets_of_every_method_are_valid_and_an_unknown_option_is_not(name, errors):
    info = method_info(name)
    defaults = {key: each.default for key, each in info.options.items()} | info.examples
    for method in [defaults, *({"preset": preset} for preset in info.presets), *info.presets.values()]:
        assert errors({**NETWORKS, "method": {"name": name, **info.examples, **method}}) == []
    (message,) = errors({**NETWORKS, "method": {"name": name, **info.examples, "no_such_option": 1}})
    assert "no_such_option" in message


@pytest.mark.parametrize(
    "value",
    [
        {"method": [{"name": "kd"}, {"name": "crd", "factor": 0.8}]},
        {"method": {"name": "ls", "base_method": {"name": "dkd", "beta": 2}}},
        {"method": {"name": "kd", "schedule": {"temperature": {"shape": "linear", "start": 4, "end": 1}}}},
        {"method": {"name": "my.methods:Mine", "anything": [1]}},
        {"method": {"name": "auto"}},
        {"teacher_cache": "off", "tracker": "wandb"},
        {"teacher_cache": {"views": 8}, "tracker": ["wandb", {"name": "mlflow", "uri": "http://127.0.0.1:5000"}]},
        {"teacher": [{"model": "resnet50"}, {"weights": "runs/a", "classes": "classes.txt"}]},
        {"student": {"model": "resnet18", "training": {"lr": 0.1}}},
    ],
)
def test_short_forms_are_valid(value, errors):
    assert errors({**NETWORKS, **value}) == []


@pytest.mark.parametrize(
    "value",
    [
        {"method": {"name": "kdd"}},
        {"method": {}},
        {"method": "kd"},
        {"method": {"name": "kd", "temperature": 0}},
        {"method": {"name": "kd", "temperature": "4"}},
        {"method": {"name": "kd", "factor": 2}},
        {"method": {"name": "dist", "form": "papre"}},
        {"method": {"name": "crd", "dim": 1.5}},
        {"method": {"name": "kd", "preset": "cifar10"}},
        {"method": {"name": "kd", "schedule": {"temperature": {"shap": "linear"}}}},
        {"method": {"name": "combined"}},
        {"method": [{"name": "kd"}]},
        {"method": [{"name": "kd"}, {"name": "crd", "factor": -1}]},
        {"method": {"name": "ls", "base_method": {"name": "dkd", "betta": 2}}},
        {"student": {"size": 32}},
        {"student": {"model": "resnet18", "training": {"learning_rate": 0.1}}},
        {"teacher_cache": "on"},
        {"sead": 1},
    ],
)
def test_what_potstill_refuses_is_not_valid(value, errors):
    assert errors({**NETWORKS, **value})


def test_the_command_prints_it_without_torch(capsys):
    assert main(["recipes", "--schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(recipe_schema()))
    kd = printed["$defs"]["method_kd"]["properties"]["temperature"]
    described = "T of the soft targets; the same for teacher and student"
    assert kd == {"type": "number", "exclusiveMinimum": 0, "default": 2.0, "description": described}
    code = "import sys; from potstill.cli import main; main(['recipes', '--schema']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0
    assert main(["recipes", "solar", "--schema"]) == 2
