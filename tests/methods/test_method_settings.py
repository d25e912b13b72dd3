import ast
import inspect

from potstill import methods
from potstill.methods import create_method, describe_method, inner_methods, list_own_methods, method_info, needs_teacher


def test_what_the_catalog_says_of_a_teacher_is_what_the_method_says() -> None:
    for name in list_own_methods():
        examples = method_info(name).examples
        assert needs_teacher({"name": name} | examples) == create_method(name, **examples).needs.teacher, name


def test_a_method_around_another_needs_what_that_one_needs() -> None:
    assert not needs_teacher({"name": "eskd", "base_method": {"name": "tfkd_reg"}})
    assert not needs_teacher([{"name": "tfkd_reg"}, {"name": "supervised"}])
    assert needs_teacher([{"name": "tfkd_reg"}, {"name": "eskd"}])
    assert needs_teacher({"name": "nothing"})  # reported elsewhere


def test_methods_inside_a_method_come_with_their_paths() -> None:
    around = {"name": "ls", "base_method": {"name": "dkd"}}
    assert inner_methods(around) == [(("base_method",), {"name": "dkd"})]
    assert inner_methods({"name": "combined", "methods": [around, "kd"]}) == [
        (("methods", 0), around),
        (("methods", 1), "kd"),
    ]
    assert inner_methods({"name": "kd"}) == []


def test_whatever_a_method_is_it_can_be_described() -> None:
    assert describe_method({"name": "ls", "base_method": {"name": "kd"}, "weight": 2}) == "ls around kd"
    assert describe_method({"temperature": 2}) == describe_method("kd") == describe_method(None) == ""


def test_nothing_here_imports_torch() -> None:
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(inspect.getsource(methods)))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert not any(str(name).startswith("torch") for name in imported)
