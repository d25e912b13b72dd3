"""G17: names of files and classes are text everywhere: on the terminal, in tables, in pages."""

import csv
import html
import json
import os
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

from potstill.cli import main

from ..conftest import blank_pictures

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such names")

WHOLE_RUNS = True  # names stand in pictures too
CLASSES = {"<img src=x onerror=alert(1)>": 60, "'\"><script>alert(1)</script>": 130, "=1+1": 200}
FILES = ["{{ 7 * 7 }}.png", "<b>bold.png", 'a,b;"c".png', "=1+1.png", "-rf.png", "%s%n.png", "$(touch gone).png"]
FILES += ["é" * 60 + ".png", "~.png", "con.png"]
INVISIBLE = ["\x1b[31mred\x07", "two\nlines", "\u202egnp.exe", "\x1b]0;title\x07", os.fsdecode(b"caf\xe9")]  # refused
RECIPE = """
name: names
data: {source: SOURCE, size: 16, workers: 0}
teacher: {model: cifar/resnet8}
student: {model: cifar/resnet8}
training: {epochs: 1, batch_size: 16, precision: float32}
teacher_cache: off
"""
RAW = ("<img src=x", "<script>alert", "<b>bold", "{{ 7")


def photographs_in(folder, classes, files):
    random = np.random.default_rng(0)
    for name, level in classes.items():
        (folder / name).mkdir(parents=True)
        for file in files:
            pixels = np.clip(random.normal(level, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / file)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return photographs_in(tmp_path_factory.mktemp("names") / "photographs", CLASSES, FILES)


@pytest.fixture(scope="module")
def invisible(tmp_path_factory):
    """Names that no terminal should ever be sent."""
    folder = tmp_path_factory.mktemp("invisible") / "photographs"
    return photographs_in(folder, dict.fromkeys(INVISIBLE, 100) | CLASSES, [f"{name}.png" for name in INVISIBLE])


@pytest.fixture(scope="module")
def run(photographs, tmp_path_factory):
    """A run on them, and all that it said."""
    root = tmp_path_factory.mktemp("runs")
    recipe = root / "names.yaml"
    recipe.write_text(RECIPE.replace("SOURCE", json.dumps(str(photographs))))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["run", str(recipe), "--output-dir", str(root)]) == 0
    return root / "names"


def is_plain(text):
    """No control characters, none that turn the direction of writing, no halves of characters."""
    bad = {
        unicodedata.name(c, hex(ord(c))) for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs")
    }
    assert bad == set()


def test_the_page_has_them_as_text(run):
    for page in (run / "report.html", run / "report.md"):
        if page.exists():
            text = page.read_text(encoding="utf-8")
            is_plain(text)
            if page.suffix == ".html":
                assert not any(raw in text for raw in RAW)
                assert html.escape("<img src=x onerror=alert(1)>") in text
                assert "49.png" not in text  # what a template would make of the first file's name


def test_tables_have_a_line_for_each_image(run):
    for path in (run / "splits.csv", *run.glob("*/predictions_*.csv")):
        text = path.read_text(encoding="utf-8")
        is_plain(text)
        rows = list(csv.reader(text.splitlines()))
        assert len({len(row) for row in rows}) == 1
        assert len(rows) == text.count("\n")
    assert len((run / "splits.csv").read_text().splitlines()) == 1 + len(CLASSES) * len(FILES)


def test_texts_have_no_control_characters(run):
    found = [path for path in run.rglob("*") if path.suffix in (".txt", ".json", ".jsonl", ".yaml")]
    assert len(found) > 10
    for path in found:
        is_plain(path.read_text(encoding="utf-8"))


def test_the_terminal_shows_no_control_characters(run, invisible, tmp_path, capfd):
    absent = tmp_path / "\x1b[31mnot\nthere"
    commands = {
        ("check", invisible): 3,
        ("run", "quickstart", "--data", invisible, "--output-dir", tmp_path): 3,
        ("predict", run, invisible): 0,
        ("predict", run, invisible, "--json"): 0,
        ("evaluate", run, "--data", invisible): 3,
        ("report", run): 0,
        ("predict", run, absent): 2,
        ("predict", absent, invisible): 2,
        ("run", "quickstart", "--data", absent): 2,
        ("run", absent): 2,
    }
    for command, code in commands.items():
        capfd.readouterr()
        with blank_pictures():  # nothing of them is on the terminal
            assert main([str(part) for part in command]) == code, command
        said = capfd.readouterr()
        is_plain(said.out + said.err)
        assert said.out + said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["../out", "/tmp/out", "..", ".", "", "a/b", "a\\b", "a b", "a\nb", "x" * 65, "\u202ea", "\x1b[31m", "é", "a:b"],
)
def test_a_runs_name_stays_below_the_root(name, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main(["run", "quickstart", "--output-dir", str(tmp_path / "runs"), "--name", name]) == 2
    error = capsys.readouterr().err
    is_plain(error)
    expected = "--name must be 1 to 64 of the characters A-Z a-z 0-9 . _ -" if name else "an argument is empty"
    assert expected in error
    assert sorted(tmp_path.rglob("*")) == before
