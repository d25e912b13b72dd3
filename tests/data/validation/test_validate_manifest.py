"""Every bad row of a manifest is found, and the good ones are still examined."""

from pathlib import Path

import pytest

from potstill.data.settings import DataSettings
from potstill.data.sources import read_manifest
from potstill.data.validation.validate import validate_data


def read(folder: Path, text: str | bytes, name: str = "list.csv"):
    content = text.encode() if isinstance(text, str) else text
    (folder / name).write_bytes(content)
    return read_manifest(folder / name)


def test_all_bad_rows_and_all_good_ones(make_folder, tmp_path: Path) -> None:
    folder = make_folder({"p": 4})
    (folder / "away.png").symlink_to(tmp_path)
    rows = [
        "path,label,split",
        "p/0.png,cat,train",
        "p/1.png,dog,Valid",
        "/etc/passwd,cat,train",
        "../x.png,cat,train",
        "away.png,cat,train",
        "p/2.png,,train",
        "p/2.png,cat,tain",
        "p/2.png,cat",
        "p/0.png,dog,test",
        "p/\x07.png,cat,train",
        "p/n\x00l.png,cat,train",
        "p/3.png,ca\x1bt,train",
        "p/3.png,cat,",
    ]
    found = read(folder, "\n".join(rows))

    assert [(e.name, e.label, e.split) for e in found.entries] == [
        ("p/0.png", "cat", "train"),
        ("p/1.png", "dog", "val"),
        ("p/3.png", "cat", None),
    ]
    said = [(each.kind, each.path, each.reason.split(":")[0]) for each in found.findings]
    assert said == [
        ("link-out", "list.csv", "line 4"),
        ("link-out", "list.csv", "line 5"),
        ("link-out", "list.csv", "line 6"),
        ("manifest-row", "list.csv", "line 7"),
        ("manifest-row", "list.csv", "line 8"),
        ("manifest-row", "list.csv", "line 9"),
        ("name", "p/\x07.png", "control characters in the name; rename it"),
        ("name", "p/n\x00l.png", "control characters in the name; rename it"),
        ("name", "ca\x1bt", "control characters in the name; rename it"),
        ("listed-twice", "list.csv", "p/0.png is listed 2 times, under the labels 'cat', 'dog'"),
        ("manifest", "list.csv", "2 of 3 rows name a split"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "got no object"),
        ('{"path": "a.png", "lable": "a"}', "did you mean 'label'?"),
        ('{"path": 3, "label": "a"}', "must be text"),
        ('{"path": "a.png", "label": true}', "must be text"),
        ('{"path": "a.png", "label": "a", "split": 3}', "split must be train, val or test, got 3"),
        ('{"path": "a\\u0000.png", "label": "a"}', "control characters"),
        ('{"path": "a.png", "label": "\\ud800"}', "not UTF-8"),
    ],
)
def test_bad_json_lines(make_folder, line: str, reason: str) -> None:
    found = read(make_folder({"p": 2}), f'{line}\n{{"path": "p/0.png", "label": 7}}\n', "list.jsonl")

    assert [(e.name, e.label) for e in found.entries] == [("p/0.png", "7")]
    assert reason in found.findings[0].reason
    assert len(found.findings) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the header must be path,label"),
        (b"path,lable\np/0.png,a", "did you mean 'label'?"),
        (b"path,label\n", "lists no images"),
        (b"path,label\n\xff\xfe,a", "a manifest is UTF-8 text"),
        (b"path,label,split\np/0.png,a,val\n", "no row has the split train"),
        (b'path,label\n"p/0.png,a\n', "what follows was not read"),
    ],
)
def test_bad_files(make_folder, content: bytes, reason: str) -> None:
    findings = read(make_folder({"p": 1}), content).findings

    assert len(findings) == 1
    assert reason in findings[0].reason


def listed(found) -> list[tuple[str, str, str | None]]:
    assert found.findings == []
    return [(entry.name, entry.label, entry.split) for entry in found.entries]


@pytest.mark.parametrize(
    "text",
    [
        "file,class\np/0.png,cat\np/1.png,dog\n",
        "Filename,TARGET\r\np/0.png,cat\r\np/1.png,dog\r\n",
        "\ufeffimage;label\np/0.png;cat\np/1.png;dog\n",
        "path\tlabel\np/0.png\tcat\np/1.png\tdog\n",
        '"path", "label", "note"\n"p/0.png", "cat", "a, b"\np/1.png,dog,\n\n',
        "id,filename,path,label,width\n1,x.png,p/0.png,cat,12\n2,y.png,p/1.png,dog,12\n",
        "path,label\np\\0.png,cat\n.\\p\\1.png,dog\n",
        "path,label\nROOT/p/0.png,cat\nROOT/p/../p/1.png,dog\n",
        "path,label\n./p/0.png,cat\np/../p/1.png,dog\n",
    ],
)
def test_manifests_as_other_programs_write_them(make_folder, text: str) -> None:
    folder = make_folder({"p": 2})
    found = read(folder, text.replace("ROOT", str(folder)))

    assert listed(found) == [("p/0.png", "cat", None), ("p/1.png", "dog", None)]


def test_columns_that_are_not_used_are_named(make_folder) -> None:
    folder = make_folder({"p": 2})
    rows = "id,path,class,subset,w\n1,p/0.png,cat,train,3\n2,p/1.png,dog,val,4\n"
    found = read(folder, rows)
    lines = read(folder, '{"image": "p/0.png", "category": "cat", "w": 3, "h": 4}\n', "list.jsonl")

    assert listed(found) == [("p/0.png", "cat", "train"), ("p/1.png", "dog", "val")]
    assert found.notes == ["columns of the manifest that are not used: id, w"]
    assert listed(lines) == [("p/0.png", "cat", None)]
    assert lines.notes == ["columns of the manifest that are not used: w, h"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file,image,label\na,b,c\n", "'file' and 'image' may both be the path; rename or remove one"),
        ("path,class,category\na,b,c\n", "'class' and 'category' may both be the label; rename or remove one"),
        ("path,label,splits\na,b,train\n", "unknown column 'splits'; did you mean 'split'?"),
        (
            "p/0.png,cat\np/1.png,dog\n",
            "the first line, p/0.png,cat, is an image: put a line such as path,label above it",
        ),
    ],
)
def test_what_is_ambiguous_in_a_header_is_said(make_folder, text: str, reason: str) -> None:
    (finding,) = read(make_folder({"p": 2}), text).findings

    assert finding.reason.endswith(reason)


def test_a_backslash_that_may_be_part_of_a_name(make_folder) -> None:
    folder = make_folder({"p": 2})
    (folder / "q\\0.png").write_bytes((folder / "p/0.png").read_bytes())
    assert listed(read(folder, "path,label\nq\\0.png,cat\n")) == [("q\\0.png", "cat", None)]
    (folder / "p\\0.png").write_bytes((folder / "p/0.png").read_bytes())
    rows = "path,label\np\\0.png,cat\nC:\\data\\1.png,dog\n"
    reasons = [each.reason for each in read(folder, rows).findings]

    assert "may be two files" in reasons[0]
    assert "a path of a Windows drive" in reasons[1]


def test_paths_elsewhere_need_follow_links(make_folder, tmp_path: Path) -> None:
    store = make_folder({"s": 2}, tmp_path / "store")
    folder = make_folder({"p": 1})
    (folder / "link.png").symlink_to(store / "s/1.png")
    (folder / "list.csv").write_text(
        f"path,label\n{store}/s/0.png,cat\nlink.png,dog\n../store/s/1.png,dog\np/0.png,cat\n"
    )

    assert [each.kind for each in read_manifest(folder / "list.csv").findings] == ["link-out"] * 3
    found = read_manifest(folder / "list.csv", follow_links=True)
    assert listed(found) == [
        (f"{store}/s/0.png", "cat", None), (f"{store}/s/1.png", "dog", None),
        ("link.png", "dog", None), ("p/0.png", "cat", None),
    ]  # fmt: skip


def test_a_manifest_in_a_folder_that_is_reached_by_a_link(make_folder, tmp_path: Path) -> None:
    folder = make_folder({"p": 2})
    (tmp_path / "link").symlink_to(folder)
    text = f"path,label\n{folder}/p/0.png,cat\n{tmp_path}/link/p/1.png,dog\n"

    assert [name for name, *_ in listed(read(tmp_path / "link", text))] == ["p/0.png", "p/1.png"]


def test_no_manifest_is_too_long_for_memory(make_folder) -> None:
    path = make_folder({"p": 1}) / "list.csv"
    with path.open("w") as file:
        file.write("path,label\n")
        file.truncate(256 * 2**20 + 1)

    assert [each.reason for each in read_manifest(path).findings] == ["more than 256 MiB; is it a list of images?"]


def test_rows_are_told_in_their_order(make_folder) -> None:
    folder = make_folder({"p": 1})
    (folder / "list.csv").write_text("path,label\n" + "p/0.png\n" * 12)
    report = validate_data(DataSettings(source=str(folder / "list.csv")))

    lines = [each.reason.split(":")[0] for each in report.findings if each.kind == "manifest-row"]
    assert lines == [f"line {i}" for i in range(2, 14)]


def test_circles_of_links_are_no_crash(make_folder, examined) -> None:
    folder = make_folder({"p": 6})
    (folder / "p" / "self.png").symlink_to("self.png")
    rows = [f"p/{i}.png,{'ab'[i % 2]}" for i in range(6)] + ["p/self.png,a", "p/gone.png,b"]
    (folder / "list.csv").write_text("\n".join(["path,label", *rows]))
    found = examined(folder / "list.csv")

    assert set(found["unreadable"]) == {"p/self.png", "p/gone.png"}
