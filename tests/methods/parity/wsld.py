"""The soft targets with their outer weight."""

from parity_case import Case
from torch import Tensor

from potstill.functional import wsld_loss


def check(case: Case) -> dict[str, Tensor]:
    loss = wsld_loss(case["zs"], case["zt"], case["y"], temperature=case.hyper["T"])
    return {"loss": case.hyper["alpha"] * loss}
