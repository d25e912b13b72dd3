"""Predictions of one stage on one split, as indices into the class list of the file's own header."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from potstill.errors import ArtifactError
from potstill.report.contents import Stage

PROBABILITY = "p:"


@dataclass(frozen=True)
class Predictions:
    """Who was shown and what was said; the last three lists go together."""

    class_names: list[str]
    paths: list[str]
    labels: list[int]
    predicted: list[int]


def read_predictions(stage: Stage, split: str) -> Predictions | None:
    """Read predictions_{split}.csv; None where there is none.

    Raises:
        ArtifactError: the file is damaged; names file and line.
    """
    path = stage.folder / f"predictions_{split}.csv"
    content = stage.read(path.name)
    if content is None:
        return None
    try:
        return _parse(path, io.StringIO(content.decode("utf-8"), newline=""))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"cannot read {path}: {error}") from error


def _parse(path: Path, file: TextIO) -> Predictions:
    rows = csv.reader(file)
    header = next(rows, [])
    if header[:3] != ["path", "label", "prediction"]:
        raise ArtifactError(f"{path} is damaged: its first line should begin with path,label,prediction")
    names = [column.removeprefix(PROBABILITY) for column in header[3:]]
    index = {name: i for i, name in enumerate(names)}
    found = Predictions(names, [], [], [])
    for row in rows:
        if len(row) != len(header) or row[1] not in index or row[2] not in index:
            raise ArtifactError(
                f"{path} is damaged in line {rows.line_num}: cells or class names do not fit its header"
            )
        found.paths.append(row[0])
        found.labels.append(index[row[1]])
        found.predicted.append(index[row[2]])
    return found
