import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.errors import UsageError
from potstill.io import read_checksummed_json, write_checksummed_json, write_checksummed_text
from potstill.report.compare import compare

BuildRun = Callable[..., Any]  # the fixture of conftest.py


def test_runs_of_one_stage(build_run: BuildRun, tmp_path: Path) -> None:
    builder = build_run(2, epochs=1)
    builder.stages = ("baseline",)
    text = compare([builder.write()], tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "1 run compared" in text


def test_no_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none was given"):
        compare([], tmp_path / "compare.html")


def test_settings_that_differ_views_that_differ_and_a_baseline_called_one(build_run: BuildRun, tmp_path: Path) -> None:
    distilled = build_run(3, name="whole", epochs=1)
    baseline = build_run(3, name="alone", epochs=1)
    baseline.stages = ("baseline",)
    folders = [distilled.write(), baseline.write()]
    texts = (
        "name: whole\nseed: 0\ntraining: {lr: 0.1, epochs: 9}\nteacher: {weights: null, classes: []}\n",
        "name: alone\nseed: 0\ntraining: {lr: 0.2, epochs: 9}\n",
    )
    for folder, text, seed in zip(folders, texts, (0, 3), strict=True):
        write_checksummed_text(folder / "recipe.yaml", text)
        results = read_checksummed_json(folder / "results.json")
        for stage in results["stages"].values():
            stage["views"] = {"count": 8, "augmentation_seed": seed, "sha256": str(seed)}
        write_checksummed_json(folder / "results.json", results)
    text = compare(folders, tmp_path / "compare.html").read_text(encoding="utf-8")
    table = text.split("Settings that differ</h2>")[1].split("</table>")[0]
    assert re.findall(r'<th scope="row"[^>]*>([^<]+)</th>', table) == ["training.lr"]
    assert re.findall(r"<td[^>]*><bdi>([^<]+)</bdi></td>", table) == ["0.1", "0.2"]
    assert "alone (baseline)" in table
    assert "alone (kd)" not in text
    assert "were not trained on the same views of the images (augmentation seeds 0 and 3)" in text


def test_equal_views_are_not_worth_a_word(build_run: BuildRun, tmp_path: Path) -> None:
    folders = [build_run(3, name=name, epochs=1).write() for name in ("one", "two")]
    for folder, temperature in zip(folders, (2, 4), strict=True):
        write_checksummed_text(folder / "recipe.yaml", f"method: {{name: kd, temperature: {temperature}}}\n")
        results = read_checksummed_json(folder / "results.json")
        for stage in results["stages"].values():
            stage["views"] = {"count": 8, "augmentation_seed": 0, "sha256": "same"}
        write_checksummed_json(folder / "results.json", results)
    text = compare(folders, tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "method.temperature" in text
    assert "same views" not in text
