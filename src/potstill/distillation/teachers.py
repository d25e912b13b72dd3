"""One teacher or several, frozen, with their outputs combined."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from potstill.distillation.cross_fitting import FoldHeads
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

CombineMode = Literal["logits", "probabilities"]


@dataclass(frozen=True)
class InferenceConversion:
    """What became of one teacher.

    Attributes:
        how: it is asked from now on; None: as autocast says, as before.
        fidelity: of the converted network to the float32 one; None where there was nothing to compare.
        note: for people.
    """

    how: InferenceSettings | None
    fidelity: Fidelity | None
    note: str


class Teachers(nn.Module):
    """Frozen networks whose answers are combined.

    Args:
        networks: M of them; each maps its own kind of images to logits [B, K], the same classes in the same order.
        converts: for each, what makes its images of the student's.
        weights: for each, its share in the combination; equal where None.
        combine: mean the "logits", or the "probabilities" (whose logarithms are the logits then).

    Raises:
        UsageError: weights that are not one number of at least 0 for each, or all 0; an unknown combination.
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
        self.readers = [FeatureExtractor() for _ in self.networks]
        self.fold_heads = nn.ModuleDict()  # of those that are cross-fitted, by their position
        self.asking: list[InferenceSettings | None] = [None] * len(self.networks)  # how; None: as autocast says
        if combine not in ("logits", "probabilities"):
            raise UsageError(f"teachers are combined by logits or probabilities, got {combine!r}")
        self.combine = combine
        self._shows_embedding: dict[int, bool] = {}
        shares = [1.0] * len(self.networks) if weights is None else list(weights)
        if len(shares) != len(self.networks) or min(shares) < 0 or sum(shares) <= 0:
            raise UsageError(f"give each of the {len(self.networks)} teachers a weight of at least 0, got {shares}")
        self.shares = [share / sum(shares) for share in shares]
        self.train(False)

    def __len__(self) -> int:
        return len(self.networks)

    def train(self, mode: bool = True) -> "Teachers":
        """Always eval mode: BatchNorm statistics of a teacher must not drift, and its dropout must rest."""
        return super().train(False)

    def cross_fit(self, at: int, heads: FoldHeads) -> None:
        """Let one of them answer training images by heads that have not seen their labels."""
        reader = self.readers[at]
        self.readers[at] = FeatureExtractor(replace(reader.wanted, embedding=heads.layer))
        self.fold_heads[str(at)] = heads
        self._shows_embedding[at] = reader.wanted.embedding is not None

    @torch.no_grad()
    def ask(
        self, images: Tensor, own: Sequence[Tensor | None] = (), index: Tensor | None = None
    ) -> list[ForwardOutput]:
        """The outputs of each.

        Args:
            images: [B, 3, H, W], prepared for the student.
            own: for each teacher the same images prepared for it, at its own size; None, or an empty sequence:
                ``images``, converted.
            index: [B] int64 sample ids, where these are training images: a cross-fitted teacher then answers each by
                the head of its fold.

        Raises:
            UsageError: they know different numbers of classes.
        """
        if any(module.training for module in self.networks.modules()):  # somebody has called train() on a teacher
            self.train()
        said = [
            reader.ask(network, converted(images) if prepared is None else prepared, how)
            for network, converted, prepared, reader, how in zip(
                self.networks,
                self.input_converters,
                own or [None] * len(self.networks),
                self.readers,
                self.asking,
                strict=True,
            )
        ]
        said = [self._cross_fitted(at, one, index) for at, one in enumerate(said)]
        classes = sorted({one.logits.shape[1] for one in said})
        if len(classes) > 1:
            raise UsageError(f"the teachers know different numbers of classes: {classes}")
        return said

    def combined(self, said: list[ForwardOutput]) -> Tensor:
        """Their common logits [B, K]."""
        if len(said) == 1:
            return said[0].logits
        stacked = torch.stack([one.logits for one in said])
        # Made on a GPU, they would be waited for.
        shares = torch.tensor(self.shares, dtype=stacked.dtype).to(stacked.device, non_blocking=True).view(-1, 1, 1)
        if self.combine == "logits":
            return (shares * stacked).sum(dim=0)
        return torch.logsumexp(stacked.log_softmax(dim=2) + shares.log(), dim=0)

    def optimize_for_inference(
        self, dtype: torch.dtype, memory_format: torch.memory_format, example: Tensor
    ) -> list[str]:
        """Put faster copies in the teachers' places, where these agree with them; the originals are let go, unchanged.

        BatchNorm is folded, weights are of another dtype, and autograd keeps no books.  Teachers whose maps are read
        stay as they are.

        Args:
            dtype: of the weights: bfloat16 where the hardware is fast in it, else float32.
            memory_format: of weights and images.
            example: images prepared for the student, [N, 3, H, W]; on all of them the copies must agree.

        Returns:
            For people, of each teacher: what was done, or why not.
        """
        return [
            self.optimize_one_for_inference(at, dtype, memory_format, converted(example)).note
            for at, converted in enumerate(self.input_converters)
        ]

    @torch.no_grad()
    def optimize_one_for_inference(
        self,
        at: int,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        example: Tensor,
        *,
        least: float = MIN_AGREEMENT,
        known: Fidelity | None = None,
    ) -> InferenceConversion:
        """The same for one of them.

        Args:
            at: which.
            dtype: see ``hasten``.
            memory_format: see ``hasten``.
            example: images prepared for this teacher, [N, 3, H, W]; a few suffice where ``known`` is given.
            least: agreement with which the copy takes the teacher's place.
            known: what a comparison on these images gave before; it is not made again.
        """
        network = self.networks[at]
        if reason := self._reason_to_keep(at):
            return InferenceConversion(self.asking[at], None, reason)
        if known is not None and not known.agreement >= least:
            return self._kept(at, dtype, memory_format, known)
        try:
            copied, how = convert_for_inference(network, dtype, memory_format, example)
            found = known or measure_fidelity(copied, how, network, example)
        except Exception as error:  # in another dtype, networks of others fail in any way they like
            self.in_float32(at, memory_format)
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return InferenceConversion(
                self.asking[at], None, f"asked in float32, since it could not be converted: {why}"
            )
        if not found.agreement >= least:
            return self._kept(at, dtype, memory_format, found)
        head = self.readers[at].head(copied)
        if head is not None and head.weight.dtype != torch.float32:
            self.in_float32(at, memory_format)
            return InferenceConversion(
                self.asking[at], found, "asked in float32, since the method reads a head that is not its end"
            )
        self.networks[at], self.asking[at] = copied, how
        return InferenceConversion(how, found, f"asked in {how}: agrees with float32 on {_format_fidelity(found)}")

    def in_float32(self, at: int, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        """Ask one of them as it is, in float32, whatever autocast says."""
        self.asking[at] = InferenceSettings(memory_format=memory_format)

    def _cross_fitted(self, at: int, said: ForwardOutput, index: Tensor | None) -> ForwardOutput:
        """What one says, with the logits of the fold's head where it has such."""
        if str(at) not in self.fold_heads:
            return said
        assert said.embedding is not None  # ``cross_fit`` has asked for it
        logits = said.logits if index is None else self.fold_heads[str(at)](said.embedding, index)
        return replace(said, logits=logits, embedding=said.embedding if self._shows_embedding[at] else None)

    def _reason_to_keep(self, at: int) -> str:
        """Why a teacher stays as it is; empty where nothing speaks against it."""
        if (how := self.asking[at]) is not None:
            return f"asked in {how} already"
        if self.readers[at].reads_maps:
            return "asked as autocast says, since its feature maps are read"
        others = {str(each.dtype) for each in self.networks[at].parameters()} - {"torch.float32"}
        return f"asked as it is, since it has weights in {', '.join(sorted(others))}" if others else ""

    def _kept(
        self, at: int, dtype: torch.dtype, memory_format: torch.memory_format, found: Fidelity
    ) -> InferenceConversion:
        self.in_float32(at, memory_format)
        tried = InferenceSettings(dtype).facts()["precision"]
        return InferenceConversion(
            self.asking[at], found, f"asked in float32: in {tried} it would agree only on {_format_fidelity(found)}"
        )


def _format_fidelity(found: Fidelity) -> str:
    share = format_percent(found.agreement)
    return f"{share} of {found.images} images, largest logit difference {found.largest:.2g}"
