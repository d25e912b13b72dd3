"""potstill sweep, as typed."""

import importlib.util

import pytest

from potstill.cli import main


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "something to vary"),
        (["--search", "method.temprature=1,2"], "did you mean 'temperature'"),
        (["--grid", "--search", "method.alpha=0..1"], "a range has no end"),
        (["--search", "method.alpha=0.1,0.2", "--name", "../x"], "--name must be"),
        (["--search", "method.temperature=1,2", "--no-labels"], "needs a ready teacher"),
    ],
)
def test_a_mistake_costs_no_traceback(more, says, capsys, tmp_path):
    pytest.importorskip("optuna", reason='needs the extra "sweep"')
    assert main(["sweep", "quickstart", *more, "--output-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_sweep_is_left_alone(capsys, tmp_path):
    pytest.importorskip("optuna", reason='needs the extra "sweep"')
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    command = [
        "sweep",
        "quickstart",
        "--search",
        "method.alpha=0.1,0.2",
        "--output-dir",
        str(tmp_path),
        "--name",
        "mine",
    ]
    assert main(command) == 2
    assert "is no sweep" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir() if not path.name.startswith(".")] == ["letter.txt"]


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "optuna" else found(name))
    assert main(["sweep", "quickstart", "--search", "method.alpha=0.1,0.2"]) == 2
    assert 'pip install "potstill[sweep]"' in capsys.readouterr().err
