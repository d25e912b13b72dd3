"""A network together with all that is needed to use it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from potstill.inputs import InputSpec


@dataclass
class Classifier:
    """What a model file holds."""

    module: nn.Module  # images [B, 3, S, S] -> logits [B, K]
    architecture: str  # a name for `create_model`
    class_names: tuple[str, ...]  # of the K logits, in order
    input: InputSpec
    facts: dict[str, Any] = field(default_factory=dict)  # how it was trained: anything that JSON can say
    remodelled: dict[str, Any] | None = None  # where other last layers took the architecture's place; see `rebuild`

    def predict(self, images: Tensor) -> Tensor:
        """Probabilities [B, K] of images [B, 3, S, S] that were prepared as ``input`` says.

        In float32 on the network's device, in eval mode and without gradients; the network's mode is put back.
        """
        device = next(self.module.parameters()).device
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                logits: Tensor = self.module(images.to(device))
        finally:
            self.module.train(training)
        return logits.float().softmax(dim=1)
