"""CA-MKD: the logit term where teachers' logits are given, else the feature term."""

from parity_case import Case
from torch import Tensor

from potstill.functional import camkd_feature_loss, camkd_logit_loss, camkd_weights


def check(case: Case) -> dict[str, Tensor]:
    labels = case["y"]
    if "zs" in case:
        teachers = case.many("zt")
        loss = camkd_logit_loss(case["zs"], teachers, labels, temperature=case.hyper["T"])
        return {"loss": loss, "weights": camkd_weights(teachers, labels)}
    heads = case.many("zhead")
    loss = camkd_feature_loss(case.many("fs_proj"), case.many("ft"), heads, labels)
    return {"loss": loss, "weights": camkd_weights(heads, labels)}
