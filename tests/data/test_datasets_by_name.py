"""Data sets from code outside of the package: by its place, and by the entry points of installed packages."""

import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from potstill.cli import main
from potstill.code_references import _permitted, permit_code
from potstill.config.recipe import load_recipe
from potstill.data import datasets
from potstill.data.datasets import check_source, from_torch, load_data
from potstill.data.image_sets import FileSet
from potstill.data.settings import DataSettings
from potstill.data.validation.validate import quick_findings, validate_data
from potstill.errors import DataError, PotstillError, UsageError

from .conftest import write_image

CODE = """
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from potstill.data.builtin.digits import digits


def shades(count: int = 30, *, spread: int = 10):
    "Gray images, whose even ones are dark."
    random = np.random.default_rng(0)
    pixels = np.clip(random.normal([[[60]], [[180]]] * (count // 2), spread, (count, 16, 16)), 0, 255).astype(np.uint8)
    return [(Image.fromarray(each), ["dark", "light"][i % 2]) for i, each in enumerate(pixels)]


def tensors():
    train = torch.utils.data.TensorDataset(torch.arange(24, dtype=torch.uint8).reshape(8, 3, 1, 1), torch.arange(8) % 2)
    return {"train": train, "val": train, "test": [(train[5][0], 1), (train[4][0], 0)], "class_names": ["even", "odd"]}


def files(root):
    return {"train": [(path, path.parent.name) for path in sorted(Path(root).glob("*/*.png"))]}


def ours(settings):
    return digits(settings)


def failing():
    raise KeyError("no images")


def mapping(**returned):
    return returned


def item(kind):
    image = np.zeros((4, 4, 3), np.uint8)
    items = {
        "text": "ab", "alone": image, "half": (image, 1.5), "word": (image, "red"), "nothing": (None, 0),
        "gone": ("gone.png", 0), "class": (image, 7), "floats": (np.full((4, 4), 2.0), 0),
    }
    return {"train": [items[kind], (image, 1)] * 3, "class_names": ["dark", "light"]}


number = 3
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A function from a callable's name to its reference, which is permitted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("potstill.code_references._permitted", set(_permitted))
    (tmp_path / "mine.py").write_text(textwrap.dedent(CODE))

    def reference(name: str) -> str:
        permit_code([found := f"{tmp_path}/mine.py:{name}"])
        return found

    return reference


def load(source: str, **options: object):
    return load_data(DataSettings(source=source, options=options))


def test_one_set_of_images_and_class_names(code) -> None:
    data = load(code("shades"), count=40)
    assert data.class_names == ("dark", "light")
    assert data.counts() == {"train": {"dark": 14, "light": 14}, "val": {"dark": 3, "light": 3},
                             "test": {"dark": 3, "light": 3}}  # fmt: skip
    assert data.source.endswith("mine.py:shades")
    means = [data.train.pixels(i).mean() for i in range(28)]
    assert all((mean > 120) == bool(label) for mean, label in zip(means, data.train.labels, strict=True))
    assert load(code("shades"), count=40).fingerprint == data.fingerprint
    assert load(code("shades"), count=40, spread=11).fingerprint != data.fingerprint


def test_splits_of_tensors_and_ids(code) -> None:
    data = load(code("tensors"))
    assert [len(each) for each in (data.train, data.val, data.test)] == [8, 8, 2]
    assert data.class_names == ("even", "odd")
    assert data.test.pixels(0).tolist() == [[[15, 16, 17]]]
    assert data.test.labels.tolist() == [1, 0]


def test_files_are_read_as_those_of_a_folder(code, make_folder, tmp_path) -> None:
    folder = make_folder({"cat": 8, "dog": 8})
    (folder / "dog" / "0.png").write_bytes((folder / "cat" / "0.png").read_bytes())
    data, plain = load(code("files"), root=str(folder)), load_data(DataSettings(source=str(folder)))
    # The split is drawn by the same names, the pixels are equal, and so is the fingerprint of both.
    assert data.as_rows() == plain.as_rows()
    assert data.fingerprint == plain.fingerprint
    assert "two-labels" in {each.kind for each in quick_findings(data)}
    (folder / "dog" / "3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"(?s)mine.py:files.*1 unreadable image.*dog/3\.png"):
        load(code("files"), root=str(folder))
    report = validate_data(DataSettings(source=code("shades")))
    assert (report.images, report.count("error")) == (30, 0)


def test_paths_from_python(tmp_path: Path) -> None:
    for i in range(6):
        write_image(tmp_path / f"{i}.png", i)
    pairs = [(str(tmp_path / f"{i}.png"), i % 2) for i in range(6)]
    data = from_torch(pairs)
    assert isinstance(data.train.images, FileSet)
    with Image.open(tmp_path / data.train.names[0]) as image:
        np.testing.assert_array_equal(data.train.pixels(0), np.asarray(image))
    with pytest.raises(DataError, match=r"0\.png is listed 2 times"):
        from_torch([*pairs, pairs[0]])
    with pytest.raises(DataError, match="train/00006: images must be all paths or all none, got an object of type Im"):
        from_torch([*pairs, (Image.new("L", (8, 8)), 0)])
    with pytest.raises(DataError, match="labels must be all whole numbers or all class names"):
        from_torch([*pairs, (str(tmp_path / "5.png"), "cat")])


def test_a_function_of_the_settings(code) -> None:
    data = load(code("ours"))
    assert data.fingerprint == load("digits").fingerprint
    assert data.source.endswith("mine.py:ours")


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("failing", {}, DataError, r"raised KeyError: 'no images' \(.*mine\.py, line 32\)"),
        ("number", {}, UsageError, "is an object of type int; it must be a callable"),
        ("shade", {}, UsageError, "has no 'shade'; did you mean 'shades'"),
        ("shades", {"cuont": 3}, UsageError, "unknown option 'cuont' .allowed: count, spread.; did you mean 'count'"),
        ("files", {}, UsageError, "option root is required: --set data.options.root=VALUE"),
        ("mapping", {"test": []}, DataError, "a mapping with no key 'train'"),
        ("mapping", {"train": [], "tset": []}, DataError, "the key 'tset'; did you mean 'test'"),
        ("mapping", {"train": 3}, DataError, r"train: a data set has a length and items \(image, label\), got 3"),
        ("mapping", {"train": [], "class_names": "ab"}, DataError, "class_names must be a list of names, got str"),
        ("item", {"kind": "text"}, DataError, "train/00000: an item must be a pair .image, label., got .* type str"),
        ("item", {"kind": "alone"}, DataError, "train/00000: an item must be a pair .* type ndarray"),
        ("item", {"kind": "half"}, DataError, "train/00000: a label must be a whole number or a class name, got 1.5"),
        ("item", {"kind": "word"}, DataError, "labels must be all whole numbers or all class names, got both"),
        ("item", {"kind": "nothing"}, DataError, "train/00000: an image must be a PIL image, an array or a tensor"),
        ("item", {"kind": "gone"}, DataError, "train/00001: images must be all paths or all none"),
        ("item", {"kind": "class"}, DataError, "train has label 7, but there are 2 classes"),
        ("item", {"kind": "floats"}, DataError, r"train/00000: floats must be in \[0, 1\]"),
    ],
)
def test_what_cannot_be_used_is_one_message(code, name, options, kind, message) -> None:
    with pytest.raises(PotstillError, match=message) as caught:
        load(code(name), **options)
    assert type(caught.value) is kind
    assert "mine.py" in str(caught.value)


def test_code_in_a_file_needs_permission(code, tmp_path, capsys) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "data: {source: mine.py:shades, size: 16}\nteacher: {model: cifar/resnet14, training: {epochs: 1}}\n"
        "student: {model: cifar/resnet8}\ntraining: {epochs: 1}\n"
    )
    with pytest.raises(UsageError, match=r"mine\.yaml:1:8: .*mine\.py:shades\n.*--allow-code"):
        load_recipe(recipe)
    with pytest.raises(UsageError, match=r"add --allow-code"):
        check_source(DataSettings(source="mine.py:shades"))
    run = ["train", str(recipe), "--stage", "baseline", "--output-dir", str(tmp_path), "--name", "r"]
    assert main(run) == 2
    assert not (tmp_path / "r").exists()
    assert main([*run, "--allow-code"]) == 0
    capsys.readouterr()
    # The command line asks for the same split of the run by a relative name.
    assert main(["evaluate", str(tmp_path / "r" / "baseline"), "--data", "mine.py:shades"]) == 0
    assert "test split of the run" in capsys.readouterr().out
    assert main(["check", "mine.py:shades"]) == 0


def test_the_command_line_is_permission(code, tmp_path) -> None:
    recipe = load_recipe("quickstart", flags={"--data": "mine.py:shades"})
    assert recipe.data.source == f"{tmp_path}/mine.py:shades"
    with pytest.raises(UsageError, match="has no 'nope'"):
        load_recipe("quickstart", flags={"--data": "mine.py:nope"})


@pytest.fixture
def installed(code, tmp_path, monkeypatch):
    """A package of one file with data sets: one that works, one of a name of ours, and one that is broken."""
    info = tmp_path / "site" / "pictures-1.0.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "site" / "pictures.py").write_text(textwrap.dedent(CODE))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pictures\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[potstill.datasets]\nshades = pictures:shades\ndigits = pictures:shades\nbroken = pictures:nothing\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    datasets._plugins.cache_clear()
    yield
    datasets._plugins.cache_clear()


def test_one_file_of_an_installed_package_is_a_data_set(installed) -> None:
    data = load("shades", count=20)
    assert (data.source, data.class_names) == ("shades", ("dark", "light"))
    assert load_recipe("quickstart", flags={"--data": "shades"}).data.source == "shades"
    assert len(load("digits").class_names) == 10  # a package cannot replace a built-in data set
    with pytest.raises(UsageError, match="did you mean 'shades'"):
        check_source(DataSettings(source="shadse"))
    with pytest.raises(UsageError, match="'broken' of the installed package pictures cannot be loaded: AttributeError"):
        check_source(DataSettings(source="broken"))
