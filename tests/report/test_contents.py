import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.errors import ArtifactError
from potstill.report.contents import read_run

BuildRun = Callable[..., Any]  # the fixture of conftest.py


def test_a_whole_run(build_run: BuildRun) -> None:
    run = read_run(build_run(4, epochs=5).write())
    assert list(run.stages) == ["teacher", "baseline", "distilled"]
    assert [record["epoch"] for record in run.stages["teacher"].epochs] == [1, 2, 3, 4, 5]
    assert run.stages["teacher"].best_epoch == 3
    assert list(run.stages["distilled"].metrics) == ["train", "val", "test"]
    assert sum(map(sum, run.stages["distilled"].confusion("test", 4) or [])) == 4 * 27


def test_ready_teacher_and_missing_stage(build_run: BuildRun) -> None:
    builder = build_run(2, epochs=1)
    builder.ready_teacher, builder.stages = True, ("teacher", "baseline")
    run = read_run(builder.write())
    assert list(run.stages) == ["teacher", "baseline"]
    assert run.stages["teacher"].epochs == []
    assert run.stages["teacher"].training == {}
    assert run.stages["teacher"].best_epoch is None
    assert run.comparison is None
    assert run.best_k == 2


def test_epochs_written_twice_and_a_last_line_cut_short(build_run: BuildRun) -> None:
    folder = build_run(2, epochs=3).write()
    with (folder / "baseline" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "again": true}\n{"epoch": 4, "tra')
    epochs = read_run(folder).stages["baseline"].epochs
    assert [record["epoch"] for record in epochs] == [1, 2, 3]
    assert epochs[1] == {"epoch": 2, "again": True}


def test_damage_is_named(build_run: BuildRun) -> None:
    folder = build_run(2, epochs=3).write()
    path = folder / "baseline" / "metrics.jsonl"
    path.write_text("{\n" + path.read_text())
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl is damaged in line 1"):
        read_run(folder)


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no results\.json"):
        read_run(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ArtifactError, match="damaged"):
        read_run(tmp_path)
    (tmp_path / "results.json").write_text('{"schema": 2, "stages": {}}')
    with pytest.raises(ArtifactError, match="schema 2; this potstill reads schema 1"):
        read_run(tmp_path)


def test_a_stage_name_is_no_path(build_run: BuildRun) -> None:
    folder = build_run(2, epochs=1).write()
    results = json.loads((folder / "results.json").read_text())
    results["stages"]["../elsewhere"] = results["stages"]["teacher"]
    (folder / "results.json").write_text(json.dumps(results))
    assert list(read_run(folder).stages) == ["teacher", "baseline", "distilled"]


def test_a_matrix_of_other_classes(build_run: BuildRun) -> None:
    run = read_run(build_run(4, epochs=1).write())
    with pytest.raises(ArtifactError, match="not for 3 classes"):
        run.stages["teacher"].confusion("test", 3)
