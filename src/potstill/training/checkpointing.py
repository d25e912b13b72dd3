"""The state of a training besides weights, and checkpoints: all that a resumed training needs, in one file.

A file is a SHA-256 digest followed by safetensors, with everything but tensors as JSON in its header, so that opening a
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
from potstill.evaluation.metrics import NON_FINITE_HELP, StreamingMetrics, TermAverages
from potstill.io import read_checksummed, verify_json_lines, write_checksummed, write_json_lines
from potstill.training.averaging import ModelEma
from potstill.training.devices import Compute
from potstill.training.settings import TrainingSettings

EpochRecord = dict[str, Any]


@dataclass
class History:
    """The metrics of every epoch, and the best epoch."""

    records: list[EpochRecord] = field(default_factory=list)  # lines of metrics.jsonl
    lines: list[str] = field(default_factory=list)  # digest of each line
    best_epoch: int = 0  # from 1
    best_value: float = -float("inf")  # of the selection metric; losses are negated, so that larger is better
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Median training speed over the epochs."""
        rates = sorted(record["images_per_second"] for record in self.records)
        return float(rates[len(rates) // 2])


@dataclass
class EpochState:
    """The progress of an epoch."""

    metrics: StreamingMetrics  # over the finished steps
    averages: TermAverages  # over the finished steps
    lr: float  # learning rate at the beginning of the epoch
    step: int = 0  # number of finished batches
    _earlier_seconds: float = 0.0  # before the training was resumed
    _started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Time that the epoch has taken so far."""
        return self._earlier_seconds + time.perf_counter() - self._started

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state as tensors by name and JSON facts."""
        tensors, terms = self.averages.pack()
        metrics = {f"metrics.{name}": value for name, value in self.metrics.pack().items()}
        return tensors | metrics, {"lr": self.lr, "step": self.step, "seconds": self.seconds, "terms": terms}

    def unpack(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the state by what ``pack`` returned; further steps add to it on the device of the metrics."""
        tensors = {name: value.to(self.metrics.device) for name, value in tensors.items()}
        self.averages.unpack(tensors, facts["terms"])
        self.metrics.unpack(
            {name.removeprefix("metrics."): value for name, value in tensors.items() if name.startswith("metrics.")}
        )
        self.lr, self.step = facts["lr"], facts["step"]
        self._earlier_seconds, self._started = facts["seconds"], time.perf_counter()


def save_checkpoint(
    path: Path,
    tensors: dict[str, Tensor],
    facts: dict[str, Any],
    *,
    duplicates: Mapping[str, str] | None = None,
    keep_previous: bool = False,
) -> None:
    """Write named tensors and JSON facts atomically.

    ``duplicates``: name of a tensor -> name of another; if both are equal to the bit, they are stored once.
    ``keep_previous``: keep the older file as NAME-previous.checkpoint, in case this one is damaged later.
    """
    flat = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    same = {name: other for name, other in (duplicates or {}).items() if _same_bits(flat[name], flat[other])}
    for name in same:
        del flat[name]
    seen: set[int] = set()
    for key, value in flat.items():  # safetensors refuses tied weights: store a copy for each name
        if value.numel() and value.data_ptr() in seen:
            flat[key] = value.clone()
        seen.add(value.data_ptr())
    metadata = {"facts": json.dumps(facts), "same": json.dumps(same)}
    write_checksummed(path, safetensors.torch.save(flat, metadata=metadata), keep_previous=keep_previous)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save_checkpoint`` wrote; ArtifactError names the newest intact older file."""
    payload = read_checksummed(path)
    try:
        header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
        facts, same = (json.loads(header["__metadata__"][name]) for name in ("facts", "same"))
        tensors = safetensors.torch.load(payload)
        return tensors | {name: tensors[other].clone() for name, other in same.items()}, facts
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is no checkpoint of this version: {error}") from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's state as tensors by name and JSON facts."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for parameter, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}.{key}"] = value
            else:
                plain[f"{parameter}.{key}"] = value
    # Some optimizers of timm count their steps in a tensor of the group.
    groups = [
        {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return tensors, {"plain": plain, "groups": groups}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Load what ``pack_optimizer`` returned."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *facts["plain"].items()]:
        parameter, _, key = name.partition(".")
        state.setdefault(int(parameter), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": facts["groups"]})


def pack_random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the global random generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def unpack_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Restore what ``pack_random_state`` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def add_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``{"a": t}`` -> ``{"prefix/a": t}``."""
    return {f"{prefix}/{key}": value for key, value in tensors.items()}


def strip_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under one prefix, without it."""
    start = f"{prefix}/"
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}


def copy_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict that does not change with the module."""
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def _copy_to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies; those of a GPU go to pinned memory, all at once, and are waited for together."""
    copies = {}
    devices = {value.device for value in tensors.values() if value.is_cuda}
    for name, value in tensors.items():
        copies[name] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        copies[name].copy_(value.detach(), non_blocking=value.is_cuda)
    for device in devices:
        torch.cuda.synchronize(device)
    return copies


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare contiguous CPU tensors; unlike ``==``, 0 differs from -0 and NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


LAST = "last.checkpoint"
FIGURES = "figures.checkpoint"  # of a finished stage: the metrics of its epochs, no weights
_MIN_SECONDS = 60.0  # between two checkpoints with checkpoint_seconds "auto"
_MAX_TIME_FRACTION = 0.02  # of the training time that checkpoints may take then
_ASSUMED_RATE = 3e8  # bytes a second of the first checkpoint, before one has been timed


@dataclass
class Checkpointer:
    """Writes and loads a stage's ``last.checkpoint``, and the one before it; either is enough to resume."""

    folder: Path
    settings: TrainingSettings
    compute: Compute
    distiller: Distiller
    optimizer: Optimizer
    schedule: LambdaLR
    average: ModelEma | None
    history: History
    scaler: torch.amp.GradScaler | None = None  # of the loss, for fp16
    best: dict[str, Tensor] = field(default_factory=dict)  # the student's weights after its best epoch
    _last_save: float = field(default_factory=lambda: time.monotonic())
    _save_seconds: float = 0.0  # duration of the last save
    _writer: threading.Thread | None = None
    _error: BaseException | None = None

    @property
    def is_due(self) -> bool:
        """Whether it is time for another checkpoint; StorageError: the last one could not be written."""
        setting = self.settings.checkpoint_seconds
        if self._writer is not None:
            if not self._writer.is_alive():
                self.wait()
            elif setting == "auto":
                return False
        if setting == "auto" and not self._save_seconds:  # a method's memory may take gigabytes
            state = self.distiller.state_dict().values()
            self._save_seconds = sum(each.numel() * each.element_size() for each in state) / _ASSUMED_RATE
        interval = max(_MIN_SECONDS, self._save_seconds / _MAX_TIME_FRACTION) if setting == "auto" else setting
        return time.monotonic() - self._last_save >= interval

    @property
    def is_due_at_end(self) -> bool:
        """Whether the end of the training is worth a checkpoint, which goes as soon as the model is written: with
        "auto" not after a short training, nor a moment after the last one.
        """
        return self.settings.checkpoint_seconds != "auto" or self.settings.keep_checkpoint or self.is_due

    def wait(self) -> None:
        """Wait for the background write, if there is one."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def keep_best(self) -> None:
        """Copy the student's current weights as the best ones."""
        self.best = copy_state_dict(self.distiller.student)

    def save(self, epoch: int, state: EpochState | None = None, *, background: bool = False) -> None:
        """Write the state after ``epoch`` whole epochs, and of an unfinished one.

        In the ``background`` a thread writes a copy while training continues; an error is raised by the next call of
        ``is_due``, ``save`` or ``wait``.  NonFiniteError: a weight is NaN or infinite; older checkpoints stay.
        """
        self.wait()
        self.check_finite(epoch)
        random = self._random_states()
        started = self._last_save = time.monotonic()
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
        if state is not None:
            figures, within = state.pack()
            tensors |= add_prefix("figures", figures)
        facts = {
            "epoch": epoch,
            "under_way": within,
            "optimizer": facts,
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "scaler": {} if self.scaler is None else self.scaler.state_dict(),
            "records": self.history.records,
            "lines": self.history.lines,
            "seconds": self.history.seconds,
            "best_epoch": self.history.best_epoch,
            "best_value": self.history.best_value if self.best else None,
        }
        tensors |= add_prefix("best", self.best)
        student = "distiller/student." if self.average is None else "average/module."
        # Right after the best epoch, its weights are the current ones.
        duplicates = {f"best/{name}": f"{student}{name}" for name in self.best if f"{student}{name}" in tensors}
        if background:
            tensors = _copy_to_cpu(tensors)
            facts = json.loads(json.dumps(facts))
            self._writer = threading.Thread(
                target=self._write, args=(tensors, facts, duplicates, started), name="checkpoint", daemon=True
            )
            self._writer.start()
        else:
            self._write(tensors, facts, duplicates, started)
            self.wait()

    def _write(
        self, tensors: dict[str, Tensor], facts: dict[str, Any], duplicates: dict[str, str], started: float
    ) -> None:
        try:
            save_checkpoint(self.folder / LAST, tensors, facts, duplicates=duplicates, keep_previous=True)
        except BaseException as error:
            self._error = error
        self._last_save = time.monotonic()
        self._save_seconds = self._last_save - started

    def resume(self, state: EpochState) -> int:
        """Load the last checkpoint, with ``state`` of an unfinished epoch; return the number of finished epochs."""
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
            # Before the distiller's state is loaded, which already contains what this call changes in it.
            self.distiller.start_epoch(int(facts["epoch"]), self.settings.epochs)
            if self.compute.processes.first:
                state.unpack(strip_prefix("figures", tensors), within)
            else:  # the first process has saved the metrics of all
                state.lr, state.step = within["lr"], within["step"]
        try:
            self.distiller.load_state_dict(strip_prefix("distiller", tensors))
            unpack_optimizer(self.optimizer, strip_prefix("optimizer", tensors), facts["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(strip_prefix("average", tensors))
        except (RuntimeError, ValueError, KeyError) as error:
            raise ArtifactError(f"{last} does not fit this recipe: {str(error).splitlines()[0]}") from error
        if self.scaler is not None and self.scaler.is_enabled() and facts.get("scaler"):
            self.scaler.load_state_dict(facts["scaler"])
        self.schedule.last_epoch = facts["schedule"]["last_epoch"]
        for group, lr, factor in zip(
            self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = lr * factor(self.schedule.last_epoch)
        # A process that is new keeps the random state of its seed.
        if states := strip_prefix(_random_state_prefix(self.compute.processes.rank), tensors):
            unpack_random_state(states, self.compute.device)
        self.history.records, self.history.seconds = facts["records"], facts["seconds"]
        return int(facts["epoch"])

    def _random_states(self) -> dict[str, Tensor]:
        states = self.compute.processes.collect(pack_random_state(self.compute.device)) or []
        return {
            name: value
            for rank, state in enumerate(states)
            for name, value in add_prefix(_random_state_prefix(rank), state).items()
        }

    def check_finite(self, epoch: int) -> None:
        """Raise NonFiniteError if a trained weight is NaN or infinite after ``epoch`` whole epochs."""
        named = self.distiller.trained_parameters()
        if not named:
            return
        # One read from the device for all of them.
        finite = torch.stack([parameter.isfinite().all() for _, parameter in named]).tolist()
        for (name, _), is_finite in zip(named, finite, strict=True):
            if not is_finite:
                raise NonFiniteError(
                    f"epoch {epoch + 1}: the weights {name} have become NaN or infinite.\n{NON_FINITE_HELP}"
                )


def finish_checkpoints(folder: Path, history: History, *, keep: bool) -> None:
    """Remove the checkpoints of a stage whose model has been written, but keep the metrics of its epochs."""
    folder = folder / "checkpoints"
    (folder / "last-previous.checkpoint").unlink(missing_ok=True)
    if keep:
        (folder / FIGURES).unlink(missing_ok=True)
    else:
        save_checkpoint(folder / FIGURES, {}, {"records": history.records})
        (folder / LAST).unlink(missing_ok=True)


def restore_metrics_file(folder: Path) -> None:
    """Write the missing metrics.jsonl of a finished stage from the metrics in its checkpoints."""
    lines = folder / "metrics.jsonl"
    found = [path for name in (LAST, FIGURES) if (path := folder / "checkpoints" / name).exists()]
    if found and not lines.exists():
        write_json_lines(lines, load_checkpoint(found[0])[1]["records"])


def _random_state_prefix(rank: int) -> str:
    return "random" if rank == 0 else f"random {rank}"
