"""A method from outside the package trains, goes on, is reported and refused like those of the package."""

import sys
import textwrap

import pytest
import yaml

import potstill
from potstill.cli import main
from potstill.config.recipe import dump_recipe, load_recipe
from potstill.errors import UsageError
from potstill.experiment.run_folder import RunFolder
from potstill.methods import _entry_points as entry_points
from potstill.methods import (
    check_method,
    create_method,
    describe_method,
    inner_methods,
    list_methods,
    method_info,
    needs_teacher,
)

CODE = '''
"""Halves: half of the teacher's word."""

from torch import Tensor

from potstill.methods.base import Method
from potstill.methods.kd import kd_loss
from potstill.options import Positive, Share, option
from potstill.types import Batch, Outputs


class Halves(Method):
    """Labels and half of KD: ``CE + share * KD``."""

    share: Share = option(default=0.5, doc="weight of the soft targets")
    temperature: Positive = option(doc="T of both")

    def distill(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        return {"half": self.share * kd_loss(student.logits, teacher.logits, temperature=self.temperature)}


class Student:
    pass
'''


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A file with a method, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "halves.py").write_text(textwrap.dedent(CODE))
    return "halves.py:Halves"


@pytest.fixture
def file(recipe, tmp_path):
    """A recipe file in another folder that names the code beside it."""
    value = yaml.safe_load(dump_recipe(recipe()))
    value |= {"name": "halved", "method": {"name": "../halves.py:Halves", "temperature": 2.0}}
    path = tmp_path / "recipes" / "halved.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(value))
    return path


def test_the_whole_experiment(code, file, tmp_path, capsys):
    run = ["run", str(file), "--output-dir", str(tmp_path / "runs")]
    assert main(run) == 2
    refused = capsys.readouterr().err
    assert "--allow-code" in refused
    assert f"{tmp_path / 'halves.py'}:Halves" in refused
    assert not (tmp_path / "runs").exists()
    assert main([*run, "--allow-code"]) == 0
    folder = RunFolder(tmp_path / "runs" / "halved")
    name = f"{tmp_path / 'halves.py'}:Halves"
    assert folder.read_results()["method"] == {"name": name, "temperature": 2.0}
    assert "Halves" in (folder.path / "report.html").read_text()
    # More epochs, from elsewhere, by the recipe of the run folder.
    again = ["run", str(folder.recipe), *run[2:], "--resume", "--set", "training.epochs=3"]
    assert main(again) == 2
    assert main([*again, "--allow-code"]) == 0
    # What only reads a run neither needs the code nor asks for it.
    (tmp_path / "halves.py").unlink()
    assert main(["report", str(folder.path)]) == 0
    assert main(["predict", str(folder.path / "distilled"), load_recipe(folder.recipe, recorded=True).data.source]) == 0
    assert main(["evaluate", str(folder.path / "distilled")]) in (0, 2)


def test_the_command_line_names_code_without_asking(code, recipe, tmp_path):
    plain = tmp_path / "plain.yaml"
    plain.write_text(dump_recipe(recipe()))
    loaded = load_recipe(plain, ["method.temperature=3"], flags={"--method": code})
    assert loaded.method == {"name": f"{tmp_path}/halves.py:Halves", "temperature": 3}
    loaded = load_recipe(plain, ["method={name: 'halves:Halves', temperature: 3}"])
    assert loaded.method == {"name": "halves:Halves", "temperature": 3}
    with pytest.raises(UsageError, match=r"no option 'temprature'; did you mean 'temperature'(.|\n)*must be given"):
        load_recipe(plain, ["method.temprature=3"], flags={"--method": code})
    with pytest.raises(UsageError, match=r"method.share must be from 0 to 1, got 2"):
        load_recipe(plain, ["method.temperature=3", "method.share=2"], flags={"--method": code})
    with pytest.raises(UsageError, match=r"is no subclass of potstill\.methods.base.Method"):
        load_recipe(plain, flags={"--method": "halves.py:Student"})
    with pytest.raises(UsageError, match="has no 'Halve'; did you mean 'Halves'"):
        load_recipe(plain, flags={"--method": "halves.py:Halve"})
    with pytest.raises(UsageError, match="cannot read"):
        load_recipe(plain, flags={"--method": "halfs.py:Halves"})


def test_a_preset_beside_code_in_a_file_loads_nothing(code, file, tmp_path):
    (tmp_path / "halves.py").write_text("raise RuntimeError('loaded')")
    with pytest.raises(UsageError, match="--allow-code"):
        load_recipe(file, ["method.preset=a"])
    with pytest.raises(UsageError, match="RuntimeError: loaded"):
        load_recipe(file, ["method.preset=a"], flags={"--allow-code": True})


def test_from_python(code, recipe, tmp_path):
    value = yaml.safe_load(dump_recipe(recipe()))
    value["method"] = [{"name": code, "temperature": 2.0, "factor": 0.5}, {"name": "kd"}]
    folder = potstill.run(value, output_dir=tmp_path / "runs", name="dict")
    assert RunFolder(folder).read_results()["method"]["methods"][0]["name"] == f"{tmp_path}/halves.py:Halves"
    method = create_method(code, temperature=2.0, schedule={"share": {"shape": "linear", "start": 1.0, "end": 0.0}})
    method.start_epoch(1, 2)
    assert method.inner.share == 0


def test_what_is_known_of_it(code):
    info = method_info(code)
    assert (info.summary, info.kind, info.needs) == ("Halves: half of the teacher's word.", "logits", ["teacher"])
    assert info.terms == {"kd_loss": "T² KL(softmax(z_t / T) ‖ softmax(z_s / T))"}
    assert needs_teacher({"name": code, "temperature": 1})
    assert main(["methods", code]) == 0
    assert [problem.message for problem in check_method("ls", {"base_method": {"name": code}})] == [
        "base_method.temperature must be given (a number above 0)"
    ]


def test_describing_a_recorded_method_loads_nothing():
    outside = {"name": "/nowhere/mine.py:Mine", "inner": {"name": "kd"}}
    assert inner_methods(outside) == [(("inner",), {"name": "kd"})]
    assert describe_method(outside) == "Mine around kd"
    assert describe_method([{"name": "kd"}, {"name": "no.such:Mine", "factor": 0.5}]) == "kd + 0.5 Mine"


@pytest.fixture
def installed(code, tmp_path, monkeypatch):
    """A package that offers methods: one that works, one of a name of ours, and one that is broken."""
    (tmp_path / "halves-1.0.dist-info").mkdir()
    (tmp_path / "halves-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 1.0\n")
    (tmp_path / "halves-1.0.dist-info" / "entry_points.txt").write_text(
        "[potstill.methods]\nhalves = halves:Halves\nkd = halves:Halves\nbroken = halves:Nothing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry_points.cache_clear()
    yield
    entry_points.cache_clear()


def test_methods_of_installed_packages(installed, recipe, capsys):
    assert {"halves", "broken"} <= set(list_methods())
    assert method_info("kd").target == "potstill.methods.kd:KD"
    plain = recipe(**{"method.name": "halves", "method.temperature": "3"})
    assert plain.method == {"name": "halves", "temperature": 3}
    assert main(["methods"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "half of the teacher's word" in lines["halves"]
    assert "has no 'Nothing'" in lines["broken"]
    assert main(["recipes", "--schema"]) == 0
    printed = capsys.readouterr().out
    assert '"method_halves"' in printed
    assert '"method_broken"' not in printed
    with pytest.raises(UsageError, match="has no 'Nothing'"):
        create_method("broken")
