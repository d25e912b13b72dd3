"""A network by name with random weights, and whether it takes images of a size."""

import torch
from torch import nn

from potstill.errors import UsageError
from potstill.models.names import resolve


def build(name: str, num_classes: int, *, size: int, in_chans: int = 3) -> nn.Module:
    """``create_model`` with random weights and without the trial on an image."""
    family, bare = resolve(name)
    if num_classes < 2:
        raise UsageError(f"a classifier needs at least 2 classes, got num_classes={num_classes}")
    if size < 1 or in_chans < 1:
        raise UsageError(f"size and in_chans must be at least 1, got size={size}, in_chans={in_chans}")
    try:
        return family.build(bare, num_classes, size, in_chans)
    except (ValueError, TypeError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise _does_not_fit(name, size, error) from error


def try_forward(module: nn.Module, name: str, num_classes: int, *, size: int, in_chans: int = 3) -> None:
    """Run one black image through ``module``, in eval mode and without a trace.

    Raises:
        UsageError: it fails, or gives something else than logits [1, num_classes].
    """
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            logits = module(torch.zeros(1, in_chans, size, size))
    except Exception as error:  # whatever a foreign network raises, the size is what the user can change
        raise _does_not_fit(name, size, error) from error
    finally:
        module.train(training)
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (1, num_classes):
        raise UsageError(f"{name} is no image classifier: one image gives {shape} instead of (1, {num_classes})")


def _does_not_fit(name: str, size: int, error: Exception) -> UsageError:
    family, bare = resolve(name)
    own = family.own_size(bare)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    advice = f"It was designed for {own} px; set the size to that" if own else "Try another size"
    return UsageError(f"{name} cannot take images of {size} px ({reason}).\n{advice}, or choose another network")
