"""Whole runs whose teacher is no network of ours: a function, an ONNX file."""

import pytest
import torch
from torch import nn

import potstill
from potstill.cli import main
from potstill.config.recipe import load_recipe
from potstill.errors import ArtifactError, UsageError
from potstill.experiment.pipeline import run
from potstill.experiment.run_folder import RunFolder
from potstill.export.formats import quiet
from potstill.input_spec import InputSpec
from potstill.models.model_file import load_model
from potstill.training.callbacks import SilentObserver

CODE = """
def by_colour(images):
    return 5 * images.mean((2, 3))[:, [2, 1, 0]]

def fails(images):
    raise ValueError("the service is down")
"""
EXACT = ("teacher.mean=[0,0,0]", "teacher.std=[1,1,1]")


class ByColour(nn.Module):
    """Blue, green, red."""

    def __init__(self, order=(2, 1, 0)) -> None:
        super().__init__()
        self.order = list(order)

    def forward(self, images):
        return 5 * images.mean((2, 3))[:, self.order]


class Notes(SilentObserver):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def plain(recipe):
    return recipe().model_dump(mode="json")


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    """Write a network as ONNX, as other programs do."""

    def write(module, name="teacher.onnx"):
        path = tmp_path_factory.mktemp("onnx") / name
        with quiet():
            torch.onnx.export(
                module.eval(), (torch.zeros(2, 3, 16, 16),), str(path), dynamo=True, external_data=False,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
        return path

    return write


def top1(folder, stage="distilled"):
    return RunFolder(folder).read_results()["stages"][stage]["test"]["top1"]


def weights(folder):
    return load_model(folder / "distilled").module.state_dict()


def test_network_onnx_file_and_function_teach_the_same(plain, onnx_file, tmp_path):
    exact = InputSpec(16, (0.0,) * 3, (1.0,) * 3)
    notes = Notes()
    folders = [
        potstill.run(plain, teacher=ByColour(), teacher_input=exact, output_dir=tmp_path, name="network"),
        potstill.run(
            plain, teacher=ByColour().forward, teacher_input=exact, output_dir=tmp_path, name="function", observer=notes
        ),
        potstill.run(
            plain, overrides=(f"teacher={{weights: {onnx_file(ByColour())}}}", *EXACT), output_dir=tmp_path, name="onnx"
        ),
    ]
    assert any("teacher: top-1 100.0% on 9 val images" in line for line in notes.lines)
    expected = weights(folders[0])
    for folder in folders:
        assert top1(folder, "teacher") == 1.0
        assert top1(folder) == top1(folders[0])
        assert all(torch.allclose(value, expected[key], atol=1e-5) for key, value in weights(folder).items())
        assert "distilled" in (folder / "report.html").read_text()
    teacher = RunFolder(folders[2]).read_results()["stages"]["teacher"]
    assert teacher["model"]["parameters"] is None
    assert teacher["latency_ms"]["p50"] > 0


def test_the_command_line_and_resuming(plain, photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "tiny.yaml").write_text(potstill.config.recipe.dump_recipe(load_recipe(plain)))
    command = ["run", "tiny.yaml", "--output-dir", str(tmp_path / "runs"), "--teacher", "mine.py:by_colour"]
    assert main([*command, "--seeds", "1"]) == 0
    before = weights(tmp_path / "runs" / "tiny")
    model = tmp_path / "runs" / "tiny" / "distilled" / "model.json"
    model.unlink()  # so that this stage is trained again, on the teacher's cached outputs
    (tmp_path / "runs" / "tiny" / "results.json").unlink()
    assert main([*command, "--resume"]) == 0
    after = RunFolder(tmp_path / "runs" / "tiny").read_results()["stages"]["distilled"]
    assert all(torch.equal(value, before[key]) for key, value in weights(tmp_path / "runs" / "tiny").items())
    assert after["teaching"]["computed"] == 0
    capsys.readouterr()
    assert main([*command[:-1], "mine.py:fails", "--overwrite"]) == 2
    assert "mine.py:fails raised ValueError: the service is down" in capsys.readouterr().err
    assert main([*command[:4], "--student", "mine.py:by_colour", "--overwrite"]) == 2
    assert "cannot be trained" in capsys.readouterr().err


def test_classes_of_an_onnx_file(plain, onnx_file, tmp_path):
    file = onnx_file(ByColour(order=(0, 2, 1)))  # red, blue, green
    settings = {"weights": str(file), "mean": [0, 0, 0], "std": [1, 1, 1], "classes": ["red", "blue", "green"]}
    folder = run(load_recipe(plain | {"teacher": settings}), output_dir=tmp_path, stages=("teacher",))
    assert top1(folder, "teacher") == 1.0
    merged = settings | {"classes": {"blue": [1], "green": [2], "red": [0]}}
    folder = run(load_recipe(plain | {"teacher": merged}), output_dir=tmp_path, stages=("teacher",), overwrite=True)
    assert top1(folder, "teacher") == 1.0
    for changes, error, message in (
        ({"classes": ["red", "blue"]}, ArtifactError, "2 classes, but .* has 3 outputs"),
        ({"classes": ["red", "blue", "gold"]}, UsageError, "lacks 1 of the 3 classes"),
        ({"mean": None}, UsageError, r"--set teacher.mean=\[0.485"),
        ({"size": 24}, ArtifactError, "takes images of 16 px, but teacher.size is 24"),
        ({"new_head": True}, UsageError, "leave new_head and head out"),
    ):
        with pytest.raises(error, match=message):
            run(load_recipe(plain | {"teacher": settings | changes}), output_dir=tmp_path, name="bad")


@pytest.mark.parametrize("method", ["fitnet", "rkd", "srrl"])
def test_methods_that_read_layers_say_which_ones_work(plain, onnx_file, tmp_path, method):
    teacher = {"weights": str(onnx_file(ByColour())), "mean": [0, 0, 0], "std": [1, 1, 1]}
    with pytest.raises(UsageError, match=f"{method} reads more of the teacher than its logits.*dist, dkd"):
        run(load_recipe(plain | {"teacher": teacher, "method": {"name": method}}), output_dir=tmp_path)
