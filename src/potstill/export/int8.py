"""Quantization of an ONNX network to 8 bits, with the activation ranges that change its outputs least.

The extremes of a few images can be far from the bulk: with them, a MobileNetV3 loses up to seven points of accuracy,
with their mean over small batches none (LOG.md).  How small the batches must be depends on the network, so it is tried.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.data.image_sets import read_pixels
from potstill.data.preprocessing import crop_to_input, decoded_side, normalize_array
from potstill.data.splits import DataSplits
from potstill.errors import ArtifactError, first_line
from potstill.export.formats import quiet
from potstill.export.onnx import INPUT_NAME
from potstill.input_spec import InputSpec

CALIBRATION_IMAGES, JUDGED_IMAGES = 256, 128  # of the training split, none of them in both
MIN_JUDGED_IMAGES = 32  # with fewer images left, those of the calibration are judged
RUN_BATCH_SIZE = 32
RANGE_BATCH_SIZES = (64, 32, 16, 8)  # tried in this order, after all images at once
MAX_RATIO = 0.9  # of a divergence to the one before, for smaller batches to be better than chance


@dataclass(frozen=True)
class CalibrationImages:
    """Prepared images [N, 3, S, S], from which the ranges are taken, and others, on which they are judged."""

    calibration: NDArray[np.float32]
    judged: NDArray[np.float32]
    classes: int  # of the first


def calibration_images(splits: DataSplits, spec: InputSpec) -> CalibrationImages:
    """Return training images for calibration, of all classes in random order."""
    labels = splits.train.labels.tolist()
    index = class_balanced_indices(labels, CALIBRATION_IMAGES)
    others = sorted(set(class_balanced_indices(labels, CALIBRATION_IMAGES + JUDGED_IMAGES)) - set(index))
    index = np.random.default_rng(0).permutation(index).tolist()  # a batch of one class would have narrower ranges
    if len(others) < MIN_JUDGED_IMAGES:
        others = index

    def prepare(positions: Sequence[int]) -> NDArray[np.float32]:
        squares = [crop_to_input(read_pixels(splits.train, i, decoded_side(spec)), spec) for i in positions]
        return normalize_array(np.stack(squares), spec)

    return CalibrationImages(prepare(index), prepare(others), len(set(splits.train.labels[index].tolist())))


def class_balanced_indices(labels: Sequence[int], count: int) -> list[int]:
    """Return the positions of ``count`` images (or all), the first ones of each class, balanced over classes.

    Example:
        >>> class_balanced_indices([0, 0, 0, 1, 1, 2], 4)
        [0, 1, 3, 5]
    """
    seen: dict[int, int] = {}
    ranked = []
    for position, label in enumerate(labels):
        seen[int(label)] = seen.get(int(label), -1) + 1
        ranked.append((seen[int(label)], int(label), position))
    return sorted(position for *_, position in sorted(ranked)[:count])


def quantize_network(network: Any, images: CalibrationImages, *, choose: bool = True) -> tuple[Any, dict[str, Any]]:
    """Quantize weights and activations to 8 bits, with a scale for each output channel of the weights.

    Args:
        network: the bare network, an ``onnx.ModelProto`` in float32; it stays as it is.
        images: for the range of each activation.
        choose: whether to try minimum and maximum of all images, then their means over batches, smaller and smaller
            ones, until the outputs come no closer, by a tenth, to those in float32; else only the first.

    Returns:
        An ``onnx.ModelProto`` in the QDQ form, which every engine reads; and what was found: ``method``; ``batch``,
        the images over whose extremes a mean was taken, None for all at once; ``divergence``, the mean
        Kullback-Leibler divergence of the judged images' probabilities from those in float32, in nats (None where
        nothing was chosen).

    Raises:
        ArtifactError: onnxruntime cannot quantize the network.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as scratch, quiet():
        given, prepared, target = (Path(scratch, name) for name in ("given.onnx", "prepared.onnx", "int8.onnx"))
        try:
            onnx.save(network, str(given))  # handed over as an object, it would be torn into several files
            quant_pre_process(str(given), str(prepared), skip_symbolic_shape=True)
            best = _quantize(prepared, target, images.calibration, None)
            if not choose:
                return best, {"method": "MinMax", "batch": None, "divergence": None}
            reference = _log_probabilities(network, images.judged)
            batch, divergence = None, _divergence(reference, _log_probabilities(best, images.judged))
            for size in RANGE_BATCH_SIZES:
                if size >= len(images.calibration):
                    continue
                other = _quantize(prepared, target, images.calibration, size)
                found = _divergence(reference, _log_probabilities(other, images.judged))
                if not found < MAX_RATIO * divergence:
                    break
                best, batch, divergence = other, size, found
        except Exception as error:  # onnxruntime's tool raises whatever it meets
            raise ArtifactError(f"onnxruntime cannot quantize this network: {first_line(error)}") from error
        return best, {"method": "MinMax", "batch": batch, "divergence": divergence}


def _quantize(source: Path, target: Path, images: NDArray[np.float32], batch: int | None) -> Any:
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    quantize_static(
        str(source), str(target), _CalibrationReader(images, batch or RUN_BATCH_SIZE), quant_format=QuantFormat.QDQ,
        per_channel=True, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax, extra_options={"CalibMovingAverage": batch is not None},
    )  # fmt: skip
    return onnx.load(str(target))


class _CalibrationReader:
    def __init__(self, images: NDArray[np.float32], batch: int) -> None:
        self._parts = iter([images[i : i + batch] for i in range(0, len(images), batch)])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        part = next(self._parts, None)
        return None if part is None else {INPUT_NAME: part}

    def __iter__(self) -> Iterator[dict[str, NDArray[np.float32]]]:
        return iter(self.get_next, None)


def _log_probabilities(network: Any, images: NDArray[np.float32]) -> NDArray[np.float64]:
    import onnxruntime
    from scipy.special import log_softmax

    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    parts = [images[i : i + RUN_BATCH_SIZE] for i in range(0, len(images), RUN_BATCH_SIZE)]
    logits = np.concatenate([session.run(None, {INPUT_NAME: part})[0] for part in parts])
    found: NDArray[np.float64] = log_softmax(logits.astype(np.float64), axis=1)
    return found


def _divergence(reference: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    return float((np.exp(reference) * (reference - found)).sum(axis=1).mean())
