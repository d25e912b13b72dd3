"""Everything that a resumed training needs, written now and then."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from potstill.distiller import Distiller
from potstill.errors import ArtifactError, NonFiniteError
from potstill.training import checkpoint as ckpt
from potstill.training.devices import Compute
from potstill.training.history import History
from potstill.training.settings import TrainingSettings
from potstill.training.under_way import UnderWay


@dataclass
class Saving:
    """Checkpoints of one stage: ``last.checkpoint``, all of its state, and ``best.checkpoint``, the best weights."""

    folder: Path
    settings: TrainingSettings
    compute: Compute
    distiller: Distiller
    optimizer: Optimizer
    schedule: LambdaLR
    average: AveragedModel | None
    history: History
    best: dict[str, Tensor] = field(default_factory=dict)  # the student's weights after its best epoch
    _last: float = field(default_factory=time.monotonic)
    _best_saved: int = 0

    @property
    def is_due(self) -> bool:
        """Whether the last checkpoint is old enough."""
        return time.monotonic() - self._last >= self.settings.checkpoint_seconds

    @property
    def is_due_within(self) -> bool:
        """The same in the midst of an epoch, where nobody asked for a checkpoint after each."""
        return self.settings.checkpoint_seconds > 0 and self.is_due

    def keep_best(self) -> None:
        """Remember the student's weights as they are now."""
        self.best = ckpt.copy_state(self.distiller.student)

    def save(self, epoch: int, under_way: UnderWay | None = None) -> None:
        """Write the state after ``epoch`` epochs, and those steps of the next that are done.

        Raises:
            StorageError: it could not be written.
            NonFiniteError: a weight is NaN or infinite; what was written before stays.
        """
        self._refuse_nonfinite(epoch)
        best = {"best_epoch": self.history.best_epoch, "best_value": self.history.best_value}
        if self._best_saved != self.history.best_epoch:  # 0: there is none yet
            ckpt.save_checkpoint(self.folder / "best.checkpoint", self.best, best)
            self._best_saved = self.history.best_epoch
        optimizer, facts = ckpt.pack_optimizer(self.optimizer)
        tensors = (
            ckpt.under("distiller", self.distiller.state_dict())
            | ckpt.under("optimizer", optimizer)
            | ckpt.under("random", ckpt.pack_random_state(self.compute.device))
            | (ckpt.under("average", self.average.state_dict()) if self.average is not None else {})
        )
        within: dict[str, Any] | None = None
        if under_way is not None:
            figures, within = under_way.pack()
            tensors |= ckpt.under("figures", figures)
        facts = {
            "epoch": epoch,
            "under_way": within,
            "optimizer": facts,
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "records": self.history.records,
            "seconds": self.history.seconds,
        }
        ckpt.save_checkpoint(self.folder / "last.checkpoint", tensors, facts, keep_previous=True)
        self._last = time.monotonic()

    def resume(self, under_way: UnderWay) -> int:
        """Load the last checkpoint; the number of epochs that are done, 0 where there is none.

        Args:
            under_way: receives how far the next epoch has come; its step stays 0 where it has not begun.

        Raises:
            ArtifactError: a checkpoint is damaged, or is of something else.
        """
        last, best = self.folder / "last.checkpoint", self.folder / "best.checkpoint"
        if not last.exists():
            return 0
        if best.exists():  # else the first epoch is not over
            self.best, facts = ckpt.load_checkpoint(best)
            # best may be newer than last, where the process was killed between the two: it stays the best seen.
            self.history.best_epoch, self.history.best_value = facts["best_epoch"], facts["best_value"]
            self._best_saved = self.history.best_epoch
        tensors, facts = ckpt.load_checkpoint(last)
        within = facts["under_way"]
        if within is not None:
            # Before its state is loaded: what a method does to that at the beginning of an epoch has been done.
            self.distiller.start_epoch(int(facts["epoch"]), self.settings.epochs)
            under_way.unpack(ckpt.within("figures", tensors), within)
        try:
            self.distiller.load_state_dict(ckpt.within("distiller", tensors))
            ckpt.unpack_optimizer(self.optimizer, ckpt.within("optimizer", tensors), facts["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(ckpt.within("average", tensors))
        except (RuntimeError, ValueError, KeyError) as error:
            raise ArtifactError(f"{last} does not fit this recipe: {str(error).splitlines()[0]}") from error
        self.schedule.last_epoch = facts["schedule"]["last_epoch"]
        for group, factor in zip(self.optimizer.param_groups, self.schedule.lr_lambdas, strict=True):
            group["lr"] = self.settings.lr * factor(self.schedule.last_epoch)
        ckpt.unpack_random_state(ckpt.within("random", tensors), self.compute.device)
        self.history.records, self.history.seconds = facts["records"], facts["seconds"]
        return int(facts["epoch"])

    def _refuse_nonfinite(self, epoch: int) -> None:
        for name, parameter in self.distiller.trained_parameters():
            if not bool(parameter.isfinite().all()):
                raise NonFiniteError(
                    f"epoch {epoch + 1}: the weights {name} have become NaN or infinite.\n"
                    "Lower the learning rate (training.lr), or set training.clip_norm=1; the last checkpoint is finite"
                )
