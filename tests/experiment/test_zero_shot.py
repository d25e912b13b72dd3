"""Runs whose teacher is a network of open_clip: its head made of texts, or fitted to images."""

import json

import pytest
import torch

from potstill.cli import main
from potstill.errors import UsageError
from potstill.experiment import pipeline
from potstill.models.factory import load_zero_shot
from potstill.models.model_file import load_model
from potstill.report.run_reader import read_run
from potstill.report.text_reports import training_text
from potstill.training.callbacks import SilentObserver


class Listening(SilentObserver):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


@pytest.fixture
def zero_shot(recipe, clip, tmp_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))

    def make(**changes):
        teacher = {"teacher.model": "open_clip/tiny", "teacher.weights": clip, "teacher.head": "zero_shot"}
        return recipe(**{**teacher, **changes})

    return make


def results(path):
    return json.loads((path / "results.json").read_text())


def test_the_head_is_made_of_the_class_names(zero_shot, clip, tmp_path):
    heard = Listening()
    run = pipeline.run(zero_shot(), output_dir=tmp_path, observer=heard)
    teacher = load_model(run / "teacher")
    prompts = {name: [f"a photo of a {name}."] for name in ("blue", "green", "red")}
    expected, _ = load_zero_shot("open_clip/tiny", str(clip), prompts, size=32)
    assert torch.equal(teacher.module.head.weight, expected.head.weight)
    assert teacher.input.size == 32  # the network's own; data.size is 16
    assert teacher.input.mean == (0.48145466, 0.4578275, 0.40821073)
    entry = results(run)["stages"]["teacher"]
    assert entry["training"] is None
    assert entry["head"]["prompts"] == ["a photo of a {}."]
    assert entry["head"]["texts"] == 3
    assert entry["head"]["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5)
    assert not (run / "teacher" / "fold_heads.safetensors").exists()
    assert any("made of 3 texts for 3 classes, such as 'a photo of a blue.'" in note for note in heard.notes)
    text = training_text(read_run(run).stages["teacher"])
    assert text == "a zero-shot head, made of 3 texts without labels, such as 'a photo of a {}.'"


def test_prompts_of_each_class_are_taken(zero_shot, clip, tmp_path):
    prompts = "{blue: [the sea, 'the sky over {}'], green: a lawn, red: [fire]}"
    run = pipeline.run(zero_shot(**{"teacher.prompts": prompts}), output_dir=tmp_path, stages=("teacher",))
    head = results(run)["stages"]["teacher"]["head"]
    assert head["prompts"] == {"blue": ["the sea", "the sky over {}"], "green": ["a lawn"], "red": ["fire"]}
    texts = {"blue": ["the sea", "the sky over blue"], "green": ["a lawn"], "red": ["fire"]}
    expected, _ = load_zero_shot("open_clip/tiny", str(clip), texts, size=32)
    assert torch.equal(load_model(run / "teacher").module.head.weight, expected.head.weight)


def test_a_run_takes_the_zero_shot_teacher_of_another(zero_shot, recipe, tmp_path):
    first = pipeline.run(zero_shot(), output_dir=tmp_path, name="first")
    again = pipeline.run(
        recipe(**{"teacher.model": "open_clip/tiny", "teacher.weights": first}), output_dir=tmp_path, name="again"
    )
    ours, theirs = (load_model(each / "distilled").module.state_dict() for each in (first, again))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert results(again)["stages"]["teacher"]["head"] == results(first)["stages"]["teacher"]["head"]
    with pytest.raises(UsageError, match=r"was saved without text tower: leave teacher.head out"):
        pipeline.run(zero_shot(**{"teacher.weights": first}), output_dir=tmp_path, name="third")


def test_the_saved_teacher_predicts_and_is_exported_without_text_tower(
    zero_shot, photographs, tmp_path, monkeypatch, capsys
):
    run = pipeline.run(zero_shot(), output_dir=tmp_path, stages=("teacher",))
    monkeypatch.setattr("open_clip.create_model", None)  # which alone builds a text tower
    picture = photographs / "red" / "00.png"
    assert main(["predict", str(run / "teacher"), str(picture), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert sum(each["probability"] for each in found["predictions"]) == pytest.approx(1, abs=1e-4)
    assert main(["evaluate", str(run / "teacher"), "--data", str(photographs)]) == 0
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    assert main(["export", str(run / "teacher"), "--format", "onnx", "--output", str(tmp_path / "teacher.onnx")]) == 0


@pytest.mark.parametrize("head", ["probe", "finetune"])
def test_a_head_is_fitted_to_the_image_tower(zero_shot, tmp_path, head):
    changes = {"teacher.head": head, "teacher.size": 32, "teacher.training.epochs": 1}
    run = pipeline.run(zero_shot(**changes), output_dir=tmp_path)
    entry = results(run)["stages"]["teacher"]
    assert entry["head"]["kind"] == head
    assert entry["head"]["layer"] == "head"
    assert entry["val"]["top1"] > 0.5  # noisy colours


def test_prompts_must_name_every_class(zero_shot, tmp_path):
    wrong = zero_shot(**{"teacher.prompts": "{blue: [sea], green: [lawn], rad: [fire]}"})
    with pytest.raises(UsageError) as error:
        pipeline.run(wrong, output_dir=tmp_path)
    assert (
        "teacher.prompts has no prompts for red and has prompts for rad, of which the data has no images; did you"
        in str(error.value)
    )
    assert "blue, green, red" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"teacher.prompts": "['a photo of {}', a photo]"},
            r"teacher\.prompts\[1\] must contain \{\} for the class name",
        ),
        ({"teacher.prompts": "a photo"}, r"teacher\.prompts\[0\] must contain \{\}"),
        ({"teacher.prompts": "3"}, r"teacher\.prompts must be a list, got 3"),
        ({"teacher.prompts": "[]"}, r"teacher\.prompts "),
        ({"teacher.head": "probe", "teacher.prompts": "['a {}']"}, r"teacher\.prompts is for head: zero_shot only"),
        ({"teacher.model": "cifar/resnet8"}, "zero_shot needs a network with a text tower, and cifar/resnet8 has none"),
        ({"teacher.classes": "[red, blue, green]"}, "teacher.classes has no effect with head: zero_shot"),
        ({"teacher.weights": "null"}, "teacher.weights is not given"),
        ({"teacher.head": "zero-shot"}, "did you mean 'zero_shot'"),
    ],
)
def test_settings_that_cannot_be_are_refused(zero_shot, changes, words):
    with pytest.raises(UsageError, match=words):
        zero_shot(**changes)
