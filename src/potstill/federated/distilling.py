"""Federated distillation: what the clients say of public images, averaged, teaches a student.

Lin and others, "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020 (FedDF: the server
asks the clients' networks).  https://arxiv.org/abs/2006.07242

Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", 2019 (clients ask their own, and send
logits).  https://arxiv.org/abs/1910.03581

Unlike FedDF's code, which distils for up to ten thousand steps with early stopping, this makes a few passes over the
public images, each in one fixed view, so that the same logits serve both ways.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.images import ImageSet
from potstill.data.loader import Loader
from potstill.errors import NonFiniteError
from potstill.evaluation.evaluate import evaluating
from potstill.functional import kd_loss
from potstill.inputs import InputSpec
from potstill.models.classifier import Classifier
from potstill.training.devices import Compute
from potstill.training.optimizers import create_optimizer
from potstill.training.settings import TrainingSettings


class Public:
    """Images that nobody labels, of which server and clients have the same copy.

    Args:
        images: P of them; their labels are never looked at.
        spec: how the networks want them.
        settings: of the batches.
        compute: where they are wanted.
        seed: of the order in which a student sees them.
    """

    def __init__(
        self, images: ImageSet, spec: InputSpec, settings: TrainingSettings, compute: Compute, seed: int
    ) -> None:
        self.compute, self.settings = compute, settings
        size = min(settings.batch_size, len(images))
        self.listed = Loader(images, spec, batch_size=settings.batch_size, device=compute.device)
        self.shuffled = Loader(images, spec, batch_size=size, order="shuffled", seed=seed, device=compute.device)

    def __len__(self) -> int:
        return self.listed.count

    def ask(self, network: Classifier) -> NDArray[np.float32]:
        """What a network says of every image: logits [P, K]."""
        module = network.module.to(self.compute.device)
        with evaluating(module):
            logits = torch.cat([module(self._laid_out(batch.images)).float() for batch in self.listed.epoch()])
        found: NDArray[np.float32] = logits.cpu().numpy()
        return found

    def teach(
        self, student: Classifier, logits: NDArray[np.float32], *, temperature: float, epochs: int, first: int
    ) -> float:
        """Train ``student`` in place towards ``logits`` [P, K], by KL divergence alone: no label is used.

        Args:
            student: of the classes of the logits.
            logits: the average.
            temperature: T of both sides.
            epochs: passes over the images.
            first: number of the first pass; decides the order.

        Returns:
            The mean loss of the last pass.

        Raises:
            NonFiniteError: it is NaN or infinite.
        """
        module = student.module.to(self.compute.device).train()
        targets = torch.from_numpy(logits).to(self.compute.device)
        named = [(name, each) for name, each in module.named_parameters() if each.requires_grad]
        optimizer = create_optimizer(named, self.settings)
        total, images = torch.zeros((), device=self.compute.device), 1
        for epoch in range(first, first + epochs):
            total, images = torch.zeros((), device=self.compute.device), 0
            for batch in self.shuffled.epoch(epoch):
                assert batch.index is not None
                with self.compute.autocast():
                    answers = module(self._laid_out(batch.images))
                loss = kd_loss(answers, targets[batch.index], temperature=temperature)
                loss.backward()  # type: ignore[no-untyped-call]
                if self.settings.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(module.parameters(), self.settings.clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                total, images = total + loss.detach() * len(batch), images + len(batch)
        if not torch.isfinite(total):
            raise NonFiniteError("the loss on the public images became NaN or infinite; lower training.lr")
        return float(total) / max(images, 1)

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self.compute.memory_format)
