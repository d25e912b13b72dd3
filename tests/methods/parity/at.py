"""The loss alone; it has no parameters."""

from potstill.methods.at import at_loss


def check(case):
    return {"loss": at_loss(case.many("fs"), case.many("ft"), power=case.hyper["p"])}
