"""``potstill cache``: what is shown, what is refused, and that looking needs no torch."""

import json
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from potstill.cli import main
from potstill.distillation.teacher_cache.cache import TeacherCache
from potstill.distillation.teacher_cache.record_format import RecordFormat


def make(root: Path, samples: int = 5000, views: int = 2, **facts: str) -> Path:
    record = RecordFormat("float16", 4)
    facts = {"teacher": "vgg16", "data": "solar"} | facts
    store = TeacherCache.open(root, {"samples": samples, "split": "train"}, record, samples, facts)
    for view in range(views):
        store.write(view, np.arange(samples), record.encode(np.ones((samples, 4), np.float32)))
    store.close()
    return store.path


@dataclass
class Again:
    records: int = 256
    largest: float = 0.0123
    same_class: float = 0.996


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> Again:
    """Answers in place of the teacher that ``verify`` would ask."""
    said = Again()
    module = types.ModuleType("potstill.experiment.cache_verification")
    module.verify_cache = lambda path, samples: said  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return said


def test_ls_shows_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path, teacher="vgg\x1b[2J16")
    assert main(["cache", "ls", "--folder", str(tmp_path)]) == 0

    head, row, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["key", "size", "views", "recorded", "record", "last", "use", "teacher", "data"]
    for cell in (path.name, " 2  ", "100.0 %", "float16, 8 B", "vgg\\x1b[2J16", "solar, train, 5,000 images"):
        assert cell in row
    assert last.startswith("1 teacher cache, ")
    assert last.endswith(str(tmp_path))


def test_ls_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path)
    assert main(["cache", "ls", "--folder", str(tmp_path), "--json"]) == 0

    (found,) = json.loads(capsys.readouterr().out)
    assert (found["key"], found["recorded"], found["samples"]) == (path.name, [5000, 5000], 5000)
    assert found["bytes"] == sum(each.stat().st_blocks * 512 for each in path.iterdir())


def test_ls_of_nothing_and_of_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    assert main(["cache", "ls"]) == 0
    assert capsys.readouterr().out == f"no teacher caches in {tmp_path}/teachers\n"
    make(tmp_path / "teachers")
    assert main(["cache", "ls", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1


def test_a_damaged_store_is_shown_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path)
    (path / "manifest.json").write_text("{}")
    assert main(["cache", "ls", "--folder", str(tmp_path)]) == 0
    assert "is damaged" in capsys.readouterr().out
    assert main(["cache", "verify", path.name, "--folder", str(tmp_path)]) == 4
    assert "is damaged" in capsys.readouterr().err
    assert main(["cache", "rm", path.name, "--folder", str(tmp_path)]) == 0
    assert not path.exists()


def test_verify_says_how_far_the_records_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], teacher: Again
) -> None:
    path = make(tmp_path)
    assert main(["cache", "verify", path.name[:6], "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{path.name}: 10,000 records are intact, 0 are damaged",
        "256 of them recomputed: same top class for 99.6 %, largest difference of a logit 0.0123",
    ]
    assert main(["cache", "verify", path.name, "--folder", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "key": path.name,
        "intact": 10_000,
        "damaged": 0,
        "compared": 256,
        "largest_difference": 0.0123,
        "same_class": 0.996,
    }


def test_verify_fails_where_the_records_are_not_the_teachers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], teacher: Again
) -> None:
    path = make(tmp_path)
    teacher.same_class = 0.4
    assert main(["cache", "verify", path.name, "--folder", str(tmp_path)]) == 4
    assert "does not agree with its teacher" in capsys.readouterr().err


def test_verify_finds_a_damaged_record(tmp_path: Path, capsys: pytest.CaptureFixture[str], teacher: Again) -> None:
    path = make(tmp_path)
    with (path / "logits.bin").open("r+b") as file:
        file.seek(1000)
        file.write(b"\1")
    assert main(["cache", "verify", path.name, "--folder", str(tmp_path)]) == 4
    captured = capsys.readouterr()
    assert "9,999 records are intact, 1 are damaged" in captured.out
    assert "1 records are damaged; they are not used" in captured.err


def test_a_store_without_records_asks_no_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path, views=0)
    assert main(["cache", "verify", path.name, "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{path.name}: 0 records are intact, 0 are damaged\n"


def test_rm_removes_what_is_named_or_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, three = (make(tmp_path, samples=samples) for samples in (5, 6, 7))
    assert main(["cache", "rm", one.name, two.name, one.name[:8], "--folder", str(tmp_path)]) == 0
    assert [line.split(" (")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"removed {one.name}",
        f"removed {two.name}",
    ]
    assert list(tmp_path.iterdir()) == [three]
    assert main(["cache", "rm", "--all", "--folder", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == []
    capsys.readouterr()
    assert main(["cache", "rm", "--all", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no teacher caches in {tmp_path}\n"


@pytest.mark.parametrize("arguments", [[], ["--all", "KEY"]])
def test_rm_wants_keys_or_all(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path)
    arguments = [each.replace("KEY", path.name) for each in arguments]
    assert main(["cache", "rm", *arguments, "--folder", str(tmp_path)]) == 2
    assert "or --all" in capsys.readouterr().err
    assert path.exists()


@pytest.mark.parametrize("verb", ["rm", "verify"])
def test_unknown_keys_are_refused_with_the_nearest_before_anything_is_removed(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path)
    wrong = path.name[:-2] + "zz"
    keys = [path.name, wrong] if verb == "rm" else [wrong]
    assert main(["cache", verb, *keys, "--folder", str(tmp_path)]) == 2
    assert f"no teacher cache {wrong!r} in {tmp_path}; did you mean {path.name!r}?" in capsys.readouterr().err
    assert path.exists()


def test_a_store_in_use_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path)
    store = TeacherCache.open_existing(path)
    assert main(["cache", "rm", "--all", "--folder", str(tmp_path)]) == 5
    assert "is in use" in capsys.readouterr().err
    store.close()


@pytest.mark.parametrize("arguments", [["--help"], ["ls", "--help"], ["rm", "-h"]])
def test_help_names_the_verbs(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", *arguments]) == 0
    assert "Usage: potstill cache" in capsys.readouterr().out


def test_looking_and_removing_need_no_torch(tmp_path: Path) -> None:
    path = make(tmp_path)
    script = (
        "import sys; from potstill.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code or 10 * any(name in sys.modules for name in ('torch', 'torchvision', 'timm')))"
    )
    for arguments in (["ls"], ["ls", "--json"], ["rm", path.name]):
        done = subprocess.run([sys.executable, "-c", script, "cache", *arguments, "--folder", tmp_path], check=False)
        assert done.returncode == 0, arguments
