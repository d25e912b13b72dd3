"""Whole runs whose teacher has embeddings and no classes: networks, ONNX files, functions and tables."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import potstill
from potstill.config.recipe import load_recipe
from potstill.data.augment import BatchMixer
from potstill.data.datasets import load_data
from potstill.data.transforms import preprocess
from potstill.errors import ArtifactError, UsageError
from potstill.experiment.pipeline import run
from potstill.experiment.run_folder import RunFolder
from potstill.export.formats import quiet
from potstill.export.loading import load_classifier
from potstill.input_spec import InputSpec
from potstill.models.model_file import load_model
from potstill.report.render import render
from potstill.serve.server import _model_folders
from potstill.sweep.worker import train_teachers
from potstill.training.callbacks import SilentObserver

EXACT = InputSpec(16, (0.0,) * 3, (1.0,) * 3)


class ColourEmbedding(nn.Module):
    """Five numbers that tell the colours: no class is among them."""

    def forward(self, images):
        means = images.mean((2, 3))
        return torch.cat([4 * means, means[:, :2] - means[:, 1:]], dim=1)


@pytest.fixture
def plain(recipe):
    return recipe().model_dump(mode="json") | {"method": {"name": "srd"}}


@pytest.fixture
def onnx_file(tmp_path):
    path = tmp_path / "embedding.onnx"
    with quiet():
        torch.onnx.export(
            ColourEmbedding().eval(), (torch.zeros(2, 3, 16, 16),), str(path), dynamo=True, external_data=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    return path


@pytest.fixture
def table(plain, tmp_path):
    """Embeddings of all images, as a program of any framework would write them."""
    data = load_data(load_recipe(plain).data)
    names, rows = [], []
    for split in ("train", "val", "test"):
        images = data.split(split)
        names += images.names
        rows += [preprocess(images.pixels(i), EXACT) for i in range(len(images))]
    path = tmp_path / "embeddings.npz"
    np.savez(path, paths=names, embeddings=ColourEmbedding()(torch.stack(rows)).numpy())
    return path


def weights(folder):
    return load_model(folder / "distilled").module.state_dict()


def test_a_function_an_onnx_file_and_a_table_of_embeddings_teach_the_same(plain, onnx_file, table, tmp_path):
    plain["data"]["augment"] = {}  # a table knows one answer for each image
    exact = ("teacher.mean=[0,0,0]", "teacher.std=[1,1,1]")
    folders = [
        potstill.run(
            plain, overrides=("teacher.head=none",), teacher=ColourEmbedding().forward, teacher_input=EXACT,
            output_dir=tmp_path, name="function",
        ),
        potstill.run(plain, overrides=(f"teacher={{weights: {onnx_file}, head: none}}", *exact), output_dir=tmp_path,
                     name="onnx"),
        potstill.run(plain, overrides=(f"teacher={{weights: {table}, head: none}}",), output_dir=tmp_path,
                     name="table"),
    ]  # fmt: skip
    expected = weights(folders[0])
    for folder in folders:
        assert all(torch.allclose(value, expected[key], atol=1e-4) for key, value in weights(folder).items())
        results = RunFolder(folder).read_results()
        assert sorted(results["stages"]) == ["baseline", "distilled"]
        assert results["comparison"]["verdict"]
        assert "no classes" in results["teachers_without_classes"]["teacher"]["sentence"]
        assert results["method"]["kd_weight"] == 0  # set, since nobody gave it
        assert not any("chance" in warning for warning in results["warnings"])
        assert not (folder / "teacher" / "metrics.json").exists()
        render(folder)
        assert "no classes: it taught by" in (folder / "report.html").read_text()
        assert sorted(_model_folders(folder)) == ["baseline", "distilled"]
        if folder != folders[0]:  # a function is known in its own process only
            with pytest.raises(ArtifactError, match="without classes"):
                load_classifier(folder / "teacher")


def test_the_embeddings_move_the_student(plain, table, tmp_path):
    """Without weight of the embeddings the student is the baseline; with it, it is another."""
    teacher = {"weights": str(table), "head": "none"}
    learned = run(load_recipe(plain | {"teacher": teacher}), output_dir=tmp_path, name="learned")
    nothing = {"name": "srd", "weight": 0.0}
    idle = run(load_recipe(plain | {"teacher": teacher, "method": nothing}), output_dir=tmp_path, name="idle")
    baseline = load_model(learned / "baseline").module.state_dict()
    assert all(torch.equal(value, baseline[key]) for key, value in weights(idle).items())
    assert not all(torch.equal(value, baseline[key]) for key, value in weights(learned).items())


@pytest.mark.parametrize("method", ["rkd", "vkd", "at"])
def test_a_network_without_its_head_teaches_by_embeddings_and_maps(plain, recipe, tmp_path, method):
    trained = run(recipe(), output_dir=tmp_path, name="trained", stages=("teacher",))
    teacher = {"weights": str(trained), "head": "none"}
    folder = run(load_recipe(plain | {"teacher": teacher, "method": {"name": method}}), output_dir=tmp_path, name="x")
    head = load_model(folder / "teacher").module.state_dict()
    last = [key for key in head if key.endswith("weight")][-1]
    assert not head[last].any()
    facts = json.loads((folder / "distilled" / "model.json").read_text())["facts"]
    assert facts["teaching"]["by"] == ["teacher"]
    if method == "rkd":  # its folder is no teacher with classes, whose logits would all be 0
        kept = {"weights": str(folder / "teacher")}
        with pytest.raises(
            ArtifactError, match=r"has no classes: .*teacher\.head=none; teacher\.head=probe fits a head"
        ):
            run(load_recipe(plain | {"teacher": kept}), output_dir=tmp_path, name="y")
        probed = run(
            load_recipe(plain | {"teacher": kept | {"head": "probe"}}),
            output_dir=tmp_path,
            name="y",
            stages=("teacher",),
        )
        assert load_model(probed / "teacher").facts["head"]["kind"] == "probe"


def test_a_search_keeps_a_teacher_without_classes(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "trained", lambda folder, stage: True)
    (tmp_path / "x.safetensors").touch()
    for head, setting in (("none", "none"), ("probe", "null")):  # a probe is a part of the weights
        recipe = load_recipe(
            plain | {"teacher": {"model": "cifar/resnet8", "weights": str(tmp_path / "x.safetensors"), "head": head}}
        )
        assert f"teacher.head={setting}" in train_teachers(recipe, tmp_path, SilentObserver(), None)


def test_images_without_labels_enter_the_embedding_term(plain, recipe, unlabeled, tmp_path):
    trained = run(recipe(), output_dir=tmp_path, name="trained", stages=("teacher",))
    teacher = {"weights": str(trained), "head": "none"}
    changed = plain | {"teacher": teacher, "data": plain["data"] | {"unlabeled": str(unlabeled)}}
    folder = run(load_recipe(changed), output_dir=tmp_path, name="more")
    assert RunFolder(folder).read_results()["data"]["unlabeled"]


def test_resuming(plain, table, tmp_path):
    recipe = load_recipe(plain | {"teacher": {"weights": str(table), "head": "none"}})
    folder = run(recipe, output_dir=tmp_path)
    before = weights(folder)
    (folder / "distilled" / "model.json").unlink()
    (folder / "results.json").unlink()
    run(recipe, output_dir=tmp_path, resume=True)
    assert all(torch.equal(value, before[key]) for key, value in weights(folder).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": {"name": "kd"}}, "method kd reads the classes of the teacher, which has none .* rkd, srd"),
        ({"method": {"name": "srd", "kd_weight": 1.0}}, "set method.kd_weight=0, or use one of cc, "),
        ({"method": {"name": "at"}}, "method at reads feature maps of the teacher, and .* gives embeddings alone"),
        ({"method": {"name": "simkd"}}, "reads the classes of the teacher"),
        ({"curriculum": {"order": "easy"}}, "curriculum orders images by the predictions"),
        ({"born_again_generations": 2}, "born_again_generations cannot begin with a teacher without classes"),
    ],
)
def test_what_does_not_work_is_said_before_anything_is_trained(plain, table, tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        run(load_recipe(plain | {"teacher": {"weights": str(table), "head": "none"}} | change), output_dir=tmp_path)


def test_wrong_heads(plain, table, tmp_path):
    with pytest.raises(UsageError, match=r"has embeddings and no classes: set teacher.head: none, with .*srd"):
        run(load_recipe(plain | {"teacher": {"weights": str(table)}}), output_dir=tmp_path)
    logits = tmp_path / "logits.npz"
    with np.load(table) as arrays:
        np.savez(logits, paths=arrays["paths"], logits=arrays["embeddings"][:, :3], classes=["blue", "green", "red"])
    with pytest.raises(UsageError, match="has logits, and a teacher without classes"):
        run(load_recipe(plain | {"teacher": {"weights": str(logits), "head": "none"}}), output_dir=tmp_path)
    with pytest.raises(UsageError, match=r"student.head: none leaves nothing"):
        load_recipe(plain | {"student": {"model": "cifar/resnet8", "weights": "x.pt", "head": "none"}})


def test_mixed_embeddings_are_weighted_means():
    mixer = BatchMixer(np.zeros(8, np.int64), mixup=1.0, cutmix=0.0, classes=2, size=16, seed=0)
    params = mixer.draw(np.arange(8), 0)
    own, others = torch.randn(2, 8, 5, 1, 1)
    mixed = mixer.answers(own, others, params, linear=True).squeeze()
    weight = torch.from_numpy(params.weights).float()[:, None]
    torch.testing.assert_close(mixed, weight * own.squeeze() + (1 - weight) * others.squeeze())
