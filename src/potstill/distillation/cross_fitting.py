"""Cross-fitted heads: the logits of each training image come from a head that was fitted without its label.

A linear head with as many weights as a probe nearly memorises its training labels: its outputs for these images are
the labels again, and a student learns nothing more from them.  So the training images are divided into folds, and
each fold has a head that was fitted on the others (cross-fitting: Chernozhukov et al., "Double/debiased machine
learning", 2018, https://arxiv.org/abs/1608.00060; for distillation: Dao et al., "Knowledge distillation as
semiparametric inference", ICLR 2021, https://arxiv.org/abs/2104.09732).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FoldHeads(nn.Module):
    """Linear heads of one frozen encoder, chosen by sample id.

    Args:
        layer: path of the linear layer whose input they read, as in ``named_modules``.
        weight: [F + 1, K, D]; head f was fitted without the images of fold f, the last one with all.
        bias: [F + 1, K].
        fold: [N] int64, the fold of each training image: 0 to F - 1, or F if it has no label.

    Example:
        >>> weight = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]], [[5.0], [5.0]]])  # two folds, K = 2, D = 1
        >>> heads = FoldHeads("head", weight, torch.zeros(3, 2), torch.tensor([1, 0]))
        >>> heads(torch.ones(3, 1), torch.tensor([0, 1, 2]))  # id 2 is no training image
        tensor([[0., 1.],
                [1., 0.],
                [5., 5.]])
    """

    weight: Tensor
    bias: Tensor
    fold: Tensor

    def __init__(self, layer: str, weight: Tensor, bias: Tensor, fold: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("fold", fold)

    def forward(self, embedding: Tensor, index: Tensor) -> Tensor:
        """Return logits [B, K] in float32.

        Args:
            embedding: [B, D].
            index: [B] int64 sample ids; ids from N on are no training images and get the last head.
        """
        count, classes, width = self.weight.shape
        with torch.autocast(embedding.device.type, enabled=False):
            # All heads at once: cheap beside the encoder, and no synchronisation for the sizes of the folds.
            logits = F.linear(embedding.float(), self.weight.view(-1, width), self.bias.view(-1))
        in_training = index < len(self.fold)
        chosen = torch.where(in_training, self.fold[index.clamp(max=len(self.fold) - 1)], count - 1)
        return logits.view(-1, count, classes)[torch.arange(len(index), device=index.device), chosen]
