"""Images under other labels than their own set gives them."""

import numpy as np

from potstill.data.decode import Pixels
from potstill.data.images import ImageSet, Labels


class Relabelled:
    """Another set's images and names, with these labels.

    Args:
        images: N of them.
        labels: [N] class ids; -100 where the label is unknown, or is not to be used.
    """

    def __init__(self, images: ImageSet, labels: Labels) -> None:
        self.images, self.names = images, images.names
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, i: int) -> Pixels:
        """Image i, uint8 [H, W, 3]."""
        return self.images.pixels(i)
