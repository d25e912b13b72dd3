"""Third-party image files, hostile ones included: no traceback, bounded memory, each as expected."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ...conftest import READ_THOUGH_EXPECTED_TO_FAIL, needs_pillow_13

OF_FILES = {"unreadable", "empty-file", "truncated", "damaged", "no-image", "oversize"}

_SCRIPT = """
import sys
from potstill.cli import main
code = main(sys.argv[1:])
if sys.platform == "linux":
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    sys.stderr.write("peak " + peak.split()[1] + chr(10))
sys.exit(code)
"""


@pytest.fixture
def as_data(corpus: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """The files in two class folders, and what is expected of each."""
    lines = (corpus / "MANIFEST.tsv").read_text().splitlines()
    expected = {line.split("\t")[0]: line.split("\t")[4] for line in lines}
    for at, name in enumerate(expected):
        folder = tmp_path / "data" / ("even", "odd")[at % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(corpus / name, folder / name)
    return tmp_path / "data", expected


@needs_pillow_13
def test_the_corpus_goes_through_check(as_data: tuple[Path, dict[str, str]]) -> None:
    folder, expected = as_data
    command = [sys.executable, "-c", _SCRIPT, "check", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith(("peak ", "error: ", "checking images: "))]
    assert said == []  # libtiff has hundreds of lines on these files
    assert done.returncode == 3

    report = json.loads(done.stdout)
    refused = {each["path"].split("/")[1]: each for each in report["findings"] if each["kind"] in OF_FILES}
    wrong = {
        name: refused.get(name, {}).get("reason", "read")
        for name, outcome in expected.items()
        if (outcome == "ok") == (name in refused) and name not in READ_THOUGH_EXPECTED_TO_FAIL
    }
    assert wrong == {}
    assert report["images"] == len(expected)
    assert report["figures"]["decoded"] == len(expected) - len(refused)
    assert all(each["reason"] and "\n" not in each["reason"] for each in refused.values())
    if "peak " in done.stderr:
        kilobytes = int(done.stderr.split("peak ")[1].split()[0])
        assert kilobytes < 300_000  # 144,000 measured, of which 62,000 before the first image
