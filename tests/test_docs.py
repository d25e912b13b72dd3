"""The documentation site: complete, built strictly without a network, and the same as the code says."""

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import potstill
from potstill import cli, errors, functional
from potstill.config.recipe import CurriculumSettings, DomainSettings, Recipe, StageSettings, TeachersSettings
from potstill.config.settings_errors import RENAMED_KEYS
from potstill.data.builtin.cifar100 import CifarOptions
from potstill.data.builtin.fashion_mnist import FashionOptions
from potstill.data.builtin.solar import SolarOptions
from potstill.data.datasets import DATASETS
from potstill.data.file_datasets import ShardOptions
from potstill.data.settings import AugmentSettings, DataSettings
from potstill.distillation.teacher_cache import TeacherCacheSettings
from potstill.loggers import LoggerSettings
from potstill.methods import list_own_methods, method_class, method_info
from potstill.options import RENAMED_OPTIONS
from potstill.training.settings import TrainingSettings

from .conftest import few_digits, whole_runs
from .test_readme import carry_out
from .test_setting_names import exists

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def load(path: Path):
    """A script or another test file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def page(generated_docs):
    """A function that gives the text of a page by its name, tables and generated pages included."""
    return lambda name: (generated_docs / "docs" / f"{name}.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    """A folder in which the Python of the docs has been carried out."""
    folder = tmp_path_factory.mktemp("docs")
    with whole_runs():  # the page on run folders is compared with the first
        carry_out(DOCS / "python.md", folder)
    for name in ("data", "teachers", "start-research", "start-deployment"):
        carry_out(DOCS / f"{name}.md", folder)
    return folder


@pytest.mark.parametrize(
    "model",
    [
        Recipe, StageSettings, TeachersSettings, DomainSettings, DataSettings, AugmentSettings, CurriculumSettings,
        LoggerSettings, TeacherCacheSettings, TrainingSettings,
    ],
)  # fmt: skip
def test_every_setting_and_its_default_stand_in_the_page(model, page):
    section = page("recipes").split(f"### {model.__name__}\n")[1].split("\n### ")[0]
    rows = {
        row[1].strip().strip("`"): row[2].strip() for line in section.splitlines() if len(row := line.split("|")) > 4
    }
    for name, field in model.model_fields.items():
        if field.default is PydanticUndefined:
            assert rows[name] == "required"
        elif isinstance(field.default, BaseModel):
            assert rows[name] == "its defaults"
        else:
            assert json.loads(rows[name].strip("`")) == field.default, name
    assert set(rows) - {"key", "---"} == set(model.model_fields)


def test_every_table_has_its_place_and_no_other_is_asked_for():
    script = load(ROOT / "scripts" / "generate_docs.py")
    asked = [name for path in DOCS.rglob("*.md") for name in script.TABLE.findall(path.read_text("utf-8"))]
    assert sorted(asked) == sorted(script.docs_tables.TABLES)


def test_what_is_generated_is_not_kept(generated_docs):
    kept = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    built = {str(path.relative_to(generated_docs / "docs")) for path in (generated_docs / "docs").rglob("*.md")}
    assert kept < built
    assert {name.partition("/")[0] for name in built - kept} == {"api", "methods"}
    assert not any("<!-- table" in path.read_text("utf-8") for path in (generated_docs / "docs").rglob("*.md"))


def test_every_method_has_its_page_with_all_of_it(page, generated_docs):
    assert {path.stem for path in (generated_docs / "docs" / "methods").iterdir()} == set(list_own_methods())
    for name in list_own_methods():
        text, found = page(f"methods/{name}"), method_info(name)
        for option in found.options:
            assert f"| `{option}` |" in text
        for preset in found.presets:
            assert f"| `{preset}` |" in text
        for accuracy in found.published.values():
            assert f"| {accuracy:.2f} |" in text
        for title in ("# ", "## Loss\n", "**Needs**: ", "## Use\n", "## Price\n"):
            assert title in text
    # by hand, from the paper's tables
    assert "| cifar100: resnet32x4 → resnet8x4 | 76.32 |" in page("methods/dkd")
    assert "| `cifar100/vgg13-vgg8` | `beta: 6.0` |" in page("methods/dkd")


def test_every_method_has_its_row(page):
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\(methods/\w+\.md\) (.*) \|$", page("methods"), re.MULTILINE))
    assert set(rows) == set(list_own_methods())
    assert rows["kd"].startswith(
        "Knowledge distillation | [NIPS workshop 2014](https://arxiv.org/abs/1503.02531) | logits | "
    )
    assert " | embedding, sample index | " in rows["crd"]


def test_pages_count_the_methods():
    for name in ("README.md", "CHANGELOG.md", "docs/start-research.md"):
        assert re.findall(r"(\d+) methods", (ROOT / name).read_text(encoding="utf-8"))[0] == str(
            len(list_own_methods())
        ), name


def test_the_reference_has_everything_that_the_package_exports(page):
    classes = {method_class(name).__name__ for name in list_own_methods()}
    entries = {
        entry
        for name in ("experiment", "distiller", "data")
        for entry in re.findall(r"^## (\w+)$", page(f"api/{name}"), re.M)
    }
    assert set(potstill.__all__) - classes <= entries
    assert re.findall(r"^## (\w+)$", page("api/functional"), re.M) == functional.__all__
    kinds = [
        each.__name__ for each in vars(errors).values() if isinstance(each, type) and each.__module__ == errors.__name__
    ]
    assert re.findall(r"^## (\w+)$", page("api/errors"), re.M) == kinds
    # by hand, from the source
    text = page("api/functional").split("\n## kd_loss\n")[1].split("\n## ")[0]
    arguments = ("student_logits: Tensor", "teacher_logits: Tensor", "*", "temperature: Positive")
    assert "\nkd_loss(\n" + "".join(f"    {each},\n" for each in arguments) + ") -> Tensor\n" in text
    assert "`T² KL(softmax(z_t / T) ‖ softmax(z_s / T))`" in text
    assert "- `temperature`: T > 0; a higher value gives softer targets." in text
    assert ">>> kd_loss(torch.zeros(1, 2), torch.tensor([[4.0, 0.0]]), temperature=2.0)\ntensor(1.3113)" in text
    text = page("api/distiller").split("\n## create_method\n")[1].split("\n## ")[0]
    assert "- `UsageError`: unknown name, preset or option, missing option, value out of range." in text


@pytest.mark.parametrize("name", list_own_methods())
def test_the_python_of_every_method_runs(name, capsys, page):
    (block,) = re.findall(r"^```python\n(.*?)^```", page(f"methods/{name}"), re.DOTALL | re.MULTILINE)
    exec(compile(block, name, "exec"), names := {})
    assert names["step"].loss.isfinite()
    assert any(parameter.grad is not None for parameter in names["distiller"].student.parameters())
    assert capsys.readouterr().out.startswith("{'")


def test_every_data_set_has_its_row_with_its_options(page):
    rows = {line.split("|")[1].strip(" `"): line for line in page("data").splitlines() if line.startswith("| `")}
    assert set(rows) == set(DATASETS)
    for name, options in (("solar", SolarOptions), ("fashion-mnist", FashionOptions), ("cifar100", CifarOptions)):
        assert all(f"`{option}`" in rows[name] for option in options.model_fields)
    assert all(f"`data.options.{option}`" in page("data") for option in ShardOptions.model_fields)


def test_every_error_has_its_exit_code_in_the_page(page):
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)]
    assert len(kinds) > 5
    for kind in kinds:
        assert f"| {kind.exit_code} | `{kind.__name__}` |" in page("exit-codes")


def test_the_python_of_the_docs_runs(worked):
    assert {path.name for path in (worked / "runs").iterdir()} == {"from-python", "mine", "own-networks"}
    assert json.loads((worked / "runs" / "mine" / "results.json").read_text())["data"]["class_names"] == ["cat", "dog"]


def test_the_python_for_assistants_reads_a_run(worked):
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "AGENTS.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    exec(compile(block, "AGENTS.md", "exec"), names := {})
    found = names["summary"](str(worked / "runs" / "from-python"))
    assert set(found["test_top1"]) == set(found["val_top1"]) == {"teacher", "baseline", "distilled"}
    assert found["verdict"].startswith(("On this seed", "The "))
    assert found["looks"] == 1


def test_every_file_of_a_run_stands_in_the_page(worked, page):
    run = worked / "runs" / "from-python"
    tree = page("run-folder").partition("```text\n")[2].partition("```")[0]
    files = {path.name for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    listed = {word for word in re.findall(r"[\w.-]+/?", tree) if "." in word}
    assert {name for name in files if name not in tree} == set()
    assert {
        name.rpartition("/")[2] for name in listed if Path(name).suffix in (".json", ".png", ".csv", ".txt")
    } <= files | {"skipped.csv"}  # of runs with data.skip_bad alone


def test_every_key_of_the_results_stands_in_the_page(worked, page):
    run = worked / "runs" / "from-python"
    text = page("run-folder").replace("`precision_`, `recall_`, `f1_` + `micro`, `macro`, `weighted`", " ".join(
        f"`{kind}_{mean}`" for kind in ("precision", "recall", "f1") for mean in ("micro", "macro", "weighted")
    ))  # fmt: skip
    results = json.loads((run / "results.json").read_text())
    stage = results["stages"]["distilled"]
    records = [json.loads(line) for line in (run / "distilled" / "metrics.jsonl").read_text().splitlines()]
    for mapping in (
        results, results["data"], results["stages"], stage, stage["model"], stage["training"], stage["latency_ms"],
        stage["test"], results["comparison"], records[0], records[0]["val"],
    ):  # fmt: skip
        assert {key for key in mapping if f"`{key}`" not in text} == set()


def test_every_page_is_in_the_navigation(generated_docs):
    config = tomllib.loads((generated_docs / "zensical.toml").read_text(encoding="utf-8"))["project"]
    docs = generated_docs / "docs"

    def files(part):
        if isinstance(part, str):
            return [part]
        return [file for each in part for file in files(each if isinstance(part, list) else part[each])]

    assert sorted(files(config["nav"])) == sorted(str(path.relative_to(docs)) for path in docs.rglob("*.md"))
    assert config["theme"]["font"] is False


@pytest.fixture(scope="module")
def site(generated_docs, tmp_path_factory):
    """The site, built from a copy."""
    folder = tmp_path_factory.mktemp("site") / "copy"
    shutil.copytree(generated_docs, folder)
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def build(folder: Path) -> subprocess.CompletedProcess:
    # A proxy that does not exist: whoever tries the network fails.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(
        command, cwd=folder, env=os.environ | nowhere, capture_output=True, text=True, timeout=600, check=False
    )


def test_the_site_is_built_strictly(site, generated_docs):
    for path in (generated_docs / "docs").rglob("*.md"):
        name = path.relative_to(generated_docs / "docs").with_suffix("")
        built = site / ("index.html" if path.stem == "index" else f"{name}/index.html")
        assert path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") in built.read_text(encoding="utf-8")


def test_pages_fetch_nothing_from_elsewhere(site):
    for built in site.rglob("*.html"):
        text = built.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe)[^>]+src="?([^" >]+)', text)
        fetched += re.findall(r'<link[^>]+rel="?(?:stylesheet|preload|icon|preconnect)"?[^>]*href="?([^" >]+)', text)
        fetched += re.findall(r'<link[^>]+href="?([^" >]+)"?[^>]*rel="?(?:stylesheet|preload|icon|preconnect)', text)
        assert [address for address in fetched if "//" in address] == []


def test_a_broken_link_fails_the_build(generated_docs, tmp_path):
    """In a site of three pages, with the settings of the whole one."""
    docs = tmp_path / "docs"
    shutil.copytree(generated_docs / "docs" / "stylesheets", docs / "stylesheets")
    settings = (generated_docs / "zensical.toml").read_text(encoding="utf-8")
    settings, replaced = re.subn(
        r"^nav = \[.*?^\]$", 'nav = ["index.md", "data.md", "recipes.md"]', settings, flags=re.M | re.S
    )
    assert replaced == 1
    (tmp_path / "zensical.toml").write_text(settings, encoding="utf-8")
    for page, target in (("index", "no-such-page.md"), ("data", "recipes.md#nosuchsettings"), ("recipes", "data.md")):
        (docs / f"{page}.md").write_text(f"# {page}\n\n[nowhere]({target})\n", encoding="utf-8")
    done = build(tmp_path)
    assert done.returncode != 0
    assert "2 issues found" in done.stdout + done.stderr


def test_one_command_builds_the_documentation():
    """Whoever builds the site does it in the one way that generates its pages first."""
    script = (ROOT / "scripts" / "docs").read_text(encoding="utf-8")
    assert "generate_docs.py" in script
    assert "zensical build --strict" in script
    for name in ("Makefile", ".ci/run", "scripts/check"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "scripts/docs" in text
        assert "zensical" not in text


def test_softening_probabilities_equals_softening_logits(worked):
    soften = load(ROOT / "scripts" / "docs_figures.py").soften
    logits = np.array([2.0, -1.0, 0.5])
    wanted = np.exp(logits / 4) / np.exp(logits / 4).sum()
    np.testing.assert_allclose(soften(np.exp(logits) / np.exp(logits).sum(), 4), wanted, rtol=1e-12)


def test_figures_can_be_drawn_from_a_run(worked, tmp_path, monkeypatch):
    script = load(ROOT / "scripts" / "docs_figures.py")
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("*.png"))
    monkeypatch.setattr(script, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(script, "PAGE", tmp_path / "docs" / "how-distillation-works.md")
    monkeypatch.setattr(sys, "argv", ["docs_figures.py", str(worked / "runs" / "from-python")])
    with few_digits():
        script.main()
    drawn = {path.name: path.stat().st_size for path in (tmp_path / "docs" / "images").glob("*.png")}
    assert set(drawn) == {"soft-targets.png", "loss-terms.png", "top1-curves.png"}
    assert all(5_000 < size < 100_000 for size in drawn.values())
    with (worked / "runs" / "from-python" / "teacher" / "predictions_test.csv").open(newline="") as file:
        least = min((max(map(float, row[3:])), row[0]) for row in list(csv.reader(file))[1:] if row[1] == row[2])
    text = script.PAGE.read_text(encoding="utf-8")
    assert f"`{least[1]}`" in text
    assert f"| 1 | {100 * least[0]:.1f} %" in text


def test_pictures_of_the_docs_are_there_and_small():
    shown = {
        name for path in DOCS.glob("*.md") for name in re.findall(r"\]\((images/[^)]+)\)", path.read_text("utf-8"))
    }
    assert {f"images/{path.name}" for path in (DOCS / "images").iterdir()} == shown
    assert all((DOCS / name).stat().st_size <= 200_000 for name in shown)


def test_every_renamed_name_stands_in_the_changelog():
    table = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("### Renamed\n")[1].split("\n### ")[0]
    rows = {tuple(re.findall(r"`([^`]+)`", line)[-2:]) for line in table.splitlines() if line.count("`") >= 4}
    words = {(old.split()[-1].split(".")[-1], new.split()[-1].split(".")[-1]) for old, new in rows}
    renamed = {**RENAMED_KEYS, **RENAMED_OPTIONS, **cli._RENAMED}
    assert len(renamed) >= 20
    assert set(renamed.items()) - words == set()
    assert [new for _, new in rows if "." in new and not exists(new.partition(":")[0])] == []
