"""potstill methods NAME: every part, by hand for one method."""

import pytest

from potstill.cli import catalog, main
from potstill.config.recipe import list_recipes
from potstill.methods import StepCost, list_methods, list_own_methods
from potstill.models.model_table import ModelRow


def shown(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["methods", name]) == 0
    return capsys.readouterr().out


def test_all_parts_of_one_method(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    text = shown("kd", capsys)
    titles = [line.rstrip(":") for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[:4] == ["Loss", "Needs (logits)", "Options (method.NAME in a recipe)", "Presets (method.preset)"]
    for part in (
        "Knowledge distillation: match the teacher's softened class probabilities.\n\nHinton, Vinyals and Dean, ",
        "https://arxiv.org/abs/1503.02531\n",
        "  kd_loss  T² KL(softmax(z_t / T) ‖ softmax(z_s / T))\n",
        "  temperature  a number above 0, default 2.0: T of the soft targets; the same for teacher and student\n",
        "  cifar100  temperature=4.0, alpha=0.1\n",
        "  cifar100/resnet32x4-resnet8x4     73.33 %\n",
        "Traps:\n  - The divergence is summed over classes",
    ):
        assert part in text


def test_a_price_is_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    priced = {"kd": StepCost(2.5, 2.4, 2.6, 1.25, 1.5, 1234)}
    facts = {"teacher": "cifar/a", "student": "cifar/b", "batch": 64, "machine": {"processor": "A CPU"}}
    monkeypatch.setattr(catalog, "step_costs", lambda: priced)
    monkeypatch.setattr(catalog, "measured_costs", lambda: facts)
    assert " ".join(shown("kd", capsys).partition("Price:\n")[2].partition("\n\n")[0].split()) == (
        "a training step takes 2.50 times as long as with labels alone (quartiles 2.40 to 2.60, of which the teacher "
        "1.25) and 1.50 times the memory; 1,234 trained parameters beside the student's. "
        "cifar/a -> cifar/b, batches of 64, A CPU."
    )


@pytest.mark.parametrize("width", ["60", "100"])
def test_lines_fit_the_terminal(
    width: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    for name in ("dkd", "crd", "reviewkd"):
        lines = shown(name, capsys).splitlines()
        # formulas and addresses are not broken, nor are names and values of options
        long = [line for line in lines if len(line) > int(width) and "_loss  " not in line and "http" not in line]
        assert [line for line in long if not line.startswith("  ")] == []


def test_every_method_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for name in list_own_methods():
        text = shown(name, capsys)
        assert "``" not in text
        assert "Loss:\n" in text


@pytest.mark.parametrize("command", ["methods", "recipes"])
def test_lists_fit_the_terminal_and_piped_have_a_line_for_each_entry(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main([command]) == 0
    piped = capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main([command]) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 60
    assert narrow.split() == piped.split()
    known = list_methods() if command == "methods" else list_recipes()
    assert sorted(line.split()[0] for line in piped.splitlines()) == sorted(known)


def test_an_unknown_method_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "revewkd"]) == 2
    assert "did you mean 'reviewkd'?" in capsys.readouterr().err


TABLE = [
    ModelRow("cifar/resnet8", 32, 70_000, 65, 9, 12_000_000, 0.02),
    ModelRow("cifar/resnet14", 32, 170_000, 65, 15, 26_000_000, 0.04),
    ModelRow("efficientnet-lite0", 224, 3_400_000, 1281, 50, 380_000_000, 0.5),
    ModelRow("timm/resnet18", 224, 11_000_000, 513, 21, 1_800_000_000, 1.0),
    ModelRow("torchvision/alexnet", 224, 57_000_000, 4097, 8, 700_000_000, None),
    ModelRow("timm/not_in_this_version", 224, 1, 1, 1, 1, 0.001),
]


def listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """Return the cells of the table, with a reference network that takes 20 ms."""
    monkeypatch.setattr("potstill.models.model_table.read_table", lambda: TABLE)
    monkeypatch.setattr("potstill.evaluation.cost.measure_reference", lambda: 20.0)
    assert main(["models", *arguments]) == 0
    output = capsys.readouterr()
    assert "estimated" in output.err
    return [line.split("  ") for line in output.out.splitlines()[2:]]


def test_models_below_limits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = [row[0] for row in listed(monkeypatch, capsys, "--under", "10ms")]
    assert names == ["cifar/resnet8", "cifar/resnet14", "efficientnet-lite0"]
    names = [row[0] for row in listed(monkeypatch, capsys, "--under", "500kB,2s")]
    assert names == ["cifar/resnet8"]
    names = [row[0] for row in listed(monkeypatch, capsys, "--under", "500kB", "--int8")]
    assert names == ["cifar/resnet8", "cifar/resnet14"]
    names = [row[0] for row in listed(monkeypatch, capsys, "cifar", "--sort", "parameters")]
    assert names == ["cifar/resnet8", "cifar/resnet14"]
    rows = listed(monkeypatch, capsys, "--sort", "multiply-adds")
    assert [row[0] for row in rows] == [
        "cifar/resnet8", "cifar/resnet14", "efficientnet-lite0", "torchvision/alexnet", "timm/resnet18",
    ]  # fmt: skip
    (row,) = listed(monkeypatch, capsys, "timm/resnet18", "--sort", "size", "--image-size", "112")
    assert " ".join(row).split() == [
        "timm/resnet18", "112", "11.0", "M", "450", "M", "44.0", "MB", "11.1", "MB", "5.00", "ms",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--under", "0.1ms"], "Nearest: cifar/resnet8, 0.40 ms and 280 kB (estimated)"),
        (["--under", "1kB"], "Nearest: cifar/resnet8"),
        (["--under", "3parsecs"], "unknown unit 'parsecs'"),
        (["torchvision/vgg11", "--sort", "size"], "the table of sizes has none of"),
        (["cifar/*", "--int8"], "for the table of sizes: add --sort or --under"),
        (["cifar/*", "--classes", "10"], "for the table of sizes: add --sort or --under"),
    ],
)
def test_limits_that_no_model_meets(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("potstill.models.model_table.read_table", lambda: TABLE)
    monkeypatch.setattr("potstill.evaluation.cost.measure_reference", lambda: 20.0)
    assert main(["models", *arguments]) == 2
    assert says in capsys.readouterr().err
