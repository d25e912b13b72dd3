"""Static quantization of an ONNX network to 8 bits, with onnxruntime's own tool."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.deploy.formats.onnx import INPUT
from potstill.deploy.formats.quiet import quiet
from potstill.errors import ArtifactError

BATCH = 32


def quantized(network: Any, images: NDArray[np.float32]) -> Any:
    """Weights and activations in 8 bits, with a scale for each output channel of the weights.

    Args:
        network: the bare network, an ``onnx.ModelProto`` in float32; it stays as it is.
        images: [N, 3, S, S], prepared training images, from which the range of each activation is taken.

    Returns:
        An ``onnx.ModelProto`` in the QDQ form, which every engine reads.

    Raises:
        ArtifactError: onnxruntime cannot quantize it.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as scratch, quiet():
        given, prepared, target = (Path(scratch, name) for name in ("given.onnx", "prepared.onnx", "int8.onnx"))
        try:
            onnx.save(network, str(given))  # handed over as an object, it would be torn into several files
            quant_pre_process(str(given), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared), str(target), _Reader(images), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )  # fmt: skip
        except Exception as error:  # onnxruntime's tool raises whatever it meets
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ArtifactError(f"onnxruntime cannot quantize this network: {line[:300]}") from error
        return onnx.load(str(target))


class _Reader:
    """Batches, as onnxruntime's calibration asks for them."""

    def __init__(self, images: NDArray[np.float32]) -> None:
        self._parts: Iterator[NDArray[np.float32]] = iter([images[i : i + BATCH] for i in range(0, len(images), BATCH)])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next batch, or None at the end."""
        part = next(self._parts, None)
        return None if part is None else {INPUT: part}

    def __iter__(self) -> "_Reader":
        return self

    def __next__(self) -> dict[str, NDArray[np.float32]]:
        found = self.get_next()
        if found is None:
            raise StopIteration
        return found


def spread(labels: Sequence[int], count: int) -> list[int]:
    """Positions of ``count`` images, all classes in turn, each from its first image on; all where there are fewer.

    Example:
        >>> spread([0, 0, 0, 1, 1, 2], 4)
        [0, 1, 3, 5]
    """
    seen: dict[int, int] = {}
    ranked = []
    for position, label in enumerate(labels):
        seen[int(label)] = seen.get(int(label), -1) + 1
        ranked.append((seen[int(label)], int(label), position))
    return sorted(position for *_, position in sorted(ranked)[:count])
