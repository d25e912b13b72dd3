"""The losses as plain functions of tensors, for use in any training loop."""

from potstill.methods.fitnet import hint_loss as hint_loss
from potstill.methods.kd import kd_loss as kd_loss

__all__ = ["hint_loss", "kd_loss"]
