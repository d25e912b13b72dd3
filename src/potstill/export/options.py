"""Options of ``export``, their validation, and the metadata and data settings that follow from a model's folder."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.errors import DataError, UsageError, did_you_mean
from potstill.export.evaluate import run_data_settings
from potstill.export.formats import PREPROCESSING_MODES, ExportFormat, ExportMetadata
from potstill.io import read_checksummed_json

EXPORT_FOLDER, NAME = "export", "model"
COMPARED_IMAGES, CALIBRATION_IMAGES = 200, 256  # images: for the comparison with PyTorch, to calibrate int8

MessageCallback = Callable[[str], None]


@dataclass(frozen=True)
class ExportOptions:
    """What is to be exported, and how.

    Attributes:
        format: one of ``formats.FORMATS``.
        inside: how much of the preparation of images becomes part of the file: "none", "normalise" or "resize".
        int8: quantize to 8 bits; ONNX only.
        max_drop: largest loss of accuracy on the test split that int8 may cost, as a share in [0, 1].
        output: the file, with the format's suffix; None: ``export/`` in the folder of the model.
        data: where the run's data are now, if not where its recipe says.
    """

    format: str = "onnx"
    inside: str = "none"
    int8: bool = False
    max_drop: float = 0.01
    output: Path | None = None
    data: str | None = None


def export_data_settings(folder: Path, source: str | None) -> Any:
    """The data settings of the run that a model stands in, with another source where one is given.

    Raises:
        DataError: a model without a run, and no source either.
    """
    own = run_data_settings(folder)
    if own is None and source is None:
        raise DataError(
            f"{folder} stands in no run, so that its images are not known, on which an export is compared with it; "
            "name them: --data DIR"
        )
    if own is None:
        from potstill.data.settings import DataSettings

        return DataSettings(source=str(source))
    return own if source is None else own.model_copy(update={"source": source, "target": None})


def check_options(wish: ExportOptions, form: ExportFormat) -> None:
    """Check that the format takes these options; UsageError says which it takes."""
    if wish.inside not in PREPROCESSING_MODES:
        raise UsageError(
            f"--preprocessing is one of {', '.join(PREPROCESSING_MODES)}, got "
            f"{wish.inside!r}{did_you_mean(wish.inside, PREPROCESSING_MODES)}"
        )
    if wish.inside not in form.inside:
        raise UsageError(
            f"the format {wish.format} takes --preprocessing {' or '.join(form.inside)}, not {wish.inside}"
        )
    if wish.int8 and wish.format != "onnx":
        raise UsageError(f"--int8 goes with --format onnx, not with {wish.format}")
    output = wish.output
    if output is not None and (not output.name.endswith(form.suffix) or output.name == form.suffix or output.is_dir()):
        raise UsageError(f"--output is a file that ends in {form.suffix}, got {str(output)!r}")
    if not 0 <= wish.max_drop <= 1:
        raise UsageError(
            f"--max-accuracy-drop is a share from 0 to 1 (0.01 is one point of accuracy), got {wish.max_drop:g}"
        )


def weights_sha256(folder: Path) -> str:
    """SHA-256 of the weights that a model folder holds: says later whether an export is still of them."""
    return str(read_checksummed_json(folder / "model.json")["sha256"])


def create_metadata(classifier: Any, wish: ExportOptions) -> ExportMetadata:
    """What an export of a ``Classifier`` takes and gives."""
    return ExportMetadata(
        classifier.architecture, tuple(classifier.class_names), classifier.input, wish.inside, int8=wish.int8
    )


def without_preprocessing(what: ExportMetadata) -> ExportMetadata:
    """The same without preparation inside."""
    return dataclasses.replace(what, inside="none")
