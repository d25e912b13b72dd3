"""G1 and G2: whichever write of a run fails or is its last, what was there before is whole, and the run goes on."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from potstill.errors import StorageError
from potstill.experiment.run_folder import RunFolder
from potstill.io import write_bytes

from ..conftest import short_runs
from .conftest import Tiny as TinyRun

pytestmark = pytest.mark.own_process

Tiny = Any  # the fixtures of conftest.py
Faults = Any
Said = pytest.CaptureFixture[str]
Calls = list[tuple[str, str]]


@pytest.fixture(scope="module")
def calls(tiny_recipe: Path, faults: Faults, tmp_path_factory: pytest.TempPathFactory) -> Calls:
    """Of a run to which nothing happens."""
    root = tmp_path_factory.mktemp("whole")
    with short_runs(), faults(root) as counted:
        assert TinyRun(tiny_recipe)(root) == 0
    assert len(counted.seen) > 100
    assert {name for name, _ in counted.seen} >= {"open", "write", "fsync", "replace", "mkdir"}
    return list(counted.seen)


def places(seen: Calls, *, every: bool) -> list[int]:
    """The calls at which something happens: every one, or one for each file and folder, of another kind each time.

    One for each is enough because nothing writes but ``potstill.io`` and a few others, which have tests of each of
    their calls (tests/guarantees/test_one_writer.py, tests/test_io.py).
    """
    if every:
        return list(range(len(seen)))
    found: dict[str, list[int]] = {}
    for at, (_, path) in enumerate(seen):
        found.setdefault(final_path(path), []).append(at)
    return sorted(own[turn % len(own)] for turn, own in enumerate(found.values()))


def final_path(path: str) -> str:
    """Where a temporary file is to be at last."""
    return re.sub(r"/\.([^/]+)\.[0-9a-f]{16}\.part$", r"/\1", path)


each_or_every_call = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])


@each_or_every_call
def test_every_write_may_fail(
    tiny: Tiny, faults: Faults, calls: Calls, undisturbed: dict[str, bytes], tmp_path: Path, capsys: Said, every: bool
) -> None:
    for turn, at in enumerate(places(calls, every=every)):
        root = tmp_path / str(at)
        root.mkdir()
        capsys.readouterr()
        with faults(root, at, faults.full_or_broken) as failing:
            code = tiny(root)
        (call, path), said = failing.seen[at], capsys.readouterr().err
        assert code == 5, (call, path, said)
        reason = "Input/output error" if call in ("fsync", "replace") else "No space left on device"
        (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert re.fullmatch(rf"error: cannot write (to )?\S+: {reason}", error), (call, path)
        name = Path(final_path(path)).name
        assert name in error or Path(path).is_dir() or call == "mkdir" or name == ".lock", (call, path, error)
        assert "Traceback" not in said
        assert not list(root.rglob("*.part")), (call, path)
        tiny.check_whole(root)
        if turn % 4 == 0:
            assert tiny.go_on(root) == 0, (call, path)
            assert tiny.weights(root) == undisturbed
        shutil.rmtree(root)


@each_or_every_call
def test_a_run_that_was_killed_at_any_write_goes_on(
    tiny: Tiny, faults: Faults, calls: Calls, undisturbed: dict[str, bytes], tmp_path: Path, every: bool
) -> None:
    found = places(calls, every=every)
    for at in found if every else found[::2]:  # at each of the files the write fails above
        root = tmp_path / str(at)
        root.mkdir()

        def doomed(root: Path = root, at: int = at) -> int:
            with faults(root, at, faults.die):
                code: int = tiny(root)
                return code

        assert faults.forked(doomed) == -9
        tiny.check_whole(root)
        assert tiny.go_on(root) == 0, calls[at]
        assert tiny.weights(root) == undisturbed
        assert not list(root.rglob("*.part"))
        shutil.rmtree(root)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function that mounts a memory disk with these options, or mounts it anew."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "potstill-test", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a memory disk (root)")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("limit", ["size=700k", "size=2m", "size=8m,nr_inodes=12"])
def test_a_full_disk_and_then_a_larger_one(
    tiny: Tiny, small_disk: Callable[[str], Path], capsys: Said, undisturbed: dict[str, bytes], limit: str
) -> None:
    disk = small_disk(limit)
    for name in ("run", "second", "third"):  # until it is full
        code = tiny(disk, "--name", name)
        if code:
            break
    assert code == 5
    assert re.search(r"^error: cannot write \S+: No space left on device$", capsys.readouterr().err, re.M)
    tiny.check_whole(disk)
    small_disk("remount,size=64m,nr_inodes=1000")
    assert tiny.go_on(disk) == 0
    assert tiny.weights(disk) == undisturbed


def test_a_read_only_disk(tiny: Tiny, small_disk: Callable[[str], Path], capsys: Said) -> None:
    disk = small_disk("size=64m")
    assert tiny(disk) == 0
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    small_disk("remount,ro,size=64m")
    for root, flag in ((disk, "--resume"), (disk, "--overwrite"), (disk / "new", "--seed=0")):
        capsys.readouterr()
        assert tiny(root, flag) == 5
        said = capsys.readouterr().err
        assert re.fullmatch(r"error: cannot write to \S+run: Read-only file system\n", said)
    assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_folder_in_which_one_may_not_write(faults: Faults, mode: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        root = Path(folder) / "runs"
        root.mkdir(mode=mode)

        def try_in_vain() -> int:
            if os.geteuid() == 0:
                os.setegid(65534)
                os.seteuid(65534)  # root may write anywhere
            with pytest.raises(StorageError, match=r"^cannot write to \S+/a: Permission denied$"):
                RunFolder.create(root, "a")
            with pytest.raises(StorageError, match=r"^cannot write \S+/a: Permission denied$"):
                write_bytes(root / "a", b"")
            return 0

        assert faults.forked(try_in_vain) == 0
        assert list(root.iterdir()) == []
        root.chmod(0o700)


@pytest.mark.parametrize("when", [12, pytest.param(20, marks=pytest.mark.slow)])
def test_a_broken_disk_as_the_system_tells_of_it(tiny: Tiny, tmp_path: Path, when: int) -> None:
    strace = ["strace", "-f", "--seccomp-bpf", "-qq", "-o", os.devnull, "-e", "trace=fsync"]
    strace += ["-e", f"inject=fsync:error=EIO:when={when}"]
    if shutil.which("strace") is None or subprocess.run([*strace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs strace, and the right to trace a process")
    command = [*strace, sys.executable, "-m", "potstill", *tiny.arguments, "--output-dir", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert re.search(r"^error: cannot write \S+: Input/output error$", done.stderr, re.M)
    assert "Traceback" not in done.stderr
    tiny.check_whole(tmp_path / "runs")
