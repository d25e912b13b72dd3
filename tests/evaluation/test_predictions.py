"""What streams must equal what is held, on the same images."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from potstill.errors import DataError, NonFiniteError, StorageError
from potstill.evaluation.fidelity import agreement
from potstill.evaluation.final_metrics import fit_temperature, split_intervals, split_metrics
from potstill.evaluation.predictions import Predictions, predict_split
from potstill.types import Batch

CLASSES, IMAGES = 7, 301


class Table(nn.Module):
    """Logits by image, [N, K]."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[images[:, 0].long()]


class Images:
    """Batches of 16 whose pixels are the number of the image."""

    def __init__(self, labels: Tensor, order: list[int] | None = None) -> None:
        self.labels, self.count = labels, len(labels)
        self.images = SimpleNamespace(names=[f"{at}.png" for at in range(self.count)])
        self.order = torch.arange(len(labels)) if order is None else torch.tensor(order)

    def epoch(self) -> Iterator[Batch]:
        for index in self.order.split(16):
            yield Batch(index[:, None].float(), self.labels[index], index=index)


def made(images: int = IMAGES, classes: int = CLASSES, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=random)
    logits = 2 * torch.randn(images, classes, generator=random)
    logits[torch.arange(images), labels] += 2
    return logits, labels


def both(tmp_path: Path, seed: int = 0, order: list[int] | None = None) -> tuple[Predictions, Predictions]:
    logits, labels = made(seed=seed)
    held, stored = (
        predict_split(
            Table(logits), Images(labels, order), classes=CLASSES, file=tmp_path / f"{seed}.npy", max_values=most
        )
        for most in (10**7, 0)
    )
    assert held.array is not None
    assert stored.array is None
    return held, stored


@pytest.mark.parametrize("order", [None, list(reversed(range(IMAGES)))])
def test_streamed_columns_and_figures_are_those_of_held_probabilities(tmp_path: Path, order: list[int] | None) -> None:
    held, stored = both(tmp_path, order=order)
    for name in ("labels", "predicted", "label_rank", "top"):
        assert np.array_equal(getattr(held, name), getattr(stored, name)), name
    for name in ("confidence", "label_probability", "top_probabilities"):
        assert getattr(held, name) == pytest.approx(getattr(stored, name), rel=1e-5), name
    names = [f"class {i}" for i in range(CLASSES)]
    one, other = split_metrics(held, names), split_metrics(stored, names)
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, float):
            assert other[key] == pytest.approx(value, abs=1e-5), key
    ends = split_intervals(stored)
    for name, interval in split_intervals(held).items():
        if not name.startswith("auc"):
            assert ends[name] == pytest.approx(interval, abs=1e-5), name


def test_the_file_gives_divergence_and_temperature_back(tmp_path: Path) -> None:
    (held, stored), (other_held, other_stored) = both(tmp_path), both(tmp_path, seed=1)
    for one, other in ((held, stored), (other_held, other_stored)):
        assert one.probabilities is not None
        assert other.probabilities is not None
        assert fit_temperature(other.probabilities, other.labels) == pytest.approx(
            fit_temperature(one.probabilities, one.labels), rel=2e-3
        )
    expected = agreement(held.array, other_held.array)  # type: ignore[arg-type]
    assert stored.probabilities is not None
    assert other_stored.probabilities is not None
    assert agreement(stored.probabilities, other_stored.probabilities) == pytest.approx(expected, rel=2e-3)
    # Documented: float16 logarithms in the NumPy format.
    logs = np.load(tmp_path / "0.npy")
    assert logs.dtype == np.float16
    assert np.exp(logs.astype(np.float64)) == pytest.approx(held.array, rel=4e-3)


@pytest.mark.parametrize("most", [10**7, 0])  # probabilities in memory, and not
def test_progress_is_reported_batch_by_batch(most: int) -> None:
    logits, labels = made(images=40)
    seen: list[tuple[int, int]] = []
    predict_split(
        Table(logits), Images(labels), classes=CLASSES, max_values=most, progress=lambda *each: seen.append(each)
    )
    assert seen == [(16, 40), (32, 40), (40, 40)]


def test_improbable_classes_keep_their_size(tmp_path: Path) -> None:
    logits = torch.tensor([[0.0, -40.0], [-40.0, 0.0], [3e5, 0.0]])
    found = predict_split(
        Table(logits), Images(torch.tensor([0, 0, 1])), classes=2, file=tmp_path / "x.npy", max_values=0
    )
    assert np.load(tmp_path / "x.npy").tolist() == [[0, -40], [-40, 0], [0, -60_000]]
    assert found.label_probability[1] == pytest.approx(np.exp(-40), rel=1e-5)


def test_confusion_lists_the_pairs_that_there_are() -> None:
    found = Predictions.of(np.eye(4)[[1, 1, 0, 3]], np.array([1, 1, 2, 3]))
    assert [each.tolist() for each in found.confusion()] == [[1, 2, 3], [1, 0, 3], [2, 1, 1]]


@pytest.mark.parametrize("most", [0, 10**7])
def test_faults_are_named_and_leave_no_file(tmp_path: Path, most: int) -> None:
    logits, labels = made()
    logits[200, 3] = torch.nan
    file = tmp_path / "x.npy"
    with pytest.raises(NonFiniteError, match=r"a logit of the photos, 200.png, is NaN or infinite \(1 of 301 images\)"):
        predict_split(Table(logits), Images(labels), classes=CLASSES, file=file, max_values=most, what="the photos")
    with pytest.raises(DataError, match="1 left out"):
        predict_split(
            Table(made()[0]), Images(labels, [0, *range(IMAGES - 1)]), classes=CLASSES, file=file, max_values=most
        )
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    logits, labels = made()
    (tmp_path / "taken").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*x\.npy"):
        predict_split(Table(logits), Images(labels), classes=CLASSES, file=tmp_path / "taken" / "x.npy", max_values=0)


def test_memory_grows_with_images_alone() -> None:
    """numpy and Python only (torch's memory is not traced)."""

    def peak(images: int) -> int:
        logits, labels = made(images, 400)
        tracemalloc.start()
        try:
            predict_split(Table(logits), Images(labels), classes=400, max_values=0)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    grown = peak(11_000) - peak(5_000)
    assert grown < 6_000 * 400, f"{grown} bytes for 6,000 images"  # one byte for each number would be as much
