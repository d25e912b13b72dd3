"""`run` refuses data exactly where the doctor finds what it calls refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from potstill.data import DataSettings
from potstill.data.datasets import load_data
from potstill.data.entries import FINDING_KINDS
from potstill.data.validation.validate import validate_data
from potstill.errors import DataError

THREE = {f"{split}/{name}": 3 for split in ("train", "val", "test") for name in ("cat", "dog")}
Change = Callable[[Path], object]

FOLDERS: dict[str, tuple[dict[str, int], Change]] = {
    "sound": (THREE, lambda f: None),
    "pile": ({"a": 4, "b": 4}, lambda f: None),
    "text": (THREE, lambda f: (f / "train/cat/a.txt").write_text("x")),
    "empty file": (THREE, lambda f: (f / "train/cat/a.png").touch()),
    "cut": (THREE, lambda f: os.truncate(f / "train/cat/0.png", 80)),
    "pipe": (THREE, lambda f: os.mkfifo(f / "train/cat/pipe")),
    "gif as png": (THREE, lambda f: shutil.copy(f / "train/cat/0.png", f / "train/cat/a.gif")),
    "duplicate": (THREE, lambda f: shutil.copy(f / "train/cat/0.png", f / "test/dog/a.png")),
    "link out": (THREE, lambda f: (f / "train/cat/a.png").symlink_to("/etc/hostname")),
    "link folder": (THREE, lambda f: (f / "train/cat/up").symlink_to("..")),
    "link class": (THREE, lambda f: (f / "train/bird").symlink_to("cat")),
    "link nothing": (THREE, lambda f: (f / "train/cat/a.png").symlink_to("nothing")),
    "link inside": (THREE, lambda f: (f / "train/cat/a.png").symlink_to("1.png")),
    "hidden": (THREE, lambda f: (f / "train/cat/.a.txt").write_text("x")),
    "beside": (THREE, lambda f: (f / "readme.txt").write_text("x")),
    "control": (THREE, lambda f: (f / "train/cat/0.png").rename(f / "train/cat/\n.png")),
    "not utf-8": (THREE, lambda f: os.rename(f / "train/cat/0.png", os.fsencode(f) + b"/train/cat/\xff.png")),
    "empty class": (THREE | {"train/x": 0}, lambda f: None),
    "missing class": (THREE | {"test/x": 3}, lambda f: None),
    "no train": ({"val/a": 3, "val/b": 3}, lambda f: None),
    "two vals": (THREE | {"valid/cat": 1, "valid/dog": 1}, lambda f: None),
    "misspelt": (THREE | {"tets/cat": 1}, lambda f: None),
    "one class": ({"a": 9}, lambda f: None),
    "too few": ({"a": 9, "b": 2}, lambda f: None),
    "nothing": ({}, lambda f: None),
    "case": ({"Cat": 4, "cat": 4}, lambda f: None),
}
MANIFESTS = {
    "sound": "".join(f"p/{i}.png,{'ab'[i % 2]}\n" for i in range(8)),
    "twice": "".join(f"p/{i % 7}.png,{'ab'[i % 2]}\n" for i in range(8)),
    "gone": "".join(f"p/{i}.png,{'ab'[i % 2]}\n" for i in range(9)),
    "out": "".join(f"p/{i}.png,{'ab'[i % 2]}\n" for i in range(8)) + "../x.png,a\n",
    "columns": "p/0.png\n",
    "one class": "p/0.png,a\np/1.png,a\np/2.png,a\n",
    "few": "p/0.png,a\np/1.png,b\np/2.png,b\n",
    "none": "",
    "quote": '"p/0.png,a\n',
}


def agrees(source: Path) -> None:
    settings = DataSettings(source=str(source))
    report = validate_data(settings)
    refusals = [each for each in report.findings if FINDING_KINDS[each.kind].refused]
    try:
        load_data(settings)
        refused = None
    except DataError as error:
        refused = str(error)

    assert (refused is not None) == bool(refusals), (refused, report.findings)
    if refused is not None:
        assert report.count("error")


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(make_folder, case: str) -> None:
    places, change = FOLDERS[case]
    folder = make_folder(places)
    change(folder)
    agrees(folder)


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests(make_folder, case: str) -> None:
    folder = make_folder({"p": 8})
    (folder / "list.csv").write_text("path,label\n" + MANIFESTS[case])
    agrees(folder / "list.csv")
