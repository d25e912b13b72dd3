"""Two students: what each is told by the other."""

from parity_case import Case
from torch import Tensor

from potstill.functional import dml_loss


def check(case: Case) -> dict[str, Tensor]:
    return {
        "loss": dml_loss(case["z1"], [case["z2"]]),
        "peer2": dml_loss(case["z2"], [case["z1"]]),
    }
