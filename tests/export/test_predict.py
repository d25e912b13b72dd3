import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from potstill.cli import main
from potstill.data.image_io import decode
from potstill.data.image_sets import FileSet
from potstill.data.loader import Loader
from potstill.data.transforms import preprocess
from potstill.errors import DataError, UsageError
from potstill.export.predict import (
    Prediction,
    create_predictor,
    find_images,
    predict,
    read_items,
    write_table,
)
from potstill.input_spec import InputSpec
from potstill.models.model_file import Classifier, save_model

CLASSES = ("dark", "red", "green", "blue")
HALF = InputSpec(8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class Brightest(torch.nn.Module):
    """Logits by hand: 0 for "dark", then the mean of each colour channel times 4."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(4.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = images.mean(dim=(2, 3)) * self.factor
        return torch.cat([torch.zeros(len(images), 1), means], dim=1)


def classifier() -> Classifier:
    return Classifier(Brightest(), "by-hand", CLASSES, HALF, {})


def picture(path: Path, colour: tuple[int, int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((10, 14, 3), colour, np.uint8)).save(path)
    return path


def test_probabilities_equal_a_softmax_by_hand(tmp_path: Path) -> None:
    red = picture(tmp_path / "red.png", (255, 0, 0))
    (found,) = predict(classifier(), [red], top=3)

    # Channels are +1, -1, -1 after normalisation: logits 0, 4, -4, -4.
    exponentials = np.exp([0.0, 4.0, -4.0, -4.0])
    expected = exponentials / exponentials.sum()
    assert [name for name, _ in found.classes] == ["red", "dark", "green"]  # of equals the first class comes first
    assert np.allclose([share for _, share in found.classes], expected[[1, 0, 2]], atol=1e-6)
    assert found.error is None


def test_a_large_jpeg_has_the_pixels_that_training_sees(tmp_path: Path) -> None:
    """Both decode it at 1/8 of its size; at full size the mean of the red channel differs."""
    pixels = np.random.default_rng(0).integers(0, 256, (160, 240, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.jpg")
    (batch,) = Loader(FileSet(tmp_path, ["large.jpg"], [0]), HALF, batch_size=1).epoch(0)
    (found,) = predict(classifier(), [tmp_path / "large.jpg"], top=4)
    with torch.inference_mode():
        expected = Brightest()(batch.images).softmax(1)[0].tolist()
        full = Brightest()(preprocess(decode(tmp_path / "large.jpg"), HALF)[None]).softmax(1)[0].tolist()
    assert dict(found.classes) == pytest.approx(dict(zip(CLASSES, expected, strict=True)), abs=1e-6)
    assert max(abs(a - b) for a, b in zip(expected, full, strict=True)) > 1e-4


def test_a_broken_image_costs_only_itself_and_order_is_kept(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{i}.png", (0, 0, 255) if i % 2 else (0, 255, 0)) for i in range(5)]
    broken = tmp_path / "broken.jpg"
    broken.write_text("no image")
    paths.insert(2, broken)

    found = predict(classifier(), paths, top=1, batch_size=2)

    assert [each.path for each in found] == paths
    assert [each.classes[0][0] if each.classes else None for each in found] == [
        "green", "blue", None, "green", "blue", "green",
    ]  # fmt: skip
    assert "broken.jpg" in str(found[2].error)


def test_top_is_at_most_the_number_of_classes(tmp_path: Path) -> None:
    (found,) = predict(classifier(), [picture(tmp_path / "a.png", (9, 9, 9))], top=99)

    assert len(found.classes) == 4
    assert sum(share for _, share in found.classes) == pytest.approx(1)


def test_folders_are_walked_in_sorted_order_and_only_images_are_taken(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/10.jpg", "a/x.webp", "z.tiff", "b/notes.txt", ".hidden.png", ".git/y.png", "A.bmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)

    found = [str(path.relative_to(tmp_path)) for path in find_images([tmp_path]).images]

    assert found == ["A.bmp", "a/x.webp", "b/10.jpg", "b/2.PNG", "z.tiff"]
    assert find_images([tmp_path / "b/notes.txt"]).images == [tmp_path / "b/notes.txt"]  # named: the content decides


def test_nothing_in_a_folder_is_left_out_without_a_word(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    picture(inside / "a.png", (0, 0, 0)).rename(inside / "no-ending")
    picture(tmp_path / "elsewhere" / "b.png", (0, 0, 0))
    (inside / "text.TXT").write_text("BM is how bitmaps begin")
    (inside / "photo.HEIC").write_text("not read")
    picture(inside / "Thumbs.db" / "x.png", (0, 0, 0))  # a folder of that name is no system's
    picture(inside / "@eaDir" / "x.png", (0, 0, 0))
    picture(inside / ".hidden" / "x.png", (0, 0, 0))
    (inside / "file.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    (inside / "folder").symlink_to(tmp_path / "elsewhere")
    found = find_images([inside])

    assert [path.relative_to(inside).as_posix() for path in found.images] == [
        "Thumbs.db/x.png", "no-ending", "photo.HEIC",
    ]  # fmt: skip
    reasons = {Path(path).name: reason for path, reason in found.left_out}
    assert reasons.pop("text.TXT") == "no image, by its name and its content"
    assert reasons.pop(".hidden").startswith("a hidden folder with 1 image")
    assert set(reasons) == {"file.png", "folder"}
    assert all(reason.endswith("--follow-links reads it") for reason in reasons.values())
    assert found.passed_over == {"@eaDir": 1}
    followed = {path.name for path in find_images([inside], follow_links=True).images}
    assert followed == {"x.png", "no-ending", "photo.HEIC", "file.png", "b.png"}


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [([], 3, "error: 1 of 2 images could not be read"), (["--skip-bad"], 0, "1 file is unreadable\n  {0}/bad.jpg: ")],
)
def test_the_verb_names_what_it_leaves_out(run: Path, tmp_path: Path, capsys, flags, code: int, words: str) -> None:
    folder = tmp_path / "images"
    picture(folder / "good.png", (0, 0, 0))
    (folder / "bad.jpg").write_text("no image")
    (folder / "notes.txt").write_text("x")

    assert main(["predict", str(run), str(folder), *flags]) == code
    said = capsys.readouterr()
    assert f"{folder}: 1 file is left out\n  {folder}/notes.txt: no image" in said.err
    assert words.format(folder) in said.err
    assert said.out.count("\n") == 2


def test_missing_paths_are_named_before_any_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such image or folder: .*gone\.png, .*also"):
        predict(tmp_path / "no-model", [tmp_path / "gone.png", tmp_path / "also"])
    (tmp_path / "photos").mkdir()
    with pytest.raises(UsageError, match=r"no such image or folder: .*; did you mean 'photos'\?"):
        predict(tmp_path / "no-model", [tmp_path / "photso"])
    with pytest.raises(DataError, match="no images in"):
        predict(tmp_path / "no-model", [tmp_path])
    with pytest.raises(UsageError, match="no-model does not exist"):
        predict(tmp_path / "no-model", [picture(tmp_path / "a.png", (0, 0, 0))])


# the verb, with a real model file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose distilled student is a real network, saved and untrained."""
    from potstill.models.factory import create_model

    torch.manual_seed(0)
    module = create_model("cifar/resnet8", 4, size=8)
    save_model(Classifier(module, "cifar/resnet8", CLASSES, HALF, {}), tmp_path / "run" / "distilled")
    return tmp_path / "run"


def test_the_verb_prints_a_line_an_image(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = picture(tmp_path / "images" / "evil\x1b[2J.png", (255, 255, 255))

    assert main(["predict", str(run), str(path.parent), "--top", "2"]) == 0

    line = capsys.readouterr().out
    assert line.startswith(f"{tmp_path}/images/evil\\x1b[2J.png: ")
    assert line.count("%") == 2
    assert "\x1b" not in line


def test_the_verb_predicts_the_others_and_exits_with_3(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = picture(tmp_path / "good.png", (0, 0, 0)), tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n")

    assert main(["predict", str(run), str(bad), str(good), "--json"]) == 3

    captured = capsys.readouterr()
    first, second = json.loads(captured.out)
    assert (first["path"], second["path"]) == (str(bad), str(good))
    assert "error" in first
    assert [set(each) for each in second["predictions"]] == [{"class", "probability"}] * 3
    assert "error: 1 of 2 images could not be read:" in captured.err
    assert "bad.png" in captured.err
    assert "Traceback" not in captured.err


def test_the_verb_refuses_a_damaged_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = run / "distilled" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)

    assert main(["predict", str(run), str(picture(tmp_path / "a.png", (0, 0, 0)))]) == 4
    assert "damaged" in capsys.readouterr().err


def test_an_image_below_the_threshold_is_unknown(tmp_path: Path) -> None:
    red, grey = picture(tmp_path / "red.png", (255, 0, 0)), picture(tmp_path / "grey.png", (128, 128, 128))
    found = predict(classifier(), [red, grey], top=1, threshold=0.6)
    assert [each.label for each in found] == ["red", "unknown"]
    assert [each.unknown for each in found] == [False, True]
    assert found[1].classes[0][1] == pytest.approx(0.25, abs=0.01)  # of four classes that are equal
    assert found[1].as_dict()["unknown"] is True


def test_predictions_come_before_all_images_are_read(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{at:04d}.png", (255, 0, 0)) for at in range(3)]
    asked = []

    def endless():
        for at in range(100_000):
            asked.append(at)
            yield from read_items([paths[at % 3]])

    predictions = create_predictor(classifier()).predict(endless(), top=1, batch_size=4)
    first = [next(predictions) for _ in range(6)]
    predictions.close()
    assert [each.path for each in first] == [*paths, *paths]
    assert len(asked) < 200


COLUMNS = ["path", "prediction", "class_1", "p_1", "class_2", "p_2", "error"]


def made(folder: Path) -> list[Prediction]:
    good, broken = picture(folder / "=red.png", (255, 0, 0)), folder / "broken.png"
    broken.write_text("no image")
    return predict(classifier(), [good, broken, picture(folder / "grey.png", (128, 128, 128))], threshold=0.6)


def test_a_csv_has_a_row_for_each_image(tmp_path: Path) -> None:
    write_table(tmp_path / "table.csv", iter(made(tmp_path)), 2, cascade=False, video=False)
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        header, red, broken, grey = list(csv.reader(file))
    assert header == COLUMNS
    assert [len(row) for row in (red, broken, grey)] == [len(header)] * 3
    assert red[1:3] == ["red", "red"]
    assert float(red[3]) == pytest.approx(np.exp(4) / (np.exp(4) + 1 + 2 * np.exp(-4)), abs=1e-5)
    assert broken[1:6] == [""] * 5
    assert "broken.png" in broken[6]
    assert grey[1] == "unknown"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("table")] == ["table.csv"]


def test_a_parquet_file_has_the_same_columns_with_types(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write_table(tmp_path / "table.parquet", iter(made(tmp_path)), 2, cascade=False, video=False)
    table = parquet.read_table(tmp_path / "table.parquet")
    assert table.column_names == COLUMNS
    assert table.column("prediction").to_pylist() == ["red", None, "unknown"]
    assert table.column("p_1").to_pylist()[1] is None
    assert isinstance(table.column("p_1").to_pylist()[0], float)
    assert not list(tmp_path.glob(".table*"))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_has_rows_of_names_that_are_not_utf8(tmp_path: Path, kind: str) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow.parquet")
    path = Path("\udcff.png")  # the byte 0xff, as os.fsdecode returns it
    rows = [Prediction(path, (("red", 1.0),)), Prediction(path, (), f"{path}: empty file")]
    write_table(tmp_path / f"table.{kind}", iter(rows), 1, cascade=False, video=False)
    if kind == "csv":
        with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
            found = [(row["path"], row["error"] or None) for row in csv.DictReader(file)]
    else:
        columns = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "table.parquet").to_pydict()
        found = list(zip(columns["path"], columns["error"], strict=True))
    assert found == [("\\udcff.png", None), ("\\udcff.png", "\\udcff.png: empty file")]


def test_a_table_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    def fails():
        yield Prediction(Path("a"), (("red", 1.0),))
        raise DataError("no more")

    for name in ("table.csv", "table.parquet"):
        (tmp_path / name).write_text("old")
        with pytest.raises(DataError):
            write_table(tmp_path / name, fails(), 1, cascade=False, video=False)
        assert (tmp_path / name).read_text() == "old"
        assert len(list(tmp_path.glob("*table*"))) <= 2


def test_the_command_writes_a_table_and_counts(tmp_path: Path, capsys, monkeypatch) -> None:
    images = tmp_path / "in"
    picture(images / "red.png", (255, 0, 0))
    (images / "broken.png").write_text("no image")
    (images / "film.mp4").write_text("no film")
    network = create_predictor(classifier()).network
    monkeypatch.setattr("potstill.export.predict._open_torch", lambda *_: network)
    arguments = ["predict", "any", str(images), "--top-k", "2"]
    assert main([*arguments, "--output", str(tmp_path / "x.csv"), "--skip-bad"]) == 0
    told = capsys.readouterr()
    assert "2 images, " in told.out
    assert "1 could not be read" in told.out
    assert "broken.png: " in told.err
    assert "film.mp4: a video: give it by its own name" in told.err
    assert (tmp_path / "x.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert main([*arguments, "--output", str(tmp_path / "y.csv")]) == DataError.exit_code
    assert (tmp_path / "y.csv").read_text() == (tmp_path / "x.csv").read_text()
    for wrong in (["--output", "x.json"], ["--output", "x.csv", "--json"], ["--risk", "0.1"]):
        assert main([*arguments, *wrong]) == UsageError.exit_code


def film(path: Path, colours: list[tuple[int, int, int]], rate: int = 5) -> Path:
    """A video whose frames are red on the left, and of these colours on the right."""
    av = pytest.importorskip("av", reason="PyAV is not installed: potstill[video]")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 2_000_000
        for colour in colours:
            pixels = np.full((48, 64, 3), colour, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def test_every_frame_of_a_video_is_a_row(tmp_path: Path) -> None:
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    path = film(tmp_path / "film.mp4", [red, green, blue, red, green])
    found = predict(classifier(), [path], top=1)
    assert [(each.frame, each.seconds, each.label) for each in found] == [
        (0, 0.0, "red"), (1, 0.2, "green"), (2, 0.4, "blue"), (3, 0.6, "red"), (4, 0.8, "green"),
    ]  # fmt: skip
    assert [(each.frame, each.label) for each in predict(classifier(), [path], top=1, every=2)] == [
        (0, "red"), (2, "blue"), (4, "green"),
    ]  # fmt: skip
    write_table(tmp_path / "film.csv", iter(found), 1, cascade=False, video=True)
    lines = (tmp_path / "film.csv").read_text().splitlines()
    assert lines[0] == "path,frame,seconds,prediction,class_1,p_1,error"
    assert lines[2].split(",")[1:4] == ["1", "0.2", "green"]


def test_a_video_that_a_phone_has_turned_is_upright(tmp_path: Path) -> None:
    """The matrix of the track, as in ISO 14496-12: x' = -y, y' = x turns by 90 degrees clockwise, left to top."""
    av = pytest.importorskip("av", reason="PyAV is not installed: potstill[video]")
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 2_000_000
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:, :32] = (255, 0, 0)
        for packet in (*stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")), *stream.encode()):
            container.mux(packet)
    content = path.read_bytes()
    straight = bytes.fromhex("00010000 00000000 00000000 00000000 00010000 00000000 00000000 00000000 40000000")
    turned = bytes.fromhex("00000000 00010000 00000000 ffff0000 00000000 00000000 00300000 00000000 40000000")
    where = content.index(straight, content.index(b"tkhd"))
    path.write_bytes(content[:where] + turned + content[where + len(straight) :])
    (item,) = read_items([path])
    assert item.pixels is not None
    assert item.pixels.shape == (64, 48, 3)
    assert item.pixels[4, 24, 0] > 200
    assert item.pixels[60, 24, 0] < 50


def test_damaged_videos_cost_only_themselves(tmp_path: Path) -> None:
    good = film(tmp_path / "good.mp4", [(255, 0, 0)])
    (tmp_path / "bad.mp4").write_bytes(b"no video" * 100)
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{good}\n")  # a playlist would open other files
    found = predict(classifier(), [tmp_path / "bad.mp4", tmp_path / "list.mp4", good], top=1)
    assert [each.error is None for each in found] == [False, False, True]
    assert "bad.mp4: cannot be read as a video" in str(found[0].error)


def test_a_video_without_pyav_names_the_extra(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "film.mp4").touch()
    with pytest.raises(UsageError, match=r"potstill\[video\]"):
        predict(classifier(), [tmp_path / "film.mp4"])
