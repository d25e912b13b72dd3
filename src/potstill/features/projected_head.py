"""The network that SimKD deploys: the student's features under the teacher's head."""

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.features.layout import Grid, Layout
from potstill.features.remodelled import Remodelled, facts_of
from potstill.features.taps import submodule


class ProjectedHead(Remodelled):
    """The student up to its last stage, a projector to the teacher's channels, and the teacher's pooling and head.

    The head is a copy that is never trained.  The student's own later layers are left in place, without effect.

    Args:
        network: the student; its last stage is wrapped in place.
        stage: path of the submodule that puts out the last feature map.
        channels: of that map.
        outputs: channels of the teacher's last map.
        classes: that the head knows.
        factor: the projector's hidden layers have ``outputs // factor`` channels.
        pool_height: to which the map is averaged before the projector; 0: not at all.
        pool_width: likewise.
        layout: how the submodule's output holds the map: "NCHW", "NHWC" or "tokens".
        height: of a map of tokens.
        width: of a map of tokens.
        prefix: tokens before those of the map.
        copied: the network writes into the map later, so that a copy must be kept.
        bias: whether the head has one.

    Example:
        >>> import torch
        >>> student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> joined = ProjectedHead(student, stage="0", channels=4, outputs=6, classes=5)
        >>> joined(torch.zeros(2, 3, 4, 4)).shape  # 5 classes: the teacher's head
        torch.Size([2, 5])
    """

    name = "projected_head"

    def __init__(
        self,
        network: nn.Module,
        *,
        stage: str,
        channels: int,
        outputs: int,
        classes: int,
        factor: int = 2,
        pool_height: int = 0,
        pool_width: int = 0,
        layout: Layout = "NCHW",
        height: int = 0,
        width: int = 0,
        prefix: int = 0,
        copied: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.facts = facts_of(locals(), self.name)
        self.stage, self.pooled = stage, (pool_height, pool_width)
        self.grid = Grid(layout, channels, height, width, prefix)
        self.network = network
        network.set_submodule(stage, Kept(submodule(network, stage), copied=copied))
        hidden = max(outputs // factor, 1)
        self.projector = nn.Sequential(
            *_layer(channels, hidden, kernel=1), *_layer(hidden, hidden, kernel=3), *_layer(hidden, outputs, kernel=1)
        )
        self.head = nn.Linear(outputs, classes, bias=bias).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, K]."""
        self.network(images)
        kept = cast(Kept, self.network.get_submodule(self.stage)).take()
        features = self.grid.to_map(kept)
        if self.pooled != (0, 0):
            features = F.adaptive_avg_pool2d(features, self.pooled)
        logits: Tensor = self.head(self.projector(features).mean(dim=(2, 3)))
        return logits


class Kept(nn.Module):
    """A submodule whose last output can be taken once; nothing is left behind for copies and exports to trip over."""

    def __init__(self, module: nn.Module, *, copied: bool) -> None:
        super().__init__()
        self.module, self.copied = module, copied
        self._output: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the submodule itself."""
        output: Tensor = self.module(*args, **kwargs)
        self._output = output.clone() if self.copied else output
        return output

    def take(self) -> Tensor:
        """The last output.

        Raises:
            UsageError: the submodule has not run.
        """
        output, self._output = self._output, None
        if output is None:
            raise UsageError("the student's last stage did not run; name a layer that every image passes")
        return output


def _layer(inputs: int, outputs: int, *, kernel: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()
