"""No distillation: train on labels alone.  The teacher's own training, and the baseline."""

from potstill.methods.base import Method
from potstill.methods.requirements import Requirements


class Supervised(Method):
    """Cross-entropy with the labels, mean over the batch."""

    name = "supervised"
    needs = Requirements(teacher=False)
