"""The one training loop: teacher, baseline and distilled student all go through it."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from potstill.artifacts import write_json_lines
from potstill.distiller import Distiller
from potstill.errors import ArtifactError
from potstill.evaluation.metrics import StreamingMetrics
from potstill.training import checkpoint as ckpt
from potstill.training.averages import TermAverages
from potstill.training.devices import Compute
from potstill.training.observer import Observer
from potstill.training.optimizers import create_optimizer, lr_factor
from potstill.training.settings import TrainingSettings
from potstill.types import Outputs

if TYPE_CHECKING:  # anything with `epoch`, `steps` and `count` will do
    from potstill.data.loader import Loader

Record = dict[str, Any]


@dataclass
class History:
    """What a stage's training came to."""

    records: list[Record] = field(default_factory=list)  # lines of metrics.jsonl
    best_epoch: int = 0  # from 1
    best_value: float = -float("inf")  # of the picking metric; losses are negated, so that larger is better
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Median over the epochs."""
        rates = sorted(record["images_per_second"] for record in self.records)
        return float(rates[len(rates) // 2])


class Training:
    """One stage's training: ``Training(...).run()`` leaves the student with the weights of its best epoch.

    Args:
        distiller: on the compute's device.
        train, val: loaders; val picks the best epoch.
        test: evaluated each epoch for its curve only, never for a choice; None: left alone.
        folder: receives ``metrics.jsonl`` and ``checkpoints/``.
    """

    def __init__(
        self,
        distiller: Distiller,
        train: "Loader",
        val: "Loader",
        settings: TrainingSettings,
        compute: Compute,
        *,
        folder: Path,
        observer: Observer,
        classes: int,
        test: "Loader | None" = None,
    ) -> None:
        self.distiller, self.settings, self.compute, self.observer = distiller, settings, compute, observer
        self.train, self.classes = train, classes
        self.others = {"val": val} | ({"test": test} if test is not None else {})
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.history = History()
        steps = -(-train.steps // settings.accumulate)
        self.optimizer = create_optimizer(distiller.trained_parameters(), settings)
        self.schedule = LambdaLR(self.optimizer, lr_factor(settings, steps))
        self.average = None
        if settings.ema_decay is not None:
            follow = get_ema_multi_avg_fn(settings.ema_decay)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(distiller.student, multi_avg_fn=follow, use_buffers=True)
        self._best: dict[str, Tensor] = {}
        self._teacher_says: dict[str, list[Outputs]] = {}
        self._last_save = time.monotonic()
        self._best_saved = 0

    def run(self, *, resume: bool = False) -> History:
        """Train to the last epoch, or until val has not improved for ``early_stopping`` epochs.

        Raises:
            NonFiniteError: a loss term is NaN or infinite.
            ArtifactError: ``resume`` with a damaged checkpoint.
        """
        done = self._resume() if resume else 0
        write_json_lines(self.folder / "metrics.jsonl", self.history.records)
        for number in range(done, self.settings.epochs):
            if self._out_of_patience(number):
                self.observer.note(f"stopped early: val has not improved for {self.settings.early_stopping} epochs")
                break
            self._epoch(number)
            if number + 1 == self.settings.epochs or self._save_is_due():
                self._save(number + 1)
        if self.history.records[-1]["epoch"] != self.settings.epochs:
            self._save(self.history.records[-1]["epoch"])
        self.distiller.student.load_state_dict(self._best)
        return self.history

    # one epoch

    def _epoch(self, number: int) -> None:
        started = time.perf_counter()
        self.observer.epoch_start(number + 1, self.settings.epochs, self.train.steps, self.train.count)
        rate = float(self.optimizer.param_groups[0]["lr"])
        figures = self._train_epoch(number)
        trained = time.perf_counter() - started
        with _EvaluatedWeights(self.distiller, self.average):
            splits = {name: self._evaluate(name, loader) for name, loader in self.others.items()}
            value = _comparable(self.settings.pick_by, splits["val"])
            best = value > self.history.best_value
            if best:
                self.history.best_epoch, self.history.best_value = number + 1, value
                self._best = ckpt.copy_state(self.distiller.student)
        seconds = time.perf_counter() - started
        record = {
            "epoch": number + 1,
            "seconds": round(seconds, 3),
            "lr": rate,
            "images_per_second": round(self.train.count / trained, 1),
            "best": best,
            "train": figures,
            **splits,
        }
        self.history.seconds += seconds
        self.history.records.append(record)
        write_json_lines(self.folder / "metrics.jsonl", self.history.records)
        self.observer.epoch_end(record)

    def _train_epoch(self, number: int) -> Record:
        self.distiller.train()
        metrics, averages = StreamingMetrics(self.classes, device=self.compute.device), TermAverages()
        group = self.settings.accumulate
        for position, batch in enumerate(self.train.epoch(number)):
            images = batch.images.contiguous(memory_format=self.compute.memory_format)
            with self.compute.autocast():
                step = self.distiller(images, batch.labels, index=batch.index, view=batch.view)
            first = position - position % group
            (step.loss / min(group, self.train.steps - first)).backward()
            if (position + 1) % group == 0 or position + 1 == self.train.steps:
                self._update()
            metrics.update(step.logits.detach(), batch.labels)
            averages.update(step.terms, len(batch))
            self.observer.step(len(batch))
        return _figures(metrics, averages.compute(f"epoch {number + 1}, training"))

    def _update(self) -> None:
        if self.settings.clip_norm is not None:
            parameters = [parameter for _, parameter in self.distiller.trained_parameters()]
            torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.distiller.student)

    @torch.no_grad()
    def _evaluate(self, split: str, loader: "Loader") -> Record:
        self.distiller.eval()
        metrics, averages = StreamingMetrics(self.classes, device=self.compute.device), TermAverages()
        for position, batch in enumerate(loader.epoch(0)):
            images = batch.images.contiguous(memory_format=self.compute.memory_format)
            with self.compute.autocast():
                known = self._ask_teacher(split, position, images)
                step = self.distiller(images, batch.labels, index=batch.index, view=batch.view, teacher=known)
            metrics.update(step.logits, batch.labels)
            averages.update(step.terms, len(batch))
        return _figures(metrics, averages.compute(f"evaluation on {split}"))

    def _ask_teacher(self, split: str, position: int, images: Tensor) -> Outputs | None:
        """Logits of the teacher on val and test never change: it is asked once.  Feature maps are too large to keep."""
        if self.distiller.teacher is None or self.distiller.method.teacher_taps:
            return None
        known = self._teacher_says.setdefault(split, [])
        if position == len(known):
            answer = self.distiller.ask_teacher(images)
            assert answer is not None  # there is a teacher
            known.append(answer)
        return known[position]

    def _out_of_patience(self, number: int) -> bool:
        patience = self.settings.early_stopping
        return patience is not None and number > 0 and number - self.history.best_epoch >= patience

    # saving and resuming

    def _save_is_due(self) -> bool:
        return time.monotonic() - self._last_save >= self.settings.checkpoint_seconds

    def _save(self, epoch: int) -> None:
        best = {"best_epoch": self.history.best_epoch, "best_value": self.history.best_value}
        if self._best_saved != self.history.best_epoch:
            ckpt.save_checkpoint(self.checkpoints / "best.checkpoint", self._best, best)
            self._best_saved = self.history.best_epoch
        optimizer, facts = ckpt.pack_optimizer(self.optimizer)
        tensors = (
            ckpt.under("distiller", self.distiller.state_dict())
            | ckpt.under("optimizer", optimizer)
            | ckpt.under("random", ckpt.pack_random_state(self.compute.device))
            | (ckpt.under("average", self.average.state_dict()) if self.average is not None else {})
        )
        facts = {
            "epoch": epoch,
            "optimizer": facts,
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "records": self.history.records,
            "seconds": self.history.seconds,
        }
        ckpt.save_checkpoint(self.checkpoints / "last.checkpoint", tensors, facts)
        self._last_save = time.monotonic()

    def _resume(self) -> int:
        """Load the last checkpoint; the number of epochs that are done, 0 where there is none."""
        last, best = self.checkpoints / "last.checkpoint", self.checkpoints / "best.checkpoint"
        if not last.exists():
            return 0
        self._best, facts = ckpt.load_checkpoint(best)
        # best may be newer than last, where the process was killed between the two: it stays the best seen.
        self.history.best_epoch, self.history.best_value = facts["best_epoch"], facts["best_value"]
        self._best_saved = self.history.best_epoch
        tensors, facts = ckpt.load_checkpoint(last)
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


class _EvaluatedWeights:
    """Within the block, the student has its averaged weights, where there are such."""

    def __init__(self, distiller: Distiller, average: AveragedModel | None) -> None:
        self.student, self.average = distiller.student, average

    def __enter__(self) -> None:
        if self.average is not None:
            self.trained = ckpt.copy_state(self.student)
            self.student.load_state_dict(self.average.module.state_dict())

    def __exit__(self, *_: object) -> None:
        if self.average is not None:
            self.student.load_state_dict(self.trained)


def _figures(metrics: StreamingMetrics, terms: dict[str, float]) -> Record:
    return {**metrics.compute(), "loss": sum(terms.values()), "terms": terms}


def _comparable(metric: str, figures: Record) -> float:
    """The picking metric as a number of which more is better; undefined (AUC of one class) counts as worst."""
    value = figures[metric]
    if value is None:
        return -1e300
    return -value if metric in ("loss", "nll") else float(value)
