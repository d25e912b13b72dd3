"""What is read from one network's forward pass."""

from contextlib import nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.features.reading import Request, read
from potstill.features.stages import Stage
from potstill.joining.hastened import Asking, owned
from potstill.precision import at_least_float32
from potstill.types import Head, Outputs


@dataclass
class Said:
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
class Wanted:
    """What to read beside the logits."""

    after: tuple[Stage, ...] = ()  # maps as the stages put them out
    before: tuple[Stage, ...] = ()  # maps before the stages' last activation
    embedding: str | None = None  # path of the last linear layer, whose input is read
    head: str | None = None  # path of the last linear layer, whose parameters are shown
    taps: tuple[str, ...] = ()  # other submodules whose output is read


class Reader:
    """Asks a network for logits and whatever else is wanted.  It holds no network, so that copies stay apart."""

    def __init__(self, wanted: Wanted | None = None) -> None:
        self.wanted = wanted or Wanted()
        self.request = Request(self.wanted.after, embedding=self.wanted.embedding, taps=self.wanted.taps)
        self.request_before = Request(self.wanted.before, before_activation=True)

    @property
    def reads_maps(self) -> bool:
        """Whether more than logits, embedding and head is wanted."""
        return bool(self.wanted.after or self.wanted.before or self.wanted.taps)

    def ask(self, network: nn.Module, images: Tensor, how: Asking | None = None) -> Said:
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
            read(network, self.request) as after,
            read(network, self.request_before) as before,
        ):
            logits = network(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UsageError(f"{type(network).__name__} must return logits [B, K], got {shape}")
        if how is not None and not self.reads_maps:
            embedding = None if after.embedding is None else owned(after.embedding)
            return Said(owned(logits), embedding=embedding, head=self.head(network))
        maps = {(stage.path, False): found for stage, found in zip(self.wanted.after, after.maps, strict=True)}
        maps |= {(stage.path, True): found for stage, found in zip(self.wanted.before, before.maps, strict=True)}
        return Said(at_least_float32(logits), after.features, maps, after.embedding, self.head(network))

    def head(self, network: nn.Module) -> Head | None:
        """The parameters of the network's last linear layer, where they are wanted."""
        if self.wanted.head is None:
            return None
        linear = network.get_submodule(self.wanted.head)
        assert isinstance(linear, nn.Linear)  # that is how it was found
        return Head(linear.weight, linear.bias)
