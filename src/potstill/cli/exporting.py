"""The verb that makes a trained model a file for other engines: export."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or the folder of one of its models.")]
Stage = Annotated[
    str | None, typer.Option("--model", metavar="STAGE", help="teacher, baseline or distilled.  [default: distilled]")
]
Form = Annotated[
    str, typer.Option("--format", metavar="NAME", help="onnx, openvino, torch-export, executorch or coreml.")
]
Inside = Annotated[
    str,
    typer.Option(
        metavar="none|normalise|resize",
        help="How much of the preparation of images becomes part of the file: none (it takes normalised numbers), "
        "normalise (pixels of the network's size), resize (pixels of any size).",
    ),
]


def export(
    run: Run,
    model: Stage = None,
    form: Form = "onnx",
    inside: Inside = "none",
    int8: Annotated[bool, typer.Option("--int8", help="Quantize to 8 bits, calibrated on training images.")] = False,
    max_drop: Annotated[float, typer.Option(help="Test accuracy that --int8 may lose; 0.01 is one point.")] = 0.01,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="[default: export/ beside the model]")] = None,
    data: Annotated[str | None, typer.Option(metavar="DIR", help="Where the run's data are now.")] = None,
) -> None:
    """Write a trained model as a file for other engines, compared with the original before.

    The comparison is with PyTorch, on images of the run's test split.  A file NAME.json beside it holds its SHA-256
    and what was measured.
    """
    from potstill.console import plain
    from potstill.deploy.export import Wish
    from potstill.deploy.export import export as export_model
    from potstill.deploy.onnx_model import facts_path
    from potstill.sealed import read_sealed_json

    def note(line: str) -> None:
        sys.stderr.write(f"{plain(line)}\n")

    wish = Wish(form, inside, int8, max_drop, output, data)
    path = export_model(run, model, wish, note=note)
    sizes = [each["bytes"] for each in read_sealed_json(facts_path(path))["files"].values()]
    sys.stdout.write(f"export: {plain(str(path))} ({sum(sizes) / 2**20:.1f} MiB)\n")
    if form == "onnx":
        sys.stdout.write(f"next:   potstill predict {plain(shlex.quote(str(path)))} IMAGE\n")
