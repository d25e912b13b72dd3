"""Optimizer and learning-rate schedule from settings."""

import inspect
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from potstill.errors import UsageError, nearest
from potstill.training.dot import DOT
from potstill.training.plain_memory import PlainMemory
from potstill.training.settings import TrainingSettings

_OWN = {"dot": DOT}
_UNFIT = {"Optimizer", "LBFGS", "SparseAdam"}  # the base class; a closure; sparse gradients


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """A class of ``torch.optim``, or ``DOT``, by name, in any spelling of case.

    Raises:
        UsageError: unknown name; names the nearest known one.
    """
    known = _OWN | {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and key not in _UNFIT
    }
    if name.lower() not in known:
        raise UsageError(
            f"no optimizer {name!r}{nearest(name.lower(), known) or '.'} Known: {', '.join(sorted(known))}"
        )
    return known[name.lower()]


def create_optimizer(named: Iterable[tuple[str, nn.Parameter]], settings: TrainingSettings) -> torch.optim.Optimizer:
    """The optimizer over two groups: weights with decay; biases and normalisation layers without, unless asked for.

    Raises:
        UsageError: unknown optimizer, or options that its class does not take.
    """
    parameters = [parameter for _, parameter in named]
    others_decay = settings.weight_decay if settings.decay_all else 0.0
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": others_decay},
    ]
    kind = optimizer_class(settings.optimizer)
    takes = inspect.signature(kind).parameters
    options: dict[str, Any] = {"lr": settings.lr}
    if kind is torch.optim.SGD:
        options |= {"momentum": settings.momentum, "nesterov": settings.nesterov}
    elif kind is DOT:
        options |= {"momentum": settings.momentum, "delta": settings.dot_delta}
    if "fused" in takes and "foreach" not in settings.optimizer_options:
        options["fused"] = all(p.device.type in ("cpu", "cuda") for p in parameters)
    for key in settings.optimizer_options:
        if key not in takes:
            raise UsageError(
                f"{kind.__name__} takes no {key!r}{nearest(key, takes) or '.'} It takes {', '.join(takes)}"
            )
    _leave_compiler_alone()
    try:
        optimizer = kind([group for group in groups if group["params"]], **(options | settings.optimizer_options))
    except (TypeError, ValueError) as error:
        raise UsageError(f"training.optimizer {settings.optimizer}: {error}") from error
    PlainMemory(optimizer)
    return optimizer


def _leave_compiler_alone() -> None:
    """Spare the start of a run 0.7 s: an optimizer's methods import torch's compiler at their first call, for no other
    purpose than to be left out by it.  Nothing here compiles an optimizer.

    The attribute is the one by which torch remembers that this has been done; another version of torch that has no such
    takes no notice.
    """
    if "torch._dynamo" in sys.modules:
        return
    for method in vars(torch.optim.Optimizer).values():
        plain = getattr(method, "__wrapped__", None)
        if plain is not None and not hasattr(plain, "__dynamo_disable"):
            setattr(plain, "__dynamo_disable", plain)


def lr_factor(settings: TrainingSettings, steps_per_epoch: int) -> Callable[[int], float]:
    """Learning rate at a step (from 0), as a share of ``settings.lr``.

    Warm-up rises linearly and reaches the full rate at its end; the cosine then falls to ``final_lr_share`` at the
    last step; ``step`` multiplies by gamma once the milestone's epochs are complete.

    Example:
        >>> factor = lr_factor(TrainingSettings(epochs=4, schedule="step", milestones=[2], gamma=0.1), 10)
        >>> factor(0), factor(19), factor(20)
        (1.0, 1.0, 0.1)
    """
    total = settings.epochs * steps_per_epoch
    warmup = round(settings.warmup_epochs * steps_per_epoch)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if settings.schedule == "cosine":
            progress = min((step - warmup) / max(total - warmup, 1), 1.0)
            cosine = (1 + math.cos(math.pi * progress)) / 2
            return settings.final_lr_share + (1 - settings.final_lr_share) * cosine
        if settings.schedule == "step":
            return settings.gamma ** sum(step >= milestone * steps_per_epoch for milestone in settings.milestones)
        return 1.0

    return factor
