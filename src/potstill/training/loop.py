"""The one training loop: teacher, baseline and distilled student all go through it."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from potstill.distiller import Distiller
from potstill.errors import Stopped, StorageError
from potstill.evaluation.metrics import StreamingMetrics
from potstill.sealed import write_json_lines
from potstill.training import checkpoint as ckpt
from potstill.training.answers import Answers, Asked, Remembered
from potstill.training.averages import TermAverages
from potstill.training.compiling import Compiling
from potstill.training.devices import Compute
from potstill.training.ema import WeightAverage
from potstill.training.gradients import Gradients
from potstill.training.history import History, Record
from potstill.training.observer import Observer
from potstill.training.optimizers import create_optimizer, lr_factor
from potstill.training.saving import Saving
from potstill.training.settings import TrainingSettings
from potstill.training.sharing import Sharing, refuse_alone
from potstill.training.simulated_int8 import plain_epochs, simulated_int8
from potstill.training.stopping import Stopping
from potstill.training.under_way import UnderWay
from potstill.types import Batch, Step

if TYPE_CHECKING:  # anything with `epoch`, `sizes_of`, `steps` and `count` will do
    from potstill.data.loader import Loader


class Training:
    """One stage's training: ``Training(...).run()`` leaves the student with the weights of its best epoch.

    Args:
        distiller: on the compute's device.
        train, val: loaders; val picks the best epoch.
        folder: receives ``metrics.jsonl`` and ``checkpoints/``.
        test: evaluated each epoch for its curve only, never for a choice; None: left alone.
        answers: by split, where the teacher's answers come from; where not given, it is asked: for each training batch
            anew, on val and test once.
        stopping: is looked at after each step; None: nothing stops it.
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
        answers: Mapping[str, Answers] | None = None,
        stopping: Stopping | None = None,
    ) -> None:
        self.distiller, self.settings, self.compute, self.observer = distiller, settings, compute, observer
        self.train, self.classes = train, classes
        self.others = {"val": val} | ({"test": test} if test is not None else {})
        self.folder, self.history = folder, History()
        self.plain_epochs = plain_epochs(settings.epochs, settings.int8_share)
        steps = -(-train.steps // settings.accumulate)
        refuse_alone(distiller.method, settings.optimizer, compute.processes)
        self.sharing = Sharing(distiller, compute.processes)
        named = distiller.trained_parameters()
        self.optimizer = create_optimizer(named, settings)
        self.gradients = Gradients(self.optimizer, [parameter for _, parameter in named])
        self.compiling = Compiling(distiller, self.optimizer, settings, compute, observer)
        self.schedule = LambdaLR(self.optimizer, lr_factor(settings, steps))
        self.average = None
        if settings.ema_decay is not None:
            self.average = WeightAverage(distiller.student, settings.ema_decay)
        self.saving = Saving(
            folder / "checkpoints",
            settings,
            compute,
            distiller,
            self.optimizer,
            self.schedule,
            self.average,
            self.history,
        )
        asked: dict[str, Answers] = {name: Remembered(distiller) for name in self.others}
        self.answers: dict[str, Answers] = {"train": Asked(), **asked, **(answers or {})}
        self.stopping = stopping or Stopping()

    def run(self, *, resume: bool = False) -> History:
        """Train to the last epoch, or until val has not improved for ``early_stopping`` epochs.

        Raises:
            NonFiniteError: a loss term or a weight is NaN or infinite.
            ArtifactError: ``resume`` with a damaged checkpoint.
            Stopped: a signal came; the step was finished, and all that has been done is saved.
        """
        with self.stopping.patiently():
            try:
                history = self._run(resume)
            except BaseException:
                with suppress(StorageError):  # the first error is the one to show
                    self.saving.wait()
                raise
            self.saving.wait()
            return history

    def _run(self, resume: bool) -> History:
        under_way = self._beginning()
        done = self.saving.resume(under_way) if resume else 0
        if under_way.step == 0:
            under_way = self._beginning()  # with the learning rate that was loaded
        self._write_records()
        for number in range(done, self.settings.epochs):
            if under_way.step == 0 and self._out_of_patience(number):
                self.observer.note(f"stopped early: val has not improved for {self.settings.early_stopping} epochs")
                break
            try:
                self._epoch(number, under_way)
            except Stopped:
                self._save(number, under_way)
                raise
            asked, due = self._agreed()
            last = number + 1 == self.settings.epochs
            if last or due or asked:
                self.saving.save(number + 1, beside=not (last or asked))
            self.stopping.check()
            under_way = self._beginning()
        if self.history.records[-1]["epoch"] != self.settings.epochs:
            self.saving.save(self.history.records[-1]["epoch"])
        self.distiller.student.load_state_dict(self.saving.best)
        return self.history

    # one epoch

    def _beginning(self) -> UnderWay:
        """Of an epoch: nothing is done."""
        metrics = StreamingMetrics(self.classes, device=self.compute.device)
        return UnderWay(metrics, TermAverages(), lr=float(self.optimizer.param_groups[0]["lr"]))

    def _epoch(self, number: int, under_way: UnderWay) -> None:
        self.observer.epoch_start(number + 1, self.settings.epochs, self.train.steps, self.train.count)
        if under_way.step == 0:
            self.distiller.start_epoch(number, self.settings.epochs)
        else:  # that has been done, and is part of what was loaded
            self.observer.step(sum(self.train.sizes_of(number)[: under_way.step]))
        if left := self.train.steps - under_way.step:
            after = left + self.train.steps * (self.settings.epochs - number - 1)
            with self.compiling.epoch(left, after), self._rounding(number):
                self._train_epoch(number, under_way)
        figures = self._figures(under_way, f"epoch {number + 1}, training", self.train, number)
        trained = under_way.seconds
        with _EvaluatedWeights(self.distiller, self.average):
            splits = {name: self._evaluate(number, name, loader) for name, loader in self.others.items()}
            value = _comparable(self.settings.selection_metric, splits["val"])
            # Weights that have not met int8's rounding are no candidates, however good they are without it.
            best = value > self.history.best_value or number == self.plain_epochs
            if best:
                self.history.best_epoch, self.history.best_value = number + 1, value
                self.saving.keep_best()
        seconds = under_way.seconds
        record = {
            "epoch": number + 1,
            "seconds": round(seconds, 3),
            "lr": under_way.lr,
            "images_per_second": round(self.train.count / trained, 1),
            "best": best,
            "train": figures,
            **splits,
        }
        self.history.seconds += seconds
        self.history.records.append(record)
        self._write_records()
        self.observer.epoch_end(record)

    def _train_epoch(self, number: int, under_way: UnderWay) -> None:
        self.distiller.train()
        group, answers, begin = self.settings.accumulate, self.answers["train"], under_way.step
        sizes = self.train.sizes_of(number)
        answers.start_epoch(number, begin)
        for position, batch in enumerate(self.train.epoch(number, begin), start=begin):
            if position == begin:
                self.compiling.begin(batch.images)
            first = position - position % group
            complete = (position + 1) % group == 0 or position + 1 == self.train.steps
            with self.compute.processes.stepping():
                with self.sharing.step(complete):
                    step = self._ask(batch, answers, self.sharing.call, self.compute.autocast())
                    self.compute.processes.mark()
                    share = self.sharing.share_of(len(batch), sizes[position])
                    self.gradients.add(step, min(group, self.train.steps - first), share)
                if complete:
                    self._update()
                under_way.metrics.update(step.logits.detach(), batch.labels)
                under_way.averages.update(step.terms, len(batch), position + 1)
            self.observer.step(sizes[position])
            if complete:
                under_way.step = position + 1
                _, due = self._agreed()
                self.stopping.check()
                if due and self.settings.checkpoint_seconds != 0:
                    self._save(number, under_way, beside=True)
        answers.flush()

    def _rounding(self, number: int) -> AbstractContextManager[None]:
        return nullcontext() if number < self.plain_epochs else simulated_int8(self.distiller.student)

    def _agreed(self) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and whether a checkpoint is due in any: the same for all."""
        asked, due = self.compute.processes.highest(self.stopping.requested or 0, int(self.saving.is_due))
        self.stopping.requested = asked or None
        return asked > 0, due > 0

    def _write_records(self) -> None:
        if self.compute.processes.first:
            self.history.lines = write_json_lines(self.folder / "metrics.jsonl", self.history.records)

    def _save(self, number: int, under_way: UnderWay, *, beside: bool = False) -> None:
        """In the midst of an epoch."""
        metrics, averages = self.sharing.figures(under_way.metrics, under_way.averages)
        # A loss that is not finite leaves no checkpoint.
        averages.compute(f"epoch {number + 1}, training", partial(self.train.names_at, number))
        self.answers["train"].flush()
        self.saving.save(number, replace(under_way, metrics=metrics, averages=averages), beside=beside)

    def _ask(
        self, batch: Batch, answers: Answers, distiller: nn.Module, precision: AbstractContextManager[object]
    ) -> Step:
        batch = replace(batch, images=self._laid_out(batch.images))
        if batch.second is not None:
            batch = replace(batch, second=self._laid_out(batch.second))
        known = answers(batch)
        with precision:
            step: Step = distiller(
                batch.images,
                batch.labels,
                index=batch.index,
                view=batch.view,
                second=batch.second,
                soft_labels=batch.soft_labels,
                teacher=known,
            )
        return step

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self.compute.memory_format)

    def _update(self) -> None:
        if self.settings.clip_norm is not None:
            self.gradients.clip(self.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.sharing.settle()
        if self.average is not None:
            self.average.update_parameters(self.distiller.student)

    @torch.no_grad()
    def _evaluate(self, epoch: int, split: str, loader: "Loader") -> Record:
        """In float32, as the final figures are: what picks an epoch is what is reported of it."""
        self.distiller.eval()
        metrics, averages = StreamingMetrics(self.classes, device=self.compute.device), TermAverages()
        answers = self.answers[split]
        answers.start_epoch(0)
        for position, batch in enumerate(loader.epoch(0)):
            number, common = self.sharing.place(loader, position)
            if common:
                self._agreed()
                self.stopping.check()
            with self.compute.processes.stepping():
                step = self._ask(batch, answers, self.distiller, nullcontext())
                metrics.update(step.logits, batch.labels)
                averages.update(step.terms, len(batch), number)
        answers.flush()
        return self._figures(UnderWay(metrics, averages, lr=0.0), f"epoch {epoch + 1}, {split}", loader, 0)

    def _figures(self, found: UnderWay, where: str, loader: "Loader", epoch: int) -> Record:
        metrics, averages = self.sharing.figures(found.metrics, found.averages)
        terms = averages.compute(where, partial(loader.names_at, epoch))
        return {**metrics.compute(), "loss": sum(terms.values()), "terms": terms}

    def _out_of_patience(self, number: int) -> bool:
        patience = self.settings.early_stopping
        return patience is not None and number > 0 and number - self.history.best_epoch >= patience


class _EvaluatedWeights:
    """Within the block, the student has its averaged weights, where there are such."""

    def __init__(self, distiller: Distiller, average: WeightAverage | None) -> None:
        self.student, self.average = distiller.student, average

    def __enter__(self) -> None:
        if self.average is not None:
            self.trained = ckpt.copy_state(self.student)
            self.student.load_state_dict(self.average.module.state_dict())

    def __exit__(self, *_: object) -> None:
        if self.average is not None:
            self.student.load_state_dict(self.trained)


def _comparable(metric: str, figures: Record) -> float:
    """The picking metric as a number of which more is better; undefined (AUC of one class) counts as worst."""
    value = figures[metric]
    if value is None:
        return -1e300
    return -value if metric == "nll" else float(value)
