"""Hinton's loss; at T = 20 the two sides of the divergence nearly cancel."""

from parity_case import Case
from torch import Tensor

from potstill.functional import kd_loss

FLOAT32 = {"loss": 2e-5}


def check(case: Case) -> dict[str, Tensor]:
    return {"loss": kd_loss(case["zs"], case["zt"], temperature=case.hyper["T"])}
