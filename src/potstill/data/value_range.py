"""Images of more than 8 bits: one range for a data set, from whose ends pixels become 0 and 255.

The range is chosen once, over the training images (``data.range: auto``), or given; it is kept in the model and used
for every image that the model sees later.  Chosen by image, the same gray would be bright in one image and black in
another.  Images of 8 bits are left as they are.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Range = tuple[float, float]


class Span(NamedTuple):
    """The values of one image of more than 8 bits.

    "colour": 16 bits a channel, of which Pillow reads the high byte, so that no range is applied.
    """

    kind: "Kind"
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.kind} {self.low!r} {self.high!r}"


Kind = Literal["integer", "float", "colour"]
KINDS: tuple[Kind, ...] = ("integer", "float", "colour")  # by number, from 1, in files


def span_of(content: str) -> Span | None:
    """The span at the end of "SIZE SHA256 KIND LOW HIGH", a word on a file's content; None where it ends before.

    Example:
        >>> span_of("12 ab integer 0.0 4095.0").high, span_of("12 ab")
        (4095.0, None)
    """
    words = content.split()
    return Span(words[2], float(words[3]), float(words[4])) if len(words) == 5 else None  # type: ignore[arg-type]


def data_range(spans: Iterable[Span | None]) -> Range | None:
    """The range of a set of images; None where all have 8 bits.

    Integers: from 0 to the largest value of the smallest number of bits, at least 8, that holds the set's maximum.
    Floats: [0, 1] where all lie within; else from 0 to the set's maximum.  With negative values, from the set's
    minimum to its maximum.

    Example:
        >>> data_range([Span("integer", 3, 900), Span("integer", 0, 4000), None])
        (0.0, 4095.0)
        >>> data_range([Span("float", 0, 0.5)]), data_range([Span("float", -2.5, 1.02)]), data_range([None])
        ((0.0, 1.0), (-2.5, 1.02), None)
    """
    found = [each for each in spans if each is not None and each.kind != "colour"]
    if not found:
        return None
    low, high = min(each.low for each in found), max(each.high for each in found)
    if low >= 0 and all(each.kind == "integer" for each in found):
        return 0.0, 2.0 ** max(8, math.ceil(math.log2(high + 1))) - 1
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    low = min(low, 0.0)
    return low, high if high > low else low + 1


def range_of(train: Iterable[str], contents: Mapping[str, str], wanted: Range | Literal["auto"]) -> Range | None:
    """The range by which the images of a data set are read.

    Args:
        train: names of the training images.
        contents: name -> word on its content, as ``span_of`` takes it, of all images.
        wanted: the setting ``data.range``; "auto": that of the training images, or where those have 8 bits, of all.
    """
    if wanted != "auto":
        return wanted
    found = data_range(span_of(contents[name]) for name in train)
    return found if found is not None else data_range(map(span_of, contents.values()))


def to_8_bits(values: NDArray[Any], ends: Range) -> NDArray[np.uint8]:
    """Values beyond the ends are cut off.  Integers lose their low bits, so that 8-bit images which were stored in 16
    bits, as v * 257 or as v * 256, come back exactly; others are rounded.

    Args:
        values: of any shape and type.
        ends: low and high.
    """
    low, high = ends
    floats = values.astype(np.float64) - low
    if values.dtype.kind in "iu" and float(low).is_integer() and float(high).is_integer():
        floats *= 256 / (high - low + 1)
    else:
        floats *= 255 / (high - low)
        floats += 0.5
    return np.clip(floats, 0, 255).astype(np.uint8)


def ranged(fingerprint: str, ends: Range | None) -> str:
    """The fingerprint of a data set whose images are read by a range."""
    if ends is None:
        return fingerprint
    return hashlib.sha256(f"{fingerprint}\nrange {ends[0]!r} {ends[1]!r}".encode()).hexdigest()


def shown(ends: Range) -> str:
    """For messages.

    Example:
        >>> shown((0.0, 4095.0)), shown((-0.5, 1.02))
        ('[0, 4095]', '[-0.5, 1.02]')
    """
    return f"[{ends[0]:.10g}, {ends[1]:.10g}]"
