"""RKD: weighted sum, distances and angles."""

from parity_case import Case
from torch import Tensor

from potstill.functional import rkd_angle_loss, rkd_distance_loss


def check(case: Case) -> dict[str, Tensor]:
    h = case.hyper
    distance = rkd_distance_loss(case["fs"], case["ft"], squared=h["squared"], epsilon=h["eps"])
    angle = rkd_angle_loss(case["fs"], case["ft"])
    return {
        "loss": h["distance_weight"] * distance + h["angle_weight"] * angle,
        "distance": distance,
        "angle": angle,
    }
