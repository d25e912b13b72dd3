"""Tests marked ``own_process`` run in another process, so that a crash of theirs is one failed test and not the end.

For tests that fork, kill, send signals to themselves or fill a disk.  Each process that runs tests (with pytest-xdist,
each worker) keeps one such child, gives it the tests to run one by one, and begins another when it has died.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MARK = "own_process"
PIPES = "POTSTILL_TEST_PIPES"  # in the child: the descriptors on which it reads names and writes reports
LAST = "own-process-last"  # the name of no test
LONGEST = 1800.0  # seconds after which a test counts as hanging


class Child:
    """pytest on all marked tests of this session, which waits for the name of the next."""

    def __init__(self, session: pytest.Session) -> None:
        files = sorted({str(item.path) for item in session.items if item.get_closest_marker(MARK)})
        read_names, self.names = os.pipe()
        self.reports, write_reports = os.pipe()
        self.log = tempfile.NamedTemporaryFile(prefix="potstill-own-process-", suffix=".log")  # noqa: SIM115
        options = [
            "-p",
            "no:xdist",
            "-p",
            "no:cacheprovider",
            "-q",
            "-s",
            "-m",
            "",
            "--rootdir",
            session.config.rootpath,
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *map(str, options), *files],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, cwd=session.config.rootpath,
            pass_fds=(read_names, write_reports), start_new_session=True,
            env=os.environ | {PIPES: f"{read_names} {write_reports}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        )  # fmt: skip
        os.close(read_names)
        os.close(write_reports)
        self.left = b""

    def run(self, name: str) -> Iterator[dict[str, Any]]:
        """The reports of one test; EOFError where the child ends or hangs before it has sent them all."""
        try:
            os.write(self.names, f"{json.dumps(name)}\n".encode())
        except BrokenPipeError:
            raise EOFError(self.end()) from None
        until = time.monotonic() + LONGEST
        while True:
            line = self._line(until)
            if line is None:
                raise EOFError(self.end())
            if not line:
                return
            yield json.loads(line)

    def _line(self, until: float) -> bytes | None:
        while b"\n" not in self.left:
            ended = self.process.poll() is not None  # before the last look, lest a line be missed
            there, _, _ = select.select([self.reports], [], [], 0 if ended else 0.2)
            if not there and not ended and time.monotonic() < until:
                continue
            piece = os.read(self.reports, 1 << 20) if there else b""
            if not piece:  # what the child has forked may hold the pipe open
                return None
            self.left += piece
        line, _, self.left = self.left.partition(b"\n")
        return line

    def end(self) -> str:
        """End it and all that it has started; how it ended, and its last lines."""
        try:
            self.process.wait(5)
            how = f"ended with status {self.process.returncode}"
        except subprocess.TimeoutExpired:
            how = f"did not answer for {LONGEST:g} seconds"
        self.kill()
        tail = Path(self.log.name).read_text(errors="replace")[-4000:]
        return f"the process of this test {how}; its last lines:\n{tail}"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        os.close(self.names)  # the child comes to its end
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        self.kill()
        os.close(self.reports)
        self.log.close()


class Ended(Exception):
    """What happened to a test in the other process, as text."""


class Away(pytest.Item):
    """Stands for a test that runs in the child, and has its name and its outcome."""

    def __init__(self, *, here: "Parent", **options: Any) -> None:
        super().__init__(**options)
        self.here = here

    def runtest(self) -> None:
        reports = self.here.reports(self)
        failed = [report for report in reports if report.failed]
        skipped = [report for report in reports if report.skipped]
        if failed:
            raise Ended("\n".join(_text(report) for report in failed))
        if skipped:
            *_, reason = skipped[0].longrepr  # path, line, reason
            pytest.skip(reason.removeprefix("Skipped: "))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        return str(excinfo.value) if excinfo.errisinstance(Ended) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, self.name


def _text(report: pytest.TestReport) -> str:
    sections = [f"---- {title} ----\n{content}" for title, content in report.sections]
    return "\n".join([f"{report.nodeid}, {report.when}:", report.longreprtext, *sections])


class Parent:
    """Hooks of the process that runs all other tests."""

    def __init__(self) -> None:
        self.child: Child | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if config.getoption("usepdb"):
            return
        for at, item in enumerate(items):
            if item.get_closest_marker(MARK) and item.parent is not None:
                items[at] = Away.from_parent(item.parent, name=item.name, here=self)
                items[at].add_marker(MARK)

    def reports(self, item: Away) -> list[pytest.TestReport]:
        if self.child is None:
            self.child = Child(item.session)
        try:
            return [
                item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
                for data in self.child.run(item.nodeid)
            ]
        except EOFError as error:
            self.child.close()
            self.child = None
            raise Ended(str(error)) from None

    def pytest_sessionfinish(self) -> None:
        if self.child is not None:
            self.child.close()


class Last(pytest.Item):
    """After it a module's fixtures are torn down."""

    def runtest(self) -> None: ...


class InChild:
    """Hooks of the child."""

    def __init__(self, pipes: str) -> None:
        names, reports = map(int, pipes.split())
        self.names, self.reports = os.fdopen(names), os.fdopen(reports, "w")
        self.config: pytest.Config

    def pytest_configure(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.nodeid.endswith(f"::{LAST}"):
            data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
            self._send(json.dumps(data))
        elif report.failed:
            raise RuntimeError(report.longreprtext)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items, module = {item.nodeid: item for item in session.items}, None
        for name in self.names:
            item = items[json.loads(name)]
            if module is not None and module is not item.getparent(pytest.Module):
                self._leave(module, session)
            item.ihook.pytest_runtest_protocol(item=item, nextitem=item.parent)
            self._send("")
            module = item.getparent(pytest.Module)
        if module is not None:
            self._leave(module, session)
        return True

    @staticmethod
    def _leave(module: pytest.Module, session: pytest.Session) -> None:
        last = Last.from_parent(module, name=LAST)
        last.ihook.pytest_runtest_protocol(item=last, nextitem=session)

    def _send(self, line: str) -> None:
        self.reports.write(f"{line}\n")
        self.reports.flush()


def plugin() -> Parent | InChild:
    pipes = os.environ.pop(PIPES, None)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # shells start background jobs so, and children inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return InChild(pipes) if pipes else Parent()
