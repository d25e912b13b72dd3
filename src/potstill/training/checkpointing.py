"""Checkpoints: all state that a resumed training needs, in one file.

A file is its SHA-256, then safetensors: tensors as safetensors, everything else as JSON in its header, so opening a
checkpoint runs no code.  The digest is checked before anything is parsed.
"""

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from potstill.distillation.distiller import Distiller
from potstill.errors import ArtifactError, NonFiniteError
from potstill.io import read_checksummed, verify_json_lines, write_checksummed, write_json_lines
from potstill.training.averaging import ModelEma
from potstill.training.devices import Compute
from potstill.training.settings import TrainingSettings
from potstill.training.state import EpochState, History


def save_checkpoint(
    path: Path,
    tensors: dict[str, Tensor],
    facts: dict[str, Any],
    *,
    alike: Mapping[str, str] | None = None,
    keep_previous: bool = False,
) -> None:
    """Write named tensors and JSON facts, whole or not at all.

    Args:
        path: NAME.checkpoint.
        tensors: on any device.
        facts: JSON values.
        alike: name of a tensor -> name of another; where every bit of them is the same, they are stored once.
        keep_previous: the older file stays as NAME-previous.checkpoint, should this one be damaged later.

    Raises:
        StorageError: it could not be written; the older file is untouched.
    """
    flat = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    same = {name: other for name, other in (alike or {}).items() if _same_bits(flat[name], flat[other])}
    for name in same:
        del flat[name]
    seen: set[int] = set()
    for key, value in flat.items():  # safetensors refuses tied weights: each name gets bytes of its own
        if value.numel() and value.data_ptr() in seen:
            flat[key] = value.clone()
        seen.add(value.data_ptr())
    metadata = {"facts": json.dumps(facts), "same": json.dumps(same)}
    write_checksummed(path, safetensors.torch.save(flat, metadata=metadata), keep_previous=keep_previous)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save_checkpoint`` wrote.

    Raises:
        ArtifactError: missing, cut short or changed; names the newest intact older one.
    """
    payload = read_checksummed(path)
    try:
        header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
        facts, same = (json.loads(header["__metadata__"][name]) for name in ("facts", "same"))
        tensors = safetensors.torch.load(payload)
        return tensors | {name: tensors[other].clone() for name, other in same.items()}, facts
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is no checkpoint of this version: {error}") from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by name and JSON facts."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for parameter, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}.{key}"] = value
            else:
                plain[f"{parameter}.{key}"] = value
    return tensors, {"plain": plain, "groups": state["param_groups"]}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Put a packed state back."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *facts["plain"].items()]:
        parameter, _, key = name.partition(".")
        state.setdefault(int(parameter), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": facts["groups"]})


def pack_random_state(device: torch.device) -> dict[str, Tensor]:
    """States of the global generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def unpack_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Put packed generator states back."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def add_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``{"a": t}`` -> ``{"prefix/a": t}``."""
    return {f"{prefix}/{key}": value for key, value in tensors.items()}


def strip_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``add_prefix``: the tensors of one prefix, without it."""
    start = f"{prefix}/"
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}


def copy_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """A state dict whose tensors no longer change with the module."""
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Of contiguous tensors on the CPU; unlike ``==``, 0 is not -0, and what is not a number equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


LAST = "last.checkpoint"
FIGURES = "figures.checkpoint"  # of a stage that is done: what its epochs gave, and no weights
_LEAST_SECONDS = 60.0  # between two checkpoints, where the recipe says "auto"
_LARGEST_SHARE = 0.02  # of the time goes into checkpoints then


@dataclass
class Checkpointer:
    """Checkpoints of one stage: ``last.checkpoint`` holds all of its state, the best weights too, and
    ``last-previous.checkpoint`` is the one before it: either is all that is needed to go on.
    """

    folder: Path
    settings: TrainingSettings
    compute: Compute
    distiller: Distiller
    optimizer: Optimizer
    schedule: LambdaLR
    average: ModelEma | None
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
        self.best = copy_state_dict(self.distiller.student)

    def save(self, epoch: int, under_way: EpochState | None = None, *, beside: bool = False) -> None:
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
        optimizer, facts = pack_optimizer(self.optimizer)
        tensors = (
            add_prefix("distiller", self.distiller.state_dict())
            | add_prefix("optimizer", optimizer)
            | random
            | (add_prefix("average", self.average.state_dict()) if self.average is not None else {})
        )
        within: dict[str, Any] | None = None
        if under_way is not None:
            figures, within = under_way.pack()
            tensors |= add_prefix("figures", figures)
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
        tensors |= add_prefix("best", self.best)
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
            save_checkpoint(self.folder / LAST, tensors, facts, alike=alike, keep_previous=True)
        except BaseException as error:
            self._error = error
        self._last = time.monotonic()
        self._cost = self._last - begin

    def resume(self, under_way: EpochState) -> int:
        """Load the last checkpoint; the number of epochs that are done, 0 where there is none.

        Args:
            under_way: receives how far the next epoch has come; its step stays 0 where it has not begun.

        Raises:
            ArtifactError: a checkpoint is damaged, or is of something else.
        """
        last = self.folder / LAST
        if not last.exists():
            return 0
        tensors, facts = load_checkpoint(last)
        if "best_epoch" not in facts:
            raise ArtifactError(f"{last} was written before potstill 0.1.0; begin the run anew with --overwrite")
        lines = self.folder.parent / "metrics.jsonl"
        if self.compute.processes.first and lines.exists():  # else it is written again
            verify_json_lines(lines, facts["lines"], more=True)
        if facts["best_epoch"]:
            self.best = strip_prefix("best", tensors)
            self.history.best_epoch, self.history.best_value = facts["best_epoch"], facts["best_value"]
        within = facts["under_way"]
        if within is not None:
            # Before its state is loaded: what a method does to that at the beginning of an epoch has been done.
            self.distiller.start_epoch(int(facts["epoch"]), self.settings.epochs)
            if self.compute.processes.first:
                under_way.unpack(strip_prefix("figures", tensors), within)
            else:  # the first one has noted what all had
                under_way.lr, under_way.step = within["lr"], within["step"]
        try:
            self.distiller.load_state_dict(strip_prefix("distiller", tensors))
            unpack_optimizer(self.optimizer, strip_prefix("optimizer", tensors), facts["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(strip_prefix("average", tensors))
        except (RuntimeError, ValueError, KeyError) as error:
            raise ArtifactError(f"{last} does not fit this recipe: {str(error).splitlines()[0]}") from error
        self.schedule.last_epoch = facts["schedule"]["last_epoch"]
        for group, factor in zip(self.optimizer.param_groups, self.schedule.lr_lambdas, strict=True):
            group["lr"] = self.settings.lr * factor(self.schedule.last_epoch)
        # A process that there was not before keeps the state that its seed gave it.
        if states := strip_prefix(_random_state_prefix(self.compute.processes.rank), tensors):
            unpack_random_state(states, self.compute.device)
        self.history.records, self.history.seconds = facts["records"], facts["seconds"]
        return int(facts["epoch"])

    def _random_states(self) -> dict[str, Tensor]:
        """Of every process; the first one's as if there were no other."""
        states = self.compute.processes.gather(pack_random_state(self.compute.device))
        return {
            name: value
            for rank, state in enumerate(states)
            for name, value in add_prefix(_random_state_prefix(rank), state).items()
        }

    def _refuse_nonfinite(self, epoch: int) -> None:
        for name, parameter in self.distiller.trained_parameters():
            if not bool(parameter.isfinite().all()):
                raise NonFiniteError(
                    f"epoch {epoch + 1}: the weights {name} have become NaN or infinite.\n"
                    "Lower the learning rate (training.lr), or set training.max_grad_norm=1; the last "
                    "checkpoint is finite"
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
        save_checkpoint(folder / FIGURES, {}, {"records": history.records})
        (folder / LAST).unlink(missing_ok=True)


def restore_metrics_file(folder: Path) -> None:
    """Write a missing metrics.jsonl of a stage that is done again, from the figures beside its checkpoints.

    Raises:
        ArtifactError: the file with the figures is damaged.
        StorageError: it cannot be written.
    """
    lines = folder / "metrics.jsonl"
    found = [path for name in (LAST, FIGURES) if (path := folder / "checkpoints" / name).exists()]
    if found and not lines.exists():
        write_json_lines(lines, load_checkpoint(found[0])[1]["records"])


def _random_state_prefix(rank: int) -> str:
    return "random" if rank == 0 else f"random {rank}"
