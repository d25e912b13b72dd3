"""The divergence without weights."""

from parity_case import Case
from torch import Tensor

from potstill.functional import ttm_loss


def check(case: Case) -> dict[str, Tensor]:
    return {"loss": ttm_loss(case["zs"], case["zt"], gamma=case.hyper["gamma"])}
