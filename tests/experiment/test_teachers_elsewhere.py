"""Whole runs whose teacher is no network of ours: a function, an ONNX file, a table of answers."""

import shutil
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import potstill
from potstill import code_references
from potstill.cli import main
from potstill.config.recipe import dump_recipe, load_recipe
from potstill.data.datasets import load_data
from potstill.data.transforms import preprocess
from potstill.distillation.teacher_cache.cache import list_caches
from potstill.errors import ArtifactError, DataError, UsageError
from potstill.experiment.cache_verification import verify_cache
from potstill.experiment.pipeline import run
from potstill.experiment.run_folder import RunFolder
from potstill.export.formats import quiet
from potstill.input_spec import InputSpec
from potstill.models.model_file import load_model
from potstill.report.render import render
from potstill.serve.server import _model_folders
from potstill.sweep.worker import train_teachers
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
    (tmp_path / "tiny.yaml").write_text(dump_recipe(load_recipe(plain)))
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


EXACT_INPUT = InputSpec(16, (0.0,) * 3, (1.0,) * 3)


@pytest.fixture(scope="module")
def answers(recipe):
    """Names of all images, and what ``ByColour`` says of each as the run sees it, uncropped."""
    data = load_data(recipe().data)
    names, logits = [], []
    for split in ("train", "val", "test"):
        images = data.split(split)
        names += images.names
        logits += [ByColour()(preprocess(images.pixels(at), EXACT_INPUT)[None])[0] for at in range(len(images))]
    return names, torch.stack(logits).numpy()


@pytest.fixture
def table(tmp_path, answers):
    """Write a table; values by default the logits of ``answers``."""

    def write(name="table.npz", *, names=answers[0], logits=answers[1], classes=("blue", "green", "red")):
        np.savez(tmp_path / name, paths=names, logits=logits, classes=classes)
        return tmp_path / name

    return write


def taught_by(plain, teacher, **changes):
    return load_recipe(plain | {"teacher": {"weights": str(teacher)}} | changes)


def test_a_table_and_its_network_teach_the_same_at_one_view(plain, table, answers, tmp_path):
    plain |= {"data": plain["data"] | {"augment": {}}}  # no augmentation: one view of each image
    network = potstill.run(plain, teacher=ByColour(), teacher_input=EXACT_INPUT, output_dir=tmp_path, name="network")
    folder = run(taught_by(plain, table()), output_dir=tmp_path, name="table")
    expected = weights(network)
    assert all(torch.equal(value, expected[key]) for key, value in weights(folder).items())
    for split in ("val", "test"):
        ours, theirs = (RunFolder(each).read_results()["stages"]["teacher"][split] for each in (folder, network))
        assert ours["top1"] == theirs["top1"] == 1.0
        assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-5)
    results = RunFolder(folder).read_results()
    assert results["stages"]["teacher"]["model"]["parameters"] is None
    assert results["stages"]["teacher"]["latency_ms"] is None
    assert not any("one answer for each image" in warning for warning in results["warnings"])
    reordered = table("reordered.npz", logits=answers[1][:, [2, 0, 1]], classes=("Red", "blue", "green"))
    folder = run(taught_by(plain, reordered), output_dir=tmp_path, name="reordered")
    assert all(torch.equal(value, expected[key]) for key, value in weights(folder).items())


def test_a_table_with_views_mixing_and_unlabeled_images(plain, photographs, table, answers, tmp_path, capsys):
    more = tmp_path / "more"
    shutil.copytree(photographs / "red", more / "red")  # the same paths as those of labeled images
    for name in ("00.png", "01.png"):
        (more / "red" / name).rename(more / name)
    augment = {"hflip": True, "crop_scale": [0.3, 1.0], "mixup": 0.5, "cutmix": 0.5}
    names, logits = answers
    changes = {"data": plain["data"] | {"augment": augment}}
    folder = run(taught_by(plain, table(), **changes), output_dir=tmp_path, name="mixed")
    (warning,) = [each for each in RunFolder(folder).read_results()["warnings"] if "one answer" in each]
    assert "mixed images are taught the mixed answers" in warning
    render(folder)
    assert "one answer for each image" in (folder / "report.html").read_text()
    assert sorted(_model_folders(folder)) == ["baseline", "distilled"]  # serve shows those that answer any image
    assert main(["export", str(folder), "--model", "teacher"]) == 2
    assert "teacher is a table of answers and cannot be exported: give the student" in capsys.readouterr().err

    changes = {"data": plain["data"] | {"unlabeled": str(more)}}
    unlabeled = [path.relative_to(more).as_posix() for path in sorted(more.rglob("*.png"))]
    every = np.concatenate([logits, np.tile(logits[:1], (len(unlabeled), 1))])
    ambiguous = table("ambiguous.npz", names=[*names, "00.png", "01.png"], logits=every[: len(names) + 2])
    with pytest.raises(DataError, match=r"write 'more/red/\d\d\.png' for the unlabeled one"):
        run(taught_by(plain, ambiguous, **changes), output_dir=tmp_path, name="ambiguous")
    named = table("named.npz", names=[*names, *(f"more/{name}" for name in unlabeled)], logits=every)
    folder = run(taught_by(plain, named, **changes), output_dir=tmp_path, name="unlabeled")
    assert top1(folder, "teacher") == 1.0


def test_a_table_beside_a_network_and_resuming(plain, table, tmp_path):
    teachers = [{"weights": str(table())}, {"model": "cifar/resnet8", "training": {"epochs": 1}}]
    cache = {"mode": "auto", "folder": str(tmp_path / "cache")}
    recipe = load_recipe(plain | {"teacher": teachers, "curriculum": {"order": "easy"}, "teacher_cache": cache})
    folder = run(recipe, output_dir=tmp_path)
    before = weights(folder)
    (folder / "distilled" / "model.json").unlink()
    (folder / "results.json").unlink()
    table().unlink()
    table()  # written anew with the same content
    run(recipe, output_dir=tmp_path, resume=True)
    assert all(torch.equal(value, before[key]) for key, value in weights(folder).items())
    caches = [each for each in list_caches(tmp_path / "cache") if each.manifest.facts["teacher"] == "table"]
    assert len(caches) == 2  # train and val: beside a network, a table is cached as well
    for cache in caches:
        found = verify_cache(cache.path)
        assert found.same_class == 1.0
        assert found.largest < 0.02


@pytest.mark.parametrize("setting", ["size", "mean"])
def test_a_table_has_no_preprocessing(plain, table, tmp_path, setting):
    teacher = {"weights": str(table()), setting: 32 if setting == "size" else [0, 0, 0]}
    with pytest.raises(UsageError, match=f"teacher.{setting}: .* sees no images"):
        run(load_recipe(plain | {"teacher": teacher}), output_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda names, logits: {"names": names[1:], "logits": logits[1:]}, 3, "has no row for 1 of 60 images"),
        (lambda names, logits: {"names": [*names[1:], names[1]]}, 3, "several rows for 1 images"),
        (lambda names, logits: {"logits": logits * np.nan}, 3, "60 of 60 rows have a number that is NaN"),
        (lambda names, logits: {"logits": logits[:, :2], "classes": ("blue", "red")}, 2, "lacks 1 of the 3 classes"),
        (lambda names, logits: {"classes": ("blue", "green", "gold")}, 2, "lacks 1 of the 3 classes"),
        (lambda names, logits: {"classes": ("blue", "green", "green")}, 4, "several columns for the class 'green'"),
    ],
)
def test_bad_tables_end_with_one_message(plain, table, answers, tmp_path, capsys, change, code, message):
    (tmp_path / "tiny.yaml").write_text(dump_recipe(load_recipe(plain)))
    teacher = str(table(**change(*answers)))
    command = ["run", str(tmp_path / "tiny.yaml"), "--output-dir", str(tmp_path / "runs"), "--teacher", teacher]
    assert main(command) == code
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "runs" / "tiny").exists() or not (tmp_path / "runs" / "tiny" / "teacher").exists()


def test_a_table_names_the_classes_of_images_without_labels(plain, photographs, table, answers, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in photographs.rglob("*.png"):
        shutil.copy(path, flat / f"{path.parent.name}-{path.name}")
    file = table(names=[name.replace("/", "-") for name in answers[0]], classes=("azure", "lime", "rose"))
    flags = {"--data": str(flat), "--no-labels": True, "--teacher": str(file)}
    folder = run(load_recipe(plain, flags=flags), output_dir=tmp_path)
    results = RunFolder(folder).read_results()
    assert results["data"]["class_names"] == ["azure", "lime", "rose"]
    assert top1(folder, "teacher") == 1.0  # the labels are its own answers
    assert sum(results["data"]["counts"]["train"].values()) == 42


def test_the_folder_of_such_a_teacher_is_complete_without_its_file(plain, onnx_file, table, tmp_path, monkeypatch):
    script = tmp_path / "script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises another format
        torch.jit.trace(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16**2, 3)), torch.zeros(2, 3, 16, 16)).save(script)
    exact = {"mean": [0, 0, 0], "std": [1, 1, 1]}
    files = {"onnx": (onnx_file(ByColour()), exact), "table": (table(), {}), "script": (script, {**exact, "size": 16})}
    for kind, (file, settings) in files.items():
        flags = {"--allow-code": True} if kind == "script" else {}
        source = plain | {"teacher": {"weights": str(file), **settings}}
        first = load_recipe(source, flags=flags)
        shared = train_teachers(first, tmp_path / f"{kind}-sweep", SilentObserver(), None)
        file.unlink()
        monkeypatch.setattr(code_references, "_permitted", set())  # as in another process
        # A run with the file itself would be the same: test_a_table_and_its_network_teach_the_same_at_one_view.
        folder = run(load_recipe(source, shared, flags=flags), output_dir=tmp_path, name=kind,
                     stages=("teacher", "distilled"), evaluate=False)  # fmt: skip
        assert (folder / "distilled" / "model.json").is_file()
