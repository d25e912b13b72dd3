"""ICKD through the method's own convolution and BatchNorm."""

from parity_case import Case
from torch import Tensor

from potstill.functional import ickd_loss
from potstill.methods.base import NetworkInfo, TrainingInfo
from potstill.methods.ickd import ICKD
from potstill.types import Outputs


def check(case: Case) -> dict[str, Tensor]:
    method = ICKD()
    sides = (NetworkInfo(Outputs(features, maps=(features.detach(),))) for features in (case["fs"], case["ft"]))
    method.build(*sides, TrainingInfo(classes=2))
    adapter = case.load(method.adapter, {"conv": "embed", "norm": "embed_bn"})
    return {"loss": ickd_loss(adapter(case["fs"]), case["ft"])}
