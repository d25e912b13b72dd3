import io
import re
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from potstill.cli.results import metrics_lines, print_results, results_table
from potstill.console import Progress, escape_control
from potstill.experiment.estimate import StageTime

STAGES: dict[str, Any] = {
    "teacher": {
        "model": {"parameters": 3_965_258, "file_bytes": 15_891_232},
        "latency_ms": {"p50": 3.14159},
        "test": {"top1": 0.98765, "top3": 1.0, "f1_macro": 0.9871, "auc_macro": 0.99951},
    },
    "distilled": {
        "model": {"parameters": 78_042, "file_bytes": 329},
        "latency_ms": {"p50": 0.5},
        "test": {"top1": 0.5, "top3": 0.9, "f1_macro": 0.4, "auc_macro": None},
    },
}


def watched(progress: Progress) -> None:
    with progress:
        progress.stage("teacher", "cifar/vgg8, 2 epochs, cpu")
        for epoch, best in ((1, True), (2, False)):
            progress.epoch_start(epoch, 2, 2, 100)
            progress.step(64)
            progress.step(36)
            record = {"epoch": epoch, "seconds": 3.25, "images_per_second": 1234.4, "best": best}
            progress.epoch_end(record | {"train": {"loss": 0.51239}, "val": {"top1": 0.9 - epoch / 100}})
        progress.warn("the teacher\x1b[2J is [bold]worse[/bold]")
        progress.stage_end("teacher", 65.0)
        progress.stage_end("baseline", 0.5)  # trained before: no stage, no epochs


def test_elsewhere_than_on_a_terminal_an_epoch_is_one_plain_line() -> None:
    out = io.StringIO()
    watched(Progress(Console(file=out, force_terminal=False, width=20, markup=False, highlight=False)))

    assert out.getvalue().splitlines() == [
        "teacher: cifar/vgg8, 2 epochs, cpu",
        "teacher epoch 1/2  loss 0.5124  val top-1 89.0 %  1,234 images/s  3.2 s  best",
        "teacher epoch 2/2  loss 0.5124  val top-1 88.0 %  1,234 images/s  3.2 s",
        "warning: the teacher\\x1b[2J is [bold]worse[/bold]",
        "teacher: done in 1 min 05 s, best epoch 1, val top-1 89.0 %",
        "baseline: done in 500 ms",
    ]


def test_the_end_is_in_sight_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr("potstill.console.time", clock)
    out = io.StringIO()
    progress = Progress(Console(file=out, force_terminal=False, width=20, markup=False, highlight=False))
    progress.expect(lambda: {"teacher": 60.0, "baseline": 100.0, "distilled": 200.0})
    progress.stage("teacher", "a linear probe")
    for now[0] in (1.0, 6.0):  # a line every five seconds
        progress.wait("teacher: embeddings of train", 10, 100)
    progress.stage("teacher", "vgg8, 2 epochs")
    now[0] = 10.0
    progress.epoch_start(1, 2, 4, 100)
    for now[0] in (10.5, 20.0):
        progress.step(25)
    now[0] = 30.0
    progress.step(50)  # the end of the epoch has a line of its own
    progress.epoch_end({"epoch": 1, "seconds": 20.0, "val": {"top1": 0.5}})
    now[0] = 50.0
    progress.stage_end("teacher", 50.0)
    progress.stage("baseline", "resnet8, 1 epoch")

    assert out.getvalue().splitlines() == [
        "expected: about 6 min 00 s on this machine (teacher 1 min 00 s, baseline 1 min 40 s, distilled 3 min 20 s)",
        "teacher: a linear probe",
        "teacher: embeddings of train: 10 of 100  54.0 s left, 5 min 54 s in all",
        "teacher: vgg8, 2 epochs",
        # a quarter in 10 s, so 30 s are left; 20 + 30 s in place of 60, so 250 in place of the other 300
        "teacher epoch 1/2  50 of 100 images  5 images/s  30.0 s left, 4 min 40 s in all",
        "teacher epoch 1/2  val top-1 50.0 %  20.0 s  20.0 s left, 4 min 30 s in all",
        "teacher: done in 50.0 s",
        "baseline: resnet8, 1 epoch",
    ]


def test_a_stage_of_milliseconds_does_not_foretell_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now, out, progress = with_own_clock(monkeypatch)
    progress.expect(lambda: {"teacher": 0.003, "baseline": 4.0, "distilled": 4.0})
    progress.stage("teacher", "a network of 12 parameters")
    progress.epoch_start(1, 2, 4, 100)
    now[0] = 3.0  # start-up
    progress.step(100)
    progress.epoch_end({"epoch": 1, "val": {"top1": 0.5}})
    assert out.getvalue().splitlines()[-1].endswith("  3.0 s left, 11.0 s in all")  # not an hour


def with_own_clock(monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], io.StringIO, Progress]:
    """A progress without a terminal, what it prints, and the time that it reads."""
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr("potstill.console.time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]))
    return now, out, Progress(Console(file=out, force_terminal=False, width=20, markup=False, highlight=False))


def test_images_decoded_within_an_epoch_do_not_foretell_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    now, out, progress = with_own_clock(monkeypatch)
    progress.expect(lambda: {"distilled": 100.0})
    progress.stage("distilled", "resnet8, 10 epochs")
    progress.epoch_start(1, 10, 100, 100)
    now[0] = 1.0
    progress.step(10)
    for now[0], done in ((1.0, 0), (21.0, 50), (41.0, 100)):  # the teacher's images, decoded at its first batch
        progress.wait("decoding images", done, 100)
    for now[0] in (42.0, 47.0):
        progress.step(10)
    assert out.getvalue().splitlines()[2:] == [
        "decoding images: 50 of 100  1 min 19 s left, 1 min 19 s in all",  # by the estimate, as one step tells little
        "distilled epoch 1/10  20 of 100 images  10 images/s  1 min 38 s left, 1 min 38 s in all",
        "distilled epoch 1/10  30 of 100 images  4 images/s  3 min 46 s left, 3 min 46 s in all",  # 30 in 7 s
    ]


def test_a_stage_longer_than_estimated_does_not_end_now(monkeypatch: pytest.MonkeyPatch) -> None:
    now, out, progress = with_own_clock(monkeypatch)
    progress.expect(lambda: {"distilled": 5.0})
    progress.stage("distilled", "resnet8, 3 epochs")
    now[0] = 6.0  # the teacher's setting up
    progress.epoch_start(1, 3, 4, 100)
    now[0] = 7.5  # less than _MIN_MEASURED
    progress.step(100)
    progress.epoch_end({"epoch": 1, "val": {"top1": 0.5}})
    assert out.getvalue().splitlines()[-1].endswith("  3.0 s left, 3.0 s in all")


@pytest.mark.parametrize(
    ("epoch", "seconds", "left"),
    [
        (1, 10.0, "38.0 s"),  # three more of 10 s with the teacher, and eight of a tenth: 30 + 8
        (2, 1.0, "10.0 s"),  # much faster than estimated: cached before
        (4, 10.0, "8.0 s"),  # the last with the teacher
        (6, 1.0, "6.0 s"),
    ],
)
def test_epochs_that_ask_the_teacher_do_not_foretell_the_later_ones(
    monkeypatch: pytest.MonkeyPatch, epoch: int, seconds: float, left: str
) -> None:
    now, out, progress = with_own_clock(monkeypatch)
    time_of_stage = StageTime(48.0)  # 4 of 12 epochs take 10 s each, the others 1 s
    time_of_stage.first, time_of_stage.share = 40.0, 4 / 12
    progress.expect(lambda: {"distilled": time_of_stage})
    progress.stage("distilled", "resnet8")
    for each in range(1, epoch + 1):
        progress.epoch_start(each, 12, 4, 100)
        now[0] += seconds
        progress.step(100)
        progress.epoch_end({"epoch": each, "val": {"top1": 0.5}})
    assert f"  {left} left" in out.getvalue().splitlines()[-1]


def test_the_first_epochs_without_the_teacher_tell_their_own_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, out, progress = with_own_clock(monkeypatch)
    time_of_stage = StageTime(180.0)  # 4 of 12 epochs take 30 s each, the others 7.5 s
    time_of_stage.first, time_of_stage.share = 120.0, 4 / 12
    progress.expect(lambda: {"distilled": time_of_stage})
    progress.stage("distilled", "resnet8")
    for each in range(1, 6):
        progress.epoch_start(each, 12, 4, 100)
        if each == 5:
            now[0] += 6.0
            progress.step(50)
        else:
            now[0] += 30.0
            progress.step(100)
            progress.epoch_end({"epoch": each, "val": {"top1": 0.5}})
    assert "50 of 100 images  8 images/s  1 min 30 s left" in out.getvalue().splitlines()[-1]  # 7.5 epochs of 12 s


def test_on_a_terminal_there_is_a_bar_with_speed_and_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    out = io.StringIO()
    watched(Progress(Console(file=out, force_terminal=True, width=120, markup=False, highlight=False)))

    shown = out.getvalue()
    assert "epoch 2/2" in shown
    assert "images/s" in shown
    assert "ETA" in shown
    assert "\x1b[33m" in shown  # the warning is yellow
    assert "loss" not in shown  # no line an epoch
    assert "done in 1 min 05 s, best epoch 1, val top-1 89.0 %" in shown


@pytest.mark.parametrize("width", [60, 80, 110])
def test_a_narrow_terminal_cuts_nothing_off(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=width, markup=False, highlight=False)) as progress:
        progress.expect(lambda: {"distilled": 3600.0, "baseline": 3600.0})
        progress.stage("distilled", "cifar/resnet8")
        progress.epoch_start(10, 12, steps=2, images=1000)
        progress.step(500)
        progress.epoch_end({"epoch": 10, "val": {"top1": 0.5}})
        progress.wait("predictions of the distilled on train", 1, 2)
    shown = out.getvalue()
    assert re.findall(r"(?:epoch|val|\d)[^\s]*\N{HORIZONTAL ELLIPSIS}", shown) == []  # at most of the name
    assert "epoch 10/12" in shown
    assert "val top-1 50.0 %" in shown


def test_the_bar_shows_the_time_left_in_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    out = io.StringIO()
    progress = Progress(Console(file=out, force_terminal=True, width=160, markup=False, highlight=False))
    progress.expect(lambda: {"teacher": 3600.0, "baseline": 3600.0})
    watched(progress)
    assert re.search(r"images/s, (1 h 59|2 h 00) min in all", out.getvalue())


def test_no_color_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    out = io.StringIO()
    watched(Progress(Console(file=out, force_terminal=True, width=120, markup=False, highlight=False)))

    colours = [
        code for code in re.findall(r"\x1b\[([\d;]*)m", out.getvalue()) if re.search(r"\b(3\d|38;.*|9\d)\b", code)
    ]
    assert colours == []


def test_the_table_aligns_stages_and_leaves_absent_ones_out() -> None:
    assert results_table(STAGES) == [
        "            top-1    top-3  macro F1     AUC  parameters     file  latency",
        "teacher    98.8 %  100.0 %    98.7 %  0.9995   3,965,258  15.9 MB  3.14 ms",
        "distilled  50.0 %   90.0 %    40.0 %       –      78,042    329 B  0.50 ms",
    ]


def test_a_student_without_classes_has_a_cosine_and_a_loss() -> None:
    stage = {**STAGES["distilled"], "test": {"count": 9, "cosine": {"teacher": {"value": 0.61234}}}}
    assert results_table({"distilled": stage}, agreement=True) == [
        "           cosine to teacher  parameters   file  latency",
        "distilled             0.6123      78,042  329 B  0.50 ms",
    ]
    out = io.StringIO()
    progress = Progress(Console(file=out, width=120))
    progress.stage("distilled", "")
    progress.epoch_end({"epoch": 1, "best": True, "val": {"top1": None, "count": 0, "loss": 1.5}})
    progress.stage_end("distilled", 2.0)
    assert "val loss 1.5000" in out.getvalue()
    assert "best epoch 1, val loss 1.5000" in out.getvalue()
    assert "top-1" not in out.getvalue()


def test_results_end_with_verdict_and_report(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    print_results({"stages": STAGES, "comparison": {"verdict": "It helped. " * 12}}, tmp_path / "report.html")

    lines = capsys.readouterr().out.splitlines()
    verdict = ["It helped. " * 8 + "It helped.", "It helped. It helped. It helped."]  # 98 characters, then the rest
    assert lines == ["", *results_table(STAGES), "", *verdict, "", f"report: {tmp_path}/report.html"]


def test_results_of_several_seeds_say_whose_the_table_is(capsys: pytest.CaptureFixture[str]) -> None:
    for comparison in (
        {"seeds": {"figures": {"top1": {"n": 2}}}},
        {"folds": {"folds": 5, "seeds": 2, "figures": {"top1": {"n": 5}}}},
    ):
        print_results({"stages": STAGES, "comparison": comparison}, None)
        note = "Baseline and distilled in this table: the first of 2 seeds."
        assert note in capsys.readouterr().out.splitlines()
    print_results({"stages": STAGES, "comparison": {"folds": {"folds": 5, "figures": {"top1": {"n": 5}}}}}, None)
    assert "in this table" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("café.png", "café.png"),
        ("a\nb", "a\\nb"),
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("\u202egnp.exe", "\\u202egnp.exe"),  # right-to-left override
        ("\udcff.png", "\\udcff.png"),  # a byte that is no UTF-8
    ],
)
def test_names_cannot_steer_the_terminal(name: str, shown: str) -> None:
    assert escape_control(name) == shown


def test_metrics_for_people_have_a_line_for_each_class() -> None:
    row = {"class": "cat\x07", "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "auc": None, "support": 12}
    lines = list(metrics_lines({"top1": 0.75, "auc_macro": 0.9, "nll": 0.7, "count": 12, "per_class": [row]}))

    assert "top1               75.0 %" in lines
    assert lines[-2:] == [
        "class    precision   recall      F1  images",
        "cat\\x07     50.0 %  100.0 %  66.7 %      12",
    ]
