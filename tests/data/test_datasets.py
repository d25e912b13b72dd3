import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from potstill.data.builtin import fashion_mnist, solar
from potstill.data.datasets import DATASETS, check_source, from_torch, load_data
from potstill.data.settings import DataSettings
from potstill.errors import DataError, UsageError


def test_checking_and_loading_does_not_import_torch() -> None:
    code = (
        "import sys; from potstill.data.datasets import check_source, load_data; "
        "from potstill.data.settings import DataSettings; check_source(DataSettings()); load_data(DataSettings()); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_digits() -> None:
    data = load_data(DataSettings())
    assert data.class_names == tuple("0123456789")
    assert sum(map(len, (data.train, data.val, data.test))) == 1797
    assert 265 <= len(data.test) <= 274  # 15 %
    found = load_digits()
    for images in (data.train, data.test):
        number = int(images.names[5].removeprefix("digits/"))
        assert images.labels[5] == found.target[number]
        np.testing.assert_allclose(images.pixels(5)[..., 1] / 255 * 16, found.images[number], atol=0.04)
    assert load_data(DataSettings()).fingerprint == data.fingerprint
    assert load_data(DataSettings(split_seed=1)).fingerprint != data.fingerprint


def test_a_folder_of_the_same_name_is_mentioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    assert load_data(DataSettings(source="digits", size=32)).notes == ()
    (tmp_path / "digits").mkdir()
    hint = "digits is a known data set; for the images of the folder digits, give ./digits"
    assert load_data(DataSettings(source="digits", size=32)).notes == (hint,)

    def missing(settings: DataSettings) -> None:
        raise UsageError("it is not here")

    monkeypatch.setattr("potstill.data.datasets.call_dataset", missing)
    with pytest.raises(UsageError, match=f"^it is not here\n{hint}$"):
        load_data(DataSettings(source="digits", size=32))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": "digit"}, ["'digit'", "did you mean 'digits'?", "solar", "fashion-mnist"]),
        ({"source": "/no/such/folder"}, ["no data set, folder or manifest"]),
        (
            {"source": f"{Path(__file__).parent}s"},
            [f"no data set, folder or manifest '{Path(__file__).parent}s'; did you mean 'data'?"],
        ),
        ({"source": __file__}, [".csv, .tsv, .txt, .jsonl"]),
        ({"source": "digits", "options": {"classes": 2}}, ["unknown option 'classes' (allowed: none)"]),
        ({"source": "solar", "options": {"clases": 2, "cells": "none"}}, ["did you mean 'classes'?", "option cells"]),
        ({"source": "fashion-mnist", "options": {"limit": 1}}, ["option limit"]),
        ({"source": "fashion-mnist", "options": {"root": "/none"}}, ["/none has no train-images-idx3-ubyte.gz"]),
        ({"source": str(Path(__file__).parent), "options": {"a": 1}}, ["take no options"]),
        ({"source": str(Path(__file__).parent), "val": 0.5, "test": 0.5}, ["leave no images for train"]),
    ],
)
def test_bad_sources(settings: dict, words: list[str]) -> None:
    for function in (check_source, load_data):
        with pytest.raises(UsageError) as caught:
            function(DataSettings(**settings))
        assert caught.value.exit_code == 2
        for word in words:
            assert word in str(caught.value)


def test_every_data_set_can_be_checked_without_loading() -> None:
    for name in DATASETS:
        if name != "solar" or solar.find_package():
            check_source(DataSettings(source=name))


needs_solar = pytest.mark.skipif(solar.find_package() is None, reason="elpv-dataset is not installed")


@needs_solar
def test_solar_classes_and_cells() -> None:
    # Counts of labels.csv by probability and kind, counted with another tool: mono 588 117 56 313, poly 920 178 50 402.
    def totals(**options: object) -> dict[str, int]:
        data = load_data(DataSettings(source="solar", options=options))
        counts = data.counts()
        return {name: sum(counts[split][name] for split in counts) for name in data.class_names}

    assert totals() == {"functional": 1508, "minor": 295, "moderate": 106, "defective": 715}
    assert totals(classes=2) == {"functional": 1803, "defective": 821}
    assert totals(classes=2, two_class="sure", cells="mono") == {"functional": 588, "defective": 313}
    assert totals(cells="poly") == {"functional": 920, "minor": 178, "moderate": 50, "defective": 402}


@needs_solar
def test_solar_pixels_are_the_packages() -> None:
    from PIL import Image

    data = load_data(DataSettings(source="solar"))
    assert data.train.names[0].startswith("images/cell")
    with Image.open(solar.find_package() / "data" / data.train.names[0]) as image:
        np.testing.assert_array_equal(data.train.pixels(0)[..., 0], np.asarray(image.convert("L")))


def test_solar_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solar, "find_package", lambda: None)
    with pytest.raises(UsageError, match=r'pip install "potstill\[solar\]"'):
        check_source(DataSettings(source="solar"))


@pytest.fixture
def small_fashion(tmp_path: Path) -> Path:
    """The four files of Fashion-MNIST with 100 and 20 images."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 100), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = bytes([0, 0, 8, 3]) + np.array(images.shape, dtype=">u4").tobytes()
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        header = bytes([0, 0, 8, 1]) + np.array([count], dtype=">u4").tobytes()
        labels = np.arange(count, dtype=np.uint8) % 10
        (tmp_path / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    return tmp_path


def fashion(root: Path, **options: object):
    return load_data(DataSettings(source="fashion-mnist", options={"root": str(root), **options}, val=0.2))


def test_fashion_mnist_reads_as_torchvision_does(small_fashion: Path) -> None:
    from torchvision.datasets.mnist import read_image_file

    data = fashion(small_fashion)
    assert [len(images) for images in (data.train, data.val, data.test)] == [80, 20, 20]
    assert set(data.counts()["val"].values()) == {2}
    raw = small_fashion / "raw"
    raw.write_bytes(gzip.decompress((small_fashion / "train-images-idx3-ubyte.gz").read_bytes()))
    peer = read_image_file(str(raw)).numpy()
    number = int(data.val.names[3].rsplit("/", 1)[1])
    np.testing.assert_array_equal(data.val.pixels(3)[..., 2], peer[number])
    assert data.val.labels[3] == number % 10


def test_fashion_mnist_limit(small_fashion: Path) -> None:
    data = fashion(small_fashion, limit=50)
    assert [len(images) for images in (data.train, data.val, data.test)] == [40, 10, 20]
    assert set(data.counts()["train"].values()) == {4}


def test_fashion_mnist_damaged(small_fashion: Path) -> None:
    path = small_fashion / "train-images-idx3-ubyte.gz"
    whole = gzip.decompress(path.read_bytes())
    for content in (
        path.read_bytes()[:500],
        b"no gzip",
        gzip.compress(whole[:-1]),
        gzip.compress(b"\0\0\x08\x01" + whole[4:]),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: damaged"):
            fashion(small_fashion)


def test_fashion_mnist_offline_fails_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "SYSTEM", tmp_path)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(fashion_mnist.urllib.request, "urlopen", refuse)
    with pytest.raises(UsageError, match=r"(?s)unreachable.*dataset-fashion-mnist.*data.options.root=DIR"):
        load_data(DataSettings(source="fashion-mnist"))


def test_fashion_mnist_download_is_compared_with_its_checksum(
    small_fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr(fashion_mnist, "SYSTEM", tmp_path / "none")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(fashion_mnist.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"other bytes"))
    with pytest.raises(DataError, match="damaged"):
        load_data(DataSettings(source="fashion-mnist"))
    assert not (tmp_path / "home").exists()


def test_from_torch() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (60, 3, 6, 5), dtype=np.uint8))
    train = TensorDataset(pixels, torch.arange(60) % 3)
    data = from_torch(train, class_names=["x", "y", "z"], settings=DataSettings(val=0.2, test=0.2))
    assert data.counts() == {
        "train": dict.fromkeys("xyz", 12),
        "val": dict.fromkeys("xyz", 4),
        "test": dict.fromkeys("xyz", 4),
    }
    number = int(data.val.names[0].removeprefix("train/"))
    np.testing.assert_array_equal(data.val.pixels(0), pixels[number].permute(1, 2, 0).numpy())
    assert load_data(DataSettings(), data) is data
    given = from_torch(train, test=train, val=train)
    assert given.class_names == ("0", "1", "2")
    assert len(given.train) == len(given.test) == 60
    assert given.origin == "data sets from Python"


def test_from_torch_refuses() -> None:
    bad = TensorDataset(torch.full((6, 3, 2, 2), -1.0), torch.arange(6) % 2)
    with pytest.raises(DataError, match=r"(?s)6 unreadable images.*train/00000: floats must be in \[0, 1\]"):
        from_torch(bad, test=bad, val=bad)
    fine = TensorDataset(torch.zeros(6, 3, 2, 2), torch.arange(6) % 2)
    with pytest.raises(DataError, match="train has no images"):
        from_torch([])
    with pytest.raises(DataError, match="differ"):
        from_torch(fine, fine, fine, class_names=["a", "a"])
    three = TensorDataset(torch.zeros(6, 3, 2, 2), torch.arange(6) % 3)
    for sets in ((three, fine, fine), (three,)):
        with pytest.raises(DataError, match="train has label 2, but there are 2 classes"):
            from_torch(*sets, class_names=["a", "b"])
