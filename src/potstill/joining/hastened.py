"""A frozen network that answers faster: BatchNorm folded, weights in bf16, without autograd's bookkeeping."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from potstill.joining.cpu_layers import rewrite
from potstill.joining.folding import close, fold

LEAST_AGREEMENT = 0.98  # with float32's top class; below, bf16 is not worth its speed
_LOOKED_AT = 2  # images, for what can be folded
_AT_ONCE = 32  # images, for the agreement
_WORDS = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "float16"}
_LAYOUTS = {torch.channels_last: "channels_last", torch.contiguous_format: "contiguous"}


@dataclass(frozen=True)
class Asking:
    """How a frozen network is asked, whatever autocast says around it.

    Attributes:
        dtype: of its weights and of the images that it gets; its answers come in float32.
        memory_format: of weights and images.
        folded: how many BatchNorms are gone.
    """

    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    folded: int = 0

    def facts(self) -> dict[str, Any]:
        """All that decides how answers are rounded, as values that JSON knows."""
        layout = _LAYOUTS.get(self.memory_format, "contiguous")
        return {"precision": _WORDS.get(self.dtype, str(self.dtype)), "folded": self.folded, "layout": layout}

    @classmethod
    def of(cls, facts: dict[str, Any]) -> "Asking":
        """The way back from ``facts``.

        Example:
            >>> Asking.of(Asking(torch.bfloat16, torch.channels_last, 3).facts())
            Asking(dtype=torch.bfloat16, memory_format=torch.channels_last, folded=3)
        """
        dtypes, layouts = (
            {word: each for each, word in _WORDS.items()},
            {word: each for each, word in _LAYOUTS.items()},
        )
        return cls(dtypes[facts["precision"]], layouts[facts["layout"]], facts["folded"])

    def __str__(self) -> str:
        words = [self.facts()["precision"]]
        words += ["BN folded"] if self.folded else []
        words += ["channels_last"] if self.memory_format == torch.channels_last else []
        return ", ".join(words)

    def images(self, images: Tensor) -> Tensor:
        """As the network wants them."""
        return images.to(dtype=self.dtype, memory_format=self.memory_format)

    @contextmanager
    def alone(self, device: torch.device, *, inference: bool = True) -> Iterator[None]:
        """Around the network's forward pass; what comes out of it must be ``owned`` afterwards, outside.

        Args:
            device: of the images.
            inference: without autograd's books; where False, nothing needs to be ``owned``.
        """
        with torch.autocast(device.type, enabled=False), torch.inference_mode() if inference else torch.no_grad():
            yield

    def logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """What the network says, float32 [B, K]."""
        images = self.images(images)
        with self.alone(images.device):
            logits: Tensor = network(images)
        return owned(logits)


def owned(values: Tensor) -> Tensor:
    """A float32 copy that can be saved for a backward pass, which no tensor of inference mode can."""
    return values.to(torch.float32, copy=True)


@dataclass(frozen=True)
class Fidelity:
    """How far a converted network is from the one it was made of.

    Attributes:
        agreement: share of images with the same top class.
        largest: of all differences of two logits; infinite where one of them is no number.
        images: how many were compared.
    """

    agreement: float
    largest: float
    images: int


@torch.no_grad()
def fidelity(network: nn.Module, how: Asking, reference: nn.Module, images: Tensor) -> Fidelity:
    """Ask both of the same images.

    Args:
        network: asked as ``how`` says.
        how: see there.
        reference: in float32.
        images: [N, 3, H, W] for both.
    """
    same, largest, plain = 0, 0.0, Asking(memory_format=how.memory_format)
    for start in range(0, len(images), _AT_ONCE):
        some = images[start : start + _AT_ONCE]
        ours, theirs = how.logits(network, some), plain.logits(reference, some)
        whole = (ours.isfinite() == theirs.isfinite()).all(dim=1)
        same += int(((ours.argmax(dim=1) == theirs.argmax(dim=1)) & whole).sum())
        largest = max(largest, float((ours - theirs).abs().nan_to_num(nan=math.inf).max()))
    return Fidelity(same / len(images), largest, len(images))


def convert(
    network: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format, images: Tensor
) -> tuple[nn.Module, Asking]:
    """A frozen copy with other weights; ``network`` stays as it is.

    Its last linear layer stays in float32, since logits in bf16 keep three digits; so do BatchNorms that cannot be
    folded.

    Args:
        network: in eval mode and float32, on its device.
        dtype: of the copy's weights.
        memory_format: likewise.
        images: a few that the network knows how to read, [N, 3, H, W].
    """
    few = images[:_LOOKED_AT].to(memory_format=memory_format)
    plain = Asking(memory_format=memory_format)
    copied, folded = _folded(network, few, plain)
    if dtype != torch.float32:
        if path := _last_linear(copied, few):
            copied.set_submodule(path, _FloatLinear.of(copied.get_submodule(path)), strict=True)
        _lower(copied, dtype)
    copied.to(memory_format=memory_format)
    if not few.is_cuda:
        rewrite(copied)
    how = Asking(dtype, memory_format, folded)
    how.logits(copied, few)  # what cannot be computed in this dtype says so now
    return copied.requires_grad_(False).eval(), how


def _folded(network: nn.Module, images: Tensor, plain: Asking) -> tuple[nn.Module, int]:
    copied = copy.deepcopy(network)
    # Networks of others: one that looks into its BatchNorm from outside fails in any way it likes.
    with contextlib.suppress(Exception):
        with torch.autocast(images.device.type, enabled=False):
            folded = fold(copied, images)
        if folded == 0:
            return copied, 0
        if close(plain.logits(copied, images), plain.logits(network, images)):
            return copied, folded
    return copy.deepcopy(network), 0


class _FloatLinear(nn.Linear):
    """A linear layer that computes in float32, whatever it is given."""

    @classmethod
    def of(cls, layer: nn.Module) -> "_FloatLinear":
        assert isinstance(layer, nn.Linear)
        found = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        found.weight, found.bias = layer.weight, layer.bias
        return found

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight, self.bias)


@torch.no_grad()
def _last_linear(network: nn.Module, images: Tensor) -> str | None:
    """Path of the linear layer whose output is the network's own."""
    found: list[tuple[str, Tensor]] = []

    def at(path: str) -> Callable[[nn.Linear, tuple[Any, ...], Any], None]:
        def hook(layer: nn.Linear, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(output, Tensor) and close(F.linear(args[0], layer.weight, layer.bias), output):
                found.append((path, output))  # a class of its own may compute something else

        return hook

    handles = [
        module.register_forward_hook(at(path))
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        logits = network(images)
    finally:
        for handle in handles:
            handle.remove()
    return next((path for path, output in found if output is logits), None)


def _lower(network: nn.Module, dtype: torch.dtype) -> None:
    lowered: dict[int, nn.Parameter] = {}  # what is shared stays shared
    for module in network.modules():
        if isinstance(module, (_BatchNorm, _FloatLinear)):
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_floating_point():
                if id(parameter) not in lowered:
                    lowered[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                module._parameters[name] = lowered[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
