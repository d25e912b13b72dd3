"""How many views are drawn in turn, and whether the teacher's answers to them are kept."""

from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.config.recipe import dump_recipe, load_recipe
from potstill.data.settings import AugmentSettings
from potstill.errors import UsageError
from potstill.experiment import teacher_cache
from potstill.experiment.preflight import create_stage_method
from potstill.experiment.teacher_cache import ViewPlan, apply_view_plan, plan_views, record_kind, restore_view_plan


def planned(*sets, augment=None, images=1000, classes=10, free=10**13):
    """The plan for a recipe, so many images and classes, and bytes free on the disk."""
    recipe = load_recipe("quickstart", ["method.name=kd", *sets])
    data = SimpleNamespace(
        augment=augment or AugmentSettings(hflip=True),
        train=range(images),
        unlabeled=None,
        class_names=tuple(map(str, range(classes))),
    )
    data.measured = data  # there is no target
    with mock.patch.object(teacher_cache.shutil, "disk_usage", return_value=SimpleNamespace(free=free)):
        return plan_views(recipe, create_stage_method(recipe), data)


@pytest.mark.parametrize(
    ("epochs", "views"), [(1, 1), (5, 5), (8, 8), (12, 8), (30, 8), (32, 8), (33, 9), (100, 25), (240, 60)]
)
def test_one_view_for_four_epochs_but_eight_at_least(epochs, views):
    assert planned(f"training.epochs={epochs}") == ViewPlan(views, "float16", True)


@settings(max_examples=30, deadline=None)
@given(
    free=st.lists(st.integers(10**9, 10**13), min_size=2, max_size=2),
    images=st.sampled_from([1_797, 50_000, 1_281_167]),
    classes=st.sampled_from([10, 100, 1000]),
    epochs=st.integers(1, 300),
    views=st.sampled_from(["auto", "all", "4"]),
    method=st.sampled_from(["kd", "dist", "srrl", "mlld", "reviewkd"]),
    seeds=st.integers(1, 9),
)
def test_neither_views_nor_records_depend_on_the_free_disk(free, images, classes, epochs, views, method, seeds):
    sets = [f"training.epochs={epochs}", f"teacher_cache.views={views}", f"method.name={method}", f"seeds={seeds}"]
    one, other = (planned(*sets, images=images, classes=classes, free=each) for each in free)
    assert (one.views, one.record) == (other.views, other.record)
    # ... nor views on the method, on whether answers are stored, or on how many seeds and images there are
    plain = [f"training.epochs={epochs}", f"teacher_cache.views={views}", "teacher_cache.mode=off"]
    assert planned(*plain, images=7, free=0).views == one.views


def test_imagenet_with_40_gb_free_has_all_its_views():
    """1,281,167 x 23 views: 59 GB in float16, 2.1 GB with the 16 largest of 1,000 logits (72 bytes)."""
    imagenet = {"images": 1_281_167, "classes": 1000, "free": 40 * 10**9}
    assert planned("training.epochs=90", **imagenet) == ViewPlan(23, "top16", True)
    for method in ("dist", "srrl"):  # which read all logits
        found = planned("training.epochs=90", f"method.name={method}", **imagenet)
        assert (found.views, found.record, found.use_cache) == (23, "float16", False)
        assert "the teacher runs in every step, on the same views" in found.note


def test_a_record_that_is_too_large_for_the_disk_is_not_kept():
    # 1,000 images x 8 views x 100 float16 logits = 1.6 MB; with 72 bytes for the 16 largest 576 kB
    room = {"classes": 100, "free": 4 * 1_600_000}
    assert planned("training.epochs=12", **room) == ViewPlan(8, "float16", True)
    room["free"] -= 4
    found = planned("training.epochs=12", **room)
    assert (found.views, found.record, found.use_cache) == (8, "float16", False)
    assert "8 views take 1.60 MB" in found.note
    assert "--set teacher_cache.record=top16 takes 576 kB" in found.note
    assert planned("training.epochs=12", "teacher_cache.record=top16", **room) == ViewPlan(8, "top16", True)
    assert "8 views of 5 seeds take 8.00 MB" in planned("training.epochs=12", "seeds=5", **room).note


def test_what_the_recipe_says_is_done_whatever_the_disk_says():
    assert planned("teacher_cache.views=40", free=0).views == 40
    assert planned("teacher_cache.views=all", free=0).views == "all"
    assert planned("teacher_cache.record=float32", images=10**9, free=0).record == "float32"
    # equal views need no more than one record
    assert planned("data.augment={}", free=4 * 1000 * 20).use_cache


@pytest.mark.parametrize(
    ("method", "stores"),
    [
        ("kd", True),
        ("dist", True),
        ("srrl", True),
        ("mlld", True),
        ("crd", True),
        ("ctkd", True),
        ("reviewkd", False),
        ("simkd", False),
        ("dml", False),
        ("cskd", False),
        ("supervised", False),
    ],
)
def test_methods_that_read_no_feature_maps_are_stored(method, stores):
    assert planned(f"method.name={method}") == ViewPlan(8, "float16" if stores else None, stores)


def test_methods_combined_are_stored_only_where_each_can_be():
    assert planned("method=[{name: kd}, {name: crd, factor: 0.8}]").use_cache
    assert not planned("method=[{name: kd}, {name: fitnet}]").use_cache


def test_off_asks_anew_on_the_same_views():
    assert planned("teacher_cache=off") == ViewPlan(8, None, False)
    assert planned("teacher_cache.mode=off", "teacher_cache.views=4") == ViewPlan(4, None, False)


def test_the_sixteen_largest_are_for_kd_and_many_classes():
    def kind(classes, *sets):
        recipe = load_recipe("quickstart", ["teacher_cache.record=top16", "method.name=kd", *sets])
        return record_kind(recipe, create_stage_method(recipe), classes)

    assert kind(100) == "top16"
    with pytest.raises(UsageError, match="more than 64 classes"):
        kind(64)
    with pytest.raises(UsageError, match="dist reads all of them"):
        kind(100, "method.name=dist")


def test_a_run_that_goes_on_means_by_auto_what_it_meant_when_it_began(tmp_path):
    recipe, path = load_recipe("quickstart"), tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(apply_view_plan(recipe, ViewPlan(3, "top16", True))))
    found = restore_view_plan(path, recipe).teacher_cache
    assert (found.views, found.record) == (3, "top16")
    found = restore_view_plan(
        path, load_recipe("quickstart", ["teacher_cache.views=5", "teacher_cache.record=float32"])
    ).teacher_cache
    assert (found.views, found.record) == (5, "float32")
