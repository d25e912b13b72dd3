"""One teacher or several, frozen, with their outputs combined."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.distillation.feature_extractor import FeatureExtractor, ForwardOutput
from potstill.distillation.teacher_inference import (
    MIN_AGREEMENT,
    Fidelity,
    InferenceSettings,
    convert_for_inference,
    measure_fidelity,
)
from potstill.errors import UsageError
from potstill.formatting import format_percent


class FoldHeads(nn.Module):
    """Cross-fitted linear heads of one frozen encoder, chosen by sample id.

    The logits of each training image come from a head that was fitted without its label.  A linear head with as many
    weights as a probe nearly memorises its training labels: its outputs for these images are the labels again, and a
    student learns nothing more from them.  So the training images are divided into folds, and each fold has a head
    that was fitted on the others (cross-fitting: Chernozhukov et al., "Double/debiased machine learning", 2018,
    https://arxiv.org/abs/1608.00060; for distillation: Dao et al., "Knowledge distillation as semiparametric
    inference", ICLR 2021, https://arxiv.org/abs/2104.09732).

    Args:
        layer: path of the linear layer whose input they read, as in ``named_modules``.
        weight: [F + 1, K, D]; head f was fitted without the images of fold f, the last one with all.
        bias: [F + 1, K].
        fold: [N] int64, the fold of each training image: 0 to F - 1, or F if it has no label.

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
        """Return logits [B, K] in float32.

        Args:
            embedding: [B, D].
            index: [B] int64 sample ids; ids from N on are no training images and get the last head.
        """
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
    """Result of ``Teachers.optimize_one_for_inference``.

    Attributes:
        settings: precision and layout in which the teacher runs from now on; None: those of autocast, as before.
        fidelity: of the converted network to the float32 one; None if nothing was compared.
        note: what was done, or why not, as text.
    """

    settings: InferenceSettings | None
    fidelity: Fidelity | None
    note: str


class Teachers(nn.Module):
    """Frozen networks whose outputs are combined.

    Args:
        networks: M networks; each maps images preprocessed for it to logits [B, K], the same classes in the same order.
        input_converters: one for each network; converts the student's images to its input.
        weights: of each network in the combination; None: equal.
        combine: whether the "logits" or the "probabilities" are averaged; the combined logits are then the logarithms
            of the probabilities.

    Raises:
        UsageError: weights that are not one number of at least 0 for each network, or all 0; an unknown ``combine``.
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
        """Return the outputs of each teacher.

        Args:
            images: [B, 3, H, W], preprocessed for the student.
            prepared: for each teacher the same images preprocessed for it, at its own size; None, or an empty
                sequence: ``images``, converted.
            index: [B] int64 sample ids, if these are training images: a cross-fitted teacher then uses for each the
                head of its fold.

        Raises:
            UsageError: the teachers have different numbers of classes.
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
        shares = torch.tensor(self.shares, dtype=stacked.dtype).to(stacked.device, non_blocking=True).view(-1, 1, 1)
        if self.combine == "logits":
            return (shares * stacked).sum(dim=0)
        return torch.logsumexp(stacked.log_softmax(dim=2) + shares.log(), dim=0)

    def optimize_for_inference(
        self, dtype: torch.dtype, memory_format: torch.memory_format, example: Tensor
    ) -> list[str]:
        """Replace teachers by faster copies if these agree with them; the original modules are not modified.

        BatchNorm is folded, weights are converted to ``dtype``, and autograd records nothing.  Teachers whose feature
        maps are read are kept.

        Args:
            dtype: of the weights: bfloat16 if the hardware is fast in it, else float32.
            memory_format: of weights and images.
            example: images preprocessed for the student, [N, 3, H, W], on which copy and original are compared.

        Returns:
            For each teacher what was done, or why not, as text.
        """
        return [
            self.optimize_one_for_inference(position, dtype, memory_format, convert(example)).note
            for position, convert in enumerate(self.input_converters)
        ]

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
        """Replace one teacher by a faster copy if it agrees with the original.

        Args:
            position: of the teacher.
            dtype: see ``optimize_for_inference``.
            memory_format: see ``optimize_for_inference``.
            example: images preprocessed for this teacher, [N, 3, H, W]; a few suffice if ``fidelity`` is given.
            min_agreement: share of images with the same top class from which the copy is used.
            fidelity: of an earlier comparison on these images, which is then not repeated.
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
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return InferenceConversion(float32, None, f"runs in float32, since it could not be converted: {reason}")
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
