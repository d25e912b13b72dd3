"""The verb: text, JSON, exit codes, progress, and no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from potstill.cli import main
from potstill.cli.check import WaitProgress


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            pixels = random.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_sound_data(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(photos)]) == 0

    captured = capsys.readouterr()
    assert (
        captured.out.splitlines()[0]
        == f"{photos}: 12 images, 2 classes, " + captured.out.split("classes, ")[1].splitlines()[0]
    )
    assert captured.out.splitlines()[-1] == "nothing wrong was found"
    assert captured.err == ""


def test_images_without_labels_are_at_any_depth(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "cat" / "0.png").rename(photos / "0.png")
    assert main(["check", str(photos), "--no-labels"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{photos}: 12 images, without labels, ")
    _, _, after = said.partition(" share\n")
    assert after.startswith("all ")  # no row of a class without a name
    (photos / "dog" / "twin.png").write_bytes((photos / "dog" / "1.png").read_bytes())
    (photos / "bad.png").write_text("x")
    assert main(["check", str(photos), "--no-labels"]) == 3
    found = capsys.readouterr().out
    assert "  bad.png: no image of the formats" in found
    assert "the same file as dog/twin.png" in found
    assert "''" not in found


def test_errors_exit_with_3_after_everything_was_said(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "cat" / "a.png").touch()
    (photos / "dog" / "b.png").write_text("x")
    assert main(["check", str(photos)]) == 3

    captured = capsys.readouterr()
    assert "  cat/a.png: empty file" in captured.out
    assert "  dog/b.png: no image of the formats" in captured.out
    assert captured.err == f"error: {photos}: 2 errors, 0 warnings (1 empty-file, 1 no-image)\n"


def test_warnings_exit_with_3_only_when_asked(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "cat" / "0.png").rename(photos / "cat" / "0.jpg")

    assert main(["check", str(photos)]) == 0
    assert "a PNG file whose name ends in .jpg" in capsys.readouterr().out
    assert main(["check", str(photos), "--strict"]) == 3
    assert "0 errors, 1 warning (1 other-format)" in capsys.readouterr().err


def test_json_is_the_whole_of_stdout(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(30):
        (photos / "cat" / f"bad{i}.png").write_text("x")
    (photos / "cat" / os.fsdecode(b"\xff\n.png")).write_text("x")
    assert main(["check", str(photos), "--json"]) == 3

    report = json.loads(capsys.readouterr().out)
    assert (report["errors"], report["images"]) == (32, 43)
    assert len([each for each in report["findings"] if each["kind"] == "no-image"]) == 31
    assert "cat/\udcff\n.png" in {each["path"] for each in report["findings"]}


def test_names_cannot_steer_the_terminal(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "cat" / "\x1b[2J\nerror.png").write_text("x")
    (photos / "\x1b[31m").mkdir()
    assert main(["check", str(photos)]) == 3

    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "cat/\\x1b[2J\\nerror.png: no image" in captured.out


def test_all_shows_more_than_twenty(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(30):
        (photos / "cat" / f"bad{i}.png").write_text("x")

    main(["check", str(photos)])
    assert "and 10 more; --all shows them" in capsys.readouterr().out
    main(["check", str(photos), "--all"])
    assert sum("no image of" in line for line in capsys.readouterr().out.splitlines()) == 30


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("nowhere", "no data set, folder or manifest"),
        ("digit", "did you mean 'digits'?"),
        ("", "an argument is empty, the one after `potstill check`"),
        ("/dev/zero", "a file of data is a manifest"),
    ],
)
def test_no_such_data(data: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", data]) == 2
    assert words in capsys.readouterr().err


def test_settings_of_the_data(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(photos), "--set", "data.test=0.5", "--set", "data.split_seed=7", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)

    assert report["origin"] == "made here: stratified 35/15/50, split seed 7"
    assert report["counts"]["test"] == {"cat": 3, "dog": 3}


def test_other_images_of_the_settings_are_named_as_unchecked(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more pictures").mkdir()
    (tmp_path / "more pictures" / "broken.jpg").write_text("no image")
    main(["check", str(photos), "--set", f"data.unlabeled={tmp_path / 'more pictures'}"])

    out = capsys.readouterr().out
    assert f"data.unlabeled are not checked here; `potstill check '{tmp_path / 'more pictures'}' --no-labels`" in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("training.lr=3", "check takes data settings only"),
        ("data.tets=0.1", "did you mean 'test'?"),
        ("data.options.root=x", "folders and manifests take no options"),
        ("data.val=0.9", "must sum to less than 1"),
    ],
)
def test_settings_that_do_not_fit(photos: Path, change: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(photos), "--set", change, "--set", "data.test=0.2"]) == 2
    assert words in capsys.readouterr().err


def test_neither_torch_nor_what_else_is_heavy_is_imported(photos: Path) -> None:
    script = (
        "import sys; from potstill.cli import main; main(['check', sys.argv[1]]);"
        "sys.stderr.write(','.join({'torch', 'torchvision', 'timm', 'sklearn', 'matplotlib', 'rich'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(photos)], capture_output=True, text=True, check=True)

    assert done.stderr == ""


def test_waits_are_shown_after_a_while_and_seldom(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with WaitProgress() as waiting:
        for done in range(101):
            now[0] = done / 4
            waiting.wait("checking images", done * 100, 10_000)

    assert capsys.readouterr().err.splitlines() == [
        "checking images: 400 of 10,000",
        "checking images: 4,400 of 10,000",
        "checking images: 8,400 of 10,000",
    ]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr("potstill.cli.check.time.monotonic", lambda: now[0])
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with WaitProgress() as waiting:
        waiting.wait("checking images", 0, 10)
        now[0] = 5.0
        waiting.wait("checking images", 4, 10)
        waiting.wait("checking images", 10, 10)

    shown = capsys.readouterr().err
    assert "checking images" in shown
    assert "10/10" in shown
