import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from potstill.data.concurrency import file_lock, try_file_lock

HOLDER = """
import sys, time
from pathlib import Path
from potstill.data.concurrency import file_lock
with file_lock(Path(sys.argv[1]), lambda: None):
    print("held", flush=True)
    time.sleep(60)
"""


class GaveUp(Exception):
    pass


def give_up() -> None:
    raise GaveUp


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "made" / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(GaveUp), file_lock(path, give_up):
        raise AssertionError("two at once")
    with try_file_lock(path) as free:
        assert not free

    def kill() -> None:
        holder.kill()
        holder.communicate()

    with file_lock(path, kill) as waited:
        assert waited
    with file_lock(path, give_up) as waited:
        assert not waited


def test_threads_take_turns(tmp_path: Path) -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal inside, most
        with file_lock(tmp_path / "lock", lambda: None):
            with lock:
                inside += 1
                most = max(most, inside)
            threading.Event().wait(0.01)
            with lock:
                inside -= 1

    everyone = [threading.Thread(target=work) for _ in range(4)]
    for each in everyone:
        each.start()
    for each in everyone:
        each.join()
    assert most == 1


def test_a_lock_whose_folder_was_removed_meanwhile_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = tmp_path / "folder" / "lock", os.open
    tries = []

    def removed_at_first(*args: object, **options: object) -> int:
        handle = opened(*args, **options)  # type: ignore[arg-type]
        if args[0] == str(path):
            tries.append(handle)
            if len(tries) == 1:
                shutil.rmtree(path.parent)
        return handle

    monkeypatch.setattr(os, "open", removed_at_first)
    with file_lock(path, lambda: None):
        assert path.exists()
        assert len(tries) >= 2
        monkeypatch.undo()
        with try_file_lock(path) as free:
            assert not free
