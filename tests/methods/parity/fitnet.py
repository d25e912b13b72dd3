"""The adapter in front of the hint."""

from torch import nn

from potstill.features import ConvAdapter
from potstill.methods.fitnet import hint_loss

FLOAT32 = {"loss": 3e-5, "grad": 1e-3}  # the reference's own float32 gradients are off by up to 2e-4 (BatchNorm)


def check(case):
    adapter = ConvAdapter(case["fs"].shape, case["ft"].shape)
    if not case.hyper.get("use_relu", True):
        adapter.relu = nn.Identity()
    student = case.load(adapter, {"conv": "reg", "norm": "reg_bn"})(case["fs"])
    return {"loss": hint_loss(student, case["ft"]), "student_reg": student}
