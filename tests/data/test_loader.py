import multiprocessing
import os
import pickle
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.data import loader as loader_module
from potstill.data.decoded_cache import decode_all
from potstill.data.image_sets import ArraySet, FileSet
from potstill.data.loader import Loader
from potstill.data.settings import AugmentSettings
from potstill.data.transforms import preprocess
from potstill.errors import DataError, UsageError, WorkerError
from potstill.input_spec import InputSpec
from potstill.types import Batch

SPEC = InputSpec(16)
LIGHT = AugmentSettings(pad_crop=0.2, hflip=True)
NOTHING = 1e-12  # cache_fraction into which nothing fits

# Python 3.12 and later warn of fork beside threads; torch's loader forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def images(count: int = 21, side: int = 20) -> ArraySet:
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return ArraySet(pixels, np.arange(count) % 3, [f"made/{i}" for i in range(count)])


def files(folder: Path, count: int = 9) -> FileSet:
    from PIL import Image

    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (18 + i, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return FileSet(folder, [f"{i}.png" for i in range(count)], [i % 2 for i in range(count)])


def everything(loader: Loader, number: int = 0) -> Batch:
    batches = list(loader.epoch(number))
    given = {key: [getattr(batch, key) for batch in batches] for key in vars(batches[0])}
    return Batch(**{key: torch.cat(found) for key, found in given.items() if found[0] is not None})


@pytest.mark.parametrize("crop_share", [1.0, 0.8])
@pytest.mark.parametrize("share", [0.3, NOTHING])
def test_listed_without_augmentation_is_what_prediction_prepares(share: float, crop_share: float) -> None:
    spec, data = InputSpec(16, mean=(0.1, 0.2, 0.3), crop_share=crop_share), images()
    loader = Loader(data, spec, batch_size=4, cache_fraction=share)
    found = everything(loader)
    assert loader.resident == (share != NOTHING)
    assert found.index.tolist() == list(range(21))
    assert found.labels.tolist() == data.labels.tolist()
    assert torch.equal(found.images, torch.stack([preprocess(data.pixels(i), spec) for i in range(21)]))
    assert found.images.dtype == torch.float32
    assert found.images.is_contiguous()


def test_counts_and_the_lonely_last_image() -> None:
    data = images(21)
    evaluation = Loader(data, SPEC, batch_size=4)
    assert (evaluation.count, evaluation.steps) == (21, 6)
    assert [len(batch) for batch in evaluation.epoch()] == [4, 4, 4, 4, 4, 1]
    training = Loader(data, SPEC, batch_size=4, order="shuffled")
    assert (training.count, training.steps) == (20, 5)
    assert [len(batch) for batch in training.epoch()] == [4] * 5
    assert [len(batch) for batch in Loader(data, SPEC, batch_size=8, order="shuffled").epoch()] == [8, 8, 5]
    assert Loader(data, SPEC, batch_size=1, order="shuffled").count == 21
    assert Loader(images(1), SPEC, batch_size=8, order="shuffled").count == 1
    assert Loader(data, SPEC, batch_size=32, order="balanced").count == 21


def test_shuffled_is_a_new_permutation_each_epoch() -> None:
    loader = Loader(images(300, 4), InputSpec(8), batch_size=7, order="shuffled", seed=3)
    orders = [everything(loader, number).index.tolist() for number in (0, 1, 0)]
    assert sorted(orders[0]) == list(range(300))
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != sorted(orders[0])
    other = Loader(images(300, 4), InputSpec(8), batch_size=7, order="shuffled", seed=4)
    assert everything(other).index.tolist() != orders[0]


def test_balanced_draws_every_class_equally() -> None:
    labels = np.array([0] * 5 + [1] * 95 + [3] * 1900)
    data = ArraySet(np.zeros((2000, 2, 2), dtype=np.uint8), labels, [str(i) for i in range(2000)])
    found = everything(Loader(data, InputSpec(8), batch_size=500, order="balanced"), 1)
    shares = np.bincount(found.labels.numpy()) / 2000
    assert shares == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3], abs=0.04)
    assert (labels[found.index.numpy()] == found.labels.numpy()).all()
    assert set(found.index.tolist()) >= set(range(5))
    assert len(set(found.index[found.labels == 3].tolist())) > 500  # of 667 draws among 1,900


@pytest.mark.parametrize("augment", [LIGHT, AugmentSettings(crop_scale=(0.3, 1.0), color_jitter=0.2)])
def test_random_access_equals_the_epoch(augment: AugmentSettings) -> None:
    loader = Loader(images(), SPEC, batch_size=8, augment=augment, order="shuffled", seed=2**62)
    seen = everything(loader, 4)
    assert seen.view.tolist() == [4] * 21
    assert torch.equal(loader.view(seen.index, 4), seen.images)
    some = torch.tensor([20, 3, 3])
    wanted = torch.stack([seen.images[seen.index == i][0] for i in some])
    assert torch.equal(loader.view(some, 4), wanted)
    assert torch.equal(loader.view(some, torch.tensor([4, 4, 4])), wanted)
    assert not torch.equal(loader.view(some, 5), wanted)
    assert not torch.equal(loader.view(some, torch.tensor([4, 5, 4]))[1], wanted[1])


def test_batch_size_order_and_memory_do_not_change_a_view() -> None:
    data = images()
    first = everything(Loader(data, SPEC, batch_size=5, augment=LIGHT, seed=1), 2)
    for options in (
        {"batch_size": 3},
        {"batch_size": 20, "order": "shuffled"},
        {"batch_size": 7, "cache_fraction": NOTHING},
        {"batch_size": 7, "cache_fraction": NOTHING, "order": "balanced"},
    ):
        found = everything(Loader(data, SPEC, augment=LIGHT, seed=1, **options), 2)
        assert torch.equal(found.images, first.images[found.index]), options
    other = everything(Loader(data, SPEC, batch_size=5, augment=LIGHT, seed=2), 2)
    assert not torch.equal(other.images, first.images)


def test_workers_give_equal_batches(tmp_path: Path) -> None:
    data, found = files(tmp_path), {}
    before = torch.get_rng_state()
    for workers in (0, 1, 2):
        loader = Loader(
            data, SPEC, batch_size=2, augment=LIGHT, order="shuffled", seed=1, workers=workers, cache_fraction=NOTHING
        )
        assert not loader.resident
        next(loader.epoch(0))  # an epoch that is left early does not disturb the next
        found[workers] = [everything(loader, number) for number in (0, 1)]
    resident = Loader(data, SPEC, batch_size=3, augment=LIGHT, order="shuffled", seed=1)
    found["resident"] = [everything(resident, number) for number in (0, 1)]
    for other in (1, 2):
        for mine, theirs in zip(found[0], found[other], strict=True):
            assert torch.equal(mine.images, theirs.images)
            assert torch.equal(mine.index, theirs.index)
    # batches of two drop the ninth image, batches of three do not
    assert torch.equal(found["resident"][1].images[:8], found[0][1].images)
    assert torch.equal(torch.get_rng_state(), before)
    del loader
    assert multiprocessing.active_children() == []


def test_what_a_worker_needs_can_be_pickled(tmp_path: Path) -> None:
    data = pickle.loads(pickle.dumps(files(tmp_path)))
    assert data.pixels(1).shape == (19, 20, 3)
    loader = Loader(data, SPEC, batch_size=2, workers=1, cache_fraction=NOTHING)
    assert loader.processes == 1
    assert pickle.loads(pickle.dumps(loader._all)).pixels(1).shape == (19, 20, 3)


def test_a_file_that_goes_bad_is_named_through_a_worker(tmp_path: Path) -> None:
    data = files(tmp_path)
    (tmp_path / "5.png").write_text("no image")
    loader = Loader(data, SPEC, batch_size=2, workers=1, cache_fraction=NOTHING)
    with pytest.raises(DataError, match=r"5\.png: no image of the formats"):
        list(loader.epoch())
    del loader
    assert multiprocessing.active_children() == []
    with pytest.raises(DataError, match=r"5\.png: no image of the formats"):
        Loader(data, SPEC, batch_size=2)


class Deadly(ArraySet):
    """Kills the process that decodes its image 4."""

    def pixels(self, i: int) -> np.ndarray:
        if i == 4 and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().pixels(i)


@pytest.mark.own_process
def test_a_dead_worker_is_an_error_and_leaves_no_children() -> None:
    data = Deadly(images().images, images().labels, images().names)
    loader = Loader(data, SPEC, batch_size=4, workers=2, cache_fraction=NOTHING)
    with pytest.raises(WorkerError, match="died"):
        list(loader.epoch())
    assert WorkerError.exit_code == 7
    del loader
    assert multiprocessing.active_children() == []


def test_pixels_are_decoded_once_for_all_loaders() -> None:
    class Counting(ArraySet):
        calls = 0

        def pixels(self, i: int) -> np.ndarray:
            type(self).calls += 1
            return super().pixels(i)

    data = Counting(images().images, images().labels, images().names)
    for _ in range(3):
        everything(Loader(data, SPEC, batch_size=4))
    assert Counting.calls == 21


def test_an_image_set_that_cannot_be_hashed_works() -> None:
    class Unhashable(ArraySet):
        __hash__ = None  # type: ignore[assignment]

    data = Unhashable(images().images, images().labels, images().names)
    assert torch.equal(everything(Loader(data, SPEC, batch_size=4)).images[5], preprocess(data.pixels(5), SPEC))


def test_pack_respects_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potstill.data.decoded_cache.free_bytes", lambda device: 21 * 3 * 16 * 16 * 2)
    cpu = torch.device("cpu")
    assert decode_all(images(), 16, "crop", device=cpu, cache_fraction=0.49) is None
    packed = decode_all(images(), 16, "crop", device=cpu, cache_fraction=0.5)
    assert packed is not None
    assert packed.shape == (21, 3, 16, 16)


def test_wrong_arguments() -> None:
    with pytest.raises(UsageError, match="order must be"):
        Loader(images(), SPEC, batch_size=2, order="sorted")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="batch_size"):
        Loader(images(), SPEC, batch_size=0)
    with pytest.raises(DataError, match="no images"):
        Loader(images(0), SPEC, batch_size=2)


MIXED = AugmentSettings(pad_crop=0.2, hflip=True, mixup=0.4)


@pytest.mark.parametrize("augment", [LIGHT, MIXED])
def test_reading_ahead_gives_equal_batches_from_few_buffers(
    monkeypatch: pytest.MonkeyPatch, augment: AugmentSettings
) -> None:
    def make() -> Loader:
        return Loader(images(), SPEC, batch_size=4, augment=augment, order="shuffled", seed=1, classes=3)

    expected = [everything(make(), number) for number in (0, 1)]
    monkeypatch.setattr(loader_module, "needs_reading_ahead", lambda pixels, device: True)
    loader, buffers = make(), set[int]()
    whole = loader.collator.batch

    def batch(plan: Any, pixels: torch.Tensor) -> Batch:
        buffers.add(pixels.data_ptr())
        return whole(plan, pixels)

    monkeypatch.setattr(loader.collator, "batch", batch)
    found = [everything(loader, number) for number in (0, 1)]
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.index, other.index)
    assert 1 < len(buffers) <= 2 * 3  # three an epoch
    assert not [thread for thread in threading.enumerate() if thread.name == "potstill-read-ahead"]


def test_reading_ahead_ends_with_the_epoch_and_passes_errors_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "needs_reading_ahead", lambda pixels, device: True)
    loader = Loader(images(), SPEC, batch_size=4, augment=LIGHT, order="shuffled")
    epoch = loader.epoch(0)
    next(epoch)
    assert [thread for thread in threading.enumerate() if thread.name == "potstill-read-ahead"]
    epoch.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "potstill-read-ahead"]
    loader._pixels = loader._pixels[:3]  # type: ignore[index]
    with pytest.raises(IndexError, match="out of range"):
        list(loader.epoch(0))


def test_pixels_are_read_ahead_for_a_gpu_alone() -> None:
    pixels = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    assert loader_module.needs_reading_ahead(pixels, torch.device("cuda"))
    assert not loader_module.needs_reading_ahead(pixels, torch.device("cpu"))
    assert not loader_module.needs_reading_ahead(pixels.to("meta"), torch.device("cuda"))
