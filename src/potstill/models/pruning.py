"""Structured pruning: remove channels of a network, and build a pruned network again from its widths.

torch-pruning finds the channels that belong together (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR
2023) and is needed for pruning only.  A pruned network is saved as the name of its architecture and the widths of the
changed layers; loading builds the whole network, cuts its layers to these widths, and then loads its weights.
"""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from potstill.errors import UsageError, first_line

Widths = dict[str, dict[str, int]]  # path of a layer -> names of its numbers of channels -> channels

_WIDTH_NAMES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("in_channels", "out_channels", "groups"),
    nn.Linear: ("in_features", "out_features"),
    _BatchNorm: ("num_features",),
}
_MAX_CHANNEL_SHARE = 0.95  # of each group's channels that pruning removes at most
_MULTIPLES = {64: 8, 16: 4}  # least number of a group's channels -> of what a multiple of them is left
_MAX_ATTEMPTS = 12
_TOLERANCE = 0.01  # of the weights: so far below the target a pruned network may be
_MAX_DIFFERENCE = 1e-3  # of a logit, relative to the largest one, between a pruned network and the same built again


class UnreachableShare(UsageError):
    """So many weights cannot be removed."""


def cut_channels(network: nn.Module, widths: Mapping[str, Mapping[str, int]]) -> nn.Module:
    """Cut a network's layers to ``widths`` (``describe_widths``), in place; loaded weights replace what remains.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> widths = {"0": {"out_channels": 5}, "1": {"num_features": 5}}
        >>> cut_channels(network, widths)(torch.zeros(1, 3, 4, 4)).shape
        torch.Size([1, 5, 2, 2])
    """
    layers = dict(network.named_modules())
    for path, own in widths.items():
        layer = layers.get(path)
        names = () if layer is None else _width_names(layer)
        if layer is None or not names or not own:
            raise UsageError(f"the pruned layer {path!r} is none of this network's convolutions, BatchNorm or linear")
        for name, value in own.items():
            most = getattr(layer, name) if name in names else 0
            if type(value) is not int or not 1 <= value <= most:
                raise UsageError(f"{path}.{name} must be from 1 to {most}, got {value!r}")
            setattr(layer, name, value)
        _cut_tensors(layer, path)
    return network


def _cut_tensors(layer: nn.Module, path: str) -> None:
    wanted: tuple[int, ...]
    if isinstance(layer, nn.Conv2d):
        if layer.in_channels % layer.groups or layer.out_channels % layer.groups:
            raise UsageError(f"{path} has {layer.groups} groups, which divide its channels no longer")
        wanted = (layer.out_channels, layer.in_channels // layer.groups)
    elif isinstance(layer, nn.Linear):
        wanted = (layer.out_features, layer.in_features)
    else:
        assert isinstance(layer, _BatchNorm)
        wanted = (layer.num_features,)
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            cut = tensor[tuple(slice(size) for size in wanted[: tensor.ndim])].detach().clone()
            setattr(layer, name, nn.Parameter(cut) if isinstance(tensor, nn.Parameter) else cut)


def describe_widths(whole: nn.Module, pruned: nn.Module) -> Widths:
    """Return the widths of the layers of a pruned network that differ from those of the whole one."""
    layers, found = dict(whole.named_modules()), Widths()
    for path, layer in pruned.named_modules():
        own = {
            name: int(getattr(layer, name))
            for name in _width_names(layer)
            if getattr(layer, name) != getattr(layers[path], name)
        }
        if own:
            found[path] = own
    return found


def require_torch_pruning() -> None:
    """Raise UsageError if torch-pruning is not installed."""
    if find_spec("torch_pruning") is None:
        raise UsageError('pruning needs torch-pruning, not installed here\nInstall: pip install "potstill[prune]"')


def prune_channels(network: nn.Module, share: float, *, size: int, architecture: str) -> nn.Module:
    """Return a copy of a classifier that has at most ``1 - share`` of its weights.

    The same share of channels is removed from every group, those of the smallest importance: the L2 norm of all weights
    of the group that belong to a channel, relative to the mean of its group.  UnreachableShare: so many cannot be
    removed.
    """
    require_torch_pruning()
    check_prunable(network, architecture)
    if share <= 0:
        return copy.deepcopy(network)
    whole = count_weights(network)
    target, low, high = (1 - share) * whole, 0.0, _MAX_CHANNEL_SHARE
    found, weights_of = None, {low: float(whole)}
    channels = 1 - math.sqrt(1 - share)  # if all weights were those of layers with pruned inputs and outputs
    for _ in range(_MAX_ATTEMPTS):
        candidate = _prune(network, min(channels, high), size, architecture)
        left = weights_of[min(channels, high)] = float(count_weights(candidate))
        if left <= target:
            high, found = min(channels, high), candidate
            if target - left <= _TOLERANCE * whole:
                break
        elif channels >= high:
            break
        else:
            low = channels
        channels = _between(low, high, weights_of, target) if high in weights_of else high
    if found is None:
        raise UnreachableShare(
            f"{architecture} cannot lose {share:.0%} of its weights: at most {1 - left / whole:.0%} can be removed.\n"
            "Give a smaller share, or a smaller student"
        )
    return found


def _between(low: float, high: float, weights_of: Mapping[float, float], target: float) -> float:
    """Return a share of channels between two others: there, the root of the number of weights falls about linearly."""
    top, bottom, wanted = (math.sqrt(each) for each in (weights_of[low], weights_of[high], target))
    ratio = (top - wanted) / (top - bottom) if top > bottom else 0.5
    return low + min(0.9, max(0.1, ratio)) * (high - low)


def count_weights(network: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(each.numel() for each in network.parameters())


def check_prunable(network: nn.Module, architecture: str) -> None:
    """Check that all weights are those of convolutions, BatchNorm or linear layers; UsageError names another one."""
    for path, layer in network.named_modules():
        own = [name for name, _ in layer.named_parameters(recurse=False)]
        if own and not _width_names(layer):
            raise UsageError(
                f"{architecture} cannot be pruned: the layer {path or '(the network itself)'} ({type(layer).__name__}, "
                f"with {', '.join(own)}) is no convolution, BatchNorm or linear layer.\n"
                "Choose a student of such layers, such as MobileNetV3, EfficientNet-Lite, RegNet or ResNet; "
                "`potstill fit DATA --under 2MB` finds one"
            )


def _prune(network: nn.Module, channel_share: float, size: int, architecture: str) -> nn.Module:
    pruned = copy.deepcopy(network).cpu().eval()
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        classes = _logits(pruned, example).shape[1]
    last = [each for each in pruned.modules() if classes in (_outputs(each),)]
    trained = [each.requires_grad for each in pruned.parameters()]
    pruned.requires_grad_(True)  # torch-pruning follows the graph of gradients
    try:
        _remove_channels(pruned, example, channel_share, last)
        with torch.no_grad():
            logits = _logits(pruned, example)
    except Exception as error:  # whatever torch-pruning or the pruned network raises
        block = _find_unprunable(network, example, channel_share)
        raise _unprunable(architecture, f"{block}{first_line(error)}") from error
    if logits.shape != (2, classes):
        raise _unprunable(architecture, f"its outputs became {tuple(logits.shape)}")
    for each, flag in zip(pruned.parameters(), trained, strict=True):
        each.requires_grad_(flag)
        each.grad = None
    _check_rebuilt(network, pruned, example, logits, architecture)
    return pruned.train(network.training)


def _remove_channels(module: nn.Module, example: Tensor, share: float, kept: Sequence[nn.Module]) -> None:
    import torch_pruning

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch_pruning.pruner.BasePruner(
            module,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=share,
            pruning_ratio_dict={each: _ratio(count, share) for each in module.modules() if (count := _outputs(each))},
            ignored_layers=list(kept),
        ).step()


def _ratio(channels: int, share: float) -> float:
    """Return the share to remove so that a convenient number of channels is left; half a channel guards rounding."""
    left = remaining_channels(channels, share)
    return 0.0 if left == channels else 1 - (left + 0.5) / channels


def remaining_channels(channels: int, share: float) -> int:
    """Return how many channels of a group are left: multiples of 8 of 64 or more, of 4 of 16 or more, else any.

    Other numbers are slow: onnxruntime's convolutions work on blocks of channels.

    Example:
        >>> [remaining_channels(channels, 0.3) for channels in (6, 16, 50, 64)]
        [4, 12, 36, 48]
    """
    multiple = next((each for least, each in _MULTIPLES.items() if channels >= least), 1)
    return min(channels, max(1, round(channels * (1 - share) / multiple)) * multiple)


def _find_unprunable(network: nn.Module, example: Tensor, share: float) -> str:
    """Return, for a message, the innermost block that cannot be pruned by itself; "" if there is none."""
    whole = copy.deepcopy(network).cpu().eval()
    blocks = {path: each for path, each in whole.named_modules() if path and any(each.children())}
    inputs: dict[str, Tensor] = {}
    hooks = [
        each.register_forward_pre_hook(lambda _, given, path=path: inputs.update({path: given[0]}))
        for path, each in blocks.items()
    ]
    with torch.no_grad():
        whole(example)
    for hook in hooks:
        hook.remove()
    for path in sorted(blocks, key=lambda each: -each.count(".")):
        if path not in inputs:
            continue
        block = copy.deepcopy(blocks[path]).requires_grad_(True)
        try:
            _remove_channels(block, inputs[path].detach(), share, ())
            with torch.no_grad():
                block(inputs[path])
        except Exception:  # as above
            return f"its layer {path}, {type(blocks[path]).__name__}: "
    return ""


def _check_rebuilt(whole: nn.Module, pruned: nn.Module, example: Tensor, logits: Tensor, architecture: str) -> None:
    """Check that cutting the whole network to the recorded widths gives the pruned one."""
    again = copy.deepcopy(whole).cpu().eval()
    try:
        cut_channels(again, describe_widths(whole, pruned))
        again.load_state_dict(pruned.state_dict())
        with torch.no_grad():
            difference = (_logits(again, example) - logits).abs().max()
    except (UsageError, RuntimeError) as error:
        raise _unprunable(architecture, first_line(error)) from error
    if not difference <= _MAX_DIFFERENCE * logits.abs().max().clamp(min=1):
        raise _unprunable(architecture, "its layers depend on numbers of channels in a way that is not recorded")


def _unprunable(architecture: str, reason: str) -> UsageError:
    return UsageError(
        f"{architecture} cannot be pruned ({reason}).\nChoose another student, such as MobileNetV3, EfficientNet-Lite, "
        "RegNet or ResNet; `potstill fit DATA --under 2MB` finds one"
    )


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = network(images)
    return logits


def _width_names(layer: nn.Module) -> tuple[str, ...]:
    return next((names for kind, names in _WIDTH_NAMES.items() if isinstance(layer, kind)), ())


def _outputs(layer: nn.Module) -> int | None:
    found = getattr(layer, "out_features", getattr(layer, "out_channels", None))
    return found if isinstance(layer, (nn.Linear, nn.Conv2d)) else None
