"""The class-wise term, which is Hinton's loss with the other image's logits in the teacher's place."""

import torch
from parity_case import Case
from torch import Tensor

from potstill.methods.cskd import CSKD
from potstill.types import Batch, Outputs


def check(case: Case) -> dict[str, Tensor]:
    batch = Batch(torch.zeros(len(case["zs"]), 3, 1, 1), torch.zeros(len(case["zs"]), dtype=torch.int64))
    method = CSKD(weight=1.0, temperature=case.hyper["T"])
    return {"loss": method.distill(Outputs(case["zs"], second=Outputs(case["z_pair"])), None, batch)["cskd"]}
