"""Predictions of one stage on one split: which image was taken for which class."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potstill.errors import ArtifactError
from potstill.evaluation.averages import Array
from potstill.experiments.run_folder import cell_text
from potstill.report.contents import Stage

PROBABILITY = "p:"
NUMBERS = ["label_index", "prediction_index"]  # columns of a file that has the most probable classes alone


@dataclass(frozen=True)
class Predictions:
    """Names of the images and, in the same order, numbers of classes."""

    class_names: list[str]  # "" of a class that the file does not mention
    paths: list[str]
    labels: Array  # [N] int64
    predicted: Array  # [N] int64

    def same_images(self, other: "Predictions") -> bool:
        """Whether both are of the same images, in the same order, with the same labels."""
        return self.paths == other.paths and np.array_equal(self.labels, other.labels)


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
        return _parse(path, content.decode("utf-8"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"cannot read {path}: {error}") from error


def _parse(path: Path, text: str) -> Predictions:
    rows = csv.reader(io.StringIO(text, newline=""))
    header = next(rows, [])
    if header[:3] != ["path", "label", "prediction"]:
        raise ArtifactError(f"{path} is damaged: its first line should begin with path,label,prediction")
    paths: list[str] = []
    numbers: list[tuple[int, int]] = []
    names = [column.removeprefix(PROBABILITY) for column in header[3:]]
    index = {name: i for i, name in enumerate(names)}
    few = header[3:5] == NUMBERS
    if few:
        index = {}
    for cells in rows:
        row = [*map(cell_text, cells[:3]), *cells[3:]]
        try:
            if len(row) != len(header):
                raise ValueError
            pair = (int(row[3]), int(row[4])) if few else (index[row[1]], index[row[2]])
            if few and not (index.setdefault(row[1], pair[0]), index.setdefault(row[2], pair[1])) == pair:
                raise ValueError
        except (ValueError, KeyError) as error:
            raise ArtifactError(
                f"{path} is damaged in line {rows.line_num}: cells or class names do not fit its header"
            ) from error
        paths.append(row[0])
        numbers.append(pair)
    if few:
        names = [""] * (1 + max(index.values(), default=-1))
        for name, number in index.items():
            names[number] = name
    labels, predicted = np.array(numbers, dtype=np.int64).reshape(-1, 2).T
    return Predictions(names, paths, labels, predicted)
