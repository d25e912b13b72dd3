"""Places and names: every problem of a folder is found, and the walk goes on after each."""

import inspect
import os
import sys
from pathlib import Path

import pytest

from potstill.data.file_datasets import list_source
from potstill.data.settings import DataSettings
from potstill.data.sources import walk_folder, walk_images

THREE = {f"{split}/{name}": 3 for split in ("train", "val", "test") for name in ("cat", "dog")}


def kinds(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for each in walk_folder(folder).findings:
        found.setdefault(each.kind, []).append(each.path)
    return {kind: sorted(paths) for kind, paths in found.items()}


def test_a_sound_folder(make_folder) -> None:
    found = walk_folder(make_folder(THREE))

    assert found.findings == []
    assert [(e.name, e.label, e.split) for e in found.entries][:2] == [
        ("test/cat/0.png", "cat", "test"),
        ("test/cat/1.png", "cat", "test"),
    ]
    assert len(found.entries) == 18


def test_links_out_loops_and_to_nothing(make_folder, tmp_path: Path) -> None:
    folder = make_folder({"a": 3, "b": 3})
    outside = make_folder({"c": 2}, tmp_path / "outside")
    a = folder / "a"
    (a / "fine.png").symlink_to("0.png")
    (a / "out.png").symlink_to(outside / "c" / "0.png")
    (a / "up").symlink_to("..")
    (a / "self").symlink_to("self")
    (a / "ping").symlink_to("pong")
    (a / "pong").symlink_to("ping")
    (a / "gone.png").symlink_to("nothing.png")
    (a / "far.png").symlink_to(outside / "nothing.png")  # to follow it would not help
    (a / "beside").symlink_to(folder / "b")
    (folder / "linked").symlink_to(folder / "b")
    (folder / "far").symlink_to(outside / "c")
    found = {each.path: (each.kind, each.reason) for each in walk_folder(folder).findings}

    assert found == {
        "a/out.png": ("link-out", f"a link out of the data folder, to {outside.resolve()}/c/0.png"),
        "a/up": ("link-folder", "a link to a folder that holds the link: a loop"),
        "a/self": ("link-broken", "a link that leads round in a circle"),
        "a/ping": ("link-broken", "a link that leads round in a circle"),
        "a/pong": ("link-broken", "a link that leads round in a circle"),
        "a/gone.png": ("link-broken", "a link to nothing"),
        "a/far.png": ("link-broken", "a link to nothing"),
        "a/beside": ("link-folder", "a link to a folder"),
        "linked": ("link-folder", "a link to a folder; put the folder itself there"),
        "far": (
            "link-out",
            f"a link to a folder out of the data folder, to {outside.resolve()}/c; put the folder itself there",
        ),
    }
    assert len(walk_folder(folder).entries) == 7


def test_links_that_lead_nowhere_beside_the_class_folders(make_folder) -> None:
    folder = make_folder({"train/a": 1, "train/b": 1})
    for place in (folder, folder / "train"):
        (place / "self").symlink_to("self")
        (place / "ping.png").symlink_to("pong.png")
        (place / "pong.png").symlink_to("ping.png")
        (place / "bird").symlink_to("/nowhere/bird")
    end = ", where class folders are; mend it, or remove it"
    found = {each.path: (each.kind, each.reason.removesuffix(end)) for each in walk_folder(folder).findings}

    circle, nothing = "a link that leads round in a circle", "a link to nothing"
    reasons = {"self": circle, "ping.png": circle, "pong.png": circle, "bird": nothing}
    assert found == {
        f"{place}{name}": ("link-broken", reason) for place in ("", "train/") for name, reason in reasons.items()
    }


def test_a_neighbour_whose_name_begins_like_the_folder_is_outside(make_folder, tmp_path: Path) -> None:
    folder = make_folder({"a": 3, "b": 3}, tmp_path / "images")
    make_folder({"a": 3}, tmp_path / "images-more")
    (folder / "a" / "x.png").symlink_to(tmp_path / "images-more" / "a" / "0.png")

    assert kinds(folder) == {"link-out": ["a/x.png"]}


def test_a_folder_that_is_itself_reached_by_a_link(make_folder, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(make_folder({"a": 3, "b": 3}))
    (tmp_path / "images" / "a" / "again.png").symlink_to(tmp_path / "images" / "b" / "0.png")
    found = walk_folder(tmp_path / "link")

    assert found.findings == []
    assert len(found.entries) == 7


def test_names_that_nobody_can_write_down(make_folder) -> None:
    folder = make_folder({"a": 3, "b\x1b[2J": 3})
    (folder / "a" / "0.png").rename(folder / "a" / "new\nline.png")
    os.rename(os.fsencode(folder / "a" / "1.png"), os.fsencode(folder / "a") + b"/\xff.png")
    (folder / "a" / "2.png").rename(folder / "a" / "right\u202eto left.png")
    found = {each.path: each.reason for each in walk_folder(folder).findings}

    assert found == {
        "a/new\nline.png": "control characters in the name; rename it",
        "a/\udcff.png": "the name is not UTF-8; rename it",
        "a/right\u202eto left.png": "control characters in the name; rename it",
        "b\x1b[2J": "control characters in the name; rename it",
    }
    assert len(walk_folder(folder).entries) == 6


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (THREE | {"train/empty": 0}, {"empty-class": ["train/empty"], "missing-class": ["test/empty", "val/empty"]}),
        ({k: v for k, v in THREE.items() if k != "val/dog"}, {"missing-class": ["val/dog"]}),
        (THREE | {"test/bird": 3}, {"missing-class": ["train/bird", "val/bird"]}),
        ({"val/a": 1, "test/a": 1}, {"no-train": ["."]}),
        (THREE | {"valid/cat": 1, "valid/dog": 1}, {"split-folders": ["."]}),
        ({"train/a": 3, "train/b": 3, "tset/a": 1}, {"split-folders": ["tset"]}),
        ({}, {"no-classes": ["."]}),
        ({"train": 3}, {"no-classes": ["train"], "beside-classes": ["train"]}),
        ({"a": 2, "b": 2, ".": 2}, {"beside-classes": ["."]}),
        ({"bus": 4, "train": 4, "plane": 4}, {}),
        ({"test": 4, "plane": 4}, {}),
    ],
)
def test_places(make_folder, places: dict, expected: dict) -> None:
    assert kinds(make_folder(places)) == expected


def test_both_of_two_folders_for_a_split_are_looked_through(make_folder) -> None:
    found = walk_folder(make_folder({"train/a": 2, "training/a": 3}))

    assert [each.reason for each in found.findings] == ["train and training are both folders for train; keep one"]
    assert len(found.entries) == 5


def test_hidden_files_and_clutter_are_counted_and_passed_over(make_folder) -> None:
    folder = make_folder({"a": 4, "b": 4, ".git": 1})
    for name in ("a/.DS_Store", "a/Thumbs.db", "b/desktop.ini", "readme.txt"):
        (folder / name).write_text("x")
    found = walk_folder(folder)

    assert (len(found.entries), found.findings) == (8, [])
    assert found.passed_over == {".git": 1, ".DS_Store": 1, "Thumbs.db": 1, "desktop.ini": 1}
    assert found.notes == ["1 other file beside the class folders not read: readme.txt"]


def test_a_folder_that_cannot_be_read(make_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder({"a": 3, "b": 3, "b/more": 2})
    scan = os.scandir

    def refusing(path: Path):
        if Path(path).name == "more":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = walk_folder(folder)

    assert [(e.kind, e.path, e.reason) for e in found.findings] == [
        ("unreadable-folder", "b/more", "cannot be read (Permission denied)")
    ]
    assert len(found.entries) == 6


def test_folders_within_each_other_beyond_any_recursion(make_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder({"a": 1, "b": 1, "a/" + "d/" * 300: 1})
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 120)
    try:
        found = walk_folder(folder)
    finally:
        sys.setrecursionlimit(limit)

    assert [each.name.count("/d/") for each in found.entries] == [0, 150, 0]
    assert found.findings == []


def test_the_order_of_the_file_system_does_not_matter(make_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(THREE | {"train/empty": 0, "test/bird": 2})
    first = walk_folder(folder)
    listed = os.listdir(folder)
    scan = os.scandir

    class Backwards:
        def __init__(self, path: Path) -> None:
            with scan(path) as items:
                self.items = list(items)[::-1]

        def __enter__(self):
            return iter(self.items)

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Backwards)
    second = walk_folder(folder)

    assert len(listed) == 3
    assert (second.entries, second.findings) == (first.entries, first.findings)


def test_images_of_no_class(make_folder, tmp_path: Path) -> None:
    folder = make_folder({"a": 2, "a/b": 1, ".": 1})
    (folder / "up").symlink_to("..")
    found = walk_images(folder)

    assert [each.name for each in found.entries] == ["0.png", "a/0.png", "a/1.png", "a/b/0.png"]
    assert [each.kind for each in found.findings] == ["link-out"]
    (tmp_path / "none").mkdir()
    assert [each.reason for each in walk_images(tmp_path / "none").findings] == ["no images"]


# what is not used is counted and named


def test_what_systems_keep_in_folders_is_counted_by_name(make_folder) -> None:
    systems = [
        "@eaDir",
        "a/.thumbnails",
        "__MACOSX",
        "a/.ipynb_checkpoints",
        "lost+found",
        "$RECYCLE.BIN",
        "b/#recycle",
    ]
    systems += ["a/@eaDir", ".Trash-1000", "System Volume Information"]
    folder = make_folder({"a": 4, "b": 4} | dict.fromkeys(systems, 2))
    for name in ("a/Thumbs.db", "a/.DS_Store", "b/._0.png", "DESKTOP.INI", "b/.directory", "b/.hidden-notes"):
        (folder / name).write_text("x")
    found = walk_folder(folder)

    assert (len(found.entries), found.findings) == (8, [])
    assert found.passed_over == {
        "@eaDir": 2, ".thumbnails": 1, "__MACOSX": 1, ".ipynb_checkpoints": 1, "lost+found": 1, "$RECYCLE.BIN": 1,
        "#recycle": 1, ".Trash-1000": 1, "System Volume Information": 1, "Thumbs.db": 1, ".DS_Store": 1, "._*": 1,
        "DESKTOP.INI": 1, ".directory": 1, "hidden files": 1,
    }  # fmt: skip


def test_hidden_images_and_classes_are_named(make_folder) -> None:
    folder = make_folder({"a": 3, "b": 3, ".cats": 3, "a/.more": 1, ".empty": 0})
    (folder / "a/0.png").rename(folder / "a/.0.PNG")
    found = walk_folder(folder)

    assert [(each.kind, each.path, each.reason.split(";")[0]) for each in found.findings] == [
        ("hidden", ".cats", "a hidden folder with 3 images"),
        ("hidden", "a/.0.PNG", "a hidden file"),
        ("hidden", "a/.more", "a hidden folder with 1 image"),
    ]
    assert found.passed_over == {"hidden folders": 1}
    assert len(found.entries) == 5


def test_what_lies_beside_the_split_folders_is_named(make_folder) -> None:
    folder = make_folder({"training/a": 2, "training/b": 2, "testing/a": 1, "testing/b": 1, "backup/a": 5, ".": 1})
    (folder / "labels.csv").write_text("x")
    found = walk_folder(folder)

    assert {entry.split for entry in found.entries} == {"train", "test"}
    assert [(each.kind, each.path, *each.others) for each in found.findings] == [
        ("beside-classes", ".", "0.png"),
        ("beside-classes", "backup"),
    ]
    assert "5 images beside the split folders" in found.findings[1].reason
    assert found.notes == ["1 other file beside the class folders not read: labels.csv"]


def test_splits_within_the_classes_are_refused(make_folder) -> None:
    places = {f"{name}/{split}": 2 for name in ("cat", "dog") for split in ("train", "test")}
    (finding,) = walk_folder(make_folder(places)).findings

    assert (finding.kind, finding.path) == ("split-folders", ".")
    assert "put the classes into the splits (train/cat)" in finding.reason


def test_folders_within_classes_are_said_to_count(make_folder) -> None:
    found = list_source(DataSettings(source=str(make_folder({"a": 2, "a/2021": 2, "b": 2, "b/test": 1}))))

    assert found.findings == []
    assert found.notes == [
        "3 images lie in folders within class folders, such as a/2021/0.png; they count for the class; to name classes "
        "by inner folders: --set data.class_folder=last (4 classes)"
    ]


# links


def test_links_elsewhere_are_read_where_they_may_be(make_folder, tmp_path: Path) -> None:
    store = make_folder({"a": 3, "b": 2, "b/deep": 1}, tmp_path / "store")
    view = make_folder({"a": 0})
    for i in range(3):
        (view / "a" / f"{i}.png").symlink_to(store / "a" / f"{i}.png")
    (view / "b").symlink_to(store / "b")

    found = walk_folder(view)  # and no class is called empty
    assert {each.kind for each in found.findings} == {"link-out"}
    found = walk_folder(view, follow_links=True)
    assert found.findings == []
    assert [e.name for e in found.entries] == ["a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/1.png", "b/deep/0.png"]


def test_followed_links_count_no_image_twice_and_end(make_folder, tmp_path: Path) -> None:
    first = make_folder({"x": 1}, tmp_path / "first")
    second = make_folder({"y": 1}, tmp_path / "second")
    (first / "x" / "to-second").symlink_to(second / "y")
    (second / "y" / "to-first").symlink_to(first / "x")
    view = make_folder({"b": 2, "c": 2})
    (view / "a").symlink_to(first / "x")
    (view / "b" / "up").symlink_to(view)
    (view / "b" / "self").symlink_to("self")
    (view / "d").symlink_to(view / "c")
    (view / "c" / "gone.png").symlink_to("nothing")
    found = walk_folder(view, follow_links=True)

    twice = "the same folder as {}, by a link: its images would count twice"
    assert {each.path: each.reason for each in found.findings} == {
        "a/to-second/to-first": twice.format("a"),
        "b/up": "a link to a folder that holds the link: a loop",
        "b/self": "a link that leads round in a circle",
        "d": twice.format("c"),
        "c/gone.png": "a link to nothing",
    }
    assert sorted(entry.name for entry in found.entries) == [
        "a/0.png", "a/to-second/0.png", "b/0.png", "b/1.png", "c/0.png", "c/1.png",
    ]  # fmt: skip
