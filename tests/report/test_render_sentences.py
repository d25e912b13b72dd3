"""A reader's test: what five made-up results say on the page and in the terminal.

The results are made of chosen images (which ones each network gets right), and pass through the same code as a run's:
comparison, results.json, report.html, terminal.
"""

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.cli.results import print_results
from potstill.experiment.comparison import compare_with_baseline
from potstill.report.render import render_page
from potstill.report.run_reader import read_run

IMAGES = 400  # on test
Write = Callable[..., Path]


def right(wrong: int, *, fixed: int = 0, broken: int = 0, shift: int = 0) -> np.ndarray[Any, Any]:
    """[N] bool: the first ``wrong`` images are wrong, but for ``fixed`` of these; and ``broken`` others are, too."""
    found = np.arange(IMAGES) >= wrong
    found[:fixed] = True
    found[IMAGES - broken :] = False
    return np.roll(found, shift)


@pytest.fixture
def write(run_builder: Any, tmp_path: Path) -> Write:
    """Writes a run folder from which images each network gets right, seed by seed."""

    class Scripted(run_builder):  # type: ignore[misc]
        script: dict[str, np.ndarray[Any, Any]]

        def _stage(self, name: str) -> dict[str, Any]:
            self.current = name
            found: dict[str, Any] = super()._stage(name)
            return found

        def _probabilities(self, labels: Any, skill: float) -> np.ndarray[Any, Any]:
            said = np.where(np.resize(self.script[self.current], len(labels)), labels, (labels + 1) % 4)
            found: np.ndarray[Any, Any] = np.full((len(labels), 4), 0.05)
            found[np.arange(len(labels)), said] = 0.85
            return found

        def _results(self, stages: dict[str, Any]) -> dict[str, Any]:
            first = {name: stages[name] for name in ("teacher", "baseline", "distilled")}
            repeats = {name: stages[name] for name in stages if name not in first}
            found: dict[str, Any] = super()._results(first)
            return found | {
                "repeats": repeats,
                "comparison": compare_with_baseline(first, self.right, None, repeats, 0),
            }

    def make(teacher: Any, seeds: Sequence[tuple[Any, Any]]) -> Path:
        builder = Scripted(tmp_path / "runs" / "made", list("abcd"), epochs=2, test_images=IMAGES // 4)
        builder.images |= {"train": 2, "val": 2}
        builder.script = {"teacher": teacher}
        for at, (baseline, distilled) in enumerate(seeds, start=1):
            end = "" if at == 1 else f"-{at}"
            builder.script |= {f"baseline{end}": baseline, f"distilled{end}": distilled}
        builder.stages = tuple(builder.script)
        found: Path = builder.write()
        return found

    return make


def read(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str, str]:
    """What stands in the verdict of the page, in its advice, and in the terminal; each as running text."""
    run = read_run(folder)
    print_results(run.results, folder / "report.html")
    source = render_page(run)
    parts = {name: _text(source, name) for name in ("verdict", "advice")}
    return parts["verdict"], parts["advice"], " ".join(capsys.readouterr().out.split())


def _text(source: str, section: str) -> str:
    match = re.search(rf'<section id="{section}".*?</section>', source, re.DOTALL)
    return "" if match is None else " ".join(html.unescape(re.sub("<[^>]+>", " ", match[0])).split())


TEACHER = right(20)  # 95.0 %


def test_clear_gain(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    # Baseline 80.0 %; gains of 40 - 8, 36 - 8 and 44 - 8 images: +8, +7, +9 points.
    pairs = [(right(n), right(n, fixed=fixed, broken=8)) for n, fixed in ((84, 40), (80, 36), (76, 44))]
    verdict, advice, terminal = read(write(TEACHER, pairs), capsys)
    headline = (
        "Distillation helped: the student gained 8.0 points of top-1 on average over 3 seeds, on 400 test images "
        "(95 % interval over seeds and test images together +"
    )
    for text in (verdict, terminal):
        assert headline in text
        assert "teacher 95.0 %, baseline 80.0 %, distilled 88.0 % (baseline and distilled: mean over the seeds)" in text
        assert re.search(
            r"leads the baseline by 15\.0 points; .* closed 53 % of this gap \(95 % interval \d+ to \d+ %\)", text
        )
        assert "50.8 times smaller in parameters and 3.0 times faster for one image" in text
        assert "more training than the baseline alone (teacher 1 min 23 s, distilled 1 min 23 s, baseline" in text
        assert "All seeds learn from the same teacher" in text
        assert not re.search(r"One seed|hurt|No clear|lost", text)
    assert "seed 1: +7.0 points of top-1, distilled against baseline (36 images newly right, 8 newly wrong)" in terminal
    assert "Few seeds" not in advice
    assert "One seed" not in advice


def test_clear_loss(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [(right(80), right(80, fixed=8, broken=broken)) for broken in (40, 36, 44)]
    verdict, advice, terminal = read(write(TEACHER, pairs), capsys)
    for text in (verdict, terminal):
        assert "Distillation hurt: the student lost 8.0 points of top-1 on average over 3 seeds" in text
        assert "(95 % interval over seeds and test images together -" in text
        assert "did not close this gap but widened it" in text
        assert not re.search(r"helped|gained|No clear|% of this gap", text)
    assert "Distillation hurt although the teacher is better" in advice


def test_noise(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    # +1, -1 and 0.5 points: 0.17 on average, +- 4.303 * 1.04 / sqrt(3) = 2.59
    pairs = [(right(80), right(80, fixed=fixed, broken=broken)) for fixed, broken in ((14, 10), (10, 14), (12, 10))]
    verdict, advice, terminal = read(write(TEACHER, pairs), capsys)
    for text in (verdict, terminal):
        assert "No clear difference: with distillation the student's top-1 changed by +0.2 points on average" in text
        assert re.search(r"95 % interval over seeds and test images together -\d.* to \+\d.*, which includes 0", text)
        assert "cannot tell how much of that gap distillation closed" in text
        assert not re.search(r"helped|hurt|gained|lost|% of this gap", text)
    assert "Few seeds" in advice
    assert "--resume --seeds 5" in advice


def test_one_seed(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    verdict, advice, terminal = read(write(TEACHER, [(right(80), right(80, fixed=40, broken=8))]), capsys)
    for text in (verdict, terminal):
        assert (
            "On this seed, the distilled student's top-1 is 8.0 points above the baseline's on 400 test images" in text
        )
        assert "repeat with --seeds 5 to know whether distillation helps" in text
        assert "One seed cannot separate" in text
        assert "helped" not in text
        assert "the interval covers the choice of test images only" in text
        assert "All seeds" not in text
    assert "One seed only" in advice
    assert "potstill run runs/made/recipe.yaml --resume --seeds 5 --name made" in advice
    assert "2 min 46 s as this one did" in advice  # twice 83 s


def test_teacher_worse_than_baseline(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [(right(60), right(60, fixed=20 + more, broken=20)) for more in (0, 2, -2)]
    verdict, advice, terminal = read(write(right(100), pairs), capsys)  # 75 % against 85 %
    for text in (verdict, terminal):
        assert "The teacher is 10.0 points worse than the baseline, so there was no gap to close" in text
        assert "a better teacher comes first" in text
        assert not re.search(r"helped|hurt|closed \d|leads the baseline", text)
    assert "The teacher is no better than the student. On test the teacher's top-1 is 10.0 points below" in advice


def test_seeds_that_agree_do_not_make_up_for_few_images(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """Every seed gains the same 4 of 14 images: sure over seeds, luck over images."""
    pairs = [(right(80), right(80, fixed=9, broken=5))] * 3
    verdict, _, _ = read(write(TEACHER, pairs), capsys)
    assert "No clear difference" in verdict
    assert "which includes 0" in verdict
    assert "helped:" not in verdict


def test_images_that_agree_do_not_make_up_for_seeds_that_do_not(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """+14, +1 and +1 points: no chance of images, but of seeds."""
    pairs = [(right(80), right(80, fixed=fixed, broken=2)) for fixed in (58, 6, 6)]
    verdict, _, _ = read(write(TEACHER, pairs), capsys)
    assert "No clear difference" in verdict
    assert "which includes 0" in verdict


def test_a_lead_of_the_teacher_that_may_be_luck_has_no_share(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    baseline = right(24)
    verdict, _, _ = read(write(right(20, shift=2), [(baseline, right(24, fixed=24))]), capsys)
    assert "On this seed" in verdict
    assert "leads the baseline by 1.0 points" in verdict
    assert "which may be sampling noise in the test set (95 % interval" in verdict
    assert not re.search("% of this gap|of the gap to the teacher", verdict)
