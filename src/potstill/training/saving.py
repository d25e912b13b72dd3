"""Everything that a resumed training needs, written now and then, beside the training."""

import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from potstill.distiller import Distiller
from potstill.errors import ArtifactError, NonFiniteError
from potstill.sealed import check_lines, write_json_lines
from potstill.training import checkpoint as ckpt
from potstill.training.devices import Compute
from potstill.training.ema import WeightAverage
from potstill.training.history import History
from potstill.training.settings import TrainingSettings
from potstill.training.under_way import UnderWay

LAST = "last.checkpoint"
FIGURES = "figures.checkpoint"  # of a stage that is done: what its epochs gave, and no weights
_LEAST_SECONDS = 60.0  # between two checkpoints, where the recipe says "auto"
_LARGEST_SHARE = 0.02  # of the time goes into checkpoints then


@dataclass
class Saving:
    """Checkpoints of one stage: ``last.checkpoint`` holds all of its state, the best weights too, and
    ``last-previous.checkpoint`` is the one before it: either is all that is needed to go on.
    """

    folder: Path
    settings: TrainingSettings
    compute: Compute
    distiller: Distiller
    optimizer: Optimizer
    schedule: LambdaLR
    average: WeightAverage | None
    history: History
    best: dict[str, Tensor] = field(default_factory=dict)  # the student's weights after its best epoch
    _last: float = field(default_factory=lambda: time.monotonic())
    _cost: float = 0.0  # seconds that the last checkpoint took
    _writing: threading.Thread | None = None
    _error: BaseException | None = None

    @property
    def is_due(self) -> bool:
        """Whether the last checkpoint is old enough.

        Raises:
            StorageError: the last one could not be written.
        """
        wanted = self.settings.checkpoint_seconds
        if self._writing is not None:
            if not self._writing.is_alive():
                self.wait()
            elif wanted == "auto":
                return False
        least = max(_LEAST_SECONDS, self._cost / _LARGEST_SHARE) if wanted == "auto" else wanted
        return time.monotonic() - self._last >= least

    def wait(self) -> None:
        """Return when no checkpoint is being written any more.

        Raises:
            StorageError: the last one could not be written.
        """
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def keep_best(self) -> None:
        """Remember the student's weights as they are now."""
        self.best = ckpt.copy_state(self.distiller.student)

    def save(self, epoch: int, under_way: UnderWay | None = None, *, beside: bool = False) -> None:
        """Write the state after ``epoch`` epochs, and those steps of the next that are done.

        Args:
            epoch: number of epochs that are done.
            under_way: how far the next one has come.
            beside: copy the state and return; a thread writes it while training goes on.  An error is raised by the
                next call of ``is_due``, ``save`` or ``wait``.

        Raises:
            StorageError: it, or the one before it, could not be written.
            NonFiniteError: a weight is NaN or infinite; what was written before stays.
        """
        self.wait()
        self._refuse_nonfinite(epoch)
        random = self._random_states()
        begin = self._last = time.monotonic()
        if not self.compute.processes.first:
            return
        optimizer, facts = ckpt.pack_optimizer(self.optimizer)
        tensors = (
            ckpt.under("distiller", self.distiller.state_dict())
            | ckpt.under("optimizer", optimizer)
            | random
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
            "lines": self.history.lines,
            "seconds": self.history.seconds,
            "best_epoch": self.history.best_epoch,
            "best_value": self.history.best_value if self.best else None,
        }
        # As long as no epoch is over, there is no best; right after the best one, it is what is trained on from here.
        tensors |= ckpt.under("best", self.best)
        student = "distiller/student." if self.average is None else "average/module."
        alike = {f"best/{name}": f"{student}{name}" for name in self.best if f"{student}{name}" in tensors}
        if beside:
            tensors = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
            facts = json.loads(json.dumps(facts))
            self._writing = threading.Thread(
                target=self._write, args=(tensors, facts, alike, begin), name="checkpoint", daemon=True
            )
            self._writing.start()
        else:
            self._write(tensors, facts, alike, begin)
            self.wait()

    def _write(self, tensors: dict[str, Tensor], facts: dict[str, Any], alike: dict[str, str], begin: float) -> None:
        try:
            ckpt.save_checkpoint(self.folder / LAST, tensors, facts, alike=alike, keep_previous=True)
        except BaseException as error:
            self._error = error
        self._last = time.monotonic()
        self._cost = self._last - begin

    def resume(self, under_way: UnderWay) -> int:
        """Load the last checkpoint; the number of epochs that are done, 0 where there is none.

        Args:
            under_way: receives how far the next epoch has come; its step stays 0 where it has not begun.

        Raises:
            ArtifactError: a checkpoint is damaged, or is of something else.
        """
        last = self.folder / LAST
        if not last.exists():
            return 0
        tensors, facts = ckpt.load_checkpoint(last)
        if "best_epoch" not in facts:
            raise ArtifactError(f"{last} was written before potstill 0.1.0; begin the run anew with --overwrite")
        lines = self.folder.parent / "metrics.jsonl"
        if self.compute.processes.first and lines.exists():  # else it is written again
            check_lines(lines, facts["lines"], more=True)
        if facts["best_epoch"]:
            self.best = ckpt.within("best", tensors)
            self.history.best_epoch, self.history.best_value = facts["best_epoch"], facts["best_value"]
        within = facts["under_way"]
        if within is not None:
            # Before its state is loaded: what a method does to that at the beginning of an epoch has been done.
            self.distiller.start_epoch(int(facts["epoch"]), self.settings.epochs)
            if self.compute.processes.first:
                under_way.unpack(ckpt.within("figures", tensors), within)
            else:  # the first one has noted what all had
                under_way.lr, under_way.step = within["lr"], within["step"]
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
        # A process that there was not before keeps the state that its seed gave it.
        if states := ckpt.within(_random_of(self.compute.processes.rank), tensors):
            ckpt.unpack_random_state(states, self.compute.device)
        self.history.records, self.history.seconds = facts["records"], facts["seconds"]
        return int(facts["epoch"])

    def _random_states(self) -> dict[str, Tensor]:
        """Of every process; the first one's as if there were no other."""
        states = self.compute.processes.gather(ckpt.pack_random_state(self.compute.device))
        return {
            name: value
            for rank, state in enumerate(states)
            for name, value in ckpt.under(_random_of(rank), state).items()
        }

    def _refuse_nonfinite(self, epoch: int) -> None:
        for name, parameter in self.distiller.trained_parameters():
            if not bool(parameter.isfinite().all()):
                raise NonFiniteError(
                    f"epoch {epoch + 1}: the weights {name} have become NaN or infinite.\n"
                    "Lower the learning rate (training.lr), or set training.clip_norm=1; the last checkpoint is finite"
                )


def finish_checkpoints(folder: Path, history: History, *, keep: bool) -> None:
    """Remove the checkpoints of a stage whose model is written; the figures of its epochs stay.

    Args:
        folder: of the stage.
        history: of its epochs.
        keep: the last checkpoint stays.

    Raises:
        StorageError: the figures cannot be written.
    """
    folder = folder / "checkpoints"
    (folder / "last-previous.checkpoint").unlink(missing_ok=True)  # the model holds the best weights, and is whole
    if keep:
        (folder / FIGURES).unlink(missing_ok=True)
    else:
        ckpt.save_checkpoint(folder / FIGURES, {}, {"records": history.records})
        (folder / LAST).unlink(missing_ok=True)


def restore_lines(folder: Path) -> None:
    """Write a missing metrics.jsonl of a stage that is done again, from the figures beside its checkpoints.

    Raises:
        ArtifactError: the file with the figures is damaged.
        StorageError: it cannot be written.
    """
    lines = folder / "metrics.jsonl"
    found = [path for name in (LAST, FIGURES) if (path := folder / "checkpoints" / name).exists()]
    if found and not lines.exists():
        write_json_lines(lines, ckpt.load_checkpoint(found[0])[1]["records"])


def _random_of(rank: int) -> str:
    return "random" if rank == 0 else f"random {rank}"
