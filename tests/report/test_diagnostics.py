"""The sections on calibration, the cascade and fidelity."""

from collections.abc import Callable
from typing import Any

import numpy as np

from potstill.evaluation.final_metrics import fit_temperature
from potstill.report import diagnostics
from potstill.report.render import render_page
from potstill.report.run_reader import read_run

BuildRun = Callable[..., Any]
FACTS = {
    "temperature": 1.75,
    "before": {"ece": 0.15, "nll": 0.6, "bins": [[3, 0.5, 0.4], [9, 0.9, 0.75]]},
    "after": {"ece": 0.01, "nll": 0.5, "bins": [[12, 0.75, 0.74]]},
}


def with_calibration(build_run: BuildRun, facts: Any) -> Any:
    run = read_run(build_run(3, test_images=5).write())
    for stage in run.stages.values():
        stage.facts["calibration"] = facts
    return run


def test_a_row_for_each_stage(build_run: BuildRun) -> None:
    run = with_calibration(build_run, FACTS)
    found = diagnostics.calibration_context(run)
    assert found is not None
    assert found["rows"][0] == ("teacher", ["1.75", "15.0 %", "1.0 %", "0.6000", "0.5000"])
    assert 'id="calibration"' in render_page(run)


def test_a_temperature_at_the_end_of_its_range_is_no_advice(build_run: BuildRun) -> None:
    chance = fit_temperature(np.tile([0.9, 0.1], (20, 1)), np.arange(20) % 2)
    run = with_calibration(build_run, FACTS | {"temperature": chance})
    found = diagnostics.calibration_context(run)
    assert found is not None
    assert found["notes"][0].startswith("teacher is no better than chance on val")
    assert "no better than chance" in render_page(run)
    for stage in run.stages.values():
        stage.facts["calibration"] = FACTS | {"temperature": 0.004}
    found = diagnostics.calibration_context(run)
    assert found is not None
    assert found["notes"] == []
    assert found["rows"][0][1][0] == "0.004"


def test_older_and_damaged_facts_say_nothing(build_run: BuildRun) -> None:
    run = with_calibration(build_run, None)
    for facts in (None, [], {"temperature": 2.0}, FACTS | {"after": None}):
        for stage in run.stages.values():
            stage.facts["calibration"] = facts
        assert diagnostics.calibration_context(run) is None
    assert 'id="calibration"' not in render_page(run)


def test_fidelity_is_that_of_the_student(build_run: BuildRun) -> None:
    found = diagnostics.fidelity_context(read_run(build_run(3).write()))
    assert found is not None
    assert [name for name, _ in found["rows"]] == ["distilled"]
    assert found["rows"][0][1][2] == ("91.3 %", "0.2100")


CASCADE = {
    "student": "distilled",
    "teachers": ["teacher"],
    "calibration_images": 400,
    "candidates": 8,
    "confidence": 0.95,
    "smallest_risk": 0.0126,
    "curve": [[0.0, 0.8], [0.5, 0.95], [1.0, 0.9]],
    "risks": [
        {"risk": 0.01},
        {
            "risk": 0.05,
            "threshold": 0.8125,
            "deferred_calibration": 0.3,
            "deferred": 0.25,
            "top1": 0.88,
            "lost": 0.02,
            "lost_low": 0.01,
            "lost_high": 0.04,
        },
    ],
}


def test_a_row_for_each_promised_risk(build_run: BuildRun) -> None:
    run = read_run(build_run(3, test_images=5).write())
    run.results["cascade"] = CASCADE
    found = diagnostics.cascade_context(run)
    assert found is not None
    assert found["rows"][0][1][0] == "cannot be promised"
    # 1.4 ms of the student, and a quarter of the teacher's 4.2 ms
    assert found["rows"][1] == ("5 %", ["0.812", "25.0 %", "2.0 % (1.0 % to 4.0 %)", "88.0 %", "2.45 ms"])
    page = render_page(run)
    assert 'id="cascade"' in page
    assert "whichever of the 8 candidates" in page
    assert "--cascade --risk 0.05<" in page
    run.results["cascade"] = CASCADE | {"smallest_risk": 0.0973}
    assert "--cascade --risk 0.0973<" in render_page(run)  # 0.05 would be refused


def test_a_run_without_a_cascade_has_no_section(build_run: BuildRun) -> None:
    run = read_run(build_run(3, test_images=5).write())
    for facts in (None, {}, CASCADE | {"curve": []}, CASCADE | {"curve": [[0.0, None]]}, CASCADE | {"risks": None}):
        run.results["cascade"] = facts
        assert diagnostics.cascade_context(run) is None
    assert 'id="cascade"' not in render_page(run)
