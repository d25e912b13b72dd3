"""Faster inference of a frozen network: BatchNorm folded into the layer before it, weights in bf16, faster forms of a
few CPU layers, and no autograd.

CPU layers, measured on two cores with AVX512-BF16, one thread, 128 images in bf16 and channels_last: a 1x1 convolution
of 4096 channels on maps of 1x1 (VGG's second fully connected layer in timm) takes 111 ms and as a matrix
product 10 ms; a 2x2 maximum over 64 x 64 x 64 takes 39 ms and as two element-wise maxima 8 ms.
"""

import contextlib
import copy
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.overrides import TorchFunctionMode


def use_fast_cpu_layers(network: nn.Module) -> None:
    """Replace, in place, the classes of layers that have a faster CPU form; parameters and outputs stay."""
    for module in network.modules():
        if type(module) is nn.Conv2d and _is_pointwise(module):
            module.__class__ = _PointwiseConv
        elif type(module) is nn.MaxPool2d and _is_halving(module):
            module.__class__ = _HalvingPool


class _PointwiseConv(nn.Conv2d):
    """A 1x1 convolution that is a matrix product if the map is 1x1 (as in squeeze-and-excitation)."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.ndim == 4 and input.shape[-2:] == (1, 1):
            return F.linear(input.flatten(1), weight.flatten(1), bias)[..., None, None]
        output: Tensor = super()._conv_forward(input, weight, bias)
        return output


class _HalvingPool(nn.MaxPool2d):
    """The maximum of each two rows, then of each two columns."""

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim != 4 or input.shape[-2] % 2 or input.shape[-1] % 2:
            output: Tensor = super().forward(input)
            return output
        rows = torch.maximum(input[:, :, ::2], input[:, :, 1::2])
        return torch.maximum(rows[..., ::2], rows[..., 1::2])


def _is_pointwise(layer: nn.Conv2d) -> bool:
    plain = layer.stride == (1, 1) and layer.padding in ((0, 0), "valid")
    return plain and layer.kernel_size == (1, 1) and layer.groups == 1


def _is_halving(layer: nn.MaxPool2d) -> bool:
    twos = all(size in (2, (2, 2)) for size in (layer.kernel_size, layer.stride))
    plain = layer.padding in (0, (0, 0)) and layer.dilation in (1, (1, 1))
    return twos and plain and not layer.ceil_mode and not layer.return_indices


_FOLDABLE_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_TOLERANCE = 1e-4  # of the largest value: float32 rounds each of some thousand products
_TOLERANCE_ON_GPU = 1e-2  # where convolutions may be computed in TF32, which keeps 10 bits

FoldableLayer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


@torch.no_grad()
def fold_batch_norms(network: nn.Module, images: Tensor) -> int:
    """Fold BatchNorms in place into the layers before them; the network must be in eval mode, in float32.

    One forward pass finds them.  A BatchNorm is folded if its input is the output of a layer that was called once, no
    other operation used that output, and the fused layer gives the same output.  What such a module does besides stays.
    Return their number; the caller compares the whole network with the original.
    """
    tracer = _BatchNormTracer(network)
    with ExitStack() as hooks:
        tracer.attach(hooks)
        with tracer:
            network(images)
    folded = [pair for pair in tracer.pairs if tracer.is_foldable(pair)]
    for pair in folded:
        pair.layer.weight, pair.layer.bias = _fused_parameters(pair.layer, pair.norm)
        network.set_submodule(pair.path, _without_normalisation(pair.norm), strict=True)
    return len(folded)


def nearly_equal(one: Tensor, other: Tensor) -> bool:
    """Return whether both are equal up to rounding in float32 (in TF32 on a GPU)."""
    allowed = (_TOLERANCE_ON_GPU if one.is_cuda else _TOLERANCE) * float(other.abs().max())
    return one.shape == other.shape and float((one - other).abs().max()) <= allowed


@dataclass(eq=False)
class _LayerOutput:
    layer: FoldableLayer
    input: Tensor
    output: "weakref.ref[Tensor]"
    used_elsewhere: bool = False


@dataclass(eq=False)
class _LayerAndNorm:
    layer: FoldableLayer
    norm: _BatchNorm
    path: str  # of the BatchNorm
    output: _LayerOutput


class _BatchNormTracer(TorchFunctionMode):
    """Records in one forward pass which BatchNorm reads which layer's output, and whether anything else reads it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.pairs: list[_LayerAndNorm] = []
        self.calls: Counter[nn.Module] = Counter()
        self.outputs: dict[int, _LayerOutput] = {}  # by id of the tensor
        self.latest: tuple[_LayerOutput, Tensor] | None = None  # of the last layer; keeps the tensor alive
        self.norm_input: Tensor | None = None  # of the BatchNorm that is running

    def attach(self, hooks: ExitStack) -> None:
        """Register the hooks, to be removed by the stack."""
        for path, module in self.network.named_modules():
            if isinstance(module, _FOLDABLE_LAYERS):
                hooks.callback(module.register_forward_hook(self._after_layer).remove)
            elif isinstance(module, _BatchNorm):
                hooks.callback(module.register_forward_pre_hook(self._before_norm).remove)
                hooks.callback(module.register_forward_hook(self._after_norm(path)).remove)

    def is_foldable(self, pair: _LayerAndNorm) -> bool:
        """Return whether a pair can be folded; valid after the forward pass."""
        return self.calls[pair.layer] == self.calls[pair.norm] == 1 and not pair.output.used_elsewhere

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(True for _ in _tensors((result,))):  # reading a shape or device is no use
            for tensor in _tensors((*args, *kwargs.values())):
                made = self.outputs.get(id(tensor))
                if made is not None and made.output() is tensor and tensor is not self.norm_input:
                    made.used_elsewhere = True
        return result

    def _after_layer(self, layer: FoldableLayer, args: tuple[Any, ...], output: Any) -> None:
        self.calls[layer] += 1
        if isinstance(output, Tensor) and len(args) == 1:
            made = _LayerOutput(layer, args[0], weakref.ref(output))
            self.outputs[id(output)], self.latest = made, (made, output)

    def _before_norm(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        self.norm_input = args[0] if args else None

    def _after_norm(self, path: str) -> Callable[[_BatchNorm, tuple[Any, ...], Any], None]:
        def hook(norm: _BatchNorm, args: tuple[Any, ...], output: Any) -> None:
            self.calls[norm] += 1
            self.norm_input = None
            latest, self.latest = self.latest, None
            if latest is None or not args or args[0] is not latest[1]:
                return
            made = latest[0]
            if _can_fuse(made.layer, norm) and _fused_layer_agrees(made, norm, output):
                self.pairs.append(_LayerAndNorm(made.layer, norm, path, made))

        return hook


def _can_fuse(layer: FoldableLayer, norm: _BatchNorm) -> bool:
    width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    parameters = [name for name, _ in layer.named_parameters()]  # others belong to a parametrization
    return width == norm.num_features and norm.running_var is not None and set(parameters) <= {"weight", "bias"}


def _fused_layer_agrees(made: _LayerOutput, norm: _BatchNorm, output: Tensor) -> bool:
    layer = made.layer
    weight, bias = layer.weight, layer.bias
    try:
        layer.weight, layer.bias = _fused_parameters(layer, norm)
        return nearly_equal(_without_normalisation(norm)(layer.forward(made.input)), output)
    finally:
        layer.weight, layer.bias = weight, bias


def _fused_parameters(layer: FoldableLayer, norm: _BatchNorm) -> tuple[nn.Parameter, nn.Parameter]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights

    def double(values: Tensor) -> Tensor:
        return values.cpu().double()  # MPS has no float64

    weight, bias = fuse(
        double(layer.weight),
        None if layer.bias is None else double(layer.bias),
        double(norm.running_mean),
        double(norm.running_var),
        norm.eps,
        double(torch.ones_like(norm.running_var) if norm.weight is None else norm.weight),
        double(torch.zeros_like(norm.running_var) if norm.bias is None else norm.bias),
    )
    fused = [each.to(layer.weight.device, layer.weight.dtype) for each in (weight, bias)]
    return nn.Parameter(fused[0], requires_grad=False), nn.Parameter(fused[1], requires_grad=False)


def _without_normalisation(norm: _BatchNorm) -> nn.Module:
    """Return what the module does besides normalising: timm's has dropout and activation."""
    more = [each for each in (getattr(norm, "drop", None), getattr(norm, "act", None)) if isinstance(each, nn.Module)]
    return nn.Sequential(*more) if more else nn.Identity()


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


MIN_AGREEMENT = 0.98  # share of images with the same top class as float32, from which bf16 is used
_FOLDING_IMAGES = 2  # to find the BatchNorms that can be folded
_COMPARISON_BATCH_SIZE = 32
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "float16"}
_MEMORY_FORMAT_NAMES = {torch.channels_last: "channels_last", torch.contiguous_format: "contiguous"}


@dataclass(frozen=True)
class InferenceSettings:
    """Precision and layout in which a frozen network runs, whatever the state of autocast; outputs are float32."""

    dtype: torch.dtype = torch.float32  # of weights and images
    memory_format: torch.memory_format = torch.contiguous_format  # of weights and images
    folded: int = 0  # number of folded BatchNorms

    def facts(self) -> dict[str, Any]:
        """Return everything that determines how outputs are rounded, as JSON values."""
        layout = _MEMORY_FORMAT_NAMES.get(self.memory_format, "contiguous")
        return {"precision": _DTYPE_NAMES.get(self.dtype, str(self.dtype)), "folded": self.folded, "layout": layout}

    @classmethod
    def of(cls, facts: dict[str, Any]) -> "InferenceSettings":
        """Return the settings whose ``facts`` these are."""
        dtypes = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
        layouts = {name: layout for layout, name in _MEMORY_FORMAT_NAMES.items()}
        return cls(dtypes[facts["precision"]], layouts[facts["layout"]], facts["folded"])

    def __str__(self) -> str:
        words = [self.facts()["precision"]]
        words += ["BN folded"] if self.folded else []
        words += ["channels_last"] if self.memory_format == torch.channels_last else []
        return ", ".join(words)

    def convert_images(self, images: Tensor) -> Tensor:
        """Return the images in ``dtype`` and ``memory_format``."""
        return images.to(dtype=self.dtype, memory_format=self.memory_format)

    @contextmanager
    def context(self, device: torch.device, *, inference: bool = True) -> Iterator[None]:
        """Run the network within the block; after ``inference_mode``, apply ``clone_as_float32`` to its outputs."""
        with torch.autocast(device.type, enabled=False), torch.inference_mode() if inference else torch.no_grad():
            yield

    def logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """Return the network's logits [B, K] in float32."""
        images = self.convert_images(images)
        with self.context(images.device):
            logits: Tensor = network(images)
        return clone_as_float32(logits)


def clone_as_float32(values: Tensor) -> Tensor:
    """Return a float32 copy that autograd can save for backward, unlike a tensor of inference mode."""
    return values.to(torch.float32, copy=True)


@dataclass(frozen=True)
class Fidelity:
    """Difference between a converted network and its original."""

    agreement: float  # share of images with the same top class
    largest: float  # absolute difference of two logits; infinite if one is NaN
    images: int  # that were compared


@torch.no_grad()
def measure_fidelity(network: nn.Module, settings: InferenceSettings, reference: nn.Module, images: Tensor) -> Fidelity:
    """Compare the logits of both networks for images [N, 3, H, W]; ``reference`` runs in float32."""
    same, largest, plain = 0, 0.0, InferenceSettings(memory_format=settings.memory_format)
    for start in range(0, len(images), _COMPARISON_BATCH_SIZE):
        some = images[start : start + _COMPARISON_BATCH_SIZE]
        logits, expected = settings.logits(network, some), plain.logits(reference, some)
        comparable = (logits.isfinite() == expected.isfinite()).all(dim=1)
        same += int(((logits.argmax(dim=1) == expected.argmax(dim=1)) & comparable).sum())
        largest = max(largest, float((logits - expected).abs().nan_to_num(nan=math.inf).max()))
    return Fidelity(same / len(images), largest, len(images))


def convert_for_inference(
    network: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format, images: Tensor
) -> tuple[nn.Module, InferenceSettings]:
    """Return a frozen, converted copy and the settings to run it; ``network``, in eval mode and float32, is not
    changed.

    The last linear layer stays in float32, since logits in bf16 have three digits; so do BatchNorms that cannot be
    folded.
    """
    few = images[:_FOLDING_IMAGES].to(memory_format=memory_format)
    plain = InferenceSettings(memory_format=memory_format)
    copied, folded = _copy_and_fold(network, few, plain)
    if dtype != torch.float32:
        if path := _last_linear(copied, few):
            copied.set_submodule(path, _FloatLinear.of(copied.get_submodule(path)), strict=True)
        _cast_to_dtype(copied, dtype)
    copied.to(memory_format=memory_format)
    if not few.is_cuda:
        use_fast_cpu_layers(copied)
    settings = InferenceSettings(dtype, memory_format, folded)
    settings.logits(copied, few)  # raises now what cannot be computed in this dtype
    return copied.requires_grad_(False).eval(), settings


def _copy_and_fold(network: nn.Module, images: Tensor, plain: InferenceSettings) -> tuple[nn.Module, int]:
    copied = copy.deepcopy(network)
    # A foreign network that accesses its BatchNorm from outside may raise anything.
    with contextlib.suppress(Exception):
        with torch.autocast(images.device.type, enabled=False):
            folded = fold_batch_norms(copied, images)
        if folded == 0:
            return copied, 0
        if nearly_equal(plain.logits(copied, images), plain.logits(network, images)):
            return copied, folded
    return copy.deepcopy(network), 0


class _FloatLinear(nn.Linear):
    """A linear layer that computes in float32, whatever the dtype of its input."""

    @classmethod
    def of(cls, layer: nn.Module) -> "_FloatLinear":
        assert isinstance(layer, nn.Linear)
        linear = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        return linear

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight, self.bias)


@torch.no_grad()
def _last_linear(network: nn.Module, images: Tensor) -> str | None:
    """Return the path of the linear layer whose output is the network's; None if there is none."""
    found: list[tuple[str, Tensor]] = []

    def hook_for(path: str) -> Callable[[nn.Linear, tuple[Any, ...], Any], None]:
        def hook(layer: nn.Linear, args: tuple[Any, ...], output: Any) -> None:
            if (
                args
                and isinstance(output, Tensor)
                and nearly_equal(F.linear(args[0], layer.weight, layer.bias), output)
            ):
                found.append((path, output))  # a subclass may compute something else

        return hook

    handles = [
        module.register_forward_hook(hook_for(path))
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        logits = network(images)
    finally:
        for handle in handles:
            handle.remove()
    return next((path for path, output in found if output is logits), None)


def _cast_to_dtype(network: nn.Module, dtype: torch.dtype) -> None:
    converted: dict[int, nn.Parameter] = {}  # shared parameters stay shared
    for module in network.modules():
        if isinstance(module, (_BatchNorm, _FloatLinear)):
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_floating_point():
                if id(parameter) not in converted:
                    converted[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                module._parameters[name] = converted[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
