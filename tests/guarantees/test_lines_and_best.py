"""G3: figures of epochs that are over, and the best weights so far, cannot be changed behind a run's back; G4: nor read
while they are written."""

import re
from pathlib import Path
from typing import Any

import pytest

from potstill.cli import main
from potstill.experiment.run_folder import RunFolder
from potstill.training.checkpointing import load_checkpoint, strip_prefix

pytestmark = pytest.mark.own_process

Tiny = Any  # the fixtures of conftest.py
Faults = Any
Said = pytest.CaptureFixture[str]
EPOCHS = ("--set", "training.epochs=3")


def killed(tiny: Tiny, faults: Faults, root: Path, before: str) -> Path:
    """A run of three epochs that was killed before it wrote such a file; the stage's folder."""
    with faults(root) as counted:
        assert tiny(root / "whole", *EPOCHS) == 0
    at = next(i for i, (_, path) in enumerate(counted.seen) if before in path)
    place = root / "killed"
    place.mkdir()

    def doomed() -> int:
        with faults(place, at, faults.die):
            code: int = tiny(place, *EPOCHS)
            return code

    assert faults.forked(doomed) == -9
    return place / "run" / "baseline"


def error_of(capsys: Said) -> str:
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return error


def test_either_checkpoint_is_all_that_is_needed(tiny: Tiny, faults: Faults, tmp_path: Path) -> None:
    stage = killed(tiny, faults, tmp_path, "model.safetensors")
    folder = stage / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last-previous.checkpoint", "last.checkpoint"]
    for name, epochs in (("last", 3), ("last-previous", 2)):
        tensors, facts = load_checkpoint(folder / f"{name}.checkpoint")
        best = strip_prefix("best", tensors)
        picked = [record["epoch"] for record in facts["records"] if record["best"]][-1]
        assert facts["epoch"] == epochs
        assert facts["best_epoch"] == picked
        student = {name for name in strip_prefix("distiller", tensors) if name.startswith("student.")}
        assert {f"student.{name}" for name in best} == student
    (folder / "last-previous.checkpoint").rename(folder / "last.checkpoint")
    root = tmp_path / "killed"
    assert tiny(root, *EPOCHS, "--resume") == 0
    assert tiny.weights(root) == tiny.weights(tmp_path / "whole")


def test_a_changed_line_is_named_when_a_training_goes_on(
    tiny: Tiny, faults: Faults, tmp_path: Path, capsys: Said
) -> None:
    stage = killed(tiny, faults, tmp_path, "model.safetensors")
    path, root = stage / "metrics.jsonl", tmp_path / "killed"
    whole = path.read_text()
    path.write_text(whole.replace('"epoch": 2', '"epoch": 9'))
    capsys.readouterr()
    assert tiny(root, *EPOCHS, "--resume") == 4
    assert re.search(r"metrics\.jsonl is damaged: line 2 is not the one.*--resume writes it again$", error_of(capsys))
    path.unlink()
    assert tiny(root, *EPOCHS, "--resume") == 0
    assert [line.split(", ")[0] for line in path.read_text().splitlines()] == [
        line.split(", ")[0] for line in whole.splitlines()
    ]


def test_a_changed_line_is_named_when_results_are_written(
    tiny: Tiny, tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, path = RunFolder.write_metrics, tmp_path / "run" / "baseline" / "metrics.jsonl"

    def meanwhile(self: RunFolder, *arguments: Any) -> None:
        path.write_text(path.read_text().replace("0", "1", 1))
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_metrics", meanwhile)
        assert tiny(tmp_path) == 4
    assert "line 1 is not the one that was written" in error_of(capsys)
    assert not (tmp_path / "run" / "results.json").exists()
    assert tiny(tmp_path, "--resume") == 4  # the stage is done: its model knows
    assert "line 1 is not the one that was written" in error_of(capsys)
    path.unlink()
    assert tiny(tmp_path, "--resume") == 0


def test_a_run_that_is_being_written_is_not_read(tiny: Tiny, tmp_path: Path, capsys: Said) -> None:
    assert tiny(tmp_path) == 0
    run = tmp_path / "run"
    page = str(tmp_path / "comparison.html")
    writer = RunFolder(run)
    writer.acquire()
    for arguments in (["report", str(run)], ["report", str(run), str(run), "--output", page]):
        capsys.readouterr()
        assert main(arguments) == 5
        assert error_of(capsys) == f"error: {run} is being written by another process; wait for it"
    writer.__exit__(None, None, None)
    for arguments in (["report", str(run)], ["report", str(run), str(run), "--output", page]):
        assert main(arguments) == 0
    other = tmp_path / "photographs"
    other.mkdir()
    assert main(["report", str(other)]) == 4
    assert list(other.iterdir()) == []
