"""SP: maps or embeddings, of equal or unequal shapes."""

from parity_case import Case
from torch import Tensor

from potstill.functional import sp_loss


def check(case: Case) -> dict[str, Tensor]:
    return {"loss": sp_loss(case["fs"], case["ft"])}
