"""Runs against each other: only on the same test images, image by image, seed by seed."""

import hashlib
import html
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.evaluation.significance import crossed_interval, mcnemar
from potstill.report.compare import (
    MAX_ALL_PAIRS,
    Contender,
    compare,
    pair_contenders,
    pairing_row,
    read_contender,
)
from potstill.report.run_reader import read_run

BuildRun = Callable[..., Any]  # the fixture of conftest.py


def made(build_run: BuildRun, name: str, method: str, *, seed: int = 0, classes: int = 3, **options: Any) -> Path:
    builder = build_run(classes, name=name, epochs=1, **options)
    builder.seed, builder.changes = seed, {"method": {"name": method}}
    found: Path = builder.write()
    return found


def entrants(*folders: Path) -> list[Any]:
    return [read_contender(folder.name, read_run(folder)) for folder in folders]


def right(folder: Path, stage: str = "distilled") -> np.ndarray[Any, Any]:
    rows = [line.split(",")[1:3] for line in (folder / stage / "predictions_test.csv").read_text().splitlines()[1:]]
    return np.array([label == said for label, said in rows])


def test_two_methods_on_the_same_images(build_run: BuildRun) -> None:
    first, second = made(build_run, "a", "kd"), made(build_run, "b", "dkd", seed=5)
    (meeting,), notes = pair_contenders(entrants(first, second))
    before, after = right(first), right(second)
    assert meeting.gain.value == pytest.approx(after.mean() - before.mean())
    assert meeting.p == pytest.approx(mcnemar(before, after)["p"])
    assert meeting.seeds == 1
    assert pairing_row(meeting)["verdict"] == "too few seeds for a verdict: 3 or more are needed"
    assert notes == ["a and b share no seed: they are paired in the order of their seeds"]


def several_seeds(build_run: BuildRun, name: str, method: str, seed: int) -> Path:
    """A run of three seeds, the first of which is ``seed``."""
    builder = build_run(3, name=name, epochs=1)
    builder.seed, builder.changes = seed, {"method": {"name": method}}
    builder.stages = ("teacher", "baseline", "distilled", "baseline-2", "distilled-2", "baseline-3", "distilled-3")
    whole = builder._results

    def split(stages: dict[str, Any]) -> dict[str, Any]:
        first = {name: stages[name] for name in ("teacher", "baseline", "distilled")}
        found: dict[str, Any] = whole(first)
        return found | {"repeats": {name: stages[name] for name in stages if name not in first}}

    builder._results = split
    folder: Path = builder.write()
    return folder


def test_seeds_are_paired_by_their_number(build_run: BuildRun) -> None:
    first, second = (several_seeds(build_run, *each) for each in (("a", "kd", 0), ("b", "dkd", 1)))
    found = entrants(first, second)
    assert [list(each.correct) for each in found] == [[0, 1, 2], [1, 2, 3]]
    (meeting,), notes = pair_contenders(found)
    assert notes == []
    a = np.array([right(first, "distilled-2"), right(first, "distilled-3")])
    b = np.array([right(second, "distilled"), right(second, "distilled-2")])
    assert meeting.seeds == 2
    assert meeting.gain.value == pytest.approx((b.mean(axis=1) - a.mean(axis=1)).mean())


def test_cross_validations_are_compared_over_their_folds() -> None:
    images = tuple((f"{i}.png", "a") for i in range(60))
    folds, rng = np.arange(60) % 5, np.random.default_rng(0)
    sides = [rng.random((2, 60)) < 0.7, rng.random((2, 60)) < 0.8]
    first, second = (
        Contender(name, {}, images, dict(enumerate(correct)), folds=folds)
        for name, correct in zip("ab", sides, strict=True)
    )
    (meeting,), notes = pair_contenders([first, second])
    expected = crossed_interval(*sides, folds=folds)
    assert (meeting.gain.low, meeting.gain.high, meeting.p) == (expected.low, expected.high, expected.p)
    assert meeting.p != crossed_interval(*sides).p
    assert notes == []
    assert pairing_row(meeting)["verdict"] in ("no clear difference", "b is better")  # five folds suffice
    few = [replace(each, folds=folds % 2, correct={0: each.correct[0]}) for each in (first, second)]
    assert pairing_row(pair_contenders(few)[0][0])["verdict"] == "too few folds for a verdict: 5 or more are needed"
    for other in (replace(second, folds=folds[::-1]), replace(second, folds=None)):
        meetings, (note,) = pair_contenders([first, other])
        assert meetings == []
        assert "cross-validations with different folds" in note


def test_other_test_images_are_not_compared_and_it_is_said(build_run: BuildRun, tmp_path: Path) -> None:
    first, fewer = made(build_run, "a", "kd"), made(build_run, "few", "dkd", test_images=9)
    meetings, (note,) = pair_contenders(entrants(first, fewer))
    assert meetings == []
    # 27 images: nine of each class, of which the first nine are of the first class in both
    assert note == (
        "a and few are not compared image by image: they were tested on different images (81 and 27, of which 9 have "
        "the same name and label), so the difference of their figures means nothing"
    )
    page = html.unescape(compare([first, fewer], tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "a (kd) and few (dkd) are not compared image by image" in page


def test_the_same_names_under_other_labels_are_other_images(build_run: BuildRun) -> None:
    folders = [made(build_run, "a", "kd"), made(build_run, "b", "dkd")]
    path = folders[1] / "distilled" / "predictions_test.csv"
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace("class 0", "class 1", 1)
    path.write_text("\n".join(lines) + "\n")
    found = []
    for folder in folders:
        run = read_run(folder)
        stage = run.stages["distilled"]
        content = (stage.folder / "predictions_test.csv").read_bytes()
        stage.files["predictions_test.csv"] = hashlib.sha256(content).hexdigest()
        found.append(read_contender(run.name, run))
    meetings, (note,) = pair_contenders(found)
    assert meetings == []
    assert "of which 80 have the same name and label" in note


def test_other_data_under_the_same_names_are_mentioned(build_run: BuildRun) -> None:
    first = build_run(3, name="a", epochs=1)
    other = build_run(3, name="b", epochs=1)
    data = {"source": "digits", "fingerprint": "e" * 64, "class_names": ["class 0", "class 1", "class 2"], "counts": {}}
    other.changes = {"data": data}
    meetings, notes = pair_contenders(entrants(first.write(), other.write()))
    assert len(meetings) == 1
    assert "their data differ elsewhere" in notes[0]


def test_many_pairs_raise_p(build_run: BuildRun) -> None:
    folders = [made(build_run, name, name, seed=at) for at, name in enumerate(("kd", "dkd", "dist"))]
    meetings, _ = pair_contenders(entrants(*folders))
    assert [(each.first, each.second) for each in meetings] == [("kd", "dkd"), ("kd", "dist"), ("dkd", "dist")]
    by_p = sorted(meetings, key=lambda each: each.p)
    expected, highest = [], 0.0
    for times, each in zip((3, 2, 1), by_p, strict=True):  # Holm (1979), by hand
        highest = max(highest, min(1.0, times * each.p))
        expected.append(highest)
    assert [each.adjusted for each in by_p] == pytest.approx(expected)
    assert all("better" not in pairing_row(each)["verdict"] for each in meetings)  # of one seed each


def test_of_many_runs_each_meets_the_first(build_run: BuildRun) -> None:
    folders = [made(build_run, f"m{at}", f"m{at}") for at in range(MAX_ALL_PAIRS + 1)]
    meetings, _ = pair_contenders(entrants(*folders))
    assert [each.first for each in meetings] == ["m0"] * MAX_ALL_PAIRS


def test_a_run_of_several_seeds_counts_with_each(build_run: BuildRun, tmp_path: Path) -> None:
    folder = several_seeds(build_run, "five", "kd", 0)
    text = compare([folder, made(build_run, "other", "dkd")], tmp_path / "page.html").read_text(encoding="utf-8")
    plain = " ".join(html.unescape(re.sub("<[^>]+>", " ", text)).split())
    tops = [right(folder, f"distilled{end}").mean() for end in ("", "-2", "-3")]
    each = " ".join(f"{100 * top:.1f} %" for top in tops)
    assert f"five (kd) {each} {100 * np.mean(tops):.1f} % ± {100 * np.std(tops, ddof=1):.1f}" in plain
    assert not re.search(r"https?://|<script", text)
