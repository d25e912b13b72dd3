"""What is raced on: JPEG files of four classes, a VGG16 that teaches and a ResNet18 that learns."""

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from potstill.models.factory import create_model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE = (0.35, 1.0)  # of the random resized crops that everybody draws
TEMPERATURE, ALPHA, LR = 4.0, 0.5, 1e-4


@dataclass(frozen=True)
class Scene:
    """One setting that all contestants share."""

    data: Path  # <class>/*.jpg
    images: int
    classes: int
    size: int  # of what the networks see, in pixels
    batch: int
    teacher_name: str
    student_name: str

    def teacher(self) -> nn.Module:
        """A new teacher, always with the same weights."""
        return self._network(self.teacher_name, 1).eval()

    def student(self) -> nn.Module:
        """A new student, always with the same weights."""
        return self._network(self.student_name, 0)

    def _network(self, name: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return create_model(name, self.classes, size=self.size)


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder that is gone afterwards, with a cache of its own: nothing is found ready, and nothing is left behind."""
    before = os.environ.get("POTSTILL_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["POTSTILL_CACHE"] = str(Path(folder, "cache"))
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["POTSTILL_CACHE"]
            else:
                os.environ["POTSTILL_CACHE"] = before


def add_arguments(parser: argparse.ArgumentParser, *, images: int = 256, batch: int | None = 128) -> None:
    """What every measure understands; ``--batch`` only where it has a default."""
    parser.add_argument("--images", type=int, default=images, help="JPEG files that are made")
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=160, help="height and width of the files")
    parser.add_argument("--size", type=int, default=64, help="height and width that the networks see")
    if batch is not None:
        parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--teacher", default="vgg16")
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch")


def make_scene(arguments: argparse.Namespace, folder: Path, *, batch: int | None = None) -> Scene:
    """Make the images below ``folder`` and describe the race."""
    torch.set_num_threads(arguments.threads)
    data = folder / "images"
    make_images(data, arguments.images, arguments.classes, arguments.pixels)
    return Scene(
        data,
        arguments.images,
        arguments.classes,
        arguments.size,
        batch or arguments.batch,
        arguments.teacher,
        arguments.student,
    )


def make_images(folder: Path, images: int, classes: int, pixels: int) -> None:
    """Smooth coloured noise as JPEG files of quality 90: about as long to decode as photographs of that size."""
    random = np.random.default_rng(0)
    for i in range(images):
        path = folder / f"class{i % classes:04d}" / f"{i:06d}.jpg"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (pixels // 8, pixels // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((pixels, pixels), Image.Resampling.BICUBIC)
        noise = random.integers(-12, 13, (pixels, pixels, 3))
        Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)).save(path, quality=90)
