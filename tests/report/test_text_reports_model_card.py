"""report.md, read back by huggingface_hub."""

from collections.abc import Callable
from typing import Any

from huggingface_hub import ModelCard

from potstill.report.render import render
from potstill.report.run_reader import read_run


def test_card_has_metrics_and_no_licence(build_run: Callable[..., Any]) -> None:
    folder = build_run(["<b>", "a|b", "c"]).write()
    render(folder)
    text = (folder / "report.md").read_text(encoding="utf-8")
    read = ModelCard(text)
    assert read.data.license is None
    top1 = read_run(folder).stages["distilled"].metrics["test"]["top1"]
    assert read.data.eval_results is not None
    assert {each.metric_type: each.metric_value for each in read.data.eval_results}["accuracy"] == top1
    assert "<b>" not in read.text
    assert "&lt;b&gt;, a\\|b, c." in read.text
    for heading in ("Intended use", "Metrics", "Limits", "Training", "Licence"):
        assert f"## {heading}" in read.text


def test_no_card_without_a_student(build_run: Callable[..., Any]) -> None:
    builder = build_run(3)
    builder.stages = ("teacher",)
    folder = builder.write()
    render(folder)
    assert not (folder / "report.md").exists()
