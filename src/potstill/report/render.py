"""Everything that a run shows, made again from its files: pictures and texts of each stage, and the page."""

from pathlib import Path

from potstill.artifacts import write_bytes, write_text
from potstill.experiments.run_folder import RunFolder
from potstill.report.card import card
from potstill.report.contents import SPLITS, Run, Stage, read_run
from potstill.report.page import page
from potstill.report.pictures import pictures
from potstill.report.texts import classification_report_text, metrics_text


def render(run: Path | str) -> Path:
    """Write all pictures, text reports, report.md and report.html of a run folder; returns the path of report.html.

    Reads results.json, recipe.yaml, environment.json, each stage's metrics and confusion matrices, and the students'
    predictions on test; nothing else, and no network.  Stages and files that are absent are left out.

    Raises:
        ArtifactError: no run folder, or a damaged file.
        StorageError: the folder cannot be written, or another process is writing in it.
    """
    folder = RunFolder(Path(run))
    with folder.held(writing=True):
        return _render(read_run(folder.path))


def _render(found: Run) -> Path:
    for stage in found.stages.values():
        _render_stage(found, stage)
    for stage in found.repeats.values():  # the page and the pictures show the first seed
        write_text(stage.folder / "metrics.txt", metrics_text(found, stage))
    text = card(found)
    if text is not None:
        write_text(found.folder / "report.md", text)
    target = found.folder / "report.html"
    write_text(target, page(found))
    return target


def _render_stage(run: Run, stage: Stage) -> None:
    write_text(stage.folder / "metrics.txt", metrics_text(run, stage))
    for split in SPLITS:
        text = classification_report_text(stage, split)
        if text is not None:
            write_text(stage.folder / f"classification_report_{split}.txt", text)
    for name, data in pictures(run, stage):
        write_bytes(stage.folder / name, data)
