"""An exported ONNX model, to predict with: numpy, Pillow and onnxruntime are enough, no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.artifacts import DAMAGED, digest, read_bytes
from potstill.data.decode import Pixels
from potstill.data.square import normalised, squared
from potstill.deploy.description import KEY, Description, description
from potstill.deploy.onnx_session import answering
from potstill.deploy.onnx_wire import metadata
from potstill.errors import ArtifactError
from potstill.sealed import read_sealed_json

SUFFIX = ".onnx"


@dataclass(frozen=True)
class OnnxModel:
    """A model file and how to ask it."""

    what: Description
    answer: Callable[[NDArray[Any]], NDArray[Any]]  # a batch as the file takes it -> logits [B, K]

    def prepare(self, pixels: Pixels) -> NDArray[Any]:
        """One decoded image, uint8 [H, W, 3], for ``probabilities``: an input of the file, or if that takes images of
        any size, its answer already, so that no batch of whole photographs has to be kept.
        """
        prepared = batch([pixels], self.what)
        found: NDArray[Any] = (self.answer(prepared) if self.what.inside == "resize" else prepared)[0]
        return found

    def probabilities(self, prepared: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
        """[B, K] of images that ``prepare`` has prepared."""
        images = np.stack(prepared)
        logits = (images if self.what.inside == "resize" else self.answer(images)).astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
        return shares


def batch(images: Sequence[Pixels], what: Description) -> NDArray[Any]:
    """Decoded images, uint8 [H, W, 3] each, as the exported model takes them; for "resize" all of one size."""
    if what.inside == "resize":
        return np.stack(images)
    pixels = np.stack([squared(each, what.input) for each in images])
    return pixels if what.inside == "normalise" else normalised(pixels, what.input)


def load_onnx(path: Path) -> OnnxModel:
    """The model of a file that ``potstill export`` wrote.

    No code is run from it, no other file is read for it, and where the facts that were written with it still stand
    beside it, its SHA-256 is compared before anybody parses it.

    Raises:
        ArtifactError: missing, damaged, in several files, or not from potstill.
        UsageError: onnxruntime is not installed.
    """
    content = read_bytes(path)
    _compare(path, content)
    found = metadata(content, str(path))
    if KEY not in found:
        raise ArtifactError(
            f"{path} was not exported by potstill: nothing in it says which classes it knows and how images are "
            "prepared for it; export a run with potstill export RUN"
        )
    what = description(found[KEY], str(path))
    return OnnxModel(what, answering(content))


def facts_path(path: Path) -> Path:
    """Where the facts of an exported file stand: beside it."""
    return path.with_name(f"{path.name}.json")


def _compare(path: Path, content: bytes) -> None:
    facts = facts_path(path)
    if not facts.is_file():
        return
    files = read_sealed_json(facts).get("files")
    known = files.get(path.name) if isinstance(files, dict) else None  # None: it was renamed by hand
    if isinstance(known, dict) and known.get("sha256") != digest(content):
        raise ArtifactError(f"{path} {DAMAGED}; export it anew")
