"""Verbs that use a trained model: predict, evaluate."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from potstill.data.native_noise import silenced
from potstill.errors import DataError

Model = Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder (its distilled student) or a model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def predict(
    model: Model,
    paths: Annotated[list[Path], typer.Argument(metavar="PATHS...", help="Images, or folders of images.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Say what is on images, with probabilities."""
    from potstill.console import plain
    from potstill.deploy.predict import predict as predict_images

    with silenced():
        predictions = predict_images(model, paths, top=top)
    if as_json:
        sys.stdout.write(json.dumps([each.as_dict() for each in predictions], indent=2) + "\n")
    else:
        for each in predictions:
            classes = ", ".join(f"{plain(name)} {share:.1%}" for name, share in each.classes)
            sys.stdout.write(f"{plain(str(each.path))}: {classes or 'error'}\n")
    broken = [each for each in predictions if each.error is not None]
    sys.stdout.flush()
    if broken:
        lines = "".join(f"\n{plain(str(each.error))}" for each in broken)
        raise DataError(f"{len(broken)} of {len(predictions)} images could not be read:{lines}")


def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(metavar="DIR", help="Labelled images: a folder, a manifest, or a name.")],
    as_json: AsJson = False,
) -> None:
    """Measure a trained model on labelled images.

    Classes are matched by name, whatever their order.
    """
    from potstill.console import metrics_lines
    from potstill.deploy.evaluate import evaluate as evaluate_model

    with silenced():
        metrics: dict[str, Any] = evaluate_model(model, data)
    if as_json:
        sys.stdout.write(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write("\n".join(metrics_lines(metrics)) + "\n")
