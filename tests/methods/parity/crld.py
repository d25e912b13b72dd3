"""The whole method, labels of both views included."""

import torch
from parity_case import Case
from torch import Tensor

from potstill.methods.crld import CRLD
from potstill.types import Batch, Outputs


def check(case: Case) -> dict[str, Tensor]:
    hyper = case.hyper
    method = CRLD(
        temperature=hyper["T"],
        within_weight=hyper["wv_weight"],
        cross_weight=hyper["cv_weight"],
        weak_threshold=hyper["tau_w"],
        strong_threshold=hyper["tau_s"],
        ce_weight=hyper["ce_weight"],
    )
    student, teacher = (Outputs(case[f"{z}_weak"], second=Outputs(case[f"{z}_strong"])) for z in ("zs", "zt"))
    terms = method(student, teacher, Batch(torch.zeros(len(case["y"]), 3, 1, 1), case["y"]))
    return {
        "loss": torch.stack(list(terms.values())).sum(),
        "loss_ce": terms["ce"] + terms["ce_strong"],
        "loss_kd": terms["within"] + terms["across"],
        "within_view": terms["within"],
        "cross_view": terms["across"],
    }
