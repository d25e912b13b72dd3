"""Export formats.  No torch here.

Each format is a module with a line in ``FORMATS``.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from potstill.errors import UsageError, did_you_mean
from potstill.models.exported_files import PREPROCESSING_MODES, ExportMetadata

if TYPE_CHECKING:
    from torch import nn


ExportedFiles = Mapping[str, bytes]  # suffix -> content
Predictor = Callable[[NDArray[Any]], NDArray[Any]]  # a batch as the file takes it -> logits [B, K]


@dataclass(frozen=True)
class ExportFormat:
    """An export format.

    Attributes:
        convert: converts a network in eval mode on the CPU, images [B, 3, S, S] -> logits [B, K], to the content of a
            file for each suffix.
        open: loads the result of ``convert`` as a function; None if such files run only on other machines.
        suffix: of the file to open.
        packages: required modules.
        extra: of potstill, which installs them.
        inside: preprocessing that can be part of the file.
        any_batch: whether a file takes batches of any size; else one image at a time.
    """

    convert: "Callable[[nn.Module, ExportMetadata], ExportedFiles]"
    open: Callable[[ExportedFiles], Predictor] | None
    suffix: str
    packages: tuple[str, ...] = ()
    extra: str = "export"
    inside: tuple[str, ...] = PREPROCESSING_MODES
    any_batch: bool = True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block, discard warnings, log lines up to WARNING and prints.

    Converters report on their internals, which users of potstill cannot change.
    """
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    sink = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


FORMATS = {
    "onnx": "potstill.export.formats.onnx",
    "openvino": "potstill.export.formats.openvino",
    "torch-export": "potstill.export.formats.torch_export",
    "executorch": "potstill.export.formats.executorch",
    "coreml": "potstill.export.formats.coreml",
}


def find_format(name: str) -> ExportFormat:
    """Return the format with this name.

    Raises:
        UsageError: an unknown name, or a package is not installed.
    """
    if name not in FORMATS:
        raise UsageError(f"no format {name!r}{did_you_mean(name, FORMATS)}\nKnown formats: {', '.join(FORMATS)}")
    found: ExportFormat = import_module(FORMATS[name]).FORMAT
    missing = [package for package in found.packages if find_spec(package) is None]
    if missing:
        needs = f"the format {name} needs {' and '.join(missing)}, not installed here"
        raise UsageError(f'{needs}\nInstall: pip install "potstill[{found.extra}]"')
    return found
