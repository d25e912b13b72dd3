import json
import os
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
from potstill.errors import ArtifactError, DataError, UsageError
from potstill.export.predict import find_images, predict
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
    [([], 3, "error: 1 of 2 images could not be read"), (["--skip-bad"], 0, "1 file is left out\n  {0}/bad.jpg: ")],
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
    with pytest.raises(DataError, match="no images in"):
        predict(tmp_path / "no-model", [tmp_path])
    with pytest.raises(ArtifactError, match="no-model"):
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
