import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import classification_report, f1_score, precision_score, recall_score

from potstill.evaluation.final_metrics import final_metrics
from potstill.formatting import display_width
from potstill.report.run_reader import StageResult, read_predictions, read_run
from potstill.report.text_reports import classification_report_text, metrics_text, teaching_text, training_text

BuildRun = Callable[..., Any]  # the fixture of conftest.py


def test_metrics_text_agrees_with_sklearn(build_run: BuildRun) -> None:
    run = read_run(build_run(["functional", "minor", "猫"], epochs=10).write())
    stage = run.stages["distilled"]
    text = metrics_text(run, stage)
    found = read_predictions(stage, "test")
    assert found is not None
    y, p = found.labels, found.predicted
    assert f"{100 * f1_score(y, p, average='macro'):.1f} %" == _row(text, "F1, macro")[-1]
    assert f"{100 * precision_score(y, p, average='weighted'):.1f} %" == _row(text, "Precision, weighted")[-1]
    assert _row(text, "Agreement with teacher") == ["–", "–", "91.3 %"]
    assert _row(text, "Images") == ["324", "81", "81"]
    assert _row(text, "AUC, weighted") == ["–", "–", "–"]
    recall = recall_score(y, p, average=None)
    assert _row(text, "猫")[8] == f"{100 * recall[2]:.1f} %"
    assert "10 epochs in 1 min 23 s (321 images/s), best epoch 8 by top1 on val" in text
    assert "1.40 ms (p95 1.68 ms), one image at a time, 2 threads, cpu" in text
    assert "Parameters    78,042" in text


def test_columns_stand_under_each_other(build_run: BuildRun) -> None:
    run = read_run(build_run(["a", "猫" * 6, "\u202eb"], epochs=1).write())
    text = metrics_text(run, run.stages["teacher"])
    rows = text.split("Per class\n")[1].splitlines()
    assert len({display_width(row) for row in rows[1:]}) == 1
    assert r"\u202eb" in rows[-1]


def test_best_of_two_classes(build_run: BuildRun) -> None:
    run = read_run(build_run(2, epochs=1).write())
    assert "Top-2" in metrics_text(run, run.stages["teacher"])


def test_ready_teacher(build_run: BuildRun) -> None:
    builder = build_run(2, epochs=1)
    builder.ready_teacher = True
    run = read_run(builder.write())
    assert "none, pretrained" in metrics_text(run, run.stages["teacher"])


def test_classification_report_is_laid_out_as_scikit_learn_does() -> None:
    labels, predicted, names = [0, 1, 0, 1, 1], [0, 0, 0, 1, 0], ["a", "a longer name", "none"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = classification_report(
            labels, predicted, labels=range(3), target_names=names, digits=4, zero_division=0
        )
    figures = final_metrics(np.eye(3)[predicted], np.array(labels), names)
    assert classification_report_text(StageResult("teacher", Path(), {}, metrics={"test": figures}), "test") == expected


def test_no_classification_report_of_no_images() -> None:
    figures = final_metrics(np.zeros((0, 2)), np.zeros(0, dtype=np.int64), ["a", "b"])
    stage = StageResult("teacher", Path(), {}, metrics={"test": figures})
    assert classification_report_text(stage, "test") is classification_report_text(stage, "val") is None


def _row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(name))
    return re.split(r"\s{2,}", line)[1:]


def test_where_the_teachers_answers_came_from() -> None:
    teaching = {"by": ["teacher"], "parameters": 3_918_858, "bytes": 15_675_432, "ms_per_step": 12.3, "batch_size": 64}
    live = "teacher: 3.92 M parameters (15.7 MB), 12.3 ms in each step of 64 images"
    assert teaching_text(StageResult("distilled", Path(), {"teaching": teaching})) == live
    teaching |= {"computed": 10_072, "read": 5_036}
    stored = f"{live}; 5,036 of 15,108 outputs read from the teacher cache"
    assert teaching_text(StageResult("distilled", Path(), {"teaching": teaching})) == stored


def test_what_a_method_took_from_this_training_and_not_from_its_paper(tmp_path: Path) -> None:
    facts = {
        "epochs": 8,
        "term_factors": {"kd": 1.0, "attention": 0.01234},
        "method_epochs": {"dkd.warmup_epochs": 0.6667},
    }
    text = training_text(StageResult("distilled", tmp_path, {"training": facts}))
    assert text.endswith(
        "; factors that bounded the teacher's terms in that epoch: attention 0.012; dkd.warmup_epochs 0.667 as a "
        "share of the training"
    )
