"""Render the files of a run from its results: figures and text reports of each stage, report.md and report.html.

The sections on data, exports and reproduction are here, larger ones in modules of their own.

Each section of the page has a function ``NAME_context(run)``, which returns the values of the template of that name, or
None if there are none.
"""

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.experiment.run_folder import RunFolder
from potstill.formatting import MISSING, format_count, format_duration, format_number, format_percent, format_scaled
from potstill.io import read_checksummed_json, write_bytes, write_text
from potstill.methods import describe_method
from potstill.report import canvas, diagnostics, overview
from potstill.report.advice import code_flag
from potstill.report.display_names import escape_invisible
from potstill.report.run_reader import SPLITS, Run, StageResult, read_run
from potstill.report.stage_figures import stage_pictures
from potstill.report.text_reports import classification_report_text, metrics_text, model_card

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


_MAX_UNFOLDED_CLASSES = 20


def data_context(run: Run) -> dict[str, Any] | None:
    """Return the source of the images and the number of images by class and split."""
    data = run.data
    if not data:
        return None
    counts = data.get("counts") or {}
    splits = [split for split in SPLITS if isinstance(counts.get(split), dict)]
    names = run.class_names
    rows = [(name, [format_count(counts[split].get(name, 0)) for split in splits]) for name in names]
    totals = [sum(format_number(n) or 0 for n in counts[split].values()) for split in splits]
    size = format_number(data.get("size"))
    before = data.get("source_domain") or {}
    facts = [
        ("Source domain", " · ".join(filter(None, map(before.get, ("source", "origin"))))),
        ("Target domain, of which all figures are" if before else "Source", data.get("source")),
        ("Split", data.get("origin")),
        ("Classes", format_count(len(names)) if names else "none: neither images nor teacher name any"),
        (
            "Images",
            f"{format_count(sum(totals))} "
            f"({', '.join(f'{s} {format_count(n)}' for s, n in zip(splits, totals, strict=True))})",
        ),
        ("Size", f"{format_count(size)} × {format_count(size)} pixels" if size else None),
        ("Without labels", (data.get("unlabeled") or {}).get("sentence")),
        ("Training images", data.get("training_images") and f"kept as {data['training_images']}"),
        ("Not square", f"{data.get('resize_mode')}: {data['unseen'][0]}" if data.get("unseen") else None),
        (
            "Left out",
            f"{format_count(skipped)}, listed in skipped.csv"
            if (skipped := format_number(data.get("skipped")))
            else None,
        ),
        ("Fingerprint", data.get("fingerprint")),
    ]
    return {
        "facts": [(name, str(value)) for name, value in facts if value not in (None, "", MISSING)],
        "splits": splits,
        "rows": rows,
        "totals": [format_count(total) for total in totals],
        "fold": len(names) > _MAX_UNFOLDED_CLASSES,
    }


def exports_context(run: Run) -> dict[str, Any] | None:
    """Return a row for each exported file, and a link to the report of each `potstill shrink`; None without either."""
    found = [
        (path, read_checksummed_json(path))
        for stage in run.stages.values()
        for path in sorted((stage.folder / "export").glob("*.json"))
    ]
    shrunk = [
        (f"{path.parent.relative_to(run.folder).as_posix()}/shrink.html", _shrink_sentence(read_checksummed_json(path)))
        for path in sorted(run.folder.glob("shrink/*/shrink.json"))
    ]
    if not found and not shrunk:
        return None
    rows = [_export_row(path, facts) for path, facts in found]
    unchecked = [name for (name, _), (_, facts) in zip(rows, found, strict=True) if not facts.get("parity")]
    return {"rows": rows, "unchecked": unchecked, "shrunk": shrunk}


def _shrink_sentence(found: dict[str, Any]) -> str:
    after, before = (each["bytes"] for each in (found["candidates"][found["chosen"]], found["reference"]))
    sizes = f"{format_scaled(after, 'B')} in place of {format_scaled(before, 'B')}"
    return f"{found['stage']}: {sizes}, for a loss of at most {found['max_loss']:g} points on val"


def _export_row(path: Path, facts: dict[str, Any]) -> tuple[str, list[str]]:
    files = facts.get("files") or {}
    size = sum(int(format_number(each.get("bytes")) or 0) for each in files.values() if isinstance(each, dict))
    parity, accuracy = facts.get("parity") or {}, facts.get("accuracy") or {}
    largest = format_number(parity.get("max_difference"))
    cells = [
        str(facts.get("format")) + (", int8" if facts.get("int8") else ""),
        format_scaled(size, "B"),
        "not measured" if largest is None else f"{largest:.1e}",
        format_percent(parity.get("agreement") if not accuracy else accuracy.get("agreement")),
        "" if not accuracy else f"{format_percent(accuracy.get('before'))} → {format_percent(accuracy.get('after'))}",
        _latency_text(facts.get("latency_ms") or {}),
    ]
    return f"{path.parent.parent.name}: {', '.join(sorted(files)) or path.stem}", cells


def _latency_text(latency: dict[str, Any]) -> str:
    parts = []
    for name, each in latency.items():
        p50, p95 = (format_number(each.get(key)) if isinstance(each, dict) else None for key in ("p50", "p95"))
        if p50 is not None and p95 is not None:
            parts.append(f"{name} {p50:.2f} / {p95:.2f} ms")
    return ", ".join(parts)


_REPORTED_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")  # whose versions may change results


def reproduce_context(run: Run) -> dict[str, Any] | None:
    """Return facts, commands, recipe and environment."""
    results = run.results
    method = results.get("method") or {}
    options = ", ".join(f"{key} = {_option_text(value)}" for key, value in method.items() if key != "name")
    seed = format_number(results.get("seed"))
    facts = [
        ("Recipe", results.get("recipe")),
        ("Method", f"{method.get('name')} ({options})" if options else method.get("name")),
        *_seed_facts(seed, (run.comparison or {}).get("seeds")),
        *_machine_facts(run.environment),
        ("Potstill", results.get("potstill")),
        ("Made", results.get("created")),
        ("Took", format_duration(results.get("seconds"))),
    ]
    folder = run.folder.resolve()
    path = run.shown_path
    again = ["potstill", "run", f"{path}/recipe.yaml", "--name", f"{folder.name[:58]}-again", *code_flag(run)]
    commands = [
        ("The same settings again", again),
        (
            "The same run, and whether it gives the same results",
            ["potstill", "run", "--reproduce", path, *code_flag(run)],
        ),
        ("A prediction with its student", ["potstill", "predict", path, "IMAGE.jpg"]),
        ("This page again", ["potstill", "report", path]),
    ]
    if run.cosine_teachers:  # it predicts nothing before it has a head
        commands[2] = "A head, from labeled images", ["potstill", "run", "RECIPE", "--data", "DIR", "--student", path]
    if run.folds:
        commands[1:3] = [("A model to use, trained on all images", deployment_command(run))]
    return {
        "facts": [(name, str(value)) for name, value in facts if value not in (None, "", MISSING)],
        "commands": [(title, shlex.join(words)) for title, words in (commands if run.recipe else commands[2:])],
        "recipe": escape_lines(run.recipe),
        "environment": escape_lines(run.environment),
    }


def deployment_command(run: Run) -> list[str]:
    """Return the command that trains a model on all images of a cross-validation."""
    folder = run.folder.resolve()
    root = [] if folder.parent.name == "runs" else ["--output-dir", folder.parent.name]
    return [
        "potstill",
        "run",
        f"{run.shown_path}/recipe.yaml",
        "--set",
        "data.fold=all",
        "--name",
        f"{folder.name[:60]}-all",
        *root,
        *code_flag(run),
    ]


def _seed_facts(first: float | None, several: Any) -> list[tuple[str, str]]:
    if first is None:
        return []
    seeds = several.get("seeds") if isinstance(several, dict) else None
    if not isinstance(seeds, list) or len(seeds) < 2:
        return [("Seed", f"{first:.0f}")]
    return [("Seeds", f"{', '.join(str(seed) for seed in seeds)} of baseline and distilled; {first:.0f} of all others")]


def _machine_facts(environment: str | None) -> list[tuple[str, str]]:
    try:
        found = json.loads(environment or "{}")
    except (ValueError, RecursionError):
        return []
    if not isinstance(found, dict):
        return []
    packages = found.get("packages")
    versions = [f"Python {found['python']}"] if found.get("python") else []
    versions += (
        [f"{name} {packages[name]}" for name in _REPORTED_PACKAGES if name in packages]
        if isinstance(packages, dict)
        else []
    )
    where = [str(found[key]) for key in ("device", "precision", "platform") if found.get(key)]
    if format_number(found.get("threads")):
        where.insert(1, f"{found['threads']} thread{'' if found['threads'] == 1 else 's'}")
    return [("Versions", ", ".join(versions)), ("Machine", ", ".join(where))]


def _option_text(value: Any) -> str:
    """Return an option as text, with nested methods by name."""
    inside = isinstance(value, dict) and "name" in value
    several = isinstance(value, list) and all(isinstance(each, dict) and "name" in each for each in value)
    return describe_method(value) if inside or (several and value) else str(value)


def escape_lines(text: str | None) -> str | None:
    """Escape invisible characters except line ends."""
    return None if text is None else "\n".join(escape_invisible(line) for line in text.expandtabs(4).splitlines())


@dataclass(frozen=True)
class Section:
    """A part of the page; ``name`` is its anchor and its template.  Folded sections open at a click."""

    name: str
    title: str
    context: Callable[[Run], dict[str, Any] | None]
    folded: bool = True


SECTIONS = (
    Section("verdict", "Verdict", overview.verdict_context, folded=False),
    Section("advice", "What to do next", overview.advice_context, folded=False),
    Section("warnings", "Warnings", overview.warnings_context, folded=False),
    Section("comparison", "Comparison", overview.comparison_context),
    Section("flips", "Negative flips", overview.flips_context),
    Section("curves", "Curves", diagnostics.curves_context),
    Section("confusion", "Confusion matrices", diagnostics.confusion_context),
    Section("classes", "Class by class", diagnostics.classes_context),
    Section("fidelity", "Fidelity", diagnostics.fidelity_context),
    Section("calibration", "Calibration", diagnostics.calibration_context),
    Section("cascade", "Cascade", diagnostics.cascade_context),
    Section("images", "Images", diagnostics.images_context),
    Section("exports", "Exports", exports_context),
    Section("data", "Data", data_context),
    Section("reproduce", "How to reproduce", reproduce_context),
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
    light, dark = canvas.css_variables()
    environment = _jinja_environment()
    style = environment.get_template("style.css.j2").render(
        light=light, dark=dark, brighter=canvas.DARK_IMAGE_BRIGHTNESS
    )
    # For the Content-Security-Policy: the browser accepts no other style sheet.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template(template).render(style=style, style_hash=digest, **values)


@cache
def _jinja_environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Invisible characters are escaped (finalize), then HTML; not so values with `|safe`, our own SVG and CSS.
    environment = Environment(
        loader=PackageLoader("potstill.report", "templates"),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = mark_code
    return environment


def mark_code(text: str) -> "Markup":
    """Return text as HTML, with what stands between backticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(escape_invisible(text)))))  # nosec B704 # escaped


def _finalize(value: Any) -> Any:
    # Markup is a subclass of str: our own SVG, CSS and <pre> text keep their line ends.
    return escape_invisible(value) if type(value) is str else value


def render(run: Path | str) -> Path:
    """Write all figures, text reports, report.md and report.html of a run folder; return the path of report.html.

    Those of a cross-validation are written after those of its folds.  Reads only files of the run: results.json,
    recipe.yaml, environment.json, each stage's metrics and confusion matrices, and the students' predictions on test.
    Absent stages and files are left out.
    """
    folder = RunFolder(Path(run))
    for fold in folder.folds:
        if fold.results.is_file():
            render(fold.path)
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
