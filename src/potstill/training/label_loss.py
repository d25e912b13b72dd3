"""Cross-entropy with class weights, label smoothing, mixed labels and images without a label."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LabelLoss(nn.Module):
    r"""Cross-entropy in which a class weight multiplies the loss of a whole image.

    .. math::
        \ell_i = -\sum_k \Big( (1 - \epsilon) \, q_{ik} + \frac{\epsilon}{K} \Big) \log p_{ik}, \qquad
        L = \frac{\sum_i w_i \ell_i}{\sum_i w_i}, \qquad w_i = \sum_k q_{ik} w_k

    q is the image's label as a one-hot vector, or its shares of the classes where images are mixed.  Smoothing spreads
    epsilon over all classes alike.  ``nn.CrossEntropyLoss`` instead multiplies the smoothed (or mixed) mass of class k
    by the weight of class k: with rare classes of large weight, the best answer to every image is then a rare class.
    Without smoothing and mixing both are the same.

    Args:
        weight: [K], of each class; all 1 where None.
        label_smoothing: epsilon, the share of the label that is spread over all classes.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
        >>> # by hand: -log p of image 0: 0.1269 and 2.1269; smoothed by 0.2: 0.9 * 0.1269 + 0.1 * 2.1269 = 0.3269;
        >>> # image 1: 0.6931; (1 * 0.3269 + 3 * 0.6931) / 4
        >>> LabelLoss(torch.tensor([1.0, 3.0]), label_smoothing=0.2)(logits, labels)
        tensor(0.6016)
        >>> LabelLoss()(logits, torch.tensor([-100, -100])).item()  # no label: 0, and not torch's NaN
        0.0
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits [B, K] and labels [B], -100 where unknown, or shares of the classes [B, K] -> a scalar."""
        losses = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing, reduction="none")
        weights = self._of_images(target).to(losses.dtype)
        return (weights * losses).sum() / weights.sum().clamp(min=torch.finfo(losses.dtype).tiny)

    def _of_images(self, target: Tensor) -> Tensor:
        if target.is_floating_point():  # no matrix product, which autocast would round to bfloat16
            return target.sum(dim=1) if self.weight is None else (target * self.weight).sum(dim=1)
        known = target >= 0
        return known if self.weight is None else self.weight[target.clamp(min=0)] * known


def balanced_class_weights(counts: Tensor) -> Tensor:
    """N / (K n) for a class of n images among N of K classes: the mean weight over all images is 1.

    A class without images (it may have some in val) weighs as one with a single image.

    Example:
        >>> balanced_class_weights(torch.tensor([600, 6]))
        tensor([ 0.5050, 50.5000])
    """
    return (counts.sum() / (len(counts) * counts.clamp(min=1))).float()
