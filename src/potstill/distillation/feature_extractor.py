"""Extract logits, feature maps, embedding and head from one forward pass of a network."""

from contextlib import nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn

from potstill.distillation.teacher_inference import InferenceSettings, clone_as_float32
from potstill.errors import UsageError
from potstill.features.hooks import CapturedFeatures, FeatureRequest, capture_features
from potstill.features.stages import Stage
from potstill.types import Head, Outputs, at_least_float32


@dataclass
class ForwardOutput:
    """All outputs of one forward pass; ``outputs`` selects those that one method reads."""

    logits: Tensor  # [B, K], at least float32
    features: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[tuple[str, bool], Tensor] = field(default_factory=dict)  # by path, and whether before activation
    embedding: Tensor | None = None
    head: Head | None = None

    def outputs(self, stages: tuple[Stage, ...] = (), *, before_activation: bool = False) -> Outputs:
        """Return logits, embedding and head, with the maps of these stages in this order."""
        maps = tuple(self.maps[stage.path, before_activation] for stage in stages)
        return Outputs(self.logits, self.features, maps, self.embedding, self.head)


@dataclass
class ExtractionRequest:
    """What to read besides the logits."""

    after: tuple[Stage, ...] = ()  # maps as the stages put them out
    before: tuple[Stage, ...] = ()  # maps before the stages' last activation
    embedding: str | None = None  # path of the last linear layer, whose input is read
    head: str | None = None  # path of the last linear layer, whose parameters are read
    taps: tuple[str, ...] = ()  # other submodules whose output is read


class FeatureExtractor:
    """Reads logits and the requested features of a network.  Holds no network, so that copies stay independent."""

    def __init__(self, request: ExtractionRequest | None = None) -> None:
        self.request = request or ExtractionRequest()
        self._after = FeatureRequest(self.request.after, embedding=self.request.embedding, taps=self.request.taps)
        self._before = FeatureRequest(self.request.before, before_activation=True)

    @property
    def reads_maps(self) -> bool:
        """Whether more than logits, embedding and head is read."""
        return bool(self.request.after or self.request.before or self.request.taps)

    @property
    def uses_hooks(self) -> bool:
        """Whether more than logits and head is read."""
        return self.reads_maps or self.request.embedding is not None

    def run(self, network: nn.Module, images: Tensor, settings: InferenceSettings | None = None) -> ForwardOutput:
        """Run one forward pass and return what was requested.

        Args:
            network: any module that maps images to logits.
            images: [B, 3, H, W], preprocessed for the network.
            settings: precision and layout, independent of an enclosing autocast; None: those of autocast.

        Raises:
            UsageError: the network does not return one tensor of logits [B, K].
        """
        if settings is not None:
            images = settings.convert_images(images)
        with (
            nullcontext() if settings is None else settings.context(images.device, inference=not self.reads_maps),
            capture_features(network, self._after) if self.uses_hooks else nullcontext(CapturedFeatures()) as after,
            capture_features(network, self._before) if self._before.stages else nullcontext(after) as before,
        ):
            logits = network(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UsageError(f"{type(network).__name__} must return logits [B, K], got {shape}")
        if settings is not None and not self.reads_maps:
            embedding = None if after.embedding is None else clone_as_float32(after.embedding)
            return ForwardOutput(clone_as_float32(logits), embedding=embedding, head=self.head(network))
        maps = {(stage.path, False): output for stage, output in zip(self.request.after, after.maps, strict=True)}
        if self.request.before:
            maps |= {(stage.path, True): output for stage, output in zip(self.request.before, before.maps, strict=True)}
        return ForwardOutput(at_least_float32(logits), after.features, maps, after.embedding, self.head(network))

    def head(self, network: nn.Module) -> Head | None:
        """Return the parameters of the network's last linear layer; None if they are not requested."""
        if self.request.head is None:
            return None
        linear = network.get_submodule(self.request.head)
        assert isinstance(linear, nn.Linear)  # find_stages returns no other
        return Head(linear.weight, linear.bias)
