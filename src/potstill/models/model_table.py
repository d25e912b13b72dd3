"""The table of networks that comes with the package: input size, parameters, multiply-adds and relative latency.

``scripts/model_table.py`` writes it.  Parameters, multiply-adds and file sizes are exact counts or follow from them; a
latency here is an estimate: the ratio to ``REFERENCE`` was measured once, with PyTorch on a CPU, and is multiplied by
the reference network's time on this machine.
"""

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from potstill.errors import UsageError, did_you_mean
from potstill.io import write_bytes

REFERENCE, REFERENCE_SIZE = "timm/resnet18", 224
TABLE_FILE = "model_table.csv"
TABLE_CLASSES = 10  # outputs of the networks that were counted
# Beside the weights, for each convolution and linear layer: scales, zero points, biases, names.  Measured: 2,050 bytes
# in resnet18, 2,560 in mobilenetv3_small_100.  In float32 the folded BatchNorm saves about what the names take.
INT8_BYTES_PER_LAYER = 2500

# Families that train well when small, each from small to large: the students that a search considers.
STUDENTS: dict[str, tuple[str, ...]] = {
    "efficientnet-lite": ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"),
    "mobilenetv3": (
        "timm/mobilenetv3_small_050",
        "timm/mobilenetv3_small_075",
        "timm/mobilenetv3_small_100",
        "timm/mobilenetv3_large_100",
    ),
    "mobilenetv4": ("timm/mobilenetv4_conv_small_050", "timm/mobilenetv4_conv_small", "timm/mobilenetv4_conv_medium"),
    "resnet": ("timm/resnet10t", "timm/resnet14t", "timm/resnet18", "timm/resnet26", "timm/resnet34"),
    "regnet": ("timm/regnety_002", "timm/regnety_004", "timm/regnety_006", "timm/regnety_008", "timm/regnety_016"),
    "ghostnet": ("timm/ghostnet_050", "timm/ghostnet_100"),
}
SMALL_IMAGE_STUDENTS: dict[str, tuple[str, ...]] = {  # for images of up to ``SMALL_IMAGE`` pixels
    "resnet": ("cifar/resnet8", "cifar/resnet14", "cifar/resnet20", "cifar/resnet32", "cifar/resnet56"),
    "wide resnet": ("cifar/wrn_16_1", "cifar/wrn_40_1", "cifar/wrn_16_2", "cifar/wrn_40_2"),
    "resnet x4": ("cifar/resnet8x4", "cifar/resnet32x4"),
    "mobilenetv2": ("cifar/mobilenetv2",),
    "shufflenet": ("cifar/shufflenetv1", "cifar/shufflenetv2"),
    "vgg": ("cifar/vgg8", "cifar/vgg11", "cifar/vgg13"),
}
SMALL_IMAGE = 64


class ModelRow(NamedTuple):
    """A network of the table."""

    name: str
    size: int  # height and width in pixels of the images that it was designed for
    parameters: int  # with a head of TABLE_CLASSES classes
    per_class: int  # parameters of each further class
    layers: int  # convolutions and linear layers
    multiply_adds: int  # of one image of this size
    latency: float | None  # of one image on one thread, relative to the reference network; None: not measured

    def parameters_with(self, classes: int) -> int:
        """Return the number of parameters with a head of this many classes."""
        return self.parameters + (classes - TABLE_CLASSES) * self.per_class

    def file_size(self, classes: int = TABLE_CLASSES, *, int8: bool = False) -> int:
        """Return the estimated bytes of an ONNX file, in float32 or int8."""
        parameters = self.parameters_with(classes)
        return parameters + self.layers * INT8_BYTES_PER_LAYER if int8 else 4 * parameters

    def milliseconds(self, reference: float, size: int | None = None) -> float | None:
        """Return the estimated latency for images of this size by that of the reference network, if known."""
        pixels = 1.0 if size is None else (size / self.size) ** 2
        return None if self.latency is None else self.latency * reference * pixels


class Limits(NamedTuple):
    """What a network may take at most; None: any."""

    milliseconds: float | None = None  # for one image, batch size 1, on one thread of the CPU
    file_size: int | None = None  # bytes of the exported file

    def __str__(self) -> str:
        """Return the limits in the form that ``parse_limits`` takes."""
        time = [] if self.milliseconds is None else [_with_unit(self.milliseconds, _TIME_UNITS)]
        return ",".join(time + ([] if self.file_size is None else [_with_unit(self.file_size, _DECIMAL_SIZES)]))

    def excess(self, milliseconds: float | None, file_size: int) -> float:
        """Return the largest ratio to a limit: at most 1 if both are met, infinite if a limited time is unknown."""
        ratios = [0.0]
        if self.milliseconds is not None:
            ratios.append(float("inf") if milliseconds is None else milliseconds / self.milliseconds)
        if self.file_size is not None:
            ratios.append(file_size / self.file_size)
        return max(ratios)


_TIME_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_DECIMAL_SIZES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE_UNITS = {**_DECIMAL_SIZES, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _with_unit(value: float, units: Mapping[str, float]) -> str:
    """Return a number with the largest unit of which it holds one, all its digits, and no power of ten."""
    ascending = sorted(units, key=lambda unit: units[unit])
    unit = next((each for each in reversed(ascending) if units[each] <= value), ascending[0])
    return f"{value / units[unit]:.12f}".rstrip("0").rstrip(".") + unit


def parse_limits(text: str) -> Limits:
    """Parse limits as after ``--under``: a time, a file size, or both.

    Example:
        >>> parse_limits("5ms,2MB")
        Limits(milliseconds=5.0, file_size=2000000)
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", part)
        if match is None or not 0 < float(match[1]) < math.inf:
            raise UsageError(
                f"--under {text}: {part.strip()!r} is no limit; write a number above 0 and its unit, such as 5ms,2MB"
            )
        units = {unit.lower(): unit for unit in (*_TIME_UNITS, *_SIZE_UNITS)}
        unit = units.get(match[2].lower())
        if unit is None:
            known = f"{', '.join(_TIME_UNITS)} for the time of one image, {', '.join(_SIZE_UNITS)} for the file"
            given = (
                f"{part.strip()!r} has the unknown unit {match[2]!r}" if match[2] else f"{part.strip()!r} has no unit"
            )
            raise UsageError(f"--under {text}: {given}{did_you_mean(match[2], units.values())}\nUnits: {known}")
        kind = "milliseconds" if unit in _TIME_UNITS else "file_size"
        if kind in found:
            both = "times" if unit in _TIME_UNITS else "file sizes"
            raise UsageError(f"--under {text}: two limits are {both}; give one time, one file size, or both")
        found[kind] = float(match[1]) * {**_TIME_UNITS, **_SIZE_UNITS}[unit]
    size = found.get("file_size")
    return Limits(found.get("milliseconds"), None if size is None else max(1, round(size)))


def read_table(path: Path | None = None) -> list[ModelRow]:
    """Return the rows of a table; None: of the one that comes with the package."""
    source = resources.files("potstill.models") / TABLE_FILE if path is None else path
    rows = csv.DictReader(io.StringIO(source.read_text(encoding="utf-8")))
    return [
        ModelRow(
            row["name"],
            int(row["size"]),
            int(row["parameters"]),
            int(row["per_class"]),
            int(row["layers"]),
            int(row["multiply_adds"]),
            float(row["latency"]) if row["latency"] else None,
        )
        for row in rows
    ]


def write_table(path: Path, rows: Iterable[ModelRow]) -> None:
    """Write rows sorted by name."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(ModelRow._fields)
    for row in sorted(rows):
        writer.writerow([*row[:-1], "" if row.latency is None else f"{row.latency:.3g}"])
    write_bytes(path, text.getvalue().encode())
