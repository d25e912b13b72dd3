"""Both parts, unweighted, and their weighted sum."""

from parity_case import Case
from torch import Tensor

from potstill.functional import dkd_loss, nckd_loss, tckd_loss


def check(case: Case) -> dict[str, Tensor]:
    given, hyper = (case["zs"], case["zt"], case["y"]), case.hyper
    return {
        "loss": dkd_loss(*given, temperature=hyper["T"], alpha=hyper["alpha"], beta=hyper["beta"]),
        "tckd": tckd_loss(*given, temperature=hyper["T"]),
        "nckd": nckd_loss(*given, temperature=hyper["T"]),
    }
