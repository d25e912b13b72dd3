"""G1: SIGKILL in mid-save leaves a whole older or newer file, never less than was reported as saved."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill import artifacts
from potstill.inputs import InputSpec
from potstill.models.classifier import Classifier
from potstill.models.create import create_model
from potstill.models.model_file import load_model, save_model
from potstill.training.checkpoint import load_checkpoint, save_checkpoint

Faults = Any  # the fixture of conftest.py


def killed(save: Callable[[int], None], done: int, draw: random.Random) -> int:
    """Let a forked process save ``done + 1`` and so on, and kill it 2 to 60 ms later; the last that it reported."""
    reading, report = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            os.write(report, b"begun")
            for number in range(done + 1, done + 10**6):
                save(number)
                os.write(report, b"+")
        finally:
            os._exit(1)
    os.close(report)
    with os.fdopen(reading, "rb") as file:
        assert file.read(5) == b"begun"
        time.sleep(draw.uniform(0.002, 0.06))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        return done + len(file.read())


def test_a_hundred_kills_in_mid_save(tmp_path: Path) -> None:
    path, number, halves, saved = tmp_path / "last.checkpoint", 0, 0, 0

    def save(number: int) -> None:
        tensors = {"a": torch.full((100_000,), float(number)), "b": torch.full((3,), float(number))}
        save_checkpoint(path, tensors, {"number": number}, keep_previous=True)

    draw = random.Random(0)
    for _ in range(100):
        reported = killed(save, number, draw)
        halves += len(list(tmp_path.glob(".*.part")))
        artifacts.remove_leftovers(tmp_path)
        for each in tmp_path.iterdir():  # the previous one is whole too
            tensors, facts = load_checkpoint(each)
            assert all(bool((tensor == facts["number"]).all()) for tensor in tensors.values())
        found = load_checkpoint(path)[1]["number"] if path.exists() else 0
        assert reported <= found <= reported + 1  # what was reported as saved, or what was just being saved
        saved += found - number
        number = found
    assert halves > 20, "the kills came between the saves"
    assert saved > 20, "the kills came before the saves"


def classifier(number: int) -> Classifier:
    """All its parameters are ``number``, and it says so."""
    module = create_model("cifar/resnet8", 2, size=16)
    for parameter in module.parameters():
        parameter.data.fill_(number)
    return Classifier(module, "cifar/resnet8", ("a", "b"), InputSpec(16), {"number": number})


def loaded(folder: Path) -> int:
    """The number of the model in a folder, which is one whole model."""
    model = load_model(folder)
    number: int = model.facts["number"]
    assert all(bool((parameter == number).all()) for parameter in model.module.parameters())
    return number


def test_kills_while_one_model_replaces_another(tmp_path: Path) -> None:
    number, draw = 1, random.Random(0)
    save_model(classifier(1), tmp_path)
    for _ in range(50):
        reported = killed(lambda number: save_model(classifier(number), tmp_path), number, draw)
        number = loaded(tmp_path)
        assert reported <= number <= reported + 1


@pytest.mark.parametrize("deaths", [1, 2])
@pytest.mark.parametrize("way", ["die", "full_or_broken"])
def test_a_model_is_whole_whichever_write_was_the_last(faults: Faults, tmp_path: Path, deaths: int, way: str) -> None:
    """Its two files cannot be replaced at one instant; and the next attempt may end in the same place."""
    save_model(classifier(1), tmp_path / "counted")
    with faults(tmp_path) as counted:
        save_model(classifier(2), tmp_path / "counted")
    assert len(counted.seen) > 10
    for at in range(len(counted.seen)):
        folder = tmp_path / f"{at}" / "model"
        save_model(classifier(1), folder)
        for number in range(2, 2 + deaths):

            def doomed(folder: Path = folder, at: int = at, number: int = number) -> int:
                with faults(folder.parent, at, getattr(faults, way)):
                    save_model(classifier(number), folder)
                return 0

            # A second attempt has other calls to make, so it may well come to its end.
            assert faults.forked(doomed) != 0 or number > 2, counted.seen[at]
            assert loaded(folder) in range(1, number + 1)
        save_model(classifier(9), folder)
        artifacts.remove_leftovers(folder)
        assert loaded(folder) == 9
        assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
