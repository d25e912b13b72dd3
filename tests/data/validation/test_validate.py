"""What the doctor has read, a run need not read again; and the quick form for runs."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from potstill.data import scan
from potstill.data.datasets import load_data
from potstill.data.entries import Finding
from potstill.data.image_sets import ArraySet, Subset
from potstill.data.scan import check_files
from potstill.data.settings import AugmentSettings, DataSettings
from potstill.data.splits import SPLITS, DataSplits
from potstill.data.validation import validate
from potstill.data.validation.validate import (
    find_repeated_files,
    quick_findings,
    summarize_findings,
    summary_messages,
    validate_data,
)
from potstill.experiment.preflight import warn_about_data
from potstill.training.callbacks import SilentObserver


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a while had passed since the files were written (their change time cannot be set)."""
    monkeypatch.setattr("potstill.data.scan.RACY", 0)


def test_a_run_after_check_decodes_nothing_and_has_the_same_fingerprint(
    make_folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = DataSettings(source=str(make_folder({"a": 6, "b": 6})))
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "one"))
    fingerprint = load_data(settings).fingerprint
    settle(monkeypatch)
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "two"))
    validate_data(settings)
    monkeypatch.setattr(scan, "read_image", lambda *_: pytest.fail("decoded again"))

    assert load_data(settings).fingerprint == fingerprint


def test_ill_and_fresh_files_are_read_again(make_folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    folder = make_folder({"a": 6, "b": 6})
    (folder / "a" / "bad.png").write_text("no")
    settings = DataSettings(source=str(folder))
    read: list[str] = []
    own = scan.read_file
    monkeypatch.setattr(scan, "read_file", lambda path: read.append(Path(path).name) or own(path))
    validate_data(settings)  # all are younger than two seconds
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*.png")]
    read.clear()
    with pytest.raises(Exception, match="1 unreadable image"):
        check_files(folder, names, "x")
    assert len(read) == 13
    settle(monkeypatch)
    validate_data(settings)
    read.clear()
    with pytest.raises(Exception, match="1 unreadable image"):
        check_files(folder, names, "x")
    assert read == ["bad.png"]


@pytest.fixture
def repeated(make_folder, picture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> DataSettings:
    """One of each by content, and one by pixels only."""
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    folder = make_folder({f"{split}/{name}": 4 for split in SPLITS for name in ("cat", "dog")})
    shutil.copy(folder / "train/cat/0.png", folder / "train/cat/z.png")
    shutil.copy(folder / "train/cat/1.png", folder / "test/cat/z.png")
    shutil.copy(folder / "val/dog/0.png", folder / "train/cat/y.png")
    picture(0).save(folder / "train/cat/p.png")
    picture(0).save(folder / "train/cat/p.bmp")
    return DataSettings(source=str(folder))


def test_the_quick_form_finds_what_the_whole_one_finds_by_content(repeated: DataSettings) -> None:
    def said(findings):
        return {(each.kind, frozenset((each.path, *each.others))) for each in findings}

    quick, whole = find_repeated_files(load_data(repeated)), validate_data(repeated).findings
    pixels = {("duplicate", frozenset({"train/cat/p.png", "train/cat/p.bmp"}))}

    assert {kind for kind, _ in said(quick)} == {"two-labels", "across-splits", "duplicate"}
    assert said(quick) == said(whole) - pixels
    assert pixels <= said(whole)


def test_what_was_found_is_kept_by_the_fingerprint(repeated: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    first = quick_findings(load_data(repeated))
    with monkeypatch.context() as patch:
        patch.setattr(validate, "find_duplicates", lambda _: pytest.fail("looked again"))
        assert quick_findings(load_data(repeated)) == first

    assert [(each.kind, each.count) for each in first] == [("two-labels", 1), ("across-splits", 1), ("duplicate", 1)]
    (Path(repeated.source) / "test/cat/z.png").unlink()
    assert [each.kind for each in quick_findings(load_data(repeated))] == ["two-labels", "duplicate"]


def test_a_run_after_check_knows_what_check_has_found(repeated: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_findings(load_data(repeated))  # the whole form replaces the quick one
    report = validate_data(repeated)
    monkeypatch.setattr(validate, "find_duplicates", lambda _: pytest.fail("looked again"))
    found = quick_findings(load_data(repeated))

    assert {each.kind: each.count for each in found} == report.kinds()
    assert report.kinds() == {"two-labels": 1, "across-splits": 1, "duplicate": 2}


def test_another_split_is_looked_at_anew(make_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = DataSettings(source=str(make_folder({"a": 9, "b": 9})))
    validate_data(settings)
    looked: list[object] = []
    find = validate.find_duplicates
    monkeypatch.setattr(validate, "find_duplicates", lambda pictures: looked.append(pictures) or find(pictures))
    quick_findings(load_data(settings))
    assert looked == []
    quick_findings(load_data(settings.model_copy(update={"split_seed": 3})))
    assert len(looked) == 1


@pytest.mark.parametrize("damage", [lambda c: b"", lambda c: c[:-1], lambda c: c[:-3] + b"x" + c[-2:], lambda c: b"no"])
def test_what_is_kept_and_damaged_is_found_again(repeated: DataSettings, tmp_path: Path, damage) -> None:
    first = quick_findings(load_data(repeated))
    (path,) = (tmp_path / "cache" / "checks").iterdir()
    path.write_bytes(damage(path.read_bytes()))

    assert quick_findings(load_data(repeated)) == first


def test_findings_in_data_that_a_run_refuses_are_not_kept(repeated: DataSettings, tmp_path: Path) -> None:
    (Path(repeated.source) / "test/cat/bad.png").write_text("no")
    validate_data(repeated)

    assert not (tmp_path / "cache" / "checks").exists()


def test_repeats_among_arrays() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    pixels[25] = pixels[3]
    images = ArraySet(pixels, np.arange(30) % 2, [f"m/{i:02d}" for i in range(30)])
    train, val, test = (Subset(images, range(*ends)) for ends in ((0, 10), (10, 20), (20, 30)))
    data = DataSplits(("a", "b"), train, val, test, "made", "made", "made", AugmentSettings())

    assert [(each.kind, each.path, each.others) for each in find_repeated_files(data)] == [
        ("across-splits", "m/03", ("m/25",))
    ]
    assert find_repeated_files(data)[0].reason.startswith("the same pixels as m/25")


@pytest.mark.parametrize(
    ("values", "bright", "words"),
    [
        (range(16), 1, "nearly all of 39 images lie between 0 and 15 of 0 to 255"),
        (range(16), 20, ""),  # a class of bright images
        (range(40), 0, ""),
    ],
)
def test_a_run_says_that_its_images_have_next_to_no_contrast(values, bright, words, tmp_path):
    for i in range(80):
        picture = np.resize(np.random.default_rng(i).permutation(np.array(values, np.uint8)), (8, 8))
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(picture * np.uint8(6 if i < bright else 1)).save(folder / f"{i}.png")
    settings = DataSettings(source=str(tmp_path))
    warnings, _ = summary_messages(quick_findings(load_data(settings)), "photos")
    assert len(warnings) == bool(words)
    assert all(words in each and "nearly one gray" in each and "potstill check photos" in each for each in warnings)
    validate_data(settings)  # the whole check says what to do
    warnings, _ = summary_messages(quick_findings(load_data(settings)), "photos")
    assert len(warnings) == bool(words)
    assert all("scale the values in the files to 0 to 255" in each for each in warnings)


def test_what_a_run_says() -> None:
    findings = [
        Finding("two-labels", "a.png", "the same file as b.png, as 'cat' in train and 'dog' in train"),
        *(Finding("duplicate", f"{i}.png", "the same file as others") for i in range(1200)),
        Finding("imbalance", ".", "much"),
    ]
    warnings, notes = summary_messages(summarize_findings(findings), "photos")

    assert warnings == [
        "photos: 1 x images under two labels (at most one label is right, and no model can predict both), such as "
        "a.png: the same file as b.png, as 'cat' in train and 'dog' in train; `potstill check photos` shows all"
    ]
    assert notes == ["photos: 1,200 x duplicates, 1 x imbalance; `potstill check photos` lists them"]
    assert summary_messages((), "photos") == ([], [])


def test_a_run_tells_and_records_it(repeated: DataSettings) -> None:
    told: dict[str, list[str]] = {"warn": [], "note": []}

    class Watching(SilentObserver):
        def warn(self, message: str) -> None:
            told["warn"].append(message)

        def note(self, message: str) -> None:
            told["note"].append(message)

    recorded = warn_about_data(load_data(repeated), Watching())

    assert [words.split(" x ")[1].split(" (")[0] for words in recorded] == [
        "images under two labels", "images in more than one split",
    ]  # fmt: skip
    assert told["warn"] == recorded
    assert [note.split("; ")[0] for note in told["note"]] == [
        f"{repeated.source}: 1 x duplicates",
        f"{repeated.source}: the centre crop cuts off 17 % of the median image",  # of 12 x 10 pixels
    ]


def test_a_run_warns_of_class_names_that_are_nearly_the_same(make_folder) -> None:
    root = make_folder({"Cat": 3, "cat": 3, "dog": 3, "2": 3, "02": 3})
    warnings, _ = summary_messages(quick_findings(load_data(DataSettings(source=str(root)))), "pets")
    assert len(warnings) == 1
    assert "most likely meant to be the same" in warnings[0]
    assert "'02', '2'" in warnings[0]
