"""The divergence, weighted by image."""

from parity_case import Case
from torch import Tensor

from potstill.functional import wttm_loss


def check(case: Case) -> dict[str, Tensor]:
    return {"loss": wttm_loss(case["zs"], case["zt"], gamma=case.hyper["gamma"])}
