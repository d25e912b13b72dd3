"""Commands of Python in processes that are forked from one that has imported torch and potstill.

A new Python takes two seconds of CPU until it has done so.  What a test says of imports, of the environment in which
Python starts, or of processes that a command starts itself needs a new one: ``subprocess``.
"""

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# PyTorch's autograd is not to be forked once it has trained: these are imported by a process that does nothing else.
IMPORTED = (
    "potstill.cli.run",
    "potstill.cli.sweep",
    "potstill.experiment.pipeline",
    "potstill.export.predict",
    "potstill.report.render",
    "sklearn.metrics",
    "torch.distributed.run",
    "torchvision",
)

# As text, since the tests are no package that another process could import.
_BEGIN = """
import atexit, os, runpy, signal, sys
os.setsid()
os.chdir(folder)
os.environ.clear()
os.environ.update(environment)
for number, path in enumerate((os.devnull, f"{texts}/out", f"{texts}/errors")):
    opened = os.open(path, os.O_RDWR | os.O_APPEND)
    os.dup2(opened, number)
    os.close(opened)
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
sys.stdin = open(0)
first, *rest = command
try:
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, os.path.dirname(first))
        runpy.run_path(first, run_name="__main__")
finally:
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
"""


class Forked:
    """A command like ``python -c TEXT``, ``python -m MODULE`` or ``python FILE`` that has begun, in its own session.

    Args:
        command: what stands behind ``python``.
        environment: all variables; None: those of this process.
        folder: the working directory.

    Attributes:
        returncode: None while it runs; minus the signal that ended it.
    """

    def __init__(
        self,
        command: Sequence[str | os.PathLike[str]],
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.returncode: int | None = None
        self._texts = Path(tempfile.mkdtemp(prefix="potstill-forked-"))
        self._said: dict[str, str] = {}  # when it has ended
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED))
        facts: dict[str, Any] = {
            "command": [os.fspath(each) for each in command],
            "environment": dict(os.environ if environment is None else environment),
            "folder": str(folder or Path.cwd()),
            "texts": str(self._texts),
        }
        for name in ("out", "errors"):
            (self._texts / name).touch()
        self._process = context.Process(target=exec, args=(_BEGIN, facts))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit status; None while it runs."""
        if self.returncode is None and self._process.exitcode is not None:
            self._said = {name: self._text(name) for name in ("out", "errors")}
            shutil.rmtree(self._texts)
            self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float = 1200) -> int:
        """Return the exit status when it has ended.

        Raises:
            TimeoutError: it has not ended in time; it is killed.
        """
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            self.kill()
            raise TimeoutError(f"it has not ended in {timeout:g} s: {self.errors}")
        return code

    def communicate(self, timeout: float = 1200) -> tuple[str, str]:
        """Return output and errors when it has ended."""
        self.wait(timeout)
        return self.out, self.errors

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self._process.join()
        self.poll()

    def wait_for(self, text: str, timeout: float = 1200) -> bool:
        """Whether its errors have these words, within some time."""
        until = time.monotonic() + timeout
        while text not in self.errors and self.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        return text in self.errors

    @property
    def out(self) -> str:
        return self._text("out")

    @property
    def errors(self) -> str:
        return self._text("errors")

    def _text(self, name: str) -> str:
        return self._said[name] if name in self._said else (self._texts / name).read_text(errors="replace")


def forked(
    command: Sequence[str | os.PathLike[str]],
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout: float = 1200,
) -> Forked:
    """Return the command, which has ended."""
    started = Forked(command, environment, folder)
    started.wait(timeout)
    return started


def forked_ranks(
    command: Sequence[str | os.PathLike[str]],
    count: int = 2,
    environment: Mapping[str, str] | None = None,
    restarts: int = 0,
) -> list[list[Forked]]:
    """Run the processes of one run as torchrun does: with its variables, its store, and what it does when one fails.

    Returns:
        By attempt, of which there may be ``restarts`` more than one, the processes, which have ended, by rank.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # which outlives the processes
    facts = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    attempts = list[list[Forked]]()
    for attempt in range(1 + restarts):
        facts |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": attempt}
        ranks = []
        for rank in range(count):
            own = {name: str(value) for name, value in (facts | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            ranks.append(Forked(command, {**(os.environ if environment is None else environment), **own}))
        attempts.append(ranks)
        _wait_for_all(ranks)
        if not any(each.returncode for each in ranks):
            break
    return attempts


def _wait_for_all(ranks: list[Forked], timeout: float = 1200) -> None:
    until, told = time.monotonic() + timeout, False
    while any(each.poll() is None for each in ranks):
        if time.monotonic() > until:
            for each in ranks:
                each.kill()
            raise TimeoutError("".join(each.errors for each in ranks))
        if not told and any(each.returncode for each in ranks):
            told = True
            for each in ranks:
                each.send_signal(signal.SIGTERM)
        time.sleep(0.05)
