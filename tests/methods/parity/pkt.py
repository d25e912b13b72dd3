"""PKT."""

from parity_case import Case
from torch import Tensor

from potstill.functional import pkt_loss

# Logarithms of ratios close to 1: the reference's own float32 run is 1.3e-5 off.
FLOAT32 = {"loss": 5e-5}


def check(case: Case) -> dict[str, Tensor]:
    return {"loss": pkt_loss(case["fs"], case["ft"], epsilon=case.hyper["eps"])}
