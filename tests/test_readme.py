"""What README and docs tell people to type: Python runs, commands parse, recipes load, links lead somewhere."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from potstill.cli.entry import app
from potstill.config.recipe import load_recipe
from potstill.errors import DataError, UsageError
from potstill.models.model_file import load_model

from .conftest import few_digits, short_runs

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/**/*.md"))
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


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


def carry_out(page: Path, folder: Path) -> None:
    """Run a page's Python blocks one after the other, as a reader would."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        names: dict = {}
        with short_runs(), few_digits():
            for block in blocks(page, "python"):
                exec(compile(block, str(page), "exec"), names)
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def readme(tmp_path_factory):
    """A folder in which the README's Python has been carried out."""
    folder = tmp_path_factory.mktemp("readme")
    carry_out(ROOT / "README.md", folder)
    return folder


def test_the_python_of_the_readme_runs(readme):
    run = readme / "runs" / "from-python"
    assert (run / "report.html").stat().st_size > 10_000
    assert set(json.loads((run / "results.json").read_text())["stages"]) == {"teacher", "baseline", "distilled"}
    assert load_model(run / "distilled").architecture == "cifar/resnet8"
    assert (readme / "student.pth").stat().st_size > 300_000


def test_the_loop_of_the_readme_is_fifteen_lines():
    loop = next(block for block in blocks(ROOT / "README.md", "python") if "Distiller(" in block)
    assert "Distiller(student, teacher, KD(temperature=2.0, alpha=0.5))" in loop
    assert len([line for line in loop.splitlines() if line.strip()]) <= 16  # one of them keeps the student


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_parses(page):
    for words in commands(page):
        if len(words) == 1:  # the mere name of a verb in running text
            assert words[0] in typer.main.get_command(app).commands
        else:
            parse(words)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_that_trains_names_settings_that_exist(page, tmp_path):
    for words in commands(page):
        if words[0] not in ("run", "train") or len(words) == 1:
            continue
        given = parse(words)
        if given.get("replay") is not None:
            continue
        recipe = given["recipe"] if not given["recipe"].endswith(".yaml") else "quickstart"
        teachers = [name for name in given["teacher"] or [] if not name.startswith("runs/")]
        flags = {"--data": given["data"], "--teacher": teachers or None, "--seed": given["seed"]}
        load_recipe(recipe, given["settings"] or (), flags=flags, data_needed=False)


def test_commands_are_found_and_wrong_ones_are_noticed():
    found = [words for page in PAGES for words in commands(page)]
    assert len(found) > 25
    assert {words[0] for words in found} == set(typer.main.get_command(app).commands)
    with pytest.raises(KeyError):
        parse(["runn", "quickstart"])
    with pytest.raises(Exception, match="No such option"):
        parse(["run", "quickstart", "--dta", "photos"])


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_recipe_shown_loads(page):
    for block in blocks(page, "yaml"):
        value = yaml.safe_load(block)
        whole = {"teacher": {"model": "vgg16"}, "student": {"model": "resnet18"}} | value
        teachers = whole["teacher"] if isinstance(whole["teacher"], list) else [whole["teacher"]]
        for teacher in teachers:  # runs of the reader's own
            if str(teacher.get("weights")).startswith("runs/"):
                del teacher["weights"]
        try:
            load_recipe(whole, data_needed=False)
        except (UsageError, DataError) as error:
            pytest.fail(f"{page.name}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_the_file_tree_of_the_readme_is_complete():
    tree = next(block for block in blocks(ROOT / "README.md", "text") if "src/potstill/" in block)
    below = tree.partition("tests/")[0]
    shown = {word.rstrip("/") for line in below.splitlines()[1:] for word in line.strip().split("  ")[0].split()}
    there = {
        path.name
        for path in (ROOT / "src" / "potstill").iterdir()
        if not path.name.startswith("_") and path.name != "py.typed"
    }
    assert shown == there


def test_the_readme_has_its_parts():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"<!-- results -->.*<!-- end of results -->", text, re.DOTALL)
    pictures = re.findall(r"!\[[^\]]{20,}\]\(([^)]+)\)", text)  # each says what it shows
    assert len(pictures) == 2
    assert (ROOT / pictures[0]).stat().st_size <= 200_000
