import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from potstill.cli import main
from potstill.data.datasets import load_data
from potstill.data.file_datasets import check_output_outside
from potstill.data.settings import DataSettings
from potstill.data.sources import walk_folder
from potstill.errors import DataError, UsageError

THREE = {f"{split}/{name}": 3 for split in ("train", "val", "test") for name in ("cat", "dog")}


def load(folder: Path, **options: object):
    return load_data(DataSettings(source=str(folder), **options))


def refused(folder: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        load(folder, **options)
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_three_split_folders(make_folder) -> None:
    data = load(make_folder(THREE))
    assert data.class_names == ("cat", "dog")
    assert data.counts()["val"] == {"cat": 3, "dog": 3}
    assert data.train.names[:4] == ("train/cat/0.png", "train/cat/1.png", "train/cat/2.png", "train/dog/0.png")
    assert data.origin == "folders train, val, test"
    assert data.train.pixels(0).shape == (10, 12, 3)


@pytest.mark.parametrize("word", ["valid", "validation", "Val"])
def test_other_words_for_val(make_folder, word: str) -> None:
    data = load(make_folder({place.replace("val", word): n for place, n in THREE.items()}))
    assert set(data.val.names) == {f"{word}/{name}/{i}.png" for name in ("cat", "dog") for i in range(3)}


def test_train_and_test_alone(make_folder) -> None:
    data = load(make_folder({"train/a": 20, "train/b": 10, "test/a": 2, "test/b": 2}), val=0.2)
    assert data.counts() == {"train": {"a": 16, "b": 8}, "val": {"a": 4, "b": 2}, "test": {"a": 2, "b": 2}}
    assert data.origin == "folders train, test; val (20 %) split from train here, stratified, split seed 0"
    assert all(name.startswith("train/") for name in data.val.names)


def test_one_folder_of_classes(make_folder) -> None:
    folder = make_folder({"a": 20, "b": 10})
    data = load(folder, val=0.1, test=0.2)
    assert data.counts() == {"train": {"a": 14, "b": 7}, "val": {"a": 2, "b": 1}, "test": {"a": 4, "b": 2}}
    assert data.origin == "made here: stratified 70/10/20, split seed 0"
    rows = {split: {n for s, n, *_ in data.as_rows() if s == split} for split in ("train", "val", "test")}
    assert len(set().union(*rows.values())) == 30 == sum(map(len, rows.values()))
    assert load(folder, val=0.1, test=0.2, split_seed=1).test.names != data.test.names


def test_file_system_order_does_not_matter(make_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder({"a": 8, "b": 8})
    first = load(folder)
    files = list(folder.rglob("*.png"))
    listed = os.scandir

    @contextlib.contextmanager
    def backwards(folder: Path) -> Iterator[Iterator[os.DirEntry[str]]]:
        with listed(folder) as entries:
            yield reversed(list(entries))

    monkeypatch.setattr(os, "scandir", backwards)
    for path in files:
        os.utime(path, (0, 0))
    second = load(folder)
    assert second.as_rows() == first.as_rows()
    assert second.fingerprint == first.fingerprint
    moved = folder.rename(tmp_path / "elsewhere")
    assert load(moved).fingerprint == first.fingerprint
    (moved / "a" / "0.png").write_bytes((moved / "a" / "1.png").read_bytes())
    assert load(moved).fingerprint != first.fingerprint


def test_a_class_may_be_called_train(make_folder) -> None:
    assert load(make_folder({"bus": 4, "train": 4, "plane": 4})).class_names == ("bus", "plane", "train")


def test_hidden_files_and_clutter_do_not_count(make_folder) -> None:
    folder = make_folder({"a": 4, "b": 4, ".git": 1})
    for name in ("a/.DS_Store", "a/Thumbs.db", "b/desktop.ini", "readme.txt"):
        (folder / name).write_text("x")
    assert len(walk_folder(folder).entries) == 8


def test_folders_within_classes_count(make_folder) -> None:
    folder = make_folder({"a": 3, "a/more": 2, "b": 3})
    assert [e.name for e in walk_folder(folder).entries if e.label == "a"][-2:] == ["a/more/0.png", "a/more/1.png"]


def test_all_unreadable_files_are_reported_at_once(make_folder) -> None:
    folder = make_folder(THREE)
    (folder / "train/cat/note.jpg").write_text("not an image")
    (folder / "val/dog/empty.png").touch()
    damaged = folder / "test/dog/0.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    (folder / "train/cat/notes.txt").write_text("words")
    message = refused(folder)
    assert message.splitlines()[0].endswith(": 4 unreadable images")
    assert f"{folder}/train/cat/note.jpg: no image of the formats JPEG, PNG" in message
    assert f"{folder}/train/cat/notes.txt: no image" in message
    assert f"{folder}/val/dog/empty.png: empty file" in message
    assert f"{folder}/test/dog/0.png: damaged image" in message


def test_twenty_problems_and_a_count(make_folder) -> None:
    folder = make_folder({"a": 3, "b": 3})
    for i in range(27):
        (folder / "a" / f"bad{i:02d}.jpg").write_text("no")
    lines = refused(folder).splitlines()
    assert lines[0].endswith("27 unreadable images")
    assert len(lines) == 23
    assert lines[-2] == "  and 7 more"
    assert lines[-1].endswith(": --skip-bad")


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (THREE | {"train/empty": 0}, ["train/empty: no images", "class 'empty' is missing in val"]),
        ({"a": 4}, ["at least two classes, found only 'a'"]),
        ({"train/a": 4, "val/a": 4, "test/a": 4}, ["at least two classes, found only 'a'"]),
        ({k: v for k, v in THREE.items() if k != "val/dog"}, ["class 'dog' is missing in val; it is in train, test"]),
        (
            THREE | {"test/bird": 3},
            ["class 'bird' is missing in train; it is in test", "class 'bird' is missing in val"],
        ),
        ({"a": 4, "b": 2}, ["every class needs at least 3, but 'b' has 2"]),
        ({"train/a": 1, "train/b": 3, "test/a": 1, "test/b": 1}, ["at least 2, but 'a' has 1"]),
        ({"val/a": 1, "test/a": 1}, ["no folder train"]),
        (THREE | {"valid/cat": 1}, ["val and valid are both folders for val"]),
        ({"train/a": 3, "train/b": 3, "tset/a": 1}, ["tset: unknown folder beside train; did you mean 'test'?"]),
        ({}, ["no class folders", "`potstill run --no-labels`"]),  # fit and sweep have no such option
        ({"train": 3}, ["no class folders"]),
    ],
)
def test_bad_folders(make_folder, places: dict, words: list) -> None:
    message = refused(make_folder(places))
    for word in words:
        assert word in message
    assert len(message.splitlines()) <= 6


def test_class_folders_that_are_links_are_not_missing(make_folder, tmp_path: Path) -> None:
    real, linked = make_folder({"a": 4, "b": 4}), tmp_path / "linked"
    linked.mkdir()
    for name in ("a", "b"):
        (linked / name).symlink_to(real / name)

    reasons = {each.path: each.reason for each in walk_folder(linked).findings}

    assert (
        reasons["."] == "no class folders, only links; data.follow_links: true reads them (of evaluate: --follow-links)"
    )
    assert {each.label for each in walk_folder(linked, follow_links=True).entries} == {"a", "b"}


def test_links(make_folder, tmp_path: Path) -> None:
    folder = make_folder({"a": 4, "b": 4})
    (folder / "a" / "inside.png").symlink_to(folder / "b" / "0.png")
    assert "a/inside.png" in {entry.name for entry in walk_folder(folder).entries}
    outside = tmp_path / "secret.png"
    outside.write_bytes((folder / "a" / "0.png").read_bytes())
    (folder / "a" / "out.png").symlink_to(outside)
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "b" / "gone.png").symlink_to(folder / "nothing.png")
    message = refused(folder)
    assert "a/out.png: a link out of the data folder" in message
    assert "b/loop: a link to a folder" in message
    assert "b/gone.png: a link to nothing" in message
    other = make_folder({"x": 3, "y": 3}, tmp_path / "other")
    (other / "z").symlink_to(folder)
    assert "z: a link to a folder" in refused(other)


def test_names_that_tables_cannot_hold(make_folder) -> None:
    folder = make_folder({"a": 3, "b": 3})
    (folder / "a" / "0.png").rename(folder / "a" / "new\nline.png")
    os.rename(os.fsencode(folder / "b" / "0.png"), os.fsencode(folder / "b") + b"/\xff.png")
    message = refused(folder)
    assert "control characters" in message
    assert "not UTF-8" in message
    message.encode("utf-8")


def test_an_output_folder_among_the_images_is_refused_before_it_is_made(make_folder, capsys) -> None:
    data = make_folder({"cat": 6, "dog": 6})
    run = ("train", "quickstart", "--stage", "baseline", "--data", str(data), "--output-dir", str(data / "runs"))
    assert main([*run, "--student", "cifar/resnet8"]) == 2
    assert "lies in the data folder" in capsys.readouterr().err
    assert not (data / "runs").exists()


@pytest.mark.parametrize(
    ("output", "refused"),
    [
        ("runs/x", False),  # beside the folders of splits
        ("train/x", True),
        ("Val/dog/x", True),
        ("../beside/x", False),
        ("../data-2/x", False),  # begins like the data folder
    ],
)
def test_where_an_output_folder_may_be(make_folder, output: str, refused: bool) -> None:
    data = make_folder({f"{split}/{name}": 1 for split in ("train", "Val") for name in ("cat", "dog")})
    expected = pytest.raises(UsageError, match="give another --output-dir") if refused else contextlib.nullcontext()
    with expected:
        check_output_outside(DataSettings(source=str(data)), data / output)
    with pytest.raises(UsageError) if not output.startswith("..") else contextlib.nullcontext():
        check_output_outside(DataSettings(source="digits", unlabeled=str(data)), data / output)


PUBLISHED = {"train/a": 6, "train/b": 6, "val/a": 2, "test/a": 3, "test/b": 3}  # b is missing in val


def test_val_without_a_class_and_the_ways_to_go_on(make_folder) -> None:
    folder = make_folder(PUBLISHED)
    lines = refused(folder).splitlines()
    assert lines[1].endswith("class 'b' is missing in val; it is in train, test")
    assert "--set data.keep_splits=test" in lines[2]
    assert lines[3] == "To go on without all images of these classes, and list them: --skip-bad"

    data = load(folder, keep_splits="test")
    assert data.counts() == {"train": {"a": 7, "b": 5}, "val": {"a": 1, "b": 1}, "test": {"a": 3, "b": 3}}
    assert data.origin.endswith("; train and val of the source are pooled")
    assert {name.split("/")[0] for name in data.train.names + data.val.names} == {"train", "val"}

    (skipped,) = load(make_folder(PUBLISHED | {"train/c": 3, "val/c": 1, "test/c": 1}), skip_bad=True).skipped
    assert skipped.reason == "class 'b' has no images in val; its 9 images are left out"


def test_test_without_a_class_needs_a_new_split(make_folder) -> None:
    folder = make_folder(PUBLISHED | {"train/c": 3})
    assert "--set data.keep_splits=none (all images are then split anew)" in refused(folder)
    assert "keep_splits=none" in refused(folder, keep_splits="test")

    data = load(folder, keep_splits="none")
    assert sum(sum(each.values()) for each in data.counts().values()) == 23
    assert data.origin == "made here: stratified 70/15/15, split seed 0; the splits of the source are pooled"


def test_no_train_matters_only_where_splits_are_kept(make_folder) -> None:
    folder = make_folder({"val/a": 4, "val/b": 4, "test/a": 2, "test/b": 2})
    assert "but no folder train" in refused(folder)
    assert len(load(folder, keep_splits="none").train) == 8


def test_folds_need_no_class_in_every_split(make_folder) -> None:
    folder = make_folder(PUBLISHED | {"train/c": 3})
    tested = [name for fold in (1, 2, 3) for name in load(folder, folds=3, fold=fold).test.names]
    assert len(tested) == len(set(tested)) == 23
    assert load(folder, folds=3, fold=1).origin.endswith("; the splits of the source are pooled")
    assert "pooled" not in load(make_folder({"x/p": 4, "x/q": 4}) / "x", folds=2, fold=1).origin


DEEP = {f"{split}/{name}": 3 for split in ("train", "val", "test") for name in ("Fruit/Apple/Red", "Fruit/Apple/Green",
        "Fruit/Kiwi", "Roots/Leek", "Roots/Onion/Red")}  # fmt: skip


@pytest.mark.parametrize(
    ("level", "classes"),
    [
        (1, ("Fruit", "Roots")),
        (2, ("Apple", "Kiwi", "Leek", "Onion")),
        (3, ("Green", "Kiwi", "Leek", "Red")),
        ("last", ("Green", "Kiwi", "Leek", "Red")),
    ],
)
def test_classes_named_by_inner_folders(make_folder, level: int | str, classes: tuple[str, ...]) -> None:
    data = load(make_folder(DEEP), class_folder=level)
    assert data.class_names == classes
    assert all(data.class_names[label] in name for name, label in zip(data.train.names, data.train.labels, strict=True))
    joined = any("'Red': Fruit/Apple/Red, Roots/Onion/Red" in note for note in data.notes)
    assert joined == ("Red" in classes)
    if level == 1:
        assert "data.class_folder=last (4 classes) or --set data.class_folder=2 (4 classes)" in data.notes[0]


def test_inner_folders_are_compared_between_splits(make_folder) -> None:
    folder = make_folder({place: n for place, n in DEEP.items() if place != "val/Roots/Leek"})
    assert load(folder).class_names == ("Fruit", "Roots")
    assert "class 'Leek' has no images in val\nTo keep all classes, and the test split" in refused(
        folder, class_folder="last"
    )
    assert load(folder, class_folder=2, keep_splits="test").counts()["val"]["Leek"] == 1


def test_splits_one_folder_down(make_folder) -> None:
    folder = make_folder({f"dataset/{place}": n for place, n in THREE.items()} | {"samples": 2})
    assert f"the splits lie one folder further down: give {folder / 'dataset'} as the data" in refused(folder)
    assert load(folder / "dataset").class_names == ("cat", "dog")


def test_settings_of_folders_are_refused_for_other_data() -> None:
    with pytest.raises(UsageError, match=r"data\.keep_splits: none is for folders"):
        load(Path("digits"), keep_splits="none")
    with pytest.raises(UsageError, match=r"data\.class_folder: 2 is for folders"):
        load(Path("x.tar"), class_folder=2)


def test_small_classes_and_unreadable_files_are_one_message(make_folder) -> None:
    folder = make_folder({"cat": 4, "dog": 4, "owl": 2})
    (folder / "dog" / "9.png").write_bytes(b"no image")
    message = refused(folder)
    assert "'owl' has 2" in message
    assert "dog/9.png: " in message
    assert "the bad files and the classes that are too small" in message
