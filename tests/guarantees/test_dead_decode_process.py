"""G14: a process that decodes images is killed, wherever the main thread is: exit code 7, and nothing is lost."""

import importlib
import multiprocessing
import os
import signal
from multiprocessing.connection import wait
from pathlib import Path

import pytest
from safetensors.torch import load_file

from potstill.cli import main
from potstill.data import workers
from potstill.experiment.run_folder import RunFolder
from potstill.training.checkpointing import load_checkpoint

STAGES = ("teacher", "baseline", "distilled")

# where the main thread is -> the function that it enters then, and how often it has done so before
PLACES = {
    "forward": ("potstill.training.trainer:Trainer._forward", 2),
    "backward": ("potstill.training.optim:GradientAccumulator.add", 1),
    "update": ("potstill.training.trainer:Trainer._update", 1),
    "serialising": ("potstill.training.checkpointing:save_checkpoint", 0),
    "replacing a file": ("os:replace", 12),
    "validation": ("potstill.training.trainer:Trainer._evaluate", 0),
    "keeping the best": ("potstill.training.checkpointing:Checkpointer.keep_best", 0),
    "metrics.jsonl": ("potstill.training.trainer:Trainer._write_records", 1),
}
DEFAULT = {"backward"}  # all of them in tests/training/test_trainer_dead_workers.py, without the command
STREAMED = [
    "--set",
    "data.workers=2",
    "--set",
    "data.cache_fraction=1e-12",
    "--set",
    "training.checkpoint_seconds=0.0001",
]


@pytest.fixture
def kill_at(monkeypatch):
    """A function that has every decode process killed, and dead, when the main thread enters a place."""

    def arrange(place, times):
        module, _, path = place.partition(":")
        *above, last = path.split(".")
        owner = importlib.import_module(module)
        for each in above:
            owner = getattr(owner, each)
        original, calls, killed = getattr(owner, last), [], []

        def enter(*arguments, **options):
            calls.append(1)
            children = multiprocessing.active_children() if len(calls) > times and not killed else []
            for child in children:
                child.kill()
                wait([child.sentinel])
                killed.append(child.name)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, last, enter)
        return killed

    return arrange


def run(recipe: Path, root: Path, *flags: str) -> int:
    return main(
        [
            "run",
            str(recipe),
            "--output-dir",
            str(root),
            "--set",
            f"teacher_cache.folder={root}/store",
            *STREAMED,
            *flags,
        ]
    )


def weights(folder: Path) -> dict[str, bytes]:
    return {
        f"{stage} {name}": tensor.numpy().tobytes()
        for stage in STAGES
        for name, tensor in load_file(folder / stage / "model.safetensors").items()
    }


def check(recipe: Path, root: Path, finished: Path, code: int, errors: str) -> None:
    assert code == 7, errors
    assert "Traceback" not in errors
    assert errors.count("error: ") == 1
    assert "error: a process that decodes images has died; " in errors
    assert "killed for lack of memory, ended by SIGKILL; try data.workers=0" in errors
    assert not list(root.rglob("*.part"))
    for last in root.glob("tiny/*/checkpoints/last.checkpoint"):
        load_checkpoint(last)
    assert multiprocessing.active_children() == []
    assert run(recipe, root, *(["--resume"] if RunFolder(root / "tiny").known else [])) == 0
    assert weights(root / "tiny") == weights(finished)


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=() if place in DEFAULT else pytest.mark.slow) for place in PLACES]
)
def test_killed_while_the_main_thread_is_anywhere(
    tiny_recipe: Path, finished_run: Path, tmp_path: Path, monkeypatch, kill_at, capfd, place
) -> None:
    with monkeypatch.context():
        killed = kill_at(*PLACES[place])
        code = run(tiny_recipe, tmp_path)
    assert killed
    check(tiny_recipe, tmp_path, finished_run, code, capfd.readouterr().err)


# A run decodes 14 training images and some of val four times for each of two networks, and more for the figures.
@pytest.mark.parametrize("image", [pytest.param(n, marks=pytest.mark.slow) for n in range(1, 100, 12)])
def test_killed_at_any_image(tiny_recipe: Path, finished_run: Path, tmp_path: Path, monkeypatch, capfd, image) -> None:
    count, fit = multiprocessing.Value("i", 0), workers.read_square

    def fit_or_die(*arguments):
        with count.get_lock():
            count.value += 1
            last = count.value == image
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return fit(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(workers, "read_square", fit_or_die)
        code = run(tiny_recipe, tmp_path)
    check(tiny_recipe, tmp_path, finished_run, code, capfd.readouterr().err)
