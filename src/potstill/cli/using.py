"""Verbs that use a trained model: predict, evaluate."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from potstill.cli.left_out import FollowLinks, SkipBad, say_left_out
from potstill.data.native_noise import silenced
from potstill.errors import DataError

Model = Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder (its distilled student) or a model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def predict(
    model: Model,
    paths: Annotated[list[Path], typer.Argument(metavar="PATHS...", help="Images, or folders of images.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 3,
    skip_bad: SkipBad = False,
    follow_links: FollowLinks = False,
    as_json: AsJson = False,
) -> None:
    """Say what is on images, with probabilities.

    Files of a folder that are no images are named on stderr.  Exits with 3 where an image cannot be read.
    """
    from potstill.console import plain
    from potstill.data.doctor.folder import passed_over_text
    from potstill.deploy.predict import find_images
    from potstill.deploy.predict import predict as predict_images

    found = find_images(paths, follow_links=follow_links)
    where = ", ".join(map(str, paths[:3])) + (" ..." if len(paths) > 3 else "")
    if found.left_out:
        say_left_out(where, found.left_out)
    if found.passed_over:
        sys.stderr.write(plain(f"{where}: {passed_over_text(found.passed_over)}") + "\n")
    with silenced():
        predictions = predict_images(model, found.images, top=top)
    if as_json:
        sys.stdout.write(json.dumps([each.as_dict() for each in predictions], indent=2) + "\n")
    else:
        for each in predictions:
            classes = ", ".join(f"{plain(name)} {share:.1%}" for name, share in each.classes)
            sys.stdout.write(f"{plain(str(each.path))}: {classes or 'error'}\n")
    broken = [each for each in predictions if each.error is not None]
    sys.stdout.flush()
    if broken and skip_bad:
        reasons = [(str(each.path), str(each.error).removeprefix(f"{each.path}: ")) for each in broken]
        say_left_out(where, reasons)
    elif broken:
        lines = "".join(f"\n{plain(str(each.error))}" for each in broken)
        raise DataError(
            f"{len(broken)} of {len(predictions)} images could not be read:{lines}\n"
            "To leave them out of the exit code: --skip-bad"
        )


def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(metavar="DIR", help="Labelled images: a folder, a manifest, or a name.")],
    skip_bad: SkipBad = False,
    follow_links: FollowLinks = False,
    as_json: AsJson = False,
) -> None:
    """Measure a trained model on labelled images.

    Classes are matched by name, whatever their order.
    """
    from potstill.console import metrics_lines
    from potstill.deploy.evaluate import evaluate as evaluate_model

    with silenced():
        metrics: dict[str, Any] = evaluate_model(model, data, skip_bad=skip_bad, follow_links=follow_links)
    skipped = metrics.get("skipped", ())
    if skipped:
        say_left_out(data, skipped)
    if as_json:
        sys.stdout.write(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write("\n".join(metrics_lines(metrics)) + "\n")
