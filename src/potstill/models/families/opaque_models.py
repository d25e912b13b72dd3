"""Networks that map images to logits and hide their layers: files of other programs, and plain functions.

onnx           an ONNX file, which onnxruntime runs on the CPU
torchscript    a TorchScript archive
torch-export   a package of ``torch.export``, which runs on the CPU
table          answers by the path of an image; see ``answer_tables``

A file's content is a buffer of its network, so that a model folder is complete without the file.
"""

import contextlib
import io
import json
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from potstill.code_references import is_permitted, permit_code
from potstill.errors import ArtifactError, PotstillError, UsageError, first_line
from potstill.input_spec import InputSpec, Triple
from potstill.io import read_bytes, sha256_hex
from potstill.models.answer_tables import find_rows
from potstill.models.exported_files import (
    LABELS,
    METADATA_KEY,
    ExportMetadata,
    check_permission,
    open_onnx_session,
    parse_metadata,
    read_properties,
)
from potstill.types import are_probabilities

_PIXELS = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # mean and std that give pixels from 0 to 255
_TINY = float(np.finfo(np.float32).tiny)
_ONNX_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(uint8)": torch.uint8}


class OpaqueNetwork(nn.Module, ABC):
    """A network that maps images [B, 3, S, S] to logits, probabilities or embeddings, and hides its layers."""

    label = "a network with hidden layers"

    def __init__(self) -> None:
        super().__init__()
        self.gives_probabilities = False
        self.head: nn.Linear | None = None  # zeros, if the outputs are embeddings

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K], float32, on the images' device; 0 with a ``head``, whose input are embeddings."""
        outputs = self._outputs(images)
        if self.head is not None:
            logits: Tensor = self.head(outputs)
            return logits
        return outputs.clamp(min=_TINY).log() if self.gives_probabilities else outputs

    def add_head(self, width: int, classes: int) -> None:
        """Take the outputs, ``width`` numbers for an image, for embeddings of a network without classes."""
        self.head = clear_head(nn.Linear(width, classes))

    def examine(self, size: int) -> int:
        """Run two images of noise; return K, and note whether the outputs are probabilities."""
        outputs = self._outputs(torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
        self.gives_probabilities = are_probabilities(outputs, zeros=True)
        return int(outputs.shape[1])

    @abstractmethod
    def run(self, images: Tensor) -> Any:
        """Return the outputs of images [B, 3, S, S] as they are."""

    def _outputs(self, images: Tensor) -> Tensor:
        found = outputs = self.run(images)
        if isinstance(found, np.ndarray) and found.dtype.kind in "fiu":
            outputs = torch.from_numpy(np.ascontiguousarray(found))
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(images) or outputs.shape[1] < 2:
            raise UsageError(
                f"{self.label} returned {_describe(found)} for images {list(images.shape)}: it must return logits "
                f"[{len(images)}, K], a row for each image"
            )
        return outputs.detach().to(images.device, torch.float32)


def clear_head(head: nn.Linear) -> nn.Linear:
    """Set the weights of the head of a teacher without classes to 0, so that all logits are 0; return it."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    return head


def find_opaque(module: nn.Module) -> OpaqueNetwork | None:
    """Return the network without visible layers that ``module`` is or wraps; None if its layers are visible."""
    return next((each for each in module.modules() if isinstance(each, OpaqueNetwork)), None)


def _describe(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{'a tensor' if isinstance(value, Tensor) else 'an array'} {list(value.shape)}"
    if isinstance(value, (tuple, list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"an object of type {type(value).__name__}"


class FunctionNetwork(OpaqueNetwork):
    """A plain function as a network: it maps a copy of normalised images to logits or probabilities [B, K]."""

    def __init__(self, function: Callable[[Tensor], Any], name: str, size: int) -> None:
        super().__init__()
        self.function, self.label, self.size = function, name, size

    def run(self, images: Tensor) -> Any:
        """Return what the function returns; UsageError if it raises."""
        try:
            return self.function(images.clone())
        except PotstillError:
            raise
        except Exception as error:  # whatever foreign code raises
            last = traceback.extract_tb(error.__traceback__)[-1]
            message = f": {error}" if str(error) else ""
            raise UsageError(
                f"{self.label} raised {type(error).__name__}{message} ({last.filename}, line {last.lineno}) for images "
                f"{list(images.shape)}"
            ) from error

    def fingerprint(self) -> bytes:
        """Return bytes that differ for functions that differ: the rounded outputs of four fixed images."""
        images = torch.rand(4, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            outputs = self(images) if self.head is None else self._outputs(images)
        rounded: bytes = np.round(outputs.cpu().numpy(), 3).astype("<f4").tobytes()
        return rounded


class FileNetwork(OpaqueNetwork):
    """A network in a file of another program, with the ``metadata`` of ``potstill export``, if it wrote it."""

    content: Tensor
    settings: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.label = kind, LABELS[kind]
        self.metadata: ExportMetadata | None = None
        self.fixed_size: int | None = None
        self._dtype = torch.float32
        self._one_by_one = False
        self._program: Callable[[Tensor], Any] | None = None
        self.register_buffer("content", torch.zeros(0, dtype=torch.uint8))
        self.register_buffer("settings", torch.zeros(0, dtype=torch.uint8))

    @classmethod
    def read(cls, kind: str, path: Path) -> "FileNetwork":
        """Read a file, which ``examine`` runs; UsageError without permission to run its code."""
        network, permitted = cls(kind), str(path.resolve())
        check_permission(kind, str(path), permitted)
        network.label, content = str(path), read_bytes(path)
        if is_permitted(permitted, itself=True):  # then also in the model folders of its run
            permit_code([sha256_hex(content)])
        network.content = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        network._open()
        if network.metadata is not None and network.metadata.inside == "resize":
            raise ArtifactError(
                f"{path} was exported with --preprocessing resize and crops its images itself: export it with "
                "--preprocessing none for a teacher, which must see the student's crops"
            )
        return network

    def examine(self, size: int) -> int:
        """Run two images of noise, one by one if need be; return K, and note whether the outputs are probabilities."""
        try:
            classes = super().examine(size)
        except UsageError as error:
            self._one_by_one = True
            try:
                classes = super().examine(size)
            except UsageError:
                raise ArtifactError(str(error)) from error
        text = json.dumps({"probabilities": self.gives_probabilities, "one_by_one": self._one_by_one})
        self.settings = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        return classes

    @property
    def normalisation(self) -> tuple[Triple, Triple] | None:
        """Mean and standard deviation of its images; None if the file has none."""
        if self._dtype == torch.uint8:
            return _PIXELS
        return None if self.metadata is None else (self.metadata.input.mean, self.metadata.input.std)

    def run(self, images: Tensor) -> Any:
        """Return the outputs; UsageError if the program fails on these images."""
        if self._program is None:
            self._open()
        assert self._program is not None
        images = images.to(self.content.device)
        images = images.round().clamp(0, 255).to(self._dtype) if self._dtype == torch.uint8 else images.to(self._dtype)
        try:
            with torch.no_grad():
                if not self._one_by_one:
                    return self._program(images.contiguous())
                return torch.cat([self._program(images[i : i + 1].contiguous()) for i in range(len(images))])
        except Exception as error:  # whatever a foreign program raises
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            raise UsageError(f"{self.label} cannot take images {list(images.shape)}: {reason[:300]}") from error

    def _open(self) -> None:
        """Load the program from ``content``."""
        if not len(self.content):
            raise UsageError(f"{self.kind} is a kind of file, given as a teacher's weights: --teacher FILE")
        content = self.content.cpu().numpy().tobytes()
        check_permission(self.kind, self.label, sha256_hex(content))
        if len(self.settings):
            facts = json.loads(self.settings.cpu().numpy().tobytes())
            self.gives_probabilities, self._one_by_one = bool(facts["probabilities"]), bool(facts["one_by_one"])
        try:
            self._program, text = _OPENERS[self.kind](self, content)
        except PotstillError:
            raise
        except Exception as error:  # damaged bytes make these parsers raise nearly anything
            raise ArtifactError(f"{self.label} cannot be read as {LABELS[self.kind]}: {first_line(error)}") from error
        self.metadata = parse_metadata(text, self.label) if text else None
        if self.metadata is not None:
            self.fixed_size = self.metadata.input.size
            self._dtype = torch.uint8 if self.metadata.inside == "normalise" else self._dtype

    def _open_onnx(self, content: bytes) -> tuple[Callable[[Tensor], Any], str]:
        text = read_properties(content, self.label).get(METADATA_KEY, "")
        session = open_onnx_session(content, threads=torch.get_num_threads(), patient=True)
        inputs, outputs = session.get_inputs(), session.get_outputs()
        if len(inputs) != 1:
            names = ", ".join(each.name for each in inputs)
            raise ArtifactError(f"{self.label} has {len(inputs)} inputs ({names}), and a teacher gets images alone")
        if len(outputs) != 1:
            names, ends = ", ".join(each.name for each in outputs), f"[{inputs[0].name!r}], [{outputs[0].name!r}]"
            raise ArtifactError(
                f"{self.label} has {len(outputs)} outputs ({names}). Keep the one with the logits:\n"
                f"  onnx.utils.extract_model({Path(self.label).name!r}, 'logits.onnx', {ends})"
            )
        (taken,) = inputs
        shape, dtype = list(taken.shape), _ONNX_DTYPES.get(taken.type)
        squares = len(shape) == 4 and (shape[2] == shape[3] or not all(isinstance(side, int) for side in shape[2:]))
        resizes = text and shape[-1] == 3  # refused by ``read``
        if not resizes and (not squares or shape[1] not in (3, "channels", None) or dtype is None):
            raise ArtifactError(
                f"{self.label} takes {taken.type} {shape}, and a teacher gets square images [B, 3, S, S] of type "
                f"float, float16 or uint8: export it with these"
            )
        self.fixed_size = next((side for side in shape[2:] if isinstance(side, int)), None)
        self._dtype = dtype or torch.float32

        def run(images: Tensor) -> Any:
            return torch.from_numpy(session.run(None, {taken.name: images.cpu().numpy()})[0])

        return run, text

    def _open_torchscript(self, content: bytes) -> tuple[Callable[[Tensor], Any], str]:
        extra = {METADATA_KEY: ""}
        with warnings.catch_warnings():
            for kind in (FutureWarning, DeprecationWarning):  # they advise whoever writes such files
                warnings.simplefilter("ignore", kind)
            load: Callable[..., Any] = torch.jit.load
            program = load(io.BytesIO(content), map_location=self.content.device, _extra_files=extra).eval()
        found: Any = extra[METADATA_KEY]
        # As a function: as an attribute, a module's weights would be among those of this network, beside the content.
        return (lambda images: program.to(images.device)(images)), found.decode() if isinstance(found, bytes) else found

    def _open_torch_export(self, content: bytes) -> tuple[Callable[[Tensor], Any], str]:
        extra = {METADATA_KEY: ""}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # torch 2.11, of its own
            program = torch.export.load(io.BytesIO(content), extra_files=extra).module()
        return (lambda images: program(images.cpu())), str(extra[METADATA_KEY] or "")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_program": None}  # copies load it again


_OPENERS: Mapping[str, Callable[[FileNetwork, bytes], tuple[Callable[[Tensor], Any], str]]] = {
    "onnx": FileNetwork._open_onnx,
    "torchscript": FileNetwork._open_torchscript,
    "torch-export": FileNetwork._open_torch_export,
}


class TableNetwork(OpaqueNetwork):
    """Logits or embeddings from a table, by the path of an image.

    A loader with these ``answers`` has rows of the table in the place of images; this network returns them.
    """

    label = "a table of answers"
    values: Tensor
    encoded_paths: Tensor

    def __init__(self, paths: Sequence[str] = (), logits: NDArray[np.float32] | None = None) -> None:
        super().__init__()
        text = "\0".join(paths).encode("utf-8", "surrogateescape")
        self.register_buffer("values", torch.zeros(0, 0) if logits is None else torch.from_numpy(logits))
        self.register_buffer("encoded_paths", torch.from_numpy(np.frombuffer(text, np.uint8).copy()))
        self._is_example = False

    @property
    def paths(self) -> list[str]:
        """The paths of the rows, [N]."""
        return self.encoded_paths.cpu().numpy().tobytes().decode("utf-8", "surrogateescape").split("\0")

    def answers(self, names: Sequence[str], folder: str = "") -> Tensor:
        """Return logits [M, K, 1, 1] in the place of images; see ``find_rows``."""
        return self.values.cpu()[find_rows(self.paths, names, self.label, folder)][..., None, None]

    def run(self, images: Tensor) -> Tensor:
        """Return the logits [B, K] that stand in the place of images, [B, K, 1, 1]; UsageError for images."""
        if images.shape[1:] == (self.values.shape[1], 1, 1):
            return images.flatten(1)
        if self._is_example:
            return torch.zeros(len(images), self.values.shape[1])
        raise UsageError(
            f"{self.label} has no answers for these images: it has those of the data by their paths, and no others"
        )


def find_table(module: nn.Module) -> TableNetwork | None:
    """Return the table that ``module`` is; None if it is a network that takes images."""
    found = find_opaque(module)
    return found if isinstance(found, TableNetwork) else None


@contextlib.contextmanager
def example_answers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, the tables among ``modules`` answer any image with zeros, for tries of shapes."""
    tables = [table for module in modules if (table := find_table(module)) is not None]
    for table in tables:
        table._is_example = True
    try:
        yield
    finally:
        for table in tables:
            table._is_example = False


def allocate_buffers(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the buffers and heads of opaque networks in ``module`` the shapes of the tensors that will be loaded."""
    for path, network in list(module.named_modules()):
        if isinstance(network, OpaqueNetwork):
            head = tensors.get(f"{path}.head.weight" if path else "head.weight")
            if head is not None and head.ndim == 2:
                network.add_head(head.shape[1], head.shape[0])
            for name, buffer in list(network.named_buffers(recurse=False)):
                found = tensors.get(f"{path}.{name}" if path else name)
                if found is not None and found.dtype == buffer.dtype:
                    setattr(network, name, torch.empty_like(found))


# The functions of ``registry.Family``.


def names() -> list[str]:
    return []


def is_model(name: str) -> bool:
    return name in LABELS


def build(name: str, num_classes: int, size: int, in_chans: int) -> nn.Module:
    """Return a network without a file, for a state dict that has it."""
    return TableNetwork() if name == "table" else FileNetwork(name)


def own_size(name: str) -> int | None:
    return None


def normalisation(name: str) -> tuple[Triple, Triple]:
    return InputSpec.mean, InputSpec.std


def pretrained(name: str, num_classes: int, size: int) -> tuple[nn.Module, int]:
    raise UsageError(f"{name} is a kind of file, given as a teacher's weights: --teacher FILE")
