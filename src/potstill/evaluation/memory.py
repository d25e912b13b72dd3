"""How much memory a network takes to answer: its weights, and what is alive at once while it computes."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from potstill.evaluation.evaluate import evaluating
from potstill.inputs import InputSpec


def memory(module: nn.Module, spec: InputSpec, batch: int = 1) -> dict[str, int]:
    """Bytes of ``weights`` (parameters and buffers) and of ``activations``: the most that the tensors of one forward
    pass take at the same time, the images among them.

    Tensors are counted as they are made and freed.  What a library takes for itself inside an operation (cuDNN's or
    oneDNN's work space) is not among them.

    Args:
        module: images [B, 3, H, W] -> logits.
        spec: the images' size.
        batch: images at once.
    """
    kept = [*module.parameters(), *module.buffers()]
    weight = next((each for each in kept if each.is_floating_point()), torch.zeros(0))
    with evaluating(module), _Alive() as alive:
        images = torch.zeros(batch, 3, spec.size, spec.size, device=weight.device, dtype=weight.dtype)
        module(images)
    return {
        "weights": sum(each.numel() * each.element_size() for each in kept),
        "activations": alive.most,
        "batch": batch,
    }


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of storages that came to be here, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for each in tree_leaves((args, kwargs)):
            self._meet(each, 0)  # made before: weights
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            self._meet(each, 1)
        self.most = max(self.most, self.now)
        return result

    def _meet(self, value: Any, times: int) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key, size = id(storage), times * storage.nbytes()
        if key in self._known and self._known[key]() is storage:
            return

        def freed(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
