import numpy as np
import pytest

from potstill.data import AugmentSettings
from potstill.data.image_sets import ArraySet
from potstill.data.splits import DataSplits, check_splits, fingerprint, stratified_split, stratified_subset
from potstill.errors import DataError

NAMES = [f"image {i}" for i in range(200)]
LABELS = np.array([0] * 100 + [1] * 60 + [2] * 40)
CLASSES = ("a", "b", "c")
SHARES = {"val": 0.15, "test": 0.25}


def test_parts_are_stratified_disjoint_and_exhaustive() -> None:
    parts = stratified_split(NAMES, LABELS, SHARES, 0, CLASSES)
    assert np.sort(np.concatenate(list(parts.values()))).tolist() == list(range(200))
    counts = {part: np.bincount(LABELS[index]).tolist() for part, index in parts.items()}
    assert counts == {"train": [60, 36, 24], "val": [15, 9, 6], "test": [25, 15, 10]}


def test_seed_decides_and_the_order_of_files_does_not() -> None:
    def named(parts: dict, names: list) -> dict:
        return {part: {names[i] for i in index} for part, index in parts.items()}

    first = named(stratified_split(NAMES, LABELS, SHARES, 0, CLASSES), NAMES)
    order = np.random.default_rng(0).permutation(200)
    shuffled = [NAMES[i] for i in order]
    assert named(stratified_split(shuffled, LABELS[order], SHARES, 0, CLASSES), shuffled) == first
    other = named(stratified_split(NAMES, LABELS, SHARES, 1, CLASSES), NAMES)
    assert other != first
    # independent seeds overlap by chance only: 30 of 200, so 4.5 of 30 expected
    assert len(other["val"] & first["val"]) < 14


def test_small_classes_are_in_every_part() -> None:
    labels = np.array([0] * 3 + [1] * 4)
    parts = stratified_split(NAMES[:7], labels, {"val": 0.1, "test": 0.1}, 0, ("a", "b"))
    counts = {part: np.bincount(labels[index]).tolist() for part, index in parts.items()}
    assert counts == {"train": [1, 2], "val": [1, 1], "test": [1, 1]}
    greedy = stratified_split(NAMES[:7], labels, {"val": 0.45, "test": 0.5}, 0, ("a", "b"))
    assert min(np.bincount(labels[index]).min() for index in greedy.values()) == 1


def test_too_few_images_names_class_and_need() -> None:
    with pytest.raises(DataError) as caught:
        stratified_split(NAMES[:7], np.array([0] * 5 + [1] * 2), SHARES, 0, ("cat", "dog"))
    assert caught.value.exit_code == 3
    assert "needs at least 3, but 'dog' has 2" in str(caught.value)
    with pytest.raises(DataError, match="below 1"):
        stratified_split(NAMES, LABELS, {"val": 0.5, "test": 0.5}, 0, CLASSES)


def test_subset_keeps_shares() -> None:
    index = stratified_subset(NAMES, LABELS, 50, 0)
    assert np.bincount(LABELS[index]).tolist() == [25, 15, 10]
    assert (np.diff(index) > 0).all()
    assert set(index) != set(stratified_subset(NAMES, LABELS, 50, 1))


def splits_of(labels: list[int]) -> ArraySet:
    return ArraySet(np.zeros((len(labels), 2, 2), dtype=np.uint8), labels, [f"x/{i}" for i in range(len(labels))])


def test_counts_and_rows() -> None:
    train, val, test = splits_of([0, 1, 1]), splits_of([0, 1]), splits_of([1, 0])
    data = DataSplits(("a", "b"), train, val, test, "s", "o", "f", AugmentSettings())
    assert data.counts() == {"train": {"a": 1, "b": 2}, "val": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}}
    assert data.as_rows()[:4] == [
        ("train", "x/0", "a"),
        ("train", "x/1", "b"),
        ("train", "x/2", "b"),
        ("val", "x/0", "a"),
    ]


def test_fingerprint_sees_content_label_and_split_but_not_order() -> None:
    def of(names: list[str], labels: list[int], words: list[str], split: str = "train") -> str:
        images = ArraySet(np.zeros((len(names), 1, 1), dtype=np.uint8), labels, names)
        return fingerprint({split: images}, ("a", "b"), {split: words})

    first = of(["x", "y"], [0, 1], ["1", "2"])
    assert of(["y", "x"], [1, 0], ["2", "1"]) == first
    assert len(first) == 64
    others = [
        of(["x", "z"], [0, 1], ["1", "2"]),
        of(["x", "y"], [1, 1], ["1", "2"]),
        of(["x", "y"], [0, 1], ["1", "3"]),
        of(["x", "y"], [0, 1], ["1", "2"], "val"),
    ]
    assert len({first, *others}) == 5


def test_all_missing_classes_are_named_at_once() -> None:
    with pytest.raises(DataError) as caught:
        check_splits(("a", "b", "c"), {"train": splits_of([0, 1]), "val": splits_of([1, 2])}, "data")
    assert "train has no images of 'c'" in str(caught.value)
    assert "val has no images of 'a'" in str(caught.value)
    with pytest.raises(DataError, match="label 5"):
        check_splits(("a", "b"), {"train": splits_of([0, 1, 5])}, "data")
