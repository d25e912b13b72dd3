"""What CONTRIBUTING.md and docs/adding-things.md say, done word for word in a copy of the source."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FILE = re.compile(r'```python title="([^"]+)"\n(.*?)```', re.DOTALL)
LINE = re.compile(r"(?:In `(?P<name>\w+)` of|At the top of) `(?P<path>[^`]+)`: `(?P<line>[^`]+)`")

CHECKS = """
import torch

import potstill
from potstill import Distiller, create_model
from potstill.data.datasets import load_data
from potstill.data import DataSettings
from potstill.config.recipe import load_recipe
from potstill.config.recipe import recipe_schema
from potstill.functional import hard_label_loss
from potstill.methods import create_method, list_methods
from potstill.models.registry import list_models


def test_methods_are_known():
    assert {"probability_mse", "hard_label"} <= set(list_methods())
    recipe = load_recipe("quickstart", ["method.name=hard_label", "method.alpha=0.3"])
    assert recipe.method == {"name": "hard_label", "alpha": 0.3}
    assert "method_hard_label" in recipe_schema()["$defs"]
    assert potstill.HardLabel.__name__ == "HardLabel"


def test_methods_outside_the_package_are_known():
    recipe = load_recipe("quickstart", ["method.gamma=1"], flags={"--method": "focal.py:Focal"})
    assert recipe.method["name"].endswith("/focal.py:Focal")
    teacher, student = create_model("cifar/resnet14", 5, size=32), create_model("cifar/resnet8", 5, size=32)
    labels = torch.arange(4)
    terms = {}
    for gamma in (0.0, 2.0):
        distiller = Distiller(student, teacher, create_method("focal.py:Focal", gamma=gamma)).eval()
        terms[gamma] = distiller(torch.zeros(4, 3, 32, 32), labels).terms["focal"].item()
    soft = Distiller(student, teacher, create_method("kd", temperature=4.0, alpha=0.0)).eval()
    assert abs(terms[0.0] - soft(torch.zeros(4, 3, 32, 32), labels).terms["kd"].item()) < 1e-5
    assert 0 < terms[2.0] < terms[0.0]


def test_models_are_known():
    assert {"cifar/resnet26", "cifar/tiny"} <= set(list_models("cifar/"))
    for name in ("cifar/resnet26", "cifar/tiny"):
        assert create_model(name, 7, size=32)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    convolutions = [m for m in create_model("cifar/resnet26", 7, size=32).modules() if isinstance(m, torch.nn.Conv2d)]
    assert sum(m.kernel_size == (3, 3) for m in convolutions) == 25  # and the linear layer


def test_data_sets_are_known():
    pets = load_data(DataSettings(source="pets", size=8))
    assert pets.class_names == ("cat", "dog")
    assert sum(len(pets.split(split)) for split in ("train", "val", "test")) == 20
    stripes = load_data(DataSettings(source="stripes", size=8))
    assert stripes.class_names == ("horizontal", "vertical")
    assert [len(stripes.split(split)) for split in ("train", "val", "test")] == [40, 10, 10]
    assert (stripes.train.pixels(0) == stripes.train.pixels(0)[:, :1]).all()


def test_data_sets_are_found_by_recipes():
    assert load_recipe("quickstart", flags={"--data": "stripes"}).data.source == "stripes"
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The source, with everything added that the two pages show."""
    tree = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copytree(ROOT / "tests" / "methods", tree / "tests" / "methods")
    shutil.copy(ROOT / "pyproject.toml", tree)
    for page in (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "adding-things.md"):
        follow(page.read_text(encoding="utf-8"), tree)
    (tree / "tests" / "test_added.py").write_text(CHECKS)
    for name in ("cat", "dog"):
        (tree / "pets" / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(np.full((9, 8, 3), 20 * i, np.uint8)).save(tree / "pets" / name / f"{i}.png")
    return tree


def follow(text: str, tree: Path) -> None:
    """Write the page's files and insert its lines."""
    for path, content in FILE.findall(text):
        assert not (tree / path).exists()
        (tree / path).write_text(content)
    for name, path, line in LINE.findall(text):
        source = (tree / path).read_text()
        # A line of a dict or list goes first into it; an import goes before the first import of potstill.
        place = rf"^{name}\b[^=\n]*= [{{\[]" if name else r"^(?=from potstill)"
        changed, count = re.subn(place, lambda found, line=line: f"{found[0]}{line}\n", source, count=1, flags=re.M)
        assert count == 1, f"{path} has no {name or 'imports'}"
        (tree / path).write_text(changed)


def in_copy(tree: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=tree, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_pages_show_what_they_announce(copy):
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(FILE.findall(contributing)) == 2
    assert len(LINE.findall(contributing)) == 1
    assert len(contributing.splitlines()) <= 110  # a third of them is the map of the source
    longer = (ROOT / "docs" / "adding-things.md").read_text(encoding="utf-8")
    assert len(FILE.findall(longer)) == 5
    assert len(LINE.findall(longer)) == 2


def test_what_was_added_works_and_keeps_the_contract(copy):
    tests = ["tests/methods/test_contract.py", "tests/methods/test_hard_label.py", "tests/test_added.py"]
    doctests = ["src/potstill/methods/hard_label.py"]
    chosen = ["-k", "hard_label or probability_mse or known or found"]
    said = in_copy(copy, "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests, *doctests, *chosen)
    assert int(re.search(r"(\d+) passed", said)[1]) > 40
    assert "failed" not in said


def test_what_was_added_is_well_formed(copy):
    added = [str(copy / path) for page in ("CONTRIBUTING.md", "docs/adding-things.md") for path, _ in
             FILE.findall((ROOT / page).read_text(encoding="utf-8"))]  # fmt: skip
    in_copy(copy, "ruff", "check", "--no-cache", *added)
    in_copy(copy, "ruff", "format", "--no-cache", "--check", *added)
