"""A run of a second, and failures of the system at will."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from potstill.cli import main
from potstill.experiment.run_folder import RunFolder
from potstill.models.model_file import load_model
from potstill.report.run_reader import read_run
from potstill.training.checkpointing import load_checkpoint

from ..conftest import short_runs, whole_runs

COLOURS = {"blue": (30, 60, 200), "red": (210, 40, 30)}
RECIPE = """
name: tiny
data: {source: SOURCE, size: 16, workers: 0}
teacher: {model: cifar/resnet8}
student: {model: cifar/resnet8}
method: {name: kd, temperature: 2.0, alpha: 0.5}
training: {epochs: 2, batch_size: 16, lr: 0.003, precision: float32, checkpoint_seconds: 0, threads: 1}
teacher_cache: {folder: STORE}
"""

CALLS = ("open", "write", "fsync", "replace", "link", "mkdir", "pwrite", "posix_fallocate")

Act = Callable[[str], None]  # is told which call it is


def photographs(folder: Path, count: int = 10) -> Path:
    """Class folders of noisy 16 x 16 images."""
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(random.normal(colour, 60, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02d}.png")
    return folder


def recipe_file(folder: Path) -> Path:
    """A recipe on images of its own, with a store of its own; all below ``folder``."""
    source = photographs(folder / "photographs")
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("SOURCE", str(source)).replace("STORE", str(folder / "store")))
    return path


@pytest.fixture(scope="module", autouse=True)
def _pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Short runs, but for modules that say WHOLE_RUNS = True."""
    with nullcontext() if getattr(request.module, "WHOLE_RUNS", False) else short_runs():
        yield


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe_file(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def finished_run(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run folder, of which only the pictures are blank; nobody may change it."""
    root = tmp_path_factory.mktemp("runs")
    with whole_runs():
        assert main(["run", str(tiny_recipe), "--output-dir", str(root)]) == 0
    return root / "tiny"


class Tiny:
    """Trains the recipe's baseline for one epoch, as from the command line, in the folder ``run`` below a root."""

    def __init__(self, recipe: Path) -> None:
        self.arguments = ["train", str(recipe), "--stage", "baseline", "--set", "training.epochs=1", "--name", "run"]

    def __call__(self, root: Path, *flags: str) -> int:
        """Returns the exit code."""
        return main([*self.arguments, "--output-dir", str(root), *flags])

    def go_on(self, root: Path) -> int:
        """What a user does after a failure: resume, or begin again where nothing had begun."""
        return self(root, "--resume") if RunFolder(root / "run").known else self(root)

    @staticmethod
    def weights(root: Path) -> dict[str, bytes]:
        """What has been learnt, bit by bit."""
        learnt = load_file(root / "run" / "baseline" / "model.safetensors")
        return {name: tensor.numpy().tobytes() for name, tensor in learnt.items()}

    @staticmethod
    def check_whole(root: Path) -> None:
        """Whatever there is below the root is as it was written."""
        run, stage = RunFolder(root / "run"), root / "run" / "baseline"
        readers: dict[Path, Callable[[], object]] = {
            run.recipe: run.read_recipe,
            run.environment: run.read_environment,
            run.results: lambda: read_run(run.path),
            stage / "model.json": lambda: load_model(stage),
            **{path: lambda path=path: load_checkpoint(path) for path in stage.glob("checkpoints/[!.]*")},  # type: ignore[misc]
        }
        for path, read in readers.items():
            if path.exists():
                read()


class Faults:
    """While active, counts those calls of ``os`` that change something below ``folder``, and acts at one of them."""

    def __init__(self, folder: Path, at: int | None = None, act: Act | None = None, *, written: float = 0.0) -> None:
        self.folder, self.at, self.act = f"{folder}{os.sep}", at, act
        self.written = written  # share of the bytes that a write still gets onto the disk before the act
        self.seen: list[tuple[str, str]] = []  # call and path

    def __enter__(self) -> "Faults":
        self.patch = pytest.MonkeyPatch()
        for name in CALLS:
            self.patch.setattr(os, name, self._watched(name, getattr(os, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(first: Any, *rest: Any, **options: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fspath(first)
            changes = rest and rest[0] & os.O_CREAT if name == "open" else not (name == "mkdir" and os.path.isdir(path))
            if changes and str(path).startswith(self.folder):
                self.seen.append((name, str(path)))
                if len(self.seen) - 1 == self.at and self.act is not None:
                    if name == "write" and self.written:
                        call(first, memoryview(rest[0])[: int(len(rest[0]) * self.written)])
                    self.act(name)
            return call(first, *rest, **options)

        return watched

    @staticmethod
    def full_or_broken(name: str) -> None:
        """A full disk where something new is wanted, a broken one where it is synced or renamed."""
        number = errno.EIO if name in ("fsync", "replace") else errno.ENOSPC
        raise OSError(number, os.strerror(number))

    @staticmethod
    def die(name: str) -> None:
        """As by ``kill -9``."""
        os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def forked(call: Callable[[], int]) -> int:
        """What ``call`` returns in a forked process; minus the signal that killed it."""
        child = os.fork()
        if not child:
            code = 99
            try:
                code = call()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)


@pytest.fixture(scope="session")
def faults() -> type[Faults]:
    return Faults


@pytest.fixture
def tiny(tiny_recipe: Path) -> Tiny:
    return Tiny(tiny_recipe)


@pytest.fixture(scope="session")
def undisturbed(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of a run that nothing happened to."""
    root = tmp_path_factory.mktemp("undisturbed")
    with short_runs():
        assert Tiny(tiny_recipe)(root) == 0
    return Tiny.weights(root)
