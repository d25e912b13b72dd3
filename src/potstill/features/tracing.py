"""Record one forward pass: calls of submodules and activations, and uses of results; layouts of feature maps."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from potstill.errors import UsageError

Layout = Literal["NCHW", "NHWC", "tokens"]

MAX_PREFIX_TOKENS = 8  # class, distillation and register tokens before the patches


@dataclass(frozen=True)
class Grid:
    """Shape and layout of a feature map."""

    layout: Layout
    channels: int
    height: int
    width: int
    prefix: int = 0  # tokens before those of the grid

    @property
    def area(self) -> int:
        """Number of positions."""
        return self.height * self.width

    def to_map(self, tensor: Tensor) -> Tensor:
        """Return the tensor as [B, C, H, W], without prefix tokens.

        Example:
            >>> import torch
            >>> tokens = torch.tensor([[[9.0], [1.0], [2.0], [3.0], [4.0]]])  # a class token, then 2 x 2 patches
            >>> Grid("tokens", 1, 2, 2, prefix=1).to_map(tokens)
            tensor([[[[1., 2.],
                      [3., 4.]]]])
        """
        if self.layout == "NHWC":
            return tensor.permute(0, 3, 1, 2)
        if self.layout == "tokens":
            columns = tensor[:, self.prefix :].transpose(1, 2)
            return columns.reshape(len(tensor), self.channels, *self._places(columns.shape[2]))
        return tensor

    def _places(self, count: int) -> tuple[int, int]:
        """Return height and width for a number of tokens, with the known aspect ratio at another size."""
        height = round(math.sqrt(count * self.height / self.width))
        width = count // max(height, 1)
        if height * width != count:
            raise UsageError(f"{count} tokens do not fill a grid like {self.height} x {self.width}; keep all patches")
        return height, width


class LayoutDetector:
    """Recognises maps by their shapes: a map has the aspect ratio of the image, [B, C, H, W]."""

    def __init__(self, image: Iterable[int]) -> None:
        self.batch, _, self.height, self.width = image
        self.order: Layout = "NCHW"  # of the last unambiguous map
        self.patches: list[Grid] = []  # maps so far, which may be flattened to tokens

    def grid(self, shape: tuple[int, ...]) -> Grid | None:
        """Return the grid of a tensor of this shape; None if it is no map."""
        if len(shape) == 3 and shape[0] == self.batch:
            return self._tokens(shape[1], shape[2])
        if len(shape) != 4 or shape[0] != self.batch:
            return None
        first = self._fits(shape[2], shape[3])
        last = self._fits(shape[1], shape[2])
        if first != last:
            self.order = "NCHW" if first else "NHWC"
        if not (first or last):
            return None
        if self.order == "NHWC":
            return self._remember(Grid("NHWC", shape[3], shape[1], shape[2]))
        return self._remember(Grid("NCHW", shape[1], shape[2], shape[3]))

    def _remember(self, grid: Grid) -> Grid:
        self.patches.append(grid)
        return grid

    def _fits(self, height: int, width: int) -> bool:
        """Return whether the shape has the image's aspect ratio within one pixel; square for square images."""
        return abs(height * self.width - width * self.height) < max(self.height, self.width)

    def _tokens(self, count: int, channels: int) -> Grid | None:
        for seen in reversed(self.patches):
            if seen.channels == channels and 0 <= count - seen.area <= MAX_PREFIX_TOKENS and count > 1:
                return Grid("tokens", channels, seen.height, seen.width, count - seen.area)
        highest = round(math.sqrt(count * self.height / self.width))
        for height in range(highest, 0, -1):
            width = round(height * self.width / self.height)
            if width and 0 <= count - height * width <= MAX_PREFIX_TOKENS and count > 1:
                return Grid("tokens", channels, height, width, count - height * width)
        return None


# Called as functions.  Activation modules call them too; then the module is recorded.
ACTIVATIONS = frozenset(
    [
        *(F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.hardtanh, F.prelu),
        *(F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish),
        *(F.softplus, F.tanh, torch.tanh, Tensor.tanh),
    ]
)
_NO_ACTIVATIONS = ("Softmax", "Softmin", "LogSoftmax", "Softmax2d", "MultiheadAttention")


class ActivationMode(TorchFunctionMode):
    """Within the block, report every call of an activation function: its input before, its input and result after."""

    def __init__(self, before: Callable[[Tensor], Any], after: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.before, self.after = before, after

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        source = args[0] if args else kwargs.get("input")
        if func not in ACTIVATIONS or not isinstance(source, Tensor):
            return func(*args, **kwargs)
        recorded = self.before(source)
        result = func(*args, **kwargs)
        self.after(recorded, result)
        return result


def is_activation(module: nn.Module) -> bool:
    """Return whether a module is an activation, of torch or (by the name of its source file) of another library."""
    kind = type(module)
    return (
        "activation" in kind.__module__
        and kind.__name__ not in _NO_ACTIVATIONS
        and not any(True for _ in module.children())
    )


CONTAINERS = (nn.Sequential, nn.ModuleList)
_WEIGHTS = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(eq=False)
class ActivationCall:
    """An activation, with the tensors before and after it and their versions then."""

    path: str | None  # of the module; None for a function
    parents: "tuple[ModuleCall, ...]"  # enclosing calls, outermost first
    before: Tensor
    before_version: int
    after: Tensor
    after_version: int = 0

    @property
    def overwritten(self) -> bool:
        """Whether this call or a later one wrote into its input."""
        return _version(self.before) != self.before_version

    def produced(self, tensor: Tensor) -> bool:
        """Return whether the tensor is the result, unchanged since."""
        return self.after is tensor and self.after_version == _version(tensor)


@dataclass(eq=False)
class ModuleCall:
    """One call of one submodule, or of an activation function on the output of that submodule (``is_function``)."""

    path: str
    module: nn.Module
    number: int  # of the calls of this module, from 0
    parents: "tuple[ModuleCall, ...]"  # enclosing calls, outermost first
    start: int
    source: Tensor | None  # its first input tensor
    grid_in: Grid | None
    is_function: bool = False
    end: int = 0
    output: Tensor | None = None  # its output: a tensor, or the first of several
    grid: Grid | None = None
    version: int = 0
    mean: Tensor | None = None  # [B, C], spatial
    activated: ActivationCall | None = None  # the activation with this output

    @property
    def overwritten(self) -> bool:
        """Whether the output was modified later."""
        return self.output is not None and _version(self.output) != self.version

    @property
    def computes_features(self) -> bool:
        """Whether it computes features, unlike pooling, dropout, reshaping, and bare linear layers on a map."""
        if self.is_function or is_activation(self.module):
            return True
        return not isinstance(self.module, nn.Linear) and any(True for _ in self.module.parameters())


@dataclass
class ForwardTrace:
    """A forward pass."""

    image: tuple[int, int]
    containers: frozenset[str]  # paths of sequential containers
    logits: Any = None
    calls: list[ModuleCall] = field(default_factory=list)  # in order of their ends
    activated: list[ActivationCall] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # calls of each path


def first_tensor(output: Any) -> Tensor | None:
    """Return a tensor, or the first of several outputs."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def map_grid(call: ModuleCall) -> Grid:
    """Return the grid of a call's output map."""
    assert call.grid is not None
    return call.grid


def map_size(call: ModuleCall) -> tuple[int, int]:
    """Return height and width of a call's output map."""
    return map_grid(call).height, map_grid(call).width


def count_weight_layers(module: nn.Module) -> int:
    """Return the number of convolutions and linear layers in a module."""
    return sum(isinstance(part, _WEIGHTS) for part in module.modules())


@contextmanager
def eval_no_grad(model: nn.Module) -> Iterator[None]:
    """Within the block, eval mode and no gradients; afterwards each module's mode is restored."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def trace_forward(model: nn.Module, images: Tensor) -> ForwardTrace:
    """Record one forward pass in eval mode over two images, or noise if they are constant; the model is unchanged."""
    images = images[:2]
    if images.numel() and bool((images == images.flatten()[0]).all()):
        images = _noise(images)
    containers = frozenset(path for path, module in model.named_modules() if isinstance(module, CONTAINERS))
    recorder = _Recorder(images, containers)
    with eval_no_grad(model), ExitStack() as hooks:
        for path, module in model.named_modules():
            if path:
                before, after = recorder.hooks(path)
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after).remove)
        hooks.enter_context(ActivationMode(recorder.before_activation, recorder.activated))
        recorder.trace.logits = model(images)
    return recorder.trace


class _Recorder:
    def __init__(self, images: Tensor, containers: frozenset[str]) -> None:
        self.trace = ForwardTrace((images.shape[-2], images.shape[-1]), containers)
        self.layouts = LayoutDetector(images.shape)
        self.open_calls: list[ModuleCall] = []
        self.clock = 0
        self.latest: ModuleCall | None = None  # the last call that ended with a tensor

    def hooks(self, path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            source = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            grid = None if source is None else self.layouts.grid(tuple(source.shape))
            number = self.trace.counts[path]
            self.trace.counts[path] += 1
            self.open_calls.append(ModuleCall(path, module, number, tuple(self.open_calls), self._tick(), source, grid))
            if source is not None and is_activation(module):
                parents = tuple(self.open_calls[:-1])
                self.open_calls[-1].activated = ActivationCall(path, parents, source, _version(source), source)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            call = self.open_calls.pop()
            activation, call.activated = call.activated, None
            if isinstance(output, Tensor) and activation is not None:
                self._record_activation(activation, output)
            self._finish_call(call, output)

        return before, after

    def before_activation(self, source: Tensor) -> tuple[Tensor, int]:
        return source, _version(source)

    def activated(self, recorded: tuple[Tensor, int], result: Tensor) -> None:
        if self.open_calls and is_activation(self.open_calls[-1].module):
            return
        source, version = recorded
        self._record_activation(ActivationCall(None, tuple(self.open_calls), source, version, source), result)
        latest = self.latest
        if latest is not None and latest.output is source and not latest.is_function:
            parents = tuple(call for call in self.open_calls if call is not latest)
            is_function = ModuleCall(
                latest.path, latest.module, latest.number, parents, self._tick(), source, latest.grid, True
            )
            self._finish_call(is_function, result)

    def _record_activation(self, activated: ActivationCall, result: Tensor) -> None:
        activated.after, activated.after_version = result, _version(result)
        self.trace.activated.append(activated)

    def _finish_call(self, call: ModuleCall, output: Any) -> None:
        call.end = self._tick()
        self.trace.calls.append(call)
        output = first_tensor(output)
        if output is None:
            return
        call.output, call.version = output, _version(output)
        call.grid = self.layouts.grid(tuple(output.shape))
        if call.grid is not None:
            call.mean = call.grid.to_map(output).float().mean(dim=(2, 3))
        call.activated = next((call for call in reversed(self.trace.activated) if call.produced(output)), None)
        self.latest = call

    def _tick(self) -> int:
        self.clock += 1
        return self.clock


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _noise(images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images.shape, generator=generator).to(images)
