from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from potstill.data.image_sets import ArraySet, FileSet, RelabeledSet, SemiSupervisedSet, Subset, TorchSet, read_square
from potstill.data.preprocessing import resize_to_square
from potstill.errors import DataError


def test_array_set_repeats_gray() -> None:
    images = ArraySet(np.arange(8, dtype=np.uint8).reshape(2, 2, 2), [0, 1], ["a", "b"])
    assert images.pixels(1)[..., 2].tolist() == [[4, 5], [6, 7]]
    assert images.pixels(1).shape == (2, 2, 3)
    with pytest.raises(DataError, match="uint8"):
        ArraySet(np.zeros((2, 2, 2)), [0, 1], ["a", "b"])  # type: ignore[arg-type]


def test_subset_of_files(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (1, 1), (i, 0, 0)).save(tmp_path / f"{i}.png")
    images = Subset(FileSet(tmp_path, ["0.png", "1.png", "2.png"], [0, 1, 2]), [2, 0])
    assert images.names == ("2.png", "0.png")
    assert images.labels.tolist() == [2, 0]
    assert images.pixels(0)[0, 0].tolist() == [2, 0, 0]


@pytest.mark.parametrize(
    "image",
    [
        torch.tensor([[[51]], [[102]], [[204]]], dtype=torch.uint8),
        torch.tensor([[[0.2]], [[0.4]], [[0.8]]]),
        np.array([[[51, 102, 204]]], dtype=np.uint8),
        Image.new("RGB", (1, 1), (51, 102, 204)),
    ],
)
def test_torch_set_takes_tensors_arrays_and_pil(image: object) -> None:
    images = TorchSet([(image, 0), (image, 1)], prefix="train")
    assert images.pixels(1)[0, 0].tolist() == [51, 102, 204]
    assert images.labels.tolist() == [0, 1]
    assert images.names == ("train/00000", "train/00001")


def test_torch_set_gray_and_alpha() -> None:
    assert TorchSet([(torch.full((1, 2, 2), 7, dtype=torch.uint8), 0)]).pixels(0)[0, 0].tolist() == [7, 7, 7]
    clear = torch.tensor([[[1]], [[2]], [[3]], [[0]]], dtype=torch.uint8)
    assert TorchSet([(clear, 0)]).pixels(0)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (torch.tensor([[[-1.2]]]), r"\[0, 1\]"),
        (torch.zeros(2, 5, 5, dtype=torch.uint8), "channels"),
        (torch.zeros(3, 5, 5, dtype=torch.int64), "uint8"),
        (torch.zeros(3, 0, 5), "channels"),
    ],
)
def test_torch_set_refuses_what_is_no_picture(image: torch.Tensor, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        TorchSet([(image, 0)]).pixels(0)


def test_torch_set_reads_labels() -> None:
    class WithTargets(list):
        targets = (3, 4)

    assert TorchSet(WithTargets([(None, 0), (None, 0)])).labels.tolist() == [3, 4]
    data = TensorDataset(torch.zeros(2, 3, 4, 4), torch.tensor([1, 0]))
    assert TorchSet(data).labels.tolist() == [1, 0]


def test_torch_set_names_the_item_that_fails() -> None:
    class Broken:
        targets = (0,)

        def __len__(self) -> int:
            return 1

        def __getitem__(self, i: int) -> object:
            raise KeyError("lost")

    with pytest.raises(DataError, match="image/00000: KeyError"):
        TorchSet(Broken()).pixels(0)


def test_a_square_is_read_through_all_wrappers(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = random.integers(0, 256, (3, 400, 600, 3), dtype=np.uint8)
    for i, each in enumerate(arrays):
        Image.fromarray(each).save(tmp_path / f"{i}.jpg")
    files = FileSet(tmp_path, ["0.jpg", "1.jpg", "2.jpg"], [0, 1, 0])
    wrapped = SemiSupervisedSet(ArraySet(arrays[:1], [0], ["array"]), RelabeledSet(Subset(files, [2, 1]), [1, 0]))
    for i, pixels in enumerate([arrays[0], files.read(2, 40).pixels, files.read(1, 40).pixels]):
        assert (read_square(wrapped, i, 40, "crop") == resize_to_square(pixels, 40, "crop")).all()
    assert files.read(2, 40).pixels.shape == (100, 150, 3)


@pytest.mark.parametrize("labels", [[0.5, 1.0], [-1, 0], [0]])
def test_labels_are_class_ids(labels: list) -> None:
    with pytest.raises(DataError):
        ArraySet(np.zeros((2, 1, 1), dtype=np.uint8), labels, ["a", "b"])
