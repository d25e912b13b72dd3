"""G4: one writer a run folder."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

Tiny = Any  # the fixture of conftest.py


def test_two_starts_at_once_twenty_times(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refusals = {
        5: r"error: \S+run is being written by another process; wait for it, or use --name",
        2: r"error: \S+run exists\. Go on with it: --resume\. .*",  # it came when the other one was done
    }
    assert tiny(tmp_path / "alone") == 0  # and all is imported: what is forked need not do so
    for attempt in range(20):
        root = tmp_path / str(attempt)
        waiting, go = os.pipe()
        capfd.readouterr()
        children = [_started(tiny, root, waiting, go) for _ in range(2)]
        os.close(waiting)
        os.close(go)  # both are let go
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        said = capfd.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("error")]
        assert codes[0] == 0, said
        assert codes[1] in refusals
        assert len(errors) == 1
        assert re.fullmatch(refusals[codes[1]], errors[0]), errors
        assert (root / "run" / "report.html").exists()
        tiny.check_whole(root)


def _started(tiny: Tiny, root: Path, waiting: int, go: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.close(go)
        os.read(waiting, 1)  # ends when nobody holds the other end any more
        code = tiny(root)
        sys.stderr.flush()
    finally:
        os._exit(code)
