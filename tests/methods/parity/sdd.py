"""The loss on given region logits; DKD's weights tell the variant."""

from parity_case import Case
from torch import Tensor

from potstill.functional import sdd_dkd_loss, sdd_kd_loss


def check(case: Case) -> dict[str, Tensor]:
    hyper, given = case.hyper, (case["zs"], case["zt"], case["y"])
    if "alpha" not in hyper:
        return {"loss": sdd_kd_loss(*given, temperature=hyper["T"])}
    return {"loss": sdd_dkd_loss(*given, temperature=hyper["T"], alpha=hyper["alpha"], beta=hyper["beta"])}
