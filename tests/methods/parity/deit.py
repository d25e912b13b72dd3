"""Both heads: labels and teacher, hard or soft, with the release's division by the number of classes."""

import torch
from parity_case import Case
from torch import Tensor

from potstill.functional import deit_hard_loss, deit_soft_loss
from potstill.methods.deit import DeiTHard, DeiTSoft
from potstill.types import Batch, Outputs


def check(case: Case) -> dict[str, Tensor]:
    hyper = case.hyper
    heads = {"head": case["z_cls"], "head_dist": case["z_dist"]}
    student, teacher = Outputs((case["z_cls"] + case["z_dist"]) / 2, heads), Outputs(case["zt"])
    batch = Batch(torch.zeros(len(case["y"]), 3, 1, 1), case["y"])
    if hyper["kind"] == "hard":
        method, told = DeiTHard(alpha=hyper["alpha"]), deit_hard_loss(case["z_dist"], case["zt"])
    else:
        soft = {"temperature": hyper["tau"], "reduction": "mean"}
        method, told = DeiTSoft(alpha=hyper["alpha"], **soft), deit_soft_loss(case["z_dist"], case["zt"], **soft)
    terms = method(student, teacher, batch)
    paper = case.wanted("paper").get("soft_batchmean_variant")
    if paper is not None:
        batchmean = DeiTSoft(alpha=hyper["alpha"], temperature=hyper["tau"])(student, teacher, batch)
        found, rtol = batchmean["ce"] + batchmean["soft"], 1e-5 if case.dtype == torch.float32 else 1e-10
        torch.testing.assert_close(found, paper.to(case.dtype), rtol=rtol, atol=0)
    return {
        "loss": torch.stack(list(terms.values())).sum(),
        "base": torch.nn.functional.cross_entropy(case["z_cls"], case["y"]),
        "distillation": told,
    }
