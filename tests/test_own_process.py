"""A test marked ``own_process`` has its own outcome, whatever it does to its process, and so have all others."""

import os
import re
import subprocess
import sys
from pathlib import Path

CONFTEST = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from own_process import plugin

def pytest_configure(config):
    config.addinivalue_line("markers", "own_process: in a process of its own")
    config.pluginmanager.register(plugin())
"""
TESTS = """
import os, signal, pytest

pytestmark = pytest.mark.own_process

@pytest.fixture(scope="module")
def made():
    yield os.getpid()

def test_passes(made):
    assert made == os.getpid() != {here}

def test_fails():
    assert 1 == 2, "because"

@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGINT])
def test_dies(number):
    os.kill(os.getpid(), number)

def test_exits():
    os._exit(0)

def test_has_a_child_that_stays():
    if not os.fork():
        signal.pause()

def test_is_skipped():
    pytest.skip("for a reason")

@pytest.mark.parametrize("name", ["a b", "\xe4\\n"])
def test_is_found(name, tmp_path):
    pass
"""
OTHER = """
import os, pytest

@pytest.mark.own_process
def test_elsewhere():
    assert os.getpid() != {here}

def test_here():
    assert os.getpid() == {here}
"""


def test_outcomes(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]")
    for name, text in (("test_one.py", TESTS), ("test_two.py", OTHER)):
        (tmp_path / name).write_text(text.replace("{here}", "int(os.environ['FIRST'])"))
    run = "import os, pytest; os.environ['FIRST'] = str(os.getpid()); pytest.main(['-v', '-rs'])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", run],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    outcomes = dict(re.findall(r"::(\S+|test_is_found\[.*?\]) (PASSED|FAILED|SKIPPED)", done.stdout))
    assert outcomes == {
        "test_passes": "PASSED", "test_fails": "FAILED",
        "test_dies[9]": "FAILED", "test_dies[11]": "FAILED", "test_dies[2]": "FAILED", "test_exits": "FAILED",
        "test_has_a_child_that_stays": "PASSED", "test_is_skipped": "SKIPPED",
        "test_is_found[a b]": "PASSED", "test_is_found[\\xe4\\n]": "PASSED",
        "test_elsewhere": "PASSED", "test_here": "PASSED",
    }, done.stdout + done.stderr  # fmt: skip
    for said in ("because", "ended with status -9", "ended with status -11", "for a reason"):
        assert said in done.stdout
