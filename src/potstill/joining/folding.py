"""BatchNorm of a frozen network, worked into the convolution or linear layer before it."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.overrides import TorchFunctionMode

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_SAME = 1e-4  # of the largest value: float32 rounds each of some thousand products
_SAME_ON_GPU = 1e-2  # where convolutions may be computed in TF32, which keeps 10 bits

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


@torch.no_grad()
def fold(network: nn.Module, images: Tensor) -> int:
    """Fold in place what one forward pass shows to be foldable; the network must be in eval mode, in float32.

    A BatchNorm goes where its input is the very output of a layer that was called once, nothing else used that output,
    and the layer with other weights gives the same numbers.  What such a module does besides (timm's activate, too)
    stays.

    Args:
        network: changed.
        images: a few like those to come.

    Returns:
        How many are gone.  The caller compares the whole network with the one before.
    """
    found = _Watching(network)
    with ExitStack() as hooks:
        found.attach(hooks)
        with found:
            network(images)
    folded = [pair for pair in found.pairs if found.foldable(pair)]
    for pair in folded:
        pair.layer.weight, pair.layer.bias = _joined(pair.layer, pair.norm)
        network.set_submodule(pair.path, _rest(pair.norm), strict=True)
    return len(folded)


def close(one: Tensor, other: Tensor) -> bool:
    """Whether they are the same but for float32's rounding."""
    allowed = (_SAME_ON_GPU if one.is_cuda else _SAME) * float(other.abs().max())
    return one.shape == other.shape and float((one - other).abs().max()) <= allowed


@dataclass(eq=False)
class _Made:
    """What a layer put out."""

    layer: Layer
    given: Tensor
    output: "weakref.ref[Tensor]"
    used_elsewhere: bool = False


@dataclass(eq=False)
class _Pair:
    layer: Layer
    norm: _BatchNorm
    path: str  # of the BatchNorm
    made: _Made


class _Watching(TorchFunctionMode):
    """One forward pass: which BatchNorm reads which layer's output, and what else reads it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.pairs: list[_Pair] = []
        self.calls: Counter[nn.Module] = Counter()
        self.made: dict[int, _Made] = {}
        self.latest: tuple[_Made, Tensor] | None = None  # of the last layer; keeps alive what the check needs
        self.normalised: Tensor | None = None  # what a BatchNorm is reading now

    def attach(self, hooks: ExitStack) -> None:
        """Watch the layers until the block ends."""
        for path, module in self.network.named_modules():
            if isinstance(module, _LAYERS):
                hooks.callback(module.register_forward_hook(self._layer).remove)
            elif isinstance(module, _BatchNorm):
                hooks.callback(module.register_forward_pre_hook(self._before_norm).remove)
                hooks.callback(module.register_forward_hook(self._norm_at(path)).remove)

    def foldable(self, pair: _Pair) -> bool:
        """Known once the pass is over."""
        return self.calls[pair.layer] == self.calls[pair.norm] == 1 and not pair.made.used_elsewhere

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(True for _ in _tensors((result,))):  # a question for shape or device is no use
            for tensor in _tensors((*args, *kwargs.values())):
                made = self.made.get(id(tensor))
                if made is not None and made.output() is tensor and tensor is not self.normalised:
                    made.used_elsewhere = True
        return result

    def _layer(self, layer: Layer, args: tuple[Any, ...], output: Any) -> None:
        self.calls[layer] += 1
        if isinstance(output, Tensor) and len(args) == 1:
            made = _Made(layer, args[0], weakref.ref(output))
            self.made[id(output)], self.latest = made, (made, output)

    def _before_norm(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        self.normalised = args[0] if args else None

    def _norm_at(self, path: str) -> Callable[[_BatchNorm, tuple[Any, ...], Any], None]:
        def hook(norm: _BatchNorm, args: tuple[Any, ...], output: Any) -> None:
            self.calls[norm] += 1
            self.normalised = None
            latest, self.latest = self.latest, None
            if latest is None or not args or args[0] is not latest[1]:
                return
            made = latest[0]
            if _replaceable(made.layer, norm) and _agrees(made, norm, output):
                self.pairs.append(_Pair(made.layer, norm, path, made))

        return hook


def _replaceable(layer: Layer, norm: _BatchNorm) -> bool:
    wide = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    parameters = [name for name, _ in layer.named_parameters()]  # others belong to a parametrization
    return wide == norm.num_features and norm.running_var is not None and set(parameters) <= {"weight", "bias"}


def _agrees(made: _Made, norm: _BatchNorm, output: Tensor) -> bool:
    layer = made.layer
    weight, bias = layer.weight, layer.bias
    try:
        layer.weight, layer.bias = _joined(layer, norm)
        return close(_rest(norm)(layer.forward(made.given)), output)
    finally:
        layer.weight, layer.bias = weight, bias


def _joined(layer: Layer, norm: _BatchNorm) -> tuple[nn.Parameter, nn.Parameter]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    join = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    weight, bias = join(
        layer.weight.double(),
        None if layer.bias is None else layer.bias.double(),
        norm.running_mean.double(),
        norm.running_var.double(),
        norm.eps,
        torch.ones_like(norm.running_var) if norm.weight is None else norm.weight.double(),
        torch.zeros_like(norm.running_var) if norm.bias is None else norm.bias.double(),
    )
    return tuple(nn.Parameter(each.to(layer.weight.dtype), requires_grad=False) for each in (weight, bias))  # type: ignore[return-value]


def _rest(norm: _BatchNorm) -> nn.Module:
    """What the module does besides normalising: timm's drops and activates."""
    more = [each for each in (getattr(norm, "drop", None), getattr(norm, "act", None)) if isinstance(each, nn.Module)]
    return nn.Sequential(*more) if more else nn.Identity()


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
