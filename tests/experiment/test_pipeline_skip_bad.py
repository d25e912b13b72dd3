"""``data.skip_bad`` in a run: what is left out is listed, said, kept in the recipe, and the same on resume."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from potstill.config.recipe import load_recipe
from potstill.errors import DataError, UsageError
from potstill.experiment import pipeline
from potstill.models.model_file import load_model
from potstill.report.render import render
from potstill.training.callbacks import SilentObserver


@pytest.fixture(scope="module")
def folder(photographs, tmp_path_factory) -> Path:
    """The photographs, with two bad files and a class that is too small."""
    copy = tmp_path_factory.mktemp("ill") / "photographs"
    shutil.copytree(photographs, copy)
    first = sorted(path for path in copy.iterdir())[0]
    (first / "empty.png").touch()
    (first / "text.png").write_text("words")
    (copy / "tiny").mkdir()
    shutil.copy(first / "00.png", copy / "tiny")
    (copy / "bad").mkdir()
    (copy / "bad" / "0.png").touch()
    return copy


def recipe(folder: Path, **data: object):
    return load_recipe(
        {
            "name": "tiny",
            "data": {"source": str(folder), "size": 16, "workers": 0, "resize_mode": "pad", **data},
            "teacher": {"model": "cifar/resnet8"},
            "student": {"model": "cifar/resnet8"},
            "training": {"epochs": 1, "batch_size": 16, "precision": "float32", "threads": 1},
        },
        flags={"--skip-bad": True},
    )


class Told(SilentObserver):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_a_run_lists_what_it_leaves_out_and_goes_on_with_the_same(folder: Path, tmp_path: Path) -> None:
    told = Told()
    run = pipeline.run(recipe(folder), output_dir=tmp_path, stages=("baseline",), observer=told)

    with (run / "skipped.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "kind", "reason"]
    assert sorted((Path(path).name, kind) for path, kind, _ in rows) == [
        ("0.png", "empty-file"), ("bad", "empty-class"), ("empty.png", "empty-file"), ("text.png", "no-image"),
        ("tiny", "too-few"),
    ]  # fmt: skip
    results = json.loads((run / "results.json").read_text())
    assert results["data"]["skipped"] == 5
    assert len(results["data"]["class_names"]) == 3
    assert "skipped.csv" in results["files"]
    (warning,) = [each for each in results["warnings"] if "skip_bad" in each]
    assert "2 x empty files" in warning
    assert "1 x empty classes" in warning
    # 16 of 20 pixels: the longer side fills the square
    assert results["data"]["unseen"] == ["20 % of the median image's square is black border"]
    assert any(note.endswith("20 % of the median image's square is black border") for note in told.notes)
    page = render(run).read_text()
    assert "5, listed in skipped.csv" in page
    assert load_model(run / "baseline").input.resize_mode == "pad"

    pipeline.run(recipe(folder), output_dir=tmp_path, stages=("baseline",), resume=True)
    with pytest.raises(UsageError, match=r"data\.skip_bad: was True, now False"):
        pipeline.run(recipe(folder).model_copy(update={"data": recipe(folder).data.model_copy(
            update={"skip_bad": False})}), output_dir=tmp_path, stages=("baseline",), resume=True)  # fmt: skip
    (next(folder.glob("*/00.png"))).write_text("now bad too")
    with pytest.raises(UsageError, match=r"(?s)same images.*gone: \w+/00\.png"):
        pipeline.run(recipe(folder), output_dir=tmp_path, stages=("baseline",), resume=True)


def test_data_of_which_too_little_is_left_say_what_was_left_out(photographs, tmp_path: Path) -> None:
    shutil.copytree(photographs, tmp_path / "photographs")
    for file in sorted((tmp_path / "photographs").glob("*/*.png"))[10:]:
        file.write_bytes(b"")
    with pytest.raises(
        DataError, match=r"found only '\w+'\n--skip-bad left out \d+ files and classes, such as .*: empty"
    ):
        pipeline.run(recipe(tmp_path / "photographs"), output_dir=tmp_path / "runs", stages=("baseline",))
