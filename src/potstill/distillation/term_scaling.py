"""Keep terms on hidden layers from outweighing what the logits learn, whatever the length of the training.

The weights of papers belong to long trainings of certain networks: attention transfer's 1000, in 8 epochs, moves the
student's weights many times as far as the labels do.  How far a term moves them is the norm of its gradient with
respect to the student's parameters; the value of a loss does not say it (a constant changes the value and no step).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from potstill.types import widest_float

MEASURED_STEPS = (
    4  # at the start of each epoch; each costs a backward pass for each term on hidden layers, and one more
)


class TermScaling(nn.Module):
    r"""Multiply each term on hidden layers by at most 1, such that its gradient is no longer than that of the others.

    A term is one on hidden layers if it does not depend on the student's logits.  All others (labels, soft targets)
    are the reference and keep their weights.  In each of the first ``MEASURED_STEPS`` training steps of an epoch, g is
    the norm of the term's gradient with respect to the student's parameters, and r that of the gradient of the
    reference with respect to the same parameters, those that the term reaches.  The factor is

    .. math:: \min(1, \sum r / \sum g)

    with sums over these steps and all processes, from the first of them on; it stays until the next epoch begins.  So
    warm-ups and schedules count, and a term fades as the labels are learnt.  Without a reference (a method that trains
    hidden layers alone, or does so first) and for a term without gradient the factor is 1.

    The state is in the state dict: a training that is resumed goes on with the same factors.  Sums and factors stay on
    the device, so that no step waits for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0  # measured in this epoch
        self._sums: dict[str, Tensor] = {}  # by term: the sums of g and of r, [2]
        self._factors: dict[str, Tensor] = {}

    @property
    def factors(self) -> dict[str, float]:
        """The factors of the last step, by name of the term; waits for the device."""
        return {name: float(factor) for name, factor in self._factors.items()}

    def start_epoch(self) -> None:
        """Measure anew; the factors stay until then."""
        self.steps, self._sums = 0, {}

    def forward(
        self, terms: Mapping[str, Tensor], logits: Tensor, parameters: Sequence[nn.Parameter]
    ) -> dict[str, Tensor]:
        """Return the terms, multiplied with their factors.

        Args:
            terms: scalars by name.
            logits: the student's, [B, K], of which the terms were computed.
            parameters: the student's; those that are not trained are ignored.
        """
        if self.training and torch.is_grad_enabled() and self.steps < MEASURED_STEPS:
            self.steps += 1
            self._measure(terms, logits, [each for each in parameters if each.requires_grad])
        return {
            name: term * self._factors[name].to(term.dtype) if name in self._factors else term
            for name, term in terms.items()
        }

    def _measure(self, terms: Mapping[str, Tensor], logits: Tensor, parameters: list[nn.Parameter]) -> None:
        trained = {name: term for name, term in terms.items() if term.requires_grad}
        on_logits = [term for term in trained.values() if _gradients(term, [logits])[0] is not None]
        hidden = [name for name, term in trained.items() if all(term is not each for each in on_logits)]
        if not (on_logits and hidden and parameters):
            self._factors = {}
            return
        reference = _gradients(torch.stack([term.float() for term in on_logits]).sum(), parameters)
        rows = []
        for name in hidden:
            own = _gradients(trained[name], parameters)
            rows.append(_norm(own))
            rows.append(_norm([theirs for theirs, ours in zip(reference, own, strict=True) if ours is not None]))
        measured = torch.stack([row.to(logits.device, non_blocking=logits.is_cuda) for row in rows])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(measured)
        for name, norms in zip(hidden, measured.to(widest_float(measured.device)).view(-1, 2), strict=True):
            if name in self._sums:
                norms = norms + self._sums[name].to(norms)
            self._sums[name], (size, limit) = norms, norms.unbind()
            # 1 also where a sum is infinite or NaN: the loss itself is what is refused then.
            self._factors[name] = torch.where(limit < size, limit / size, 1.0)

    def get_extra_state(self) -> Tensor:
        """Return the state as the bytes of a JSON text, since checkpoints hold tensors."""
        sums = {name: norms.tolist() for name, norms in self._sums.items()}
        text = json.dumps([self.steps, sums, self.factors])
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Load what ``get_extra_state`` returned."""
        self.steps, sums, factors = json.loads(bytes(state.tolist()))
        self._sums = {name: torch.tensor(norms, dtype=torch.float64) for name, norms in sums.items()}
        self._factors = {name: torch.tensor(factor, dtype=torch.float64) for name, factor in factors.items()}


def _gradients(value: Tensor, of: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(value, list(of), retain_graph=True, allow_unused=True)


def _norm(gradients: Sequence[Tensor | None]) -> Tensor:
    """Return the norm of all gradients together."""
    norms = [torch.linalg.vector_norm(each.float()) for each in gradients if each is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
