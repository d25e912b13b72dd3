"""A sweep on small photographs: joined, killed, gone on with, refused; and the test split left alone."""

import json
import signal
from pathlib import Path

import pytest

from potstill.config.recipe import dump_recipe, load_recipe
from potstill.config.yaml import dump_yaml
from potstill.data.entries import SkippedFile
from potstill.errors import UsageError
from potstill.experiment.run_folder import RunFolder
from potstill.io import read_checksummed_json, write_checksummed_json
from potstill.report.sweep import render_sweep
from potstill.sweep import parse_space
from potstill.sweep.worker import Sweep, with_chosen_cache
from potstill.training.callbacks import SilentObserver

from ..forked import Forked, forked

pytest.importorskip("optuna", reason='needs the extra "sweep"')

SIGNALLED = Path(__file__).parents[1] / "guarantees" / "signalled.py"
LONG = 1200  # seconds after which a process counts as hanging
OVER = ["method.temperature=1,2", "method.alpha=0.2,0.8"]


@pytest.fixture
def source(recipe, tmp_path):
    path = tmp_path / "tiny.yaml"
    settings = {"training.epochs": 1, "teacher.training.epochs": 1}
    path.write_text(dump_yaml(recipe(**settings).model_dump(mode="json")), encoding="utf-8")
    return str(path)


def make(source, folder, over=OVER, sets=(), **options):
    space = parse_space(over, source, sets, {})
    options.setdefault("grid", space.listed)
    options.setdefault("confirm_seeds", 0)
    return Sweep(source, sets, {}, space, folder=folder, **options)


class Recorder(SilentObserver):
    def __init__(self):
        self.texts = []

    def note(self, message):
        self.texts.append(message)

    warn = note


def test_all_trainings_have_the_cache_of_the_teacher(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "environment.json").write_text("{}", encoding="utf-8")
    for each, chosen in (("data.cache=jpeg", "jpeg"), ("data.cache=raw", "raw")):
        (tmp_path / "teacher" / "recipe.yaml").write_text(
            dump_recipe(load_recipe("quickstart", [each])), encoding="utf-8"
        )
        assert with_chosen_cache(load_recipe("quickstart"), tmp_path).data.cache == chosen
        assert with_chosen_cache(load_recipe("quickstart", ["data.cache=raw"]), tmp_path).data.cache == "raw"
    assert with_chosen_cache(load_recipe("quickstart"), tmp_path / "new").data.cache == "auto"


def rows(folder):
    return read_checksummed_json(folder / "trials.json")["trials"]


def command(source, folder, *more, through=("-m", "potstill")):
    over = ["--search", "method.temperature=1,2"]
    more = ("--confirm-seeds", "0", *more)
    where = ["--output-dir", str(folder.parent), "--name", folder.name]
    return [*through, "sweep", source, *over, *where, *more]


def test_an_unconfirmed_search_never_reads_test(source, tmp_path):
    folder = tmp_path / "sweep"
    shown = Recorder()
    work = make(source, folder, observer=shown)
    assert work.work()
    found = rows(folder)
    assert len(found) == 4
    assert any("teacher" in text for text in shown.texts)
    assert len(shown.texts) == len(set(shown.texts))  # those of all trials once
    final = work.winner()
    assert final["value"] == max(row["value"] for row in found)
    assert not list(folder.rglob("results.json"))
    assert not list(folder.rglob("*test*"))
    assert len(list(folder.glob("teacher/teacher/metrics.jsonl"))) == 1  # the one training of a teacher
    assert not list(folder.glob("trials/*/teacher/metrics.jsonl"))
    _, lines = render_sweep(folder)
    text = "\n".join(lines)
    assert f"trial {final['trial']} is the best on val: a search, unconfirmed" in text
    assert "elped" not in text
    assert "--confirm-seeds 5 trains it again" in text
    described = read_checksummed_json(folder / "sweep.json")
    RunFolder(folder).write_skipped([SkippedFile("cat/9.png", "damaged", "no image")])
    assert "left out of the data: 1, listed in skipped.csv" in render_sweep(folder)[0].read_text(encoding="utf-8")
    write_checksummed_json(folder / "sweep.json", described | {"recipe": "data: {labeled: false}"})
    assert "--confirm-seeds" not in "\n".join(render_sweep(folder)[1])  # there is no baseline
    write_checksummed_json(folder / "sweep.json", described)
    with pytest.raises(UsageError, match=r"(?s)training.lr: was 0.003, now 0.5.*--name"):
        make(source, folder, sets=["training.lr=0.5"]).work()
    with pytest.raises(UsageError, match=r"method.temperature=1,2: was there before"):
        make(source, folder, over=["method.temperature=1,3", OVER[1]]).work()


def test_a_winner_is_confirmed_on_fresh_seeds_against_a_baseline_searched_as_long(source, tmp_path):
    folder, over, seen = tmp_path / "sweep", ["method.alpha=0.2,0.8"], []

    def on_trial(_):
        seen.extend(folder.rglob("results.json"))

    assert make(source, folder, over=over, on_trial=on_trial, confirm_seeds=3).work()
    assert seen == []  # while trials ran
    assert len(rows(folder)) == len(rows(folder / "baseline")) == 2
    tried = [row["chosen"]["student.training.lr"] for row in rows(folder / "baseline")]
    assert float(tried[0]) == 0.003  # the recipe's own
    assert 0.003 / 4 <= float(tried[1]) <= 0.003 * 4
    assert {path.parent.name for path in folder.rglob("results.json")} == {"distilled", "baseline"}
    stages = {
        student: read_checksummed_json(folder / "confirmation" / student / "results.json")
        for student in ("distilled", "baseline")
    }
    assert {found["seed"] for found in stages.values()} == {1}  # trials had seed 0
    assert list(stages["distilled"]["repeats"]) == ["distilled-2", "distilled-3"]
    assert list(stages["baseline"]["repeats"]) == ["baseline-2", "baseline-3"]
    page, lines = render_sweep(folder)
    text = page.read_text(encoding="utf-8")
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "trained again with seeds 1, 2, 3" in "\n".join(lines)
    assert lines[-1].startswith(("Distillation", "No clear difference"))

    before = [path.stat().st_mtime_ns for path in folder.rglob("results.json")]
    assert make(source, folder, over=over, confirm_seeds=3).work()  # the same command again does nothing more
    assert [path.stat().st_mtime_ns for path in folder.rglob("results.json")] == before
    with pytest.raises(UsageError, match="best was evaluated on test"):
        make(source, folder, over=over, trials=1).work()


def test_trials_of_any_method_and_length_see_the_same_views(source, tmp_path):
    folder = tmp_path / "sweep"
    make(source, folder, over=["training.epochs=1,2", "method.name=kd,at"], confirm_seeds=0).work()
    facts = [read_checksummed_json(path)["facts"] for path in folder.glob("trials/*/distilled/model.json")]
    assert sorted((each["method"]["name"], each["training"]["planned_epochs"]) for each in facts) == [
        ("at", 1), ("at", 2), ("kd", 1), ("kd", 2),
    ]  # fmt: skip
    assert len({each["views"]["sha256"] for each in facts}) == 1


def test_time_out_leaves_the_rest_to_the_same_command(source, tmp_path):
    folder = tmp_path / "sweep"
    assert not make(source, folder, over=["method.alpha=0..1"], trials=2).work(timeout=0)
    assert not (folder / "final.json").exists()
    assert make(source, folder, over=["method.alpha=0..1"], trials=2).work()
    assert len(rows(folder)) == 2


def test_other_images_are_another_sweep(source, tmp_path):
    folder = tmp_path / "sweep"
    make(source, folder).work(timeout=0)
    before = read_checksummed_json(folder / "sweep.json")
    write_checksummed_json(folder / "sweep.json", before | {"data": "0" * 64})
    with pytest.raises(UsageError, match="images: were 000000000000"):
        make(source, folder).work(timeout=0)


def test_a_killed_process_loses_nothing_and_two_share_the_rest(source, tmp_path):
    folder = tmp_path / "sweep"
    longer = ("--set", "training.epochs=3")
    # Killed in the second epoch of the first trial.
    killing = (str(SIGNALLED), "potstill.training.trainer:write_json_lines", "SIGKILL", "4")
    first = forked(command(source, folder, *longer, through=killing))
    assert first.returncode == -signal.SIGKILL, first.errors
    (begun,) = folder.glob("trials/*/distilled/metrics.jsonl")
    home = begun.parents[1].name
    pair = [Forked(command(source, folder, *longer)) for _ in range(2)]
    said = [each.communicate(timeout=LONG) for each in pair]
    assert [each.returncode for each in pair] == [0, 0], said
    found = rows(folder)
    assert [row["state"] for row in found] == ["complete"] * 2
    assert home in [row["folder"] for row in found]  # tried again, in the same folder
    combinations = {json.dumps(row["chosen"], sort_keys=True) for row in found}
    assert len(combinations) == 2
    assert len(list((folder / "workers").iterdir())) == 3
    assert sum("its process has ended" in errors for _, errors in said) == 1
    assert (folder / "final.json").exists()
