"""The squared difference."""

from parity_case import Case
from torch import Tensor

from potstill.functional import logit_mse_loss


def check(case: Case) -> dict[str, Tensor]:
    return {"loss": logit_mse_loss(case["zs"], case["zt"])}
