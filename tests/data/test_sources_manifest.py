import json
from pathlib import Path

import pytest

from potstill.data.datasets import load_data
from potstill.data.settings import DataSettings
from potstill.errors import DataError


@pytest.fixture
def folder(make_folder) -> Path:
    return make_folder({"pictures": 12})


def load(path: Path, text: str):
    path.write_text(text)
    return load_data(DataSettings(source=str(path)))


def rows(**splits: int) -> list[tuple[str, str, str]]:
    split = [name for name, count in splits.items() for _ in range(count)]
    return [(f"pictures/{i}.png", "ab"[i % 2], split[i]) for i in range(12)]


def test_csv_with_splits(folder: Path) -> None:
    lines = [",".join(row) for row in rows(train=6, validation=4, test=2)]
    data = load(folder / "list.csv", "\n".join(["path,label,split", *lines]))
    assert data.class_names == ("a", "b")
    assert data.counts() == {"train": {"a": 3, "b": 3}, "val": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}}
    assert data.origin == "manifest train, val, test"
    assert data.test.names == ("pictures/10.png", "pictures/11.png")


def test_json_lines_and_csv_agree_and_row_order_does_not_matter(folder: Path) -> None:
    listed = rows(train=8, val=2, test=2)
    from_csv = load(folder / "a.csv", "\ufeffsplit,path,label\r\n" + "".join(f"{s},{p},{c}\r\n" for p, c, s in listed))
    lines = [json.dumps({"label": c, "split": s, "path": p}) for p, c, s in reversed(listed)]
    from_json = load(folder / "b.jsonl", "\n".join(lines) + "\n\n")
    assert from_json.as_rows() == from_csv.as_rows()
    assert from_json.fingerprint == from_csv.fingerprint


def test_without_splits(folder: Path) -> None:
    data = load(
        folder / "a.jsonl", "\n".join(json.dumps({"path": p, "label": i % 2}) for i, (p, *_) in enumerate(rows(x=12)))
    )
    assert data.class_names == ("0", "1")
    assert data.counts() == {"train": {"0": 4, "1": 4}, "val": {"0": 1, "1": 1}, "test": {"0": 1, "1": 1}}


def test_lists_with_other_suffixes_and_pooled_splits(folder: Path) -> None:
    lines = [",".join(row) for row in rows(train=8, test=4)]
    from_csv = load(folder / "a.csv", "\n".join(["path,label,split", *lines]))
    from_txt = load(folder / "a.txt", "\n".join(["path, label, split", *lines]))
    from_tsv = load(folder / "a.tsv", "\n".join(["path,label,split", *lines]).replace(",", "\t"))
    assert from_csv.as_rows() == from_txt.as_rows() == from_tsv.as_rows()
    pooled = load_data(DataSettings(source=str(folder / "a.csv"), keep_splits="none"))
    assert {split: len(pooled.split(split)) for split in ("train", "val", "test")} == {"train": 8, "val": 2, "test": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,lable\np.png,a", ["the header must be", "did you mean 'label'?"]),
        ("", ["the header must be"]),
        ("pictures/1.png, 0, 7\n", ["pictures/1.png,0,7, is an image", "path,label,column3 above it"]),
        ("path,label\n", ["lists no images"]),
        (
            "path,label\n/etc/passwd,a\n../x.png,b\n",
            ["2 problems", "line 2: '/etc/passwd' leads out", "line 3: '../x.png'"],
        ),
        ("path,label\nx.png,a\nx.png,b\n", ["x.png is listed 2 times"]),
        ("path,label\nx.png,\n,b\ny.png\n", ["line 2: path and label", "line 3: path and label", "line 4: 2 columns"]),
        ("path,label,split\nx.png,a,tain\n", ["split must be train, val or test, got 'tain'"]),
        ("path,label,split\nx.png,a,train\ny.png,b,\n", ["1 of 2 rows name a split"]),
        ("path,label,split\npictures/0.png,a,val\npictures/1.png,b,test\n", ["no row has the split train"]),
        ("path,label\npictures/0.png,a\npictures/1.png,a\n", ["at least two classes"]),
        ("path,label\n" + "".join(f"gone{i}.png,{'ab'[i % 2]}\n" for i in range(6)), ["6 unreadable", "No such file"]),
        ('path,label\n"x.png,a\n', ["line"]),
    ],
)
def test_bad_csv(folder: Path, text: str, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        load(folder / "list.csv", text)
    for word in words:
        assert word in str(caught.value)


def test_bad_json_lines(folder: Path) -> None:
    text = (
        '{"path": 3, "label": "a"}\nno\n[1]\n{"path": "x", "label": "a", "splt": "val"}\n{"path": "x", "label": true}'
    )
    with pytest.raises(DataError) as caught:
        load(folder / "list.jsonl", text)
    for word in (
        "5 problems",
        "line 1: path",
        "line 2: no JSON",
        "line 3: the keys",
        "'splt'; did you mean 'split'?",
        "line 5",
    ):
        assert word in str(caught.value)


def test_not_text(folder: Path) -> None:
    (folder / "list.csv").write_bytes(b"path,label\n\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        load_data(DataSettings(source=str(folder / "list.csv")))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_encoding_is_named(folder: Path, encoding: str) -> None:
    (folder / "list.csv").write_bytes("path,label\nx/0.png,a\n".encode(encoding))
    with pytest.raises(DataError, match=f"is UTF-8 text, and this is {encoding[:6].upper()}: save it as UTF-8"):
        load_data(DataSettings(source=str(folder / "list.csv")))


def test_a_class_name_that_no_model_could_keep(folder: Path) -> None:
    lines = [
        json.dumps({"path": p, "label": "ab"[i % 2] * (1 + 255 * (i == 3))}) for i, (p, *_) in enumerate(rows(x=12))
    ]
    with pytest.raises(DataError, match=r"line 4: a class of 256 characters \('bbb.*at most 255"):
        load(folder / "list.jsonl", "\n".join(lines))


def test_a_key_that_is_given_twice_is_no_label(folder: Path) -> None:
    lines = [json.dumps({"path": p, "label": "ab"[i % 2]}) for i, (p, *_) in enumerate(rows(x=12))]
    lines[2] = lines[2].replace("}", ', "label": "b"}')
    with pytest.raises(DataError, match=r"line 3: no JSON that can be read \(a key is given twice\)"):
        load(folder / "list.jsonl", "\n".join(lines))
