"""Both parts, unweighted, and their weighted sum; logits are standardised first where the case says so."""

from parity_case import Case
from torch import Tensor

from potstill.functional import mcd_loss, rld_loss, scd_loss, standardise


def check(case: Case) -> dict[str, Tensor]:
    hyper, student, teacher = case.hyper, case["zs"], case["zt"]
    if hyper["logit_stand"]:
        student, teacher = standardise(student), standardise(teacher)
    given = (student, teacher, case["y"])
    return {
        "loss": rld_loss(
            *given,
            temperature=hyper["T"],
            confidence_temperature=hyper["alpha_T"],
            alpha=hyper["alpha"],
            beta=hyper["beta"],
        ),
        "scd": scd_loss(*given, temperature=hyper["alpha_T"]),
        "mcd": mcd_loss(*given, temperature=hyper["T"]),
    }
