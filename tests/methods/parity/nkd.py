"""Both parts and their weighted sum, for class ids and for shares of classes."""

from parity_case import Case
from torch import Tensor

from potstill.functional import nkd_loss, nkd_others_loss, nkd_target_loss


def check(case: Case) -> dict[str, Tensor]:
    given = (case["zs"], case["zt"], case["y_soft"] if "y_soft" in case else case["y"])
    temperature, gamma = case.hyper["T"], case.hyper["gamma"]
    return {
        "loss": nkd_loss(*given, temperature=temperature, gamma=gamma),
        "target": nkd_target_loss(*given),
        "non_target_unweighted": nkd_others_loss(*given, temperature=temperature),
    }
