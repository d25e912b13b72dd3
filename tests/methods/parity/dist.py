"""Both correlations with their tau squared, unweighted, and their weighted sum."""

from parity_case import Case
from torch import Tensor

from potstill.functional import dist_inter_loss, dist_intra_loss, dist_loss


def check(case: Case) -> dict[str, Tensor]:
    given, hyper = (case["zs"], case["zt"]), case.hyper
    tau, eps = hyper["tau"], hyper["eps"]
    return {
        "loss": dist_loss(*given, temperature=tau, beta=hyper["beta"], gamma=hyper["gamma"], eps=eps),
        "inter": dist_inter_loss(*given, temperature=tau, eps=eps),
        "intra": dist_intra_loss(*given, temperature=tau, eps=eps),
    }
