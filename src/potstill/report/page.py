"""The page of one run: a list of sections, each a small module and a template of the same name."""

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from potstill.report import theme
from potstill.report.contents import Run
from potstill.report.names import plain
from potstill.report.sections import (
    advice,
    calibration,
    classes,
    comparison,
    confusion,
    curves,
    data,
    exports,
    fidelity,
    images,
    reproduce,
    verdict,
    warnings,
)

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True)
class Section:
    """A part of the page; ``name`` is its anchor and its template."""

    name: str
    title: str
    context: Callable[[Run], dict[str, Any] | None]


SECTIONS = (
    Section("verdict", "Verdict", verdict.context),
    Section("warnings", "Warnings", warnings.context),
    Section("comparison", "Comparison", comparison.context),
    Section("curves", "Curves", curves.context),
    Section("confusion", "Confusion matrices", confusion.context),
    Section("classes", "Class by class", classes.context),
    Section("fidelity", "Fidelity", fidelity.context),
    Section("calibration", "Calibration", calibration.context),
    Section("images", "Images", images.context),
    Section("advice", "Advice", advice.context),
    Section("exports", "Exports", exports.context),
    Section("data", "Data", data.context),
    Section("reproduce", "How to reproduce", reproduce.context),
)


def page(run: Run) -> str:
    """The whole page as HTML: one file, no script, nothing loaded from anywhere."""
    found = [(section, section.context(run)) for section in SECTIONS]
    shown = [(section, values) for section, values in found if values is not None]
    results = run.results
    subtitle = " · ".join(str(results[key]) for key in ("recipe", "created") if results.get(key))
    return fill("run.html.j2", {"title": run.name, "subtitle": subtitle, "sections": shown})


def fill(template: str, values: dict[str, Any]) -> str:
    """A template of this package with the page's colours and ``values``."""
    light, dark = theme.css_variables()
    environment = _environment()
    style = environment.get_template("style.css.j2").render(light=light, dark=dark, brighter=theme.BRIGHTER)
    # The browser hashes what stands between <style> and </style>: no other style sheet can be smuggled in.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template(template).render(style=style, style_hash=digest, **values)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Every value is made visible text (finalize), then escaped; only `|safe`, for our own SVG and CSS, is not.
    return Environment(
        loader=PackageLoader("potstill.report", "templates"),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _visible(value: Any) -> Any:
    # Markup is a str subclass: our own SVG, CSS and <pre> text must keep their line ends.
    return plain(value) if type(value) is str else value
