"""The loss at a learnt temperature with its reversed gradient; and the curves of the reversal by themselves."""

import torch
from parity_case import Case
from torch import Tensor

from potstill.functional import ctkd_loss, ctkd_strength, ctkd_temperature

# The two sides of the temperature's derivative nearly cancel.
FLOAT32 = {"loss": 2e-5, "grad": 2e-3}


def check(case: Case) -> dict[str, Tensor]:
    return curves(case) if "epochs" in case else loss(case)


def curves(case: Case) -> dict[str, Tensor]:
    hyper, found = case.hyper, {}
    for shape in ("cosine", "linear"):
        values = [
            ctkd_strength(
                epoch, length=hyper["num_loops"], low=hyper["min_value"], high=hyper["max_value"], shape=shape
            )
            for epoch in case["epochs"].tolist()
        ]
        found[shape] = torch.tensor(values, dtype=case.dtype)
    return {"loss": found["cosine"].sum(), **found}


def loss(case: Case) -> dict[str, Tensor]:
    hyper, scale = case.hyper, {"start": case.hyper["t_start"], "span": case.hyper["t_end"]}
    strength = ctkd_strength(
        hyper["epoch"], length=hyper["decay_loops"], low=hyper["decay_min"], high=hyper["decay_max"]
    )
    return {
        "loss": ctkd_loss(case["zs"], case["zt"], case["tau"], strength=strength, **scale),
        "T": ctkd_temperature(case["tau"], **scale),
        "lambda": torch.tensor(strength, dtype=case.dtype),
    }
