"""G1: SIGKILL in mid-save leaves a whole older or newer file, never less than was reported as saved."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill import io
from potstill.errors import StorageError
from potstill.input_spec import InputSpec
from potstill.models.factory import create_model
from potstill.models.model_file import Classifier, load_model, save_model
from potstill.training.checkpointing import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.own_process
Faults = Any  # the fixture of conftest.py


def killed(save: Callable[[int], None], folder: Path, done: int, faults: Faults, draw: random.Random) -> int:
    """Let a forked process save ``done + 1`` and so on, and die at one of its calls; the last that it reported."""
    reading, report = os.pipe()
    at, written = draw.randrange(30), draw.random()  # within the first four saves or so

    def doomed() -> int:
        with faults(folder, at, faults.die, written=written):
            for number in range(done + 1, done + 31):
                save(number)
                os.write(report, b"+")
        return 0

    assert faults.forked(doomed) == -signal.SIGKILL
    os.close(report)
    with os.fdopen(reading, "rb") as file:
        return done + len(file.read())


def test_a_hundred_kills_in_mid_save(faults: Faults, tmp_path: Path) -> None:
    path, number, cut_short, saved = tmp_path / "last.checkpoint", 0, 0, 0

    def save(number: int) -> None:
        tensors = {"a": torch.full((10_000,), float(number)), "b": torch.full((3,), float(number))}
        save_checkpoint(path, tensors, {"number": number}, keep_previous=True)

    draw = random.Random(0)
    for _ in range(100):
        reported = killed(save, tmp_path, number, faults, draw)
        cut_short += any(0 < part.stat().st_size < 40_000 for part in tmp_path.glob(".*.part"))
        io.remove_partial_files(tmp_path)
        for each in tmp_path.iterdir():  # the previous one is whole too
            tensors, facts = load_checkpoint(each)
            assert all(bool((tensor == facts["number"]).all()) for tensor in tensors.values())
        found = load_checkpoint(path)[1]["number"] if path.exists() else 0
        assert reported <= found <= reported + 1  # what was reported as saved, or what was just being saved
        saved += found - number
        number = found
    assert cut_short > 5, "no kill came within a write"
    assert saved > 100, "the kills came before the saves"


@cache
def network() -> torch.nn.Module:
    return create_model("cifar/resnet8", 2, size=16)


def classifier(number: int) -> Classifier:
    """All its parameters are ``number``, and it says so."""
    module = network()
    for parameter in module.parameters():
        parameter.data.fill_(number)
    return Classifier(module, "cifar/resnet8", ("a", "b"), InputSpec(16), {"number": number})


def loaded(folder: Path) -> int:
    """The number of the model in a folder, which is one whole model."""
    model = load_model(folder)
    number: int = model.facts["number"]
    assert all(bool((parameter == number).all()) for parameter in model.module.parameters())
    return number


def test_kills_while_one_model_replaces_another(faults: Faults, tmp_path: Path) -> None:
    number, draw = 1, random.Random(0)
    save_model(classifier(1), tmp_path)
    for _ in range(20):
        reported = killed(lambda number: save_model(classifier(number), tmp_path), tmp_path, number, faults, draw)
        number = loaded(tmp_path)
        assert reported <= number <= reported + 1


@pytest.mark.parametrize("deaths", [1, 2])
@pytest.mark.parametrize("way", ["die", "full_or_broken"])
def test_a_model_is_whole_whichever_write_was_the_last(faults: Faults, tmp_path: Path, deaths: int, way: str) -> None:
    """Its two files cannot be replaced at one instant; and the next attempt may end in the same place."""
    save_model(classifier(1), tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "counted")
    with faults(tmp_path) as counted:
        save_model(classifier(2), tmp_path / "counted")
    assert len(counted.seen) > 10
    for at in range(len(counted.seen)):
        folder = tmp_path / f"{at}" / "model"
        shutil.copytree(tmp_path / "first", folder)
        for number in range(2, 2 + deaths):

            def doomed(folder: Path = folder, at: int = at, number: int = number) -> int:
                try:
                    with faults(folder.parent, at, getattr(faults, way)):
                        save_model(classifier(number), folder)
                except (OSError, StorageError):
                    return 5
                return 0

            # A second attempt has other calls to make, so it may well come to its end.
            code = faults.forked(doomed) if way == "die" else doomed()
            assert code in {-signal.SIGKILL, 5} or number > 2, counted.seen[at]
            assert loaded(folder) in range(1, number + 1)
        save_model(classifier(9), folder)
        io.remove_partial_files(folder)
        assert loaded(folder) == 9
        assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
