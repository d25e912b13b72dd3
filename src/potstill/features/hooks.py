"""Hooks that read feature maps, the embedding and outputs of named submodules without changing the network."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from potstill.errors import UsageError, did_you_mean
from potstill.features.stages import Stage
from potstill.features.tracing import ActivationMode, first_tensor


@contextmanager
def capture_outputs(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, keep the output of each submodule named in ``paths``.

    The hooks end with the block.  UsageError: a path that is unknown, or whose output is not one tensor.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> with capture_outputs(net, ["0"]) as features:
        ...     logits = net(torch.zeros(3, 2, 2))
        >>> features["0"].shape
        torch.Size([3, 4])
    """
    features: dict[str, Tensor] = {}
    handles = []
    try:
        for path in paths:
            handles.append(find_submodule(model, path).register_forward_hook(_capture_hook(features, path)))
        yield features
    finally:
        for handle in handles:
            handle.remove()


def _capture_hook(features: dict[str, Tensor], path: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise UsageError(f"the output of {path!r} is {type(output).__name__}, not a tensor; tap another layer")
        features[path] = output

    return hook


def find_submodule(model: nn.Module, path: str) -> nn.Module:
    """Return the submodule with this path; UsageError names the nearest."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if path not in modules or not path:
        first = ", ".join(sorted(name for name in modules if name)[:6])
        hint = did_you_mean(path, modules) or f"; it has {first}, ..."
        raise UsageError(f"{type(model).__name__} has no layer {path!r}{hint}")
    return modules[path]


@dataclass(frozen=True)
class FeatureRequest:
    """The features to read."""

    stages: tuple[Stage, ...] = ()
    before_activation: bool = False  # whether to read maps before the last activation
    embedding: str | None = None  # path of the layer whose input is the embedding
    taps: tuple[str, ...] = ()  # submodules whose outputs are read unchanged


@dataclass
class CapturedFeatures:
    """The features of the last forward pass."""

    features: dict[str, Tensor] = field(default_factory=dict)  # by path
    embedding: Tensor | None = None  # [B, D]
    found: list[Tensor | None] = field(default_factory=list)  # of each stage, in the network's layout
    stages: tuple[Stage, ...] = ()

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """Return maps [B, C, H, W] of the stages in the order of the request; tokens as a grid."""
        maps = []
        for stage, found in zip(self.stages, self.found, strict=True):
            if found is None:
                raise UsageError(f"the forward pass did not come to {stage.path!r}; choose a layer that it always uses")
            maps.append(stage.grid.to_map(found))
        return tuple(maps)


@contextmanager
def capture_features(model: nn.Module, request: FeatureRequest) -> Iterator[CapturedFeatures]:
    """Within the block, read the features of each forward pass of ``model``; gradients flow through them.

    The hooks end with the block.  Maps into which the network writes later (activations in place) are copied.

    Example:
        >>> import torch
        >>> from potstill.features.stages import find_stages
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))
        >>> images = torch.rand(4, 3, 16, 16)
        >>> anatomy = find_stages(net, images)
        >>> with capture_features(net, FeatureRequest(anatomy.stages, embedding=anatomy.embedder)) as reading:
        ...     logits = net(images)
        >>> [tuple(one.shape) for one in reading.maps], tuple(reading.embedding.shape)
        ([(4, 8, 8, 8)], (4, 512))
    """
    reading = CapturedFeatures(found=[None] * len(request.stages), stages=request.stages)
    with ExitStack() as hooks:
        reading.features = hooks.enter_context(capture_outputs(model, request.taps))
        if request.embedding is not None:
            keep = _embedding_hook(reading)
            hooks.callback(
                find_submodule(model, request.embedding).register_forward_pre_hook(keep, with_kwargs=True).remove
            )
        readers = [
            _StageReader(reading.found, position, stage, request.before_activation)
            for position, stage in enumerate(request.stages)
        ]
        for reader in readers:
            reader.attach(model, hooks)
        yield reading


class _StageReader:
    """Stores one stage's map in ``found``."""

    def __init__(self, found: list[Tensor | None], position: int, stage: Stage, before_activation: bool) -> None:
        self.found, self.position, self.stage = found, position, stage
        self.source = stage.before if before_activation else ("function" if stage.activated else "map")
        self.copied = stage.copied_before if before_activation else stage.copied
        self.calls = 0  # of the stage's module, within one forward pass
        self.latest: Tensor | None = None  # last input of the activation
        self.result: Tensor | None = None  # its output
        self.open = False  # whether the next activation function may be the stage's

    def attach(self, model: nn.Module, hooks: ExitStack) -> None:
        stage = self.stage
        module = find_submodule(model, stage.module)
        hooks.callback(model.register_forward_pre_hook(self._begin).remove)
        if self.source == "norm":
            assert stage.norm is not None
            hooks.callback(find_submodule(model, stage.norm).register_forward_hook(self._keep_output).remove)
            return
        if self.source == "activation":
            assert stage.activation is not None
            inside = f"{stage.activation}.".startswith(f"{stage.module}.")
            before = self._keep_latest if inside else self._keep_input
            hooks.callback(
                find_submodule(model, stage.activation).register_forward_pre_hook(before, with_kwargs=True).remove
            )
            if not inside:
                return
        if self.source == "function":
            hooks.callback(module.register_forward_pre_hook(self._open).remove)
            hooks.enter_context(ActivationMode(self._activating, self._made))
        hooks.callback(module.register_forward_hook(self._end).remove)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.calls, self.latest, self.result, self.open = 0, None, None, False
        self.found[self.position] = None

    def _open(self, module: nn.Module, args: Any) -> None:
        self.open = not self.stage.activated

    def _keep(self, tensor: Tensor) -> None:
        self.found[self.position] = self._copy(tensor)

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.clone() if self.copied else tensor

    def _keep_output(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._keep(output)

    def _keep_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep(_first_input(args, kwargs))

    def _keep_latest(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.latest = self._copy(_first_input(args, kwargs))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.open, number = False, self.calls
        self.calls += 1
        output = first_tensor(output)
        if self.stage.call not in (None, number) or output is None:
            return
        if self.source == "activation":
            assert self.latest is not None
            self.found[self.position] = self.latest
        elif self.source != "function":
            self._keep(output)
        elif self.stage.activated:
            self.open, self.latest = True, output
        elif self.result is output:
            self.found[self.position] = self.latest

    def _activating(self, tensor: Tensor) -> Tensor | None:
        if not self.open or (self.stage.activated and tensor is not self.latest):
            return None
        return tensor if self.stage.activated else self._copy(tensor)

    def _made(self, given: Tensor | None, result: Tensor) -> None:
        if given is None:
            return
        if self.stage.activated:
            self.open = False
            self._keep(result)
        else:
            self.latest, self.result = given, result


def _embedding_hook(reading: CapturedFeatures) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reading.embedding = _first_input(args, kwargs)

    return hook


def _first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
