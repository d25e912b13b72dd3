"""One step of the whole method, whose memory holds the given predictions; the targets by themselves."""

import torch
from parity_case import Case
from torch import Tensor

from potstill.functional import pskd_loss, pskd_targets
from potstill.methods.base import NetworkInfo, TrainingInfo
from potstill.methods.pskd import PSKD
from potstill.types import Batch, Outputs


def check(case: Case) -> dict[str, Tensor]:
    hyper, labels = case.hyper, case["y"]
    student = Outputs(case["zs"])
    method = PSKD(alpha=hyper["alpha_T"])
    method.build(NetworkInfo(student), None, TrainingInfo(classes=case["zs"].shape[1], labels=labels))
    method.to(case.dtype).current.copy_(case["p_prev"])
    method.start_epoch(hyper["epoch0based"], hyper["end_epoch"])
    index = torch.arange(len(labels))
    terms = method(student, None, Batch(torch.zeros(len(labels), 3, 1, 1), labels, index=index))
    targets = pskd_targets(case["p_prev"], labels, share=method.share)
    torch.testing.assert_close(terms["ce"] + terms["pskd"], pskd_loss(case["zs"], targets))
    return {"loss": terms["ce"] + terms["pskd"], "soft_targets": targets}
