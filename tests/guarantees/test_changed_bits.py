"""G3: one changed bit, a cut or an empty file is one sentence and exit 4, before any parser sees a byte."""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.cli import main
from potstill.distillation.teacher_cache.cache import TeacherCache
from potstill.distillation.teacher_cache.record_format import CacheManifest
from potstill.errors import ArtifactError
from potstill.experiment.run_folder import RunFolder
from potstill.export.evaluate import evaluate
from potstill.models.model_file import load_model
from potstill.report.run_reader import SPLITS, read_predictions, read_run
from potstill.training.checkpointing import load_checkpoint

pytestmark = pytest.mark.own_process

Tiny = Any  # the fixtures of conftest.py
Faults = Any
Said = pytest.CaptureFixture[str]


def flip(path: Path, draw: random.Random) -> bytes:
    """Change one bit; returns what was there."""
    whole = path.read_bytes()
    place, bit = draw.randrange(len(whole)), draw.randrange(8)
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
    return whole


def readers(run: Path) -> dict[Path, Callable[[], object]]:
    """Every file of a run that is ever read again, and how."""
    folder = RunFolder(run)
    found: dict[Path, Callable[[], object]] = {
        folder.recipe: folder.read_recipe,
        folder.environment: folder.read_environment,
        folder.results: folder.read_results,
    }
    for name in ("teacher", "baseline", "distilled"):
        stage = run / name
        found |= {stage / file: lambda stage=stage: load_model(stage) for file in ("model.json", "model.safetensors")}  # type: ignore[misc]
        found |= {path: lambda path=path: load_checkpoint(path) for path in stage.glob("checkpoints/*")}  # type: ignore[misc]
        found |= {stage / file: lambda: read_run(run) for file in ("metrics.json", "metrics.jsonl")}
        found |= {
            stage / f"predictions_{split}.csv": lambda name=name, split=split: read_predictions(  # type: ignore[misc]
                read_run(run).stages[name], split
            )
            for split in SPLITS
        }
    return found


@pytest.mark.parametrize("count", [108, pytest.param(400, marks=pytest.mark.slow)])  # 108: four in each file
def test_every_flipped_bit_is_detected(finished_run: Path, tmp_path: Path, count: int) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    reading, draw = readers(run), random.Random(0)
    files = sorted(reading)
    assert len(files) == 3 + 3 * (2 + 1 + 2 + 3)
    for path in files:
        reading[path]()  # they are whole
    for i in range(count):
        path = files[i % len(files)]
        whole = flip(path, draw)
        with pytest.raises(ArtifactError, match=rf"^\S+{re.escape(path.name)} is damaged[^\n]*$"):
            reading[path]()
        path.write_bytes(whole)


def test_flipped_bits_of_a_store_are_detected(finished_run: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    """Of its records and its manifest; such records are never read.

    400 of each: tests/distillation/teacher_cache/test_cache_faults.py.
    """
    (original,) = (path.parent for path in tiny_recipe.parent.glob("store/*/logits.bin") if path.stat().st_size > 90)
    folder, manifest, draw = tmp_path / original.name, CacheManifest.read(original), random.Random(0)

    def damaged() -> bool:
        store = TeacherCache.open(tmp_path, manifest.identity, manifest.record, manifest.samples, manifest.facts)
        try:
            _, present = store.read(0, np.arange(manifest.samples))
            assert present.all() or store.damaged()
            return bool(store.damaged())
        finally:
            store.close()

    shutil.copytree(original, folder)
    assert not damaged()
    for i in range(45):
        shutil.rmtree(folder)
        shutil.copytree(original, folder)
        path = folder / ("logits.bin", "done.bin", "manifest.json")[i % 3]
        flip(path, draw)
        if path.name == "manifest.json":
            with pytest.raises(ArtifactError, match=r"manifest\.json is"):
                damaged()
        else:
            assert damaged(), path.name


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"half"])
def test_an_empty_or_cut_file_is_one_sentence_and_exit_4(
    finished_run: Path, tiny_recipe: Path, tmp_path: Path, capsys: Said, content: bytes
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(finished_run, run)
    image = next((tiny_recipe.parent / "photographs").rglob("*.png"))
    resume = ["run", str(tiny_recipe), "--output-dir", str(tmp_path), "--resume"]
    for name, arguments in {
        "results.json": ["report", str(run)],
        "teacher/metrics.jsonl": ["report", str(run)],
        "baseline/metrics.json": ["report", str(run)],
        "distilled/confusion_val.csv": ["report", str(run)],
        "distilled/model.json": ["predict", str(run), str(image)],
        "distilled/model.safetensors": ["predict", str(run), str(image)],
        "recipe.yaml": resume,
        "environment.json": resume,
        "teacher/model.safetensors": resume,
    }.items():
        whole = (run / name).read_bytes()
        (run / name).write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
        capsys.readouterr()
        assert main(arguments) == 4, name
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error") or "Trace" in line]
        assert len(said) == 1, said
        assert re.match(rf"error: \S+{re.escape(name)} is damaged", said[0]), said
        (run / name).write_bytes(whole)
    (run / "recipe.yaml").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"recipe\.yaml is damaged"):
        evaluate(run, str(image.parents[1]))


def test_a_damaged_checkpoint_names_the_one_before_it(tiny: Tiny, faults: Faults, tmp_path: Path, capsys: Said) -> None:
    epochs = ("--set", "training.epochs=3")
    with faults(tmp_path) as counted:
        assert tiny(tmp_path / "whole", *epochs) == 0
    at = next(i for i, (_, path) in enumerate(counted.seen) if "model.safetensors" in path)
    root = tmp_path / "killed"
    root.mkdir()

    def doomed() -> int:
        with faults(root, at, faults.die):
            code: int = tiny(root, *epochs)
            return code

    assert faults.forked(doomed) == -9
    last = root / "run" / "baseline" / "checkpoints" / "last.checkpoint"
    previous = last.with_name("last-previous.checkpoint")
    last.write_bytes(last.read_bytes()[:-1])
    assert tiny(root, *epochs, "--resume") == 4
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert error.startswith(f"error: {last} is damaged: ")
    assert error.endswith(f"; {previous} is older and intact: rename it to last.checkpoint to go on from there")
    previous.rename(last)
    assert load_checkpoint(last)[1]["epoch"] == 2
    assert tiny(root, *epochs, "--resume") == 0
    assert tiny.weights(root) == tiny.weights(tmp_path / "whole")
