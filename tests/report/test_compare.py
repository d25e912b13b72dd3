import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.errors import UsageError
from potstill.io import read_checksummed_json, write_checksummed_json, write_checksummed_text
from potstill.report.compare import compare, group_runs
from potstill.report.run_reader import read_run

BuildRun = Callable[..., Any]  # the fixture of conftest.py


def seeds(build_run: BuildRun, count: int = 3) -> list[Path]:
    folders = []
    for seed in range(count):
        builder = build_run(3, name=f"run-{seed}", epochs=1)
        builder.seed = seed
        folders.append(builder.write())
    return folders


def test_mean_deviation_and_paired_difference(build_run: BuildRun, tmp_path: Path) -> None:
    folders = seeds(build_run)
    text = compare(folders, tmp_path / "compare.html").read_text(encoding="utf-8")
    runs = [read_run(folder) for folder in folders]
    top1 = {name: [run.stages[name].metrics["test"]["top1"] for run in runs] for name in runs[0].stages}
    for values in top1.values():
        assert f"{100 * statistics.mean(values):.1f} % ± {100 * statistics.stdev(values):.1f}" in text
    differences = [100 * (b - a) for a, b in zip(top1["baseline"], top1["distilled"], strict=True)]
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    reach = 4.303 * deviation / 3**0.5
    assert f"{mean:+.1f} ± {deviation:.1f}" in text
    assert f"{mean - reach:+.1f} to {mean + reach:+.1f}" in text
    assert "over 3 seeds" in text
    assert not re.search(r"https?://|<script", text)


def test_only_the_seed_may_differ(build_run: BuildRun) -> None:
    folders = seeds(build_run, 2)
    other = build_run(3, name="hotter", epochs=1)
    other.seed, other.changes = 2, {"method": {"name": "kd", "temperature": 8.0, "alpha": 0.5}}
    classes = build_run(4, name="four", epochs=1)
    classes.seed = 3
    recipe = build_run(3, name="longer", epochs=1)
    recipe.seed = 4
    write_checksummed_text(recipe.write() / "recipe.yaml", "name: quickstart\nseed: 4\ntraining: {epochs: 9}\n")
    runs = [read_run(folder) for folder in (*folders, other.write(), classes.write(), recipe.folder)]
    assert [[run.name for run in found.runs] for found in group_runs(runs)] == [
        ["run-0", "run-1"],
        ["hotter"],
        ["four"],
        ["longer"],
    ]


def test_seeds_that_share_one_teacher_belong_together_whichever_run_trained_it(build_run: BuildRun) -> None:
    folders = seeds(build_run, 3)
    for folder, teacher, digest in zip(folders, ("null", "runs/run-0/teacher", "other"), "aab", strict=True):
        text = f"name: {folder.name}\nteacher: {{model: vgg8, weights: {teacher}}}\n"
        write_checksummed_text(folder / "recipe.yaml", text)
        write_checksummed_json(folder / "teacher" / "model.json", {"sha256": digest})
    runs = [read_run(folder) for folder in folders]
    assert [[run.name for run in found.runs] for found in group_runs(runs)] == [["run-0", "run-1"], ["run-2"]]


def test_the_newest_run_of_a_seed_counts(build_run: BuildRun) -> None:
    old = build_run(2, name="old", epochs=1)
    new = build_run(2, name="new", epochs=1)
    new.changes = {"created": "2026-11-23T10:00:00Z"}
    (found,) = group_runs([read_run(new.write()), read_run(old.write())])
    assert [run.name for run in found.runs] == ["new"]
    assert found.repeated == ["old"]


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
