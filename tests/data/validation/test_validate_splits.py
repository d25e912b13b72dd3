"""Classes and splits: what `run` would make of them, and what is missing."""

import shutil
from pathlib import Path

import pytest

from potstill.data.datasets import load_data
from potstill.data.settings import DataSettings
from potstill.data.validation.validate import validate_data


@pytest.mark.parametrize(
    ("places", "settings"),
    [
        ({"a": 20, "b": 11}, {}),
        ({"a": 20, "b": 11}, {"split_seed": 3, "val": 0.3, "test": 0.1}),
        ({"train/a": 20, "train/b": 10, "test/a": 2, "test/b": 2}, {}),
        ({"train/a": 9, "train/b": 9, "val/a": 2, "val/b": 3, "test/a": 2, "test/b": 2}, {}),
    ],
)
def test_the_splits_are_those_of_a_run(make_folder, places: dict, settings: dict) -> None:
    chosen = DataSettings(source=str(make_folder(places)), **settings)
    division = validate_data(chosen).division
    data = load_data(chosen)

    assert {s: dict(zip(division.class_names, c.tolist(), strict=True)) for s, c in division.counts().items()} == (
        data.counts()
    )
    assert division.class_names == data.class_names


def test_each_image_is_in_the_split_of_a_run(make_folder) -> None:
    from potstill.data.sources import walk_folder
    from potstill.data.splits import SPLITS, assign_splits

    folder = make_folder({"a": 20, "b": 11})
    listing = walk_folder(folder)
    division, _ = assign_splits(listing, DataSettings())
    found = {(SPLITS[at], entry.name) for at, entry in zip(division.splits, listing.entries, strict=True)}

    assert found == {(split, name) for split, name, *_ in load_data(DataSettings(source=str(folder))).as_rows()}


@pytest.mark.parametrize("places", [{"a": 30, "b": 30}, {"train/a": 30, "train/b": 30, "test/a": 2, "test/b": 2}])
def test_files_of_equal_content_are_in_one_split_in_a_run_and_in_its_check(make_folder, places: dict) -> None:
    folder, first = make_folder(places), next(iter(places))
    before = {name: split for split, name, *_ in load_data(DataSettings(source=str(folder))).as_rows()}
    copies = {f"{first}/{i}.png": f"{first}/copy{i}.png" for i in range(0, 30, 2)}
    for name, copy in copies.items():
        shutil.copy(folder / name, folder / copy)
    settings = DataSettings(source=str(folder))
    data, report = load_data(settings), validate_data(settings)
    found = {name: split for split, name, *_ in data.as_rows()}
    assert all(found[name] == found[copy] for name, copy in copies.items())
    assert {found[name] for name in copies} >= {"train", "val"}
    assert {s: c.tolist() for s, c in report.division.counts().items()} == {
        split: list(each.values()) for split, each in data.counts().items()
    }
    for copy in copies.values():
        (folder / copy).unlink()
    again = {name: split for split, name, *_ in load_data(DataSettings(source=str(folder))).as_rows()}
    assert again == before


@pytest.mark.parametrize(
    ("places", "kind", "path", "reason"),
    [
        ({"a": 4, "b": 2}, "too-few", "b", "every class needs at least 3, but 'b' has 2"),
        ({"train/a": 1, "train/b": 3, "test/a": 1, "test/b": 1}, "too-few", "train/a", "at least 2, but 'a' has 1"),
        ({"a": 4}, "one-class", ".", "found only 'a'"),
        ({"a": 100, "b": 7}, "imbalance", ".", "'a' has 70 and 'b' has 5; see data.class_balance"),
    ],
)
def test_classes(make_folder, examined, places: dict, kind: str, path: str, reason: str) -> None:
    found = examined(make_folder(places))

    assert list(found) == [kind]
    assert reason in found[kind][path]


def test_nine_to_one_is_no_imbalance(make_folder, examined) -> None:
    assert examined(make_folder({"train/a": 27, "train/b": 3, "val/a": 9, "val/b": 1, "test/a": 1, "test/b": 1})) == {}


def test_a_class_of_a_manifest_that_is_not_in_every_split(make_folder, examined) -> None:
    folder = make_folder({"p": 5})
    rows = ["0.png,a,train", "1.png,b,train", "2.png,a,val", "3.png,b,val", "4.png,a,test"]
    (folder / "p" / "list.csv").write_text("\n".join(["path,label,split", *rows]))

    assert examined(folder / "p" / "list.csv") == {
        "missing-class": {".": "class 'b' has no images in test"},
    }


def test_no_classes_is_said_once(tmp_path: Path, examined) -> None:
    assert list(examined(tmp_path)) == ["no-classes"]


@pytest.mark.parametrize(
    "names", [("Cat", "cat"), ("cat", "cat "), ("Ame\u0301lie", "Am\u00e9lie"), ("1", "1.0"), ("07", "7")]
)
def test_classes_that_people_take_for_one(make_folder, examined, names: tuple[str, str]) -> None:
    found = examined(make_folder({names[0]: 4, names[1]: 4, "dog": 4}))

    first, second = sorted(names)
    shown = ("'Ame\\u0301lie'", "'Am\\xe9lie'") if "lie" in first else (repr(first), repr(second))  # to tell them apart
    assert found == {"similar-names": {first: f"classes {', '.join(shown)}; rename or join them"}}


def test_files_that_differ_in_case_only(make_folder, examined, picture) -> None:
    folder = make_folder({"a": 4, "b": 4})
    picture(1).save(folder / "a" / "x.png")
    picture(2).save(folder / "a" / "X.PNG")

    assert list(examined(folder)["similar-names"]) == ["a/X.PNG"]


def test_one_class_is_said_before_anything_is_read(make_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder({"data/a": 4, "data/b": 4})  # images of two classes, one folder too high
    monkeypatch.setattr("potstill.data.scan.read_image", lambda *_: pytest.fail("an image is decoded"))
    report = validate_data(DataSettings(source=str(folder)))

    assert [each.kind for each in report.findings] == ["one-class"]
    assert report.images == 8
    assert any("no image was read" in note for note in report.notes)
    assert any("class_folder=last (2 classes)" in note for note in report.notes)
