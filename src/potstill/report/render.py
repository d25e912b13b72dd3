"""Render the files of a run from its results: figures and text reports of each stage, report.md and report.html.

Each section of the page has a function ``NAME_context(run)``, which returns the values of the template of that name, or
None if there are none.
"""

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.experiment.run_folder import RunFolder
from potstill.io import write_bytes, write_text
from potstill.report import diagnostics, error_analysis, overview, provenance, theme
from potstill.report.display_names import escape_invisible
from potstill.report.run_reader import SPLITS, Run, StageResult, read_run
from potstill.report.stage_figures import stage_pictures
from potstill.report.text_reports import classification_report_text, metrics_text, model_card

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True)
class Section:
    """A part of the page; ``name`` is its anchor and its template."""

    name: str
    title: str
    context: Callable[[Run], dict[str, Any] | None]


SECTIONS = (
    Section("verdict", "Verdict", overview.verdict_context),
    Section("warnings", "Warnings", overview.warnings_context),
    Section("comparison", "Comparison", overview.comparison_context),
    Section("curves", "Curves", diagnostics.curves_context),
    Section("confusion", "Confusion matrices", error_analysis.confusion_context),
    Section("classes", "Class by class", error_analysis.classes_context),
    Section("fidelity", "Fidelity", diagnostics.fidelity_context),
    Section("calibration", "Calibration", diagnostics.calibration_context),
    Section("images", "Images", error_analysis.images_context),
    Section("advice", "Advice", overview.advice_context),
    Section("exports", "Exports", provenance.exports_context),
    Section("data", "Data", provenance.data_context),
    Section("reproduce", "How to reproduce", provenance.reproduce_context),
)


def render_page(run: Run) -> str:
    """Return the page as self-contained HTML without scripts."""
    found = [(section, section.context(run)) for section in SECTIONS]
    shown = [(section, values) for section, values in found if values is not None]
    results = run.results
    subtitle = " · ".join(str(results[key]) for key in ("recipe", "created") if results.get(key))
    return render_template("run.html.j2", {"title": run.name, "subtitle": subtitle, "sections": shown})


def render_template(template: str, values: dict[str, Any]) -> str:
    """Render a template of this package with the page's colours and ``values``."""
    light, dark = theme.css_variables()
    environment = _jinja_environment()
    style = environment.get_template("style.css.j2").render(
        light=light, dark=dark, brighter=theme.DARK_IMAGE_BRIGHTNESS
    )
    # For the Content-Security-Policy: the browser accepts no other style sheet.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template(template).render(style=style, style_hash=digest, **values)


@cache
def _jinja_environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Invisible characters are escaped (finalize), then HTML; not so values with `|safe`, our own SVG and CSS.
    return Environment(
        loader=PackageLoader("potstill.report", "templates"),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _finalize(value: Any) -> Any:
    # Markup is a subclass of str: our own SVG, CSS and <pre> text keep their line ends.
    return escape_invisible(value) if type(value) is str else value


def render(run: Path | str) -> Path:
    """Write all figures, text reports, report.md and report.html of a run folder; return the path of report.html.

    Reads only files of the run: results.json, recipe.yaml, environment.json, each stage's metrics and confusion
    matrices, and the students' predictions on test.  Absent stages and files are left out.

    Raises:
        ArtifactError: no run folder, or a damaged file.
        StorageError: the folder cannot be written, or another process is writing in it.
    """
    folder = RunFolder(Path(run))
    with folder.held(writing=True):
        return _render_run(read_run(folder.path))


def _render_run(found: Run) -> Path:
    for stage in found.stages.values():
        _render_stage(found, stage)
    for stage in found.repeats.values():  # page and figures show the first seed
        write_text(stage.folder / "metrics.txt", metrics_text(found, stage))
    text = model_card(found)
    if text is not None:
        write_text(found.folder / "report.md", text)
    target = found.folder / "report.html"
    write_text(target, render_page(found))
    return target


def _render_stage(run: Run, stage: StageResult) -> None:
    write_text(stage.folder / "metrics.txt", metrics_text(run, stage))
    for split in SPLITS:
        text = classification_report_text(stage, split)
        if text is not None:
            write_text(stage.folder / f"classification_report_{split}.txt", text)
    for name, data in stage_pictures(run, stage):
        write_bytes(stage.folder / name, data)
