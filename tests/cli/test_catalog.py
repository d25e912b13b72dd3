"""potstill methods NAME: every part, by hand for one method."""

import pytest

from potstill.cli import catalog, main
from potstill.methods import StepCost, list_own_methods


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


def test_an_unknown_method_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "revewkd"]) == 2
    assert "did you mean 'reviewkd'?" in capsys.readouterr().err
