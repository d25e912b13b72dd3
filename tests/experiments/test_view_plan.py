"""How many views are drawn in turn, and whether the teacher's answers to them are kept."""

from types import SimpleNamespace

import pytest

from potstill.data.settings import AugmentSettings
from potstill.errors import UsageError
from potstill.experiments import view_plan
from potstill.experiments.recipe import dump_recipe, load_recipe
from potstill.experiments.rehearsal import create_stage_method
from potstill.experiments.view_plan import plan_views, record_kind, with_views, with_views_of


def planned(*sets, augment=None, images=1000, classes=10, free=10**12, monkeypatch=None):
    recipe = load_recipe("quickstart", sets)
    data = SimpleNamespace(
        augment=augment or AugmentSettings(hflip=True),
        train=range(images),
        unlabeled=None,
        class_names=tuple(map(str, range(classes))),
    )
    data.measured = data  # there is no target
    if monkeypatch is not None:
        monkeypatch.setattr(view_plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    found = plan_views(recipe, create_stage_method(recipe), data)
    return found.views, found.stores, found.note


@pytest.mark.parametrize(
    ("epochs", "views"), [(1, 1), (5, 5), (8, 8), (12, 8), (30, 8), (32, 8), (33, 9), (100, 25), (240, 60)]
)
def test_one_view_for_four_epochs_but_eight_at_least(epochs, views):
    assert planned(f"training.epochs={epochs}") == (views, True, "")


def test_where_views_are_equal_one_suffices():
    assert planned("training.epochs=12", "data.augment={}") == (1, True, "")


def test_as_many_views_as_fit_into_a_tenth_of_the_free_disk(monkeypatch):
    # 1,000 images of 10 float16 logits: 20,000 bytes a view; a tenth of 650,000 holds 3 of them
    views, stores, note = planned("training.epochs=12", free=650_000, monkeypatch=monkeypatch)
    assert (views, stores) == (3, True)
    assert "3 of 8 views" in note
    views, stores, note = planned("training.epochs=12", free=150_000, monkeypatch=monkeypatch)
    assert (views, stores) == ("all", False)
    assert "no room" in note


def test_what_somebody_asks_for_is_done_whatever_the_disk_says(monkeypatch):
    assert planned("store.views=40", monkeypatch=monkeypatch)[:2] == (40, True)
    assert planned("store.views=all", monkeypatch=monkeypatch)[:2] == ("all", True)
    views, stores, note = planned("store.views=40", "training.epochs=90", free=1_000_000, monkeypatch=monkeypatch)
    assert (views, stores) == (40, False)
    assert "800 kB" in note


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
    assert planned(f"method.name={method}")[1] is stores
    assert planned(f"method.name={method}")[0] == (8 if stores else "all")


def test_methods_combined_are_stored_only_where_each_can_be():
    assert planned("method=[{name: kd}, {name: crd, factor: 0.8}]")[1]
    assert not planned("method=[{name: kd}, {name: fitnet}]")[1]


def test_off_asks_anew_and_draws_new_views_unless_told_otherwise():
    assert planned("store=off") == ("all", False, "")
    assert planned("store.mode=off", "store.views=4") == (4, False, "")


def test_the_sixteen_largest_are_for_kd_and_many_classes():
    def kind(classes, *sets):
        recipe = load_recipe("quickstart", ["store.record=top16", *sets])
        return record_kind(recipe, create_stage_method(recipe), classes)

    assert kind(100) == "top16"
    with pytest.raises(UsageError, match="more than 64 classes"):
        kind(64)
    with pytest.raises(UsageError, match="dist reads all of them"):
        kind(100, "method.name=dist")


def test_a_run_that_goes_on_draws_as_many_views_as_it_began_with(tmp_path):
    recipe = load_recipe("quickstart")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(with_views(recipe, 3)))
    assert with_views_of(tmp_path / "recipe.yaml", recipe).store.views == 3
    explicit = load_recipe("quickstart", ["store.views=5"])
    assert with_views_of(tmp_path / "recipe.yaml", explicit).store.views == 5
