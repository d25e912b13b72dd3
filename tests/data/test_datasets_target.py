import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from potstill.data.datasets import check_target, load_data, target_settings
from potstill.data.image_sets import ArraySet, RelabeledSet, file_digests, file_paths, is_array_based, is_file_based
from potstill.data.settings import DataSettings
from potstill.errors import DataError, UsageError


def photos(folder: Path, classes: str, count: int = 6, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    for name in classes.split():
        for i in range(count):
            path = folder / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return photos(tmp_path / "day", "cat dog owl")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return photos(tmp_path / "night", "cat dog owl", count=8, seed=1)


def settings(source: Path, target: Path, **more: object) -> DataSettings:
    return DataSettings(source=str(source), target=str(target), size=8, **more)


def test_the_target_stands_beside_the_source_split_by_the_same_shares(source: Path, target: Path) -> None:
    data = load_data(settings(source, target))
    alone = load_data(DataSettings(source=str(source), size=8))
    assert data.target is not None
    assert data.measured is data.target
    assert data.target.source == str(target)
    assert data.counts() == alone.counts()
    assert data.target.counts() == {  # of 8: 15 % are 1.2, so 1 each
        "train": {"cat": 6, "dog": 6, "owl": 6},
        "val": {"cat": 1, "dog": 1, "owl": 1},
        "test": {"cat": 1, "dog": 1, "owl": 1},
    }
    assert alone.measured is alone
    assert data.origin.startswith(alone.origin)
    assert str(target) in data.origin


def test_rows_name_the_domain(source: Path, target: Path) -> None:
    data = load_data(settings(source, target))
    rows = data.as_rows()
    assert len(rows) == 18 + 24
    splits = [split for split, *_ in rows]
    assert {split: splits.count(split) for split in dict.fromkeys(splits)} == {
        "train": 12, "val": 3, "test": 3, "target train": 18, "target val": 3, "target test": 3,
    }  # fmt: skip


def test_the_fingerprint_covers_both(source: Path, target: Path) -> None:
    found = {load_data(DataSettings(source=str(source), size=8)).fingerprint}
    found.add(load_data(settings(source, target)).fingerprint)
    assert load_data(settings(source, target)).fingerprint in found
    photos(target, "cat", count=1, seed=77)
    found.add(load_data(settings(source, target)).fingerprint)
    photos(source, "cat", count=1, seed=78)
    found.add(load_data(settings(source, target)).fingerprint)
    assert len(found) == 4


def test_classes_that_differ_are_named_with_the_nearest(source: Path, tmp_path: Path) -> None:
    other = photos(tmp_path / "night", "cat dogs fox")
    with pytest.raises(DataError) as caught:
        load_data(settings(source, other))
    assert str(caught.value).splitlines() == [
        f"source {source} and target {other} must have the same classes, by name:",
        "  source, 3: cat, dog, owl; no 'dogs'; did you mean 'dog'?, 'fox'",
        "  target, 3: cat, dogs, fox; no 'dog'; did you mean 'dogs'?, 'owl'",
        "Rename the class folders of one of them, or leave classes out of the other",
    ]


def test_classes_in_another_order_get_the_sources_numbers(source: Path, target: Path, tmp_path: Path) -> None:
    """Named data sets have orders of their own; what counts is the name."""
    base = load_data(DataSettings(source=str(source), size=8))
    arrays = {}
    for split in ("train", "val", "test"):
        images = np.stack([np.full((4, 4), 10 * i, np.uint8) for i in range(3)])
        arrays[split] = ArraySet(images, [0, 1, 2], [f"{split}/owl", f"{split}/cat", f"{split}/dog"])
    other = type(base)(
        ("owl", "cat", "dog"), arrays["train"], arrays["val"], arrays["test"], source="python", origin="made",
        fingerprint="0" * 64, augment=base.augment,
    )  # fmt: skip
    data = load_data(DataSettings(size=8), replace(base, target=other))
    assert data.target is not None
    assert data.target.class_names == ("cat", "dog", "owl")
    for split in ("train", "val", "test"):
        images = data.target.split(split)
        named = {name: data.class_names[label] for name, label in zip(images.names, images.labels, strict=True)}
        assert named == {f"{split}/owl": "owl", f"{split}/cat": "cat", f"{split}/dog": "dog"}
        assert images.pixels(1).max() == 10
    with pytest.raises(UsageError, match=r"from data\.target or with the data from Python, not from both"):
        load_data(DataSettings(size=8, target=str(target)), replace(base, target=other))


def test_one_folder_is_not_two_domains(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="share 18 files"):
        load_data(settings(source, source))
    with (tmp_path / "some.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label"])
        rows.writerows([f"day/{name}/{i}.png", name] for name in ("cat", "dog", "owl") for i in range(3))
    with pytest.raises(DataError, match="share 9 files"):
        load_data(settings(source, tmp_path / "some.csv"))


def test_a_target_without_test_images_of_a_class(source: Path, target: Path) -> None:
    for name in ("cat", "dog", "owl"):
        for split in ("train", "val", "test"):
            photos(target / split, name, count=2, seed=len(name + split) + ord(name[0]) * ord(split[0]))
        for each in (target / name).iterdir():
            each.unlink()
        (target / name).rmdir()
    load_data(settings(source, target))
    for each in (target / "test" / "owl").iterdir():
        each.unlink()
    with pytest.raises(DataError, match=r"night.*test.*owl|owl.*test"):
        load_data(settings(source, target))


def test_unlabeled_images_belong_to_the_target(source: Path, target: Path, tmp_path: Path) -> None:
    more = photos(tmp_path / "more", "anything", count=5, seed=9)
    data = load_data(settings(source, target, unlabeled=str(more)))
    assert data.unlabeled is None
    assert data.target is not None
    assert data.target.unlabeled is not None
    assert len(data.target.unlabeled) == 5
    with pytest.raises(DataError, match="images of val"):  # of the target: its figures would say nothing
        load_data(settings(source, target, unlabeled=str(target)))
    with pytest.raises(DataError, match="share 18 files"):
        load_data(settings(source, target, unlabeled=str(source)))


def test_a_missing_target_is_found_without_reading_an_image(source: Path, target: Path) -> None:
    check_target(DataSettings(source=str(source)))
    check_target(settings(source, target))
    with pytest.raises(UsageError, match="no data set, folder or manifest 'digit'; did you mean 'digits'"):
        check_target(DataSettings(source=str(source), target="digit"))
    with pytest.raises(UsageError, match="not given"):
        target_settings(DataSettings(source=str(source)))
    found = target_settings(settings(source, target, target_labels=0.5, split_seed=3, val=0.2))
    assert (found.source, found.target, found.target_labels, found.split_seed, found.val) == (
        str(target), None, 0.0, 3, 0.2,
    )  # fmt: skip


def test_relabelled_images_are_the_same_images(source: Path) -> None:
    images = load_data(DataSettings(source=str(source), size=8)).train
    hidden = RelabeledSet(images, np.full(len(images), -100))
    assert hidden.names == images.names
    assert set(hidden.labels.tolist()) == {-100}
    assert (hidden.pixels(4) == images.pixels(4)).all()
    assert is_file_based(hidden)
    assert not is_array_based(hidden)
    assert file_paths(hidden) == file_paths(images)
    kept, found = file_digests(images), file_digests(hidden)
    assert kept is not None
    assert found is not None
    assert (kept == found).all()
