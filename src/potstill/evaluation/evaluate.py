"""What a model says of every image of a split."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from potstill.errors import DataError, NonFiniteError, UsageError
from potstill.evaluation.averages import Array
from potstill.processes.group import ALONE, Processes
from potstill.types import Batch


class Listing(Protocol):
    """The part of a ``Loader`` that evaluation needs."""

    @property
    def count(self) -> int:
        """Images in the split."""

    def epoch(self) -> Iterator[Batch]:
        """Batches with ``index``, each image in one of them."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block: eval mode and no gradients; afterwards each submodule has its own mode back.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
        >>> with evaluating(net):
        ...     net.training, net[0].training
        (False, False)
        >>> net.training, net[0].training, net[1].training
        (True, True, False)
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: a module may keep what it computes here (position tables) and train with it later.
        with torch.no_grad():
            yield model
    finally:
        # Through train(), parents first: some networks override it to drop what they cached in eval mode.
        for module, mode in before:
            module.train(mode)


def collect(
    model: nn.Module,
    loader: Listing,
    *,
    classes: int,
    device: torch.device | str = "cpu",
    precision: Literal["float32", "bf16"] = "float32",
    processes: Processes = ALONE,
    names: Sequence[str] | Callable[[int], str] | None = None,
) -> tuple[Array, Array, Array]:
    """Ask ``model`` once for every image that ``loader`` lists, in eval mode and without gradients.

    Args:
        model: images [B, 3, S, S] -> logits [B, classes]; already on ``device``.
        loader: in listed order, without augmentation.
        classes: K.
        device: where the model is.
        precision: "bf16": the network runs under autocast; the softmax is always float32.
        processes: each of them has some of the batches; all get the answers to all.
        names: [N], of the images, for messages; or what gives the name of one.

    Returns:
        probabilities [N, K] float32, labels [N] int64 and index [N] int64 (0, 1, 2, ...); row i is image i.

    Raises:
        NonFiniteError: a logit is NaN or infinite; names the first such image.
        DataError: an image was left out or came twice.
        UsageError: logits of a wrong shape.
    """
    if precision not in ("float32", "bf16"):
        raise UsageError(f"precision must be float32 or bf16 here, got {precision!r}")
    kind = torch.device(device).type
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    with evaluating(model):
        for batch in loader.epoch():
            if batch.index is None:
                raise UsageError("to evaluate, the loader must number its images (Batch.index)")
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=precision == "bf16"):
                logits = model(batch.images)
            if logits.shape != (len(batch), classes):
                wanted = [len(batch), classes]
                raise UsageError(f"{type(model).__name__} must return logits {wanted}, got {list(logits.shape)}")
            logits = logits.float()
            # Kept on the device: copying each batch would wait for it.
            parts.append((logits.softmax(dim=1), logits.isfinite().all(dim=1), batch.labels, batch.index))
            processes.progress()
    own = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    every = [columns for columns in processes.gather(own) if columns]  # few images: some processes have none
    if not every:
        raise DataError("there is no image to evaluate")
    probabilities, finite, labels, index = (np.concatenate(column) for column in zip(*every, strict=True))
    check_complete(index, loader.count)
    order = np.argsort(index)
    if not finite.all():
        first = int(order[~finite[order]][0])
        count = int((~finite).sum())
        image = int(index[first])
        who = f"image {image}" if names is None else names(image) if callable(names) else names[image]
        raise NonFiniteError(f"a logit of {who} is NaN or infinite ({count} of {len(index)} images)")
    return probabilities[order], labels[order], index[order]


def check_complete(index: np.ndarray[Any, Any], count: int) -> None:
    """Check that each of ``count`` images was evaluated once.

    Raises:
        DataError: an image was left out or came twice.
    """
    seen = np.bincount(index, minlength=count)
    if len(seen) == count and (seen == 1).all():
        return
    left_out, twice = np.flatnonzero(seen[:count] == 0), np.flatnonzero(seen > 1)
    raise DataError(
        f"each of {count} images must be evaluated once: {len(left_out)} left out {left_out[:3].tolist()}, "
        f"{len(twice)} came twice {twice[:3].tolist()}, {max(0, len(seen) - count)} numbered above {count - 1}"
    )
