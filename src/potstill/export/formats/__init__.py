"""Export formats: what each offers, and the metadata in and beside an exported model.  No torch here.

One module a format, one line in ``FORMATS`` to register it.  Converters print progress bars, advice and warnings about
their own internals, on which users of potstill cannot act: ``quiet`` silences them.
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


METADATA_KEY = "potstill"  # of the entry in a file's own metadata
METADATA_SCHEMA = 1
PREPROCESSING_MODES = ("none", "normalise", "resize")


@dataclass(frozen=True)
class ExportMetadata:
    """What an exported model takes and gives.

    Its input: with ``inside`` "none", normalised float32 images [B, 3, S, S]; with "normalise", the uint8 pixels
    [B, 3, S, S] of images that were cut to the network's size; with "resize", uint8 pixels [B, H, W, 3] of any size,
    one for all images of a batch.  Its output: logits [B, K], float32.
    """

    architecture: str
    class_names: tuple[str, ...]
    input: InputSpec
    inside: str = "none"
    int8: bool = False

    def as_json(self) -> dict[str, Any]:
        """For the metadata of a file and the facts beside it."""
        return {"schema": METADATA_SCHEMA, **dataclasses.asdict(self)}

    def as_text(self) -> str:
        """``as_json`` in one line."""
        return json.dumps(self.as_json())


def parse_metadata(text: str, origin: str) -> ExportMetadata:
    """What ``as_text`` gave.

    Raises:
        ArtifactError: something else; ``origin`` is what messages call it.
    """
    try:
        found = json.loads(text)
        if found.pop("schema") != METADATA_SCHEMA:
            raise ArtifactError(
                f"{origin} was exported by another version of potstill; update potstill, or export anew"
            )
        spec = InputSpec.from_dict(found.pop("input"))
        names = tuple(map(str, found.pop("class_names")))
        made = ExportMetadata(class_names=names, input=spec, **found)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{origin}: its metadata cannot be used ({type(error).__name__}: {error})") from error
    if not _is_valid(made):
        raise ArtifactError(f"{origin}: its metadata asks for what potstill never writes: {text[:200]}")
    return made


def _is_valid(made: ExportMetadata) -> bool:
    spec = made.input
    return (
        isinstance(spec.size, int)
        and 1 <= spec.size <= 4096
        and spec.resize_mode in RESIZE_MODES
        and 0.1 <= spec.crop_share <= 1
        and all(0 < each < 1e6 for each in spec.std)
        and all(abs(each) < 1e6 for each in spec.mean)
        and made.inside in PREPROCESSING_MODES
        and len(made.class_names) >= 2
    )


ExportedFiles = Mapping[str, bytes]  # suffix -> content
Predictor = Callable[[NDArray[Any]], NDArray[Any]]  # a batch as the file takes it -> logits [B, K]


@dataclass(frozen=True)
class ExportFormat:
    """One way to write a network down.

    Attributes:
        convert: a network in eval mode on the CPU, images [B, 3, S, S] -> logits [B, K], to the content of one file for
            each suffix.
        open: what ``convert`` gave, as a function; None where such a file runs on other machines only.
        suffix: of the file to open.
        packages: that must be there, by the names under which they are imported.
        extra: of potstill, which brings them.
        inside: how much of the preparation can be part of the file.
        any_batch: whether a file answers batches of any size; else one image at a time.
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
    """Within the block, Python's warnings, log lines up to WARNING and prints go nowhere; errors are raised as ever."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    nowhere = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


FORMATS = {
    "onnx": "potstill.export.formats.onnx",
    "openvino": "potstill.export.formats.openvino",
    "torch-export": "potstill.export.formats.torch_export",
    "executorch": "potstill.export.formats.executorch",
    "coreml": "potstill.export.formats.coreml",
}


def find_format(name: str) -> ExportFormat:
    """The format of a name, whose packages are there.

    Raises:
        UsageError: an unknown name, or a package that is not installed.
    """
    if name not in FORMATS:
        raise UsageError(f"no format {name!r}{did_you_mean(name, FORMATS)}\nKnown formats: {', '.join(FORMATS)}")
    found: ExportFormat = import_module(FORMATS[name]).FORMAT
    missing = [package for package in found.packages if find_spec(package) is None]
    if missing:
        needs = f"the format {name} needs {' and '.join(missing)}, not installed here"
        raise UsageError(f'{needs}\nInstall: pip install "potstill[{found.extra}]"')
    return found
