"""The loss alone; it has no parameters."""

from potstill.methods.nst import nst_loss


def check(case):
    return {"loss": nst_loss(case.many("fs"), case.many("ft"))}
