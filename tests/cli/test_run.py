"""run, train and report hand the right things on and print what came of it; the parts behind them are stood in for."""

import contextlib
import io
import itertools
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from potstill.cli import main
from potstill.cli import run as run_command
from potstill.errors import ArtifactError, UsageError
from potstill.experiment.run_folder import RunFolder
from potstill.io import write_checksummed_json
from potstill.training.callbacks import SignalHandler

STAGE = {"model": {"parameters": 7}, "latency_ms": None, "test": {"top1": 0.5}}


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the pipeline was called with; the current folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    made: list[dict[str, Any]] = []

    def run(recipe: Any, *, output_dir: Path, name: str | None, observer: Any, **rest: Any) -> Path:
        made.append({"recipe": recipe, "output_dir": output_dir, "name": name, **rest})
        observer.note("the pipeline ran")
        folder = output_dir / (name or recipe.name)
        folder.mkdir(parents=True)
        results = {"schema": 1, "stages": {"teacher": STAGE}, "comparison": None}
        write_checksummed_json(folder / "results.json", results)
        return folder

    def compare(runs: list[Path], output: Path) -> Path:
        made.append({"compared": runs})
        return output

    stand_ins = {
        "potstill.experiment.pipeline": SimpleNamespace(run=run),
        "potstill.report.render": SimpleNamespace(render=lambda folder: folder / "report.html"),
        "potstill.report.compare": SimpleNamespace(compare=compare),
        "potstill.data.datasets": SimpleNamespace(
            check_source=lambda settings: None, check_target=lambda settings: None
        ),
    }
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


def test_run_trains_everything_and_says_what_to_do_next(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "run",
        "quickstart",
        "--set",
        "training.epochs=3",
        "--set",
        "training.lr=0.5",
        "--output-dir",
        "my runs",
    ]
    assert main([*arguments, "--seed", "4", "--student", "resnet18", "--overwrite"]) == 0

    (call,) = calls
    recipe = call["recipe"]
    assert (recipe.training.epochs, recipe.training.lr, recipe.seed, recipe.student.model) == (3, 0.5, 4, "resnet18")
    assert isinstance(call["stopping"], SignalHandler)
    assert {**call, "recipe": None, "stopping": None} == {
        "recipe": None, "output_dir": Path("my runs"), "name": None, "resume": False, "overwrite": True,
        "stopping": None, "baseline": None,
    }  # fmt: skip
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "",
        "          top-1  top-3  macro F1  AUC  parameters  file  latency",
        "teacher  50.0 %      –         –    –           7     –        –",
        "",
        "report: my runs/quickstart/report.html",
        "next:   potstill predict 'my runs/quickstart' IMAGE",
    ]
    assert captured.err == "the pipeline ran\n"


def test_several_teachers_by_a_repeated_flag(calls: list[dict[str, Any]]) -> None:
    assert main(["run", "quickstart", "--teacher", "resnet18", "--teacher", "cifar/vgg8@pretrained"]) == 0
    assert main(["run", "quickstart", "--teacher", "resnet18", "--name", "one"]) == 0
    assert main(["run", "quickstart", "--name", "none"]) == 0

    teachers = [[(each.model, each.weights) for each in call["recipe"].teacher_list] for call in calls]
    assert teachers == [
        [("resnet18", None), ("cifar/vgg8", "pretrained")],
        [("resnet18", None)],
        [("cifar/vgg8", None)],
    ]


def test_a_flag_that_the_teachers_own_settings_override_is_named(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    # The recipe's teacher has 15 epochs of its own, and no learning rate.
    said = "--epochs 3 is for the students: teacher.training.epochs stays 15; --set teacher.training.epochs=3 changes"
    cases = (
        (["run", "quickstart", "--epochs", "3", "--lr", "0.1"], True),
        (["train", "quickstart", "--stage", "teacher", "--epochs", "3"], True),
        (["train", "quickstart", "--stage", "baseline", "--epochs", "3"], False),
        (["run", "quickstart", "--epochs", "15"], False),
        (["run", "quickstart", "--epochs", "3", "--set", "teacher.training.epochs=3"], False),
        (["run", "quickstart", "--epochs", "3", "--teacher", "cifar/vgg8@pretrained"], False),  # it is not trained
    )
    for at, (arguments, named) in enumerate(cases):
        assert main([*arguments, "--name", f"run-{at}"]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "is for the students" in line]
        assert [said in line for line in lines] == [True] * named


def test_train_carries_out_one_stage_under_a_name_of_its_own(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "quickstart", "--stage", "teacher"]) == 0
    assert main(["train", "quickstart", "--stage", "baseline", "--name", "alone", "--resume"]) == 0

    assert [(call["stages"], call["name"], call["resume"]) for call in calls] == [
        (("teacher",), "quickstart-teacher", False),
        (("baseline",), "alone", True),
    ]
    said = capsys.readouterr().out
    assert "next:   potstill run quickstart --teacher runs/quickstart-teacher\n" in said
    assert "next:   potstill run quickstart --baseline runs/alone --name alone-run\n" in said


def test_the_next_command_keeps_what_was_given(calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data", "digits", "--skip-bad", "--student", "resnet18", "--seed", "3", "--output-dir", "my runs"]
    given += ["--set", "teacher.weights=null", "--set", "data.augment={hflip: true}"]
    assert main(["train", "quickstart", "--stage", "teacher", "--teacher", "resnet34", "--name", "t", *given]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next:")]
    kept = shlex.split(line.removeprefix("next:"))
    assert kept[:3] == ["potstill", "run", "quickstart"]
    pairs = set(itertools.pairwise(kept))
    assert pairs >= {
        ("--data", "digits"), ("--student", "resnet18"), ("--seed", "3"), ("--output-dir", "my runs"),
        ("--set", "data.augment={hflip: true}"), ("--teacher", "my runs/t"), ("--name", "t-run"),
    }  # fmt: skip
    assert "--skip-bad" in kept
    assert "True" not in kept
    assert kept.count("--set") == kept.count("--teacher") == 1  # the weights are those of the teacher just trained


@pytest.mark.parametrize(("model", "code"), [("mine.py:Small", " --allow-code"), ("cifar/resnet8", "")])
def test_the_next_command_of_folds_allows_the_code_of_their_recipe(
    model: str, code: str, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("runs/f")
    RunFolder(folder).write_recipe(f"student: {{model: '{model}'}}\n")
    write_checksummed_json(
        folder / "results.json", {"schema": 1, "stages": {"distilled": STAGE}, "comparison": None, "folds": [{}]}
    )
    run_command._report_results(folder, next_command=["potstill", "predict", "runs/f", "IMAGE"])
    command = "potstill run runs/f/recipe.yaml --set data.fold=all --name f-all"
    assert f"next:   {command}{code}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "is_kept"),
    [
        ("teacher.head=probe", False),  # a fitted head is part of the teacher
        ("teacher.classes=[a, b]", False),
        ("teacher.size=160", False),
        ("teacher.training.epochs=3", False),
        ("teacher.head=none", True),  # its model file has no classes
        ("teacher_cache.views=2", True),
    ],
)
def test_the_next_command_drops_what_the_trained_teacher_holds(
    setting: str, is_kept: bool, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", "photos", "--teacher", "resnet18@pretrained", "--set", setting]
    assert main(["train", "vgg16-resnet18", "--stage", "teacher", *given]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next:")]
    assert (setting in shlex.split(line)) == is_kept


def test_a_run_without_labels_is_said_to_have_no_accuracy(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    from potstill.cli.results import print_results

    sentences = ["On 9 held-out images the student predicts the teacher's class for 80.0%.", "Accuracy is unknown."]
    results = {"stages": {"teacher": STAGE}, "without_labels": {"test_labeled": False, "sentences": sentences}}
    assert main(["run", "quickstart", "--data", "photos", "--no-labels", "--teacher", "cifar/resnet8"]) == 2
    assert not calls  # the teacher is not trained
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        print_results(results, None)
        print_results({**results, "without_labels": {"test_labeled": True, "sentences": sentences[:1]}}, None)
    first, second = printed.getvalue().split("teacher  ", 1)[0], printed.getvalue().rsplit("top-1", 1)
    assert "agreement" in first
    assert "top-1" not in first
    assert len(second) == 2
    assert "Accuracy is unknown." in printed.getvalue()


def test_a_report_that_fails_does_not_swallow_the_results(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def render(folder: Path) -> Path:
        raise ArtifactError(f"{folder}: no picture")

    monkeypatch.setitem(sys.modules, "potstill.report.render", SimpleNamespace(render=render))

    assert main(["run", "quickstart"]) == 4
    captured = capsys.readouterr()
    assert "teacher  50.0 %" in captured.out
    assert captured.err.endswith("error: runs/quickstart: no picture\n")


def test_report_draws_one_run_and_compares_several(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "quickstart"]) == 0
    assert main(["report", "runs/quickstart"]) == 0
    assert main(["report", "runs/a", "runs/b", "--output", "both.html"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["report: runs/quickstart/report.html", "report: both.html"]
    assert calls[-1] == {"compared": [Path("runs/a"), Path("runs/b")]}
    assert main(["report", "runs/quickstart", "--output", "mine.html"]) == 2  # where it would be looked for in vain
    assert "the page of one run is runs/quickstart/report.html" in capsys.readouterr().err


def test_a_run_that_stopped_before_its_distilled_student_says_why(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sys.modules["potstill.experiment.pipeline"].run

    def run(recipe: Any, **rest: Any) -> Path:
        folder: Path = whole(recipe, **rest)
        results = {"schema": 1, "stages": {"teacher": STAGE}, "comparison": None, "not_distilled": "It would do harm."}
        write_checksummed_json(folder / "results.json", results)
        return folder

    monkeypatch.setattr(sys.modules["potstill.experiment.pipeline"], "run", run)
    assert main(["run", "quickstart"]) == 0
    captured = capsys.readouterr()
    assert "report: runs/quickstart/report.html" in captured.out
    assert "next:   potstill predict runs/quickstart IMAGE" in captured.out
    assert captured.err.endswith("warning: It would do harm.\n")


@pytest.mark.parametrize(
    ("gpus", "device", "settings", "there", "count"),
    [
        (None, None, None, 4, 1), ("all", None, None, 4, 4), ("3", "cuda", None, 4, 3), ("1", None, None, 1, 1),
        ("2", "cpu", None, 0, 2), ("2", None, ["training.device = cpu"], 0, 2),
    ],
)  # fmt: skip
def test_gpus_gives_the_number_of_processes(monkeypatch, gpus, device, settings, there, count):
    monkeypatch.setattr("torch.cuda.is_available", lambda: there > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: there)
    assert run_command.processes_to_start(gpus, device, settings) == count
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_command.processes_to_start(gpus, device, settings) == 1  # this is one of them


@pytest.mark.parametrize(
    ("gpus", "device", "there", "message"),
    [
        ("all", None, 0, "--gpus all: PyTorch sees no GPU here.*--gpus N --device cpu starts N processes"),
        ("4", None, 2, "--gpus 4: this machine has 2"),
        ("0", None, 2, "--gpus '0': give a number of at least 1, or all"),
        ("two", "cpu", 2, "--gpus 'two': give a number"),
        ("all", "cpu", 0, "with --device cpu, give the number of processes"),
    ],
)
def test_gpus_that_are_not_there_are_refused(monkeypatch, gpus, device, there, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: there > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: there)
    with pytest.raises(UsageError, match=message):
        run_command.processes_to_start(gpus, device, None)


def test_gpus_starts_that_many_processes_with_the_same_arguments(monkeypatch):
    started = []
    monkeypatch.setattr(
        run_command, "start_processes", lambda count, arguments: started.append((count, arguments)) or 5
    )
    arguments = ["run", "quickstart", "--gpus", "2", "--device", "cpu"]
    assert main(arguments) == 5
    assert started == [(2, arguments)]


def test_the_exit_code_of_started_processes_is_that_of_the_first_failure(capfd):
    """A verb that torchrun must not start: both processes end with 2, and one of them says why."""
    assert run_command.start_processes(2, ["methods"]) == 2
    assert capfd.readouterr().err.count("torchrun has started `potstill methods` 2 times") == 1
