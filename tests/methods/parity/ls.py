"""Standardised logits under Hinton's loss and under DKD."""

from typing import Any

import torch
from parity_case import Case
from torch import Tensor

from potstill.functional import dkd_loss, kd_loss, standardise


def UNSTABLE_IN_FLOAT32(entry: dict[str, Any]) -> str | None:
    if Case("ls", entry, torch.float32)["zs"].shape[1] == 2:
        return "two classes: standardised logits are constants, and a float32 gradient is rounding"
    return None


def check(case: Case) -> dict[str, Tensor]:
    hyper = case.hyper
    student, teacher = (standardise(case[name], eps=hyper["eps"]) for name in ("zs", "zt"))
    if hyper["base"] == "dkd":
        weights = {"alpha": hyper["alpha"], "beta": hyper["beta"]}
        loss = dkd_loss(student, teacher, case["y"], temperature=hyper["T"], **weights)
    else:
        loss = kd_loss(student, teacher, temperature=hyper["T"])
    return {"loss": loss, "zs_std": student}
