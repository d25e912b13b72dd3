import pytest

from potstill.code_references import find_code, refuse_code_in_recipe, resolve_code_paths
from potstill.config.yaml import parse_yaml
from potstill.errors import UsageError

RECIPE = """\
name: a:b
method: {name: ls, base_method: {name: mine.py:Mine}}
teacher: [{model: resnet18}, {model: nets.py:net, weights: a:b}]
student: {model: my.nets:net}
"""


def test_code_is_found_where_it_would_be_loaded():
    assert dict(find_code(parse_yaml(RECIPE, "r.yaml").value)) == {
        ("method", "base_method", "name"): "mine.py:Mine",
        ("teacher", 1, "model"): "nets.py:net",
        ("student", "model"): "my.nets:net",
    }
    assert not list(find_code(None)) + list(find_code([{"method": {"name": "a:B"}}]))


def test_a_file_that_names_code_is_refused_with_each_place():
    document = parse_yaml(RECIPE, "r.yaml")
    with pytest.raises(UsageError, match="--allow-code") as caught:
        refuse_code_in_recipe(document.value, document.locations)
    for line in ("r.yaml:2:34: mine.py:Mine", "r.yaml:3:31: nets.py:net", "r.yaml:4:11: my.nets:net"):
        assert line in str(caught.value)


def test_what_the_command_line_names_is_not_refused():
    document = parse_yaml("method: {name: mine.py:Mine}", "r.yaml")
    document.locations.replace(("method", "name"), "--method mine.py:Mine")
    refuse_code_in_recipe(document.value, document.locations)
    with pytest.raises(UsageError, match=r"mine\.py:Mine"):
        refuse_code_in_recipe(document.value)  # from nobody known


def test_paths_start_from_the_recipe_or_from_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = parse_yaml(RECIPE, "r.yaml")
    document.locations.replace(("teacher",), "--teacher nets.py:net")
    resolve_code_paths(document.value, document.locations, tmp_path / "recipes")
    assert document.value["method"]["base_method"]["name"] == f"{tmp_path}/recipes/mine.py:Mine"
    assert document.value["teacher"][1]["model"] == f"{tmp_path}/nets.py:net"
    assert document.value["student"]["model"] == "my.nets:net"
