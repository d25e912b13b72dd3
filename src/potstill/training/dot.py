"""DOT: label gradients and distillation gradients with a momentum each, so that the latter lead.

Zhao, Cui, Song and Liang, "DOT: A Distillation-Oriented Trainer", ICCV 2023, https://arxiv.org/abs/2307.08436.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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
