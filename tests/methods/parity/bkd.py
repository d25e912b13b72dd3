"""The binary cross-entropy."""

from parity_case import Case
from torch import Tensor

from potstill.functional import bkd_loss


def check(case: Case) -> dict[str, Tensor]:
    return {"loss": bkd_loss(case["zs"], case["zt"])}
