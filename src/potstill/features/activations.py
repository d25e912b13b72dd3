"""What counts as an activation, as a module and as a function."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# What networks apply without a module.  Those that modules apply are seen here too; the module is what is kept then.
ACTIVATIONS = frozenset(
    [
        *(F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.hardtanh, F.prelu),
        *(F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish),
        *(F.softplus, F.tanh, torch.tanh, Tensor.tanh),
    ]
)
_NO_ACTIVATIONS = ("Softmax", "Softmin", "LogSoftmax", "Softmax2d", "MultiheadAttention")


class Watch(TorchFunctionMode):
    """Within the block, tells of every activation function: its input before the call, its input and result after."""

    def __init__(self, before: Callable[[Tensor], Any], after: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.before, self.after = before, after

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        given = args[0] if args else kwargs.get("input")
        if func not in ACTIVATIONS or not isinstance(given, Tensor):
            return func(*args, **kwargs)
        kept = self.before(given)
        result = func(*args, **kwargs)
        self.after(kept, result)
        return result


def is_activation(module: nn.Module) -> bool:
    """Whether it is one, torch's or (by the name of the file that defines it) of a library of networks."""
    kind = type(module)
    return (
        "activation" in kind.__module__
        and kind.__name__ not in _NO_ACTIVATIONS
        and not any(True for _ in module.children())
    )
