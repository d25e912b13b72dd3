"""CAT-KD on given class activation maps."""

from parity_case import Case
from torch import Tensor

from potstill.functional import cat_kd_loss


def check(case: Case) -> dict[str, Tensor]:
    h = case.hyper
    loss = cat_kd_loss(case["cam_s"], case["cam_t"], resolution=h["resolution"], normalize=h["normalize"])
    return {"loss": loss}
