"""Optimizers, learning-rate schedule and gradient accumulation.

DOT has a momentum each for label gradients and distillation gradients, so that the latter lead.  Zhao, Cui, Song and
Liang, "DOT: A Distillation-Oriented Trainer", ICCV 2023, https://arxiv.org/abs/2307.08436.

Torch's fused CPU kernels work on contiguous memory: a channels-last weight, its gradient and its moments are copied
there and back at every step, which makes the step three times as long (AdamW on ResNet18: 18 ms in place of 6).  They
treat every number alone, so within a step such tensors are viewed in the order in which they lie in memory.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from potstill.errors import UsageError, did_you_mean
from potstill.training.settings import TrainingSettings
from potstill.types import Step

_TASK, _DISTILLATION = "task", "distillation"


class DOT(Optimizer):
    r"""SGD with two momentum buffers a parameter.

    .. math::
        v_{task} &\leftarrow (\mu - \Delta) v_{task} + g_{task} + \lambda w \\
        v_{kd} &\leftarrow (\mu + \Delta) v_{kd} + g_{kd} \\
        w &\leftarrow w - \eta (v_{task} + v_{kd})

    A parameter that only ever gets one of the two gradients (a layer beside the student's logits, or training without
    label terms) is moved by plain SGD with momentum :math:`\mu` and weight decay.  With :math:`\Delta = 0` this is SGD.

    ``backward`` fills both gradients; where it is not used, all of ``p.grad`` counts as the task's.

    Args:
        params: parameters or groups of them.
        lr: learning rate, eta.
        momentum: mu.
        delta: Delta; 0.075 for CIFAR, 0.09 for ImageNet in the paper.
        weight_decay: lambda, added to the task's gradient.

    Raises:
        ValueError: mu - delta below 0 or mu + delta not below 1, or a negative number.

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
        """Add the gradients of both losses (scalars; None: there is none) to what is there since ``zero_grad``."""
        if distillation is not None:
            with self._distillation_in_grad():
                distillation.backward(retain_graph=labels is not None)  # type: ignore[no-untyped-call]
        if labels is not None:
            labels.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def clip(self, max_norm: float) -> None:
        """Scale both gradients alike, so that the norm of their sum over all parameters is at most ``max_norm``."""
        sums = [
            torch.stack([grad for grad in (p.grad, self._distillation.get(p)) if grad is not None]).sum(dim=0)
            for p in self._parameters()
            if p.grad is not None or p in self._distillation
        ]
        if not sums:
            return
        # The same constant against division by 0 as in torch.nn.utils.clip_grad_norm_.
        factor = (max_norm / (nn.utils.get_total_norm(sums) + 1e-6)).clamp(max=1.0)
        for parameter in self._parameters():
            for grad in (parameter.grad, self._distillation.get(parameter)):
                if grad is not None:
                    grad.mul_(factor)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget both gradients."""
        super().zero_grad(set_to_none)
        self._distillation.clear()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._move(parameter, group)

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        found = {_TASK: parameter.grad, _DISTILLATION: self._distillation.get(parameter)}
        if all(grad is None for grad in found.values()):
            return
        # A buffer once begun goes on, also through steps without its gradient, as SGD's would.
        kinds = [kind for kind, grad in found.items() if grad is not None or kind in state]
        change = {kind: 0.0 if len(kinds) == 1 else group["delta"] for kind in kinds}
        if _TASK in change:
            change[_TASK] = -change[_TASK]
        for kind in kinds:
            if kind not in state:
                state[kind] = torch.zeros_like(parameter)
            buffer = state[kind]
            buffer.mul_(group["momentum"] + change[kind])
            if (grad := found[kind]) is not None:
                buffer.add_(grad)
            if group["weight_decay"] and kind == kinds[0]:  # the task's, where there is one
                buffer.add_(parameter, alpha=group["weight_decay"])
        for kind in kinds:
            parameter.add_(state[kind], alpha=-group["lr"])

    @contextmanager
    def _distillation_in_grad(self) -> Iterator[None]:
        """Within the block ``p.grad`` is the distillation gradient, which backward adds to."""
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
    """``PlainMemory(optimizer)``: from now on each step sees channels-last weights [O, I, H, W] as plain [O, H, W, I].

    Optimizers that are not fused are left as they are; so are weights on other devices.  Results are the same to the
    bit, and outside of a step nobody sees a difference.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.shown: list[tuple[Tensor, torch.Size, tuple[int, ...]]] = []  # weights as they were: shape and strides
        if optimizer.defaults.get("fused"):
            optimizer.register_step_pre_hook(self._show)
            optimizer.register_step_post_hook(self._put_back)

    @torch.no_grad()
    def _show(self, optimizer: Optimizer, *_: Any) -> None:
        for weight in _channels_last_weights(optimizer):
            state, shape = optimizer.state.get(weight, {}), weight.shape
            assert weight.grad is not None
            # A gradient, or moments from a checkpoint, may lie otherwise.
            weight.grad = weight.grad.contiguous(memory_format=torch.channels_last)
            for key in _moments_of_shape(state, shape):
                state[key] = state[key].contiguous(memory_format=torch.channels_last)
            self.shown.append((weight, shape, weight.stride()))
            plain = torch.Size((shape[0], *shape[2:], shape[1]))
            for tensor in (weight, weight.grad, *(state[key] for key in _moments_of_shape(state, shape))):
                tensor.as_strided_(plain, _contiguous_strides(plain))

    @torch.no_grad()
    def _put_back(self, optimizer: Optimizer, *_: Any) -> None:
        for weight, shape, strides in self.shown:
            state, plain = optimizer.state.get(weight, {}), weight.shape
            for tensor in (weight, weight.grad, *(state[key] for key in _moments_of_shape(state, plain))):
                if tensor is not None:
                    tensor.as_strided_(shape, strides)
        self.shown.clear()


def _channels_last_weights(optimizer: Optimizer) -> list[Tensor]:
    """Those on a CPU that have a gradient and whose channels are last, where that is not plain memory anyway."""
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
    """Moments: all but counters."""
    return [key for key, value in state.items() if isinstance(value, Tensor) and value.shape == shape]


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    """Of contiguous memory.

    Example:
        >>> _contiguous_strides(torch.Size([4, 3, 2, 5]))
        (30, 10, 5, 1)
    """
    strides = [1]
    for length in reversed(shape[1:]):
        strides.insert(0, strides[0] * length)
    return tuple(strides)


_OWN_OPTIMIZERS = {"dot": DOT}
_UNSUPPORTED_OPTIMIZERS = {"Optimizer", "LBFGS", "SparseAdam"}  # the base class; a closure; sparse gradients


def get_optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """A class of ``torch.optim``, or ``DOT``, by name, in any spelling of case.

    Raises:
        UsageError: unknown name; names the nearest known one.
    """
    known = _OWN_OPTIMIZERS | {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and key not in _UNSUPPORTED_OPTIMIZERS
    }
    if name.lower() not in known:
        raise UsageError(
            f"no optimizer {name!r}{did_you_mean(name.lower(), known) or '.'} Known: {', '.join(sorted(known))}"
        )
    return known[name.lower()]


def layer_lr_scales(network: nn.Module, layer_decay: float) -> dict[str, float]:
    """Learning rate of each parameter as a share of the head's: ``layer_decay`` to the power of the blocks above it.

    Blocks are those of timm's ``group_matcher``: the stem first, the head last.

    Raises:
        UsageError: a network without it.
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


def create_optimizer(
    named: Iterable[tuple[str, nn.Parameter]],
    settings: TrainingSettings,
    lr_scales: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer over two groups: weights with decay; biases and normalisation layers without, unless asked for.

    Args:
        named: what is trained.
        settings: of the optimizer.
        lr_scales: share of the learning rate, by name, where it is not 1; each share has its two groups.

    Raises:
        UsageError: unknown optimizer, or options that its class does not take.
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
    kind = get_optimizer_class(settings.optimizer)
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
                f"{kind.__name__} takes no {key!r}{did_you_mean(key, takes) or '.'} It takes {', '.join(takes)}"
            )
    _skip_compiler_import()
    try:
        optimizer = kind([group for group in groups if group["params"]], **(options | settings.optimizer_options))
    except (TypeError, ValueError) as error:
        raise UsageError(f"training.optimizer {settings.optimizer}: {error}") from error
    ChannelsLastStep(optimizer)
    return optimizer


def _skip_compiler_import() -> None:
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

    Warm-up rises linearly and reaches the full rate at its end; the cosine then falls to ``min_lr_ratio`` at the
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
            return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * cosine
        if settings.schedule == "step":
            return settings.gamma ** sum(step >= milestone * steps_per_epoch for milestone in settings.milestones)
        return 1.0

    return factor


@runtime_checkable
class SplitGradientOptimizer(Protocol):
    """An optimizer that treats what labels say and what the teacher says differently."""

    def backward(self, labels: Tensor | None, distillation: Tensor | None) -> None:
        """Add the gradients of two scalars; None where there is none."""

    def clip(self, max_norm: float) -> None:
        """Bound the norm of both gradients together."""


class GradientAccumulator:
    """Adds up and clips the gradients of one optimizer's parameters."""

    def __init__(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.apart = optimizer if isinstance(optimizer, SplitGradientOptimizer) else None

    def add(self, step: Step, batches: int = 1, share: float = 1.0) -> None:
        """Add the gradients of the step's terms, as one of so many batches that are averaged.

        Args:
            step: of these images.
            batches: of one update.
            share: what they weigh among the processes that average their gradients; 1 where all have as many.
        """
        if self.apart is not None:
            labels, distillation = (None if part is None else part / batches for part in step.parts)
            self.apart.backward(labels, distillation)
        else:
            loss = step.loss if share == 1 else step.loss * share
            (loss / batches).backward()  # type: ignore[no-untyped-call]

    def clip(self, max_norm: float) -> None:
        """Scale the gradients so that their norm is at most ``max_norm``."""
        if self.apart is not None:
            self.apart.clip(max_norm)
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)
