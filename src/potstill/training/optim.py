"""Optimizers, learning-rate schedule and gradient accumulation.

DOT keeps separate momentum for label and distillation gradients, so that the latter lead.  Zhao, Cui, Song and Liang,
"DOT: A Distillation-Oriented Trainer", ICCV 2023, https://arxiv.org/abs/2307.08436.
"""

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from potstill.errors import UsageError, did_you_mean
from potstill.evaluation.cost import skip_compiler_import
from potstill.training.settings import TrainingSettings
from potstill.types import Step

_TASK, _DISTILLATION = "task", "distillation"


class DOT(Optimizer):
    r"""SGD with two momentum buffers per parameter.

    .. math::
        v_{task} &\leftarrow (\mu - \Delta) v_{task} + g_{task} + \lambda w \\
        v_{kd} &\leftarrow (\mu + \Delta) v_{kd} + g_{kd} \\
        w &\leftarrow w - \eta (v_{task} + v_{kd})

    A parameter with only one of the two gradients (an adapter, or training without label terms) is updated by plain SGD
    with momentum :math:`\mu` and weight decay.  With :math:`\Delta = 0` this is SGD.

    ``backward`` fills both gradients; without it, ``p.grad`` counts as the task's.

    ``delta`` is 0.075 for CIFAR, 0.09 for ImageNet in the paper.  ValueError: mu - delta < 0, or mu + delta >= 1.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = DOT([weight], lr=0.1, momentum=0.5, delta=0.25)
        >>> for _ in range(2):  # task: 1, then .25 * 1 + 1 = 1.25; distillation: 2, then .75 * 2 + 2 = 3.5
        ...     optimizer.backward(weight.sum(), 2 * weight.sum())
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> round(weight.item(), 6)  # 1 - .1 * 3 - .1 * 4.75
        0.225
    """

    def __init__(
        self, params: Any, lr: float, momentum: float = 0.9, delta: float = 0.075, weight_decay: float = 0.0
    ) -> None:
        if min(lr, delta, weight_decay) < 0:
            raise ValueError(f"lr, delta and weight_decay are at least 0, got {lr:g}, {delta:g} and {weight_decay:g}")
        if not (momentum - delta >= 0 and momentum + delta < 1):
            raise ValueError(
                f"momentum - delta must be at least 0 and momentum + delta below 1, got {momentum:g} and {delta:g}"
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay})
        self._distillation: dict[nn.Parameter, Tensor] = {}  # gradients; `p.grad` holds the task's

    def backward(self, labels: Tensor | None, distillation: Tensor | None) -> None:
        """Accumulate the gradients of both losses (scalars or None)."""
        if distillation is not None:
            with self._distillation_in_grad():
                distillation.backward(retain_graph=labels is not None)  # type: ignore[no-untyped-call]
        if labels is not None:
            labels.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def clip(self, max_norm: float) -> None:
        """Scale both gradients by one factor, so that the norm of their sum is at most ``max_norm``."""
        sums = [
            torch.stack([grad for grad in (p.grad, self._distillation.get(p)) if grad is not None]).sum(dim=0)
            for p in self._parameters()
            if p.grad is not None or p in self._distillation
        ]
        if not sums:
            return
        # 1e-6 as in torch.nn.utils.clip_grad_norm_.
        factor = (max_norm / (nn.utils.get_total_norm(sums) + 1e-6)).clamp(max=1.0)
        for parameter in self._parameters():
            for grad in (parameter.grad, self._distillation.get(parameter)):
                if grad is not None:
                    grad.mul_(factor)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset both gradients."""
        super().zero_grad(set_to_none)
        self._distillation.clear()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        grads = {_TASK: parameter.grad, _DISTILLATION: self._distillation.get(parameter)}
        if all(grad is None for grad in grads.values()):
            return
        # As in SGD, a buffer once created decays in steps without its gradient.
        kinds = [kind for kind, grad in grads.items() if grad is not None or kind in state]
        delta = 0.0 if len(kinds) == 1 else group["delta"]
        for kind in kinds:
            if kind not in state:
                state[kind] = torch.zeros_like(parameter)
            buffer = state[kind]
            buffer.mul_(group["momentum"] + (-delta if kind == _TASK else delta))
            if (grad := grads[kind]) is not None:
                buffer.add_(grad)
            if group["weight_decay"] and kind == kinds[0]:  # the task's buffer, if it exists
                buffer.add_(parameter, alpha=group["weight_decay"])
        for kind in kinds:
            parameter.add_(state[kind], alpha=-group["lr"])

    @contextmanager
    def _distillation_in_grad(self) -> Iterator[None]:
        """Within the block, ``p.grad`` is the distillation gradient."""
        task = {parameter: parameter.grad for parameter in self._parameters()}
        for parameter in task:
            parameter.grad = self._distillation.get(parameter)
        try:
            yield
        finally:
            for parameter, grad in task.items():
                if parameter.grad is not None:
                    self._distillation[parameter] = parameter.grad
                parameter.grad = grad

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]


class ChannelsLastStep:
    """Make a fused CPU optimizer see channels-last weights [O, I, H, W] as contiguous [O, H, W, I] within its steps.

    Its kernels would copy weight, gradient and moments at every step, in three times the time; they are elementwise, so
    the result is the same to the bit.  Other optimizers and devices are left alone.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.viewed: list[tuple[Tensor, torch.Size, tuple[int, ...]]] = []  # weights with their shape and strides
        if optimizer.defaults.get("fused"):
            optimizer.register_step_pre_hook(self._view_as_contiguous)
            optimizer.register_step_post_hook(self._restore)

    @torch.no_grad()
    def _view_as_contiguous(self, optimizer: Optimizer, *_: Any) -> None:
        for weight in _channels_last_weights(optimizer):
            state, shape = optimizer.state.get(weight, {}), weight.shape
            assert weight.grad is not None
            # A gradient, or moments from a checkpoint, may have another layout.
            weight.grad = weight.grad.contiguous(memory_format=torch.channels_last)
            for key in _moments_of_shape(state, shape):
                state[key] = state[key].contiguous(memory_format=torch.channels_last)
            self.viewed.append((weight, shape, weight.stride()))
            viewed = torch.empty((shape[0], *shape[2:], shape[1]), device="meta")
            for tensor in (weight, weight.grad, *(state[key] for key in _moments_of_shape(state, shape))):
                tensor.as_strided_(viewed.shape, viewed.stride())

    @torch.no_grad()
    def _restore(self, optimizer: Optimizer, *_: Any) -> None:
        for weight, shape, strides in self.viewed:
            state = optimizer.state.get(weight, {})
            for tensor in (weight, weight.grad, *(state[key] for key in _moments_of_shape(state, weight.shape))):
                if tensor is not None:
                    tensor.as_strided_(shape, strides)
        self.viewed.clear()


def _channels_last_weights(optimizer: Optimizer) -> list[Tensor]:
    """Return the CPU weights with a gradient that are channels last and not also contiguous."""
    return [
        weight
        for group in optimizer.param_groups
        for weight in group["params"]
        if weight.grad is not None
        and weight.device.type == "cpu"
        and weight.ndim == 4
        and not weight.is_contiguous()
        and weight.is_contiguous(memory_format=torch.channels_last)
    ]


def _moments_of_shape(state: dict[str, Any], shape: torch.Size) -> list[str]:
    return [key for key, value in state.items() if isinstance(value, Tensor) and value.shape == shape]


_UNSUPPORTED_OPTIMIZERS = {"Optimizer", "LBFGS", "SparseAdam"}  # the base class; a closure; sparse gradients
# Second derivatives; state that is no tensor; further packages; variants whose name stands for options.
_UNSUPPORTED_OF_TIMM = re.compile(r"adahessian|kron|bnb|fused|larc|nlarc|.*legacy")


def get_optimizer_class(name: str) -> type[Optimizer]:
    """Return ``DOT``, a class of ``torch.optim`` or an optimizer of timm by its name, ignoring case, torch's where both
    have it, but timm's muon also updates what is no matrix.  UsageError names the nearest.
    """
    known: dict[str, type[Optimizer]] = {"dot": DOT} | {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and key not in _UNSUPPORTED_OPTIMIZERS
    }
    key = name.lower()
    if key in known and key != "muon":
        return known[key]
    import timm.optim  # slow, and rarely needed

    others = [each for each in timm.optim.list_optimizers() if not _UNSUPPORTED_OF_TIMM.match(each)]
    if key not in others:
        raise UsageError(
            f"no optimizer {name!r}{did_you_mean(key, [*known, *others]) or '.'} Known: {', '.join(sorted(known))}; of "
            f"timm: {', '.join(sorted(set(others) - set(known)))}"
        )
    found: type[Optimizer] = timm.optim.get_optimizer_class(key, bind_defaults=False)
    return found


def layer_lr_scales(network: nn.Module, layer_decay: float) -> dict[str, float]:
    """Return the learning rate of each parameter as a share of the head's: ``layer_decay`` to the power of the blocks
    of timm's ``group_matcher`` above it.
    """
    from timm.models import group_parameters

    matcher = getattr(network, "group_matcher", None)
    if matcher is None:
        raise UsageError(
            f"training.layer_decay takes the blocks of a network from timm, and {type(network).__name__} does not say "
            "which blocks it has: leave it out, or use a network of timm's"
        )
    blocks: dict[str, int] = group_parameters(network, matcher(coarse=False), reverse=True)
    last = max(blocks.values())
    return {name: layer_decay ** (last - blocks[name]) for name, _ in network.named_parameters()}


def freeze_low_rates(network: nn.Module, settings: TrainingSettings) -> tuple[dict[str, float], list[nn.Parameter]]:
    """Freeze what ``layer_decay_no_opt_scale`` leaves untrained; return ``layer_lr_scales`` and what is frozen."""
    if settings.layer_decay is None:
        return {}, []
    scales = layer_lr_scales(network, settings.layer_decay)
    frozen = [
        parameter
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and scales[name] < settings.layer_decay_no_opt_scale
    ]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return scales, frozen


def create_optimizer(
    named: Iterable[tuple[str, nn.Parameter]],
    settings: TrainingSettings,
    lr_scales: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """Return the optimizer over weights with decay, and biases and normalisation without, unless ``decay_all``;
    ``lr_scales`` are shares of the learning rate, by name, where it is not 1.
    """
    named, scales = list(named), lr_scales or {}
    parameters = [parameter for _, parameter in named]
    others_decay = settings.weight_decay if settings.decay_all else 0.0
    groups: list[dict[str, Any]] = []
    # The full rate comes first, since the first group's is the one that is shown.
    for scale in sorted({scales.get(name, 1.0) for name, _ in named}, reverse=True):
        alike = [parameter for name, parameter in named if scales.get(name, 1.0) == scale]
        lr = {} if scale == 1 else {"lr": settings.lr * scale}
        groups += [
            {"params": [p for p in alike if p.ndim > 1], "weight_decay": settings.weight_decay, **lr},
            {"params": [p for p in alike if p.ndim <= 1], "weight_decay": others_decay, **lr},
        ]
    optimizer_class = get_optimizer_class(settings.optimizer)
    allowed = inspect.signature(optimizer_class).parameters
    options: dict[str, Any] = {"lr": settings.lr}
    if optimizer_class is torch.optim.SGD:
        options |= {"momentum": settings.momentum, "nesterov": settings.nesterov}
    elif optimizer_class is DOT:
        options |= {"momentum": settings.momentum, "delta": settings.dot_delta}
    fusable = all(p.device.type in ("cpu", "cuda") for p in parameters)
    # Not False elsewhere, which would also keep torch from its foreach form.
    if fusable and "fused" in allowed and "foreach" not in settings.optimizer_options:
        options["fused"] = True
    for key in settings.optimizer_options:
        if key not in allowed:
            raise UsageError(
                f"{optimizer_class.__name__} takes no {key!r}{did_you_mean(key, allowed) or '.'} "
                f"It takes {', '.join(allowed)}"
            )
    skip_compiler_import(*vars(Optimizer).values())
    options |= settings.optimizer_options
    try:
        optimizer = optimizer_class([group for group in groups if group["params"]], **options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"training.optimizer {settings.optimizer}: {error}") from error
    _step_without_compiler(optimizer)
    ChannelsLastStep(optimizer)
    return optimizer


def _step_without_compiler(optimizer: Optimizer) -> None:
    """Save 1.5 s at the start of a run: ``step`` of torch's optimizers imports the compiler to break its graph."""
    own = type(optimizer).__module__.startswith("torch.optim") and not optimizer.defaults.get("differentiable")
    if own and "torch._dynamo" not in sys.modules:
        step = torch.no_grad()(inspect.unwrap(type(optimizer).step))
        # As torch does: with hooks and the profiler's name.  Schedules expect a method.
        optimizer.step = MethodType(Optimizer.profile_hook_step(step), optimizer)  # type: ignore[method-assign]


def lr_factor(settings: TrainingSettings, steps_per_epoch: int) -> Callable[[int], float]:
    """Return the function from step (from 0) to the learning rate as a share of ``settings.lr``.

    Warm-up rises linearly to the full rate; the cosine then falls to ``min_lr_ratio`` at the last step; ``step``
    multiplies by gamma once the milestone's epochs are complete.

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
            return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * cosine
        if settings.schedule == "step":
            return settings.gamma ** sum(step >= milestone * steps_per_epoch for milestone in settings.milestones)
        return 1.0

    return factor


class GradientAccumulator:
    """Accumulates, scales (fp16) and clips the gradients of an optimizer's parameters, and updates them."""

    def __init__(
        self, optimizer: Optimizer, parameters: list[nn.Parameter], scaler: torch.amp.GradScaler | None = None
    ) -> None:
        self.optimizer, self.parameters = optimizer, parameters
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.split = optimizer if isinstance(optimizer, DOT) else None

    def add(self, step: Step, batches: int = 1, share: float = 1.0) -> None:
        """Add the gradients of one of ``batches``; ``share``: its weight among processes (``loss_weight``)."""
        if self.split is not None:
            labels, distillation = (None if part is None else part / batches for part in step.parts)
            self.split.backward(labels, distillation)
        else:
            loss = step.loss if share == 1 else step.loss * share
            loss = loss / batches
            if self.scaler is not None:
                loss = self.scaler.scale(loss)
            loss.backward()  # type: ignore[no-untyped-call]

    def clip(self, max_norm: float) -> None:
        """Scale the gradients so that their norm is at most ``max_norm``."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.split is not None:
            self.split.clip(max_norm)
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)

    def step(self) -> None:
        """Update the parameters and reset the gradients; gradients that overflow in fp16 are dropped."""
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
