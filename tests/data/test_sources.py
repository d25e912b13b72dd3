"""``data.skip_bad``: what is left is the data set that somebody would make by hand."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from potstill.data.datasets import load_data
from potstill.data.image_sets import ArraySet, image_sizes
from potstill.data.settings import DataSettings
from potstill.data.splits import DataSplits
from potstill.data.validation.validate import validate_data
from potstill.errors import DataError, UsageError


def load(source: Path, **settings: object) -> DataSplits:
    return load_data(DataSettings.model_validate({"source": str(source), "skip_bad": True, **settings}))


def skipped(data: DataSplits) -> dict[str, str]:
    return {each.path: each.kind for each in data.skipped}


@pytest.fixture
def ill(make_folder) -> Path:
    """Two classes of eight good images with all that can be left out around them."""
    folder = make_folder({"a": 9, "b": 8, "small": 2, "empty": 0, "broken": 3})
    (folder / "a/8.png").write_bytes((folder / "a/0.png").read_bytes()[:80])
    (folder / "a/text.jpg").write_text("words")
    (folder / "b/zero.png").touch()
    (folder / "b/out.png").symlink_to("/etc/passwd")
    (folder / "b/gone.png").symlink_to("nothing")
    (folder / "b/new\nline.png").write_bytes((folder / "b/0.png").read_bytes())
    for i in range(3):
        (folder / f"broken/{i}.png").write_text("x")
    return folder


BAD = {
    "a/8.png": "truncated", "a/text.jpg": "no-image", "b/zero.png": "empty-file", "b/out.png": "link-out",
    "b/gone.png": "link-broken", "b/new\nline.png": "name", "small": "too-few", "empty": "empty-class",
    "broken/0.png": "no-image", "broken/1.png": "no-image", "broken/2.png": "no-image",
    "broken": "empty-class",
}  # fmt: skip


def test_what_is_left_is_what_one_would_clean_up_by_hand(ill: Path, make_folder, tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    for name in ("a", "b"):
        (clean / name).mkdir(parents=True)
        for i in range(8):
            shutil.copy(ill / name / f"{i}.png", clean / name)
    data, by_hand = load(ill), load(clean)

    assert skipped(data) == BAD
    assert by_hand.skipped == ()
    assert (data.class_names, data.as_rows()) == (("a", "b"), by_hand.as_rows())
    assert data.fingerprint == by_hand.fingerprint == load(clean, skip_bad=False).fingerprint


def test_check_leaves_out_the_same(ill: Path) -> None:
    report = validate_data(DataSettings(source=str(ill), skip_bad=True))

    assert {each.path: each.kind for each in report.skipped} == BAD
    assert (report.count("error"), report.images) == (0, 16)
    assert report.as_dict()["counts"]["train"] == load(ill).counts()["train"]
    assert report.figures["decoded"] == 16


def test_without_it_the_message_names_it(ill: Path, make_folder, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"11 problems(.|\n)*\n.*follow_links=true \(of evaluate: --follow-links\)\n.*: --skip-bad$"
    ):
        load(ill, skip_bad=False)
    only_unreadable = make_folder({"a": 4, "b": 4}, tmp_path / "other")
    (only_unreadable / "a/x.png").touch()
    with pytest.raises(DataError, match=r"1 unreadable image\n.*empty file\n.*: --skip-bad$"):
        load(only_unreadable, skip_bad=False)


def test_classes_that_a_split_lacks_are_left_out_of_all(make_folder) -> None:
    folder = make_folder({f"{split}/{name}": 2 for split in ("train", "val", "test") for name in "abcd"})
    shutil.rmtree(folder / "val/c")
    for i in range(2):
        (folder / f"test/d/{i}.png").write_text("x")
    data = load(folder)

    assert data.counts() == {split: {"a": 2, "b": 2} for split in ("train", "val", "test")}
    assert {path: kind for path, kind in skipped(data).items() if "/" not in path} == {
        "c": "missing-class", "d": "missing-class",
    }  # fmt: skip


def test_too_little_that_is_left_is_still_an_error(make_folder) -> None:
    with pytest.raises(DataError, match="at least two classes, found only 'a'"):
        load(make_folder({"a": 6, "b": 2}))


def test_rows_of_a_manifest(make_folder) -> None:
    folder = make_folder({"p": 10})
    rows = [f"p/{i}.png,{'ab'[i % 2]}" for i in range(8)] + ["p/8.png,a", "p/8.png,b", "p/9.png,", "no.png,a", "p/9"]
    (folder / "list.csv").write_text("\n".join(["path,label", *rows]))
    data = load(folder / "list.csv")

    assert len(data.as_rows()) == 8  # of p/8.png nobody knows the label
    assert sorted(each.kind for each in data.skipped) == ["listed-twice", "manifest-row", "manifest-row", "unreadable"]


def test_unlabeled_images(make_folder, tmp_path: Path) -> None:
    more = tmp_path / "more"
    more.mkdir()
    Image.new("RGB", (9, 9)).save(more / "0.png")
    (more / "1.png").touch()
    data = load(make_folder({"a": 4, "b": 4}), unlabeled=str(more))

    assert data.unlabeled is not None
    assert data.unlabeled.names == ("0.png",)
    assert skipped(data) == {f"{more}/1.png": "empty-file"}
    (more / "0.png").unlink()
    with pytest.raises(DataError, match="no unlabeled image is left: 1 files cannot be read"):
        load(tmp_path / "images", unlabeled=str(more))


def test_files_elsewhere_are_known_again_when_they_have_not_changed(make_folder, tmp_path: Path, monkeypatch) -> None:
    from potstill.data import scan

    store = make_folder({"s": 12}, tmp_path / "store")
    rows = "".join(f"{store}/s/{i}.png,{'ab'[i % 2]}\n" for i in range(12))
    (tmp_path / "list").mkdir()
    (tmp_path / "list/list.csv").write_text("path,label\n" + rows)
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scan, "RACY", 0)
    first = load(tmp_path / "list/list.csv", follow_links=True)
    monkeypatch.setattr(scan, "read_file", lambda path: pytest.fail(f"read {path} again"))

    assert load(tmp_path / "list/list.csv", follow_links=True).fingerprint == first.fingerprint


def test_a_folder_one_too_high_is_said(make_folder) -> None:
    with pytest.raises(
        DataError, match="with folders cat, dog in it: if these are the classes, give photos as the data"
    ):
        load(make_folder({"photos/cat": 3, "photos/dog": 3}), skip_bad=False)


def test_classes_that_are_numbers_are_said_to_be_in_the_order_of_text(make_folder) -> None:
    def notes(names: list[str]) -> list[str]:
        report = validate_data(DataSettings(source=str(make_folder(dict.fromkeys(names, 3)))))
        return [each for each in report.notes if "order" in each]

    assert notes(["0", "1", "2"]) == []
    assert notes(["0", "1", "2", "10"]) == [
        "class names are sorted as text, so that output 2 is '10' and not '2'; weights of other programs may have the "
        "order of the numbers"
    ]


def test_class_names_that_other_systems_change_are_said(make_folder) -> None:
    report = validate_data(DataSettings(source=str(make_folder({"cat ": 3, "dog.": 3, "e": 3}))))

    assert report.notes[0] == "class names that end in blanks or dots, which Windows drops: 'cat ', 'dog.'"


def test_shards_and_images_are_no_place_for_it(make_folder, tmp_path: Path) -> None:
    (tmp_path / "s.tar").touch()
    with pytest.raises(UsageError, match=r"--skip-bad .* takes folders and manifests"):
        load(tmp_path / "s.tar")
    with pytest.raises(UsageError, match="for an image, give the folder that holds the class folders"):
        load(make_folder({"a": 1}) / "a/0.png")


def test_sizes_of_files_and_arrays(make_folder) -> None:
    data = load(make_folder({"a": 4, "b": 4}))
    widths, heights = image_sizes(data.train)

    assert (set(widths.tolist()), set(heights.tolist())) == ({12}, {10})
    arrays = ArraySet(np.zeros((700, 5, 7), np.uint8), [0] * 700, ["x"] * 700)
    widths, heights = image_sizes(arrays)
    assert (set(widths.tolist()), set(heights.tolist()), len(widths)) == ({7}, {5}, 256)
