"""Every setting that docs, help and messages name exists: `--set key=...`, and dotted keys in text."""

import ast
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from potstill.config.recipe import Recipe
from potstill.data.builtin.cifar100 import CifarOptions
from potstill.data.builtin.fashion_mnist import FashionOptions
from potstill.data.builtin.solar import SolarOptions
from potstill.data.file_datasets import ShardOptions
from potstill.methods import METHOD_SETTINGS, list_own_methods, method_info
from potstill.training.settings import TrainingSettings

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PLACEHOLDERS = {"key", "KEY"}
TENSORS = {"student.maps", "teacher.maps"}  # of Python code in a page on methods

METHOD_OPTIONS = {"name", "factor", "methods", *METHOD_SETTINGS} | {
    option for name in list_own_methods() for option in method_info(name).options
}
DATA_OPTIONS = {
    option
    for model in (CifarOptions, FashionOptions, SolarOptions, ShardOptions)
    for option in getattr(model, "model_fields", None) or getattr(model, "__annotations__", {})
}
SECTIONS = "data|training|teacher|teachers|student|assistants|teacher_cache|store|domain|curriculum|method|tracker"
SET = re.compile(r"--set[ =]['\"]?([A-Za-z_][\w.]*)=")
# Not after a dot or a slash (a module, a file), not before one (a file), a bracket (a call) or a letter.
DOTTED = re.compile(rf"(?<![\w./])((?:{SECTIONS})(?:\.[a-z0-9_]+)+)(?![\w/(*]|\.[a-z])")


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """Settings classes within a type."""
    found = [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
    return found + [model for part in get_args(annotation) for model in models_of(part)]


def exists(key: str) -> bool:
    """Whether a recipe may have this key."""
    first, *rest = [part for part in key.split(".") if not part.isdecimal()]
    if first not in Recipe.model_fields:
        return False
    return _within(first, rest, Recipe)


def _within(name: str, rest: list[str], model: type[BaseModel]) -> bool:
    if not rest:
        return True
    if name == "method":
        return rest[0] in METHOD_OPTIONS
    if name in ("options", "target_options"):
        return rest[0] in DATA_OPTIONS
    if name.endswith("_options"):
        return True  # of a class outside
    models = [TrainingSettings] if name == "training" else models_of(model.model_fields[name].annotation)
    return any(rest[0] in inner.model_fields and _within(rest[0], rest[1:], inner) for inner in models)


def messages(path: Path) -> str:
    """All texts of a module but the docstrings, which are for who reads the code."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    left_out = {id(node.body[0].value) for node in nodes if isinstance(node, documented) and ast.get_docstring(node)}  # type: ignore[attr-defined]
    texts = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join(node.value for node in texts if id(node) not in left_out)


def unknown(text: str, *patterns: re.Pattern[str]) -> list[str]:
    named = {key for pattern in patterns for key in pattern.findall(text)}
    return sorted(key for key in named - PLACEHOLDERS - TENSORS if not exists(key.rstrip(".")))


def test_keys_that_exist_and_keys_that_do_not() -> None:
    for key in (
        "seed", "training.epochs", "teacher.training.lr", "teacher.0.size", "data.augment.hflip", "method.1.factor",
        "data.options.limit", "teacher_cache.views", "method.name", "student.training.schedule", "domain.confidence",
    ):  # fmt: skip
        assert exists(key), key
    for key in ("training.seed", "data.view_seed", "epochs", "store.view", "teacher.epochs", "method.temperatur"):
        assert not exists(key), key
    assert unknown("try --set training.seed=1 or `data.view_seed`", SET, DOTTED) == ["data.view_seed", "training.seed"]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_docs_name_settings_that_exist(path: Path) -> None:
    check_settings_of(path.read_text(encoding="utf-8"))


def test_generated_pages_name_settings_that_exist(generated_docs: Path) -> None:
    for path in sorted((generated_docs / "docs" / "methods").iterdir()):
        check_settings_of(path.read_text(encoding="utf-8"))


def check_settings_of(text: str) -> None:
    code = re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL)
    assert unknown("\n".join(code), SET) == []
    inline = [each for each in code if not each.startswith("```")]
    assert unknown("\n".join(inline), DOTTED) == []


def test_messages_and_help_name_settings_that_exist() -> None:
    found = {str(path.relative_to(ROOT)): unknown(messages(path), SET, DOTTED) for path in SOURCES}
    assert {path: keys for path, keys in found.items() if keys} == {}
