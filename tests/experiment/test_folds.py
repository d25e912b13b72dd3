"""A cross-validation: a run of each fold, and all of them together."""

import csv
import html
import json
import shutil

import numpy as np
import pytest

from potstill.config.recipe import load_recipe
from potstill.data import decoded_cache
from potstill.data.datasets import load_data
from potstill.errors import ArtifactError, DataError, Stopped, UsageError
from potstill.experiment import pipeline
from potstill.experiment.folds import describe_outside_weights
from potstill.experiment.reproduce import read_run_record
from potstill.experiment.run_folder import RunFolder, find_model
from potstill.report.compare import compare, read_contender
from potstill.report.overview import comparison_context
from potstill.report.render import render
from potstill.report.run_reader import read_run
from potstill.serve.runs import list_runs, report
from potstill.training.callbacks import SilentObserver

FOLDS = 3


class Heard(SilentObserver):
    """Records what is said, and may stop at a stage."""

    def __init__(self, stop_at=""):
        self.notes, self.stages, self.expected, self.stop_at = [], [], {}, stop_at

    def note(self, message):
        self.notes.append(message)

    def expect(self, estimate):
        self.expected = dict(estimate())

    def stage(self, name, detail):
        self.stages.append(name)
        if name == self.stop_at:
            raise Stopped(15)


def results(path):
    return json.loads((path / "results.json").read_text())


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def made(recipe):
    def make(**changes):
        return recipe(**{"data.folds": FOLDS, "training.epochs": 1, "teacher.training.epochs": 1, **changes})

    return make


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """A run of three folds of which the second was interrupted, what was said, and which sets were decoded."""
    root, decoded = tmp_path_factory.mktemp("runs"), []
    decode = decoded_cache._decode_in_memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoded_cache, "_decode_in_memory", lambda i, *rest: decoded.append(len(i)) or decode(i, *rest))
        with pytest.raises(Stopped):
            pipeline.run(made(), output_dir=root, observer=Heard("fold 2/distilled"))
        before = results(root / "tiny" / "fold-1")["created"]
        decoded.clear()
        observer = Heard()
        path = pipeline.run(made(), output_dir=root, observer=observer, resume=True)
    assert results(path / "fold-1")["created"] == before
    return path, observer, decoded


def test_every_image_is_in_test_once(whole, photographs):
    path, _, _ = whole
    tested = [
        row["path"]
        for fold in range(1, FOLDS + 1)
        for row in rows(path / f"fold-{fold}/distilled/predictions_test.csv")
    ]
    assert sorted(tested) == sorted(each.relative_to(photographs).as_posix() for each in photographs.rglob("*.png"))
    for fold in range(1, FOLDS + 1):
        splits = rows(path / f"fold-{fold}" / "splits.csv")
        assert len({row["name"] for row in splits}) == len(splits) == 60
        counts = results(path / f"fold-{fold}")["data"]["counts"]
        assert {*counts["test"].values()} <= {6, 7}  # 20 images of a class in three folds
        assert all(counts["val"].values())


def test_an_interrupted_run_goes_on_in_its_fold(whole):
    _, observer, _ = whole
    assert "fold 1: already finished" in observer.notes
    assert observer.stages[:2] == ["fold 2/distilled", "fold 3/teacher"]
    assert set(observer.expected) == {
        "fold 2/distilled",
        *(f"fold 3/{s}" for s in ("teacher", "baseline", "distilled")),
    }


def test_images_are_decoded_once_for_all_folds(whole):
    _, _, decoded = whole
    assert decoded == [60]


def test_the_results_are_those_of_all_images(whole):
    path, _, _ = whole
    found = results(path)
    for stage in ("teacher", "baseline", "distilled"):
        own = rows(path / stage / "predictions_test.csv")
        by_fold = {
            row["path"]: row
            for fold in range(1, FOLDS + 1)
            for row in rows(path / f"fold-{fold}" / stage / "predictions_test.csv")
        }
        assert len(own) == 60
        assert {row["path"]: row["prediction"] for row in own} == {k: row["prediction"] for k, row in by_fold.items()}
        right = np.mean([row["label"] == row["prediction"] for row in own])
        assert found["stages"][stage]["test"]["top1"] == pytest.approx(right)
        tops = [each["top1"][stage] for each in found["folds"]]
        over = found["stages"][stage]["over_folds"]["top1"]
        assert (over["mean"], over["sd"]) == pytest.approx((np.mean(tops), np.std(tops, ddof=1)))
    comparison = found["comparison"]["folds"]
    tops = {stage: found["stages"][stage]["test"]["top1"] for stage in found["stages"]}
    assert comparison["top1_gain"]["value"] == pytest.approx(tops["distilled"] - tops["baseline"])
    assert [each["images"] for each in comparison["each"]] == [20, 20, 20]
    assert "Too few folds for a verdict" in found["comparison"]["verdict"]
    assert found["data"]["counts"] == {"test": {"blue": 20, "green": 20, "red": 20}}
    assert [each["seed"] for each in found["folds"]] == [0, 1000, 2000]


def test_reports_of_the_whole_and_of_each_fold(whole):
    path, _, _ = whole
    page = render(path).read_text(encoding="utf-8")
    assert 'href="fold-2/report.html"' in page
    assert "data.fold=all" in page
    values = comparison_context(read_run(path))
    assert values is not None
    for row in values["results"]:
        if row["difference"][0] != "–":  # what is shown is the difference of what is shown
            before, after = (float(cell[0].removesuffix(" %")) for cell in row["cells"][1:])
            assert after - before == pytest.approx(float(row["difference"][0]), abs=0.11)
    for fold in range(1, FOLDS + 1):
        text = (path / f"fold-{fold}" / "report.html").read_text(encoding="utf-8")
        assert f"fold {fold} of {FOLDS}" in text
        assert "--seeds 5" not in text.partition('id="advice"')[0]


def test_a_comparison_of_runs_knows_the_folds(whole, tmp_path):
    path, _, _ = whole
    run = read_run(path)
    found = read_contender("a", run)
    tested = [
        {row["name"] for row in rows(path / f"fold-{k}" / "splits.csv") if row["split"] == "test"} for k in (1, 2, 3)
    ]
    assert [name in tested[fold] for (name, _), fold in zip(found.images, found.folds, strict=True)] == [True] * 60
    page = html.unescape(compare([path], tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "<td>0</td>" in page  # its seed, of which there is one


def test_a_fold_is_a_run_folder_and_the_whole_has_no_model(whole):
    path, _, _ = whole
    assert find_model(path / "fold-2") == path / "fold-2" / "distilled"
    with pytest.raises(ArtifactError, match=r"is a cross-validation .*/fold-1, .* --set data\.fold=all"):
        find_model(path)
    assert read_run_record(path / "fold-1").stages == ("teacher", "baseline", "distilled")
    with pytest.raises(UsageError, match="repeat its folds one by one"):
        read_run_record(path)


def test_served_runs_include_the_folds(whole):
    path, _, _ = whole
    known = list_runs(path.parent)
    assert {"tiny", "tiny.fold-1", "tiny.fold-2", "tiny.fold-3"} == set(known)
    page = report("tiny", known["tiny"]) or b""
    assert b'href="../tiny.fold-2/report"' in page  # relative to /runs/tiny/report
    assert b'href="fold-2/report.html"' not in page


def test_a_fold_alone_gives_the_same(whole, made, tmp_path):
    path, _, _ = whole
    alone = pipeline.run(made(**{"data.fold": 2, "seed": 1000}), output_dir=tmp_path, name="alone")
    names = [f"{stage}/predictions_test.csv" for stage in ("teacher", "baseline", "distilled")]
    assert [(alone / name).read_bytes() for name in names] == [(path / "fold-2" / name).read_bytes() for name in names]


def test_more_seeds_continue_every_fold_and_overwrite_begins_again(whole, made, tmp_path):
    path, _, _ = whole
    copy = shutil.copytree(path, tmp_path / "tiny")
    with pytest.raises(Stopped):
        pipeline.run(made(seeds=2), output_dir=tmp_path, resume=True, observer=Heard("fold 2/baseline-2"))
    observer = Heard()
    pipeline.run(made(seeds=2), output_dir=tmp_path, resume=True, observer=observer)
    assert "fold 1: already finished" in observer.notes
    assert observer.stages == [f"fold {fold}/{stage}-2" for fold in (2, 3) for stage in ("baseline", "distilled")]
    found = results(copy)
    assert found["comparison"]["folds"]["seeds"] == 2
    assert found["looks"]["test_evaluations"] == 2
    assert found["comparison"]["folds"]["top1_gain"]["confidence"] == 0.995
    assert set(found["repeats"]) == {"baseline-2", "distilled-2"}
    own = [results(copy / f"fold-{fold}") for fold in range(1, FOLDS + 1)]
    for name in ("baseline", "distilled"):  # as the comparison: over the seeds of each fold
        tops = [np.mean([(each["stages"] | each["repeats"])[one]["test"]["top1"] for one in (name, f"{name}-2")])
                for each in own]  # fmt: skip
        assert [each["top1"][name] for each in found["folds"]] == pytest.approx(tops)
        assert found["stages"][name]["over_folds"]["top1"]["mean"] == pytest.approx(np.mean(tops))
        pooled = np.mean([(found["stages"] | found["repeats"])[one]["test"]["top1"] for one in (name, f"{name}-2")])
        assert found["comparison"]["folds"]["top1"][name] == pytest.approx(pooled)
        assert f"{name} {100 * pooled:.1f} %" in found["comparison"]["verdict"]
    assert "distilled over their 2 seeds too" in render(copy).read_text(encoding="utf-8")
    assert "(baseline and distilled: mean over the seeds)" in found["comparison"]["verdict"]
    with pytest.raises(UsageError, match="--resume needs the same recipe"):
        pipeline.run(made(seeds=2, **{"training.lr": 0.1}), output_dir=tmp_path, resume=True)
    with pytest.raises(UsageError, match="--overwrite"):
        pipeline.run(made(), output_dir=tmp_path)


def test_the_run_for_use_is_trained_on_all_images(made, tmp_path):
    path = pipeline.run(made(**{"data.fold": "all"}), output_dir=tmp_path)
    found = results(path)
    assert found["data"]["counts"]["test"] == {"blue": 1, "green": 1, "red": 1}
    assert sum(found["data"]["counts"]["train"].values()) + sum(found["data"]["counts"]["val"].values()) == 57
    assert "No verdict" in found["comparison"]["verdict"]


def test_unlabeled_images_are_for_every_fold(made, unlabeled, tmp_path):
    changes = {"data.unlabeled": unlabeled, "data.folds": 2}
    path = pipeline.run(made(**changes), output_dir=tmp_path)
    assert [results(path / f"fold-{fold}")["data"]["unlabeled"]["images"] for fold in (1, 2)] == [10, 10]


def test_bad_input_gives_one_message(made, recipe, tmp_path):
    with pytest.raises(DataError, match=r"not enough images for 21 folds: .* 'blue' has 20, .* at most 20 folds"):
        pipeline.run(made(**{"data.folds": 21}), output_dir=tmp_path)
    with pytest.raises(UsageError, match="name one fold"):
        pipeline.run(made(), output_dir=tmp_path, stages=("baseline",))
    with pytest.raises(UsageError, match="name its fold"):
        load_data(made().data)
    for changes, message in (
        ({"data.folds": 1}, "data.folds must be at least 2, got 1"),
        ({"data.fold": 1}, "data.fold: 1 needs data.folds"),
        ({"data.folds": 3, "data.fold": 4}, "data.fold must be 1 to 3"),
        ({"data.folds": 3, "data.target": "digits"}, "the test images are those of data.target"),
        ({"data.folds": 3, "data.labeled": "false"}, "images without labels have none"),
    ):
        with pytest.raises(UsageError, match=message):
            recipe(**changes)
    assert not (tmp_path / "tiny").exists()


def test_a_refused_run_deletes_and_writes_nothing(whole, made, recipe, tmp_path):
    path, _, _ = whole
    single = pipeline.run(recipe(**{"training.epochs": 1}), output_dir=tmp_path, name="single", stages=("baseline",))
    copy = shutil.copytree(path, tmp_path / "tiny")
    before = sorted(file for file in copy.rglob("*") if file.is_file())
    for changes, baseline, words in (
        ({"feature_pairs": "[[a, b]]"}, None, "feature_pairs"),
        ({}, single, "single is no cross-validation, and this run has 3 folds"),
        ({"data.folds": 4}, path, "has no fold 4, and this run has 4 folds"),
        ({"training.lr": 0.1}, path, r"training\.lr: 0\.003 there, 0\.1 here"),
    ):
        for name, flags in (("tiny", {"overwrite": True}), ("new", {})):
            with pytest.raises(UsageError, match=words):
                pipeline.run(made(**changes), output_dir=tmp_path, name=name, baseline=baseline, **flags)
        assert not (tmp_path / "new").exists()
        assert sorted(file for file in copy.rglob("*") if file.is_file()) == before


def test_weights_from_a_file_are_warned_of(whole):
    path, _, _ = whole
    base = {"teacher": {"model": "cifar/resnet8"}, "student": {"model": "cifar/resnet8"}}
    assert describe_outside_weights(load_recipe(base, data_needed=False)) == []
    given = load_recipe(base, [f"teacher.weights={path / 'fold-1' / 'teacher'}"], data_needed=False)
    (warning,) = describe_outside_weights(given)
    assert "knows test images of every fold" in warning
    assert RunFolder(path).folds[0].path == path / "fold-1"
