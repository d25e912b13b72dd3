"""Formats and options of ``export``, their validation, and the metadata and data settings of a model."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from potstill.code_references import permit_code, resolve_reference
from potstill.data.settings import DataSettings
from potstill.errors import DataError, UsageError, did_you_mean
from potstill.export.evaluate import run_data_settings
from potstill.export.formats import COREML, EXECUTORCH, LITERT, TORCH_EXPORT, ExportFormat
from potstill.export.onnx import NCNN, ONNX, OPENVINO
from potstill.export.page import PAGE, create_page_format, find_runtime
from potstill.io import read_bytes, read_checksummed_json, sha256_hex
from potstill.models.exported_files import PREPROCESSING_MODES, ExportMetadata

EXPORT_FOLDER, NAME = "export", "model"
COMPARED_IMAGES = 200  # with PyTorch

FORMATS = {
    "onnx": ONNX,
    "openvino": OPENVINO,
    "litert": LITERT,
    "ncnn": NCNN,
    "page": PAGE,
    "executorch": EXECUTORCH,
    "coreml": COREML,
    "torch-export": TORCH_EXPORT,
}

MAX_DROP = 0.01  # of accuracy, one percentage point
ALL_THAT_RUN = "all-that-run"  # each format whose engine is installed, on the command line

MessageCallback = Callable[[str], None]


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        format: one of ``FORMATS``.
        inside: preprocessing that becomes part of the file: "none", "normalise" or "resize".
        int8: quantize to 8 bits; formats that are made of ONNX.
        max_drop: largest loss of accuracy on the test split by int8, in [0, 1].
        output: the file, with the format's suffix; None: ``export/`` in the folder of the model, or the working
            directory for one of the hub.
        data: path of the run's data, if it differs from the recipe's.
        runtime: folder of onnxruntime-web for a page; None: it is got by npm, once.
    """

    format: str = "onnx"
    inside: str = "none"
    int8: bool = False
    max_drop: float = MAX_DROP
    output: Path | None = None
    data: str | None = None
    runtime: Path | None = None


def find_format(name: str, runtime: Path | None = None) -> ExportFormat:
    """Return the format with this name; ``runtime`` is that of ``ExportOptions``."""
    if name not in FORMATS:
        raise UsageError(
            f"no format {name!r}{did_you_mean(name, [*FORMATS, ALL_THAT_RUN])}\n"
            f"Known formats: {', '.join(FORMATS)}; on the command line also {ALL_THAT_RUN}"
        )
    found = FORMATS[name]
    missing = [package for package in found.packages if find_spec(package) is None]
    if missing:
        needs = f"the format {name} needs {' and '.join(missing)}, not installed here"
        raise UsageError(f'{needs}\nInstall: pip install "potstill[{found.extra}]"')
    if found is PAGE:
        find_runtime(runtime)  # before a network is converted for it
        return create_page_format(runtime)
    if runtime is not None:
        raise UsageError(f"--runtime goes with --format page, not with {name}")
    return found


def export_data_settings(folder: Path, source: str | None) -> Any:
    """Return the data settings of a model's run, with ``source`` in place of its own if given."""
    settings = run_data_settings(folder)
    if source is not None:
        source = resolve_reference(source)
        permit_code([source])
    if settings is None and source is None:
        raise DataError(
            f"{folder} is not in a run, so there are no images to compare the export with it; name them: --data DIR"
        )
    if settings is None:
        return DataSettings(source=str(source))
    if source is None:
        from potstill.data.datasets import check_source

        try:
            check_source(settings)
        except UsageError as error:
            raise UsageError(
                f"{error}\nThe data of {folder} has moved, or its path is relative to the folder in which the run "
                "began: name it with --data DIR"
            ) from None
    return settings if source is None else settings.model_copy(update={"source": source, "target": None})


def check_all_options(options: ExportOptions) -> None:
    """Raise UsageError if the format, which may be ``ALL_THAT_RUN``, is unknown or does not support these options."""
    if options.format != ALL_THAT_RUN:
        check_options(options, find_format(options.format, options.runtime))
    elif options.output is not None:
        raise UsageError(f"--output names one file, and --format {ALL_THAT_RUN} writes several: leave it out")


def check_options(options: ExportOptions, form: ExportFormat) -> None:
    """Raise UsageError if the format does not support these options."""
    if options.inside not in PREPROCESSING_MODES:
        raise UsageError(
            f"--preprocessing is one of {', '.join(PREPROCESSING_MODES)}, got "
            f"{options.inside!r}{did_you_mean(options.inside, PREPROCESSING_MODES)}"
        )
    if options.inside not in form.inside:
        raise UsageError(
            f"the format {options.format} takes --preprocessing {' or '.join(form.inside)}, not {options.inside}"
        )
    if options.int8 and form.from_onnx is None:
        able = " or ".join(name for name, each in FORMATS.items() if each.from_onnx is not None)
        raise UsageError(f"--int8 goes with --format {able}, not with {options.format}")
    output = options.output
    if output is not None and (not output.name.endswith(form.suffix) or output.name == form.suffix or output.is_dir()):
        raise UsageError(f"--output is a file that ends in {form.suffix}, got {str(output)!r}")
    if not 0 <= options.max_drop <= 1:
        raise UsageError(
            f"--max-accuracy-drop is a share from 0 to 1 (0.01 is one point of accuracy), got {options.max_drop:g}"
        )


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of a model folder's or bare weights, by which an export is later recognised as outdated."""
    if (folder / "model.json").is_file():
        return str(read_checksummed_json(folder / "model.json")["sha256"])
    names = ("model.safetensors", "pytorch_model.bin")
    found = [folder / name for name in names if (folder / name).is_file()] if folder.is_dir() else [folder]
    return sha256_hex(read_bytes(found[0]))


def create_metadata(classifier: Any, options: ExportOptions) -> ExportMetadata:
    """Return the metadata for an export of a ``Classifier``."""
    return ExportMetadata(
        classifier.architecture, tuple(classifier.class_names), classifier.input, options.inside, int8=options.int8
    )


def without_preprocessing(metadata: ExportMetadata) -> ExportMetadata:
    """Return the metadata of the same export without preprocessing in the file."""
    return dataclasses.replace(metadata, inside="none")
