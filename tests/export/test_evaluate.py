import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score

from potstill.cli import main
from potstill.code_references import allowed_code
from potstill.data.datasets import load_data
from potstill.data.settings import DataSettings
from potstill.errors import DataError, UsageError
from potstill.experiment.run_folder import SPLITS_HEADER
from potstill.export.evaluate import evaluate
from potstill.export.predict import predict
from potstill.input_spec import InputSpec
from potstill.io import as_csv, write_checksummed_text
from potstill.models.model_file import Classifier, save_model

CLASSES = ("red", "blue", "green")  # not in the order of the folders


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from potstill.models.factory import create_model

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("run") / "distilled"
    spec = InputSpec(8, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    save_model(Classifier(create_model("cifar/resnet8", 3, size=8), "cifar/resnet8", CLASSES, spec, {}), folder)
    return folder


def pictures(folder: Path, count: int, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> Path:
    draws = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(draws.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def by_scikit_learn(model: Path, folder: Path) -> tuple[float, float]:
    found = predict(model, [folder], top=1)
    truth, said = [each.path.parent.name for each in found], [each.classes[0][0] for each in found]
    return accuracy_score(truth, said), f1_score(truth, said, average="macro", zero_division=0)


def test_a_folder_of_classes_is_measured_whole_and_by_class_name(model: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "d", 7)
    metrics = evaluate(model.parent, str(folder))

    assert metrics["count"] == 21
    assert (metrics["top1"], metrics["f1_macro"]) == pytest.approx(by_scikit_learn(model, folder))
    assert [row["class"] for row in metrics["per_class"]] == list(CLASSES)
    assert metrics["data"] == f"{folder}, all images"


def test_of_a_folder_with_splits_only_test_counts(model: Path, tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2), ("test", 5)):
        pictures(tmp_path / "d" / split, count)

    metrics = evaluate(model, str(tmp_path / "d"))

    assert metrics["count"] == 15
    assert metrics["top1"] == pytest.approx(by_scikit_learn(model, tmp_path / "d" / "test")[0])


def test_a_class_may_be_missing_in_the_splits_that_are_not_read(model: Path, tmp_path: Path) -> None:
    pictures(tmp_path / "d" / "train", 3, CLASSES[:1])
    pictures(tmp_path / "d" / "val", 3, CLASSES[:2])
    pictures(tmp_path / "d" / "test", 5)

    metrics = evaluate(model, str(tmp_path / "d"))

    assert metrics["count"] == 15
    assert metrics["f1_macro"] == pytest.approx(by_scikit_learn(model, tmp_path / "d" / "test")[1])


def test_the_runs_own_data_is_measured_on_its_test_split(model: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "d", 10)
    data = {"source": str(folder), "test": 0.2, "unlabeled": str(tmp_path / "gone")}  # which evaluation does not need
    recipe = {"name": "r", "data": data, "teacher": {"model": "a"}}
    write_checksummed_text(model.parent / "recipe.yaml", json.dumps(recipe | {"student": {"model": "b"}}))
    splits = model.parent / "splits.csv"
    try:
        metrics = evaluate(model.parent, f"{folder}/../d")
        rows = load_data(DataSettings(**data | {"unlabeled": None})).as_rows()
        splits.write_text(as_csv(SPLITS_HEADER, rows), encoding="utf-8")
        assert evaluate(model.parent, str(folder)) == metrics | {"data": f"{folder}, test split of the run"}
        notes: list[str] = []
        shutil.copytree(folder, tmp_path / "copy")
        assert evaluate(model.parent, str(tmp_path / "copy"), note=notes.append)["seen_in_training"] == 24
        assert "24 of 30 images, such as blue/" in notes[0]
        pictures(tmp_path / "more", 40, seed=1)
        for image in (tmp_path / "more").glob("*/*.png"):
            image.rename(folder / image.parent.name / f"more{image.name}")
        assert "seen_in_training" not in evaluate(model.parent, str(pictures(tmp_path / "new", 3, seed=2)))
        with pytest.raises(DataError, match=r"has changed since .* test images were used in that training"):
            evaluate(model.parent, str(folder))
        (model.parent / "recipe.yaml").unlink()  # now it is a model of other data
        assert evaluate(model.parent, str(folder))["count"] == 150
    finally:
        for each in (splits, model.parent / "recipe.yaml"):
            each.unlink(missing_ok=True)

    assert metrics["count"] == 6  # a fifth of 10 in each of 3 classes
    assert "test split of the run" in metrics["data"]


def test_a_manifest_counts_as_it_says(model: Path, tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    (tmp_path / "list.csv").write_text("path,label\nred/0.png,red\nblue/1.png,blue\n")

    assert evaluate(model, str(tmp_path / "list.csv"))["count"] == 2


def test_data_for_tests_alone_need_no_train(model: Path, tmp_path: Path) -> None:
    pictures(tmp_path / "d" / "test", 5)
    rows = [f"d/test/{name}/{i}.png,{name},test\n" for name in CLASSES for i in range(5)]
    (tmp_path / "list.csv").write_text("".join(["path,label,split\n", *rows]))

    wanted = by_scikit_learn(model, tmp_path / "d" / "test")[0]
    for data in ("d", "list.csv"):
        assert evaluate(model, str(tmp_path / data))["top1"] == pytest.approx(wanted)


def test_shards_are_measured_whole(model: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "d", 4)
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        tar.add(folder, "")

    metrics = evaluate(model, str(tmp_path / "d.tar"))

    assert (metrics["count"], metrics["data"]) == (12, f"{tmp_path / 'd.tar'}, all images")
    assert metrics["top1"] == pytest.approx(by_scikit_learn(model, folder)[0])


def save_weights(path: Path, classes: int) -> str:
    """Save a network without class names that always predicts the first one; return its name."""
    from potstill.models.factory import create_model

    torch.manual_seed(0)
    network = create_model("cifar/resnet8", classes, size=32).eval()
    torch.nn.init.zeros_(network.head.weight)
    network.head.bias.data = torch.eye(classes)[0]
    torch.save(network.state_dict(), path)
    return f"cifar/resnet8@{path}"


def test_outputs_without_names_are_the_datas_classes_in_its_own_order(tmp_path: Path) -> None:
    """Sorted by name, they would be another network's: labels 0 and 1 are zebra and ant."""
    weights = save_weights(tmp_path / "w.pth", 2)
    (tmp_path / "own.py").write_text(
        "import numpy as np\nfrom potstill.data.image_sets import ArraySet\n"
        "class Images:\n"
        "    classes, targets = ['zebra', 'ant'], [0, 1, 0, 1, 0, 1, 0]\n"
        "    def __len__(self): return 7\n"
        "    def __getitem__(self, i): return np.full((9, 9, 3), 30 * i, np.uint8), i % 2\n"
        "def data(): return {'train': Images(), 'test': Images()}\n"
    )

    with allowed_code(True):
        metrics = evaluate(weights, f"{tmp_path / 'own.py'}:data")

    assert [row["class"] for row in metrics["per_class"]] == ["zebra", "ant"]
    assert metrics["top1"] == pytest.approx(4 / 7)


def test_outputs_without_names_are_the_classes_of_all_splits(tmp_path: Path) -> None:
    pictures(tmp_path / "d" / "train", 2)
    pictures(tmp_path / "d" / "test", 4, CLASSES[:2])
    notes: list[str] = []
    metrics = evaluate(save_weights(tmp_path / "w.pth", 3), str(tmp_path / "d"), note=notes.append)
    assert [row["class"] for row in metrics["per_class"]] == ["blue", "green", "red"]
    assert (metrics["count"], metrics["top1"]) == (8, 0.5)
    said = "its input is taken to be images of 32 px, with mean 0.485, 0.456, 0.406 and std 0.229, 0.224, 0.225"
    assert any(line.endswith(said) for line in notes)


def test_classes_that_the_model_does_not_know_are_refused(model: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "d", 1, ("red", "gren", "violet"))

    with pytest.raises(DataError, match=r"does not know 2 of these classes: 'gren'; did you mean 'green'\?, 'violet'"):
        evaluate(model, str(folder))


def test_what_is_not_there_or_broken_is_said(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        evaluate(model, str(tmp_path / "nowhere"))
    folder = pictures(tmp_path / "d", 1)
    (folder / "red" / "note.jpg").write_text("text")
    with pytest.raises(DataError, match=r"note\.jpg"):
        evaluate(model, str(folder))
    exported = tmp_path / "m.onnx"
    exported.write_bytes(b"x")
    with pytest.raises(UsageError, match=r"m\.onnx is an ONNX file, not a run or weights: give the run"):
        evaluate(exported, "digits")
    exported.rename(tmp_path / "m.xml")
    with pytest.raises(UsageError, match=r"m\.xml is a file for OpenVINO, .*potstill predict takes \.onnx files"):
        evaluate(tmp_path / "m.xml", "digits")


def test_the_verb_prints_people_or_json(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pictures(tmp_path / "d", 2)

    assert main(["evaluate", str(model), "--data", str(folder), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(model), "--data", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()

    assert metrics["count"] == 6
    assert f"top1             {100 * metrics['top1']:>6.1f} %" in lines
    assert sum(line.split()[:1] == [name] for name in CLASSES for line in lines) == 3
    assert main(["evaluate", str(model), "--data", str(tmp_path / "nowhere")]) == 2
