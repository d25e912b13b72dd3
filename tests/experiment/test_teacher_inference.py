"""Runs whose teacher is asked in bf16: stored and live the same, gone on with or not, and said in key and notes."""

import json
import shutil
from pathlib import Path

import pytest

from potstill.distillation import teachers as asked
from potstill.distillation.teacher_cache.cache import TeacherCache
from potstill.errors import ArtifactError
from potstill.experiment import teacher_inference
from potstill.experiment.cache_verification import verify_cache
from potstill.experiment.pipeline import run

BF16 = {"training.precision": "bf16", "training.epochs": 3, "teacher_cache.views": 2}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Watching:
    def __init__(self, interrupted_at=None):
        self.notes, self.interrupted_at = [], interrupted_at

    def note(self, message):
        self.notes.append(message)

    def stage(self, name, detail):
        self.current = name

    def epoch_end(self, record):
        if (self.current, record["epoch"]) == ("distilled", self.interrupted_at):
            raise KeyboardInterrupt

    def __getattr__(self, name):
        return lambda *arguments: None

    @property
    def told(self):
        return [note for note in self.notes if note.startswith("teacher runs in")]


@pytest.fixture
def carry_out(recipe, tmp_path, cache):
    """Carries out a run, or what is wanted of one: by default no baseline, and no figures."""

    def go(name, observer=None, resume=False, stages=("teacher", "distilled"), evaluate=False, **changes):
        options = {"observer": observer, "resume": resume, "stages": stages, "evaluate": evaluate}
        return run(recipe(**{**BF16, **changes}), output_dir=tmp_path, name=name, **options)

    return go


@pytest.fixture(scope="module")
def filled(recipe, tmp_path_factory):
    """A whole run that filled its stores, and the cache with them; nobody may change them."""
    folder = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POTSTILL_CACHE", str(folder / "cache"))
        return run(recipe(**BF16), output_dir=folder, name="first"), folder / "cache"


@pytest.fixture
def first(filled, carry_out, cache):
    """That run, with a copy of its cache, and runs with its teacher, which is unsure, so that its rounding shows."""
    done, kept = filled
    shutil.copytree(kept, cache)

    def again(name, **changes):
        return carry_out(name, **{"teacher.weights": str(done), **changes})

    return done, again


def weights(folder, stage="distilled"):
    return (Path(folder) / stage / "model.safetensors").read_bytes()


def facts(folder):
    return json.loads((folder / "distilled" / "model.json").read_text())["facts"]["teaching"]


def asked_in(cache):
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (cache / "teachers").iterdir()]
    return [each["identity"]["teacher"]["inference"] for each in manifests if each["identity"]["split"] == "train"]


CONVERTED = {
    "precision": "bf16",
    "folded": 9,
    "layout": "channels_last",
}  # 1 + 2 x 3, and 2 shortcuts of cifar/resnet8
PLAIN = {"precision": "float32", "folded": 0, "layout": "channels_last"}


def test_it_is_said_once_and_part_of_the_key(carry_out, cache, monkeypatch):
    monkeypatch.setattr(teacher_inference, "MIN_AGREEMENT", 0.0)
    watching = Watching()
    done = carry_out("mine", watching)
    (note,) = watching.told
    assert note.startswith("teacher runs in bf16, BN folded, channels_last (same top class as float32 on ")
    assert " of 42 images, largest logit difference " in note
    assert asked_in(cache) == [CONVERTED]
    assert facts(done)["computed"] == 2 * 42


def test_warm_equals_filled_equals_live(first):
    done, again = first
    second = again("second")
    assert (facts(second)["computed"], facts(second)["read"]) == (0, 3 * 42)
    assert weights(second) == weights(done)
    stored, live = (
        again("stored", **{"teacher_cache.record": "float32"}),
        again("live", teacher_cache="{mode: off, views: 2}"),
    )
    assert facts(stored)["computed"] > 0
    assert weights(stored) == weights(live)


def test_verifying_asks_in_the_same_way(first, cache):
    _, again = first
    shutil.rmtree(cache / "teachers")
    again("exactly", **{"teacher_cache.record": "float32"})
    stores = [TeacherCache.open_existing(path) for path in (cache / "teachers").iterdir()]
    answers = [store.path for store in stores if store.record.classes]
    assert answers
    for path in answers:
        assert verify_cache(path, 30).largest <= 1e-4  # bf16 alone is a thousand times as far away
    with pytest.raises(ArtifactError, match="compared by their checksums only"):
        verify_cache(next(store.path for store in stores if "predictions" in store.identity), 30)


@pytest.mark.parametrize(
    ("told", "message"),
    [("bf16", "written by another version"), ({"folded": 3}, "ran in bf16, BN folded, channels_last, which is not")],
)
def test_answers_that_cannot_be_had_again_are_not_verified(first, cache, monkeypatch, told, message):
    store = TeacherCache.open_existing(next((cache / "teachers").iterdir()))
    teacher = store.identity["teacher"]
    monkeypatch.setitem(teacher, "inference", CONVERTED | told if isinstance(told, dict) else told)
    monkeypatch.setattr(TeacherCache, "open_existing", lambda path: store)
    with pytest.raises(ArtifactError, match=message):
        verify_cache(store.path, 10)


def test_float32_on_demand_is_another_store(first, cache, monkeypatch):
    _, again = first
    monkeypatch.setattr(teacher_inference, "MIN_AGREEMENT", 0.0)
    watching = Watching()
    exact = again("exact", observer=watching, **{"teacher.precision": "float32"})
    assert watching.told == []
    assert facts(exact)["computed"] == 2 * 42
    assert PLAIN in asked_in(cache)


def test_where_it_does_not_agree_float32_is_kept_and_said(carry_out, cache, monkeypatch):
    monkeypatch.setattr(teacher_inference, "MIN_AGREEMENT", 1.01)
    watching = Watching()
    carry_out("mine", watching)
    (note,) = watching.told
    assert note.startswith("teacher runs in float32; bf16 is too inaccurate (same top class as float32 on ")
    assert asked_in(cache) == [PLAIN]


@pytest.mark.parametrize("known", [True, False])
def test_going_on_gives_the_same_weights(carry_out, cache, known):
    whole = carry_out("whole")
    with pytest.raises(KeyboardInterrupt):
        carry_out("part", Watching(interrupted_at=2))
    if not known:
        shutil.rmtree(cache)
    assert weights(carry_out("part", resume=True)) == weights(whole)


def test_the_comparison_leaves_no_trace_in_training(first, monkeypatch, cache):
    done, again = first
    shutil.rmtree(cache / "fidelity")
    before = teacher_inference._count_compared
    monkeypatch.setattr(teacher_inference, "_count_compared", lambda *arguments: 7 + 0 * before(*arguments))
    assert weights(again("fewer")) == weights(done)


def test_the_next_run_does_not_compare_again(first, monkeypatch):
    done, again = first

    def refuse(*arguments):
        raise AssertionError

    monkeypatch.setattr(asked, "measure_fidelity", refuse)
    assert weights(again("second")) == weights(done)


def test_a_damaged_comparison_is_made_again(first, cache):
    done, again = first
    (path,) = (cache / "fidelity").iterdir()
    intact = path.read_text()
    for damaged in (intact.replace('"agreement": ', '"agreement": -'), "[", ""):
        path.write_text(damaged)
        assert weights(again(f"run-{len(damaged)}")) == weights(done)
        assert path.read_text() == intact


def test_the_teacher_itself_stays_in_float32(first):
    done, again = first
    second = again("second", evaluate=True)
    assert weights(second, "teacher") == weights(done, "teacher")
    results = [json.loads((folder / "results.json").read_text()) for folder in (done, second)]
    assert results[0]["stages"]["teacher"]["test"] == results[1]["stages"]["teacher"]["test"]
    assert facts(done)["parameters"] == results[0]["stages"]["teacher"]["model"]["parameters"]


def test_methods_that_read_maps_are_asked_as_before(carry_out):
    watching = Watching()
    done = carry_out("maps", watching, method="{name: at}")
    assert watching.told == []
    assert "computed" not in facts(done)


def test_without_fast_bf16_nothing_is_converted(carry_out, cache):
    watching = Watching()
    carry_out("plain", watching, **{"training.precision": "float32"})
    assert watching.told == []
    assert asked_in(cache) == [PLAIN]


def test_images_are_spread_evenly():
    assert teacher_inference.spread_ids(10, 4).tolist() == [0, 9, 3, 6]
    assert teacher_inference.spread_ids(3, 40).tolist() == [0, 2, 1]
