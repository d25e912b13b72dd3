"""Processes that decode images which do not fit into memory.

They only decode and resize: views are drawn in the main process, so that results cannot depend on their number.
"""

import signal
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from potstill.data.images import ImageSet
from potstill.data.packed import squares
from potstill.errors import DataError, WorkerError
from potstill.processes.launch import TIMEOUT, timeout

_SHOWN = 3  # images that a message names


class Workers:
    """``squares(batches)`` gives the batches' pixels in order, one epoch at a time; the processes live as long as this
    object.

    They end with the main process, even if that is killed: torch's workers look for their parent every few seconds.

    Args:
        images: an image set that can be pickled.
        side: R.
        how: "crop", "pad" or "stretch".
        processes: at least 1.
    """

    def __init__(self, images: ImageSet, side: int, how: str, processes: int) -> None:
        self._batches, self._names = _Batches(), images.names
        with warnings.catch_warnings():
            # How many processes are sensible is said in the settings.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            self._loader = DataLoader(
                _Squares(images, side, how),
                batch_sampler=self._batches,
                collate_fn=_same,
                num_workers=processes,
                prefetch_factor=2,
                persistent_workers=True,
                timeout=timeout(),
                # torch's base seed comes from here, so that the global generator is left as it was
                generator=torch.Generator().manual_seed(0),
                worker_init_fn=_leave_signals,
            )

    def squares(self, batches: list[list[int]]) -> Iterator[Tensor]:
        """uint8 [B, 3, R, R] for each batch of sample ids.

        Raises:
            DataError: an image cannot be decoded.
            WorkerError: a process has died, or has not answered for ``POTSTILL_TIMEOUT`` seconds.
        """
        self._batches.lists = batches
        taken = 0
        try:
            for found in self._loader:
                if isinstance(found, str):
                    raise DataError(found)
                taken += 1
                yield found
        except RuntimeError as error:
            # torch: "DataLoader worker (pid(s) 123) exited unexpectedly", "DataLoader timed out after 600 seconds"
            if "DataLoader" not in str(error):
                raise
            timed_out = "timed out" in str(error)
            what = f"has not answered for {timeout():g} seconds" if timed_out else "has died"
            way_out = (
                f"Storage that is only slow needs another {TIMEOUT} (seconds, in the environment)"
                if timed_out
                else "It may have been killed for lack of memory; try data.workers=0, or a smaller batch_size"
            )
            raise WorkerError(
                f"a process that decodes images {what}; the next images were {self._listed(batches[taken])}\n{way_out}"
            ) from error

    def _listed(self, ids: list[int]) -> str:
        names = [self._names[i] for i in ids[:_SHOWN]]
        return ", ".join(names) + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")


class _Batches:
    """The batch sampler: the lists of the current epoch."""

    def __init__(self) -> None:
        self.lists: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.lists)

    def __len__(self) -> int:
        return len(self.lists)


class _Squares(Dataset[Tensor | str]):
    """Batches of fitted pixels; an image that cannot be decoded comes back as the sentence that says so, since an
    exception would lose its type on the way between processes.
    """

    def __init__(self, images: ImageSet, side: int, how: str) -> None:
        self.images, self.side, self.how = images, side, how

    def __getitems__(self, index: list[int]) -> Tensor | str:
        try:
            return squares(self.images, index, self.side, self.how)
        except DataError as error:
            return str(error)

    def __getitem__(self, index: int) -> Tensor | str:
        return self.__getitems__([index])


def _leave_signals(_: int) -> None:
    """Ctrl-C at a terminal reaches every process: the main one finishes its step first, and needs the others for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the main process's handler


def _same(found: Any) -> Any:
    return found
