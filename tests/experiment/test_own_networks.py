"""Whole runs with networks of the user's own: modules from Python, code by name, other people's weights."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import potstill
from potstill.cli import main
from potstill.config.recipe import load_recipe
from potstill.errors import UsageError
from potstill.experiment.pipeline import run
from potstill.experiment.run_folder import RunFolder
from potstill.input_spec import InputSpec
from potstill.models.factory import create_model
from potstill.models.families.own_models import given_networks
from potstill.models.model_file import load_model
from potstill.training.callbacks import SilentObserver

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(8, num_classes)

    def forward(self, images):
        return self.head(self.body(images))

def by_colour():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3, bias=False))
    network[2].weight.data = 5 * torch.eye(3)[[2, 1, 0]]  # blue, green, red
    return network
"""


def by_colour(order=(2, 1, 0)) -> nn.Module:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3, bias=False))
    network[2].weight.data = 5 * torch.eye(3)[list(order)]
    return network


class Notes(SilentObserver):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(text)


EXACT = InputSpec(16, (0.0,) * 3, (1.0,) * 3)


@pytest.fixture
def plain(recipe):
    return recipe(**{"data.size": EXACT.size}).model_dump(mode="json")


def test_modules_from_python(plain, tmp_path):
    teacher, student = by_colour(), create_model("cifar/resnet8", 3, size=16)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    notes = Notes()
    folder = potstill.run(
        plain, teacher=teacher, student=student, teacher_input=EXACT, output_dir=tmp_path, observer=notes
    )
    results = RunFolder(folder).read_results()
    assert results["stages"]["teacher"]["test"]["top1"] == 1.0
    assert results["stages"]["teacher"]["model"]["architecture"] == "python/teacher"
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert any("teacher: top-1 100.0%" in line for line in notes.lines)
    again = potstill.load(folder, module=create_model("cifar/resnet8", 3, size=16))
    assert again.class_names == ("blue", "green", "red")
    assert again.input.mean == InputSpec.mean
    assert load_model(folder / "teacher", module=by_colour()).input == EXACT
    more = Notes()
    networks = {"teacher": teacher, "student": student, "teacher_input": EXACT}
    potstill.run(plain, **networks, output_dir=tmp_path, resume=True, observer=more)
    assert "distilled: already trained" in more.lines


def test_the_teacher_is_shown_what_the_student_is_where_nothing_is_said(plain, tmp_path):
    spec = InputSpec(12, (0.3,) * 3, (0.4,) * 3)
    changes = ("training.epochs=1",)
    folder = potstill.run(
        plain, overrides=changes, teacher=by_colour(), student_input=spec, output_dir=tmp_path,
        student=lambda num_classes: create_model("cifar/resnet8", num_classes, size=12),
    )  # fmt: skip
    assert load_model(folder / "teacher", module=by_colour()).input == spec
    assert potstill.load(folder, module=create_model("cifar/resnet8", 3, size=12)).input == spec


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"teacher": "resnet18"}, "teacher must be an nn.Module or a callable that returns one, got str"),
        ({"student": 3}, "student must be an nn.Module"),
        ({"teacher": []}, "teacher is an empty list"),
        ({"data": "photos"}, "data must be DataSplits, got str: from_torch"),
        (
            {"overrides": "training.epochs=1"},
            "overrides must be a list or tuple of KEY=VALUE",
        ),
        (
            {"teacher": by_colour(), "overrides": ("teacher.model=cifar/resnet8",)},
            "teacher.model of overrides would replace the network that is given",
        ),
        ({"teacher_input": EXACT}, "teacher_input needs teacher"),
        ({"teacher": nn.Linear(2, 2)}, "python/teacher cannot take images of 16 px"),
        ({"teacher": nn.Sequential(nn.Flatten(), nn.Linear(768, 4))}, r"gives \(1, 4\) instead of \(1, 3\)"),
        ({"student": lambda: None}, "python/student.* returned None"),
        (
            {"teacher": nn.Sequential(by_colour(), nn.Softmax(1)), "teacher_input": EXACT},
            "python/teacher returns probabilities: the 3 numbers of an image sum to 1",
        ),
        (
            {"student": lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(768, num_classes), nn.Softmax(1))},
            "python/student.* returns probabilities",
        ),
    ],
)
def test_what_is_no_network_is_refused_before_training(plain, tmp_path, wrong, message):
    with pytest.raises(UsageError, match=message):
        potstill.run(plain, output_dir=tmp_path, **wrong)


def test_a_permuted_teacher_is_recognised_and_the_line_to_write_mends_it(plain, tmp_path):
    notes = Notes()
    turned = by_colour((0, 2, 1))  # red, blue, green
    folder = potstill.run(
        plain, overrides=("teacher_below_baseline=stop", "training.epochs=12"), teacher=turned, teacher_input=EXACT,
        output_dir=tmp_path, name="a", observer=notes,
    )  # fmt: skip
    found = next(line for line in notes.lines if "classes in another order" in line)
    results = RunFolder(folder).read_results()
    assert found.split("Give the class")[1] in results["not_distilled"]
    assert "better teacher" not in results["not_distilled"]
    assert results["teacher_below_baseline"][0]["other_class_order"] is True
    setting = found.split("--set ")[1].strip().strip("'")
    assert setting == 'teacher.classes=["red", "blue", "green"]'
    folder = potstill.run(
        plain, overrides=(setting,), teacher=turned, teacher_input=EXACT, output_dir=tmp_path, name="b"
    )
    assert RunFolder(folder).read_results()["stages"]["teacher"]["test"]["top1"] == 1.0


def test_a_permuted_teacher_ends_a_training_without_baseline(recipe, tmp_path):
    teacher = {"teacher.model": "python/teacher", "teacher.weights": "own"}
    permuted = recipe(**teacher, **{"data.size": EXACT.size, "teacher_below_baseline": "stop"})
    given = given_networks({"python/teacher": (by_colour((0, 2, 1)), EXACT)})
    with given, pytest.raises(UsageError) as caught:
        run(permuted, output_dir=tmp_path, stages=("teacher", "distilled"))
    assert 'teacher.classes=["red", "blue", "green"]' in str(caught.value)
    assert "teacher_below_baseline=warn" in str(caught.value)


def test_a_function_from_python_teaches_with_the_method_auto(plain, tmp_path):
    def by_mean(images):
        return 5 * images.mean((2, 3))[:, [2, 1, 0]]

    folder = potstill.run(plain | {"method": {"name": "auto"}}, teacher=by_mean, output_dir=tmp_path)
    assert load_recipe(folder / "recipe.yaml", recorded=True).method["name"] == "dist"  # which reads logits alone


def test_fit_takes_no_data_of_python():
    with pytest.raises(UsageError, match="fit takes a folder, a manifest or a name as data, got list"):
        potstill.fit([])


@pytest.fixture
def code(tmp_path):
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path / "mine.py"


def cli(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(each) for each in arguments])
    return code, *capsys.readouterr()


def test_code_on_the_command_line_and_its_saved_models(photographs, code, tmp_path, capsys, monkeypatch):
    run = ("run", "quickstart", "--data", photographs, "--image-size", 16, "--epochs", 1, "--output-dir", tmp_path)
    found = cli(capsys, *run, "--teacher", f"{code}:by_colour@own", "--student", f"{code}:Net", "--name", "r",
                "--set", "data.mean=[0,0,0]", "--set", "data.std=[1,1,1]")  # fmt: skip
    assert found[0] == 0, found[2]
    facts = json.loads((tmp_path / "r" / "distilled" / "model.json").read_text())
    assert facts["architecture"] == f"{code}:Net"
    assert f"predict {tmp_path / 'r'} IMAGE --allow-code" in " ".join((found[1] + found[2]).split())

    from potstill import code_references

    monkeypatch.setattr(code_references, "_permitted", set())  # another process
    for verb in (("evaluate", tmp_path / "r", "--data", photographs), ("predict", tmp_path / "r", photographs)):
        refused = cli(capsys, *verb)
        assert refused[0] == 4
        assert "--allow-code" in refused[2]
        assert cli(capsys, *verb, "--allow-code")[0] == 0
    teacher = ("evaluate", tmp_path / "r" / "teacher", "--data", photographs, "--json", "--allow-code")
    assert json.loads(cli(capsys, *teacher)[1])["top1"] == 1.0

    monkeypatch.setattr(code_references, "_permitted", set())
    again = ("train", "quickstart", "--stage", "distilled", "--teacher", tmp_path / "r", *run[2:])
    refused = cli(capsys, *again)
    assert refused[0] == 2
    assert "--allow-code" in refused[2]
    trained = cli(capsys, *again, "--allow-code")
    assert trained[0] == 0
    assert trained[1].rstrip().endswith("IMAGE")  # the student alone predicts, and is no code


def test_a_recipe_file_that_names_code_needs_permission(photographs, code, tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("teacher: {model: cifar/resnet8}\nstudent: {model: 'mine.py:Net'}\n")
    stage = ("train", recipe, "--stage", "baseline", "--data", photographs, "--image-size", 16, "--epochs", 1,
             "--output-dir", tmp_path)  # fmt: skip
    refused = cli(capsys, *stage)
    assert refused[0] == 2
    assert "mine.py:Net" in refused[2]
    assert "--allow-code" in refused[2]
    assert cli(capsys, *stage, "--allow-code")[0] == 0


def test_code_that_was_edited_since_the_run_was_started_is_named_on_resume(photographs, code, tmp_path, capsys):
    run = ("run", "quickstart", "--data", photographs, "--image-size", 16, "--epochs", 1, "--output-dir", tmp_path,
           "--teacher", f"{code}:by_colour@own", "--student", f"{code}:Net", "--name", "r")  # fmt: skip
    assert cli(capsys, *run)[0] == 0
    for text, warns in ((CODE, False), (CODE + "# another line", True), (CODE + "# another line", True)):
        code.write_text(text)
        found = cli(capsys, *run, "--resume")
        assert found[0] == 0, found[2]
        assert ("mine.py:Net has changed since" in found[2]) == warns
        warned = json.loads((tmp_path / "r" / "results.json").read_text())["warnings"]
        assert any("mine.py:Net has changed since" in line for line in warned) == warns
    code.write_text(CODE.replace("nn.ReLU()", "nn.Sigmoid()"))
    found = cli(capsys, *run, "--resume", "--seeds", 2)
    assert found[0] == 4
    assert "computes other outputs than when this model was saved" in found[2]


def test_bare_weights_are_evaluated_and_predict(photographs, code, tmp_path, capsys):
    torch.manual_seed(3)
    network = create_model("cifar/resnet8", 3, size=32)
    torch.save({"net": network.state_dict()}, tmp_path / "w.th")
    (tmp_path / "names.txt").write_text("red\nblue\ngreen\n")
    for model in (tmp_path / "w.th", f"cifar/resnet8@{tmp_path / 'w.th'}"):
        found = cli(capsys, "evaluate", model, "--data", photographs, "--json")
        assert found[0] == 0, found[2]
        assert "weights are taken from 'net'" in found[2]
        assert "data's classes, in order" in found[2]
        shares = json.loads(found[1])
        other = json.loads(cli(capsys, "evaluate", model, "--data", photographs, "--json",
                               "--classes", tmp_path / "names.txt")[1])  # fmt: skip
        assert [row["class"] for row in other["per_class"]] == ["red", "blue", "green"]
        assert [row["class"] for row in shares["per_class"]] == ["blue", "green", "red"]
        images = sorted(Path(photographs).rglob("*.png"))[:2]
        numbered = cli(capsys, "predict", model, *images)
        assert numbered[0] == 0
        assert "output 0" in numbered[1]
        assert "blue" in cli(capsys, "predict", model, *images, "--classes", tmp_path / "names.txt")[1]
    colours = cli(capsys, "evaluate", f"{code}:by_colour@own", "--data", photographs, "--json")
    assert json.loads(colours[1])["count"] == 60
    wrong = cli(capsys, "evaluate", tmp_path / "w.th", "--data", photographs, "--classes", "cifar10")
    assert wrong[0] == 2
    assert "names 10 classes, and" in wrong[2]
    unknown = cli(capsys, "evaluate", f"cifar/resnet9@{tmp_path / 'w.th'}", "--data", photographs)
    assert unknown[0] == 2
    assert "cifar/resnet8" in unknown[2]
    assert cli(capsys, "evaluate", tmp_path / "gone.th", "--data", photographs)[0] == 2


def test_class_names_beside_weights_of_a_hub_folder_are_used(plain, code, tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    torch.save(by_colour((0, 2, 1)).state_dict(), folder / "pytorch_model.bin")
    exact = ("data.mean=[0,0,0]", "data.std=[1,1,1]")
    teacher = ("teacher.model=" + f"{code}:by_colour", f"teacher.weights={folder}")
    for names, top1 in ((["red", "blue", "green"], 1.0), (["green", "red", "blue"], 0.0)):
        config = {"id2label": {str(at): name.upper() for at, name in enumerate(names)}}
        (folder / "config.json").write_text(json.dumps(config))
        run = potstill.run(plain, overrides=(*teacher, *exact, "training.epochs=1"), output_dir=tmp_path, name=names[0])
        assert RunFolder(run).read_results()["stages"]["teacher"]["test"]["top1"] == top1


def test_several_outputs_of_a_teacher_are_one_class(plain, tmp_path):
    many = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5, bias=False))
    many[2].weight.data = torch.tensor([[5.0, 0, 0], [5.0, 0, 0], [0, 5.0, 0], [0, 0, 5.0], [2.0, 2.0, 2.0]])
    wanted = "teacher.classes={blue: [3], green: 2, red: [0, 1]}"
    folder = potstill.run(
        plain,
        overrides=(wanted, "method.name=kd", "training.epochs=1"),
        teacher=many,
        teacher_input=EXACT,
        output_dir=tmp_path,
    )
    assert RunFolder(folder).read_results()["stages"]["teacher"]["test"]["top1"] == 1.0
    saved = load_model(folder / "teacher", module=many)
    assert saved.output_groups is not None
    assert saved.output_groups.groups == ((3,), (2,), (0, 1))
    wrong = "teacher.classes={blue: [7], green: 2, red: [0, 1]}"
    with pytest.raises(UsageError, match=r"teacher.classes: 'blue': the network has outputs 0 to 4, got 7"):
        potstill.run(plain, overrides=(wrong,), teacher=many, teacher_input=EXACT, output_dir=tmp_path, name="w")
