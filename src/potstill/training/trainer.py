"""The training loop of teacher, baseline and distilled student, and its label loss."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR

from potstill.distillation.cached_outputs import CachedTeacherOutputs
from potstill.distillation.distiller import Distiller
from potstill.distillation.teachers import TeacherViews
from potstill.distributed.group import ProcessGroup
from potstill.errors import Stopped, StorageError, UsageError
from potstill.evaluation.metrics import StreamingMetrics, TermAverages
from potstill.features.stages import find_stages
from potstill.io import write_json_lines
from potstill.training.autotune import BatchTrial
from potstill.training.averaging import ModelEma
from potstill.training.callbacks import Observer, SignalHandler
from potstill.training.checkpointing import Checkpointer, EpochRecord, EpochState, History, copy_state_dict
from potstill.training.devices import (
    Compute,
    DistributedDistiller,
    check_distributed_support,
    has_static_graph,
    synced_batch_norm,
)
from potstill.training.optim import GradientAccumulator, create_optimizer, freeze_low_rates, lr_factor
from potstill.training.settings import TrainingSettings
from potstill.training.student_forward import StudentCompiler, plain_epochs, simulated_int8
from potstill.types import Batch, Outputs, Step

if TYPE_CHECKING:
    from potstill.data.loader import Loader


class LabelLoss(nn.Module):
    r"""Cross-entropy in which a class weight multiplies the whole loss of an image.

    .. math::
        \ell_i = -\sum_k \Big( (1 - \epsilon) \, q_{ik} + \frac{\epsilon}{K} \Big) \log p_{ik}, \qquad
        L = \frac{\sum_i w_i \ell_i}{\sum_i w_i}, \qquad w_i = \sum_k q_{ik} w_k

    q is the image's one-hot label, or its class shares after mixing; epsilon is spread evenly over all classes.
    ``nn.CrossEntropyLoss`` instead multiplies the smoothed (or mixed) mass of class k by the weight of class k, which
    favours rare classes of large weight on every image.  Without smoothing and mixing both are equal.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
        >>> # by hand: -log p of image 0: 0.1269 and 2.1269; smoothed by 0.2: 0.9 * 0.1269 + 0.1 * 2.1269 = 0.3269;
        >>> # image 1: 0.6931; (1 * 0.3269 + 3 * 0.6931) / 4
        >>> LabelLoss(torch.tensor([1.0, 3.0]), label_smoothing=0.2)(logits, labels)
        tensor(0.6016)
        >>> LabelLoss()(logits, torch.tensor([-100, -100])).item()  # no label: 0 instead of torch's NaN
        0.0
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss of logits [B, K] and labels [B] (-100: unknown) or class shares [B, K]."""
        losses = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing, reduction="none")
        weights = self._image_weights(target).to(losses.dtype)
        return (weights * losses).sum() / weights.sum().clamp(min=torch.finfo(losses.dtype).tiny)

    def _image_weights(self, target: Tensor) -> Tensor:
        if target.is_floating_point():  # not a matrix product, which autocast would round to bfloat16
            return target.sum(dim=1) if self.weight is None else (target * self.weight).sum(dim=1)
        known = target >= 0
        return known if self.weight is None else self.weight[target.clamp(min=0)] * known


def balanced_class_weights(counts: Tensor) -> Tensor:
    """Return N / (K n) for each class, with n of N images; the mean weight over all images is 1.

    A class without images (it may have some in val) gets the weight of a class with one.

    Example:
        >>> balanced_class_weights(torch.tensor([600, 6]))
        tensor([ 0.5050, 50.5000])
    """
    return (counts.sum() / (len(counts) * counts.clamp(min=1))).float()


class LiveTeacher:
    """Runs the teacher for each batch."""

    def __init__(
        self,
        distiller: Distiller,
        views: TeacherViews | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.distiller, self.views, self.autocast, self.position = distiller, views, autocast, -1

    def start_epoch(self, epoch: int, step: int = 0) -> None:
        """The batches of epoch number ``epoch``, from 0, come next, the first ``step`` of them left out."""
        self.position = step - 1
        if self.views is not None:
            self.views.start_epoch(epoch, step)

    def __call__(self, batch: Batch) -> Outputs | None:
        """Return the outputs for the next batch; None if the Distiller is to run the teacher itself."""
        self.position += 1
        if self.views is None:
            return None
        with self.autocast():
            own = self.views.of(self.position, batch)
            index = batch.index if self.distiller.training else None
            return self.distiller.run_teacher(batch.images, batch.second, own, index)

    def flush(self) -> None: ...


class CachedTeacher:
    """Runs the teacher once and keeps its logits in memory, for val and test batches without augmentation."""

    def __init__(self, distiller: Distiller, views: TeacherViews | None = None) -> None:
        needs = distiller.method.needs
        self.distiller, self.live = distiller, LiveTeacher(distiller, None if needs.training_only else views)
        self.enabled = not (
            distiller.teacher is None or needs.features or distiller.method.teacher_taps or needs.training_only
        )
        self.outputs: list[Outputs] = []
        self.position = 0

    def start_epoch(self, epoch: int, step: int = 0) -> None:
        """Go back to the first batch; val and test always start there."""
        self.position = 0
        self.live.start_epoch(0)

    def __call__(self, batch: Batch) -> Outputs | None:
        """Return the outputs for the next batch."""
        if not self.enabled:
            return self.live(batch)
        if self.position == len(self.outputs):
            outputs = self.live(batch) or self.distiller.run_teacher(batch.images)
            assert outputs is not None  # there is a teacher
            self.outputs.append(outputs)
        self.position += 1
        return self.outputs[self.position - 1]

    def flush(self) -> None: ...


TeacherOutputs = LiveTeacher | CachedTeacher | CachedTeacherOutputs


class Trainer:
    """Trains one stage; ``run`` leaves the student with the weights of its best epoch on val.

    ``folder`` receives ``metrics.jsonl`` and ``checkpoints/``.  ``test`` is evaluated each epoch for its curve only.
    ``teacher_outputs`` are by split; by default the teacher runs on every training batch, and once on val and test;
    ``teacher_views``: the images for teachers of another size.  ``signals`` are checked after each step.
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
        teacher_outputs: Mapping[str, TeacherOutputs] | None = None,
        teacher_views: Mapping[str, TeacherViews] | None = None,
        signals: SignalHandler | None = None,
    ) -> None:
        self.distiller, self.settings, self.compute, self.observer = distiller, settings, compute, observer
        self.train, self.classes = train, classes
        self.eval_loaders = {"val": val} | ({"test": test} if test is not None else {})
        self.folder, self.history = folder, History()
        self.plain_epochs = plain_epochs(settings.epochs, settings.qat_fraction)
        steps = -(-train.steps // settings.gradient_accumulation_steps)
        check_distributed_support(distiller.method, settings.optimizer, compute.processes)
        scales, self.fixed = freeze_low_rates(distiller.student, settings)
        self.ddp = DistributedDistiller(
            distiller, compute.processes, static_graph=has_static_graph(distiller, settings)
        )
        named = distiller.trained_parameters()
        self.optimizer = create_optimizer(named, settings, {f"student.{name}": scale for name, scale in scales.items()})
        self.head = _head_path(distiller.student, train.spec.size) if settings.freeze else None
        scaler = compute.gradient_scaler()
        self.gradients = GradientAccumulator(self.optimizer, [parameter for _, parameter in named], scaler)
        self.compiler = StudentCompiler(distiller, self.optimizer, settings, compute, observer)
        self.schedule = LambdaLR(self.optimizer, lr_factor(settings, steps))
        self.signals, self.average = signals or SignalHandler(), None
        if settings.ema_decay is not None:
            self.average = ModelEma(distiller.student, settings.ema_decay)
        self.checkpointer = Checkpointer(
            folder / "checkpoints",
            settings,
            compute,
            distiller,
            self.optimizer,
            self.schedule,
            self.average,
            self.history,
            scaler,
        )
        self.requests = _RequestExchange(self.signals, self.checkpointer, compute.processes)
        views = teacher_views or {}
        self.teacher_outputs: dict[str, TeacherOutputs] = {
            "train": LiveTeacher(distiller, views.get("train"), compute.autocast),
            **{name: CachedTeacher(distiller, views.get(name)) for name in self.eval_loaders},
            **(teacher_outputs or {}),
        }

    def run(self, *, resume: bool = False) -> History:
        """Train to the last epoch, or until val has not improved for ``early_stopping_patience`` epochs.

        NonFiniteError: a loss term or a weight is NaN or infinite.  Stopped: a signal was received; the state is saved.
        """
        synced = synced_batch_norm(self.distiller, self.compute.processes, self.settings.sync_batch_norm)
        with self.signals.deferred(), synced:
            try:
                history = self._run(resume)
            except BaseException:
                with suppress(StorageError):  # the first error is the one to show
                    self.checkpointer.wait()
                raise
            self.checkpointer.wait()
            for parameter in self.fixed:
                parameter.requires_grad_(True)
            return history

    def _run(self, resume: bool) -> History:
        state = self._new_epoch_state()
        done = self.checkpointer.resume(state) if resume else 0
        if state.step == 0:
            state = self._new_epoch_state()  # with the loaded learning rate
        self._write_records()
        if done < self.settings.epochs and needs_trial(self.compute):
            self._try_batch()
        for number in range(done, self.settings.epochs):
            if state.step == 0 and self._should_stop_early(number):
                self.observer.note(
                    f"stopped early: val has not improved for {self.settings.early_stopping_patience} epochs"
                )
                break
            try:
                self._epoch(number, state)
            except Stopped:
                self._save(number, state)
                raise
            stop, due = self.requests.exchange()
            last = number + 1 == self.settings.epochs
            if last and not stop:
                self._save_at_end(number + 1)
            elif due or stop:
                self.checkpointer.save(number + 1, background=not stop)
            self.signals.check()
            state = self._new_epoch_state()
        if self.history.records[-1]["epoch"] != self.settings.epochs:
            self._save_at_end(self.history.records[-1]["epoch"])
        self.distiller.student.load_state_dict(self.checkpointer.best)
        return self.history

    def _save_at_end(self, epoch: int) -> None:
        (due,) = self.compute.processes.highest(int(self.checkpointer.is_due_at_end))
        if due:
            self.checkpointer.save(epoch)
        else:
            self.checkpointer.check_finite(epoch)

    def _try_batch(self) -> None:
        """Run a step on a batch of zeros of the true size, so that too little memory is found now."""
        count, size, device = len(self.train.ids_of(0)[0]), self.train.spec.size, self.compute.device
        method, mixes = self.distiller.method, self.train.collator.mixer is not None
        images = self._to_memory_format(torch.zeros(count, 3, size, size, device=device))
        index = torch.arange(count, device=device) % len(self.train.labels)
        labels = torch.arange(count, device=device) % self.classes
        batch = Batch(
            images,
            labels,
            index,
            torch.zeros_like(index),
            images if method.needs.second != "none" else None,
            F.one_hot(labels, self.classes).float() if mixes else None,
        )
        trained = sum(4 * parameter.numel() for _, parameter in self.distiller.trained_parameters())
        moments = 1 if self.settings.optimizer.lower() in ("sgd", "lion", "lars") else 2
        state_bytes = 0 if self.optimizer.state else moments * trained
        BatchTrial(
            self.distiller,
            batch,
            self.compute,
            stage=self.folder.name,
            state_bytes=state_bytes,
            epochs=self.settings.epochs,
        ).run()

    # one epoch

    def _new_epoch_state(self) -> EpochState:
        metrics = StreamingMetrics(self.classes, device=self.compute.device)
        return EpochState(metrics, TermAverages(), lr=float(self.optimizer.param_groups[0]["lr"]))

    def _epoch(self, number: int, state: EpochState) -> None:
        self.observer.epoch_start(number + 1, self.settings.epochs, self.train.steps, self.train.count)
        if state.step == 0:
            self.distiller.start_epoch(number, self.settings.epochs)
        else:  # the loaded state is that of an epoch already started
            self.observer.step(sum(self.train.sizes_of(number)[: state.step]))
        if steps := self.train.steps - state.step:
            left = steps + self.train.steps * (self.settings.epochs - number - 1)
            quantized = nullcontext() if number < self.plain_epochs else simulated_int8(self.distiller.student)
            with self.compiler.epoch(steps, left), quantized, self._frozen_encoder(number):
                self._train_epoch(number, state)
        metrics = self._record_metrics(state, f"epoch {number + 1}, training", self.train, number)
        train_seconds = state.seconds
        self.ddp.sync_buffers(self.average)
        with _averaged_weights(self.distiller.student, self.average):
            splits = {name: self._evaluate(number, name, loader) for name, loader in self.eval_loaders.items()}
            value = selection_value(self.settings.selection_metric, splits["val"])
            # With quantization-aware training, only weights that were trained under int8's rounding are candidates.
            best = self._is_better(value, splits["val"]) or number == self.plain_epochs
            if best:
                self.history.best_epoch, self.history.best_value = number + 1, value
                self.checkpointer.keep_best()
        seconds = state.seconds
        record = {
            "epoch": number + 1,
            "seconds": round(seconds, 3),
            "lr": state.lr,
            "images_per_second": round(self.train.count / train_seconds, 1),
            "best": best,
            "train": metrics,
            **splits,
        }
        if self.distiller.scaling is not None and (factors := self.distiller.scaling.factors):
            record["scaling"] = factors
        self.history.seconds += seconds
        self.history.records.append(record)
        self._write_records()
        self.observer.epoch_end(record)

    def _train_epoch(self, number: int, state: EpochState) -> None:
        self.distiller.train()
        if number < self.settings.freeze:
            self.distiller.student.eval()  # BatchNorm statistics belong to the encoder; dropout rests with it
        elif self.settings.freeze_batch_norm is True:
            for module in self.distiller.student.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        accumulated, teacher_outputs = self.settings.gradient_accumulation_steps, self.teacher_outputs["train"]
        start, sizes, steps = state.step, self.train.sizes_of(number), self.train.steps
        teacher_outputs.start_epoch(number, start)
        self.requests.start()
        for position, batch in enumerate(self.train.epoch(number, start), start=start):
            if position == start:
                self.compiler.prepare(batch.images)
            first = position - position % accumulated  # batch of this update
            complete = (position + 1) % accumulated == 0 or position + 1 == steps
            with self.compute.processes.stepping():
                with self.ddp.step(complete):
                    step = self._forward(batch, teacher_outputs, self.ddp.call, self.compute.autocast())
                    self.compute.processes.mark()
                    share = self.ddp.loss_weight(len(batch), sizes[position])
                    self.gradients.add(step, min(accumulated, steps - first), share)
                if complete:
                    self._update()
                state.metrics.update(step.logits.detach(), batch.labels)
                state.averages.update(step.terms, len(batch), position + 1)
            self.observer.step(sizes[position])
            if complete:
                state.step = position + 1
                if self.requests.poll() and self.settings.checkpoint_seconds != 0:
                    self._save(number, state, background=True)
        teacher_outputs.flush()

    @contextmanager
    def _frozen_encoder(self, number: int) -> Iterator[None]:
        """In the first ``freeze`` epochs the student's head alone gets gradients."""
        frozen = []
        if number < self.settings.freeze and self.head is not None:
            frozen = [
                parameter
                for name, parameter in self.distiller.student.named_parameters()
                if parameter.requires_grad and not name.startswith(f"{self.head}.")
            ]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def _write_records(self) -> None:
        if self.compute.processes.first:
            self.history.lines = write_json_lines(self.folder / "metrics.jsonl", self.history.records)

    def _save(self, number: int, state: EpochState, *, background: bool = False) -> None:
        gathered = self.ddp.gather(state.metrics, state.averages)
        if gathered is not None:
            metrics, averages = gathered
            # Raises if the loss is not finite, before a checkpoint is written.
            averages.compute(f"epoch {number + 1}, training", partial(self.train.names_at, number))
            state = replace(state, metrics=metrics, averages=averages)
        self.teacher_outputs["train"].flush()
        self.checkpointer.save(number, state, background=background)

    def _forward(
        self,
        batch: Batch,
        teacher_outputs: TeacherOutputs,
        distiller: Callable[..., Step],
        precision: AbstractContextManager[object],
    ) -> Step:
        batch = replace(batch, images=self._to_memory_format(batch.images))
        if batch.second is not None:
            batch = replace(batch, second=self._to_memory_format(batch.second))
        teacher = teacher_outputs(batch)
        with precision:
            return distiller(**vars(batch), teacher=teacher)

    def _to_memory_format(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self.compute.memory_format)

    def _update(self) -> None:
        if self.settings.max_grad_norm is not None:
            self.gradients.clip(self.settings.max_grad_norm)
        self.gradients.step()
        with _no_order_warning(self.compute.fp16 and self.schedule.last_epoch == 0):
            self.schedule.step()
        self.ddp.sync_method_buffers()
        if self.average is not None:
            self.average.update_parameters(self.distiller.student)

    @torch.no_grad()
    def _evaluate(self, epoch: int, split: str, loader: "Loader") -> EpochRecord:
        """Evaluate in float32 like the final metrics, so that the best epoch's val metrics are the reported ones."""
        self.distiller.eval()
        metrics, averages = StreamingMetrics(self.classes, device=self.compute.device), TermAverages()
        teacher_outputs = self.teacher_outputs[split]
        teacher_outputs.start_epoch(0)
        self.requests.start()
        for position, batch in enumerate(loader.epoch(0)):
            number, common = self.ddp.batch_number(loader, position)
            if common:
                self.requests.poll()
            with self.compute.processes.stepping():
                step = self._forward(batch, teacher_outputs, self.distiller, nullcontext())
                metrics.update(step.logits, batch.labels)
                averages.update(step.terms, len(batch), number)
        teacher_outputs.flush()
        return self._record_metrics(EpochState(metrics, averages, lr=0.0), f"epoch {epoch + 1}, {split}", loader, 0)

    def _record_metrics(self, state: EpochState, where: str, loader: "Loader", epoch: int) -> EpochRecord:
        gathered, record = self.ddp.gather(state.metrics, state.averages), None
        if gathered is not None:
            metrics, averages = gathered
            terms = averages.compute(where, partial(loader.names_at, epoch))
            record = {**metrics.compute(), "loss": sum(terms.values()), "terms": terms}
        found: EpochRecord | None = self.compute.processes.share(record)
        assert found is not None  # the first process has computed it
        return found

    def _is_better(self, value: float, val: EpochRecord) -> bool:
        """Return whether an epoch is the best so far; of equal ones (AUC is soon 1) that with the higher top-1 is."""
        if value != self.history.best_value:
            return value > self.history.best_value
        records, best = self.history.records, self.history.best_epoch
        top1 = [float(each["val"].get("top1") or 0) for each in records if each["epoch"] == best]
        return float(val.get("top1") or 0) > max(top1, default=0.0)

    def _should_stop_early(self, number: int) -> bool:
        patience = self.settings.early_stopping_patience
        return patience is not None and number > 0 and number - self.history.best_epoch >= patience


def needs_trial(compute: Compute) -> bool:
    """Return whether memory is tried before training: a GPU's has a fixed size, and a step takes it no time."""
    return compute.device.type == "cuda"


_EXCHANGE_SECONDS = 1.0  # between two exchanges of requests
_MAX_GROWTH = 4  # of the steps between them, from one to the next


class _RequestExchange:
    """Signals and due checkpoints, on which all processes act at the same step, exchanged about once a second."""

    def __init__(
        self,
        signals: SignalHandler,
        checkpointer: Checkpointer,
        processes: ProcessGroup,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.signals, self.checkpointer, self.processes, self.clock = signals, checkpointer, processes, clock
        self.start()

    def start(self) -> None:
        """Exchange at the next step; call where steps begin to take another time."""
        self._interval, self._left, self._since = 1, 1, self.clock()

    def poll(self) -> bool:
        """Return whether a checkpoint is due; all processes call this after a step."""
        self._left -= 1
        if self.processes.several and self._left > 0:
            return False
        _, due = self.exchange()
        self.signals.check()
        return due

    def exchange(self) -> tuple[bool, bool]:
        """Return whether any process received a signal, and whether any has a checkpoint due."""
        seconds = self.clock() - self._since
        steps = int(min(_MAX_GROWTH, _EXCHANGE_SECONDS / max(seconds, 1e-9)) * self._interval)
        wanted = max(1, steps)
        number, due, fewest = self.processes.highest(
            self.signals.requested or 0, int(self.checkpointer.is_due), -wanted
        )
        self.signals.requested = number or None
        self._interval = self._left = -fewest
        self._since = self.clock()
        return number > 0, due > 0


@contextmanager
def _no_order_warning(enabled: bool) -> Iterator[None]:
    """Suppress torch's warning if the first update was dropped, as its gradients overflowed in fp16."""
    with warnings.catch_warnings() if enabled else nullcontext():
        if enabled:
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        yield


def _head_path(network: nn.Module, size: int) -> str:
    device = next(network.parameters()).device
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    head = find_stages(network, example).head
    if head is None:
        raise UsageError(
            f"training.freeze trains the linear layer that puts out the logits alone, and {type(network).__name__} "
            "ends in none: leave it out"
        )
    return head


@contextmanager
def _averaged_weights(student: nn.Module, average: ModelEma | None) -> Iterator[None]:
    """Within the block, the student has its averaged weights if there are any."""
    if average is None:
        yield
        return
    trained = copy_state_dict(student)
    student.load_state_dict(average.module.state_dict())
    try:
        yield
    finally:
        student.load_state_dict(trained)


def selection_value(metric: str, record: EpochRecord) -> float:
    """Return the selection metric such that more is better (the loss without classes); undefined is worst."""
    if not record["count"]:
        return -float(record["loss"])
    value = record[metric]
    if value is None:
        return -1e300
    return -value if metric == "nll" else float(value)
