"""SRRL: the pooled form's connector and the teacher's head."""

from parity_case import Case
from torch import Tensor

from potstill.functional import srrl_feature_loss, srrl_regression_loss
from potstill.methods.srrl import Connector
from potstill.types import Head


def check(case: Case) -> dict[str, Tensor]:
    connector = Connector(case["fs"].shape[1], case["ft"].shape[1], pool=False)
    connected = case.load(connector, {"conv": "connector", "norm": "connector_bn"})(case["fs"])
    head = Head(case.param("teacher_head.weight"), case.param("teacher_head.bias"))
    feature = srrl_feature_loss(connected, case["ft"])
    regression = srrl_regression_loss(head(connected), case["zt"])
    return {"loss": feature + regression, "feature": feature, "regression": regression}
