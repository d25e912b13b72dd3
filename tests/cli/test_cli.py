"""Help is quick and light; every error is one message and one exit code."""

import errno
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image

from potstill import errors
from potstill.cli import main

HEAVY = ("torch", "timm", "numpy", "sklearn", "matplotlib", "pydantic", "rich", "yaml")


def in_subprocess(*arguments: str) -> tuple[int, set[str], str]:
    """(exit code, heavy modules that were imported, stderr)"""
    script = (
        "import json, sys; from potstill.cli import main; code = main(sys.argv[1:]);"
        f"print('\\n' + json.dumps([code, [m for m in {HEAVY!r} if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    code, heavy = json.loads(done.stdout.splitlines()[-1])
    return code, set(heavy), done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["run", "--help"], ["recipes", "-h"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert in_subprocess(*arguments)[:2] == (0, set())


@pytest.mark.parametrize("arguments", [["--version"], ["methods", "kd"], ["recipes"]])
def test_lists_need_no_torch(arguments: list[str]) -> None:
    code, heavy, _ = in_subprocess(*arguments)

    assert code == 0
    assert not heavy & {"torch", "timm", "numpy", "sklearn", "matplotlib", "rich"}


def test_help_takes_little_time() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "potstill", "--help"], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # 0.07 s of CPU time measured, 0.15 beside busy processes; importing torch alone takes more than 1 s.
    assert min(seconds() for _ in range(4)) < 0.6


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "quickstart", "--set", "method.temperture=3"], "did you mean 'temperature'?"),
        (["run", "quickstat"], "did you mean 'quickstart'?"),
        (["train", "vgg16-resnet18", "--stage", "teacher"], "--data DIR"),
        (["recipes", "solr"], "did you mean 'solar'?"),
        (["methods", "kdd"], "did you mean 'kd'?"),
    ],
)
def test_a_users_mistake_is_found_before_torch_is_imported(arguments: list[str], expected: str) -> None:
    code, heavy, stderr = in_subprocess(*arguments)

    assert code == 2
    assert not heavy & {"torch", "timm", "sklearn", "matplotlib"}
    assert expected in stderr
    assert stderr.startswith("error: ")
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "Usage: potstill"),
        (["runn"], "Did you mean 'run'?"),
        (["run"], "give a RECIPE"),
        (["train"], "Missing argument"),
        (["run", "quickstart", "--seeed", "3"], "--seeed"),
        (["train", "quickstart", "--stage", "distilled"], "distilled"),
        (["predict", "model"], "Missing argument"),
    ],
)
def test_the_parsers_own_errors_exit_with_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2

    captured = capsys.readouterr()
    assert expected in captured.err + captured.out


@pytest.mark.skipif(
    tuple(map(int, typer.__version__.split(".")[:2])) < (0, 29),
    reason="older versions of typer have messages of their own",
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "m", "x", "--risk", "abc"], "--risk must be a number, got 'abc'"),
        (["predict", "m", "x", "--risk", "5%"], "--risk must be a number, got '5%'; for 5 % give 0.05"),
        (["predict", "m", "x", "--threshold", "50"], "--threshold must be at most 1, got '50'; for 50 % give 0.5"),
        (["predict", "m", "x", "--top", "0"], "--top must be at least 1, got '0'"),
        (["run", "quickstart", "--epochs", "1.5"], "--epochs must be a whole number, got '1.5'"),
        (["run", "quickstart", "--lr", "0,1"], "--lr must be a number, got '0,1'; give 0.1"),
        (["serve", "m", "--port", "99999"], "--port must be at most 65535, got '99999'"),
        (
            ["train", "quickstart", "--stage", "techer"],
            "--stage must be one of teacher, baseline, distilled, got 'techer'; did you mean 'teacher'?",
        ),
        (
            ["sweep", "quickstart", "--search", "seed=1,2", "--epochs", "3"],
            "potstill sweep has no --epochs: give --set training.epochs=VALUE",
        ),
        (
            ["federated", "run", "quickstart", "--image-size", "32"],
            "potstill federated run has no --image-size: give --set data.size=VALUE",
        ),
    ],
)
def test_what_an_option_does_not_take_is_repeated_with_what_to_do(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "{}", "x.png"],
        ["predict", "{}.onnx", "x.png"],
        ["evaluate", "{}", "--data", "digits"],
        ["export", "{}"],
        ["export", "{}", "--model", "baseline"],
        ["benchmark", "{}.onnx"],
        ["shrink", "{}"],
        ["push", "{}", "me/small"],
        ["serve", "{}"],
        ["report", "{}"],
        ["report", "{}", "{}"],
        ["run", "--reproduce", "{}"],
        ["run", "quickstart", "--baseline", "{}"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_a_path_that_does_not_exist_is_a_usage_error(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-run").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")

    assert main([each.format("my-runn") for each in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: my-runn")
    assert "does not exist; did you mean 'my-run'? Give " in captured.err
    assert captured.err.count("\n") == 1


def _noted(error: BaseException, note: str) -> BaseException:
    error.add_note(note)
    return error


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (errors.UsageError("u"), 2, "error: u\n"),
        (errors.DataError("d\nsecond line"), 3, "error: d\nsecond line\n"),
        (errors.ArtifactError("a"), 4, "error: a\n"),
        (errors.StorageError("s"), 5, "error: s\n"),
        (errors.NonFiniteError("n"), 6, "error: n\n"),
        (errors.WorkerError("w"), 7, "error: w\n"),
        (errors.DataError("bad\x1b[2Jname"), 3, "error: bad\\x1b[2Jname\n"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 5, "error: No space left on device: runs/x\n"),
        (OSError(errno.EIO, "Input/output error", "runs/x"), 5, "error: Input/output error: runs/x\n"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 5, "error: Permission denied: x\n"),
        (errors.Stopped(15), 143, "error: interrupted\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (_noted(errors.Stopped(2), "--resume continues"), 130, "error: interrupted; --resume continues\n"),
        (_noted(errors.WorkerError("w"), "--resume continues"), 7, "error: w\n--resume continues\n"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
            5,
            "error: out of memory; a smaller training.batch_size or data.cache_fraction needs less\n",
        ),
    ],
)
def test_each_error_has_its_exit_code_and_no_traceback(
    raised: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _raise_in_run(raised, monkeypatch)

    assert main(["run", "quickstart"]) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    "arguments", [["predict", "runs/mine", ""], ["check", ""], ["run", "photos", "--data", ""], [""]]
)
def test_an_empty_argument_is_not_the_current_folder(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert " ".join(["after `potstill", *arguments[:-1]]).strip() + "`" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["check"], ["run", "quickstart", "--data"], ["report"]])
def test_a_text_too_long_for_a_path(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "x" * 300]) == 2
    assert "is too long for the name of a file or folder" in capsys.readouterr().err


def test_memory_is_a_storage_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _raise_in_run(MemoryError(), monkeypatch)

    assert main(["run", "quickstart"]) == 5
    assert "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize("raised", [KeyError("x"), OSError(errno.EBADF, "Bad file descriptor"), AssertionError()])
def test_anything_else_is_our_bug_and_shows_where(
    raised: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _raise_in_run(raised, monkeypatch)

    assert main(["run", "quickstart"]) == 1
    captured = capsys.readouterr().err
    assert captured.startswith("Traceback")
    assert "error: this is a bug in potstill" in captured


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"'{sys.executable}' -m potstill recipes quickstart | true; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stderr == ""
    assert done.stdout == "141\n"  # as of cat: 128 + SIGPIPE


@pytest.mark.parametrize(("words", "code"), [("check nothing", 2), ("--nonsense", 2), ("check DATA", 3)])
def test_a_closed_pipe_hides_no_error(tmp_path: Path, words: str, code: int) -> None:
    words = words.replace("DATA", str(tmp_path))  # without class folders
    for closing in ("2>&1 | true", "2>/dev/null | true"):
        done = subprocess.run(
            f"'{sys.executable}' -m potstill {words} {closing}; echo ${{PIPESTATUS[0]}}",
            shell=True,
            executable="/bin/bash",
            capture_output=True,
            text=True,
            check=True,
        )

        assert (done.stdout, done.stderr) == (f"{code}\n", "")


def test_a_shipped_recipe_is_printed_as_it_is_and_can_be_used_as_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from potstill.config.recipe import list_recipes, load_recipe

    assert main(["recipes", "solar"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text(printed)

    assert printed == list_recipes()["solar"].read_text()
    assert load_recipe(tmp_path / "mine.yaml", data_needed=False) == load_recipe("solar", data_needed=False)


def test_catalogs_name_everything(capsys: pytest.CaptureFixture[str]) -> None:
    from potstill.config.recipe import list_recipes
    from potstill.methods import list_own_methods

    assert main(["recipes"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(list_recipes())
    assert "/" not in listed[0]  # everyday recipes before those of a protocol
    assert "/" in listed[-1]
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines) == list_own_methods()
    assert next(line for line in lines if line.startswith("kd ")).split()[1] == "logits"


def _raise_in_run(raised: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_recipe(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("potstill.config.recipe.load_recipe", load_recipe)
