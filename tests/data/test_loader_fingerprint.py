"""Whatever changes a view's pixels changes its description; nothing else does."""

import json

import numpy as np
import pytest
import torch

from potstill.data import loader as loading
from potstill.data.image_sets import ArraySet
from potstill.data.loader import Loader
from potstill.data.settings import AugmentSettings
from potstill.errors import UsageError
from potstill.input_spec import InputSpec

SPEC = InputSpec(16)
LIGHT = AugmentSettings(pad_crop=0.2, hflip=True)
MIX = AugmentSettings(pad_crop=0.2, mixup=0.5)


def images(count=12, labels=None):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 20, 20, 3), dtype=np.uint8)
    return ArraySet(pixels, np.arange(count) % 3 if labels is None else labels, [f"{i}" for i in range(count)])


def loader(data=None, spec=SPEC, **options):
    return Loader(
        images() if data is None else data, spec, **({"batch_size": 4, "augment": LIGHT, "classes": 3} | options)
    )


def words(made, second=False):
    return json.dumps(made.describe_views(second), sort_keys=True)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, {"view_seed": 1}),
        ({}, {"seed": 1}),  # the views' too where they have none of their own
        ({}, {"augment": None}),
        ({}, {"spec": InputSpec(15)}),
        ({}, {"spec": InputSpec(16, mean=(0.5, 0.5, 0.5))}),
        ({}, {"spec": InputSpec(16, std=(0.5, 0.5, 0.5))}),
        ({}, {"spec": InputSpec(16, resize_mode="stretch")}),
        ({}, {"spec": InputSpec(16, resize_mode="pad")}),
        ({}, {"spec": InputSpec(16, crop_share=0.8)}),
        ({}, {"data": images(13)}),
        ({}, {"unlabeled": images(2)}),
        ({}, {"augment": LIGHT.model_copy(update={"pad_mode": "black"})}),
        ({"augment": MIX}, {"order": "balanced"}),
        ({"augment": MIX}, {"data": images(labels=np.array([0, 1] * 6))}),
        *(
            ({}, {"augment": AugmentSettings(**(LIGHT.model_dump() | changed))})
            for changed in (
                {"pad_crop": 0.1}, {"crop_scale": (0.5, 1)}, {"hflip": False}, {"vflip": True}, {"rotate90": True},
                {"color_jitter": 0.1}, {"auto_augment": "randaugment"}, {"auto_augment": "trivialaugment"},
                {"erasing": 0.1},
                {"mixup": 0.1}, {"cutmix": 0.1},
            )
        ),
    ],
)  # fmt: skip
def test_what_changes_a_view_changes_its_description(options, change):
    assert words(loader(**options)) != words(loader(**(options | change)))


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"view_seed": 3}, {"seed": 1}),
        ({}, {"batch_size": 5}),
        ({}, {"order": "balanced"}),
        ({}, {"workers": 1}),
        ({}, {"cache_fraction": 1e-12}),
        ({}, {"views": 2}),
        ({}, {"second": "strong"}),
        ({}, {"data": images(labels=np.array([0, 1] * 6))}),
        ({"augment": None}, {"augment": AugmentSettings(pad_mode="black"), "seed": 4}),
        ({"augment": AugmentSettings(hflip=True)}, {"augment": AugmentSettings(hflip=True, pad_mode="black")}),
    ],
)
def test_what_does_not_change_a_view_does_not_change_its_description(options, change):
    one, other = loader(**options), loader(**(options | change))
    assert words(one) == words(other)
    some = torch.arange(12)
    assert torch.equal(one.view(some, 1), other.view(some, 1))


def test_second_views_are_described_apart():
    strong, same = loader(second="strong"), loader(second="same class")
    assert len({words(strong), words(strong, True), words(same, True)}) == 3
    assert words(same) == words(strong)
    assert strong.describe_views(second=True)["strong"] is True
    with pytest.raises(UsageError, match="has no second images"):
        loader().describe_views(second=True)


def test_versions_count_where_they_matter(monkeypatch):
    policy, mixed = loader(augment=AugmentSettings(auto_augment="randaugment")), loader(augment=MIX)
    before = [words(loader()), words(policy), words(mixed)]
    for name in ("torch.__version__", "torchvision.__version__"):
        monkeypatch.setattr(name, "0.0")
        assert [words(loader()), words(mixed)] == [before[0], before[2]]
        assert words(policy) != before[1]
        monkeypatch.undo()
    monkeypatch.setattr("scipy.__version__", "0.0")
    assert [words(loader()), words(policy)] == before[:2]
    assert words(mixed) != before[2]
    monkeypatch.undo()
    for change in ({"VERSION": -1}, {"decoder_version": lambda: "another"}):
        for name, value in change.items():
            monkeypatch.setattr(loading, name, value)
        assert not {words(loader()), words(policy), words(mixed)} & set(before)
        monkeypatch.undo()


def test_what_a_description_holds_is_spelled_out():
    assert loader(view_seed=7, augment=AugmentSettings(hflip=True)).describe_views() == {
        "version": loading.VERSION,
        "decoder": loading.decoder_version(),
        "input": {"size": 16, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "resize_mode": "crop",
                  "crop_share": 1.0, "range": None},
        "side": 16,
        "samples": [12, 0],
        "strong": False,
        "augment": AugmentSettings(hflip=True).model_dump(mode="json", exclude={"pad_mode"}),
        "generator": "splitmix64",
        "seed": 7,
    }  # fmt: skip


def test_views_that_do_not_differ_are_one():
    for still in (loader(augment=None), loader(augment=AugmentSettings(pad_mode="black"))):
        assert not still.distinct_views
        assert [still.view_of(epoch) for epoch in (0, 1, 5)] == [0, 0, 0]
        assert next(still.epoch(5)).view.tolist() == [0] * 4
    for each in (loader(), loader(augment=None, second="strong"), loader(augment=None, second="same class")):
        assert each.distinct_views
        assert [each.view_of(epoch) for epoch in (0, 1, 5)] == [0, 1, 5]
    assert [loader(views=2).view_of(epoch) for epoch in (0, 1, 5)] == [0, 1, 1]


def test_ids_are_known_beforehand():
    made = loader(order="shuffled", unlabeled=images(5))
    assert made.samples == 17
    for ids, batch in zip(made.ids_of(3), made.epoch(3), strict=True):
        assert ids.tolist() == batch.index.tolist()
