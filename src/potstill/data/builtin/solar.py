"""Solar: 2,624 photographs (electroluminescence, 300x300, gray) of solar cells, from the package elpv-dataset.

Deitsch et al., "Automatic classification of defective photovoltaic module cells in electroluminescence images", 2019;
CC BY-NC-SA 4.0, therefore an extra and not part of this package.  Each cell has a probability of being defective: 0,
1/3, 2/3 or 1.
"""

import csv
import importlib.util
from pathlib import Path
from typing import Literal

from potstill.data.image_sets import FileSet
from potstill.data.scan import check_files
from potstill.data.settings import AugmentSettings, DataSettings, Options, read_options
from potstill.data.splits import DataSplits, fingerprint, split_by_settings
from potstill.errors import DataError, UsageError

# Flipped cells look alike; rotated by 90 degrees, their busbars would not.
AUGMENT = AugmentSettings(pad_crop=0.05, hflip=True, vflip=True)

FOUR = ("functional", "minor", "moderate", "defective")  # probability of a defect: 0, 1/3, 2/3, 1
TWO = ("functional", "defective")


class SolarOptions(Options):
    """Selection of cells and classes."""

    classes: Literal[2, 4] = 4
    cells: Literal["all", "mono", "poly"] = "all"  # mono- or polycrystalline
    # "half": 0 and 1/3 against 2/3 and 1; "sure": 0 against 1, the cells between left out, as in some papers.
    two_class: Literal["half", "sure"] = "half"


def solar(settings: DataSettings) -> DataSplits:
    """Return solar cells in four or two classes of damage, split by the settings."""
    options = read_options(settings, SolarOptions)
    folder = _folder()
    names, labels = [], []
    for name, third, kind in _rows(folder):
        label = _label(third, options)
        if label is not None and options.cells in ("all", kind):
            names.append(name)
            labels.append(label)
    images = FileSet(folder, names, labels)
    class_names = FOUR if options.classes == 4 else TWO
    parts, origin = split_by_settings(settings, images, class_names)
    # verified by pip at installation, so not decoded here
    contents = check_files(folder, names, settings.source, decode=False)
    images.expect(contents)
    found = {split: [contents[name] for name in part.names] for split, part in parts.items()}
    return DataSplits(
        class_names, parts["train"], parts["val"], parts["test"], source=settings.source, origin=origin,
        fingerprint=fingerprint(parts, class_names, found), augment=AUGMENT,
    )  # fmt: skip


def find_package() -> Path | None:
    """Return the folder of the installed package elpv-dataset, or None."""
    spec = importlib.util.find_spec("elpv_dataset")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    return Path(places[0]) if places else None


def check(settings: DataSettings) -> None:
    """Check options and package, without reading images."""
    read_options(settings, SolarOptions)
    _folder()


def _folder() -> Path:
    package = find_package()
    if package is None:
        raise UsageError(
            "data set 'solar' needs the package elpv-dataset (2,624 images, CC BY-NC-SA 4.0), which is not installed\n"
            'Install it: pip install "potstill[solar]"'
        )
    return package / "data"


def _label(third: int, options: SolarOptions) -> int | None:
    if options.classes == 4:
        return third
    if options.two_class == "sure" and third in (1, 2):
        return None
    return int(third >= 2)


def _rows(folder: Path) -> list[tuple[str, int, str]]:
    """(path, thirds of probability, mono or poly); the package's own reader would keep 236 MB of arrays."""
    path = folder / "labels.csv"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [line for line in csv.reader((" ".join(line.split()) for line in lines), delimiter=" ") if line]
        return [(name, round(float(probability) * 3), kind) for name, probability, kind in rows]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the installed elpv-dataset is damaged ({error}); install it again") from error
