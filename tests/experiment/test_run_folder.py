import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from potstill.errors import ArtifactError, StorageError, UsageError
from potstill.evaluation.predictions import Predictions
from potstill.experiment.run_folder import RunFolder, find_model
from potstill.io import as_csv, unescape_cell
from potstill.report.run_reader import read_run


def begin(run):
    run.write_environment({"python": "3.11"})
    run.write_splits([("train", "a.png", "a", "00112233445566aa")])
    run.write_recipe("name: first\n")


def test_an_existing_run_is_never_overwritten_without_a_word(tmp_path):
    with RunFolder.create(tmp_path, "first") as run:
        begin(run)
    with pytest.raises(UsageError, match=r"--resume.*--overwrite.*--name first-2"):
        RunFolder.create(tmp_path, "first")
    assert run.read_recipe() == "name: first\n"
    with RunFolder.create(tmp_path, "first", resume=True):
        assert run.read_recipe() == "name: first\n"
    with RunFolder.create(tmp_path, "first", overwrite=True) as again:
        assert run.recipe.exists()  # the new run may yet be refused
        again.clear()
        assert not run.recipe.exists()


def test_a_run_that_never_began_leaves_no_folder(tmp_path):
    with RunFolder.create(tmp_path, "a"):
        pass
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".lock").touch()  # of a process that was killed before its first file
    RunFolder.create(tmp_path, "a").__exit__(None, None, None)


def test_overwrite_spares_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dear.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match="is not a run folder"):
        RunFolder.create(tmp_path, "photos", overwrite=True)
    assert (tmp_path / "photos" / "dear.jpg").exists()


@pytest.mark.parametrize("name", ["", "..", ".", "a/b", "/etc", "a b", "x" * 65, "é", "a\n"])
def test_names_stay_below_the_root(tmp_path, name):
    with pytest.raises(UsageError, match="1 to 64"):
        RunFolder.create(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()


def test_one_writer_at_a_time(tmp_path):
    with RunFolder.create(tmp_path, "a"), pytest.raises(StorageError, match="being written by another process"):
        RunFolder(tmp_path / "a").acquire()
    other = RunFolder(tmp_path / "a")
    other.acquire()
    other.__exit__(None, None, None)


def test_an_unwritable_root_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write to"):
        RunFolder.create(tmp_path / "file", "a")


def test_nothing_to_resume_and_contradictions(tmp_path):
    with pytest.raises(UsageError, match="nothing to resume"):
        RunFolder.create(tmp_path, "a", resume=True)
    with pytest.raises(UsageError, match="give one of them"):
        RunFolder.create(tmp_path, "a", resume=True, overwrite=True)


def test_predictions_are_what_a_csv_reader_expects(tmp_path):
    run = RunFolder(tmp_path / "a")
    names = ['quote".png', "comma,.png", "line\nbreak\x1b[31m.png"]
    found = Predictions.of(np.array([[0.75, 0.25], [1 / 3, 2 / 3], [0.5, 0.5]]), np.array([0, 1, 1]))
    run.write_predictions("teacher", "test", names, found, ["a", "b"])
    with (run.stage("teacher") / "predictions_test.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["path", "label", "prediction", "p:a", "p:b"],
        ['quote".png', "a", "a", "0.75", "0.25"],
        ["comma,.png", "b", "b", "0.333333333", "0.666666667"],
        ["line\\nbreak\\x1b[31m.png", "b", "a", "0.5", "0.5"],
    ]


def test_of_many_numbers_the_most_probable_classes_are_kept(tmp_path):
    run, labels = RunFolder(tmp_path / "a"), np.array([2, 0])
    shares = np.array([[0.4, 0.3, 0.15, 0.1, 0.03, 0.02], [0.02, 0.03, 0.1, 0.15, 0.3, 0.4]])
    found = dataclasses.replace(Predictions.of(shares, labels), probabilities=None)
    run.write_predictions("teacher", "test", ["x.png", "y.png"], found, list("abcdef"))
    run.write_confusion("teacher", "test", found, list("abcdef"))
    lines = (run.stage("teacher") / "predictions_test.csv").read_text().splitlines()
    assert lines == [
        "path,label,prediction,label_index,prediction_index,p_1,class_2,p_2,class_3,p_3,class_4,p_4,class_5,p_5",
        "x.png,c,a,2,0,0.4,b,0.3,c,0.15,d,0.1,e,0.03",
        "y.png,a,f,0,5,0.4,e,0.3,d,0.15,c,0.1,b,0.03",
    ]
    pairs = (run.stage("teacher") / "confusion_test.csv").read_text()
    assert pairs == "true_index,predicted_index,images,true,predicted\n0,5,1,a,f\n2,0,1,c,a\n"


def test_scikit_learn_on_the_csv_gives_the_auc_of_a_saturated_network(tmp_path):
    random = np.random.default_rng(0)
    labels = random.integers(0, 5, 400)
    logits = 40 * (random.normal(0, 1, (400, 5)) + 1.2 * np.eye(5)[labels])
    shares = torch.from_numpy(logits).float().softmax(dim=1).numpy()
    assert (shares == 1).mean() > 0.1  # float32 rounds so many to 1: there they are ties, by which AUC changes
    found, run = Predictions.of(shares, labels), RunFolder(tmp_path / "a")
    run.write_predictions("teacher", "test", [f"{i}.png" for i in range(400)], found, list("abcde"))
    with (run.stage("teacher") / "predictions_test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    read = np.array([[float(row[f"p:{name}"]) for name in "abcde"] for row in rows])
    truth = np.array([[row["label"] == name for name in "abcde"] for row in rows])
    areas = [sk.roc_auc_score(truth[:, k], read[:, k]) for k in range(5)]
    assert found.auc_per_class == pytest.approx(areas, abs=1e-12)
    assert found.auc_micro == pytest.approx(sk.roc_auc_score(truth.ravel(), read.ravel()), abs=1e-12)
    exact = torch.from_numpy(logits).softmax(dim=1).numpy()  # of the logits themselves, fewer are ties
    assert abs(np.mean(areas) - sk.roc_auc_score(labels, exact, multi_class="ovr")) > 1e-3


def test_csv_has_no_raw_control_characters():
    assert as_csv(("a",), [("\x00\x07",)]) == "a\n\\x00\\x07\n"


def test_the_model_meant_by_a_run_is_the_distilled_one(tmp_path):
    for stage in ("teacher", "baseline", "distilled"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "model.json").write_text("{}")
        assert find_model(tmp_path) == tmp_path / stage
    assert find_model(tmp_path / "teacher" / "model.json") == tmp_path / "teacher"
    with pytest.raises(UsageError, match="does not exist"):
        find_model(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="has no model"):
        find_model(tmp_path / "empty")
    (tmp_path / "runs" / "b").mkdir(parents=True)
    (tmp_path / "runs" / "b" / "recipe.yaml").write_text("name: b")
    with pytest.raises(ArtifactError, match=r"folder of runs; name one of them, such as .*runs/b$"):
        find_model(tmp_path / "runs")
    with pytest.raises(ArtifactError, match=r"no stage of this run was finished; .* with --resume"):
        find_model(tmp_path / "runs" / "b")
    (tmp_path / "empty" / "sweep.json").write_text("{}")
    again = tmp_path / "empty" / "confirmation" / "distilled"
    again.mkdir(parents=True)
    (again / "results.json").write_text("{}")
    with pytest.raises(ArtifactError, match=f"is a search, .*sweep.html; the run of its winner is {again}"):
        find_model(tmp_path / "empty")
    with pytest.raises(ArtifactError, match="is a search"):
        read_run(tmp_path / "empty")


def test_results_of_another_schema_are_refused(tmp_path):
    run = RunFolder(tmp_path)
    run.write_results({"schema": 2})
    with pytest.raises(ArtifactError, match="another schema than 1"):
        run.read_results()


def test_what_stands_there_is_judged_once_nobody_else_can_change_it(tmp_path):
    with RunFolder.create(tmp_path, "a") as run:
        begin(run)
        # Not "exists, go on with --resume": it is being written.
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(StorageError, match="being written by another process"):
                RunFolder.create(tmp_path, "a", **flags)
    with pytest.raises(UsageError, match="--resume"):
        RunFolder.create(tmp_path, "a")
    RunFolder.create(tmp_path, "a", resume=True).__exit__(None, None, None)  # the refusal has released the lock


@pytest.mark.parametrize("missing", ["recipe", "environment"])
def test_a_run_that_was_killed_at_its_very_beginning_can_be_begun_again(tmp_path, missing):
    with RunFolder.create(tmp_path, "a") as run:
        begin(run)
    getattr(run, missing).unlink()
    (run.path / f".{missing}.0123.part").write_text("name: fi")
    with pytest.raises(UsageError, match=r"nothing to resume: .* has not started"):
        RunFolder.create(tmp_path, "a", resume=True)
    with RunFolder.create(tmp_path, "a") as run:
        begin(run)


def test_a_killed_overwrite_leaves_a_run_that_can_be_overwritten(tmp_path, monkeypatch):
    with RunFolder.create(tmp_path, "a") as run:
        begin(run)
        run.results.touch()
        gone = []
        monkeypatch.setattr(Path, "unlink", lambda path: gone.append(path.name))
        run.clear()
    assert set(gone[-3:]) == {"recipe.yaml", "environment.json", "splits.csv"}
    assert len(gone) == 4


def test_resume_looks_at_its_files_first_and_tidies_up(tmp_path):
    with RunFolder.create(tmp_path, "a") as run:
        begin(run)
        leftover = run.stage("teacher") / "checkpoints" / ".last.checkpoint.0123.part"
        leftover.parent.mkdir(parents=True)
        leftover.write_bytes(b"half")
    RunFolder.create(tmp_path, "a", resume=True).__exit__(None, None, None)
    assert not leftover.exists()
    for path in (run.recipe, run.environment):
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"first", b"farst").replace(b"3.11", b"3.10"))
        for _ in range(2):  # the second finds no lock
            with pytest.raises(ArtifactError, match=f"{path.name} is damaged"):
                RunFolder.create(tmp_path, "a", resume=True)
        path.write_bytes(whole)


def test_results_list_the_digests_of_what_was_written(tmp_path):
    run = RunFolder(tmp_path)
    begin(run)
    run.write_metrics("teacher", {"test": {"top1": 1.0}})
    run.write_predictions(
        "teacher", "test", ["x.png"], Predictions.of(np.ones((1, 1)), np.zeros(1, dtype=np.int64)), ["a"]
    )
    (tmp_path / "teacher" / "metrics.jsonl").write_text('{"epoch": 1}\n')
    (tmp_path / "teacher" / "predictions_test.csv").write_text("changed meanwhile\n")
    run.write_results({"schema": 1, "stages": {"teacher": {}, "baseline": {}}})
    files = run.read_results()["files"]
    assert list(files) == [
        "splits.csv", "teacher/metrics.json", "teacher/metrics.jsonl", "teacher/predictions_test.csv"
    ]  # fmt: skip
    # sha256sum of "split,name,class,sha256\ntrain,a.png,a,00112233445566aa\n",
    # and of "path,label,prediction,p:a\nx.png,a,a,1\n"
    assert files["splits.csv"] == "69017880ac6a621a805a470da6fdc2578076a7fcccd3e1a5527e02ca7968e8bf"
    assert files["teacher/predictions_test.csv"] == "287994911f214aee32d04a2546d3ad1bec016afe92077c147cdca15d5d992c94"


FORMULAS = ("=1+1", "+cmd|' /C calc'!A0", "-2", "@SUM(A1)", "'=quoted", "''-x")
HARMLESS = ("cat", "'cat'", "a=b")


def test_cells_that_a_spreadsheet_would_run_begin_with_an_apostrophe():
    rows = list(csv.reader(as_csv(("name",), [(name,) for name in FORMULAS + HARMLESS]).splitlines()))[1:]
    assert [row[0] for row in rows] == [f"'{name}" for name in FORMULAS] + list(HARMLESS)
    assert [unescape_cell(row[0]) for row in rows] == [*FORMULAS, *HARMLESS]


def test_numbers_stay_numbers():
    assert as_csv(("a", "b"), [(-1, -0.5)]) == "a,b\n-1,-0.5\n"
