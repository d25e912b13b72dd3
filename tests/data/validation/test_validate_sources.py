"""Folders, manifests and named data sets, as `run` takes them."""

from pathlib import Path

import numpy as np
import pytest

from potstill.data.image_sets import ArraySet, ConcatenatedSet, Subset
from potstill.data.settings import AugmentSettings, DataSettings
from potstill.data.splits import SPLITS, DataSplits
from potstill.data.validation.validate import list_splits, validate_data, validate_listing
from potstill.errors import UsageError


class Watching:
    def __init__(self) -> None:
        self.waits: list[tuple[str, int, int]] = []

    def wait(self, what: str, done: int, total: int) -> None:
        self.waits.append((what, done, total))

    def note(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...


def test_digits() -> None:
    report = validate_data(DataSettings(source="digits"))

    assert report.findings == []
    assert report.images == 1797
    assert report.division.origin == "made here: stratified 70/15/15, split seed 0"
    assert report.figures["formats"] == {"array": 1797}
    assert {split: int(counts.sum()) for split, counts in report.division.counts().items()} == {
        "train": 1259, "val": 269, "test": 269,
    }  # fmt: skip


def test_repeats_among_arrays_of_several_sets() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    pixels[25] = pixels[3]
    images = ArraySet(pixels, np.arange(30) % 2, [f"m/{i:02d}" for i in range(30)])
    train, val, test = (Subset(images, range(*ends)) for ends in ((0, 10), (10, 20), (20, 30)))
    data = DataSplits(("a", "b"), train, val, test, "made", "made", "", AugmentSettings())
    report = validate_listing(list_splits(data), DataSettings(source="made"))

    assert [(each.kind, each.path, each.others) for each in report.findings] == [
        ("across-splits", "m/03", ("m/25",)),
    ]
    chained = ConcatenatedSet(*(data.split(split) for split in SPLITS))
    assert all(np.array_equal(chained.pixels(i), images.pixels(i)) for i in range(30))


def test_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'digits'"):
        validate_data(DataSettings(source="digit"))
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(UsageError, match="a file of data is a manifest"):
        validate_data(DataSettings(source=str(tmp_path / "a.md")))


def test_progress(make_folder) -> None:
    watching = Watching()
    validate_data(DataSettings(source=str(make_folder({"a": 30, "b": 20}))), watching)

    assert watching.waits == [("checking images", done, 50) for done in (16, 32, 48, 50)]


def test_a_changed_file_is_read_again(make_folder, picture) -> None:
    folder = make_folder({"a": 4, "b": 4})
    settings = DataSettings(source=str(folder))
    assert validate_data(settings).findings == []
    picture(1).save(folder / "a" / "0.png")
    (folder / "b" / "0.png").write_bytes((folder / "a" / "0.png").read_bytes())

    assert [each.kind for each in validate_data(settings).findings] == ["two-labels"]
