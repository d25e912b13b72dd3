"""CIFAR-100 from made files in both published forms, compared with torchvision's reading of them."""

import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from potstill.data import DataSettings
from potstill.data.builtin import cifar100
from potstill.data.datasets import check_source, load_data
from potstill.errors import DataError, UsageError

NAMES = [f"class_{i:02d}" for i in range(100)]


def made(root: Path, form: str, train: int = 300, test: int = 100) -> Path:
    """Random images, every class as often as the others, in the published form."""
    rng = np.random.default_rng(0)
    folder = root / f"cifar-100-{form}"
    folder.mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = np.arange(count) % 100
        if form == "binary":
            head = np.stack([labels // 5, labels], axis=1).astype(np.uint8)
            (folder / f"{split}.bin").write_bytes(np.concatenate([head, pixels], axis=1).tobytes())
        else:
            content = {"data": pixels, "fine_labels": labels.tolist(), "coarse_labels": (labels // 5).tolist()}
            (folder / split).write_bytes(pickle.dumps(content, protocol=2))
    if form == "binary":
        (folder / "fine_label_names.txt").write_text("\n".join(NAMES) + "\n")
    else:
        (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": NAMES}, protocol=2))
    return root


def load(root: Path, **options: object):
    return load_data(DataSettings(source="cifar100", options={"root": str(root), **options}, val=0.34))


@pytest.mark.parametrize("form", ["binary", "python"])
def test_splits_classes_and_pixels(tmp_path: Path, form: str) -> None:
    data = load(made(tmp_path, form))
    assert data.class_names == tuple(NAMES)
    assert [len(images) for images in (data.train, data.val, data.test)] == [200, 100, 100]
    assert set(data.counts()["val"].values()) == {1}
    assert (data.augment.pad_crop * 32, data.augment.hflip) == (4, True)
    rng = np.random.default_rng(0)  # the writer's numbers again: one image is 1024 red, 1024 green, 1024 blue
    train, test = (rng.integers(0, 256, (count, 3072), dtype=np.uint8) for count in (300, 100))
    for images, rows in ((data.val, train), (data.test, test)):
        number = int(images.names[7].rsplit("/", 1)[1])
        assert images.labels[7] == number % 100
        assert images.pixels(7)[3, 5].tolist() == [rows[number][3 * 32 + 5 + 1024 * channel] for channel in range(3)]


def test_both_forms_are_one_data_set(tmp_path: Path) -> None:
    found = {load(made(tmp_path / form, form)).fingerprint for form in ("binary", "python")}
    assert len(found) == 1
    assert load(tmp_path / "python" / "cifar-100-python").fingerprint in found  # the inner folder may be given too


def test_reads_as_torchvision_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR100

    data = load(made(tmp_path, "python"))
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR100, "_load_meta", lambda self: None)
    peer = CIFAR100(str(tmp_path), train=False)
    np.testing.assert_array_equal(data.test.pixels(42), np.asarray(peer[42][0]))
    assert data.test.labels.tolist() == peer.targets


def test_limit_keeps_all_classes(tmp_path: Path) -> None:
    data = load(made(tmp_path, "binary", train=600), limit=300)
    assert [len(images) for images in (data.train, data.val, data.test)] == [200, 100, 100]
    assert set(data.counts()["train"].values()) == {2}


class Harmful:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_pickle_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, "python")
    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps({"data": Harmful()}))
    with pytest.raises(DataError, match=r"train: damaged \(it holds builtins.print, which is never loaded"):
        load(tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no pickle", "damaged"),
        (pickle.dumps([1]), "no mapping"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0]}), "are not in it"),
        (pickle.dumps({"data": np.zeros((1, 3072)), "fine_labels": [0]}), "are not in it"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [100]}), "from 0 to 99"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "fine_labels": ["cat"]}), "no whole numbers"),
    ],
)
def test_damaged_pickles(tmp_path: Path, content: bytes, words: str) -> None:
    made(tmp_path, "python")
    (tmp_path / "cifar-100-python" / "train").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        load(tmp_path)
    assert "cifar-100-python/train" in str(caught.value)


def test_damaged_binaries(tmp_path: Path) -> None:
    folder = made(tmp_path, "binary") / "cifar-100-binary"
    whole = (folder / "train.bin").read_bytes()
    for content, words in ((whole[:-1], "no multiple of 3,074"), (b"", "0 to 99"), (b"\0\xff" + whole[2:], "0 to 99")):
        (folder / "train.bin").write_bytes(content)
        with pytest.raises(DataError, match=words):
            load(tmp_path)
    (folder / "train.bin").write_bytes(whole)
    (folder / "fine_label_names.txt").write_text("cat dog")
    with pytest.raises(DataError, match="100 classes"):
        load(tmp_path)


def test_a_root_without_the_files_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither cifar-100-binary .* nor cifar-100-python"):
        check_source(DataSettings(source="cifar100", options={"root": str(tmp_path)}))


def test_checking_does_not_import_torch(tmp_path: Path) -> None:
    made(tmp_path, "binary")
    code = (
        "import sys; from potstill.data.datasets import load_data; from potstill.data import DataSettings; "
        f"load_data(DataSettings(source='cifar100', options={{'root': {str(tmp_path)!r}}}, val=0.34)); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_offline_fails_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(cifar100.urllib.request, "urlopen", refuse)
    with pytest.raises(UsageError, match=r"(?s)unreachable.*unpack it.*data.options.root=DIR"):
        load_data(DataSettings(source="cifar100"))


def test_a_download_is_compared_with_its_checksum_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR100

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(made(tmp_path / "made", "python") / "cifar-100-python", "cifar-100-python")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(cifar100.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(packed.getvalue()))
    with pytest.raises(DataError, match="damaged"):
        load_data(DataSettings(source="cifar100"))
    assert not (tmp_path / "home").exists()

    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(packed.getvalue()).hexdigest())
    first = load_data(DataSettings(source="cifar100", val=0.34))
    monkeypatch.setattr(cifar100.urllib.request, "urlopen", None)
    assert load_data(DataSettings(source="cifar100", val=0.34)).fingerprint == first.fingerprint
    assert first.fingerprint == load(tmp_path / "made").fingerprint
