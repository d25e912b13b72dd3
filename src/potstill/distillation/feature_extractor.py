"""Extract logits, feature maps, embedding and head from one forward pass of a network."""

from contextlib import nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn

from potstill.distillation.teacher_inference import InferenceSettings, clone_as_float32
from potstill.errors import UsageError
from potstill.features.hooks import FeatureRequest, capture_features
from potstill.features.stages import Stage
from potstill.types import Head, Outputs, at_least_float32


@dataclass
class ForwardOutput:
    """Everything that was read; ``outputs`` shows the part that one method asked for."""

    logits: Tensor  # [B, K], at least float32
    features: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[tuple[str, bool], Tensor] = field(default_factory=dict)  # by path, and whether before activation
    embedding: Tensor | None = None
    head: Head | None = None

    def outputs(self, stages: tuple[Stage, ...] = (), *, before_activation: bool = False) -> Outputs:
        """Logits, embedding and head, with the maps of these stages in this order."""
        maps = tuple(self.maps[stage.path, before_activation] for stage in stages)
        return Outputs(self.logits, self.features, maps, self.embedding, self.head)


@dataclass
class ExtractionRequest:
    """What to read beside the logits."""

    after: tuple[Stage, ...] = ()  # maps as the stages put them out
    before: tuple[Stage, ...] = ()  # maps before the stages' last activation
    embedding: str | None = None  # path of the last linear layer, whose input is read
    head: str | None = None  # path of the last linear layer, whose parameters are shown
    taps: tuple[str, ...] = ()  # other submodules whose output is read


class FeatureExtractor:
    """Asks a network for logits and whatever else is wanted.  It holds no network, so that copies stay apart."""

    def __init__(self, wanted: ExtractionRequest | None = None) -> None:
        self.wanted = wanted or ExtractionRequest()
        self.request = FeatureRequest(self.wanted.after, embedding=self.wanted.embedding, taps=self.wanted.taps)
        self.request_before = FeatureRequest(self.wanted.before, before_activation=True)

    @property
    def reads_maps(self) -> bool:
        """Whether more than logits, embedding and head is wanted."""
        return bool(self.wanted.after or self.wanted.before or self.wanted.taps)

    def ask(self, network: nn.Module, images: Tensor, how: InferenceSettings | None = None) -> ForwardOutput:
        """One forward pass.

        Args:
            network: logits and all else are read from it.
            images: [B, 3, H, W], as it was trained on.
            how: it is asked, whatever autocast says around it; None: as that says.

        Raises:
            UsageError: not one tensor of logits [B, K].
        """
        if how is not None:
            images = how.images(images)
        with (
            nullcontext() if how is None else how.alone(images.device, inference=not self.reads_maps),
            capture_features(network, self.request) as after,
            capture_features(network, self.request_before) as before,
        ):
            logits = network(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UsageError(f"{type(network).__name__} must return logits [B, K], got {shape}")
        if how is not None and not self.reads_maps:
            embedding = None if after.embedding is None else clone_as_float32(after.embedding)
            return ForwardOutput(clone_as_float32(logits), embedding=embedding, head=self.head(network))
        maps = {(stage.path, False): found for stage, found in zip(self.wanted.after, after.maps, strict=True)}
        maps |= {(stage.path, True): found for stage, found in zip(self.wanted.before, before.maps, strict=True)}
        return ForwardOutput(at_least_float32(logits), after.features, maps, after.embedding, self.head(network))

    def head(self, network: nn.Module) -> Head | None:
        """The parameters of the network's last linear layer, where they are wanted."""
        if self.wanted.head is None:
            return None
        linear = network.get_submodule(self.wanted.head)
        assert isinstance(linear, nn.Linear)  # that is how it was found
        return Head(linear.weight, linear.bias)
