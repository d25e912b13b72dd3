"""The table of a run: figures with their intervals, costs, seeds; and how to reproduce it."""

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.errors import ArtifactError
from potstill.io import read_checksummed_json, write_checksummed_json
from potstill.report import overview
from potstill.report.render import render, render_page, reproduce_context
from potstill.report.run_reader import read_run

BuildRun = Callable[..., Any]  # the fixture of conftest.py


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """results.json with a change, sealed again."""
    results = read_checksummed_json(folder / "results.json")
    edit(results)
    write_checksummed_json(folder / "results.json", results)
    return folder


@pytest.fixture
def run(build_run: BuildRun) -> Path:
    def edit(results: dict[str, Any]) -> None:
        for stage in results["stages"].values():
            stage["test"]["top1"] = 0.8
            stage["test_intervals"] = {"top1": [0.75, 0.84], "nll": [0.3, 0.5], "f1_macro": None}
            stage["memory"] = {"weights": 320_000, "activations": 65_536, "batch": 1}

    folder: Path = build_run(3, epochs=1).write()
    return change(folder, edit)


def text(source: str) -> str:
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", source)).split())


def test_a_warning_of_several_lines_is_one_paragraph(run: Path) -> None:
    change(run, lambda results: results.update(warnings=["it is missing:\n  Run `get it`"]))
    page = text(render_page(read_run(run)))
    assert "it is missing: Run `get it`" in page
    assert "x0a" not in page


def rows(run: Path) -> dict[str, Any]:
    found = overview.comparison_context(read_run(run))
    assert found is not None
    return found


def test_each_figure_has_its_interval_below(run: Path) -> None:
    found = {row["name"]: row["cells"] for row in rows(run)["results"]}
    assert found["NLL (lower is better)"][0] == ("0.4100", "0.3000 to 0.5000")
    assert found["F1, macro"][0][1] == ""  # not known, nothing said
    # metrics.json, which is read for the figures, has its own top-1
    assert [sure for _, sure in found["Top-1"]] == ["75.0 to 84.0 %"] * 3
    assert "75.0 to 84.0 %" in text(render_page(read_run(run)))


def test_costs(run: Path) -> None:
    costs = dict(rows(run)["costs"])
    assert costs["Latency of one image, p50"] == ["4.20 ms", "1.40 ms", "1.40 ms"]
    assert costs["Latency of one image, p95"] == ["5.04 ms", "1.68 ms", "1.68 ms"]
    assert costs["Memory: weights"] == ["320 kB"] * 3
    assert costs["Peak activation memory (batch 1)"] == ["65.5 kB"] * 3


def test_costs_that_an_older_run_does_not_know_are_left_out(build_run: BuildRun) -> None:
    costs = dict(rows(build_run(3, epochs=1).write())["costs"])
    assert "Parameters" in costs
    assert not [name for name in costs if "images" in name or "Memory" in name]


def seeds(results: dict[str, Any]) -> None:
    results["comparison"]["seeds"] = {
        "seeds": [3, 4],
        "each": [
            {"seed": 3, "top1_gain": 0.01, "top1_gain_low": -0.01, "top1_gain_high": 0.03, "fixed": 5, "broken": 2},
            {"seed": 4, "top1_gain": 0.03, "fixed": 7, "broken": 1, "mcnemar_p": 0.07},
        ],
        "figures": {
            "top1": {"n": 2, "mean_a": 0.8, "sd_a": 0.01, "mean_b": 0.82, "sd_b": 0.02, "difference": 0.02}
            | {"difference_sd": 0.0141, "difference_low": -0.107, "difference_high": 0.147}
        },
        "top1_gain": {"value": 0.02, "low": -0.09, "high": 0.13, "p": 0.3, "confidence": 0.95, "seed_share": 0.5},
        "gap": 0.1,
        "gap_low": 0.05,
        "gap_high": 0.15,
        "gap_closed": 0.2,
    }


def test_several_seeds_are_means_with_deviations_and_a_row_each(build_run: BuildRun) -> None:
    builder = build_run(3, epochs=1)
    builder.stages = ("teacher", "baseline", "distilled", "baseline-2", "distilled-2")
    folder = builder.write()

    def edit(results: dict[str, Any]) -> None:
        names = ("baseline-2", "distilled-2")
        results["repeats"] = {name: results["stages"].pop(name) for name in names}
        results["comparison"] = {"top1_gain": 0.01, "top1_gain_low": -0.01, "top1_gain_high": 0.03}
        results["looks"] = {"test_evaluations": 2}
        seeds(results)

    assert "On test, which was read once, at the end" in render_page(read_run(folder))
    made = read_run(change(folder, edit))
    assert "On test, which was read 2 times, as the run was extended" in render_page(made)
    assert list(made.stages) == ["teacher", "baseline", "distilled"]
    assert list(made.repeats) == ["baseline-2", "distilled-2"]
    found = rows(folder)
    cells = {row["name"]: row for row in found["results"]}["Top-1"]
    assert cells["cells"][1:] == [("80.0 %", "± 1.0"), ("82.0 %", "± 2.0")]
    assert cells["difference"] == ("+2.0", "-9.0 to +13.0")
    second = made.repeats["distilled-2"].metrics["test"]["top1"]
    assert found["seeds"][0][0] == "3"
    assert found["seeds"][0][3] == "+1.0 (-1.0 to +3.0)"
    assert found["seeds"][1][2:] == [f"{100 * second:.1f} %", "+3.0", "7 / 1", "0.070"]
    lines = (overview.verdict_context(made) or {})["lines"]
    assert [line["label"] for line in lines] == ["+2.0 points, 95 % interval -9.0 to +13.0 over seeds and test images"]
    assert "Not part of this run" not in render_page(made)
    render(folder)
    assert "distilled-2 of run quickstart" in (folder / "distilled-2" / "metrics.txt").read_text(encoding="utf-8")
    assert not list((folder / "distilled-2").glob("*.png"))


def test_repeats_that_are_no_object_are_damage(build_run: BuildRun) -> None:
    folder = change(build_run(3, epochs=1).write(), lambda results: results.update(repeats=[1]))
    with pytest.raises(ArtifactError, match="damaged"):
        read_run(folder)


def test_a_repeats_name_cannot_leave_the_folder(build_run: BuildRun) -> None:
    folder = change(build_run(3, epochs=1).write(), lambda results: results.update(repeats={"../../evil": {}}))
    assert read_run(folder).repeats == {}


def test_how_to_reproduce(build_run: BuildRun) -> None:
    builder = build_run(3, epochs=1)
    builder.seed = 3
    folder = change(builder.write(), seeds)
    found = reproduce_context(read_run(folder))
    assert found is not None
    commands = [command for _, command in found["commands"]]
    assert commands == [
        "potstill run runs/quickstart/recipe.yaml --name quickstart-again",
        "potstill run --reproduce runs/quickstart",
        "potstill predict runs/quickstart IMAGE.jpg",
        "potstill report runs/quickstart",
    ]
    facts = dict(found["facts"])
    assert facts["Seeds"] == "3, 4 of baseline and distilled; 3 of all others"
    assert facts["Versions"] == "Python 3.11.9"  # the made-up environment knows no packages
    assert "recipe.yaml" in render_page(read_run(folder))


def test_the_text_file_says_the_same(run: Path) -> None:
    render(run)
    lines = (run / "distilled" / "metrics.txt").read_text(encoding="utf-8").splitlines()
    assert "Memory        320 kB of weights, 65.5 kB of activations at most (batch 1)" in lines
    (top1,) = [line for line in lines if line.startswith("Top-1")]
    assert top1.endswith("75.0 to 84.0 %")
    (nll,) = [line for line in lines if line.startswith("NLL")]
    assert nll.endswith("0.3000 to 0.5000")
    assert any("95 % interval on test" in line for line in lines)


def test_flips_against_the_model_in_use(build_run: BuildRun) -> None:
    run = read_run(build_run(3, test_images=5).write())
    assert overview.flips_context(run) is None
    row = {"negative": 3, "positive": 9, "rate": 0.03, "rate_low": 0.01, "rate_high": 0.085}
    facts = {"images": 100, "previous_correct": 80, "students": {"baseline": row | {"negative": 7}, "distilled": row}}
    run.results["flips"] = facts | {"difference": -0.04, "difference_low": -0.09, "difference_high": 0.01}
    found = overview.flips_context(run)
    assert found is not None
    assert found["rows"][1] == ("distilled", ["3", "9", "3.0 % (1.0 % to 8.5 %)"])
    assert "-4.0" in found["sentence"].replace("\N{MINUS SIGN}", "-")
    assert "no clear difference" in found["sentence"]
    assert 'id="flips"' in render_page(run)
    run.results["flips"]["difference_high"] = -0.01
    assert "no clear difference" not in (overview.flips_context(run) or {})["sentence"]
