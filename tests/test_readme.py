"""What README, AGENTS and docs tell people to type: Python runs, commands parse, recipes load, links lead somewhere."""

import ast
import importlib
import os
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from potstill.cli import app
from potstill.config.recipe import load_recipe
from potstill.errors import DataError, UsageError

from .conftest import few_digits, short_runs

ROOT = Path(__file__).resolve().parent.parent
# Pages as people write them; those that are generated from the source come by their folder.
NAMES = [
    "README.md", "AGENTS.md", "CONTRIBUTING.md", "CHANGELOG.md",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")), "docs/methods/*.md", "docs/api/*.md",
]  # fmt: skip
OF_THE_READER = re.compile(
    r"^runs/|^hf-hub:|\.(pth?|th|pt2|onnx|csv)$|\.py:"
)  # what only the reader has: runs, weights, code
each_page = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def pages(name: str, generated_docs: Path) -> list[Path]:
    """The files of a name of NAMES: those of docs/ as generated, with their tables."""
    found = sorted((generated_docs if name.startswith("docs/") else ROOT).glob(name))
    assert found
    return found


@pytest.fixture
def reader(pages, tmp_path, monkeypatch):
    """A working folder with the files outside of the source that the pages show, such as mine.py."""
    for page in pages:
        for name, text in re.findall(
            r'^```python title="([^"/]+)"\n(.*?)^```', page.read_text("utf-8"), re.DOTALL | re.M
        ):
            (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `potstill ...` in shell blocks, and of those in running text."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`(potstill [a-z][^`]*)`", page.read_text(encoding="utf-8"))
    found = [shlex.split(line.partition(" > ")[0], comments=True) for line in [*lines, *inline]]
    return [words[1:] for words in found if words[:1] == ["potstill"]]


def parse(words: list[str]) -> dict:
    """A command's parameters, as the verb would get them; nothing is carried out."""
    group = typer.main.get_command(app)
    verb = group.commands[words[0]]
    return verb.make_context(words[0], words[1:]).params


def carry_out(page: Path, folder: Path, **given) -> None:
    """Run a page's Python blocks one after the other, as a reader would; ``given``: names that the reader brings."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        names = dict(given)
        with short_runs(), few_digits():
            for block in blocks(page, "python"):
                exec(compile(block, str(page), "exec"), names)
    finally:
        os.chdir(before)


def test_the_python_of_the_readme_trains_the_student(tmp_path):
    torch = importlib.import_module("torch")
    teacher, student = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)) for _ in range(2))
    before = {key: [each.clone() for each in net.parameters()] for key, net in (("t", teacher), ("s", student))}
    loader = [(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])) for _ in range(3)]
    carry_out(ROOT / "README.md", tmp_path, teacher=teacher, student=student, loader=loader)
    assert all(torch.equal(a, b) for a, b in zip(before["t"], teacher.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before["s"], student.parameters(), strict=True))


def test_the_loop_of_the_readme_is_eight_lines():
    (loop,) = blocks(ROOT / "README.md", "python")
    assert "Distiller(student, teacher, KD(temperature=2.0, alpha=0.5))" in loop
    assert len([line for line in loop.splitlines() if line.strip()]) == 8


@each_page
def test_every_python_sample_compiles_and_imports_names_that_exist(pages):
    for page in pages:
        for block in blocks(page, "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Import):
                    for alias in node.names:
                        importlib.import_module(alias.name)
                elif isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                    assert missing == [], f"{page.name}: {node.module} has no {missing}"


@each_page
def test_every_file_of_the_source_that_is_named_exists(pages, name):
    if name == "CHANGELOG.md":
        pytest.skip("names files as they were called then")
    for page in pages:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for path in re.findall(r"`((?:src|tests|scripts|benchmarks|docs)/[\w./-]+)[`: ]", text):
            assert "NAME" in path or (ROOT / path).exists(), f"{page.name} names {path}"
        for path in re.findall(r"(?<![\w/])tests/[\w/]+\.py", page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists() or "NAME" in path or path.endswith("test_hard_label.py"), (
                f"{page.name}: {path}"
            )


@each_page
def test_every_command_parses(pages):
    for words in [words for page in pages for words in commands(page)]:
        if len(words) == 1:  # the mere name of a verb in running text
            assert words[0] in typer.main.get_command(app).commands
        else:
            parse(words)


@each_page
def test_every_command_that_trains_names_settings_that_exist(pages, reader):
    for words in [words for page in pages for words in commands(page)]:
        if words[0] not in ("run", "train") or len(words) == 1:
            continue
        given = parse(words)
        if given["recipe"] is None:  # --reproduce
            continue
        recipe = given["recipe"] if not given["recipe"].endswith(".yaml") else "quickstart"
        teachers = [name for name in given["teacher"] or [] if not OF_THE_READER.search(name)]
        flags = {
            "--data": given["data"],
            "--folds": given.get("folds"),
            "--teacher": teachers or None,
            "--method": given["method"],
        }
        settings = given["settings"] or ()
        if given["teacher"] and not teachers:  # without the reader's weights there are no classes to name
            settings = [each for each in settings if not each.startswith("teacher.")]
        load_recipe(recipe, settings, flags=flags, data_needed=False)


def test_commands_are_found_and_wrong_ones_are_noticed(generated_docs):
    found = [words for page in [ROOT / "README.md", *generated_docs.rglob("*.md")] for words in commands(page)]
    assert len(found) > 25
    assert {words[0] for words in found} == set(typer.main.get_command(app).commands)
    with pytest.raises(KeyError):
        parse(["runn", "quickstart"])
    with pytest.raises(Exception, match="No such option"):
        parse(["run", "quickstart", "--dta", "photos"])


@each_page
def test_every_recipe_shown_loads(pages, name, reader):
    for block in [block for page in pages for block in blocks(page, "yaml")]:
        value = yaml.safe_load(block)
        whole = {"teacher": {"model": "vgg16"}, "student": {"model": "resnet18"}} | value
        teachers = whole["teacher"] if isinstance(whole["teacher"], list) else [whole["teacher"]]
        for teacher in teachers:  # runs of the reader's own
            if str(teacher.get("weights")).startswith("runs/"):
                del teacher["weights"]
        try:
            load_recipe(whole, data_needed=False)
        except (UsageError, DataError) as error:
            pytest.fail(f"{name}: {error}\n{block}")


@each_page
def test_every_link_leads_somewhere(pages):
    links = [(page, target) for page in pages for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))]
    for page, target in links:
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_the_map_of_the_source_is_complete():
    tree = next(block for block in blocks(ROOT / "CONTRIBUTING.md", "text") if "src/potstill/" in block)
    below = tree.partition("tests/")[0]
    shown = {word.rstrip("/") for line in below.splitlines()[1:] for word in line.strip().split("  ")[0].split()}
    there = {
        path.name
        for path in (ROOT / "src" / "potstill").iterdir()
        if not path.name.startswith("_") and path.suffix not in (".typed", ".pyi")
    }
    assert shown == there


def test_the_readme_has_its_parts():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert re.search(r"<!-- results -->.*<!-- end of results -->", text, re.DOTALL)
    (picture,) = re.findall(r"!\[[^\]]{20,}\]\(([^)]+)\)", text)  # it says what it shows
    assert (ROOT / picture).stat().st_size <= 200_000


def test_the_results_of_the_readme_stand_in_the_log():
    """No figure that nobody has measured."""
    log = (ROOT / "LOG.md").read_text(encoding="utf-8").replace("−", "-")
    results = re.search(
        r"<!-- results -->.*<!-- end of results -->", (ROOT / "README.md").read_text("utf-8"), re.DOTALL
    )[0]
    number = r"[-+]?\d+\.\d+"
    figures = re.findall(number, results.replace("−", "-"))
    assert len(figures) > 25
    assert set(figures) - set(re.findall(number, log)) == set()
