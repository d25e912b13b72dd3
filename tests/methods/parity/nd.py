"""ND with given class means."""

from parity_case import Case
from torch import Tensor

from potstill.functional import nd_loss


def check(case: Case) -> dict[str, Tensor]:
    loss = nd_loss(case["fs"], case["ft"], case["y"], case["class_means"])
    return {"loss": case.hyper["nd_loss_factor"] * loss}
