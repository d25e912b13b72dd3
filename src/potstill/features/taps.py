"""Feature taps: read what named submodules put out, without changing the network."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from potstill.errors import UsageError, nearest


@contextmanager
def tap(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, keep the output of each submodule named in ``paths``.

    The hooks end with the block, so the model can be copied, exported and compiled afterwards.

    Raises:
        UsageError: a path that the model does not have, or whose output is not one tensor.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> with tap(net, ["0"]) as features:
        ...     logits = net(torch.zeros(3, 2, 2))
        >>> features["0"].shape
        torch.Size([3, 4])
    """
    features: dict[str, Tensor] = {}
    handles = []
    try:
        for path in paths:
            handles.append(submodule(model, path).register_forward_hook(_keep(features, path)))
        yield features
    finally:
        for handle in handles:
            handle.remove()


def _keep(features: dict[str, Tensor], path: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise UsageError(f"the output of {path!r} is {type(output).__name__}, not a tensor; tap another layer")
        features[path] = output

    return hook


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The submodule with this path.

    Raises:
        UsageError: there is none; names the nearest.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if path not in modules or not path:
        first = ", ".join(sorted(name for name in modules if name)[:6])
        hint = nearest(path, modules) or f"; it has {first}, ..."
        raise UsageError(f"{type(model).__name__} has no layer {path!r}{hint}")
    return modules[path]
