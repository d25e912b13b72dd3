import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from potstill.data.datasets import check_source, load_data
from potstill.data.file_datasets import list_images
from potstill.data.image_sets import ArraySet, SemiSupervisedSet, UnlabeledFileSet
from potstill.data.loader import Loader
from potstill.data.settings import DataSettings
from potstill.errors import DataError, UsageError
from potstill.input_spec import InputSpec


def add(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(8):
        add(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png", i)
    return tmp_path / "photos"


@pytest.fixture
def more(tmp_path: Path) -> Path:
    for i, place in enumerate(["z.png", "one/y.png", "one/two/three/x.png"]):
        add(tmp_path / "more" / place, 100 + i)
    return tmp_path / "more"


def test_images_at_any_depth_join_without_labels(photos: Path, more: Path) -> None:
    (more / ".hidden.txt").write_text("no image")
    plain = load_data(DataSettings(source=str(photos), size=8))
    data = load_data(DataSettings(source=str(photos), size=8, unlabeled=str(more)))
    assert data.unlabeled is not None
    assert data.unlabeled.names == ("one/two/three/x.png", "one/y.png", "z.png")
    assert data.unlabeled.labels.tolist() == [-100] * 3
    assert data.unlabeled.pixels(2).shape == (10, 12, 3)
    assert data.origin == f"{plain.origin}; 3 unlabeled from {more}"
    assert data.counts() == plain.counts()
    assert plain.unlabeled is None


def test_the_fingerprint_covers_them(photos: Path, more: Path) -> None:
    settings = DataSettings(source=str(photos), size=8, unlabeled=str(more))
    before = load_data(settings).fingerprint
    assert before == load_data(settings).fingerprint != load_data(DataSettings(source=str(photos), size=8)).fingerprint
    add(more / "z.png", 999)
    changed = load_data(settings).fingerprint
    shutil.move(more / "z.png", more / "w.png")
    assert len({before, changed, load_data(settings).fingerprint}) == 3


def test_hostile_files_are_refused_all_at_once(photos: Path, more: Path) -> None:
    (more / "one" / "broken.png").write_text("no image")
    (more / "empty.jpg").write_bytes(b"")
    words = r"(?s)2 unreadable images.*empty\.jpg: empty file.*broken\.png: no image.*--skip-bad"
    with pytest.raises(DataError, match=words):
        load_data(DataSettings(source=str(photos), size=8, unlabeled=str(more)))
    (more / "out.png").symlink_to(photos / "a" / "0.png")
    (more / "loop").symlink_to(more)
    with pytest.raises(DataError, match=r"(?s)2 problems.*a link to a folder.*a link out of the data folder"):
        load_data(DataSettings(source=str(photos), size=8, unlabeled=str(more)))


def test_missing_and_empty_folders(photos: Path, tmp_path: Path) -> None:
    for wrong in (tmp_path / "nowhere", photos / "a" / "0.png"):
        with pytest.raises(UsageError, match=r"data\.unlabeled: no folder"):
            load_data(DataSettings(source=str(photos), size=8, unlabeled=str(wrong)))
    check_source(DataSettings(source=str(photos)))
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    with pytest.raises(DataError, match="empty: no images"):
        list_images(tmp_path / "empty", DataSettings())


def test_images_of_val_and_test_are_not_learned_from(photos: Path, more: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)2 of the unlabeled images are images of val, for example.*a folder"):
        load_data(DataSettings(source=str(photos), size=8, unlabeled=str(photos)))
    for split, seeds in (("train", (1, 2)), ("val", (3, 4)), ("test", (5, 6))):
        for seed, name in zip(seeds, "ab", strict=True):
            add(more.parent / "split" / split / name / f"{seed}.png", seed)
    source = more.parent / "split"
    data = load_data(DataSettings(source=str(source), size=8, unlabeled=str(source / "train")))
    assert data.unlabeled is not None  # training images without their labels are no secret
    assert len(data.unlabeled) == 2
    with pytest.raises(DataError, match="2 of the unlabeled images are images of test"):
        load_data(DataSettings(source=str(source), size=8, unlabeled=str(source / "test")))


def test_copies_of_val_and_test_are_left_out(photos: Path, more: Path) -> None:
    plain = load_data(DataSettings(source=str(photos), size=8))
    for split in ("train", "val", "test"):
        shutil.copy(photos / plain.split(split).names[0], more / f"copy-of-{split}.png")
    settings = DataSettings(source=str(photos), size=8, unlabeled=str(more))
    data = load_data(settings)
    assert data.unlabeled is not None
    assert "copy-of-train.png" in data.unlabeled.names  # a training image without its label is no secret
    assert len(data.unlabeled) == 4
    copied = f"copy-of-val.png, a copy of {plain.val.names[0]}"
    assert f"4 unlabeled from {more} without 2 copies of images of val or test" in data.origin
    assert "4 unlabeled images are used without 2 copies of images of val or test, for example " in data.notes[-1]
    assert copied in data.origin or "copy-of-test.png" in data.origin
    for name in ("copy-of-val.png", "copy-of-test.png"):
        (more / name).unlink()
    assert load_data(settings).fingerprint == data.fingerprint
    only = more.parent / "only"
    only.mkdir()
    shutil.copy(photos / plain.test.names[0], only / "x.png")
    with pytest.raises(DataError, match="no unlabeled image is left: 1 have the content of images of val or test"):
        load_data(DataSettings(source=str(photos), size=8, unlabeled=str(only)))


def test_data_from_python_may_bring_them_or_take_the_folder(photos: Path, more: Path) -> None:
    data = load_data(DataSettings(source=str(photos), size=8))
    found = load_data(DataSettings(size=8, unlabeled=str(more)), data)
    assert found.unlabeled is not None
    assert len(found.unlabeled) == 3
    own = replace(data, unlabeled=ArraySet(np.zeros((2, 8, 8), dtype=np.uint8), [0, 0], ["p", "q"]))
    assert load_data(DataSettings(size=8), own).unlabeled is own.unlabeled
    with pytest.raises(UsageError, match="not from both"):
        load_data(DataSettings(size=8, unlabeled=str(more)), own)


def test_their_labels_never_count(more: Path) -> None:
    labeled = ArraySet(np.zeros((3, 8, 8), dtype=np.uint8), [0, 1, 1], ["a", "b", "c"])
    named = ArraySet(np.ones((2, 8, 8), dtype=np.uint8), [1, 1], ["d", "e"])
    joined = SemiSupervisedSet(labeled, named)
    assert joined.labels.tolist() == [0, 1, 1, -100, -100]
    assert joined.names == ("a", "b", "c", "d", "e")
    assert [joined.pixels(i)[0, 0, 0] for i in range(5)] == [0, 0, 0, 1, 1]
    files = UnlabeledFileSet(more, list_images(more, DataSettings())[0])
    loader = Loader(labeled, InputSpec(8), batch_size=3, unlabeled=files)
    assert next(loader.epoch()).labels.tolist() == [0, 1, 1, -100, -100, -100]


def test_labels_of_some_training_images_are_used(photos: Path, more: Path) -> None:
    for i in range(8, 40):
        add(photos / "ab"[i % 2] / f"{i}.png", i)
    plain = load_data(DataSettings(source=str(photos), size=8))
    settings = DataSettings(source=str(photos), size=8, labels_per_class=3)
    data = load_data(settings)
    assert data.counts() == {**plain.counts(), "train": {"a": 3, "b": 3}}
    assert data.unlabeled is not None
    assert set(data.unlabeled.labels.tolist()) == {-100}
    assert sorted([*data.train.names, *data.unlabeled.names]) == sorted(plain.train.names)
    for images in (data.train, data.unlabeled):
        for i, name in enumerate(images.names):
            assert (images.pixels(i) == np.asarray(Image.open(photos / name))).all()
    assert data.origin.endswith(f"in train, 3 labels a class are used, and {len(data.unlabeled)} images without theirs")
    assert load_data(settings).train.names == data.train.names
    again = load_data(DataSettings(source=str(photos), size=8, labels_per_class=4))
    assert set(data.train.names) < set(again.train.names), "more labels are added to the same"
    assert len({each.fingerprint for each in (plain, data, again)}) == 3
    with pytest.raises(DataError, match=r"15 keeps all labels, as no class has more than 14 in train"):
        load_data(DataSettings(source=str(photos), size=8, labels_per_class=15))
    with pytest.raises(UsageError, match=r"leave out one of data\.labels_per_class and data.unlabeled"):
        load_data(DataSettings(source=str(photos), size=8, labels_per_class=3, unlabeled=str(more)))


def test_a_class_with_fewer_labels_than_asked_for_is_said(tmp_path: Path) -> None:
    for at, label in enumerate("a" * 20 + "b" * 4):
        add(tmp_path / label / f"{at}.png", at)
    data = load_data(DataSettings(source=str(tmp_path), size=8, labels_per_class=5))
    assert data.counts()["train"] == {"a": 5, "b": 2}
    assert "in train, up to 5 labels a class are used, and 9 images without theirs" in data.origin
