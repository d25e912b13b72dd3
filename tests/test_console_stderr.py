"""Lines of C libraries are kept from the terminal, and ours are not."""

import subprocess
import sys

import pytest

from potstill.console import silence_native_stderr

_SCRIPT = """
import os, sys
from potstill.console import silence_native_stderr
try:
    with silence_native_stderr():
        os.write(2, b"noise\\n")
        sys.stderr.write("ours \\udcff\\n")
        {failing}
except ValueError:
    os.write(2, b"failed\\n")
os.write(2, b"after\\n")
sys.stderr.write("after too\\n")
"""


@pytest.mark.parametrize(("failing", "more"), [("pass", []), ("raise ValueError", ["failed"])])
def test_only_the_descriptor_is_silent_and_only_within(failing: str, more: list[str]) -> None:
    script = _SCRIPT.format(failing=failing)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stderr.splitlines() == ["ours \\udcff", *more, "after", "after too"]


def test_no_descriptor_is_left_open() -> None:
    script = (
        "import os\nfrom potstill.console import silence_native_stderr\n"
        "def free():\n    pair = os.pipe()\n    [os.close(each) for each in pair]\n    return pair\n"
        "before = free()\nwith silence_native_stderr(): pass\nassert free() == before"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_another_stderr_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    own = sys.stderr
    with silence_native_stderr():
        assert sys.stderr is own
        sys.stderr.write("x")
    assert capsys.readouterr().err == "x"
