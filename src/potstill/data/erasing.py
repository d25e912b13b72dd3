"""Random erasing of a whole batch: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020,
https://arxiv.org/abs/1708.04896.
"""

import torch
from torch import Tensor

from potstill.data.boxes import draw_boxes
from potstill.data.draws import Draws

SCALE, RATIO = (0.02, 0.33), (0.3, 3.3)  # of the area, and height / width: as torchvision's


def erase(images: Tensor, probability: float, draws: Draws) -> Tensor:
    """A rectangle of 2 to 33 % of the area becomes black in some of the images.

    Args:
        images: uint8 [B, 3, S, S].
        probability: of erasing, in [0, 1].
        draws: of these samples.

    Returns:
        The same shape and type.
    """
    size = images.shape[-1]
    boxes, found = draw_boxes(SCALE, RATIO, size, draws, "erase")
    boxes[~(found & (draws("erase") < probability)), 2:] = 0
    top, left, height, width = torch.from_numpy(boxes).to(images.device, non_blocking=True).T[:, :, None]
    line = torch.arange(size, device=images.device)
    rows, columns = (line >= top) & (line < top + height), (line >= left) & (line < left + width)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
