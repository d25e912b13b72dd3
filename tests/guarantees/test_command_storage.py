"""G2 through the real command: full and read-only disks and broken ones, while three stages of two epochs are run.

What cannot be written ends with exit code 5, path and reason; what was written stays whole, and --resume ends with the
weights of a run to which nothing happened.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from potstill.cli import main
from potstill.experiment.run_folder import RunFolder
from potstill.io import remove_partial_files
from potstill.models.model_file import load_model
from potstill.training.checkpointing import load_checkpoint

pytestmark = pytest.mark.own_process

Faults = Any  # the fixture of conftest.py
CarryOut = Callable[..., tuple[int, str]]
STAGES = ("teacher", "baseline", "distilled")
SAID = r"^error: (cannot write (to )?\S+: )?{reason}(: \S+)?$"


def command(recipe: Path, root: Path, *flags: str) -> list[str]:
    return [
        "run",
        str(recipe),
        "--output-dir",
        str(root / "runs"),
        "--set",
        f"teacher_cache.folder={root}/store",
        *flags,
    ]


def carried_out(recipe: Path, root: Path, *flags: str, before: tuple[str, ...] = ()) -> tuple[int, str]:
    """Exit code and errors of the real command."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "POTSTILL_CACHE": str(recipe.parent / "cache")}
    call = [*before, sys.executable, "-m", "potstill", *command(recipe, root, *flags)]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=1200, check=False)
    return done.returncode, done.stderr


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> CarryOut:
    """As ``carried_out``, in this process."""

    def carry_out(recipe: Path, root: Path, *flags: str) -> tuple[int, str]:
        capsys.readouterr()
        return main(command(recipe, root, *flags)), capsys.readouterr().err

    return carry_out


def check_failed(code: int, errors: str, reason: str) -> None:
    assert code == 5, errors
    (error,) = [line for line in errors.splitlines() if line.startswith("error")]
    assert re.fullmatch(SAID.format(reason=reason), error), error
    assert "Traceback" not in errors


def check_whole(root: Path) -> None:
    run = RunFolder(root / "runs" / "tiny")
    for path in root.glob("runs/tiny/*/checkpoints/[!.]*"):
        load_checkpoint(path)
    for path in root.glob("runs/tiny/*/model.json"):
        load_model(path.parent)
    if run.known:
        run.read_recipe()
        run.read_environment()


def check_goes_on(recipe: Path, root: Path, finished: Path, carry_out: CarryOut = carried_out) -> None:
    flags = ["--resume"] if RunFolder(root / "runs" / "tiny").known else []
    code, errors = carry_out(recipe, root, *flags)
    assert code == 0, errors
    assert weights(root / "runs" / "tiny") == weights(finished)
    assert not list((root / "runs").rglob("*.part"))


def weights(run: Path) -> list[dict[str, bytes]]:
    files = (load_file(run / stage / "model.safetensors") for stage in STAGES)
    return [{name: tensor.numpy().tobytes() for name, tensor in each.items()} for each in files]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function that mounts a memory disk with these options, or mounts it anew."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        call = ["mount", "-t", "tmpfs", "-o", options, "potstill-test", str(folder)]
        if shutil.which("mount") is None or subprocess.run(call, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a memory disk (root)")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


LIMITS = ["size=2m", "size=1m", "size=3m", "size=4m", "size=6m", "size=8m"]
LIMITS += [f"size=64m,nr_inodes={number}" for number in (4, 9, 14, 20, 26, 32)]


def test_a_full_disk_in_this_process(
    tiny_recipe: Path, finished_run: Path, disk: Callable[[str], Path], here: CarryOut
) -> None:
    root = disk(LIMITS[0])
    check_failed(*here(tiny_recipe, root), "No space left on device")
    check_whole(root)
    disk("remount,size=64m,nr_inodes=10000")
    check_goes_on(tiny_recipe, root, finished_run, here)


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMITS)
def test_a_full_disk_and_then_a_larger_one(
    tiny_recipe: Path, finished_run: Path, disk: Callable[[str], Path], limit: str
) -> None:
    root = disk(limit)
    code, errors = carried_out(tiny_recipe, root)
    if code == 0:
        pytest.skip(f"{limit} is enough for the whole run")
    check_failed(code, errors, "No space left on device")
    check_whole(root)
    disk("remount,size=64m,nr_inodes=10000")
    check_goes_on(tiny_recipe, root, finished_run)


@pytest.mark.slow
def test_a_read_only_disk(tiny_recipe: Path, finished_run: Path, disk: Callable[[str], Path]) -> None:
    root = disk("size=64m")
    disk("remount,ro,size=64m")
    check_failed(*carried_out(tiny_recipe, root), "Read-only file system")
    disk("remount,rw,size=64m")
    check_goes_on(tiny_recipe, root, finished_run)
    disk("remount,ro,size=64m")
    check_failed(*carried_out(tiny_recipe, root, "--resume"), "Read-only file system")


def straced(folder: Path, *options: str) -> tuple[str, ...]:
    """What comes before a command to trace it; its last file is ``log``."""
    before = ("strace", "-f", "-qq", "-y", "-o", str(folder / "log"), *options)
    call = [*before, "true"]
    if shutil.which("strace") is None or subprocess.run(call, capture_output=True, check=False).returncode:
        pytest.skip("needs strace, and the right to trace a process")
    return before


def hit(folder: Path) -> bool:
    """Whether what was made to fail was in the run's folder or the store."""
    injected = [line for line in (folder / "log").read_text(errors="replace").splitlines() if "(INJECTED)" in line]
    return any(f"{folder}/place" in line for line in injected)


CALLS = [("fsync", "EIO", "Input/output error", when) for when in (3, 9, 21, 34, 48, 62, 80, 100)]
CALLS += [("rename", "EIO", "Input/output error", when) for when in (1, 3, 8, 14, 19, 25, 33, 41)]
CALLS += [("fsync", "ENOSPC", "No space left on device", when) for when in (5, 30, 70)]


@pytest.mark.parametrize(
    ("call", "number", "reason", "when"),
    CALLS,
)
@pytest.mark.slow
def test_a_broken_disk_as_the_system_tells_of_it(
    tiny_recipe: Path, finished_run: Path, tmp_path: Path, call: str, number: str, reason: str, when: int
) -> None:
    calls = call if call != "rename" else "rename,renameat,renameat2"
    before = straced(tmp_path, "-e", f"trace={calls}", "-e", f"inject={calls}:error={number}:when={when}")
    code, errors = carried_out(tiny_recipe, tmp_path / "place", before=before)
    if code == 0 or not hit(tmp_path):
        # A store that cannot be written is said and done without; what libraries write for themselves is theirs.
        pytest.skip(f"{call} {when} is none of the run's")
    if f"{tmp_path}/place/store" not in "".join(re.findall(r"\n.*INJECTED.*", (tmp_path / "log").read_text())):
        check_failed(code, errors, reason)
    check_whole(tmp_path / "place")
    check_goes_on(tiny_recipe, tmp_path / "place", finished_run)


@pytest.mark.slow
@pytest.mark.parametrize("when", range(20, 240, 20))
def test_a_write_that_fails(tiny_recipe: Path, finished_run: Path, tmp_path: Path, when: int) -> None:
    """Only writes into the run's own files are made to fail: the terminal's are counted too, so some hit nothing."""
    before = straced(tmp_path, "-e", "trace=write", "-e", f"inject=write:error=ENOSPC:when={when}")
    code, errors = carried_out(tiny_recipe, tmp_path / "place", before=before)
    if not hit(tmp_path) or code == 0:
        pytest.skip(f"write {when} is none of the run's")
    check_failed(code, errors, "No space left on device")
    check_whole(tmp_path / "place")
    check_goes_on(tiny_recipe, tmp_path / "place", finished_run)


@pytest.mark.slow  # an hour
@pytest.mark.parametrize("way", ["full_or_broken", "die"])
def test_every_write_of_a_whole_run(
    tiny_recipe: Path, finished_run: Path, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Three stages of two epochs and the report; in forked processes, that need not start anew each time."""
    from potstill.cli import main

    def run(root: Path, *flags: str) -> int:
        code: int = main(command(tiny_recipe, root, *flags))
        return code

    whole = tmp_path / "whole"
    whole.mkdir()
    with faults(whole) as counted:
        assert run(whole) == 0
    count = len(counted.seen)
    assert count > 300
    step = int(os.environ.get("POTSTILL_EVERY", "1"))
    for at in range(0, count, step):
        root = tmp_path / str(at)
        root.mkdir()

        def doomed(root: Path = root, at: int = at) -> int:
            with faults(root, at, getattr(faults, way)):
                return run(root)

        code = faults.forked(doomed)
        assert code in ((-9,) if way == "die" else (0, 5)), (at, counted.seen[at])  # 0: of a store, done without
        check_whole(root)
        flags = ["--resume"] if RunFolder(root / "runs" / "tiny").known else []
        assert faults.forked(lambda root=root, flags=flags: run(root, *flags)) == 0, (at, counted.seen[at])  # type: ignore[misc]
        assert weights(root / "runs" / "tiny") == weights(finished_run), (at, counted.seen[at])
        remove_partial_files(root)
        shutil.rmtree(root)
