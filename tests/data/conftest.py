"""Small image folders."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeFolder = Callable[..., Path]


def write_image(path: Path, seed: int, size: tuple[int, int] = (12, 10)) -> None:
    """A PNG of random pixels, width x height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """``make_folder({"train/cat": 3, ...})``: a folder with so many images in each place."""

    def make(places: dict[str, int], root: Path | None = None) -> Path:
        root = root or tmp_path / "images"
        root.mkdir(exist_ok=True)
        seed = 0
        for place, count in places.items():
            (root / place).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                write_image(root / place / f"{i}.png", seed := seed + 1)
        return root

    return make
