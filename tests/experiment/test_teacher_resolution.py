"""A teacher of another size sees the student's views cut from the original pixels: live, cached and prepared alike."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from potstill.experiment import builders
from potstill.experiment.cache_verification import verify_cache
from potstill.experiment.pipeline import run
from potstill.experiment.teacher_cache import cache_key
from potstill.experiment.teacher_inference import convert_teachers
from potstill.training.callbacks import SilentObserver

TEACHER = {"teacher.model": "cifar/resnet14", "teacher.size": 24, "teacher.training.epochs": 1}
TEACHER |= {"training.epochs": 2, "teacher_cache.views": 2}
SHORT = {"stages": ("teacher", "distilled"), "evaluate": False}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def weights(folder):
    return (folder / "distilled" / "model.safetensors").read_bytes()


def identities(cache: Path) -> list[dict]:
    return [json.loads(path.read_text())["identity"] for path in (cache / "teachers").glob("*/manifest.json")]


@pytest.fixture
def seen(monkeypatch):
    """Sizes of the images that teachers get, those of the trial before the run and of the cost left out."""
    from potstill.distillation.teachers import FeatureExtractor

    sizes, original = [], FeatureExtractor.run

    def watched(self, network, images, how=None):
        sizes.append((tuple(images.shape[1:]), images.float().abs().sum().item()))
        return original(self, network, images, how)

    monkeypatch.setattr(FeatureExtractor, "run", watched)
    return sizes


def test_cached_and_live_outputs_are_the_same_and_give_the_same_student(recipe, cache, tmp_path):
    first = run(recipe(**TEACHER, **{"teacher_cache.record": "float32"}), output_dir=tmp_path, name="first")
    ready = TEACHER | {"teacher.weights": str(first)}
    ready.pop("teacher.training.epochs")
    live = run(recipe(**ready | {"teacher_cache": "{mode: off, views: 2}"}), output_dir=tmp_path, name="live")
    again = run(recipe(**ready, **{"teacher_cache.record": "float32"}), output_dir=tmp_path, name="again")
    assert weights(again) == weights(first)
    ours, theirs = (safetensors.torch.load(weights(folder)) for folder in (first, live))
    for name, tensor in ours.items():
        assert torch.allclose(tensor.float(), theirs[name].float(), atol=1e-5), name
    taught = json.loads((again / "distilled" / "model.json").read_text())["facts"]["teaching"]
    assert (taught["computed"], taught["read"]) == (0, 2 * 42)
    sizes = {
        name: json.loads((first / name / "model.json").read_text())["input"]["size"]
        for name in ("teacher", "distilled")
    }
    assert sizes == {"teacher": 24, "distilled": 8}


def test_stores_say_so_and_can_be_verified(recipe, cache, tmp_path):
    run(recipe(**TEACHER), output_dir=tmp_path, **SHORT)
    assert [each["resolution"] for each in identities(cache)] == ["own"] * 2  # train and val
    for path in (cache / "teachers").iterdir():
        found = verify_cache(path)
        assert found.largest < 0.02
        assert found.same_class == 1


def test_verification_finds_answers_to_the_students_pixels(recipe, cache, tmp_path, monkeypatch):
    from potstill.experiment import stage

    monkeypatch.setattr(stage, "build_teacher_views", lambda *arguments, **options: None)
    run(recipe(**TEACHER), output_dir=tmp_path, **SHORT)
    path = next(path for path in (cache / "teachers").iterdir())
    assert verify_cache(path).largest > 0.03


def test_equal_sizes_have_the_keys_of_before(recipe, cache, tmp_path):
    run(recipe(**TEACHER | {"teacher.size": 8}), output_dir=tmp_path, **SHORT)
    for each in identities(cache):
        assert set(each) == {"teacher", "classes", "data", "split", "names", "views"}
        assert "drawn" not in each["views"]


@pytest.mark.parametrize(
    "method",
    [
        {"method": "{name: kd}", "teacher_cache": "{mode: off, views: 2}"},
        {"method": "{name: kd}", "data.augment.cutmix": 1.0},
        {"method": "{name: at}"},  # feature maps: never stored
        {"method": "{name: mlld}"},  # second views
        {"method": "{name: nd}"},  # learns from the teacher before training
        {"method": "{name: crd}"},  # memory, and nothing on val
        {"teacher": "[{model: cifar/resnet14, size: 24}, {model: cifar/resnet8}, {model: cifar/resnet8, size: 20}]"},
    ],
    ids=lambda value: value.get("method", "several teachers") + ("+" + list(value)[1] if len(value) > 1 else ""),
)
def test_every_kind_of_method_asks_the_teacher_at_its_size(recipe, tmp_path, seen, method, monkeypatch):
    """No image that a teacher of 24 px sees is one of 8 px enlarged."""
    from potstill.types import InputConverter

    enlarged, forward = [], InputConverter.forward

    def watched(self, images):
        if self.size is not None and images.abs().sum() > 0:  # not the black example that sizes the adapters
            enlarged.append(len(images))
        return forward(self, images)

    from potstill.experiment import pipeline

    settings = TEACHER | method
    if "teacher" in method:
        settings = {key: value for key, value in settings.items() if not key.startswith("teacher.")}
    check = pipeline.check_all

    def checked(*arguments, **options):  # noise of the student's size, converted
        found = check(*arguments, **options)
        monkeypatch.setattr(InputConverter, "forward", watched)
        seen.clear()
        return found

    monkeypatch.setattr(pipeline, "check_all", checked)
    run(recipe(**settings | {"training.epochs": 1}), output_dir=tmp_path, name="one", **SHORT)
    assert enlarged == []
    assert {shape[1] for shape, _ in seen} >= {8, 24}


def test_the_faster_copy_is_compared_on_images_of_its_size(recipe, tmp_path, monkeypatch):
    from potstill.experiment import stage

    given = []

    def watched(distiller, *arguments, **options):
        convert = distiller.teacher.optimize_one_for_inference

        def watched_conversion(at, dtype, memory_format, example, **more):
            given.append(example.shape[-1])
            return convert(at, dtype, memory_format, example, **more)

        distiller.teacher.optimize_one_for_inference = watched_conversion
        return convert_teachers(distiller, *arguments, **options)

    monkeypatch.setattr(stage, "convert_teachers", watched)
    monkeypatch.setattr("potstill.training.devices.Compute.teacher_in_bf16", True)
    run(recipe(**TEACHER), output_dir=tmp_path, **SHORT)
    assert given == [24]


def test_a_stopped_run_goes_on_with_the_same_weights(recipe, tmp_path, cache):
    whole = run(recipe(**TEACHER | {"training.epochs": 3}), output_dir=tmp_path, name="whole", **SHORT)

    class Impatient(SilentObserver):
        def stage(self, name, detail):
            self.current = name

        def epoch_end(self, record):
            if self.current == "distilled" and record["epoch"] == 1:
                raise KeyboardInterrupt

    settings = recipe(**TEACHER | {"training.epochs": 3})
    with pytest.raises(KeyboardInterrupt):
        run(settings, output_dir=tmp_path, name="parts", observer=Impatient(), **SHORT)
    parts = run(settings, output_dir=tmp_path, name="parts", resume=True, **SHORT)
    assert weights(parts) == weights(whole)


def test_the_key_tells_resolutions_and_unlabeled_images_apart():
    class Images:
        names = ("a", "b")

    class Data:
        class_names, fingerprint = ("x", "y"), "f"

        def split(self, name):
            return Images()

    class Loading:
        def __init__(self, size, unlabeled=None):
            self.spec, self.unlabeled = type("Spec", (), {"size": size}), unlabeled

        def describe_views(self, second):
            return {"side": 18}

    teacher = {"input": {"size": 24}}
    own, same = (cache_key(teacher, Loading(size), "train", Data(), second=False) for size in (16, 24))
    assert own == same | {"resolution": "own"}
    further = cache_key(teacher, Loading(24, Images()), "train", Data(), second=False)
    assert {key for key in same if same[key] != further[key]} == {"names"}  # of unlabeled images, which have ids too


def test_a_pretrained_teacher_is_said_to_see_too_little():
    assert builders._resolution_notes("timm/resnet18", 64, "teacher.1") == [
        "timm/resnet18 was trained on 224 px and sees 64 px, like its student: --set teacher.1.size=224 gives "
        "it more of the original pixels, for about 12 times the computation"
    ]
    assert builders._resolution_notes("timm/resnet18", 224, "teacher") == []
    assert builders._resolution_notes("cifar/resnet20", 32, "teacher") == []


def test_teacher_and_student_see_the_same_photograph(recipe, photographs, tmp_path):
    """Pixels of the teacher's views, averaged over blocks, are the student's."""
    from functools import partial

    from potstill.data.datasets import load_data
    from potstill.experiment.builders import build_teacher_views, train_loader
    from potstill.experiment.plan import plan_stages
    from potstill.input_spec import InputSpec
    from potstill.methods.kd import KD
    from potstill.training.devices import create_compute

    made = recipe(**{"data.augment.crop_scale": "[0.4, 1]", "data.size": 8})
    data, compute = load_data(made.data), create_compute(made.training)
    planned = plan_stages(made)[-1]
    loading = partial(train_loader, planned, KD().needs, recipe=made, data=data, compute=compute)
    student, teacher = InputSpec(8, (0.0,) * 3, (1.0,) * 3), InputSpec(16, (0.5,) * 3, (0.5,) * 3)
    views = build_teacher_views(student, [SimpleNamespace(input=teacher, module=torch.nn.Identity())], loading)
    for epoch in (0, 1):
        views.start_epoch(epoch)
        for position, batch in enumerate(loading(spec=student).epoch(epoch)):
            (images,) = views.of(position, batch).images
            images = torch.nn.functional.avg_pool2d(images * 0.5 + 0.5, 2)
            apart = [(images - other).abs().mean().item() for other in (batch.images, batch.images.flip(3))]
            assert apart[0] < 0.05
            assert apart[1] > 1.5 * apart[0]
