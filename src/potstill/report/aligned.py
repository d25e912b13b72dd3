"""Tables in plain text, aligned for a fixed-width font."""

from collections.abc import Sequence

from potstill.report.names import columns


def table(rows: Sequence[Sequence[str]], *, heads: int = 1) -> str:
    """The first column to the left, all others to the right; a rule under the first ``heads`` rows.

    Example:
        >>> print(table([["", "train"], ["Top-1", "98.1 %"]]))
                train
        -------------
        Top-1  98.1 %
    """
    widths = [max(map(columns, column)) for column in zip(*rows, strict=True)]
    lines = [_line(row, widths) for row in rows]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([*lines[:heads], rule, *lines[heads:]])


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """One ``name  value`` line each, the values under each other."""
    width = max((columns(name) for name, _ in pairs), default=0)
    return "\n".join(f"{_left(name, width)}  {value}" for name, value in pairs)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([_left(*first), *(" " * (width - columns(cell)) + cell for cell, width in others)]).rstrip()


def _left(text: str, width: int) -> str:
    return text + " " * (width - columns(text))
