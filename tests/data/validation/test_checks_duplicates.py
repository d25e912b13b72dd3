"""The same picture twice: by content and by pixels, within and across splits, under two labels."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from potstill.data.settings import DataSettings
from potstill.data.validation import HashedImages, find_duplicates, group_equal_rows
from potstill.data.validation.validate import validate_data

SPLITS = {f"{split}/{name}": 4 for split in ("train", "val", "test") for name in ("cat", "dog")}


@pytest.fixture
def folder(make_folder) -> Path:
    return make_folder(SPLITS)


def test_nothing_is_found_where_nothing_is(folder: Path, examined) -> None:
    assert examined(folder) == {}


def test_within_a_split(folder: Path, examined) -> None:
    shutil.copy(folder / "train/cat/0.png", folder / "train/cat/z.png")

    assert examined(folder) == {
        "duplicate": {"train/cat/0.png": "the same file as train/cat/z.png, 'cat' in train"},
    }


def test_the_same_pixels_in_png_and_bmp(folder: Path, examined, picture) -> None:
    for name in ("a.png", "b.bmp", "c.tiff", "d.gif"):  # the last one has a palette of 256: other pixels
        picture(0, (40, 40)).save(folder / "train/cat" / name)
    picture(0, (40, 40)).save(folder / "train/cat/e.webp", lossless=True)

    assert examined(folder) == {
        "duplicate": {
            "train/cat/a.png": "the same pixels as train/cat/b.bmp, train/cat/c.tiff and train/cat/e.webp, "
            "'cat' in train"
        }
    }


def test_the_same_file_and_the_same_pixels_are_told_apart(folder: Path, picture) -> None:
    picture(0).save(folder / "train/cat/a.png")
    picture(0).save(folder / "train/cat/b.bmp")
    shutil.copy(folder / "train/cat/a.png", folder / "train/cat/c.png")
    report = validate_data(DataSettings(source=str(folder)))

    (finding,) = report.findings
    assert finding.reason.startswith("the same file as train/cat/c.png, the same pixels as train/cat/b.bmp, 'cat'")
    assert finding.others == ("train/cat/b.bmp", "train/cat/c.png")
    assert (report.repeats["by_content"], report.repeats["by_pixels"]) == (1, 2)


def test_under_two_labels(folder: Path, examined, picture) -> None:
    picture(0).save(folder / "train/cat/a.png")
    picture(0).save(folder / "train/dog/b.bmp")
    found = examined(folder)

    assert found == {
        "two-labels": {
            "train/cat/a.png": "the same pixels as train/dog/b.bmp, as 'cat' in train and 'dog' in train; "
            "keep the right one"
        }
    }


@pytest.mark.parametrize(("one", "other"), [("train", "test"), ("val", "test"), ("train", "val")])
def test_across_splits(folder: Path, examined, one: str, other: str) -> None:
    shutil.copy(folder / f"{one}/cat/0.png", folder / f"{other}/cat/z.png")
    found = examined(folder)

    assert list(found) == ["across-splits"]
    ((path, reason),) = found["across-splits"].items()
    assert {path} | {word.strip(",") for word in reason.split()} >= {f"{one}/cat/0.png", f"{other}/cat/z.png"}
    assert f"'cat' in {one}" in reason
    assert f"'cat' in {other}" in reason


def test_across_splits_and_under_two_labels(folder: Path, examined) -> None:
    shutil.copy(folder / "train/cat/0.png", folder / "test/dog/z.png")

    assert list(examined(folder)) == ["two-labels"]


def test_a_pile_is_compared_as_it_will_be_split(make_folder, examined) -> None:
    folder = make_folder({"a": 40, "b": 40})
    for i in range(40):
        Image.open(folder / f"a/{i}.png").save(folder / f"a/copy{i}.bmp")  # files of equal content stay together
    found = examined(folder)

    # Of 40 pairs, each half in train with a chance of 0.7: some stay together, some do not.
    assert set(found) == {"duplicate", "across-splits"}
    assert len(found["duplicate"]) + len(found["across-splits"]) == 40


def numbers(count: int, **same: int) -> HashedImages:
    """99 of train and ``count`` of test, where each of ``same`` has the pixels of an image of train."""
    total = 99 + count
    digests = np.zeros((total, 16), np.uint8)
    digests[:, 0], digests[:, 1] = np.arange(total) % 256, np.arange(total) // 256
    for at, of in enumerate(same.values()):
        digests[99 + at] = digests[of]
    splits = np.array([0] * 99 + [2] * count, np.int8)
    content = np.zeros((total, 32), np.uint8)
    return HashedImages([f"{i}.png" for i in range(total)], ["a"], np.zeros(total, np.int64), splits, content, digests)


@pytest.mark.parametrize(
    ("test", "same", "kind"), [(100, 1, "across-splits"), (101, 1, "few-across-splits"), (201, 2, "few-across-splits")]
)
def test_one_percent_of_a_split_makes_it_an_error(test: int, same: int, kind: str) -> None:
    repeats = find_duplicates(numbers(test, **{str(i): i for i in range(same)}))

    assert {each.kind for each in repeats.findings} == {kind}
    assert repeats.seen_before == {"val": 0, "test": same}


@pytest.mark.parametrize("where", [slice(0, 5), slice(11, 16), slice(6, 11)])
def test_groups_are_those_of_a_dictionary(where: slice) -> None:
    digests = np.ones((500, 16), np.uint8)
    digests[:, where] = np.random.default_rng(0).integers(0, 3, (500, 5), dtype=np.uint8)
    slow: dict[bytes, list[int]] = {}
    for i, row in enumerate(digests):
        slow.setdefault(row.tobytes(), []).append(i)

    assert [group.tolist() for group in group_equal_rows(digests)] == [
        group for group in slow.values() if len(group) > 1
    ]
    assert len(slow) < 243 + 1
    assert list(group_equal_rows(digests[:0])) == list(group_equal_rows(digests[:1])) == []


def test_many_copies_are_one_finding_of_bounded_length(folder: Path) -> None:
    for i in range(30):
        shutil.copy(folder / "train/cat/0.png", folder / f"train/cat/copy{i:02d}.png")
    (finding,) = validate_data(DataSettings(source=str(folder))).findings

    assert len(finding.others) == 30
    assert "and 27 more" in finding.reason
    assert len(finding.reason) < 200


def test_files_that_cannot_be_decoded_are_no_duplicates(folder: Path, examined) -> None:
    for name in ("x.png", "y.png"):
        (folder / "train/cat" / name).write_text("the same")

    assert list(examined(folder)) == ["no-image"]
