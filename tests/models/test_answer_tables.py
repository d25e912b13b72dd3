"""Tables of answers: CSV, Parquet and npz files, and what is wrong with them."""

import csv
import json
import sys

import numpy as np
import pytest

from potstill.errors import ArtifactError, DataError, PotstillError, UsageError
from potstill.models.answer_tables import AnswerTable, find_rows, read_answers

PATHS = ["cat/0.png", "cat/1.png", "dog/0.png"]
PROBABILITIES = np.array([[0.75, 0.25], [0.5, 0.5], [0.0, 1.0]], np.float32)
LOGITS = np.array([[3.0, -1.0], [0.5, 0.5], [-2.0, 7.0]], np.float32)


def write_csv(path, columns=("path", "cat", "dog"), values=PROBABILITIES, paths=PATHS):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *([name, *row] for name, row in zip(paths, values, strict=True))])
    return path


def write_parquet(path, columns, classes=None):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `datasets` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `datasets` is not installed")
    metadata = None if classes is None else {"classes": json.dumps(classes)}
    parquet.write_table(pyarrow.table(columns).replace_schema_metadata(metadata), path)
    return path


def test_csv(tmp_path):
    table = read_answers(write_csv(tmp_path / "a.csv"))
    assert (table.kind, table.class_names, table.paths) == ("probabilities", ("cat", "dog"), tuple(PATHS))
    assert np.allclose(np.exp(table.logits()), PROBABILITIES)
    assert np.isfinite(table.logits()).all()
    table = read_answers(write_csv(tmp_path / "b.csv", values=LOGITS))
    assert table.kind == "logits"
    assert (table.logits() == LOGITS).all()
    small = LOGITS / 100 + 0.5  # from 0 to 1, but said to be logits
    table = read_answers(write_csv(tmp_path / "c.csv", ("path", "logit_cat", "logit_dog"), small))
    assert (table.kind, table.class_names) == ("logits", ("cat", "dog"))
    table = read_answers(write_csv(tmp_path / "d.csv", ("path", "embedding_0", "embedding_1"), LOGITS))
    assert (table.kind, table.class_names) == ("embeddings", None)
    with pytest.raises(UsageError, match="has embeddings"):
        table.logits()
    assert (table.values[find_rows(table.paths, ["dog/0.png", "cat/0.png"], table.origin)] == LOGITS[[2, 0]]).all()


def test_parquet(tmp_path):
    columns = {"path": PATHS, "cat": PROBABILITIES[:, 0], "dog": PROBABILITIES[:, 1]}
    table = read_answers(write_parquet(tmp_path / "a.parquet", columns))
    assert (table.kind, table.class_names, table.paths) == ("probabilities", ("cat", "dog"), tuple(PATHS))
    lists = {"file": PATHS, "logits": LOGITS.tolist()}
    table = read_answers(write_parquet(tmp_path / "b.parquet", lists, ["dog", "cat"]))
    assert (table.kind, table.class_names) == ("logits", ("dog", "cat"))
    assert (table.values == LOGITS).all()
    assert read_answers(write_parquet(tmp_path / "c.parquet", lists)).class_names is None
    with pytest.raises(ArtifactError, match="not of the same length"):
        read_answers(write_parquet(tmp_path / "d.parquet", {"path": ["a", "b"], "logits": [[1.0, 2.0], [1.0]]}))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r'pip install "potstill\[datasets\]"'):
        read_answers(tmp_path / "a.parquet")


def test_npz(tmp_path):
    np.savez(tmp_path / "a.npz", paths=PATHS, embeddings=LOGITS)
    table = read_answers(tmp_path / "a.npz")
    assert (table.kind, table.class_names) == ("embeddings", None)
    np.savez(tmp_path / "b.npz", paths=["./cat\\0.png"], logits=LOGITS[:1], classes=["cat", "dog"])
    assert read_answers(tmp_path / "b.npz").paths == ("cat/0.png",)
    np.savez(tmp_path / "c.npz", paths=np.array(PATHS, dtype=object), logits=LOGITS)  # a pickle
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_answers(tmp_path / "c.npz")


@pytest.mark.parametrize("delimiter", [",", ", ", ";", "\t"])
def test_separators_and_empty_rows(tmp_path, delimiter):
    rows = [("path", "a cat", "dog"), ("cat/0.png", "0.25", "0.75"), ("", "", ""), ("dog/0.png", "1", "0")]
    (tmp_path / "a.csv").write_text("".join(f"{delimiter.join(row)}\n" for row in rows))
    table = read_answers(tmp_path / "a.csv")
    assert (table.paths, table.class_names) == (("cat/0.png", "dog/0.png"), ("a cat", "dog"))
    np.testing.assert_array_equal(table.values, [[0.25, 0.75], [1, 0]])


def test_a_changed_file_is_read_again(tmp_path):
    assert read_answers(write_csv(tmp_path / "a.csv")) is read_answers(tmp_path / "a.csv")
    write_csv(tmp_path / "a.csv", values=10 * LOGITS)
    assert read_answers(tmp_path / "a.csv").kind == "logits"


def savez(**arrays):
    return lambda path: np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("name", "write", "error", "message"),
    [
        (
            "a.csv",
            lambda path: write_csv(path, paths=["x.png", "y.png", "x.png"]),
            DataError,
            "several rows for 1 images, such as 2 for 'x.png'",
        ),
        ("a.csv", lambda path: write_csv(path, paths=["a/x.png", "y.png", "./a\\x.png"]), DataError, "2 for 'a/x.png'"),
        (
            "a.csv",
            lambda path: write_csv(path, values=LOGITS * [[1, 1], [np.nan, 1], [1, np.inf]]),
            DataError,
            "2 of 3 rows .* NaN or infinite, such as that of 'cat/1.png'",
        ),
        (
            "a.csv",
            lambda path: write_csv(path, values=PROBABILITIES * [[1], [0.5], [1]]),
            DataError,
            "most rows are probabilities, but 1 of 3 rows do not sum to 1 .*, such as 'cat/1.png' with the sum 0.5",
        ),
        (
            "a.csv",
            lambda path: write_csv(path, values=np.add(PROBABILITIES, [[0, 0], [-1, 1], [0, 0]])),
            DataError,
            "1 of 3 rows do not sum to 1 or have a number below 0, such as 'cat/1.png' with the sum 1",
        ),
        (
            "a.csv",
            lambda path: write_csv(path, values=PROBABILITIES * [[1], [1], [3]]),
            DataError,
            "most rows are probabilities, but 1 of 3",
        ),
        (
            "a.csv",
            lambda path: write_csv(path, values=np.asarray(PROBABILITIES) * 100),
            DataError,
            "the rows seem to be shares that sum to 100: divide them by their sum",
        ),
        (
            "a.npz",
            savez(paths=PATHS, logits=np.asarray(LOGITS) * 1j),
            ArtifactError,
            "values of type complex64, and real numbers are needed",
        ),
        ("a.npz", savez(paths=PATHS, logits=LOGITS.astype(np.float64) * 1e300), DataError, "NaN or infinite"),
        (
            "a.csv",
            lambda path: write_csv(path, values=np.round(np.asarray(PROBABILITIES) * 255)),  # in 8 bits
            DataError,
            "the rows seem to be shares that sum to 255",
        ),
        (
            "a.csv",
            lambda path: write_csv(path, ("path", "cat", "cat")),
            ArtifactError,
            "several columns for the class 'cat'",
        ),
        ("a.csv", lambda path: path.write_text("path;a;b\nx.png;0,2;0,8\n"), ArtifactError, "but '0,2'.* with a point"),
        (
            "a.csv",
            lambda path: write_csv(path, values=PROBABILITIES * [[0.5], [0.5], [0.5]]),
            DataError,
            "all numbers are from 0 to 1, but 3 of 3 rows do not sum to 1",
        ),
        (
            "a.csv",
            lambda path: write_csv(path, ("path", "probability_cat", "probability_dog"), LOGITS),
            DataError,
            "2 of 3 rows are no probabilities, such as that of 'cat/0.png', which sums to 2",
        ),
        (
            "a.csv",
            lambda path: write_csv(path, ("name", "cat", "dog")),
            ArtifactError,
            "no column with paths: call one column 'path'; its columns are name, cat, dog",
        ),
        (
            "a.csv",
            lambda path: write_csv(path, ("path", "cat", "file"), [[1, "x"]] * 3),
            ArtifactError,
            "several columns with paths",
        ),
        (
            "a.csv",
            lambda path: write_csv(path, ("path", "cat", "split"), [[1, "train"]] * 3),
            ArtifactError,
            "line 2: column 'split' has no number",
        ),
        (
            "a.csv",
            lambda path: path.write_text("path,label,prediction,p:cat,p:dog\na.png,cat,dog,0.4,0.6\n"),
            ArtifactError,
            "predictions of potstill.*--teacher RUN",
        ),
        (
            "a.csv",
            lambda path: path.write_text("path,prediction,class_1,p_1,error\na.png,dog,dog,0.6,\n"),
            ArtifactError,
            "predictions of potstill",
        ),
        (
            "a.csv",
            lambda path: path.write_text("path,cat,dog\na.png,1\n"),
            ArtifactError,
            "line 2: 2 values, and the header has 3",
        ),
        ("a.csv", lambda path: path.write_text("path,cat,dog\n"), ArtifactError, "0 paths"),
        ("a.csv", lambda path: path.write_text(""), ArtifactError, "no column with paths"),
        ("a.csv", lambda path: path.write_bytes(b"\xff\xfe\x00"), ArtifactError, "cannot be read"),
        ("a.npz", savez(logits=LOGITS), ArtifactError, "has the arrays logits; .*'paths'"),
        ("a.npz", savez(paths=PATHS, logits=LOGITS, classes=["a"]), ArtifactError, "names 1 classes and has 2 values"),
        ("a.npz", savez(paths=PATHS[:2], logits=LOGITS), ArtifactError, r"2 paths and values of shape \[3, 2\]"),
        ("a.npz", lambda path: np.savez_compressed(path, paths=PATHS, logits=LOGITS), ArtifactError, "use numpy.savez"),
        ("a.npz", lambda path: path.write_bytes(b"PK\x03\x04 damaged"), ArtifactError, "cannot be read"),
        ("a.npz", lambda path: None, ArtifactError, "No such file"),
    ],
)
def test_what_is_wrong_with_a_table(tmp_path, name, write, error, message):
    write(tmp_path / name)
    with pytest.raises(PotstillError, match=message) as caught:
        read_answers(tmp_path / name)
    assert type(caught.value) is error


def test_images_without_a_row():
    table = AnswerTable("t.csv", ("data/a/0.png", "data/a/1.png"), LOGITS[:2], "logits")
    with pytest.raises(
        DataError, match=r"(?s)no row for 2 of 2 images, such as .a/0.png.; 2 of its 2 rows.*cut off .data/."
    ):
        find_rows(table.paths, ["a/0.png", "a/1.png"], table.origin)
    with pytest.raises(DataError, match=r"no row for 1 of 2 images, such as 'b\.png'; 1 of its 2 rows"):
        find_rows(table.paths, ["data/a/0.png", "b.png"], table.origin)
    with pytest.raises(DataError, match=r"forward slashes: write 'a/1\.png' in place of '1\.png'$"):
        find_rows(["1.png"], ["b/11.png", "a/1.png"], table.origin)
    mixed = AnswerTable("t.csv", ("0.png", "more/0.png"), LOGITS[:2], "logits")
    assert find_rows(mixed.paths, ["0.png"], mixed.origin).tolist() == [0]
    assert find_rows(mixed.paths, ["0.png"], mixed.origin, "more").tolist() == [1]
