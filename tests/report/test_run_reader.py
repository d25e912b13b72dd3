import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.errors import ArtifactError
from potstill.io import read_checksummed_json, write_checksummed_json
from potstill.report.run_reader import read_run

BuildRun = Callable[..., Any]  # the fixture of conftest.py


def test_a_whole_run(build_run: BuildRun) -> None:
    run = read_run(build_run(4, epochs=5).write())
    assert list(run.stages) == ["teacher", "baseline", "distilled"]
    assert [record["epoch"] for record in run.stages["teacher"].epochs] == [1, 2, 3, 4, 5]
    assert run.stages["teacher"].best_epoch == 3
    assert list(run.stages["distilled"].metrics) == ["train", "val", "test"]
    matrix = run.stages["distilled"].confusion("test", 4)
    assert matrix is not None
    assert matrix.sum(axis=1).tolist() == [27] * 4
    with pytest.raises(ArtifactError, match="not for 3 classes"):
        read_run(run.folder).stages["distilled"].confusion("test", 3)


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


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.json"])
def test_damage_is_seen_before_anything_is_parsed(build_run: BuildRun, name: str) -> None:
    folder = build_run(2, epochs=3).write()
    path = folder / "baseline" / name
    path.write_text(path.read_text().replace("0.", "1.", 1))
    with pytest.raises(ArtifactError, match=rf"baseline/{name} is damaged: its SHA-256"):
        read_run(folder)


def test_a_file_of_another_run_is_refused(build_run: BuildRun) -> None:
    folder, other = build_run(2, epochs=3), build_run(2, name="other", epochs=3)
    folder.ready_teacher = True
    (other.write() / "teacher" / "metrics.jsonl").rename(folder.write() / "teacher" / "metrics.jsonl")
    with pytest.raises(ArtifactError, match=r"teacher/metrics\.jsonl is none of the files that results\.json lists"):
        read_run(folder.folder)


@pytest.mark.parametrize("text", ["[]\n", "{\n", '{"epoch": "1"}\n', "[" * 100_000])
def test_made_up_epochs_are_no_traceback(build_run: BuildRun, text: str) -> None:
    folder = build_run(2, epochs=3).write()
    (folder / "baseline" / "metrics.jsonl").write_text(text)
    results = read_checksummed_json(folder / "results.json")
    results["files"]["baseline/metrics.jsonl"] = hashlib.sha256(text.encode()).hexdigest()
    write_checksummed_json(folder / "results.json", results)
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl is damaged"):
        read_run(folder)


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no results\.json"):
        read_run(tmp_path)
    (tmp_path / "results.json").write_text('{"schema": 1, "stages": {}}\n')
    with pytest.raises(ArtifactError, match=r"is damaged, or was written before potstill 0\.1\.0"):
        read_run(tmp_path)
    write_checksummed_json(tmp_path / "results.json", {"schema": 1, "stages": {}})
    with pytest.raises(ArtifactError, match="'stages' and 'files'"):
        read_run(tmp_path)
    write_checksummed_json(tmp_path / "results.json", {"schema": 2, "stages": {}})
    with pytest.raises(ArtifactError, match="schema 2; this potstill reads schema 1"):
        read_run(tmp_path)


def test_a_stage_name_is_no_path(build_run: BuildRun) -> None:
    folder = build_run(2, epochs=1).write()
    results = read_checksummed_json(folder / "results.json")
    results["stages"]["../elsewhere"] = results["stages"]["teacher"]
    write_checksummed_json(folder / "results.json", results)
    assert list(read_run(folder).stages) == ["teacher", "baseline", "distilled"]


def test_a_matrix_of_other_classes(build_run: BuildRun) -> None:
    run = read_run(build_run(4, epochs=1).write())
    with pytest.raises(ArtifactError, match="not for 3 classes"):
        run.stages["teacher"].confusion("test", 3)
