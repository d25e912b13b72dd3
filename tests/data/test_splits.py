from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from potstill.data.image_sets import ArraySet, FileSet, Subset, decoding_set
from potstill.data.settings import AugmentSettings, DataSettings
from potstill.data.splits import (
    DataSplits,
    assign_folds,
    check_splits,
    fingerprint,
    fold_splits,
    pool_splits,
    stratified_split,
    stratified_subset,
    unite_copies,
)
from potstill.errors import DataError, UsageError

NAMES = [f"image {i}" for i in range(200)]
LABELS = np.array([0] * 100 + [1] * 60 + [2] * 40)
CLASSES = ("a", "b", "c")
SHARES = {"val": 0.15, "test": 0.25}


def test_parts_are_stratified_disjoint_and_exhaustive() -> None:
    parts = stratified_split(NAMES, LABELS, SHARES, 0, CLASSES)
    assert np.sort(np.concatenate(list(parts.values()))).tolist() == list(range(200))
    counts = {part: np.bincount(LABELS[index]).tolist() for part, index in parts.items()}
    assert counts == {"train": [60, 36, 24], "val": [15, 9, 6], "test": [25, 15, 10]}


def test_copies_are_in_one_split_unless_a_class_would_lose_its_last_image() -> None:
    parts = stratified_split(NAMES, LABELS, SHARES, 0, CLASSES)
    splits = np.zeros(200, np.int8)
    splits[parts["val"]], splits[parts["test"]] = 1, 2
    assert np.array_equal(unite_copies(NAMES, LABELS, splits, list(range(200))), splits)
    groups = [i % 60 if i < 120 else None for i in range(200)]  # pairs, also of two labels
    united = unite_copies(NAMES, LABELS, splits, groups)
    assert np.array_equal(united[:60], united[60:120])
    assert np.array_equal(united[120:], splits[120:])
    assert np.bincount(united).tolist() == pytest.approx([120, 30, 50], abs=12)
    few = np.array([0, 0, 1, 2], np.int8)
    found = unite_copies(NAMES, np.zeros(4, np.int64), few, ["x", None, "x", None])
    assert found.tolist() == [1, 0, 1, 2]  # val has one image
    assert np.array_equal(unite_copies(NAMES, np.zeros(4, np.int64), few, ["x"] * 4), few)


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
        ("train", "x/0", "a", ""),
        ("train", "x/1", "b", ""),
        ("train", "x/2", "b", ""),
        ("val", "x/0", "a", ""),
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
    assert "or give the data without" not in str(caught.value)
    with pytest.raises(DataError, match=r"val has no images of 'b'\nLeave .* or give the data without val"):
        check_splits(("a", "b"), {"train": splits_of([0, 1]), "val": splits_of([0])}, "data")
    with pytest.raises(DataError, match="label 5"):
        check_splits(("a", "b"), {"train": splits_of([0, 1, 5])}, "data")


def test_folds_are_stratified_and_even() -> None:
    folds = assign_folds(NAMES, LABELS, 7, 0, CLASSES)
    assert np.ptp(np.bincount(folds, minlength=7)) == 1  # 200 images
    for label in range(3):
        assert np.ptp(np.bincount(folds[label == LABELS], minlength=7)) <= 1
    order = np.random.default_rng(0).permutation(200)
    again = assign_folds([NAMES[i] for i in order], LABELS[order], 7, 0, CLASSES)
    assert (again == folds[order]).all()
    assert (assign_folds(NAMES, LABELS, 7, 1, CLASSES) != folds).any()


def test_a_group_stays_in_one_fold() -> None:
    groups = np.arange(200) // 2
    folds = assign_folds(NAMES, LABELS, 5, 0, CLASSES, groups)
    assert (folds[0::2] == folds[1::2]).all()
    assert np.bincount(folds).tolist() == [40] * 5


@pytest.mark.parametrize(
    ("count", "folds", "message"),
    [
        (
            4,
            5,
            "not enough images for 5 folds: every class needs at least 5 images, but 'small' has 4; at most 4 folds",
        ),
        (3, 2, "every class needs at least 4 images, but 'small' has 3"),  # one of the two left would be all of train
        (2, 2, "give these classes more images"),
    ],
)
def test_classes_too_small_for_the_folds_are_named(count: int, folds: int, message: str) -> None:
    labels = np.array([0] * 20 + [1] * count)
    with pytest.raises(DataError, match=message):
        assign_folds(NAMES[: len(labels)], labels, folds, 0, ("large", "small"))


def pictured(labels: list, names: list, **more: object) -> ArraySet:
    pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None] + np.zeros((1, 2, 2), np.uint8)
    return ArraySet(pixels, labels, names)


def three_splits() -> DataSplits:
    train = pictured([0, 1] * 8, [f"train/{i}" for i in range(16)])
    val, test = (pictured([0, 1] * 2, [f"{split}/{i}" for i in range(4)]) for split in ("val", "test"))
    return DataSplits(("a", "b"), train, val, test, "made", "own splits", "0" * 64, AugmentSettings())


def test_given_splits_are_pooled_and_each_image_is_tested_once() -> None:
    data = pool_splits(three_splits())
    folds = [fold_splits(data, DataSettings(folds=4, fold=fold)) for fold in (1, 2, 3, 4)]
    every = {*data.train.names, *data.val.names, *data.test.names}
    assert sorted(name for each in folds for name in each.test.names) == sorted(every)
    for each in folds:
        assert {*each.train.names, *each.val.names} == every - {*each.test.names}
        assert each.counts()["test"] == {"a": 3, "b": 3}
        assert "pooled" in each.origin
        for split in ("train", "val", "test"):
            images = each.split(split)
            assert [int(images.pixels(i)[0, 0, 0]) for i in range(len(images))] == [
                int(name.split("/")[1]) for name in images.names
            ]
    assert len({each.fingerprint for each in folds} | {data.fingerprint}) == 5
    assert folds[0].fingerprint == fold_splits(three_splits(), DataSettings(folds=4, fold=1)).fingerprint


def test_all_folds_are_decoded_as_one_set() -> None:
    data = pool_splits(three_splits())
    sets = [decoding_set(fold_splits(data, DataSettings(folds=4, fold=fold)).train, "own") for fold in (1, 2)]
    assert sets[0][0] is sets[1][0]
    assert sets[0][2] == sets[1][2] == f"{data.fingerprint}/train"
    plain = Subset(data.train, [1, 0])
    assert decoding_set(plain, "own") == (plain, None, "own")


def test_the_fold_all_tests_one_image_of_each_class() -> None:
    found = fold_splits(three_splits(), DataSettings(folds=4, fold="all"))
    assert found.counts()["test"] == {"a": 1, "b": 1}
    assert len(found.train) + len(found.val) == 22


def test_files_of_equal_content_stay_in_one_fold() -> None:
    files = FileSet(Path("photos"), [f"{i}.png" for i in range(40)], [0, 1] * 20)
    # 0.png and 2.png, 4.png and 6.png, ... are copies
    files.expect({f"{i}.png": f"1 {i // 4 * 2 + i % 2:064x}" for i in range(40)})
    parts = [Subset(files, index) for index in (np.arange(20), np.arange(20, 30), np.arange(30, 40))]
    data = replace(three_splits(), train=parts[0], val=parts[1], test=parts[2])
    for fold in (1, 2, 3):
        test = {
            int(name.removesuffix(".png")) for name in fold_splits(data, DataSettings(folds=3, fold=fold)).test.names
        }
        assert {i + 2 if i % 4 < 2 else i - 2 for i in test} == test
    assert pool_splits(data).pool.images is files  # type: ignore[union-attr]


def test_folds_need_a_fold_and_names_that_differ() -> None:
    with pytest.raises(UsageError, match="name its fold"):
        fold_splits(three_splits(), DataSettings(folds=3))
    data = three_splits()
    with pytest.raises(DataError, match="4 names are those of several images"):
        pool_splits(replace(data, val=data.test))
