"""Images of 12 to 32 bits: one range for a data set, from the training images to the models and what they see later."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from potstill.cli import main
from potstill.config.recipe import load_recipe
from potstill.data.datasets import from_torch, load_data
from potstill.data.decoded_cache import DecodeRequest
from potstill.data.image_io import ValueSpan, compute_range, decode, decode_bytes, to_uint8
from potstill.data.scan import check_files
from potstill.data.settings import DataSettings
from potstill.errors import ArtifactError
from potstill.experiment.builders import build_network
from potstill.export.predict import predict
from potstill.input_spec import InputSpec
from potstill.models.model_file import Classifier, load_model, save_model

RECIPE = """
name: wide
data: {{source: "{source}", size: 16, workers: 0}}
student: {{model: cifar/resnet8}}
method: {{name: supervised}}
training: {{epochs: 1, batch_size: 8, precision: float32}}
teacher_cache: off
"""


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of images of 12 bits in 16; within each image, values stay below 2048 but in one."""
    for label, offset in (("dark", 0), ("light", 1000)):
        for split, count in (("train", 8), ("val", 2), ("test", 2)):
            for i in range(count):
                values = np.random.default_rng([offset, i, count]).integers(offset, offset + 1000, (16, 16))
                save(tmp_path / f"data/{split}/{label}/{i}.png", values.astype(np.uint16))
    save(tmp_path / "data/train/light/most.png", np.full((16, 16), 4000, np.uint16) - np.eye(16, dtype=np.uint16))
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("spans", "wanted"),
    [
        ([("integer", 0, 255)], (0, 255)),
        ([("integer", 0, 256)], (0, 511)),
        ([("integer", 0, 4095), ("integer", 7, 9)], (0, 4095)),
        ([("integer", 0, 4096)], (0, 8191)),
        ([("integer", 0, 65280)], (0, 65535)),
        ([("integer", 0, 2**32 - 1)], (0, 2**32 - 1)),
        ([("integer", -1000, 3000)], (-1000, 3000)),
        ([("float", 0, 1), ("float", 0, 0.2)], (0, 1)),
        ([("float", 0, 1), ("float", 0, 1.02)], (0, 1.02)),
        ([("float", 0.5, 3)], (0, 3)),
        ([("float", -2, 0.5)], (-2, 0.5)),
        ([("float", 0, 1), ("integer", 0, 4095)], (0, 4095)),
        ([("colour", 0, 4095)], None),
    ],
)
def test_the_range_of_a_data_set(spans, wanted):
    assert compute_range([None, *(ValueSpan(*each) for each in spans)]) == wanted


def test_values_between_the_ends():
    # 256 (v - low) / (high - low + 1), cut: 16 -> 1, 4080 -> 255; beyond the ends 0 and 255
    whole = np.array([0, 15, 16, 2048, 4079, 4080, 4095, 9000], np.uint16)
    assert to_uint8(whole, (0, 4095)).tolist() == [0, 0, 1, 128, 254, 255, 255, 255]
    # 255 (v - low) / (high - low), rounded: -1 -> 0, 0 -> 85, 0.5 -> 127.5 -> 128
    assert to_uint8(np.array([-2, -1, 0, 0.5, 2, 7], np.float32), (-1, 2)).tolist() == [0, 0, 85, 128, 255, 255]


def test_all_images_of_a_set_are_read_by_the_range_of_the_training_images(folder):
    save(folder / "test/light/outlier.png", np.full((16, 16), 60_000, np.uint16))
    for _ in range(2):  # the second time, files are known and not read
        data = load_data(DataSettings(source=str(folder)))
        assert data.range == (0, 4095)
        for images in (data.train, data.val, data.test):
            for i, name in enumerate(images.names):
                values = np.asarray(Image.open(folder / name)).astype(int)
                np.testing.assert_array_equal(images.pixels(i)[..., 0], np.minimum(values // 16, 255))


def test_a_range_that_is_given_counts_for_pixels_fingerprint_and_caches(folder):
    auto = load_data(DataSettings(source=str(folder)))
    given = load_data(DataSettings(source=str(folder), range=(0, 65535)))
    same = load_data(DataSettings(source=str(folder), range=(0, 4095)))
    assert given.range == (0, 65535)
    assert auto.fingerprint == same.fingerprint != given.fingerprint
    manifests = [DecodeRequest(each.train, 16, "crop", "x").manifest() for each in (auto, same, given)]
    assert manifests[0] == manifests[1] != manifests[2]
    assert given.train.pixels(0).max() <= 4000 // 256


def test_images_of_8_bits_are_as_ever(tmp_path):
    for label in "ab":
        for i in range(6):
            save(tmp_path / label / f"{i}.png", np.random.default_rng(i).integers(0, 9, (8, 8), dtype=np.uint8))
    plain = load_data(DataSettings(source=str(tmp_path)))
    assert plain.range is None
    assert plain.train.pixels(0).max() < 9
    names = [f"{label}/{i}.png" for label in "ab" for i in range(6)]
    assert all(len(word.split()) == 2 for word in check_files(tmp_path, names, "x").values())


@pytest.mark.parametrize("bad", ["wide", [4095, 0], [0, 0], [0, float("inf")], [1], [0, 1, 2]])
def test_a_range_that_is_none_is_refused(bad):
    with pytest.raises(ValidationError):
        DataSettings(range=bad)


def test_the_model_keeps_the_range_for_all_that_it_sees_later(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(source=folder))
    assert main(["train", "recipe.yaml", "--stage", "baseline"]) == 0
    model = next((tmp_path / "runs").glob("*/baseline"))
    assert json.loads((model / "model.json").read_text())["input"]["range"] == [0.0, 4095.0]

    # An image whose own range is smaller is read as in training: doubled values are another image.
    name = folder / "test/dark/0.png"
    values = np.asarray(Image.open(name))
    save(tmp_path / "halved.png", values // 2)
    assert decode(tmp_path / "halved.png", (0, 4095)).max() < decode(name, (0, 4095)).max()
    seen = {}
    real = Classifier.predict

    def spy(self, images):
        seen["images"] = images.clone()
        return real(self, images)

    monkeypatch.setattr(Classifier, "predict", spy)
    for path in (name, tmp_path / "halved.png"):
        predict(model, [path])
        classifier = load_model(model)
        pixels = (np.asarray(Image.open(path)).astype(np.float64) // 16 / 255)[None]
        for channel in range(3):
            wanted = (pixels[0] - classifier.input.mean[channel]) / classifier.input.std[channel]
            np.testing.assert_allclose(seen["images"][0, channel].numpy(), wanted, atol=1e-5)

    capsys.readouterr()
    assert main(["evaluate", str(model), "--data", str(folder)]) == 0


def test_serve_reads_by_the_range_of_the_model(folder, tmp_path):
    from potstill.models.factory import create_model
    from potstill.serve.model_worker import _predict_all

    model = Classifier(
        create_model("cifar/resnet8", 2, size=16).eval(),
        "cifar/resnet8",
        ("dark", "light"),
        InputSpec(16, range=(0, 65535)),
    )
    save_model(model, tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert model.input.range == (0, 65535)
    content = (folder / "train/dark/0.png").read_bytes()
    answer = _predict_all({"distilled": model}, {"top": 2, "gradcam": False}, content)
    from potstill.data.transforms import preprocess

    shares = model.predict(preprocess(decode_bytes(content, "x", (0, 65535)), model.input)[None])[0]
    given = {each["class"]: each["probability"] for each in answer["models"][0]["predictions"]}
    assert given == pytest.approx({"dark": float(shares[0]), "light": float(shares[1])})


def test_a_teacher_of_another_range_is_refused(tmp_path):
    from potstill.models.factory import create_model

    model = Classifier(
        create_model("cifar/resnet8", 2, size=16), "cifar/resnet8", ("a", "b"), InputSpec(16, range=(0, 1023))
    )
    save_model(model, tmp_path / "model")
    teacher = {"model": "cifar/resnet8", "weights": str(tmp_path / "model")}
    recipe = load_recipe({"student": {"model": "cifar/resnet8"}, "teacher": teacher, "data": {"size": 16}})
    assert build_network(recipe, recipe.network("teacher"), ("a", "b"), (0.0, 1023.0)).input.range == (0, 1023)
    assert build_network(recipe, recipe.student, ("a", "b"), (0.0, 4095.0)).input.range == (0, 4095)
    with pytest.raises(ArtifactError, match=r"with data\.range \[0, 1023\].*\[0, 4095\](.|\n)*data\.range=\[0,1023\]"):
        build_network(recipe, recipe.network("teacher"), ("a", "b"), (0.0, 4095.0))


def test_check_warns_of_images_that_use_a_small_part_or_lie_beyond(folder, capsys):
    save(folder / "train/dark/black.png", np.arange(256, dtype=np.uint16).reshape(16, 16))
    save(folder / "test/light/outlier.png", np.full((16, 16), 60_000, np.uint16) + np.eye(16, dtype=np.uint16))
    save(folder / "test/light/plain.png", np.arange(256, dtype=np.uint8).reshape(16, 16))
    main(["check", str(folder), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["figures"]["range"] == [0, 4095]
    kinds = {}
    for each in report["findings"]:
        kinds.setdefault(each["kind"], []).append(each["path"])
    assert kinds["narrow-range"] == ["train/dark/black.png"]
    assert kinds["beyond-range"] == ["test/light/outlier.png"]
    assert kinds["mixed-range"] == ["."]
    main(["check", str(folder)])
    assert "range    [0, 4095], for images of more than 8 bits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.arange(256, dtype=np.uint8) % 17, "between 0 and 16, and the range is [0, 255]: scale the values"),
        (np.arange(256, dtype=np.uint16) + 32768, "set data.range=[32768,33023]"),
        (np.linspace(273.2, 310, 256, dtype=np.float32), "between 273.2 and 310, and the range is [0, 310]"),  # kelvin
        (np.arange(256, dtype=np.uint8) % 64, ""),
        (np.linspace(0, 310, 256, dtype=np.float32), ""),
    ],
)
def test_check_warns_if_all_images_together_use_a_small_part(values, words, tmp_path, capsys):
    for label in "ab":
        for i in range(4):
            (tmp_path / label).mkdir(exist_ok=True)
            picture = np.random.default_rng(i).permutation(values).reshape(16, 16)
            Image.fromarray(picture).save(tmp_path / label / f"{label}{i}.tif")
    main(["check", str(tmp_path), "--json"])
    found = [each for each in json.loads(capsys.readouterr().out)["findings"] if "range" in each["kind"] or
             each["kind"] == "low-contrast"]  # fmt: skip
    assert [each["kind"] for each in found] == (["low-contrast"] if words else [])
    assert all(words in each["reason"] for each in found)


def test_16_bit_colours_of_which_little_is_used_are_warned_of(tmp_path, capsys):
    import struct
    import zlib

    for label in "ab":
        for i in range(6):
            values = np.random.default_rng(i).integers(0, 4096, (8, 8, 3)).astype(">u2")
            rows = b"".join(b"\0" + row.tobytes() for row in values)
            chunks = [
                (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)),
                (b"IDAT", zlib.compress(rows)),
                (b"IEND", b""),
            ]
            png = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
            (tmp_path / label).mkdir(exist_ok=True)
            (tmp_path / label / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    main(["check", str(tmp_path), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["kinds"]["narrow-range"] == 12


def test_floats_in_shards_have_one_range(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for i in range(12):
            buffer = io.BytesIO()
            Image.fromarray(np.linspace(0, 1.02 if i == 7 else 0.9, 64, dtype=np.float32).reshape(8, 8)).save(
                buffer, "TIFF"
            )
            info = tarfile.TarInfo(f"{'ab'[i % 2]}/{i}.tif")
            info.size = len(buffer.getvalue())
            tar.addfile(info, io.BytesIO(buffer.getvalue()))
    for _ in range(2):
        data = load_data(DataSettings(source=str(tmp_path / "s.tar"), val=0.2, test=0.2))
        assert data.range in ((0, pytest.approx(1.02)), (0, 1))
        tops = {int(images.pixels(i).max()) for images in (data.train, data.val, data.test) for i in range(len(images))}
        assert max(tops) == 255
        assert min(tops) == (225 if data.range[1] > 1 else 229)  # of 0.9 as float32


@pytest.mark.parametrize("setting", ["auto", (0.0, 1023.0)])
def test_images_of_pillow_from_python_have_one_range(setting):
    class Images:
        """Values up to 900, of 10 bits; as a file, each has a range of its own."""

        targets = [0, 1] * 6

        def __len__(self):
            return 12

        def __getitem__(self, i):
            return Image.fromarray(np.full((8, 8), 75 * (i + 1), np.uint16)), i % 2

    data = from_torch(Images(), settings=DataSettings(range=setting))

    assert data.range == (0.0, 1023.0)
    for images in (data.train, data.val, data.test):
        for i, name in enumerate(images.names):
            assert int(images.pixels(i).max()) == 75 * (int(name.rpartition("/")[2]) + 1) // 4
    assert (
        len({from_torch(Images(), settings=DataSettings(range=each)).fingerprint for each in (setting, (0, 900))}) == 2
    )
