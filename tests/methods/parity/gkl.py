"""Both parts and their weighted sum; weights are the class prior's rows or the teacher's probabilities."""

from parity_case import Case
from torch import Tensor

from potstill.functional import gkl_wmse_loss, ikl_soft_ce_loss


def check(case: Case) -> dict[str, Tensor]:
    hyper, given = case.hyper, (case["zs"], case["zt"])
    weights = case["prior"] if hyper["GI"] else (case["zt"] / hyper["T2"]).softmax(dim=1)
    wmse = gkl_wmse_loss(*given, weights, gamma=hyper["gamma"])
    soft_ce = ikl_soft_ce_loss(*given, temperature=hyper["T"])
    return {"loss": hyper["beta"] * wmse + hyper["alpha"] * soft_ce, "wmse": wmse, "soft_ce": soft_ce}
