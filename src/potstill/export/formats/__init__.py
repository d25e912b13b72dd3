"""Export formats, and the metadata of an exported model.  No torch here.

Each format is a module with a line in ``FORMATS``.
"""

import contextlib
import dataclasses
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from potstill.errors import ArtifactError, UsageError, did_you_mean
from potstill.input_spec import RESIZE_MODES, InputSpec

if TYPE_CHECKING:
    from torch import nn


METADATA_KEY = "potstill"  # in the file's own metadata
METADATA_SCHEMA = 1
PREPROCESSING_MODES = ("none", "normalise", "resize")


@dataclass(frozen=True)
class ExportMetadata:
    """Inputs and outputs of an exported model.

    Input with ``inside`` "none": normalised float32 images [B, 3, S, S]; "normalise": uint8 pixels [B, 3, S, S] of
    images at the network's size; "resize": uint8 pixels [B, H, W, 3] of any size, equal within a batch.
    Output: logits [B, K], float32.
    """

    architecture: str
    class_names: tuple[str, ...]
    input: InputSpec
    inside: str = "none"
    int8: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return a JSON object for the file's metadata and NAME.json."""
        return {"schema": METADATA_SCHEMA, **dataclasses.asdict(self)}

    def as_text(self) -> str:
        """Return ``as_json`` as text."""
        return json.dumps(self.as_json())


def parse_metadata(text: str, origin: str) -> ExportMetadata:
    """Parse what ``as_text`` returned.

    Raises:
        ArtifactError: invalid metadata; the message names ``origin``.
    """
    try:
        found = json.loads(text)
        if found.pop("schema") != METADATA_SCHEMA:
            raise ArtifactError(
                f"{origin} was exported by another version of potstill; update potstill, or export anew"
            )
        spec = InputSpec.from_dict(found.pop("input"))
        names = tuple(map(str, found.pop("class_names")))
        metadata = ExportMetadata(class_names=names, input=spec, **found)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{origin}: its metadata cannot be used ({type(error).__name__}: {error})") from error
    if not _is_valid(metadata):
        raise ArtifactError(f"{origin}: its metadata has values that potstill never writes: {text[:200]}")
    return metadata


def _is_valid(metadata: ExportMetadata) -> bool:
    spec = metadata.input
    return (
        isinstance(spec.size, int)
        and 1 <= spec.size <= 4096
        and spec.resize_mode in RESIZE_MODES
        and 0.1 <= spec.crop_share <= 1
        and all(0 < each < 1e6 for each in spec.std)
        and all(abs(each) < 1e6 for each in spec.mean)
        and metadata.inside in PREPROCESSING_MODES
        and len(metadata.class_names) >= 2
    )


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
