"""(k) CPU time of a batch of views from JPEG files that are decoded in every epoch, by that of torchvision's tensors:
decode_jpeg, RandomResizedCrop, flip and normalisation, one image after the other in a DataLoader; goal <= 1.

Both decode in the main process on one thread.  Potstill's views are those that it would cut from cached pixels, bit for
bit: so each image is first resized to a square, of which the crop is then taken.
"""

import argparse
import warnings
from pathlib import Path

import torch
from benchmarks.speed.clock import take_turns
from benchmarks.speed.ours import loader
from benchmarks.speed.scene import MEAN, SCALE, STD, add_arguments, make_scene, workplace
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2


class Tensors(Dataset[Tensor]):
    """Files of a folder, through torchvision's transforms of tensors."""

    def __init__(self, files: list[Path], size: int) -> None:
        self.files = files
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=SCALE, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        """Return view [3, size, size] of image i."""
        image: Tensor = self.transform(decode_jpeg(read_file(str(self.files[i])), mode=ImageReadMode.RGB))
        return image


def main(arguments: list[str]) -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, images=128, batch=32)
    parser.set_defaults(pixels=400, size=224)
    given = parser.parse_args(arguments)
    with workplace() as folder:
        scene = make_scene(given, folder)
        ours = loader(scene, identity=None, cache_fraction=1e-12, workers=0)
        assert not ours.resident
        theirs = DataLoader(Tensors(sorted(scene.data.glob("*/*.jpg")), scene.size), scene.batch, shuffle=True)
        numbers = iter(range(1_000_000))

        def live() -> None:
            for _ in ours.epoch(next(numbers)):
                pass

        def torchvision() -> None:
            for _ in theirs:
                pass

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torchvision's decoders, which torchcodec replaces
            result = take_turns({"live": live, "torchvision": torchvision}, given.rounds, wall=False)
        middle, least, most = result.ratio("live", "torchvision")
        each = {name: 1000 * result.median(name) / len(ours.labels) for name in result.seconds}
        texts = ", ".join(f"{name} {milliseconds:.2f} ms an image" for name, milliseconds in each.items())
        print(f"(k) {given.pixels} px to {given.size} px{result.mark}: {texts}")
        print(f"{'live / torchvision':<20} {middle:.3f}  ({least:.3f} to {most:.3f})  goal <= 1")
