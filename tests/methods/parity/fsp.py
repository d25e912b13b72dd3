"""The loss alone; it has no parameters."""

from potstill.methods.fsp import fsp_loss


def check(case):
    return {"loss": fsp_loss(case.many("fs"), case.many("ft"))}
