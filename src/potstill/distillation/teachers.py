"""What is read of a network in one forward pass; and teachers: frozen, with outputs combined, and images of their size.

``FeatureExtractor`` returns logits, feature maps, embedding and head of one network, student or teacher.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.distillation.teacher_inference import (
    MIN_AGREEMENT,
    Fidelity,
    InferenceSettings,
    clone_as_float32,
    convert_for_inference,
    measure_fidelity,
)
from potstill.errors import UsageError, first_line
from potstill.features.hooks import CapturedFeatures, FeatureRequest, capture_features
from potstill.features.stages import Stage
from potstill.formatting import format_percent
from potstill.types import Batch, Head, Outputs, at_least_float32

if TYPE_CHECKING:
    from potstill.data.loader import Loader


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
        """Run one forward pass and return what was requested; UsageError if it gives no logits [B, K]."""
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
        if not self.reads_maps:
            embedding = after.embedding
            if settings is not None:
                logits, embedding = clone_as_float32(logits), None if embedding is None else clone_as_float32(embedding)
            return ForwardOutput(at_least_float32(logits), embedding=embedding, head=self.head(network))
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


class FoldHeads(nn.Module):
    """Cross-fitted linear heads of one frozen encoder, chosen by sample id.

    The logits of each training image come from a head that was fitted without its label.  A linear head with as many
    weights as a probe nearly memorises its training labels: its outputs for these images are the labels again, and a
    student learns nothing more from them.  So the training images are divided into folds, and each fold has a head
    that was fitted on the others (cross-fitting: Chernozhukov et al., "Double/debiased machine learning", 2018,
    https://arxiv.org/abs/1608.00060; for distillation: Dao et al., "Knowledge distillation as semiparametric
    inference", ICLR 2021, https://arxiv.org/abs/2104.09732).

    ``layer`` is the path of the linear layer whose input they read; ``weight`` [F + 1, K, D] and ``bias`` [F + 1, K] of
    head f were fitted without fold f, of the last one with all; ``fold`` is [N] int64, F without a label.

    Example:
        >>> weight = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]], [[5.0], [5.0]]])  # two folds, K = 2, D = 1
        >>> heads = FoldHeads("head", weight, torch.zeros(3, 2), torch.tensor([1, 0]))
        >>> heads(torch.ones(3, 1), torch.tensor([0, 1, 2]))  # id 2 is no training image
        tensor([[0., 1.],
                [1., 0.],
                [5., 5.]])
    """

    weight: Tensor
    bias: Tensor
    fold: Tensor

    def __init__(self, layer: str, weight: Tensor, bias: Tensor, fold: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("fold", fold)

    def forward(self, embedding: Tensor, index: Tensor) -> Tensor:
        """Return logits [B, K] in float32; sample ids [B] from N on are no training images and get the last head."""
        count, classes, width = self.weight.shape
        with torch.autocast(embedding.device.type, enabled=False):
            # All heads at once: cheap beside the encoder, and no synchronisation for the sizes of the folds.
            logits = F.linear(embedding.float(), self.weight.view(-1, width), self.bias.view(-1))
        in_training = index < len(self.fold)
        chosen = torch.where(in_training, self.fold[index.clamp(max=len(self.fold) - 1)], count - 1)
        return logits.view(-1, count, classes)[torch.arange(len(index), device=index.device), chosen]


CombineMode = Literal["logits", "probabilities"]


@dataclass(frozen=True)
class InferenceConversion:
    """Result of ``Teachers.optimize_one_for_inference``."""

    settings: InferenceSettings | None  # from now on; None: those of autocast, as before
    fidelity: Fidelity | None  # to the float32 network; None if nothing was compared
    note: str  # what was done, or why not


class Teachers(nn.Module):
    """Frozen networks for the same K classes whose outputs are combined, weighted or equally.

    ``input_converters`` turn the student's images into each network's.  ``combine`` averages the "logits" or the
    "probabilities"; the combined logits are then the logarithms of the probabilities.
    """

    def __init__(
        self,
        networks: Iterable[nn.Module],
        input_converters: Iterable[nn.Module],
        *,
        weights: Sequence[float] | None = None,
        combine: CombineMode = "logits",
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(network.requires_grad_(False) for network in networks)
        self.input_converters = nn.ModuleList(input_converters)
        self.extractors = [FeatureExtractor() for _ in self.networks]
        self.fold_heads = nn.ModuleDict()  # of the cross-fitted teachers, by position
        self.inference_settings: list[InferenceSettings | None] = [None] * len(self.networks)  # None: those of autocast
        if combine not in ("logits", "probabilities"):
            raise UsageError(f"combine must be 'logits' or 'probabilities', got {combine!r}")
        self.combine = combine
        self._returns_embedding: dict[int, bool] = {}
        shares = [1.0] * len(self.networks) if weights is None else list(weights)
        if len(shares) != len(self.networks) or min(shares) < 0 or sum(shares) <= 0:
            raise UsageError(f"give each of the {len(self.networks)} teachers a weight of at least 0, got {shares}")
        self.shares = [share / sum(shares) for share in shares]
        self.train(False)

    def __len__(self) -> int:
        return len(self.networks)

    def train(self, mode: bool = True) -> "Teachers":
        """Keep eval mode, whatever ``mode``: BatchNorm statistics must not change, nor dropout be active."""
        return super().train(False)

    def use_fold_heads(self, position: int, heads: FoldHeads) -> None:
        """Compute one teacher's logits of training images by heads that were fitted without their labels."""
        request = self.extractors[position].request
        self.extractors[position] = FeatureExtractor(replace(request, embedding=heads.layer))
        self.fold_heads[str(position)] = heads
        self._returns_embedding[position] = request.embedding is not None

    @torch.no_grad()
    def run(
        self, images: Tensor, prepared: Sequence[Tensor | None] = (), index: Tensor | None = None
    ) -> list[ForwardOutput]:
        """Return the outputs of each teacher for images [B, 3, H, W] of the student, or for those ``prepared`` at its
        own size.

        ``index``: [B] int64 sample ids of training images: a cross-fitted teacher then uses for each the head of its
        fold.
        """
        if any(module.training for module in self.networks.modules()):  # after train() was called on a teacher
            self.train()
        outputs = [
            extractor.run(network, convert(images) if own is None else own, settings)
            for network, convert, own, extractor, settings in zip(
                self.networks,
                self.input_converters,
                prepared or [None] * len(self.networks),
                self.extractors,
                self.inference_settings,
                strict=True,
            )
        ]
        outputs = [self._apply_fold_heads(position, output, index) for position, output in enumerate(outputs)]
        classes = sorted({output.logits.shape[1] for output in outputs})
        if len(classes) > 1:
            raise UsageError(f"the teachers have different numbers of classes: {classes}")
        return outputs

    def combine_logits(self, outputs: list[ForwardOutput]) -> Tensor:
        """Return the combined logits [B, K]."""
        if len(outputs) == 1:
            return outputs[0].logits
        stacked = torch.stack([output.logits for output in outputs])
        # Created on the CPU: creating it on a GPU would synchronise.
        shares = torch.tensor(self.shares, dtype=stacked.dtype)
        shares = shares.to(stacked.device, non_blocking=stacked.is_cuda).view(-1, 1, 1)
        if self.combine == "logits":
            return (shares * stacked).sum(dim=0)
        return torch.logsumexp(stacked.log_softmax(dim=2) + shares.log(), dim=0)

    @torch.no_grad()
    def optimize_one_for_inference(
        self,
        position: int,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        example: Tensor,
        *,
        min_agreement: float = MIN_AGREEMENT,
        fidelity: Fidelity | None = None,
    ) -> InferenceConversion:
        """Replace one teacher by a faster copy if it agrees with the original, which is not modified.

        BatchNorm is folded, weights are converted to ``dtype``, and autograd records nothing.  A teacher whose feature
        maps are read is kept.  It agrees if a share ``min_agreement`` of ``example`` [N, 3, H, W] has the same top
        class, or by the ``fidelity`` of an earlier comparison.
        """
        network = self.networks[position]
        if reason := self._reason_to_keep(position):
            return InferenceConversion(self.inference_settings[position], None, reason)
        if fidelity is not None and not fidelity.agreement >= min_agreement:
            return self._keep_float32(position, dtype, memory_format, fidelity)
        try:
            copied, settings = convert_for_inference(network, dtype, memory_format, example)
            fidelity = fidelity or measure_fidelity(copied, settings, network, example)
        except Exception as error:  # a foreign network may raise anything in another dtype
            float32 = self.use_float32(position, memory_format)
            why = f"runs in float32, since it could not be converted: {first_line(error)}"
            return InferenceConversion(float32, None, why)
        if not fidelity.agreement >= min_agreement:
            return self._keep_float32(position, dtype, memory_format, fidelity)
        head = self.extractors[position].head(copied)
        if head is not None and head.weight.dtype != torch.float32:
            float32 = self.use_float32(position, memory_format)
            reason = "the method reads a linear layer that is not the network's last"
            return InferenceConversion(float32, fidelity, f"runs in float32, since {reason}")
        self.networks[position], self.inference_settings[position] = copied, settings
        return InferenceConversion(settings, fidelity, f"runs in {settings} ({_format_fidelity(fidelity)})")

    def use_float32(
        self, position: int, memory_format: torch.memory_format = torch.contiguous_format
    ) -> InferenceSettings:
        """Run one teacher in float32, unconverted and independent of autocast; return its settings."""
        self.inference_settings[position] = settings = InferenceSettings(memory_format=memory_format)
        return settings

    def compile(self, images: Tensor, **options: Any) -> list[str]:  # type: ignore[override]
        """Compile the networks whose hidden layers are not read, and run each once; return a sentence on each."""
        notes = []
        for position, (network, convert) in enumerate(zip(self.networks, self.input_converters, strict=True)):
            extractor, settings = self.extractors[position], self.inference_settings[position]
            if extractor.uses_hooks:
                notes.append("not compiled: its hidden layers are read")
                continue

            def call(*inputs: Any, network: nn.Module = network) -> Any:
                return network._call_impl(*inputs)  # type: ignore[no-untyped-call]

            # ``network.compile()`` of torch 2.11 leaves classes of torch's own, such as Sequential, as they are.
            network._compiled_call_impl = torch.compile(call, **options)
            try:
                with torch.no_grad():
                    extractor.run(network, convert(images), settings)
                notes.append("compiled")
            except Exception as error:  # compilers raise anything
                network._compiled_call_impl = None
                notes.append(f"not compiled: {first_line(error)}")
        return notes

    def _apply_fold_heads(self, position: int, output: ForwardOutput, index: Tensor | None) -> ForwardOutput:
        """Return a teacher's output with the logits of the folds' heads, if it has such."""
        if str(position) not in self.fold_heads:
            return output
        assert output.embedding is not None  # requested by ``use_fold_heads``
        logits = output.logits if index is None else self.fold_heads[str(position)](output.embedding, index)
        embedding = output.embedding if self._returns_embedding[position] else None
        return replace(output, logits=logits, embedding=embedding)

    def _reason_to_keep(self, position: int) -> str:
        """Return why a teacher cannot be converted; empty if it can."""
        if (settings := self.inference_settings[position]) is not None:
            return f"runs in {settings} already"
        if self.extractors[position].reads_maps:
            return "runs under autocast, since its feature maps are read"
        others = {str(each.dtype) for each in self.networks[position].parameters()} - {"torch.float32"}
        return f"runs unconverted, since it has weights in {', '.join(sorted(others))}" if others else ""

    def _keep_float32(
        self, position: int, dtype: torch.dtype, memory_format: torch.memory_format, fidelity: Fidelity
    ) -> InferenceConversion:
        float32 = self.use_float32(position, memory_format)
        precision = InferenceSettings(dtype).facts()["precision"]
        note = f"runs in float32; {precision} is too inaccurate ({_format_fidelity(fidelity)})"
        return InferenceConversion(float32, fidelity, note)


def _format_fidelity(fidelity: Fidelity) -> str:
    share = format_percent(fidelity.agreement)
    return (
        f"same top class as float32 on {share} of {fidelity.images} images, "
        f"largest logit difference {fidelity.largest:.2g}"
    )


class TeacherImages(NamedTuple):
    """For each teacher its images of a batch, [B, 3, S, S], prepared for it; None: the student's images, converted."""

    images: tuple[Tensor | None, ...]
    second: tuple[Tensor | None, ...]


class TeacherViews:
    """The images of a split's batches for teachers of other sizes, in step with the student's loader.

    They are decoded on request, so that cached outputs cost no decoding.  Each of ``loaders`` has the order and views
    of the student's, at a teacher's size (``drawn_for``); None if that is the student's.
    """

    def __init__(
        self, loaders: Sequence["Loader | None"], memory_format: torch.memory_format = torch.contiguous_format
    ) -> None:
        self.loaders, self.memory_format = tuple(loaders), memory_format
        self._epoch, self._position = 0, -1
        self._batches: dict[Loader, Iterator[Batch]] = {}
        self._last: TeacherImages | None = None

    def start_epoch(self, epoch: int, step: int = 0) -> None:
        """Start the epoch at its batch number ``step``, from 0."""
        self._batches.clear()
        self._epoch, self._position, self._last = epoch, step - 2, None  # no batch is the next one

    def at(self, position: int, index: Tensor, view: int | Tensor) -> TeacherImages:
        """Return the images of the epoch's batch number ``position``, from 0, of this process; positions must increase.

        The batch after the last one comes from the loader's epoch, which decodes ahead; any other is decoded alone.
        """
        if position != self._position or self._last is None:
            is_next = position == self._position + 1
            if not is_next:
                self._batches.clear()
            batches = {
                loader: self._load(loader, position, index, view, is_next)
                for loader in dict.fromkeys(self.loaders)
                if loader is not None
            }
            pairs = [(None, None) if loader is None else batches[loader] for loader in self.loaders]
            self._last = TeacherImages(tuple(images for images, _ in pairs), tuple(second for _, second in pairs))
            self._position = position
        return self._last

    def of(self, position: int, batch: Batch) -> TeacherImages:
        """Return the images of the student's batch number ``position``."""
        assert batch.index is not None  # a Loader gives them
        assert batch.view is not None
        return self.at(position, batch.index, batch.view)

    def _load(
        self, loader: "Loader", position: int, index: Tensor, view: int | Tensor, is_next: bool
    ) -> tuple[Tensor, Tensor | None]:
        if is_next:
            if loader not in self._batches:
                self._batches[loader] = loader.epoch(self._epoch, position)
            batch = next(self._batches[loader])
            images, second = batch.images, batch.second
        else:
            images = loader.view(index, view)
            second = None if loader.second == "none" else loader.second_view(index, view)
        return self._to_memory_format(images), None if second is None else self._to_memory_format(second)

    def _to_memory_format(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self.memory_format)
