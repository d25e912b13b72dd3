"""G4: one writer a run folder."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from ..forked import Forked

Tiny = Any  # the fixture of conftest.py
START = """
import time
from potstill.cli import main
from potstill.report import render
render.render = lambda folder: folder / "report.html"  # pictures take most of the time, and show nothing of this
time.sleep(max(0.0, {when} - time.time()))
raise SystemExit(main({arguments}))
"""


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_two_starts_at_once(tiny: Tiny, tmp_path: Path, times: int) -> None:
    refusals = {
        5: r"error: \S+run is being written by another process; wait for it, or use --name",
        2: r"error: \S+run exists\. To continue it: --resume\. .*",  # it came when the other one was done
    }
    assert tiny(tmp_path / "alone") == 0
    for attempt in range(times):
        root = tmp_path / str(attempt)
        code = START.format(when=time.time() + 0.2, arguments=[*tiny.arguments, "--output-dir", str(root)])
        children = [Forked(["-c", code]) for _ in range(2)]
        codes = sorted(child.wait() for child in children)
        said = "".join(child.errors for child in children)
        errors = [line for line in said.splitlines() if line.startswith("error")]
        assert codes[0] == 0, said
        assert codes[1] in refusals, said
        assert len(errors) == 1
        assert re.fullmatch(refusals[codes[1]], errors[0]), errors
        tiny.check_whole(root)
