"""DML: several students train together, each on labels and on the others' predictions.

Zhang, Xiang, Hospedales and Lu, "Deep Mutual Learning", CVPR 2018.  https://arxiv.org/abs/1706.00384
No teacher is needed.  The other students are untrained copies of the student's network; they are trained with it and
dropped afterwards.  The paper updates one student after the other, each on fresh predictions; here, as in most later
code, all learn from the same forward pass.  Temperature 1 is the paper's; later papers take 3, with a factor T squared.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.methods.base import Method, NetworkInfo, TrainingInfo
from potstill.methods.kd import kd_loss
from potstill.methods.requirements import Requirements
from potstill.options import Count, NonNegative, Positive, checked, option
from potstill.types import Batch, Outputs, at_least_float32


@checked
def dml_loss(student_logits: Tensor, peer_logits: Sequence[Tensor], *, temperature: Positive = 1.0) -> Tensor:
    r"""Mean of the KL divergences from each of the other students.

    .. math:: \frac{T^2}{M - 1} \sum_{j \ne i} \mathrm{KL}\big(\mathrm{softmax}(z_j / T) \,\|\,
        \mathrm{softmax}(z_i / T)\big)

    Args:
        student_logits: [B, K], of student i.
        peer_logits: one or more of [B, K].

    Raises:
        UsageError: no other student, or ``temperature`` is not above 0.

    Example:
        >>> student, peer = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
        >>> # 3/4 ln(3/2) + 1/4 ln(1/2) = 0.1308, and 0 from an equal prediction
        >>> dml_loss(student, [peer, student])
        tensor(0.0654)
    """
    if not peer_logits:
        raise UsageError("dml compares a student with others: give the logits of one or more")
    return torch.stack([kd_loss(student_logits, peer, temperature=temperature) for peer in peer_logits]).mean()


class DML(Method):
    """Labels and the other students, for each of them: ``ce_weight * CE + weight * mean of KL``.

    The terms ``peers_ce`` and ``peers_mimic`` are sums over the other students.  They cost a forward and backward pass
    each.
    """

    name = "dml"
    needs = Requirements(teacher=False, peers=True)

    peers: Count = option(default=1, doc="other students beside the one that is kept")
    weight: NonNegative = option(default=1.0, doc="weight of the divergences from the other students")
    temperature: Positive = option(default=1.0, doc="T of the divergences")
    ce_weight: NonNegative = option(default=1.0, doc="weight of the label term")

    @property
    def label_term_names(self) -> frozenset[str]:
        return frozenset({"ce", "peers_ce"})

    def build(self, student: NetworkInfo, teacher: NetworkInfo, training: TrainingInfo) -> None:
        assert student.untrained_copy is not None  # needs.peers: the Distiller has seen to it
        self.others = nn.ModuleList(student.untrained_copy() for _ in range(self.peers))

    def distill(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        logits_of_all = [student.logits, *(at_least_float32(other(batch.images)) for other in self.others)]
        mimic = [
            dml_loss(logits, logits_of_all[:position] + logits_of_all[position + 1 :], temperature=self.temperature)
            for position, logits in enumerate(logits_of_all)
        ]
        labels = [self.label_loss(logits, batch.targets) for logits in logits_of_all[1:]]
        return {
            "mimic": self.weight * mimic[0],
            "peers_ce": self.ce_weight * torch.stack(labels).sum(),
            "peers_mimic": self.weight * torch.stack(mimic[1:]).sum(),
        }
