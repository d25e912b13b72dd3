"""Target class and transport with a given cost matrix."""

from parity_case import Case
from torch import Tensor

from potstill.functional import wkd_distance_loss, wkd_target_loss


def check(case: Case) -> dict[str, Tensor]:
    hyper, given = case.hyper, (case["zs"], case["zt"], case["y"])
    distance = wkd_distance_loss(
        *given,
        case["cost"],
        temperature=hyper["T"],
        regularization=hyper["sinkhorn_lambda"],
        steps=hyper["sinkhorn_iter"],
    )
    target = wkd_target_loss(*given)
    return {"loss": target + hyper["gamma"] * distance, "target": target, "wasserstein": distance}
