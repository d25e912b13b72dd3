"""What is kept of every image, and figures over all of them."""

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.data.doctor.looks import Look
from potstill.data.value_range import KINDS, Span

_ROW = np.dtype(
    [
        ("good", np.bool_), ("bytes", np.int64), ("format", np.uint8), ("mode", np.uint8), ("width", np.int32),
        ("height", np.int32), ("content", np.uint8, 32), ("pixels", np.uint8, 16), ("state", np.int64, 4),
        ("span", np.uint8), ("low", np.float64), ("high", np.float64),
    ]
)  # fmt: skip


class Table:
    """Looks at N images, 116 bytes each whatever their size."""

    def __init__(self, count: int) -> None:
        self.rows = np.zeros(count, dtype=_ROW)
        self._words: list[str] = []  # formats and modes, by number

    def put(self, i: int, look: Look) -> None:
        """Keep what was seen of image i."""
        content, pixels = (np.frombuffer(value, np.uint8) for value in (look.content, look.pixels))
        kind, mode = self._number(look.format), self._number(look.mode)
        self.rows[i] = (True, look.size, kind, mode, look.width, look.height, content, pixels, look.state, *_span(look))

    def span(self, i: int) -> Span | None:
        """Of the values of image i, where they have more than 8 bits."""
        kind, low, high = (self.rows[i][key].item() for key in ("span", "low", "high"))
        return Span(KINDS[kind - 1], low, high) if kind else None

    def keep(self, positions: list[int]) -> None:
        """Forget all other images."""
        self.rows = self.rows[positions]

    @property
    def good(self) -> NDArray[np.int64]:
        """Positions of the images that could be decoded."""
        return np.flatnonzero(self.rows["good"])

    def figures(self) -> dict[str, Any]:
        """Counts of formats and modes; smallest, median and largest sizes."""
        rows = self.rows[self.rows["good"]]
        return {
            "decoded": len(rows),
            "bytes": int(rows["bytes"].sum()),
            "formats": self._counted(rows["format"]),
            "modes": self._counted(rows["mode"]),
            "width": _spread(rows["width"]),
            "height": _spread(rows["height"]),
            "file_bytes": _spread(rows["bytes"]),
            "shapes": len({*zip(rows["width"].tolist(), rows["height"].tolist(), strict=True)}),
        }

    def _number(self, word: str) -> int:
        if word not in self._words:
            self._words.append(word)
        return self._words.index(word)

    def _counted(self, numbers: NDArray[np.uint8]) -> dict[str, int]:
        return {self._words[at]: count for at, count in Counter(numbers.tolist()).most_common()}


def _span(look: Look) -> tuple[int, float, float]:
    return (0, 0.0, 0.0) if look.span is None else (KINDS.index(look.span.kind) + 1, look.span.low, look.span.high)


def _spread(values: NDArray[Any]) -> dict[str, int] | None:
    if not len(values):
        return None
    return {"smallest": int(values.min()), "median": int(np.median(values)), "largest": int(values.max())}
