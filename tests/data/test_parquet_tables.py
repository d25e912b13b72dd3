"""Parquet files as data: what becomes of rows, columns and names of files; and of all that can be wrong with them."""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from potstill.cli import main
from potstill.data.datasets import check_source, load_data
from potstill.data.file_datasets import list_source
from potstill.data.settings import DataSettings
from potstill.data.sources import is_table
from potstill.data.validation.validate import quick_findings, validate_data
from potstill.errors import DataError, PotstillError, StorageError, UsageError

from .conftest import write_image

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'potstill[datasets]'")
pq = pytest.importorskip("pyarrow.parquet")
CLASSES = ["zebra", "cat"]  # in the order of ClassLabel


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def image_bytes(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_table(path: Path, images, labels, *, hub=True, names=CLASSES, image="image", label="label", **more) -> Path:
    """A table as the hub's library writes them, or with plain bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if hub:
        column = pa.array([each if each is None else {"bytes": each, "path": "x.png"} for each in images],
                          pa.struct([("bytes", pa.binary()), ("path", pa.string())]))  # fmt: skip
        features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = pa.table({image: column, label: pa.array(labels), **more}).replace_schema_metadata(metadata)
    else:
        table = pa.table({image: pa.array(images, pa.binary()), label: pa.array(labels), **more})
    pq.write_table(table, path)
    return path


def write_rows(path: Path, count: int, first: int = 0, **how) -> Path:
    return write_table(path, [image_bytes(first + i) for i in range(count)], [i % 2 for i in range(count)], **how)


def load(source: Path, **settings):
    return load_data(DataSettings(source=str(source), **settings))


def test_a_folder_as_on_the_hub(tmp_path) -> None:
    folder = tmp_path / "set"
    write_rows(folder / "data" / "train-00000-of-00002.parquet", 10, id=pa.array(range(10)))
    write_rows(folder / "data" / "train-00001-of-00002.parquet", 10, 10, id=pa.array(range(10)))
    write_rows(folder / "data" / "validation-00000-of-00001.parquet", 4, 20, id=pa.array(range(4)))
    write_rows(folder / "data" / "test-00000-of-00001.parquet", 6, 30, id=pa.array(range(6)))
    (folder / "README.md").write_text("card")
    data = load(folder)
    assert data.class_names == ("cat", "zebra")
    assert [len(data.split(split)) for split in ("train", "val", "test")] == [20, 4, 6]
    assert data.origin == "tables train, val, test"
    assert data.notes == ("columns of the tables that are not used: id",)
    rows = {name: (split, label) for split, name, label, _ in data.as_rows()}
    assert rows["data/train-00001-of-00002.parquet/3"] == ("train", "cat")
    at = data.test.names.index("data/test-00000-of-00001.parquet/5")
    with Image.open(io.BytesIO(image_bytes(35))) as image:
        np.testing.assert_array_equal(data.test.pixels(at), np.asarray(image))


def test_it_equals_a_folder_of_the_same_bytes(tmp_path) -> None:
    write_rows(tmp_path / "t" / "images.parquet", 30)
    data = load(tmp_path / "t" / "images.parquet")
    for i in range(30):
        (file := tmp_path / "f" / CLASSES[i % 2] / f"{i}.png").parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image_bytes(i))
    plain = load(tmp_path / "f")
    assert data.counts() == plain.counts()
    # Pixel for pixel, whatever the names.
    own, others = (
        {images.pixels(i).tobytes(): int(images.labels[i]) for images in each for i in range(len(images))}
        for each in ((data.train, data.val, data.test), (plain.train, plain.val, plain.test))
    )
    assert own == others
    report = validate_data(DataSettings(source=str(tmp_path / "t" / "images.parquet")))
    assert (report.images, report.count("error"), report.figures["width"]["median"]) == (30, 0, 8)


@pytest.mark.parametrize(
    ("labels", "how", "names"),
    [
        ([0, 1], {"hub": True}, ("cat", "zebra")),
        ([0, 1], {"hub": False}, ("0", "1")),
        (["b", "a"], {"hub": False}, ("a", "b")),
        ([True, False], {"hub": False}, ("False", "True")),
        ([0, 1], {"hub": True, "image": "img", "label": "fine_label"}, ("cat", "zebra")),
        ([0, 1], {"hub": False, "image": "pixels", "label": "kind"}, ("0", "1")),
    ],
)
def test_columns_and_labels(tmp_path, labels, how, names) -> None:
    data = load(write_table(tmp_path / "a.parquet", [image_bytes(i) for i in range(12)], labels * 6, **how))
    assert data.class_names == names
    assert sum(map(len, (data.train, data.val, data.test))) == 12


def test_columns_by_option(tmp_path) -> None:
    more = {"thumb": pa.array([b"x"] * 12), "color": pa.array(["red", "green", "blue"] * 4)}
    path = write_rows(tmp_path / "a.parquet", 12, **more)
    assert load(path).class_names == ("cat", "zebra")
    assert load(path, options={"label": "color"}).class_names == ("blue", "green", "red")
    with pytest.raises(DataError, match="12 unreadable images"):
        load(path, options={"image": "thumb"})


def test_repeated_images_are_found(tmp_path) -> None:
    images = [image_bytes(i) for i in range(20)]
    images[1], images[4] = images[0], images[2]
    data = load(write_table(tmp_path / "a.parquet", images, [0, 1] * 10))
    assert {"two-labels"} <= {each.kind for each in quick_findings(data)}


def test_bad_rows_are_named_by_table_and_row(tmp_path, capsys) -> None:
    images = [image_bytes(i) for i in range(24)]
    images[3], images[5] = b"no image at all", None
    path = write_table(tmp_path / "a.parquet", images, [*[0, 1] * 9, 0, 7, -1, 1, 0, 1])
    with pytest.raises(DataError) as caught:
        load(path)
    for line in (
        f"{path}/5: no bytes of an image in column 'image'",
        f"{path}/19: the label 7 of column 'label' is out of range: its 2 classes are 0 to 1",
        f"{path}/20: the label -1 of column 'label' means: no label",
        "--skip-bad",
    ):
        assert line in str(caught.value)
    data = load(path, skip_bad=True)
    assert sum(map(len, (data.train, data.val, data.test))) == 20
    assert {(each.path, each.kind) for each in data.skipped} == {
        ("a.parquet/3", "no-image"), ("a.parquet/5", "table-row"), ("a.parquet/19", "table-row"),
        ("a.parquet/20", "table-row"),
    }  # fmt: skip
    bytes_alone = write_table(tmp_path / "b.parquet", [*images[:3], b"no image", *images[6:]], [0, 1] * 11)
    with pytest.raises(DataError, match=rf"(?s)1 unreadable image\n  {bytes_alone}/3: no image of the formats"):
        load(bytes_alone)
    assert main(["check", str(path)]) == 3
    assert "a.parquet/3: no image of the formats" in capsys.readouterr().out


def test_hostile_images_meet_the_limits_of_files(tmp_path) -> None:
    images = [image_bytes(i) for i in range(12)]
    bomb = io.BytesIO()
    Image.new("1", (20000, 20000)).save(bomb, "PNG")
    images[2], images[7] = bomb.getvalue(), b"\xff\xd8\xff" + bytes(65 * 2**20)
    path = write_table(tmp_path / "a.parquet", images, [0, 1] * 6)
    with pytest.raises(DataError, match=r"(?s)2 unreadable images.*/2: .*megapixels.*/7: more than 64 MiB of file"):
        load(path)


def test_a_small_table_does_not_fill_the_disk(tmp_path, cache) -> None:
    """One image of 4 MB, which 100 rows repeat by a dictionary."""
    noise = np.random.default_rng(0).bytes(2**22)
    images = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), pa.array([noise], pa.binary()))
    columns = {"image": images, "label": pa.array([0, 1] * 50)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 5e6
    with pytest.raises(DataError, match=r"a\.parquet: its images take more than 20 times the bytes of the file"):
        load(tmp_path / "a.parquet")
    assert sum(file.stat().st_size for file in (cache / "tables").rglob("*") if file.is_file()) < 170e6


def table(**columns):
    return lambda path: pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (table(label=pa.array([1])), {}, "no column of images among label .int64.; its values would be bytes"),
        (table(imgae=pa.array([1]), label=pa.array([1])), {}, "label .int64.; did you mean 'imgae'"),
        (table(image=pa.array(["a.png"]), label=pa.array([1])), {}, "a table of paths is a manifest"),
        (table(image=pa.array([b"a"])), {}, "no column of labels among image .binary.; its values would be whole numb"),
        (table(image=pa.array([b"a"]), label=pa.array([0.5])), {}, "no column of labels among image .*label .double."),
        (table(a=pa.array([b"a"]), b=pa.array([b"a"]), label=pa.array([1])), {}, "--set data.options.image=COLUMN"),
        (table(image=pa.array([b"a"]), x=pa.array([1]), y=pa.array([1])), {}, "--set data.options.label=COLUMN"),
        (table(image=pa.array([b"a"]), label=pa.array([1])), {"image": "imge"}, "no column 'imge'; did you mean"),
        (table(image=pa.array([b"a"]), label=pa.array([1])), {"image": "label"}, "'label' has the type int64; ima"),
        (table(image=pa.array([], pa.binary()), label=pa.array([], pa.int64())), {}, "the tables have no rows"),
        (table(image=pa.array([b"a"]), label=pa.array([None], pa.int64())), {}, "none of its 1 rows can be.*no label"),
        (lambda path: path.write_bytes(b"PAR1 and nothing else"), {}, "damaged or no Parquet file"),
        (lambda path: path.write_bytes(b""), {}, "damaged or no Parquet file"),
    ],
)  # fmt: skip
def test_what_is_no_table_of_images_is_one_message(tmp_path, write, options, message) -> None:
    write(tmp_path / "a.parquet")
    with pytest.raises(PotstillError, match=message) as caught:
        load(tmp_path / "a.parquet", options=options)
    assert type(caught.value) is DataError
    assert f"{tmp_path}/" in str(caught.value)


def test_options_and_places(tmp_path) -> None:
    path = write_rows(tmp_path / "a.parquet", 12)
    with pytest.raises(UsageError, match=r"unknown option 'imag' .allowed: image, label.; did you mean 'image'"):
        check_source(DataSettings(source=str(path), options={"imag": "x"}))
    with pytest.raises(UsageError, match="no such file"):
        check_source(DataSettings(source=str(tmp_path / "b.parquet")))
    with pytest.raises(UsageError, match="leave no images for train"):
        check_source(DataSettings(source=str(path), val=0.5, test=0.5))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("train-0.parquet", "unsupervised-0.parquet"), "unsupervised-0.parquet: the name begins with no split"),
        (("val.parquet", "test.parquet"), "there is test and val, but no table train"),
        (
            ("a/train/0.parquet", "b/train/0.parquet"),
            "the folders a, b are several data sets; add the name of one to the address",
        ),
    ],
)
def test_names_of_files_that_contradict(tmp_path, files, message) -> None:
    for at, name in enumerate(files):
        write_rows(tmp_path / "set" / name, 6, 10 * at)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "set")


def test_layouts_that_are_tables_and_others(tmp_path) -> None:
    places = ("flat/a.parquet", "splits/train/0.parquet", "converted/default/test/0.parquet", "hub/data/test-0.parquet")
    for name in places:
        write_rows(tmp_path / name, 2)
        assert is_table(str(tmp_path / name.split("/")[0])), name
    write_image(tmp_path / "photos" / "cat" / "1.png", 1)
    write_rows(tmp_path / "photos" / "index.parquet", 2)  # beside class folders
    write_image(tmp_path / "empty" / "train" / "cat" / "1.png", 1)
    assert not any(is_table(str(tmp_path / name)) for name in ("photos", "empty", "nowhere"))
    assert list_source(DataSettings(source=str(tmp_path / "converted"))).entries[0].name == "default/test/0.parquet/0"


def test_rows_are_unpacked_once_and_anew_where_the_table_changes(tmp_path, cache, monkeypatch) -> None:
    path = write_rows(tmp_path / "a.parquet", 12)
    first = load(path)
    with monkeypatch.context() as patch:
        patch.setattr(pq, "ParquetFile", None)
        assert load(path).fingerprint == first.fingerprint
    # A folder that was not finished is not taken for the whole.
    (rows,) = (cache / "tables").glob("*/rows.json")
    rows.unlink()
    (rows.parent / "a.parquet" / "3").unlink()
    assert load(path).fingerprint == first.fingerprint
    write_rows(path, 12, 50)
    assert load(path).fingerprint != first.fingerprint


def test_too_little_space_is_said_before_a_row_is_written(tmp_path, cache, monkeypatch) -> None:
    path = write_rows(tmp_path / "a.parquet", 12)
    monkeypatch.setattr("potstill.data.parquet_tables.shutil.disk_usage", lambda root: type("U", (), {"free": 10}))
    with pytest.raises(StorageError, match="POTSTILL_CACHE names another folder"):
        load(path)
    assert not list((cache / "tables").rglob("*parquet*"))


def test_without_pyarrow(tmp_path, monkeypatch) -> None:
    path = write_rows(tmp_path / "a.parquet", 12)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=r'Parquet files need pyarrow\nInstall: pip install "potstill\[datasets\]"'):
        check_source(DataSettings(source=str(path)))


def test_a_data_set_of_the_hub(tmp_path, hub, monkeypatch, capsys) -> None:
    files = {
        f"data/{split}-00000-of-00001.parquet": write_rows(tmp_path / split, count, first).read_bytes()
        for split, count, first in (("train", 20, 0), ("test", 6, 40))
    }
    sha = hub.put("u/pictures", files, "datasets")
    source = "hf://datasets/u/pictures"
    data = load(source)
    assert data.origin.startswith(f"tables of hf://datasets/u/pictures@{sha} train, test; val")
    assert [len(data.split(split)) for split in ("train", "val", "test")] == [16, 4, 6]
    assert main(["check", source]) == 0
    run = ["train", "quickstart", "--stage", "baseline", "--data", source, "--image-size", "16", "--epochs", "1"]
    assert main([*run, "--output-dir", str(tmp_path), "--name", "r"]) == 0
    with (tmp_path / "r" / "splits.csv").open() as file:
        assert {row["name"].split("/")[1] for row in csv.DictReader(file)} == {name.split("/")[1] for name in files}
    from .. import test_hub

    test_hub.forget(monkeypatch)
    assert load(f"{source}@{sha}").fingerprint == data.fingerprint
    capsys.readouterr()
    assert main(["check", "hf://datasets/u/unknown"]) == 2
    assert "not in the cache of this machine, and the hub cannot be reached" in capsys.readouterr().err


def test_images_of_tables_that_are_gone_or_changed_are_removed(tmp_path, cache) -> None:
    gone, changed, kept = (write_rows(tmp_path / f"{name}.parquet", 12, 12 * at) for at, name in enumerate("abc"))
    for path in (gone, changed, kept):
        load(path)
    folders = set((cache / "tables").iterdir())
    assert len(folders) == 3
    gone.unlink()
    write_rows(changed, 14)
    load(write_rows(tmp_path / "d.parquet", 12, 80))
    assert folders < {*(cache / "tables").iterdir()}  # they were used today
    for folder in folders:
        os.utime(folder / "rows.json", (0, 0))
    load(write_rows(tmp_path / "e.parquet", 12, 100))
    (left,) = folders & {*(cache / "tables").iterdir()}
    assert str(kept.resolve()) in (left / "rows.json").read_text()
    assert (left / "rows.json").stat().st_mtime == 0
    load(kept)
    assert (left / "rows.json").stat().st_mtime > 0


def test_clearing_the_cache(tmp_path, cache, capsys, monkeypatch) -> None:
    from potstill.data import decoded_cache

    monkeypatch.setattr(decoded_cache, "SMALLEST", 1)
    data = load(write_rows(tmp_path / "a.parquet", 12))
    decoded_cache.decode_all(data.train, 8, "crop", device=torch.device("cpu"), cache_fraction=0.5, identity="id")
    assert [*(cache / "tables").rglob("*")]
    assert [*(cache / "pixels").rglob("pixels.bin")]
    assert main(["cache", "clear"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("decoded images: ")
    assert second.startswith("unpacked tables: ")
    assert "0 B" not in second
    assert not (cache / "tables").exists()
    assert not [*(cache / "pixels").rglob("pixels.bin")]
    assert len(load(tmp_path / "a.parquet").train) == len(data.train)


def test_a_labeled_test_that_is_a_table(tmp_path) -> None:
    (tmp_path / "flat").mkdir()
    for i in range(24):
        (tmp_path / "flat" / f"{i}.png").write_bytes(image_bytes(i))
    table = write_rows(tmp_path / "labeled.parquet", 6, 20)  # four of them are among the images without labels
    settings = {"labeled": False, "classes": ["zebra", "dog", "cat"], "labeled_test": str(table)}
    data = load(tmp_path / "flat", **settings)
    assert [data.class_names[label] for label in data.test.labels] == ["zebra", "cat"] * 3
    assert data.test.names[0] == "labeled.parquet/0"
    assert len(data.train) + len(data.val) == 20
    assert data.teacher_labels == ("train", "val")
    split = tmp_path / "parts"
    write_rows(split / "train-00000-of-00001.parquet", 4, 50)
    write_rows(split / "test-00000-of-00001.parquet", 8, 60)
    data = load(tmp_path / "flat", **settings | {"labeled_test": str(split)})
    assert len(data.test) == 8  # of a table with splits, test
    with pytest.raises(DataError, match="the teacher has no class 'cat'"):
        load(tmp_path / "flat", **settings | {"classes": ["zebra", "dog"]})
    with pytest.raises(UsageError, match="no folder, manifest or table"):
        load(tmp_path / "flat", **settings | {"labeled_test": str(tmp_path / "none.parquet")})
