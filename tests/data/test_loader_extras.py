"""Second images, mixed images and unlabeled images."""

from pathlib import Path

import numpy as np
import pytest
import torch

from potstill.data.augment import AugmentPolicy, BatchMixer, ViewTransform
from potstill.data.image_sets import ArraySet, FileSet
from potstill.data.loader import Loader
from potstill.data.preprocessing import resize_to_square
from potstill.data.samplers import CounterRNG, derive_seed
from potstill.data.settings import AugmentSettings
from potstill.data.transforms import normalize
from potstill.errors import DataError, UsageError
from potstill.input_spec import InputSpec
from potstill.training.trainer import LabelLoss
from potstill.types import Batch

SPEC = InputSpec(16)
LIGHT = AugmentSettings(pad_crop=0.2, hflip=True)
MIX = AugmentSettings(pad_crop=0.2, hflip=True, mixup=0.5, cutmix=1.0)
NOTHING = 1e-12  # cache_fraction into which nothing fits

# Python 3.12 and later warn of fork beside threads; torch's loader forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def images(count: int = 21, side: int = 20, seed: int = 0) -> ArraySet:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return ArraySet(pixels, np.arange(count) % 3, [f"made/{seed}/{i}" for i in range(count)])


def files(folder: Path, count: int, seed: int = 0) -> FileSet:
    from PIL import Image

    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng([seed, i]).integers(0, 256, (18 + i, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return FileSet(folder, [f"{i}.png" for i in range(count)], [i % 2 for i in range(count)])


def everything(loader: Loader, number: int = 0) -> Batch:
    batches = list(loader.epoch(number))
    given = {key: [getattr(batch, key) for batch in batches] for key in vars(batches[0])}
    return Batch(**{key: torch.cat(found) for key, found in given.items() if found[0] is not None})


def same(mine: Batch, theirs: Batch) -> bool:
    pairs = zip(vars(mine).values(), vars(theirs).values(), strict=True)
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


# a second image


def test_without_second_there_is_none() -> None:
    loader = Loader(images(), SPEC, batch_size=4, augment=LIGHT)
    assert next(loader.epoch()).second is None
    with pytest.raises(UsageError, match="has no second images"):
        loader.second_view(torch.tensor([0]), 0)


@pytest.mark.parametrize("second", ["strong", "same class"])
def test_the_first_view_does_not_change_with_a_second(second: str) -> None:
    plain = everything(Loader(images(), SPEC, batch_size=4, augment=LIGHT, order="shuffled", seed=3), 2)
    found = everything(Loader(images(), SPEC, batch_size=4, augment=LIGHT, order="shuffled", seed=3, second=second), 2)
    for key in ("images", "labels", "index", "view"):
        assert torch.equal(getattr(plain, key), getattr(found, key)), key
    assert found.second.shape == found.images.shape
    assert not any(torch.equal(a, b) for a, b in zip(found.images, found.second, strict=True))


def test_a_strong_view_is_randaugment_2_10_on_another_ordinary_view() -> None:
    data, seed = images(), 11
    found = everything(Loader(data, SPEC, batch_size=6, augment=LIGHT, seed=seed, second="strong"), 4)
    other, ids = derive_seed(seed, "strong"), np.arange(21)
    squares = torch.stack([torch.from_numpy(resize_to_square(data.pixels(i), 16, "crop")) for i in range(21)])
    ordinary = ViewTransform(LIGHT, size=16, seed=other)(squares, ids, 4)
    expected = AugmentPolicy("strong", count=2, magnitude=10)(ordinary, CounterRNG(other, ids, 4))
    assert torch.equal(found.second, normalize(expected, SPEC))
    assert not torch.equal(found.second, normalize(ordinary, SPEC))


def test_the_same_class_view_is_the_partners_own_ordinary_view() -> None:
    data = images()
    loader = Loader(data, SPEC, batch_size=4, augment=LIGHT, order="shuffled", seed=3, second="same class")
    ordinary = everything(Loader(data, SPEC, batch_size=5, augment=LIGHT, seed=3), 6)
    found = everything(loader, 6)
    partners = []
    for index, second in zip(found.index.tolist(), found.second, strict=True):
        (partner,) = [i for i in range(21) if torch.equal(ordinary.images[i], second)]
        assert partner != index
        assert data.labels[partner] == data.labels[index]
        partners.append(partner)
    assert len(set(partners)) > 8


@pytest.mark.parametrize("second", ["strong", "same class"])
def test_second_images_do_not_depend_on_batches_order_or_memory(second: str) -> None:
    data = images()
    first = everything(Loader(data, SPEC, batch_size=5, augment=LIGHT, seed=1, second=second), 2)
    for options in (
        {"batch_size": 3},
        {"batch_size": 20, "order": "shuffled"},
        {"batch_size": 7, "cache_fraction": NOTHING},
        {"batch_size": 7, "cache_fraction": NOTHING, "order": "balanced"},
    ):
        loader = Loader(data, SPEC, augment=LIGHT, seed=1, second=second, **options)
        found = everything(loader, 2)
        assert torch.equal(found.second, first.second[found.index]), options
        some = torch.tensor([20, 3, 3])
        assert torch.equal(loader.second_view(some, 2), first.second[some])
        assert torch.equal(loader.second_view(some, torch.tensor([2, 2, 2])), first.second[some])
        assert torch.equal(loader.view(some, 2), first.images[some])
    later = everything(Loader(data, SPEC, batch_size=5, augment=LIGHT, seed=1, second=second), 3)
    assert not torch.equal(later.second, first.second)


def test_without_augmentation_a_strong_view_is_randaugment_alone() -> None:
    found = everything(Loader(images(40), SPEC, batch_size=8, second="strong"))
    changed = [not torch.equal(a, b) for a, b in zip(found.images, found.second, strict=True)]
    assert 25 < sum(changed) <= 40  # two of fourteen operations, one of which does nothing


# unlabeled images


def test_unlabeled_images_follow_the_labeled_ones_in_each_batch() -> None:
    data, more = images(12), images(5, seed=1)
    loader = Loader(data, SPEC, batch_size=4, augment=LIGHT, order="shuffled", seed=2, unlabeled=more)
    assert (loader.count, loader.steps) == (24, 3)
    plain = Loader(data, SPEC, batch_size=4, augment=LIGHT, order="shuffled", seed=2)
    alone = Loader(more, SPEC, batch_size=4)
    for with_more, without in zip(loader.epoch(1), plain.epoch(1), strict=True):
        assert with_more.labels[4:].tolist() == [-100] * 4
        assert ((with_more.index[4:] >= 12) & (with_more.index[4:] < 17)).all()
        for key in ("images", "labels", "index", "view"):
            assert torch.equal(getattr(with_more, key)[:4], getattr(without, key)), key
        assert with_more.view[:4].tolist() == [1] * 4
        assert torch.equal(loader.view(with_more.index, with_more.view), with_more.images)
    unaugmented = next(Loader(data, SPEC, batch_size=4, unlabeled=more).epoch())
    assert torch.equal(unaugmented.images[4:], alone.view(unaugmented.index[4:] - 12, 0))


@pytest.mark.parametrize(("views", "share"), [(None, (0, 1)), (3, (0, 1)), (3, (1, 2))])
def test_an_unlabeled_image_has_each_view_once_before_any_comes_again(
    views: int | None, share: tuple[int, int]
) -> None:
    """So that a teacher cache is full after as many passes over them as there are views."""
    options = {"batch_size": 4, "augment": LIGHT, "order": "shuffled", "unlabeled": images(7, seed=1), "views": views}
    loader, seen = Loader(images(12), SPEC, share=share, **options), list[tuple[int, int]]()
    for epoch in range(6):
        for batch, given in zip(loader.epoch(epoch), loader.views_of(epoch), strict=True):
            assert batch.view.tolist() == given.tolist()
            seen += [(i, v) for i, v in zip(batch.index.tolist(), batch.view.tolist(), strict=True) if i >= 12]
    if share[1] > 1:
        whole = Loader(images(12), SPEC, **options)
        assert seen == [
            (i, v)
            for epoch in range(6)
            for ids, given in zip(whole.ids_of(epoch), whole.views_of(epoch), strict=True)
            for i, v in zip(ids[1::2].tolist(), given[1::2].tolist(), strict=True)
            if i >= 12
        ]
        return
    different = 3 if views else 10  # 72 draws of 7 images
    assert len(set(seen[: 7 * different])) == 7 * different
    assert {v for _, v in seen} == set(range(3 if views else 11))


def test_the_last_batch_has_its_share_too_and_labels_do_not_lead_to_the_unlabeled() -> None:
    loader = Loader(images(10), SPEC, batch_size=4, order="balanced", unlabeled=images(7, seed=1), unlabeled_share=0.2)
    assert [len(batch) for batch in loader.epoch()] == [5, 5, 3]  # 1, 2 and (10 / 4 = 2.5 rounded) 3 so far
    assert [int((batch.labels == -100).sum()) for batch in loader.epoch()] == [1, 1, 1]
    assert loader.labels.tolist() == images(10).labels.tolist()


def test_workers_second_and_unlabeled_give_equal_batches(tmp_path: Path) -> None:
    data, more = files(tmp_path / "a", 9), files(tmp_path / "b", 4, seed=1)
    for options in (
        {"second": "same class"},
        {"second": "strong", "unlabeled": more},
        {"unlabeled": more, "unlabeled_share": 0.1},
        {"classes": 2, "augment": MIX},
    ):
        found = []
        for where in ({"workers": 0}, {"workers": 2}, {"cache_fraction": 0.3}):
            kept = {"batch_size": 2, "augment": LIGHT, "order": "shuffled", "cache_fraction": NOTHING, "seed": 1}
            fresh = FileSet(data.root, data.names, data.labels)  # of which no pixels are kept yet
            loader = Loader(fresh, SPEC, **(kept | options | where))
            assert loader.resident == ("cache_fraction" in where)
            found.append([everything(loader, number) for number in (0, 1)])
        for other in found[1:]:
            assert all(same(mine, theirs) for mine, theirs in zip(found[0], other, strict=True)), options
    del loader


# mixed images


def test_images_are_mixed_after_normalisation_with_the_partners_own_view() -> None:
    data = images()
    plain = Loader(data, SPEC, batch_size=4, augment=LIGHT, seed=2)
    loader = Loader(data, SPEC, batch_size=4, augment=MIX, order="shuffled", seed=2, classes=3)
    mixing = BatchMixer(data.labels, mixup=0.5, cutmix=1.0, classes=3, size=16, seed=2)
    for mixed in loader.epoch(3):
        drawn = mixing.draw(mixed.index.numpy(), 3)
        partners = torch.from_numpy(drawn.partners)
        expected = mixing.images(plain.view(mixed.index, 3), plain.view(partners, 3), drawn)
        assert torch.equal(mixed.images, expected)
        own, others = (torch.from_numpy(data.labels)[each] for each in (mixed.index, partners))
        for found, wanted in zip((mixed.labels, mixed.soft_labels), mixing.labels(own, others, drawn), strict=True):
            assert torch.equal(found, wanted)
        assert torch.equal(loader.view(mixed.index, 3), mixed.images)
        assert not torch.equal(loader.view(mixed.index, 4), mixed.images)
        assert mixed.view.tolist() == [3] * len(mixed)


def test_mixed_images_do_not_depend_on_batches_order_or_memory() -> None:
    first = everything(Loader(images(), SPEC, batch_size=5, augment=MIX, seed=1, classes=3), 2)
    for options in ({"batch_size": 3}, {"batch_size": 20, "order": "shuffled"}, {"cache_fraction": NOTHING}):
        loader = Loader(images(), SPEC, augment=MIX, seed=1, classes=3, **({"batch_size": 7} | options))
        found = everything(loader, 2)
        for key in ("images", "labels", "soft_labels"):
            assert torch.equal(getattr(found, key), getattr(first, key)[found.index]), (options, key)
    some = torch.tensor([20, 3, 3])
    assert torch.equal(loader.view(some, 2), first.images[some])
    assert torch.equal(loader.view(some, torch.tensor([2, 3, 2]))[::2], first.images[some][::2])


def test_partners_are_balanced_where_the_order_is() -> None:
    labels = np.array([0] * 4 + [1] * 196)
    data = ArraySet(np.zeros((200, 2, 2), dtype=np.uint8), labels, [str(i) for i in range(200)])
    mixup = AugmentSettings(mixup=1.0)
    shares = {
        order: everything(Loader(data, InputSpec(8), batch_size=50, augment=mixup, order=order, classes=2))
        .soft_labels.mean(dim=0)
        .tolist()
        for order in ("balanced", "shuffled")
    }
    assert shares["balanced"] == pytest.approx([0.5, 0.5], abs=0.1)
    assert shares["shuffled"] == pytest.approx([0.02, 0.98], abs=0.02)


@pytest.mark.parametrize("order", ["balanced", "listed"])
def test_mixing_works_in_every_order(order: str) -> None:
    found = everything(Loader(images(), SPEC, batch_size=7, augment=MIX, order=order, classes=3))
    assert found.soft_labels.sum(dim=1).tolist() == pytest.approx([1.0] * 21)


def test_unlabeled_images_are_mixed_with_each_other_and_have_no_soft_label() -> None:
    data, more = images(12), images(9, seed=1)
    options = {"batch_size": 4, "augment": MIX, "classes": 3, "order": "shuffled", "seed": 2}
    loader, plain = Loader(data, SPEC, unlabeled=more, **options), Loader(data, SPEC, **options)
    for with_more, without in zip(loader.epoch(1), plain.epoch(1), strict=True):
        for key in ("images", "labels", "soft_labels"):  # those with labels do not change
            assert torch.equal(getattr(with_more, key)[:4], getattr(without, key)), key
        assert with_more.labels[4:].tolist() == [-100] * 4
        assert with_more.soft_labels[4:].count_nonzero() == 0
        assert LabelLoss()(torch.randn(8, 3), with_more.soft_labels) > 0
    drawn = loader.collator.mixer.draw(np.arange(21), 1)
    assert (drawn.partners[:12] < 12).all()
    assert (drawn.partners[12:] >= 12).all()
    assert len(set(drawn.partners[12:].tolist())) > 3


def test_a_label_loss_leaves_rows_without_label_out() -> None:
    logits, soft = torch.randn(4, 3), torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.2, 0.8], [0.0] * 3, [0.0] * 3])
    for loss in (LabelLoss(), LabelLoss(torch.tensor([1.0, 2.0, 3.0]), 0.1)):
        assert loss(logits, soft).item() == pytest.approx(loss(logits[:2], soft[:2]).item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": MIX}, "pass classes="),
        ({"augment": MIX, "classes": 3, "second": "strong"}, "mixed images have no second view"),
        ({"second": "same class", "unlabeled": images(2)}, "unlabeled images have no class"),
        ({"second": "weak"}, "second must be none, strong or same class, got 'weak'"),
        ({"unlabeled": images(2), "unlabeled_share": 1.0}, "unlabeled_share must be at least 0 and below 1, got 1"),
    ],
)
def test_what_excludes_each_other_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Loader(images(), SPEC, **({"batch_size": 4} | options))
    with pytest.raises(DataError, match="no images"):
        Loader(images(), SPEC, batch_size=4, unlabeled=images(0))


# answers in the place of images


def test_mixed_answers_are_the_mixed_labels_if_answers_are_labels() -> None:
    known = images()
    shares = torch.nn.functional.one_hot(torch.from_numpy(known.labels), 3).float()
    answers = shares.clamp(min=1e-30).log()[..., None, None]
    pictures = Loader(known, SPEC, batch_size=4, augment=MIX, order="shuffled", classes=3)
    table = Loader(known, SPEC, batch_size=4, augment=MIX, order="shuffled", classes=3, answers=answers)
    for epoch in (0, 3):
        batch, theirs = everything(pictures, epoch), everything(table, epoch)
        assert batch.soft_labels is not None
        assert (batch.soft_labels.max(dim=1).values < 0.99).any()
        assert torch.equal(theirs.index, batch.index)
        assert theirs.images.shape == (len(batch), 3, 1, 1)
        assert torch.allclose(theirs.images.exp().flatten(1), batch.soft_labels, atol=1e-6)


@pytest.mark.parametrize("second", ["strong", "same class"])
def test_all_views_of_an_image_have_its_answer(second: str) -> None:
    known = images()
    answers = torch.randn(21, 5, 1, 1, generator=torch.Generator().manual_seed(0))
    table = Loader(known, SPEC, batch_size=4, augment=LIGHT, order="shuffled", second=second, answers=answers)
    pictures = Loader(known, SPEC, batch_size=4, augment=LIGHT, order="shuffled", second=second)
    batch = everything(table, 1)
    assert torch.equal(batch.images, answers[batch.index])
    if second == "strong":
        assert torch.equal(batch.second, batch.images)
        return
    partners = table.collator.partners(batch.index.numpy(), 1)
    assert torch.equal(batch.second, answers[partners])
    assert (partners == pictures.collator.partners(batch.index.numpy(), 1)).all()
    assert torch.equal(table.second_view(batch.index, 1), batch.second)
    assert torch.equal(table.view(batch.index, 7), batch.images)
