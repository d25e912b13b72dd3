"""What a user gets wrong: one clear message, the right exit code, no traceback, nothing lost."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import potstill
from potstill.cli import main
from potstill.data.datasets import from_torch
from potstill.errors import UsageError

SMALL = [
    *(
        "--set",
        "data.size=16",
        "--set",
        "data.workers=0",
        "--set",
        "training.epochs=1",
        "--set",
        "training.precision=float32",
    ),
    *("--set", "teacher.model=cifar/resnet8", "--set", "teacher.training.epochs=1"),
]


def images(folder, count, *classes):
    random = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(random.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return images(tmp_path_factory.mktemp("good"), 10, "a", "b")


def no_folder(path):
    return path / "nowhere"


def empty_class(path):
    images(path, 10, "a", "b")
    (path / "c").mkdir()
    return path


def one_class(path):
    return images(path, 10, "a")


def no_class(path):
    return path


def text_as_image(path):
    images(path, 10, "a", "b")
    (path / "a" / "notes.jpg").write_text("no picture")
    return path


def class_missing_in_val(path):
    images(path / "train", 10, "a", "b")
    images(path / "val", 3, "a")
    images(path / "test", 3, "a", "b")
    return path


def too_few(path):
    return images(path, 2, "a", "b")


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (no_folder, 2, ["nowhere", "cifar100, digits, fashion-mnist, solar"]),
        (empty_class, 3, ["/c: no images"]),
        (one_class, 3, ["at least two classes, found only 'a'"]),
        (no_class, 3, ["no class folder"]),
        (text_as_image, 3, ["notes.jpg", "no image"]),
        (class_missing_in_val, 3, ["'b'", "val"]),
        (too_few, 3, ["needs at least 3, but 'a' has 2"]),
    ],
)
def test_data(make, code, says, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    source = make(tmp_path / "data")
    check(
        ["run", "quickstart", "--data", str(source), *SMALL, "--output-dir", str(tmp_path / "runs")], code, says, capsys
    )
    assert not (tmp_path / "runs" / "quickstart").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--student", "resnet81"], ["no model 'resnet81'", "did you mean", "timm/resnet18"]),
        (["--student", "runs/encoder"], ["no model 'runs/encoder', nor a run or model folder of this name"]),
        (["--set", "method.name=kdd"], ["no method 'kdd'; did you mean 'kd'?"]),
        (["--set", "method.temperature=0"], ["temperature must be above 0, got 0"]),
        (["--set", "method.alpha=1.2"], ["alpha must be from 0 to 1, got 1.2"]),
        (["--set", "training.lr=fast"], ["--set training.lr=fast", "a number", "'fast'"]),
        (["--set", "training.optimizer=adamm"], ["'adamm' in torch.optim; did you mean 'adam"]),
        (["--set", "trainin.lr=1"], ["did you mean 'training'?"]),
        (["--name", "../escape"], ["1 to 64 of the characters"]),
    ],
)
def test_settings(arguments, says, good, tmp_path, capsys):
    check(
        ["run", "quickstart", "--data", str(good), *SMALL, *arguments, "--output-dir", str(tmp_path / "runs")],
        2,
        says,
        capsys,
    )
    assert not (tmp_path / "runs" / "quickstart").exists()


def test_a_pretrained_teacher_without_network_is_explained_at_once(good, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    arguments = ["run", "quickstart", "--data", str(good), *SMALL, "--set", "teacher.model=resnet18"]
    arguments += ["--set", "teacher.weights=pretrained"]
    check(
        [*arguments, "--output-dir", str(tmp_path / "runs")],
        2,
        ["resnet18", "the hub cannot be reached", "efficientnet-lite0"],
        capsys,
    )
    assert not (tmp_path / "runs" / "quickstart").exists()


def test_a_root_that_cannot_be_written(good, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["run", "quickstart", "--data", str(good), *SMALL, "--output-dir", str(tmp_path / "file")]
    check(arguments, 5, ["cannot write to", str(tmp_path / "file")], capsys)


def test_a_run_that_exists_and_a_teacher_of_other_classes(good, tmp_path, capsys):
    root = ["--output-dir", str(tmp_path / "runs")]
    train = ["train", "quickstart", "--stage", "teacher", "--data", str(good), *SMALL, "--name", "t", *root]
    assert main(train) == 0
    before = (tmp_path / "runs" / "t" / "results.json").read_bytes()
    check(train, 2, ["exists", "--resume", "--overwrite", "--name t-2"], capsys)
    # A replacement that cannot begin replaces nothing.
    check([*train, "--overwrite", "--set", "training.optimizer=adamm"], 2, ["adamm"], capsys)
    assert (tmp_path / "runs" / "t" / "results.json").read_bytes() == before

    shutil.copytree(good, tmp_path / "other")
    (tmp_path / "other" / "b").rename(tmp_path / "other" / "c")
    teacher = ["--teacher", str(tmp_path / "runs" / "t")]
    arguments = ["run", "quickstart", "--data", str(tmp_path / "other"), *SMALL, *teacher, *root]
    check(arguments, 4, ["has other classes", "a, b", "a, c", "teacher.head=probe"], capsys)
    assert not (tmp_path / "runs" / "quickstart").exists()

    model = tmp_path / "runs" / "t" / "teacher" / "model.safetensors"
    damaged = bytearray(model.read_bytes())
    damaged[-1] ^= 1
    model.write_bytes(damaged)
    check(["predict", str(tmp_path / "runs" / "t"), str(good)], 4, ["damaged", "model.safetensors"], capsys)


def test_predict_and_evaluate_name_what_is_not_there(tmp_path, good, capsys):
    check(["predict", str(tmp_path / "none"), str(good)], 2, ["does not exist"], capsys)
    check(["evaluate", str(tmp_path / "none"), "--data", str(good)], 2, ["does not exist"], capsys)


def check(arguments, code, says, capsys):
    capsys.readouterr()
    assert main(arguments) == code
    shown = capsys.readouterr()
    message = shown.err
    assert message.startswith("error: ") or "\nerror: " in message
    assert "Traceback" not in message
    assert len(message.strip().splitlines()) <= 8
    for part in says:
        assert part in message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: potstill.run(None),
            "recipe must be the name of a recipe, a YAML file or its content as a dict, got None",
        ),
        (lambda: potstill.run("quickstart", overrides=3), "overrides must be a list or tuple of KEY=VALUE, got int"),
        (lambda: potstill.run("quickstart", overrides=[3]), "each of overrides must be a text, KEY=VALUE, got int"),
        (lambda: potstill.run("quickstart", name=Path("x")), "name must be a text or None, got PosixPath"),
        (lambda: potstill.run("quickstart", output_dir=None), "output_dir must be a folder, got NoneType"),
        (lambda: potstill.fit("photos", under=5), "under must be a text such as '5ms,2MB', or None, got int"),
        (lambda: potstill.fit("photos", within=5), "within must be a text such as '30min', or None, got int"),
        (lambda: potstill.shrink(None), "run must be a run folder, got NoneType"),
        (lambda: potstill.shrink("runs/x", max_loss="1"), "max_loss must be a number of points, got str"),
        (lambda: potstill.load(None), "path must be a run folder or a model folder, got NoneType"),
        (lambda: potstill.predict("runs/x", None), "inputs must be paths of images and folders, got NoneType"),
        (lambda: potstill.predict("runs/x", [None]), "each of inputs must be a path, got NoneType"),
        (lambda: potstill.predict("runs/x", "no.png"), "no such image or folder: no.png"),
        (
            lambda: potstill.predict(None, [__file__]),
            "model must be a run folder, a model or an exported file, got None",
        ),
    ],
)
def test_arguments_of_another_type_are_one_message(call, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        call()


def test_splits_of_python_hold_image_sets():
    images = [(np.zeros((8, 8, 3), dtype=np.uint8), at % 2) for at in range(20)]
    data = replace(from_torch(images), unlabeled=images)
    with pytest.raises(UsageError, match=r"data\.unlabeled must be an ImageSet, such as from_torch.* got list"):
        potstill.run("quickstart", data=data)
