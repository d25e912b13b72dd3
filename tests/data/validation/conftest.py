"""Images and folders to be ill, and what the doctor says of them."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from potstill.data import DataSettings
from potstill.data.validation import ValidationReport
from potstill.data.validation.validate import validate_data

Found = dict[str, dict[str, str]]  # kind -> path -> reason


def by_kind(report: ValidationReport) -> Found:
    found: Found = {}
    for each in report.findings:
        found.setdefault(each.kind, {})[each.path] = each.reason
    return found


@pytest.fixture
def examined() -> Callable[..., Found]:
    """``examined(folder)``: kind -> path -> reason."""
    return lambda source, **settings: by_kind(validate_data(DataSettings(source=str(source), **settings)))


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """``picture(seed)``: random pixels, other ones for each seed."""

    def make(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
        pixels = np.random.default_rng(seed + 1000).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make
