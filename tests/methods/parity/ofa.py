"""The loss on given logits, labels left out, as released; finite where the release is not."""

import torch
from parity_case import Case
from torch import Tensor
from torch.nn import functional as F

from potstill.functional import ofa_loss


def check(case: Case) -> dict[str, Tensor]:
    options = {"epsilon": case.hyper["eps"], "temperature": case.hyper["T"]}
    given = case["zs"], case["zt"], case["y"]
    paper = case.wanted("paper").get("paper_form_incl_CE")
    if paper is not None:
        found = ofa_loss(*given, **options, form="paper") + F.cross_entropy(case["zs"] / case.hyper["T"], case["y"])
        rtol = 1e-5 if case.dtype == torch.float32 else 1e-10
        torch.testing.assert_close(found, paper.to(case.dtype), rtol=rtol, atol=0)
    return {"loss": ofa_loss(*given, **options)}
