"""Two domains from one data set: photographs of clothing as they are, and others of them degraded.

    python benchmarks/degraded_images.py FOLDER                 6,000 + 2,000 images for each domain
    potstill run domain --set data.source=FOLDER/source --set data.target=FOLDER/target

Writes FOLDER/source and FOLDER/target, each with train/ and test/ and a folder for every class.  No photograph is in
both.  A degraded one has been, in this order: blurred (Gaussian, radius 1 pixel), given half its contrast and 60 of 255
more brightness, given noise (Gaussian, standard deviation 15 of 255; its seed is the image's number), and stored as
8-bit PNG; with --strength S, radius, loss of contrast, brightness and noise are S times that.  The images are
Fashion-MNIST's (28 x 28), as `potstill run fashion-mnist` finds them.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from potstill.data import DataSettings
from potstill.data.builtin.fashion_mnist import fashion_mnist
from potstill.data.image_sets import ImageSet
from potstill.io import write_bytes

BLUR, CONTRAST_LOSS, BRIGHTNESS, NOISE = 1.0, 0.5, 60.0, 15.0  # at full strength


def degraded(pixels: NDArray[np.uint8], seed: int, strength: float = 1.0) -> NDArray[np.uint8]:
    """A worse photograph of the same thing.

    Args:
        pixels: uint8 [H, W], gray.
        seed: of the noise.
        strength: from 0, where the pixels stay as they are.
    """
    blurred = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(BLUR * strength))
    noise = np.random.default_rng(seed).normal(0.0, NOISE, pixels.shape)
    changed = (1 - CONTRAST_LOSS * strength) * np.asarray(blurred, dtype=np.float64) + strength * (BRIGHTNESS + noise)
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)


def write(images: ImageSet, ids: range, folder: Path, names: list[str], strength: float) -> None:
    """Some images as PNG files in class folders; with a strength above 0, degraded."""
    for i in ids:
        gray = images.pixels(i)[..., 0]
        content = io.BytesIO()
        Image.fromarray(degraded(gray, i, strength) if strength else gray).save(content, format="PNG")
        write_bytes(folder / names[images.labels[i]] / f"{i:05d}.png", content.getvalue())


def main() -> int:
    """Write both domains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=6000, help="images of each domain's train")
    parser.add_argument("--test", type=int, default=2000, help="images of each domain's test")
    parser.add_argument("--strength", type=float, default=1.0, help="of the degradation, above 0, at most 2")
    wish = parser.parse_args()
    if not 0 < wish.strength <= 2:
        parser.error(f"--strength must be above 0 and at most 2, got {wish.strength:g}")
    data = fashion_mnist(DataSettings(source="fashion-mnist", val=0.001))
    names = [name.replace("/", "-") for name in data.class_names]
    for split, count in (("train", wish.train), ("test", wish.test)):
        for at, domain in enumerate(("source", "target")):
            ids = range(at * count, (at + 1) * count)
            write(data.split(split), ids, wish.folder / domain / split, names, at * wish.strength)
    sys.stdout.write(f"{wish.folder}/source and {wish.folder}/target: {wish.train:,} + {wish.test:,} images each\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
