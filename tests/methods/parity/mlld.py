"""One level by itself (``piece_...``), or the whole method as released, labels included."""

import torch
from parity_case import Case
from torch import Tensor

from potstill.functional import kd_loss, mlld_batch_loss, mlld_class_loss
from potstill.methods.mlld import MLLD
from potstill.types import Batch, Outputs

LEVELS = {"kd": kd_loss, "bc": mlld_batch_loss, "cc": mlld_class_loss}
# The squared difference of two nearly equal Gram matrices, computed here as there.
FLOAT32 = {"loss": 2e-5}


def check(case: Case) -> dict[str, Tensor]:
    hyper = case.hyper
    if "zs" in case:
        level = next(loss for name, loss in LEVELS.items() if f"_{name}_" in case.name)
        return {"loss": level(case["zs"], case["zt"], temperature=hyper["T"])}
    weights = {"temperature": hyper["T_base"], "ce_weight": hyper["ce_weight"], "kd_weight": hyper["kd_weight"]}
    method = MLLD(**weights, standardise=hyper.get("logit_stand", False))
    student, teacher = (Outputs(case[f"{z}_weak"], second=Outputs(case[f"{z}_strong"])) for z in ("zs", "zt"))
    batch = Batch(torch.zeros(len(case["y"]), 3, 1, 1), case["y"])
    terms = method(student, teacher, batch)
    paper = case.wanted("paper").get("unmasked_both_views_all_terms")
    if paper is not None:
        found = torch.stack(list(MLLD(**weights, form="paper")(student, teacher, batch).values())).sum()
        torch.testing.assert_close(
            found, paper.to(case.dtype), rtol=1e-5 if case.dtype == torch.float32 else 1e-10, atol=0
        )
    return {
        "loss": torch.stack(list(terms.values())).sum(),
        "loss_ce": terms["ce"] + terms["ce_strong"],
        "loss_kd": terms["kd"],
        "loss_cc": terms["class_relation"],
        "loss_bc": terms["batch_relation"],
    }
